"""Single runs: train an experiment, evaluate a trained run."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from uuid import uuid4

import typer

from crm.cli import options
from crm.cli.options import Data, Device, Json, Runs, Set
from crm.conditions import CLEAN_TEST, Condition, suite
from crm.machine import Machine, cores
from crm.sweep import SELECTIONS

if TYPE_CHECKING:
    from crm.train import Progress

Suite = Annotated[str, typer.Option(help="Conditions of the evaluation, as in `crm list suites`.")]
Select = Annotated[str, typer.Option(help=f"Which checkpoint: {' or '.join(SELECTIONS)}.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads. [default: all cores]")]


def add_to(app: typer.Typer) -> None:
    app.command()(train)
    app.command()(evaluate)


def train(
    experiment: Annotated[str, typer.Argument(help="An experiment, as in `crm list experiments`.")],
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

    config = options.with_changes(options.find_experiment(experiment), sets)
    data_root = options.data_folder(data)
    for split in ("train", "val", "test"):
        open_run_split(config.data, split, data_root)  # refuses before anything is written
    folder = open_run(options.runs_folder(runs), config)
    _carry_out(folder, _machine(folder.parent, data_root, device, threads), "last", [CLEAN_TEST], json)


def evaluate(
    run: Annotated[str, typer.Argument(help="A run id, or enough of its first digits.")],
    suite_name: Annotated[str, typer.Option("--suite", help="A suite, as in `crm list suites`.")] = "robustness",
    selection: Annotated[str, typer.Option("--select", help=f"Checkpoint: {' or '.join(SELECTIONS)}.")] = "last",
    runs: Runs = None,
    data: Data = None,
    device: Device = "cpu",
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Evaluates a trained run under a suite of conditions; what is on disk already is not computed again."""
    from crm.names import chosen
    from crm.records import lacking

    chosen("selection", selection, dict.fromkeys(SELECTIONS))
    conditions = suite(suite_name)
    folder = find_run(options.runs_folder(runs), run)
    if not (folder / "result.json").exists():
        raise ValueError(f"run {folder.name} is not trained to its end; crm train or crm sweep finishes it")
    if not lacking(folder, selection, conditions):
        _print_scores(folder, selection, conditions, json)
        raise typer.Exit(3)
    _carry_out(folder, _machine(folder.parent, options.data_folder(data), device, threads), selection, conditions, json)


def find_run(runs: Path, prefix: str) -> Path:
    """The run folder whose id begins so; ValueError where none or several do."""
    found = (
        sorted(path for path in runs.glob(f"{prefix}*") if (path / "config.json").exists()) if prefix.isalnum() else []
    )
    if not found:
        raise ValueError(f"no run {prefix!r} in {runs}; `crm status SWEEP --json` lists the ids of a sweep")
    if len(found) > 1:
        raise ValueError(f"{prefix!r} could be {', '.join(path.name for path in found[:5])}; give more digits")
    return found[0]


def _machine(runs: Path, data: Path | None, device: str, threads: int) -> Machine:
    return Machine(runs=runs, data=data, device=device, threads=threads or cores())


def _carry_out(folder: Path, machine: Machine, selection: str, conditions: list[Condition], json: bool) -> None:
    """One attempt in this process, with progress on the terminal; exits by what became of it."""
    from crm.records import read_json
    from crm.worker import DONE, STOPPED, TAKEN, StopFlag, attempt

    stop = StopFlag()
    stop.listen()
    code = attempt(folder, machine, uuid4().hex[:16], selection, conditions, stop, Line(quiet=json))
    if code == STOPPED:
        raise KeyboardInterrupt
    if code == TAKEN:
        raise ValueError(f"run {folder.name} is being worked on by another process; crm status shows it")
    if code != DONE:
        failure = read_json(folder / "failure.json")
        typer.echo(f"failed at step {failure['step']}: {failure['reason']}", err=True)
        raise typer.Exit(1)
    _print_scores(folder, selection, conditions, json)


def _print_scores(folder: Path, selection: str, conditions: list[Condition], json: bool) -> None:
    from crm.confusion import load_evaluation
    from crm.records import evaluation, read_json

    scores = {each.name: load_evaluation(evaluation(folder, selection, each)).miou for each in conditions}
    if json:
        result = read_json(folder / "result.json")
        options.echo_json({"run": folder.name, "folder": folder, "result": result, "miou": scores})
        return
    typer.echo(f"run {folder.name}  {folder}")
    typer.echo(options.table([[name, f"{value:.1f}"] for name, value in scores.items()], ["condition", "mIoU"]))


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
