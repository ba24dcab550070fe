"""Options that mean the same everywhere, and how names on the command line become objects."""

import json
import pkgutil
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from crm.config import Config, override, parse_set
from crm.machine import FOLDERS, Machine, cores, home
from crm.names import chosen, unknown
from crm.recipes import RECIPES
from crm.sweep import Sweep

Set = Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a setting (repeatable).")]
Runs = Annotated[Path | None, typer.Option("--runs", help="Folder of the run folders. [default: runs]")]
Data = Annotated[
    Path | None, typer.Option("--data", envvar="CRM_DATA", help="A data set's folder, or one that holds several.")
]
Seeds = Annotated[str, typer.Option("--seeds", metavar="0,1,2", help="Other seeds than the sweep's own.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Recipe = Annotated[str, typer.Option("--recipe", help="clean, or released: with the quirks of the released code.")]
Loaders = Annotated[
    int, typer.Option("--loader-workers", min=0, help="Processes that prepare a run's batches; 0 is the run itself.")
]
Cache = Annotated[bool, typer.Option("--cache", help="Keep decoded frames in cache/, in files that all runs share.")]
On = Annotated[
    list[str] | None,
    typer.Option("--machine", metavar="NAME=VALUE", help="How it is computed, as in precision=bf16 (repeatable)."),
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")]


def runs_folder(given: Path | None) -> Path:
    return given or home() / "runs"


def cache_folder(wanted: bool) -> Path | None:
    return home() / "cache" if wanted else None


def data_folder(given: Path | None) -> Path | None:
    """The data root: the one given, else data/ below the home folder where that exists."""
    if given is not None:
        return given
    default = home() / "data"
    return default if default.is_dir() else None


def changes(sets: list[str] | None) -> dict[str, Any]:
    return dict(parse_set(text) for text in sets or [])


def modules(package: str) -> list[str]:
    """Names of the modules of `experiments` or `sweeps`, found without importing them."""
    return sorted(info.name for info in pkgutil.iter_modules(import_module(package).__path__))


def find_experiment(name: str, recipe: str = "clean") -> Config:
    if name not in modules("experiments"):
        raise unknown("experiment", name, modules("experiments"))
    return chosen("recipe", recipe, RECIPES)(import_module(f"experiments.{name}").config)


def find_sweep(name: str, seeds: str = "") -> Sweep:
    """The sweep of that name, with other seeds where some are given, as in `0,1,2`."""
    if name not in modules("sweeps"):
        raise unknown("sweep", name, modules("sweeps"))
    found = import_module(f"sweeps.{name}").sweep
    if not seeds:
        return found
    try:
        return replace(found, seeds=tuple(int(seed) for seed in seeds.split(",")))
    except ValueError as error:
        raise ValueError(f"--seeds takes different whole numbers, as in 0,1,2, not {seeds!r}") from error


def question(package: str, name: str) -> str:
    """First line of the module's docstring: what it is about."""
    return (import_module(f"{package}.{name}").__doc__ or "").strip().partition("\n")[0]


def with_changes(config: Config, sets: list[str] | None) -> Config:
    return override(config, changes(sets))


def with_machine(machine: Machine, given: list[str] | None) -> Machine:
    """The machine with what --machine says; ValueError names what can be said."""
    wanted = dict(parse_set(text, "--machine takes name=value, as in precision=bf16") for text in given or [])
    known = [field.name for field in fields(machine) if field.name not in (*FOLDERS, "device", "threads", "processes")]
    for name in wanted:
        if name not in known:
            raise unknown("--machine setting", name, known)
    return override(machine, wanted)


def share_of_threads(workers: int) -> int:
    """Threads of each of `workers` runs on this machine."""
    return max(1, cores() // workers)


def interrupted() -> NoReturn:
    """Says how to go on, and ends with 130."""
    typer.echo("crm: interrupted; run the same command again to resume", err=True)
    raise typer.Exit(130)


def echo_json(value: Any) -> None:
    from crm.records import finite

    typer.echo(json.dumps(finite(value), indent=1, default=str))


def table(rows: list[list[str]], header: list[str]) -> str:
    """Columns aligned by spaces, for a terminal of any kind."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def duration(seconds: float | None) -> str:
    """`1 h 05 min`, `3 min 20 s` or `12 s`; `unknown` where there is nothing to go by."""
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
