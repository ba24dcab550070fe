"""crm why and crm accept: whether runs and evaluations would come out otherwise now, and accepting that they would.

Exit codes of why: 0 fresh, 1 stale.
"""

import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from crm import waivers
from crm.cli import options
from crm.cli.evaluate import there_are
from crm.cli.options import Data, Json, Runs, Yes
from crm.cli.started import cells_of
from crm.conditions import Condition
from crm.config import run_id
from crm.machine import home
from crm.records import read_config, read_json
from crm.stale import TRAINING, Reason, Stale, evaluations_stale, stale
from crm.sweep import Cell, only

Target = Annotated[
    str,
    typer.Argument(help="A run id or its first digits, a sweep, SWEEP:ROW/SEED, or TABLE[@tiny]:ROW/COLUMN."),
]


@dataclass(frozen=True)
class Item:
    """A run, and those of its evaluations that are asked about."""

    folder: Path
    cell: Cell
    selection: str
    conditions: Sequence[Condition]


@dataclass(frozen=True)
class Answer:
    """How a run and its evaluations stand; by what waivers call them: `training`, `last/test`."""

    folder: Path
    label: str
    found: dict[str, Stale]

    def __bool__(self) -> bool:
        """Whether all of it is fresh."""
        return not any(self.found.values())


def add_to(app: typer.Typer) -> None:
    app.command()(why)
    app.command()(accept)


def explain(items: Sequence[Item], data: Path | None = None, weights: Path | None = None) -> list[Answer]:
    """Whether these runs and evaluations are fresh and why not, read thoroughly: files' contents too."""
    answers: dict[Path, Answer] = {}
    for item in items:
        folder, label = item.folder, item.cell.label if item.cell.variant else item.folder.name
        answer = answers.get(folder)
        if answer is None:
            trained = stale(folder, item.cell, content=True, data=data, weights=weights)
            answer = answers[folder] = Answer(folder, label, {TRAINING: trained})
        found = evaluations_stale(folder, item.cell, item.selection, item.conditions, content=True, data=data)
        answer.found.update({f"{item.selection}/{name}": one for name, one in found.items()})
    return list(answers.values())


def items_of(runs: Path, target: str) -> list[Item]:
    """The runs that a target means, each with all the evaluations it has."""
    name, colon, pattern = target.partition(":")
    if colon and (cell := _of_table(runs, name, pattern)) is not None:
        return cell
    if colon or name.partition("@")[0] in options.modules("sweeps"):
        name, _, cells, _ = cells_of(name, None, "", "", "", False, runs)
        wanted = only(cells, [pattern] if colon else None)
        begun = [cell for cell in wanted if (runs / cell.id / "config.json").exists()]
        if not begun:
            raise ValueError(f"nothing of {target} has been begun; crm sweep {name} does")
        found = [(runs / cell.id, cell) for cell in begun]
    else:
        from crm.cli.runs import find_run

        folder = find_run(runs, target)
        found = [(folder, cell_of(folder))]
    items = []
    for folder, cell in found:
        there = there_are(folder)
        items += [Item(folder, cell, selection, conditions) for selection, conditions in there.items()]
        items += [Item(folder, cell, "last", [])] * (not there)
    return items


def _of_table(runs: Path, name: str, address: str) -> list[Item] | None:
    """The runs and evaluations behind a cell of one of the paper's tables; None for what is no table.

    Some tables have the name of a sweep: ROW/SEED of it is meant where there is such a row.
    """
    table, _, form = name.partition("@")
    if table in options.modules("sweeps"):
        with suppress(ValueError):
            only(cells_of(name, None, "", "", "", False, runs)[2], [address])
            return None
    from analysis.paper.contents import tables
    from crm.cli.tables import items_of_cell

    if table not in tables(False) or form not in ("", "tiny"):
        return None
    return [Item(*one) for one in items_of_cell(table, form == "tiny", runs, address)]


def cell_of(folder: Path) -> Cell:
    """The cell of a run that nothing but its id is known of: what a sweep that asked for it says, else its own config.

    A default that moved is seen by the id, which no longer follows from the settings.
    """
    config = read_config(folder)
    plain = Cell(variant="", seed=config.seed, config=config)
    if folder.name.startswith("import-") or run_id(config) == folder.name:
        return plain
    for path in sorted((folder.parent / ".sweeps").glob("*/asked.json")):
        if any(one["id"] == folder.name for one in read_json(path)["cells"]):
            cells = cells_of(path.parent.name, None, "", "", "", False, folder.parent)[2]
            return next((cell for cell in cells if cell.id == folder.name), plain)
    return plain


def why(
    target: Target,
    runs: Runs = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """Says of a run and of each of its evaluations whether it is fresh, and if not, what has changed since.

    Settings, code (comments and formatting do not count), frames, weights, and files that were edited. Frames of real
    data sets are only read with --data.
    """
    folder = options.runs_folder(runs)
    answers = explain(items_of(folder, target), data, home() / "weights")
    if json:
        state = "fresh" if all(answers) else "stale"
        options.echo_json({"target": target, "state": state, "runs": [_as_json(answer) for answer in answers]})
    else:
        typer.echo("\n\n".join(_as_text(answer) for answer in answers))
    if not all(answers):
        raise typer.Exit(1)


def state_of(one: Stale) -> str:
    return "stale" if one else "accepted" if one.waived else "fresh"


def _as_json(answer: Answer) -> dict[str, Any]:
    parts = {
        what: {
            "state": state_of(one), "reasons": [asdict(reason) for reason in one.reasons], "unknown": one.unknown,
            "accepted": [asdict(reason) for reason in one.waived], "because": one.because,
        }
        for what, one in answer.found.items()
    }  # fmt: skip
    training = parts.pop(TRAINING)
    decided = waivers.decisions(answer.folder)
    return {
        "run": answer.folder.name, "label": answer.label, "state": "fresh" if answer else "stale",
        "training": training, "evaluations": parts, "waivers": decided,
    }  # fmt: skip


def _as_text(answer: Answer) -> str:
    """Evaluations that stand alike together."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for what, one in answer.found.items():
        if what != TRAINING:
            alike.setdefault(tuple(_said(one)), []).append(what)
    name = answer.folder.name
    lines = [f"{answer.label} ({name})" if answer.label != name else f"run {name}"]
    lines += [f"  training: {(said := _said(answer.found[TRAINING]))[0]}", *(f"    {line}" for line in said[1:])]
    for said, names in alike.items():
        few = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        count = f"{len(names)} evaluations ({few})" if len(names) > 1 else f"evaluation {few}"
        lines += [f"  {count}: {said[0]}", *(f"    {line}" for line in said[1:])]
    if not alike:
        lines.append("  no evaluations yet")
    if answer.found[TRAINING]:
        lines.append("  crm sweep SWEEP --rerun stale trains anew and keeps the old run")
    if any(one for what, one in answer.found.items() if what != TRAINING):
        lines.append(f"  crm evaluate {shlex.quote(name)} --rerun stale evaluates anew and keeps the old evaluations")
    return "\n".join(lines)


def _said(one: Stale) -> list[str]:
    """The state, and a line for each thing that there is to say."""
    lines = [state_of(one)]
    lines += [reason.words for reason in one.reasons]
    lines += [f"accepted, because {one.because}: {reason.words}" for reason in one.waived]
    if one.unknown:
        lines.append(f"unknown, for nothing of it was recorded or can be asked here: {', '.join(one.unknown)}")
    return lines


# ---------------------------------------------------------------------------------------------- accepting


def accept(
    target: Target,
    because: Annotated[str, typer.Option("--because", metavar="TEXT", help="Why it may stand; it is kept.")] = "",
    withdraw: Annotated[bool, typer.Option("--withdraw", help="End what was accepted before.")] = False,
    verify: Annotated[
        int, typer.Option("--verify", metavar="K", min=0, help="First evaluate K images of each again, bit by bit.")
    ] = 0,
    device: Annotated[str, typer.Option("--device", help="Of --verify: cpu, cuda or cuda:N, as evaluated.")] = "cpu",
    runs: Runs = None,
    data: Data = None,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Accepts what is stale of a run and its evaluations, with the reason why; only shows it without --yes.

    It holds for exactly these changes: a further one makes it stale again.
    """
    folder = options.runs_folder(runs)
    items = items_of(folder, target)
    if withdraw:
        _withdraw({item.folder for item in items}, because, yes, json)
        return
    if not because.strip():
        raise ValueError("a waiver needs its reason: --because TEXT")
    answers = explain(items, data, home() / "weights")
    wanted = {answer.folder: _waived(answer) for answer in answers}
    wanted = {path: waived for path, waived in wanted.items() if waived}
    if not wanted:
        typer.echo(f"nothing of {target} is stale, so there is nothing to accept") if not json else None
        options.echo_json({"accepted": False, "runs": {}}) if json else None
        raise typer.Exit(3)
    verified = {}
    if verify:
        from crm.cli.runs import run_machine
        from crm.verify import verified_images

        run_machine(folder, data, device, threads=0).take_process()
        for path, waived in wanted.items():
            names = list(dict.fromkeys(reason["what"] for reason in waived if reason["what"] != TRAINING))
            verified[path] = verified_images(path, names, verify, data, device)
    differing = {path.name: one.differing for path, one in verified.items() if one.differing}
    for path, waived in wanted.items():
        if yes and not differing:
            more = {"verified": asdict(verified[path])} if verify else {}
            waivers.accept(path, waived, because, **more)
    if json:
        options.echo_json({
            "accepted": yes and not differing, "because": because, "differing": differing,
            "runs": {path.name: waived for path, waived in wanted.items()},
        })  # fmt: skip
    else:
        for path, waived in wanted.items():
            typer.echo(f"run {path.name}")
            typer.echo("\n".join(f"  {one['what']}: {one['words']}" for one in waived))
            if verify:
                typer.echo(f"  {verified[path]}")
        if not differing:
            typer.echo("accepted" if yes else "nothing was recorded; --yes accepts it")
    if differing:
        typer.echo("crm: not accepted: what was evaluated again is not what is stored", err=True)
        raise typer.Exit(1)


def _waived(answer: Answer) -> list[dict[str, Any]]:
    """Every reason that is not accepted yet."""
    pairs: list[tuple[str, Reason]] = [(what, reason) for what, one in answer.found.items() for reason in one.reasons]
    return [{"what": what, **asdict(reason)} for what, reason in pairs]


def _withdraw(folders: set[Path], because: str, yes: bool, json: bool) -> None:
    held = sorted(
        path for path in folders if (lines := waivers.decisions(path)) and lines[-1]["decision"] == "accepted"
    )
    for path in held:
        waivers.withdraw(path, because) if yes else None
    if json:
        options.echo_json({"withdrawn": yes, "runs": [path.name for path in held]})
    else:
        how = "withdrawn" if yes else "would be withdrawn; --yes does it"
        typer.echo(f"{', '.join(path.name for path in held)}: {how}" if held else "nothing was accepted")
    if not held:
        raise typer.Exit(3)
