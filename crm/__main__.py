"""`python -m crm`: the command, for launchers that start a module, such as torchrun."""

from crm.cli import main

main()
