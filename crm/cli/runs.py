"""Single runs: training one, finding one, and carrying one out."""

import logging
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from uuid import uuid4

import typer

from crm.cli import options
from crm.cli.options import Cache, Data, Device, FromScratch, Json, Loaders, On, Recipe, Runs, Set
from crm.conditions import CLEAN_TEST, Condition
from crm.config import Config
from crm.machine import Machine, cores, home, initial_file

if TYPE_CHECKING:
    from crm.evaluate import Scored
    from crm.train import Progress

Threads = Annotated[int, typer.Option(min=0, help="CPU threads. [default: all cores]")]


def add_to(app: typer.Typer) -> None:
    app.command()(train)


def train(
    experiment: Annotated[str, typer.Argument(help="An experiment, as in `crm list experiments`.")],
    recipe: Recipe = "clean",
    sets: Set = None,
    from_scratch: FromScratch = False,
    runs: Runs = None,
    data: Data = None,
    device: Device = "cpu",
    threads: Threads = 0,
    loader_workers: Loaders = 0,
    cache: Cache = False,
    machine: On = None,
    track: Annotated[bool, typer.Option("--track/--no-track", help="Mirror the run into MLflow.")] = True,
    json: Json = False,
) -> None:
    """Trains one experiment here, from its newest checkpoint on, and evaluates its checkpoints on clean test frames.

    Started by torchrun or as several tasks of a Slurm step, the processes share every batch.
    """
    from crm.data.dataset import open_run_split, run_splits
    from crm.distributed import announced, join, leave, world
    from crm.records import lacking, open_run, recorded_numerics
    from crm.train import refuse_impossible

    config = options.with_changes(options.find_experiment(experiment, recipe), options.scratch(sets, from_scratch))
    data_root = options.data_folder(data)
    frames = options.cache_folder(cache)
    where = replace(
        run_machine(options.runs_folder(runs), data_root, device, threads),
        loader_workers=loader_workers,
        cache=frames,
        processes=announced().size,
    )
    where = options.with_machine(where, machine)
    images = {}
    for split in run_splits(config.data):  # from here to open_run everything refuses before anything is written
        opened = open_run_split(config.data, split, data_root, frames)
        opened.verify()
        images[split] = len(opened)
    refuse_impossible(config, where, images)
    initial_file(config.model.init, None, options.runs_folder(runs))
    folder = open_run(options.runs_folder(runs), config)
    if not (folder / "result.json").exists():
        recorded_numerics(folder, where)
    elif all(not lacking(folder, selection, [CLEAN_TEST]) for selection in selections(config)):
        _print_selections(folder, config, json)
        raise typer.Exit(3)
    join(device)
    with mirrored(experiment, config, folder, track and world().chief, json):
        for selection in selections(config):
            carry_out(folder, where, selection, [CLEAN_TEST], json)
    if world().chief:
        _print_selections(folder, config, json)
    leave()


@contextmanager
def mirrored(experiment: str, config: Config, folder: Path, track: bool, json: bool) -> Iterator[None]:
    """Mirrors a run into MLflow while the caller works on it."""
    from crm.cli.local import untracked
    from crm.tracking.listing import list_run
    from crm.tracking.process import start

    if not track:
        yield
        return
    mirror = start(folder.parent, list_run(folder.parent, experiment, config, folder.name).name)
    try:
        yield
    finally:
        if trouble := mirror.finish():
            typer.echo(untracked(trouble), err=True)


def checkpoint_file(folder: Path, selection: str) -> Path:
    """The file of a run's selected checkpoint; ValueError names those it has."""
    path = folder / "checkpoints" / f"{selection}.safetensors"
    if not path.exists():
        there = [found.stem for found in sorted(path.parent.glob("*.safetensors")) if "." not in found.stem]
        raise ValueError(f"run {folder.name} has no checkpoint {selection!r}; it has {', '.join(there) or 'none'}")
    return path


def find_run(runs: Path, prefix: str) -> Path:
    """The run folder whose id begins so; ValueError where none or several do."""
    found = matching_runs(runs, prefix)
    if not found:
        close = get_close_matches(prefix, options.modules("sweeps"), n=1, cutoff=0.7)
        hint = f" Did you mean the sweep {close[0]!r}?" if close else ""
        raise ValueError(f"no run {prefix!r} in {runs}; `crm status SWEEP --json` lists the ids of a sweep.{hint}")
    if len(found) > 1:
        raise ValueError(f"{prefix!r} could be {', '.join(path.name for path in found[:5])}; give more digits")
    return found[0]


def matching_runs(runs: Path, prefix: str) -> list[Path]:
    """The run folders whose ids begin so."""
    if not re.fullmatch(r"[0-9a-z]+|import-[0-9a-f]*", prefix):
        return []
    return sorted(path for path in runs.glob(f"{prefix}*") if (path / "config.json").exists())


def run_machine(runs: Path, data: Path | None, device: str, threads: int) -> Machine:
    return Machine(runs=runs, data=data, weights=home() / "weights", device=device, threads=threads or cores())


def selections(config: Config) -> list[str]:
    """The checkpoints that a run of this config has, the one it is judged by first."""
    from crm.data.dataset import run_splits

    return ["last", *(["val_best"] if "val" in run_splits(config.data) else []), *(["test_best"] * config.test_best)]


def carry_out(folder: Path, machine: Machine, selection: str, conditions: Sequence[Condition], json: bool) -> None:
    """One attempt in this process, with progress on the terminal; exits unless all of it was done."""
    from crm.distributed import leave, world
    from crm.records import read_json
    from crm.worker import DONE, STOPPED, TAKEN, StopFlag, attempt

    stop = StopFlag()
    stop.listen()
    quiet = json or not world().chief
    errors = _log_to(folder / "log.txt")
    code = attempt(folder, machine, uuid4().hex[:16], selection, conditions, stop, Line(quiet=quiet))
    if code == STOPPED:
        leave()  # all processes stopped at the same step
        options.interrupted()
    if code == TAKEN:
        raise ValueError(f"run {folder.name} is being worked on by another process; crm status shows it")
    if code != DONE:
        failure = read_json(folder / "failure.json")
        told = f"failed at step {failure['step']}: {failure['reason']}" if failure else "; ".join(errors)
        if world().chief:
            typer.echo(f"crm: {told}", err=True)
        raise typer.Exit(1)


def _log_to(path: Path) -> list[str]:
    """Sends what is logged to a file, tracebacks and all; errors are also put, in words, into the list."""
    errors: list[str] = []

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno < logging.ERROR:
                typer.echo(f"crm: {record.getMessage()}", err=True)
            else:
                errors.append(record.getMessage())

    heard = Heard(logging.WARNING)
    logging.raiseExceptions = False  # a folder that is gone or full cannot take a log either
    file = logging.FileHandler(path, delay=True)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[file, heard], force=True)
    return errors


def _print_selections(folder: Path, config: Config, json: bool) -> None:
    """Each checkpoint of a trained run: what chose it, and what it scores on all clean test frames."""
    from crm.confusion import load_evaluation
    from crm.records import evaluation, read_json

    result = read_json(folder / "result.json")
    names = selections(config)
    found = {name: load_evaluation(evaluation(folder, name, CLEAN_TEST)) for name in names}
    gap = found["test_best"].released_miou - found["val_best"].released_miou if len(names) == 3 else None
    if json:
        scores = {name: {"miou": each.miou, "released_miou": each.released_miou} for name, each in found.items()}
        options.echo_json({"run": folder.name, "folder": folder, "result": result, "test": scores, "optimism": gap})
        return
    typer.echo(f"run {folder.name}  {folder}")
    rows = []
    for name, each in found.items():
        chosen = result.get(name) or {"step": result["steps"], "miou": None}
        why = f"{chosen['miou']:.1f} on {name.partition('_')[0]}" if chosen["miou"] is not None else "the end"
        rows.append([name, str(chosen["step"]), why, f"{each.miou:.1f}", f"{each.released_miou:.1f}"])
    typer.echo(options.table(rows, ["checkpoint", "step", "chosen for", "test mIoU", "released mIoU"]))
    if any(f"{each.miou:.1f}" != f"{each.released_miou:.1f}" for each in found.values()):
        typer.echo("released mIoU: a class that occurs nowhere counts 0; mIoU leaves it out")
    if gap is not None:
        typer.echo(f"optimism of choosing on test: {gap:+.1f} points over choosing on val")


class Line:
    """Progress of one run: rewritten in place on a terminal, a line every few seconds elsewhere."""

    EVERY = 10.0  # seconds between lines where they cannot be rewritten

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.told = quiet, 0.0
        self.live = sys.stderr.isatty()

    def __call__(self, progress: "Progress | Scored") -> None:
        from crm.evaluate import Scored

        if isinstance(progress, Scored):
            self._scored(progress)
            return
        last = progress.step == progress.steps
        if self.quiet or (not last and time.monotonic() - self.told < (0.2 if self.live else self.EVERY)):
            return
        self.told = time.monotonic()
        terms = ", ".join(f"{name} {value:.2f}" for name, value in progress.terms.items())
        score = f"  val mIoU {progress.miou:.1f}" if progress.miou is not None else ""
        text = (
            f"step {progress.step}/{progress.steps}  loss {progress.total:.2f} ({terms}){score}"
            f"  {progress.seconds:.2f} s/step  eta {options.duration(progress.eta)}"
        )
        self._print(text, last)

    def _scored(self, scored: "Scored") -> None:
        last = scored.done == scored.count
        soon = time.monotonic() - self.told < (0.2 if self.live else self.EVERY)
        if self.quiet or scored.seconds < 2 or (soon and not last):
            return
        self.told = time.monotonic()
        share = f"{100 * scored.done / scored.count:.0f} %"
        text = f"evaluated {scored.done} of {scored.count} images x conditions ({share}), "
        self._print(text + f"{options.duration(scored.eta)} to go", last)

    def _print(self, text: str, last: bool) -> None:
        end = "\n" if last or not self.live else ""
        print(f"\r\033[K{text}" if self.live else text, end=end, file=sys.stderr, flush=True)
