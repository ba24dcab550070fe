"""Writes tables: LaTeX, Markdown, HTML and CSV, the figure as PDF, SVG and PNG, and one page of all.

The same table is the same bytes.
"""

import csv
import functools
import io
import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup

from analysis.figures import inline_svg, style, written
from analysis.paper import figures, web
from analysis.paper.latex import alone, latex
from analysis.paper.markdown import markdown
from analysis.paper.result import Built, Cell
from analysis.paper.spec import Column, Row
from analysis.paper.words import cells, slug
from crm.records import write_bytes

SUFFIXES = (".pdf", ".svg", ".png")


def write(built: Built, folder: Path, venue: str = "ieee", cache: Path | None = None) -> list[Path]:
    """Writes a table in every form into `folder`; returns the files.

    `NAME.tex` is for a paper, `NAME_alone.tex` a document that shows it; `NAME.html` is a page, `NAME_table.html` its
    table element alone.

    Args:
        venue: whose widths the figure has, a key of analysis.paper.figures.WIDTHS.
        cache: a folder of figures drawn before; the same numbers are not drawn again.
    """
    name = built.table.name
    element, values = web.element(built), numbers(built)
    files: dict[str, bytes] = {
        f"{name}.tex": latex(built).encode(),
        f"{name}_alone.tex": alone([name]).encode(),
        f"{name}.md": markdown(built).encode(),
        f"{name}.csv": values.encode(),
        f"{name}_table.html": element.encode(),
    }
    shown = []
    for kind, width in _widths(venue).items():
        if forms := _forms(built, width, values, cache):
            files |= {_stem(name, kind) + suffix: content for suffix, content in forms.items()}
            shown.append((kind, inline_svg(forms[".svg"].decode(), f"{slug(name)}-{kind}")))
    files[f"{name}.html"] = web.page([built], {name: element}, {name: shown}).encode()
    for file, content in files.items():
        write_bytes(folder / file, content)
    return [folder / file for file in files]


def index(built: Sequence[Built], folder: Path, costs: Mapping[str, Any] | None = None) -> list[Path]:
    """Writes index.html with all these tables as `write` left them, and all.tex, which inputs its tables.

    Args:
        costs: label to hours, or label to several numbers by their names; failed and pruned attempts among them.
    """
    shown = {}
    for one in built:
        name = one.table.name
        files = {kind: folder / f"{_stem(name, kind)}.svg" for kind in ("narrow", "wide")} if one.table.figure else {}
        shown[name] = [
            (kind, inline_svg(file.read_text(), f"{slug(name)}-{kind}"))
            for kind, file in files.items()
            if file.is_file()
        ]
    elements = {one.table.name: Markup((folder / f"{one.table.name}_table.html").read_text()) for one in built}
    write_bytes(folder / "index.html", web.page(built, elements, shown, costs).encode())
    write_bytes(folder / "all.tex", alone([one.table.name for one in built]).encode())
    return [folder / "index.html", folder / "all.tex"]


def _forms(built: Built, width: float, values: str, cache: Path | None) -> dict[str, bytes]:
    """The figure by suffix; none where the table has none.

    Args:
        values: the table's numbers as CSV, which together with its spec and the code are all that a figure shows.
    """
    if cache is None or not built.table.figure:
        return _drawn(built, width)
    key = [repr(built.table), values, width, _code()]
    place = cache / sha256(json.dumps(key).encode()).hexdigest()[:32]
    if all((place / name).exists() for name in SUFFIXES):
        return {name: (place / name).read_bytes() for name in SUFFIXES}
    forms = _drawn(built, width)
    for suffix, content in forms.items():
        write_bytes(place / suffix, content)
    return forms


def _drawn(built: Built, width: float) -> dict[str, bytes]:
    figure = figures.draw(built, width)
    if figure is None:
        return {}
    with style():
        figure.set_dpi(220)  # the PNG's, since letters are not as wide at every resolution
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once for all forms
    return written(figure, SUFFIXES)


@functools.cache
def _code() -> list[str]:
    """What else decides how a figure looks."""
    here = Path(__file__).parent
    texts = [(here / name).read_text() for name in ("figures.py", "words.py", "../figures.py")]
    return [matplotlib.__version__, *texts]


def _stem(name: str, kind: str) -> str:
    return f"{name}_figure" + ("_wide" if kind == "wide" else "")


def _widths(venue: str) -> dict[str, float]:
    if venue not in figures.WIDTHS:
        raise ValueError(f"no venue {venue!r}; there are {', '.join(figures.WIDTHS)}")
    narrow, wide = figures.WIDTHS[venue]
    return {"narrow": narrow, "wide": wide}


def numbers(built: Built) -> str:
    """CSV, a line per cell: every number unrounded, an empty field where there is none."""
    buffer = io.StringIO()
    lines = [_line(built, *each) for each in cells(built)]
    writer = csv.DictWriter(buffer, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def _line(built: Built, row: Row, column: Column, cell: Cell) -> dict[str, Any]:
    gain, ours, theirs = cell.gain, cell.interval, cell.published
    over = gain.interval if gain else None
    runs = [run for run in cell.runs if run.value is not None]
    return {
        "table": built.table.name, "row_group": row.group, "row": row.label,
        "column_group": column.group, "column": column.label, "metric": column.metric,
        "conditions": " ".join(column.conditions),
        "state": cell.state, "reason": cell.reason, "waived": cell.waived,
        "n": cell.n, "wanted": cell.wanted, "mean": cell.mean, "sd": cell.sd,
        "low": ours and ours.low, "high": ours and ours.high,
        "interval_over": ours and ours.over, "interval_method": ours and ours.method,
        "best": int(cell.best),
        "gain": gain and gain.mean, "gain_sd": gain and gain.sd, "gain_n": gain and gain.n,
        "gain_over": gain and gain.reference,
        "gain_low": over and over.low, "gain_high": over and over.high, "gain_method": over and over.method,
        "p": gain and gain.p, "verdict": gain and gain.verdict,
        "more_seeds": gain and gain.more_seeds, "cost_hours": gain and gain.cost_hours,
        "published": theirs and theirs.value, "source": theirs and theirs.source,
        "published_protocol": theirs and theirs.protocol, "published_verdict": theirs and theirs.verdict,
        "protocol": cell.protocol,
        "seeds": " ".join(str(run.seed) for run in runs),
        "values": " ".join(repr(float(run.value)) for run in runs),
        "runs": " ".join(run.id for run in runs),
    }  # fmt: skip
