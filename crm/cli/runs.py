"""Single runs: train an experiment, evaluate a trained run."""

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from uuid import uuid4

import typer

from crm.cli import options
from crm.cli.options import Data, Device, Json, Recipe, Runs, Set
from crm.conditions import CLEAN_TEST, Condition, suite
from crm.machine import Machine, cores, home, initial_file
from crm.sweep import SELECTIONS

if TYPE_CHECKING:
    from crm.train import Progress

Threads = Annotated[int, typer.Option(min=0, help="CPU threads. [default: all cores]")]


def add_to(app: typer.Typer) -> None:
    app.command()(train)
    app.command()(evaluate)


def train(
    experiment: Annotated[str, typer.Argument(help="An experiment, as in `crm list experiments`.")],
    recipe: Recipe = "clean",
    sets: Set = None,
    runs: Runs = None,
    data: Data = None,
    device: Device = "cpu",
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Trains one experiment here, from its newest checkpoint on, and evaluates it on clean test frames."""
    from crm.data.dataset import open_run_split
    from crm.records import open_run

    config = options.with_changes(options.find_experiment(experiment, recipe), sets)
    data_root = options.data_folder(data)
    for split in ("train", "val", "test"):
        open_run_split(config.data, split, data_root)  # refuses before anything is written
    initial_file(config.model.init, None)
    folder = open_run(options.runs_folder(runs), config)
    _carry_out(folder, _machine(folder.parent, data_root, device, threads), "last", [CLEAN_TEST], json)


def evaluate(
    target: Annotated[str, typer.Argument(help="A run id, enough of its first digits, or a file of weights.")],
    on: Annotated[str | None, typer.Option(help="A data set of as many classes. [default: the run's]")] = None,
    suite_name: Annotated[str, typer.Option("--suite", help="A suite, as in `crm list suites`.")] = "robustness",
    selection: Annotated[str, typer.Option("--select", help=f"Checkpoint: {' or '.join(SELECTIONS)}.")] = "last",
    runs: Runs = None,
    data: Data = None,
    device: Device = "cpu",
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Evaluates a trained run, or weights from elsewhere, under a suite of conditions.

    What is on disk already is not computed again. A file of weights is imported first, as `crm weights import` does.
    """
    from crm.names import chosen
    from crm.records import lacking

    chosen("selection", selection, dict.fromkeys(SELECTIONS))
    conditions = suite(suite_name)
    folder, selection = find_target(options.runs_folder(runs), target, on, selection, options.data_folder(data))
    if not lacking(folder, selection, conditions):
        _print_scores(folder, selection, conditions, json)
        raise typer.Exit(3)
    _carry_out(folder, _machine(folder.parent, options.data_folder(data), device, threads), selection, conditions, json)


def find_target(runs: Path, target: str, on: str | None, selection: str, data: Path | None) -> tuple[Path, str]:
    """The run folder and checkpoint to evaluate; weights from elsewhere are imported, if the data set is there."""
    from crm.cli.weights import report_text
    from crm.data.dataset import open_split
    from crm.records import read_config

    if on is not None:
        open_split(on, "test", data_root=data)  # refuses before anything is written
    if not _runs(runs, target) and Path(target).exists():
        from crm.weights.files import KINDS, read_source
        from crm.weights.imports import import_network, network_config

        source = read_source(Path(target))
        if not KINDS[source.kind].whole:
            raise ValueError(f"{target} is a {source.title}: a backbone alone predicts nothing")
        config, num_classes = network_config(source, None, on, {})
        if (own := len(source.weights["query_decoder.class_embed.weight"]) - 1) != num_classes:
            raise ValueError(f"{target} has {own} classes, but {config.data.dataset} has {num_classes}")
        open_split(config.data.dataset, "test", data_root=data)
        made = import_network(source, runs, dataset=on)
        typer.echo(report_text(made.report), err=True)
        return made.path, "last"
    folder = find_run(runs, target)
    if not (folder / "result.json").exists():
        raise ValueError(f"run {folder.name} is not trained to its end; crm train or crm sweep finishes it")
    checkpoint_file(folder, selection)
    if on is None or read_config(folder).data.dataset == on:
        return folder, selection
    from crm.weights.imports import import_run

    return import_run(folder, selection, on, runs), "last"


def checkpoint_file(folder: Path, selection: str) -> Path:
    """The file of a run's selected checkpoint; ValueError names those it has."""
    path = folder / "checkpoints" / f"{selection}.safetensors"
    if not path.exists():
        there = [found.stem for found in sorted(path.parent.glob("*.safetensors")) if "." not in found.stem]
        raise ValueError(f"run {folder.name} has no checkpoint {selection!r}; it has {', '.join(there) or 'none'}")
    return path


def find_run(runs: Path, prefix: str) -> Path:
    """The run folder whose id begins so; ValueError where none or several do."""
    found = _runs(runs, prefix)
    if not found:
        raise ValueError(f"no run {prefix!r} in {runs}; `crm status SWEEP --json` lists the ids of a sweep")
    if len(found) > 1:
        raise ValueError(f"{prefix!r} could be {', '.join(path.name for path in found[:5])}; give more digits")
    return found[0]


def _runs(runs: Path, prefix: str) -> list[Path]:
    """The run folders whose ids begin so."""
    if not re.fullmatch(r"[0-9a-z]+|import-[0-9a-f]*", prefix):
        return []
    return sorted(path for path in runs.glob(f"{prefix}*") if (path / "config.json").exists())


def _machine(runs: Path, data: Path | None, device: str, threads: int) -> Machine:
    return Machine(runs=runs, data=data, weights=home() / "weights", device=device, threads=threads or cores())


def _carry_out(folder: Path, machine: Machine, selection: str, conditions: Sequence[Condition], json: bool) -> None:
    """One attempt in this process, with progress on the terminal; exits by what became of it."""
    from crm.records import read_json
    from crm.worker import DONE, STOPPED, TAKEN, StopFlag, attempt

    stop = StopFlag()
    stop.listen()
    code = attempt(folder, machine, uuid4().hex[:16], selection, conditions, stop, Line(quiet=json))
    if code == STOPPED:
        options.interrupted()
    if code == TAKEN:
        raise ValueError(f"run {folder.name} is being worked on by another process; crm status shows it")
    if code != DONE:
        failure = read_json(folder / "failure.json")
        typer.echo(f"failed at step {failure['step']}: {failure['reason']}", err=True)
        raise typer.Exit(1)
    _print_scores(folder, selection, conditions, json)


def _print_scores(folder: Path, selection: str, conditions: Sequence[Condition], json: bool) -> None:
    from crm.confusion import load_evaluation
    from crm.records import evaluation, read_json

    found = {each.name: load_evaluation(evaluation(folder, selection, each)) for each in conditions}
    if json:
        result = read_json(folder / "result.json")
        scores = {name: each.miou for name, each in found.items()}
        released = {name: each.released_miou for name, each in found.items()}
        options.echo_json(
            {"run": folder.name, "folder": folder, "result": result, "miou": scores, "released_miou": released}
        )
        return
    typer.echo(f"run {folder.name}  {folder}")
    rows = [[name, f"{each.miou:.1f}", f"{each.released_miou:.1f}"] for name, each in found.items()]
    typer.echo(options.table(rows, ["condition", "mIoU", "released mIoU"]))
    if any(f"{each.miou:.1f}" != f"{each.released_miou:.1f}" for each in found.values()):
        typer.echo("released mIoU: a class that occurs nowhere counts 0; mIoU leaves it out")


class Line:
    """Progress of one run: rewritten in place on a terminal, a line every few seconds elsewhere."""

    EVERY = 10.0  # seconds between lines where they cannot be rewritten

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.told = quiet, 0.0
        self.live = sys.stderr.isatty()

    def __call__(self, progress: "Progress") -> None:
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
        end = "\n" if last or not self.live else ""
        print(f"\r\033[K{text}" if self.live else text, end=end, file=sys.stderr, flush=True)
