"""Evaluating a trained run, or weights from elsewhere, also on another data set than its own."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crm.cli import options
from crm.cli.options import Data, Device, Json, Runs, Slurm
from crm.cli.runs import Threads, carry_out, checkpoint_file, find_run, matching_runs, run_machine
from crm.cli.scores import number, print_scores
from crm.conditions import Condition, condition, suite
from crm.machine import Machine
from crm.sweep import SELECTIONS

if TYPE_CHECKING:
    from crm.sweep import Cell
    from crm.weights.files import Source

Target = Annotated[str, typer.Argument(help="A run id, enough of its first digits, or a file of weights.")]
Select = Annotated[str, typer.Option("--select", help=f"Checkpoint: {', '.join(SELECTIONS)}.")]


RERUN = ("stale", "all")
SHOWN = ("clean", "worst", "EMM average", "EMM E(0.1)", "reliance gap", "mPC rgb", "mPC thermal")  # of a sweep's runs


def add_to(app: typer.Typer) -> None:
    app.command()(evaluate)


def evaluate(
    target: Annotated[str, typer.Argument(help="A run id or its first digits, a file of weights, or a sweep.")],
    on: Annotated[str | None, typer.Option(help="Another data set; of its classes those count that both have.")] = None,
    suite_name: Annotated[str, typer.Option("--suite", help="A suite, as in `crm list suites`.")] = "robustness",
    selection: Select = "last",
    subset: Annotated[str | None, typer.Option(help="Only day or night images.")] = None,
    without: Annotated[
        list[str] | None, typer.Option(metavar="CLASS", help="Leave a class out of every mean (repeatable).")
    ] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="IoU per class too.")] = False,
    runs: Runs = None,
    data: Data = None,
    device: Device = "cpu",
    threads: Threads = 0,
    rerun: Annotated[
        str, typer.Option("--rerun", metavar="WHICH", help="Compute anew: stale or all. The old ones are kept.")
    ] = "",
    workers: Annotated[
        int, typer.Option("--workers", "-j", min=0, help="Runs of a sweep at once. [default: one per core]")
    ] = 0,
    cluster: Annotated[str, typer.Option(help="Of a sweep: local, or slurm, which returns at once.")] = "local",
    resources: Slurm = None,
    json: Json = False,
) -> None:
    """Evaluates a trained run, or weights from elsewhere, or all runs of a sweep, under a suite of conditions.

    What is on disk already is not computed again. A file of weights is imported first, as `crm weights import` does. Of
    a sweep the runs that are trained are evaluated, several at once.
    """
    from crm.cli.why import cell_of
    from crm.confusion import load_evaluation
    from crm.data.dataset import open_run_split
    from crm.names import chosen
    from crm.records import evaluation, lacking, read_config

    chosen("selection", selection, dict.fromkeys(SELECTIONS))
    conditions = suite(suite_name)
    chosen("subset", subset or "day", dict.fromkeys(("day", "night")))
    chosen("cluster", cluster, dict.fromkeys(("local", "slurm")))
    chosen("--rerun", rerun or "stale", dict.fromkeys(RERUN))
    if target.partition("@")[0] in options.modules("sweeps"):
        for name, given in (("--on", on), ("--per-class", per_class), ("--without", without)):
            if given:
                raise ValueError(f"{name} is about one run, and {target} is a sweep")
        machine = run_machine(options.runs_folder(runs), options.data_folder(data), device, threads)
        evaluate_sweep(
            target, suite_name, selection, subset, machine, workers, bool(threads), cluster, resources or [], json,
            rerun,
        )  # fmt: skip
        return
    folder, selection = find_target(options.runs_folder(runs), target, on, selection, options.data_folder(data))
    for name in without or []:
        chosen("class", name, dict.fromkeys(scored_classes(folder)))
    if rerun:
        conditions = make_way(folder, cell_of(folder), selection, conditions, rerun, options.data_folder(data))
    nothing_to_do = not lacking(folder, selection, conditions)
    if not nothing_to_do:
        machine = run_machine(folder.parent, options.data_folder(data), device, threads)
        config = read_config(folder)
        for name in sorted({condition.split for condition in conditions}):
            open_run_split(config.data, name, machine.data).verify()  # refuses before anything is written
        carry_out(folder, machine, selection, conditions, json)
    found = {each.name: load_evaluation(evaluation(folder, selection, each)) for each in conditions}
    print_scores(folder, found, without or [], subset, per_class, json)
    if nothing_to_do:
        raise typer.Exit(3)


def evaluate_sweep(
    target: str,
    suite_name: str,
    selection: str,
    subset: str | None,
    machine: Machine,
    workers: int,
    own_threads: bool,
    cluster: str,
    resources: list[str],
    json: bool,
    rerun: str = "",
) -> None:
    """Evaluates every trained run of a sweep under a suite, and prints a line for each; exits with 3 if all were."""
    from crm.cli.local import places, run_cells
    from crm.cli.started import cells_of, submit_sweep
    from crm.confusion import load_evaluation
    from crm.records import evaluation, lacking
    from crm.robustness import scores_of, summary

    name, found, cells, changes = cells_of(target, None, "", "", "", False, machine.runs)
    found = replace(found, suite=suite_name, selection=selection)
    trained = [cell for cell in cells if (machine.runs / cell.id / "result.json").exists()]
    if not trained:
        raise ValueError(f"no run of {name} is trained yet; crm sweep {name} trains them")
    if len(trained) < len(cells):
        typer.echo(f"{len(cells) - len(trained)} of {len(cells)} runs are not trained and left out", err=True)
    for cell in trained:
        checkpoint_file(machine.runs / cell.id, selection)
        if rerun:
            make_way(machine.runs / cell.id, cell, selection, found.conditions, rerun, machine.data)
    todo = [cell for cell in trained if lacking(machine.runs / cell.id, selection, found.conditions)]
    say = (lambda text: None) if json else typer.echo
    if todo and cluster == "slurm":
        done = submit_sweep(f"{name}+{suite_name}", found, todo, machine, resources, True, changes, False, False, say)
        options.echo_json(done) if json else None
        return
    if todo:
        where = places(workers, machine.device, "", 1, len(todo))
        machine = machine if own_threads else replace(machine, threads=options.share_of_threads(where.workers))
        try:
            failed = run_cells(
                f"{name}+{suite_name}",
                found,
                todo,
                machine,
                where,
                "local",
                False,
                say,
                json,
                True,
                changes,
            )
        except KeyboardInterrupt:
            options.interrupted()
        if failed:
            raise typer.Exit(1)
    rows, metrics = [], []
    for cell in trained:
        paths = {one: evaluation(machine.runs / cell.id, selection, one) for one in found.conditions}
        scores = scores_of({one: load_evaluation(path) for one, path in paths.items()}, subset)
        metrics.append({"variant": cell.variant, "seed": cell.seed, "run": cell.id, **summary(scores)})
        metrics[-1]["miou"] = {one.name: score for one, score in scores.items()}
        rows.append([cell.label, *(number(metrics[-1].get(key)) for key in SHOWN)])
    if json:
        options.echo_json({"sweep": name, "suite": suite_name, "subset": subset, "cells": metrics})
    else:
        typer.echo(options.table(rows, ["run", *SHOWN]) + f"\nmIoU, per cent, {subset or 'all'} test images")
    if not todo:
        raise typer.Exit(3)


def make_way(
    folder: Path, cell: "Cell", selection: str, conditions: Sequence[Condition], rerun: str, data: Path | None
) -> list[Condition]:
    """Moves evaluations that are to be computed anew out of the way; which conditions are then to be evaluated.

    A choice of checkpoint that is stale is not, for evaluating mends nothing there. Where frames have changed, all
    evaluations of their split go: those on other frames could not stand beside the new ones.
    """
    from crm.stale import evaluations_stale, supersede_evaluations

    checkpoint_file(folder, selection)
    there = there_are(folder).get(selection, [])
    due = {}
    if there and rerun == "stale":
        for name, one in evaluations_stale(folder, cell, selection, there, content=True, data=data).items():
            due[name] = {reason.kind: reason.words for reason in one.reasons if reason.kind != "choice"}
    else:
        due = {one.name: {"all": "asked for"} for one in there}
    again = [one for one in there if due[one.name] and (one in conditions or "data" in due[one.name])]
    if again:
        supersede_evaluations(folder, selection, again)
        words = dict.fromkeys("; ".join(due[one.name].values()) for one in again)
        typer.echo(f"{folder.name}: {len(again)} evaluations are computed anew: {' | '.join(words)}", err=True)
    return list(dict.fromkeys([*conditions, *again]))


def there_are(folder: Path) -> dict[str, list[Condition]]:
    """Selection -> the conditions that a run has evaluations of, but for those that there are no more."""
    found: dict[str, list[Condition]] = {}
    for path in sorted((folder / "evals").glob("[!.]*/*.npz")):
        with suppress(ValueError):
            found.setdefault(path.parent.name, []).append(condition(path.name.removesuffix(".npz")))
    return {selection: sorted(conditions) for selection, conditions in found.items()}


def find_target(runs: Path, target: str, on: str | None, selection: str, data: Path | None) -> tuple[Path, str]:
    """The run folder and checkpoint to evaluate; weights from elsewhere are imported, if the data set is there."""
    from crm.data.dataset import open_split
    from crm.data.specs import DATASETS
    from crm.records import read_config

    if on is not None:
        open_split(on, "test", data_root=data)  # refuses before anything is written
    if is_file(runs, target):
        from crm.weights.imports import network_config

        source = whole_network(target)
        own = len(source.weights["query_decoder.class_embed.weight"]) - 1
        if on is not None and own != (there := DATASETS[on].num_classes):
            how = f"crm weights import {target} makes it a run, which can be evaluated on the classes that both have"
            raise ValueError(f"{target} has {own} classes, but {on} has {there}; {how}")
        config, _ = network_config(source, None, on, {})
        open_split(config.data.dataset, "test", data_root=data)
        return import_file(source, runs, on), "last"
    folder = find_run(runs, target)
    if not (folder / "result.json").exists():
        raise ValueError(f"run {folder.name} is not trained to its end; crm train or crm sweep finishes it")
    checkpoint_file(folder, selection)
    if on is None or read_config(folder).data.dataset == on:
        return folder, selection
    from crm.weights.imports import import_run

    return import_run(folder, selection, on, runs), "last"


def is_file(runs: Path, target: str) -> bool:
    """Whether a target means a file of weights; what could be a run as well is a run."""
    return not matching_runs(runs, target) and Path(target).exists()


def whole_network(target: str) -> "Source":
    """The file's weights; ValueError for a backbone alone."""
    from crm.weights.files import KINDS, read_source

    source = read_source(Path(target))
    if not KINDS[source.kind].whole:
        raise ValueError(f"{target} is a {source.title}: a backbone alone predicts nothing")
    return source


def import_file(source: "Source", runs: Path, dataset: str | None = None) -> Path:
    """The run folder of an imported file; says on stderr what became of its tensors."""
    from crm.cli.weights import report_text
    from crm.weights.imports import import_network

    made = import_network(source, runs, dataset=dataset)
    typer.echo(report_text(made.report), err=True)
    return made.path


def scored_classes(folder: Path) -> tuple[str, ...]:
    """The classes that a run's evaluations are about."""
    from crm.data.mapping import mapping
    from crm.data.specs import DATASETS
    from crm.records import read_config, trained_on

    target = DATASETS[read_config(folder).data.dataset]
    shared = mapping(DATASETS[trained_on(folder)], target)
    return shared.classes[1:] if shared else target.classes
