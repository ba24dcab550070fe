"""The `crm` command: parse, call one function, print what it returns.

Exit codes: 0 done; 1 the thing asked for failed or was found wrong; 2 the input is wrong; 3 nothing to do; 4 refused;
130 interrupted, run again to resume. A command's module loads when it is asked for, and heavy libraries inside the
commands, so that help and status are instant.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

# Name -> the file of this folder whose `add_to` adds it, and its line in `crm --help`, which no import is needed for.
COMMANDS = {
    "list": ("inspect", "What there is: experiments, sweeps, suites, alternatives."),
    "show": ("inspect", "What an experiment is, and what was published for it."),
    "doctor": ("inspect", "What this machine has, what is missing, how to get it."),
    "plan": ("plan", "What a sweep would do, reuse and cost."),
    "sweep": ("sweeps", "Runs what a sweep lacks; shows the plan first."),
    "report": ("sweeps", "Writes a sweep's tables, figures and page."),
    "status": ("status", "How a sweep or a table stands. Touches nothing."),
    "init": ("cluster", "Writes a settings file to fill in."),
    "reconcile": ("cluster", "Looks after a sweep on a cluster once."),
    "hold": ("cluster", "Keeps waiting runs of a sweep from starting."),
    "release": ("cluster", "Lets held runs of a sweep start."),
    "cancel": ("cluster", "Cancels the jobs of a sweep."),
    "retry": ("cluster", "Starts failed and cancelled runs of a sweep again."),
    "train": ("runs", "Trains one experiment here, or goes on with it."),
    "evaluate": ("evaluate", "Evaluates runs or weights under a suite of conditions."),
    "predict": ("predict", "Class maps and overlays of pictures."),
    "diagnose": ("diagnose", "What a trained run relies on, and what is wrong with it."),
    "fails": ("logs", "A sweep's failures, those of one kind together."),
    "logs": ("logs", "What the attempts at a run printed."),
    "clean": ("clean", "Frees disk; only shows it without --yes."),
    "claims": ("claims", "Whether what is claimed is supported, refuted or undecided."),
    "tables": ("tables", "Writes the paper's tables from the records."),
    "cell": ("tables", "One cell with everything its number rests on."),
    "why": ("why", "Whether runs and evaluations would come out the same now."),
    "accept": ("why", "Accepts what is stale, with the reason why."),
    "diff": ("diff", "What two runs, rows or ledgers differ in."),
    "pack": ("pack", "Packs a study into one file."),
    "data": ("data", "Checks, shows and makes data sets."),
    "weights": ("weights", "Weights from elsewhere, and ours for elsewhere."),
    "tune": ("tune", "Searches for the best settings, and what it found."),
    "track": ("track", "The copy of the runs in MLflow."),
}


class Loaded(Mapping[str, Any]):
    """The commands above by name, each made from its module when it is looked up."""

    def __getitem__(self, name: str) -> Any:
        part = typer.Typer(rich_markup_mode=None, context_settings=SETTINGS)
        import_module(f"crm.cli.{COMMANDS[name][0]}").add_to(part)
        return typer.main.get_group(part).commands[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class Commands(TyperGroup):
    """Lists its commands without making them."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = Loaded()  # pyright: ignore - nothing is added to it

    def list_commands(self, ctx: object) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: object, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


SETTINGS = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    name="crm",
    cls=Commands,
    help="Experiments and ablations around complementary random masking for RGB-thermal segmentation.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=SETTINGS,
)


def _version(wanted: bool) -> bool:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"crm {version('crm-study')}")
        raise typer.Exit
    return wanted


@app.callback()
def root(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show it.")) -> None:
    """Experiments and ablations around complementary random masking for RGB-thermal segmentation."""


def main() -> None:
    """The entry point. What a user got wrong becomes one message and exit code 2; CRM_DEBUG=1 shows the traceback.

    A scheduler that does not answer, or another process at the same sweep, is nobody's mistake: exit code 1.
    """
    try:
        app()
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (SystemExit, KeyboardInterrupt):  # said before the errors below are looked up
        raise
    except _for_people() as error:
        code = _exit_code(error)
        if os.environ.get("CRM_DEBUG") and code != 4:
            raise
        typer.echo(f"crm: {'refused: ' if code == 4 else ''}{error}", err=True)
        sys.exit(code)


def _for_people() -> tuple[type[Exception], ...]:
    """The errors that speak to a person; looked up when there is one."""
    from crm.cli.plan import Refused
    from crm.cluster.folder import Busy
    from crm.cluster.slurm import Unreachable

    return ValueError, OSError, Refused, Busy, Unreachable


def _exit_code(error: Exception) -> int:
    _, _, refused, *of_others = _for_people()
    return 4 if isinstance(error, refused) else 1 if isinstance(error, tuple(of_others)) else 2
