"""The `crm` command: parse, call one function, print what it returns.

Exit codes: 0 done; 1 the thing asked for failed or was found wrong; 2 the input is wrong; 3 nothing to do; 4 refused;
130 interrupted, run again to resume. Heavy libraries load inside the commands, so that help and status are instant.
"""

import os
import sys

import typer

from crm.cli import (
    claims,
    clean,
    cluster,
    data,
    diagnose,
    diff,
    evaluate,
    inspect,
    logs,
    pack,
    plan,
    predict,
    runs,
    status,
    sweeps,
    tables,
    weights,
    why,
)
from crm.cluster.folder import Busy
from crm.cluster.slurm import Unreachable

app = typer.Typer(
    name="crm",
    help="Experiments and ablations around complementary random masking for RGB-thermal segmentation.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
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


inspect.add_to(app)
data.add_to(app)
plan.add_to(app)
sweeps.add_to(app)
status.add_to(app)
cluster.add_to(app)
runs.add_to(app)
evaluate.add_to(app)
predict.add_to(app)
diagnose.add_to(app)
weights.add_to(app)
logs.add_to(app)
clean.add_to(app)
claims.add_to(app)
tables.add_to(app)
why.add_to(app)
diff.add_to(app)
pack.add_to(app)


def main() -> None:
    """The entry point. What a user got wrong becomes one message and exit code 2; CRM_DEBUG=1 shows the traceback.

    A scheduler that does not answer, or another process at the same sweep, is nobody's mistake: exit code 1.
    """
    try:
        app()
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except plan.Refused as error:
        typer.echo(f"crm: refused: {error}", err=True)
        sys.exit(4)
    except (ValueError, OSError, Unreachable, Busy) as error:
        if os.environ.get("CRM_DEBUG"):
            raise
        typer.echo(f"crm: {error}", err=True)
        sys.exit(1 if isinstance(error, (Unreachable, Busy)) else 2)
