"""Options that mean the same everywhere, and how names on the command line become objects."""

import json
import pkgutil
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from crm.config import Config, override, parse_set
from crm.machine import FOLDERS, Machine, cores, home
from crm.names import chosen, unknown
from crm.recipes import INIT_22K, RECIPES
from crm.sweep import Sweep, leave_out, moved, tiny

SweepName = Annotated[str, typer.Argument(metavar="NAME", help="A sweep, as in `crm list sweeps`.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a setting (repeatable).")]
FromScratch = Annotated[
    bool, typer.Option("--from-scratch", help="Start from no weights: the same as --set model.init=none.")
]
Runs = Annotated[Path | None, typer.Option("--runs", help="Folder of the run folders. [default: runs]")]
Data = Annotated[
    Path | None, typer.Option("--data", envvar="CRM_DATA", help="A data set's folder, or one that holds several.")
]
Seeds = Annotated[str, typer.Option("--seeds", metavar="0,1,2", help="Other seeds than the sweep's own.")]
Slurm = Annotated[
    list[str] | None,
    typer.Option("--slurm", metavar="NAME=VALUE", help="Of a job, as in partition=gpu; see cluster.toml (repeatable)."),
]
Without = Annotated[list[str] | None, typer.Option("--without", metavar="ROW", help="Leave this row out (repeatable).")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Recipe = Annotated[str, typer.Option("--recipe", help="clean, or released: with the quirks of the released code.")]
Base = Annotated[str, typer.Option("--base", metavar="EXPERIMENT", help="Put the sweep on this experiment.")]
OfBase = Annotated[str, typer.Option("--recipe", help="Of the base: clean, or released (the released code's quirks).")]
Tiny = Annotated[bool, typer.Option("--tiny", help="The sweep's tiny form: small, synthetic, to try everything out.")]
Loaders = Annotated[
    int, typer.Option("--loader-workers", min=0, help="Processes that prepare a run's batches; 0 is the run itself.")
]
Cache = Annotated[bool, typer.Option("--cache", help="Keep decoded frames in cache/, in files that all runs share.")]
On = Annotated[
    list[str] | None,
    typer.Option("--machine", metavar="NAME=VALUE", help="How it is computed, as in precision=bf16 (repeatable)."),
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")]


SEARCH = "search_"  # how the modules of `sweeps` begin that hold a search


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


def scratch(sets: list[str] | None, from_scratch: bool) -> list[str]:
    """The --set options with what --from-scratch adds."""
    return [*(sets or []), *(["model.init=none"] if from_scratch else [])]


def modules(package: str) -> list[str]:
    """Names of the modules of `experiments` or `sweeps`, found without importing them."""
    names = sorted(info.name for info in pkgutil.iter_modules(import_module(package).__path__))
    return [name for name in names if not (package == "sweeps" and name.startswith(SEARCH))]


def searches() -> list[str]:
    """Names of the searches, modules of `sweeps` too, found without importing them."""
    names = sorted(info.name for info in pkgutil.iter_modules(import_module("sweeps").__path__))
    return [name.removeprefix(SEARCH) for name in names if name.startswith(SEARCH)]


def find_experiment(name: str, recipe: str = "clean") -> Config:
    if name not in modules("experiments"):
        raise unknown("experiment", name, modules("experiments"))
    return chosen("recipe", recipe, RECIPES)(import_module(f"experiments.{name}").config)


def find_sweep(
    name: str,
    seeds: str = "",
    base: str = "",
    recipe: str = "",
    small: bool = False,
    without: Sequence[str] | None = None,
) -> tuple[str, Sweep]:
    """A sweep in one of its forms, and the name of that form, which is also a name to find it by.

    `demo` is as declared, `demo@kp_swin_t` on that experiment, `demo@kp_swin_t-released` in that recipe too,
    `demo@released` in that recipe, `demo@tiny` the tiny form; `demo+paper` is any of them evaluated under that suite.

    Args:
        seeds: others than its own, as in `0,1,2`.
        without: rows to leave out.
    """
    name, plus, suite_name = name.partition("+")
    if plus:
        name, found = find_sweep(name, seeds, base, recipe, small, without)
        return f"{name}+{suite_name}", replace(found, suite=suite_name)
    plain, at, form = name.partition("@")
    if at:
        if base or recipe or small:
            raise ValueError(f"{name} says already which form of {plain} is meant; leave out --base, --recipe, --tiny")
        base, recipe, small = form_of(form)
    if plain not in modules("sweeps"):
        raise unknown("sweep", plain, modules("sweeps"))
    found = import_module(f"sweeps.{plain}").sweep
    if small:
        if base or recipe:
            raise ValueError("--tiny has a base of its own: leave out --base and --recipe")
        found = tiny(found, find_experiment("synthetic_tiny"))
    elif base or recipe:
        found = _moved(found, find_experiment(base) if base else found.base, recipe or "clean")
    if seeds:
        try:
            found = replace(found, seeds=tuple(int(seed) for seed in seeds.split(",")))
        except ValueError as error:
            raise ValueError(f"--seeds takes different whole numbers, as in 0,1,2, not {seeds!r}") from error
    found = leave_out(found, without or [])
    form = "tiny" if small else "-".join(part for part in (base, recipe if recipe != "clean" else "") if part)
    return f"{plain}@{form}" if form else plain, found


def form_of(form: str) -> tuple[str, str, bool]:
    """Base, recipe and whether it is the tiny one, of what stands behind the @."""
    if form == "tiny":
        return "", "", True
    if form in RECIPES:
        return "", form, False
    base, _, recipe = form.rpartition("-")
    return (base, recipe, False) if recipe in RECIPES else (form, "", False)


def _moved(found: Sweep, base: Config, recipe: str) -> Sweep:
    """The sweep on a base in a recipe; what a row starts from is what the recipe starts from there."""
    found = moved(found, chosen("recipe", recipe, RECIPES)(base))
    if recipe != "released":
        return found
    variants = {}
    for label, changes in found.variants.items():
        config = override(found.base, changes)
        init = INIT_22K.get((config.data.dataset, config.model.init))
        variants[label] = {**changes, "model.init": init} if init else changes
    return replace(found, variants=variants)


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


def size(count: int) -> str:
    """Bytes as a person reads them: `512 B`, `38 kB`, `1.2 GB`."""
    if count < 1000:
        return f"{count} B"
    power = min(4, (len(str(count)) - 1) // 3)
    value = count / 1000**power
    return f"{value:.1f} {'kMGT'[power - 1]}B" if value < 10 else f"{value:.0f} {'kMGT'[power - 1]}B"
