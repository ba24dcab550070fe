"""crm diff: what two runs, variants or tables differ in."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crm.cli import options
from crm.cli.options import Json, Runs
from crm.cli.started import cells_of
from crm.sweep import only

if TYPE_CHECKING:
    from analysis.diff import Side

SHOWN = 12  # parts of code that are named in text
A_SIDE = "A run id or its first digits, SWEEP:ROW, SWEEP:ROW/SEED, or a ledger file or a folder of ledgers."


def add_to(app: typer.Typer) -> None:
    app.command()(diff)


def diff(
    a: Annotated[str, typer.Argument(help=A_SIDE)],
    b: Annotated[str, typer.Argument(help="The same kind; gains are of this one over the first.")],
    runs: Runs = None,
    json: Json = False,
) -> None:
    """What B has otherwise than A: settings, code, data, environment, cost, gain in each class, images that flipped."""
    from analysis.diff import compare, compare_tables, ledgers

    tables = [one.endswith(".json") or Path(one).is_dir() for one in (a, b)]
    if any(tables):
        if not all(tables):
            raise ValueError("a table can be compared with a table alone")
        found = {"a": a, "b": b, **compare_tables(ledgers(Path(a)), ledgers(Path(b)))}
        text = _tables_text
    else:
        folder = options.runs_folder(runs)
        found = compare(side_of(folder, a), side_of(folder, b))
        text = _text
    options.echo_json(found) if json else typer.echo(text(found))


def side_of(runs: Path, target: str) -> "Side":
    """The trained runs that a target means; ValueError where none is."""
    from analysis.diff import Side
    from crm.cli.runs import find_run
    from crm.records import read_config

    name, colon, pattern = target.partition(":")
    if not colon:
        folder = find_run(runs, target)
        return Side(folder.name, {read_config(folder).seed: folder})
    name, found, cells, _ = cells_of(name, None, "", "", "", False, runs)
    wanted = only(cells, [pattern])
    if len({cell.variant for cell in wanted}) > 1:
        rows = ", ".join(dict.fromkeys(cell.variant for cell in wanted))
        raise ValueError(f"{target!r} names several rows, {rows}; a side is one row or one run")
    trained = {cell.seed: runs / cell.id for cell in wanted if (runs / cell.id / "result.json").exists()}
    if not trained:
        raise ValueError(f"no run of {target} is trained yet; crm sweep {name} trains them")
    return Side(target, trained, found.selection)


def _text(found: dict[str, Any]) -> str:
    many = len(found["seeds"]) > 1
    lines = [f"A: {found['a']}", f"B: {found['b']}" + (f"   paired at seeds {found['seeds']}" if many else ""), ""]
    for title in ("configuration", "data", "environment"):
        rows = [[key, _short(both[0]), _short(both[1])] for key, both in found[title].items()]
        lines += [options.table(rows, [title, "A", "B"]) if rows else f"{title}: the same", ""]
    code = found["code"]
    if "commit" in code:
        lines.append(f"commit: {_short(code['commit'][0])} -> {_short(code['commit'][1])}")
    for name in ("training", "evaluation"):
        lines.append(f"{name} code: {_named(code[name])}")
    rows = [[what, *map(_short, both)] for what, both in found["cost"].items()]
    lines += ["", options.table(rows, ["cost, mean of a run", "A", "B"]), ""]
    if "why" in found:
        return "\n".join([*lines, f"no gains: {found['why']}"])
    rows = [
        [name, f"{one['a']:.1f}", f"{one['b']:.1f}", f"{one['gain']:+.1f}",
         "" if one["low"] is None else f"[{one['low']:+.1f}, {one['high']:+.1f}]", one["verdict"]]
        for name, one in found["gains"].items()
    ]  # fmt: skip
    lines += [options.table(rows, ["IoU, clean test", "A", "B", "gain", "95 %", "verdict"])]
    lines.append(f"intervals over {found['gains']['miou']['over']}")
    rows = [[one["image"], f"{one['pixels']:.1f} %", f"{one['gain']:+.1f}"] for one in found["flipped"]]
    lines += ["", options.table(rows, ["flipped most", "pixels", "mIoU"])]
    return "\n".join(lines)


def _tables_text(found: dict[str, Any]) -> str:
    rows = []
    for name, one in found["changed"].items():
        fields = ", ".join(f"{key}: {_short(both[0])} -> {_short(both[1])}" for key, both in one["fields"].items())
        rows.append([name, "" if one["gain"] is None else f"{one['gain']:+.2f}", fields])
    text = options.table(rows, ["cell", "gain", "what differs"]) if rows else "no cell differs"
    for side in ("only a", "only b"):
        if found[side]:
            text += f"\n{side.replace(' a', ' in A').replace(' b', ' in B')}: {', '.join(found[side])}"
    return text + f"\n{found['same']} cells are the same"


def _short(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..." if " " not in text else f"{text[:37]}..."


def _named(parts: list[str] | None) -> str:
    if parts is None:
        return "unknown, for one of them has no record of it"
    more = len(parts) - SHOWN
    return (", ".join(parts[:SHOWN]) + (f" and {more} more" if more > 0 else "")) or "the same"
