"""crm diagnose: what is wrong with a trained run, and which setting to change; how a sweep's rows differ in that."""

import textwrap
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crm.cli import options
from crm.cli.diagnose_sweep import Progress, diagnose_sweep
from crm.cli.options import Data, Device, Json, Runs, Seeds, Set
from crm.cli.runs import Threads, checkpoint_file, find_run, matching_runs, run_machine
from crm.names import chosen
from crm.sweep import SELECTIONS
from crm.verdicts import OTHER, WORDS

if TYPE_CHECKING:
    from crm.verdicts import Diagnosis, Finding

WIDTH = 100  # columns of a finding


def add_to(app: typer.Typer) -> None:
    app.command()(diagnose)


def diagnose(
    run: Annotated[str, typer.Argument(help="A run id, or enough of its first digits; or a sweep, as demo@tiny.")],
    split: Annotated[str | None, typer.Option(help="Images of this split. [default: val, where there is one]")] = None,
    images: Annotated[
        int | None, typer.Option(min=0, help="So many of them, evenly spaced; 0 is all. [default: 32, if there are]")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Masks per image, for the agreement.")] = 3,
    selection: Annotated[
        str, typer.Option("--select", help=f"Checkpoint: {' or '.join(SELECTIONS)}. [default: last, or the sweep's]")
    ] = "",
    sets: Set = None,
    seeds: Seeds = "",
    runs: Runs = None,
    data: Data = None,
    device: Device = "cpu",
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Says what a trained run relies on, what is wrong with it, and which setting to change.

    Measures scores without a modality, agreement under masks, both modalities' heads, gradients, queries and the
    journal, and writes diagnosis.json into the run's folder. Exit code 1: something is wrong.

    Of a sweep (with --set and --seeds as it was run), its trained runs are diagnosed that are not yet, and set side by
    side, a row per variant. Exit code 1: a run could not be diagnosed.
    """
    chosen("selection", selection or "last", dict.fromkeys(SELECTIONS))
    if run.partition("@")[0] in options.modules("sweeps") and not matching_runs(options.runs_folder(runs), run):
        name, found = options.find_sweep(run, seeds)
        machine = run_machine(options.runs_folder(runs), options.data_folder(data), device, threads)
        wanted = {"split": split, "images": images, "draws": draws, "selection": selection or found.selection}
        failed = diagnose_sweep(name, found, found.cells(options.changes(sets)), machine, json, **wanted)
        raise typer.Exit(1 if failed else 0)
    if sets or seeds:
        raise ValueError(f"--set and --seeds say which runs of a sweep are meant, and {run!r} is no sweep")
    selection = selection or "last"
    folder = _trained(options.runs_folder(runs), run)
    checkpoint_file(folder, selection)
    machine = run_machine(folder.parent, options.data_folder(data), device, threads)

    from crm.diagnose import diagnose as measure
    from crm.records import write_json
    from crm.verdicts import FILE

    machine.take_process()
    found = measure(folder, machine, selection, split, images, draws, Progress(quiet=json))
    if json:
        options.echo_json(found.written())
    else:
        typer.echo("\n".join(_screen(found)))
    try:
        write_json(folder / FILE, found.written())
    except OSError as error:
        typer.echo(f"crm: {folder / FILE} cannot be written: {error.strerror}", err=True)
        raise typer.Exit(1) from None
    if not json:
        typer.echo(f"written to {folder / FILE}")
    raise typer.Exit(0 if found.healthy else 1)


def _trained(runs: Path, name: str) -> Path:
    """The folder of a trained run; ValueError says which one was perhaps meant, or what to do first."""
    if not matching_runs(runs, name):
        if name in options.modules("experiments"):
            raise ValueError(f"{name} is an experiment, not a run; `crm train {name}` trains it and names its run")
        heads = {path.parent.name[: len(name)]: path.parent.name for path in runs.glob("*/config.json")}
        if close := get_close_matches(name, heads, n=1):
            raise ValueError(f"no run {name!r} in {runs}. Did you mean {heads[close[0]]!r}?")
    folder = find_run(runs, name)
    if not (folder / "result.json").exists():
        raise ValueError(
            f"run {folder.name} is not trained to its end, so there is nothing to diagnose yet; crm train or crm sweep "
            "finishes it"
        )
    return folder


# ---------------------------------------------------------------------------------------------- the screen


def _screen(found: "Diagnosis") -> list[str]:
    """One screen of text: the measurements, then the verdict."""
    measures = found.measures
    where = f"{found.dataset} {found.split}, {found.images} images"
    if found.scores == "stored":
        where += f"; scores: stored, of all {found.scored_images}"
    lines = [f"run {found.run}  {found.selection}, step {found.step}  ({where})", ""]
    rows = [
        ["mIoU without it", *(f"{measures.missing[side]:.1f}" for side in OTHER)],
        ["  costs, points", *(f"{measures.cost(side):.1f}" for side in OTHER)],
        ["  keeps", *(f"{measures.retention(side):.0%}" for side in OTHER)],
        ["mIoU of the head on it alone", *(f"{measures.head[side]:.1f}" for side in OTHER)],
    ]
    if shares := measures.branch_share:
        rows.append(["share of the branches' gradient", *(f"{shares[side]:.0%}" for side in OTHER)])
    lines += options.table(rows, [f"clean mIoU {measures.clean:.1f}", *WORDS.values()]).splitlines()
    lines += ["", *(f"{title:10} {text}" for title, text in _facts(found) if text), ""]
    problems = sum(finding.level == "problem" for finding in found.findings)
    lines.append(f"verdict: {f'{problems} wrong' if problems else 'healthy'}")
    said: dict[str, Any] = {}
    for finding in found.findings:
        lines += _finding(finding, again=finding.settings == said)
        said = finding.settings
    return lines


def _facts(found: "Diagnosis") -> list[tuple[str, str]]:
    """The measurements that are not one per modality, in words."""
    measures = found.measures
    facts = []
    if measures.agreement is not None:
        whose = "its own masks" if measures.own_masking else "masks it was not trained with"
        facts.append(("agreement", f"{measures.agreement:.1%} of pixels keep their class under {whose}"))
        facts.append(("", f"({measures.masking}, {found.draws} per image); mIoU {measures.masked:.1f}"))
    facts.append(("queries", f"{measures.speaking} of {measures.queries} ever name a class, dead: {measures.dead}"))
    facts.append(("classes", f"{len(measures.labelled)} in the labels, {len(measures.silent)} of them never predicted"))
    facts.append(("gradient", _shares(measures.term_gradient)))
    if measures.cosine is not None:
        facts.append(("", f"cosine of RGB's and thermal's at the head {measures.cosine:.2f}"))
    if measures.terms is not None:
        facts.append(("loss", _shares(measures.terms)))
    if measures.trend is not None:
        facts.append(("", f"{measures.trend:+.1%} ± {measures.trend_error:.1%} from one fifth of training to the last"))
    if measures.clipped is not None:
        facts.append(("clipping", f"in {measures.clipped:.0%} of the lines, median norm {measures.grad_norm:.3g}"))
    return facts


def _shares(values: dict[str, float]) -> str:
    """`fused 40%, rgb 30%`: of their sum."""
    total = sum(values.values())
    return ", ".join(f"{name} {value / total:.0%}" for name, value in values.items()) if total else ""


def _finding(finding: "Finding", again: bool) -> list[str]:
    """What is the matter and what to try, which is not said `again` after a finding that said it."""
    text = f"{finding.level}: {finding.text}"
    lines = textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
    if finding.settings:
        sets = " ".join(f"--set {path}={_text(value)}" for path, value in finding.settings.items())
        lines.append("    try the same" if again else f"    try {sets}")
    if finding.hint:
        lines.append(f"    {finding.hint}")
    return lines


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
