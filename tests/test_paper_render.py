"""Built tables as LaTeX, Markdown, HTML, CSV, terminal text and figures. All numbers are invented."""

import csv
import hashlib
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from analysis.paper import figures, web
from analysis.paper.contents import tables
from analysis.paper.latex import alone, latex
from analysis.paper.markdown import markdown
from analysis.paper.render import index, numbers, write
from analysis.paper.result import column_id, row_id
from analysis.paper.text import text
from analysis.paper.words import notes, state, tags, words
from tests.paper_fixture import HOSTILE, doses, filled, invented, optimism

ROOT = Path(__file__).parents[1]
EVERY = (invented, doses, optimism)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("tables")
    built = [make() for make in EVERY]
    for one in built:
        for path in write(one, place):
            assert path.is_file()
    index(built, place, costs={"components": {"GPU hours": 12.25, "failed": 1.5}, "ratio": 3.0})
    return place


def at(built, row: int, column: int):
    rows, columns = built.table.rows, built.table.columns
    return words(built, rows[row], columns[column])


# ---------------------------------------------------------------------------------------------- words


def test_a_single_seed_has_no_deviation():
    assert at(invented(), 1, 3).sd == ""


def test_what_is_not_fresh_is_marked_and_explained():
    built = invented()
    marks = {state(cell).partition(" ")[0]: words(built, row, column).mark for row, column, cell in every(built)}
    assert marks["fresh"] == ""
    assert marks["partial"] == "† 2/3"
    assert (marks["stale"], marks["failed"], marks["running"], marks["fresh,"]) == ("‡", "§", "¶", "*")
    said = "\n".join(notes(built))
    for sign in ("†", "‡", "§", "¶"):
        assert sign in said
    assert "out of memory" in said
    assert "accepted although stale: a comment was changed" in said


def every(built):
    return [(row, column, built.cell(row, column)) for row in built.table.rows for column in built.table.columns]


def test_published_numbers_keep_their_source():
    built = invented()
    assert list(tags(built).values()) == ["a", "b"]
    theirs, ours = at(built, 0, 0), at(built, 2, 0)
    assert (theirs.value, theirs.tag, theirs.borrowed) == ("58.2", "a", True)
    assert (ours.published, ours.tag, ours.reproduced) == ("59.1", "b", "reproduced")


def test_gains_are_shown_only_where_the_column_wants_them():
    assert at(invented(), 2, 0).gain == "+1.3"
    assert at(invented(), 2, 0).interval == "[+0.4,\u00a0+2.2]"
    assert at(invented(), 2, 3).gain == ""


# ---------------------------------------------------------------------------------------------- text, Markdown, CSV


def test_terminal_text_shows_numbers_or_states():
    assert "62.5 ± 0.2 (+1.3)" in text(invented(), False, "utf-8")
    shown = text(invented(), True, "utf-8")
    assert "62.5" not in shown
    for words_ in ("running 40 %", "partial 2 of 3", "failed", "published only"):
        assert words_ in shown
    assert "failed: out of memory (" in shown


@pytest.mark.parametrize("states", [False, True])
def test_terminal_text_is_ascii_where_it_must_be(states):
    plain = text(invented(), states, "ascii")
    assert plain.isascii()
    assert "?" not in plain


def test_columns_of_terminal_text_are_aligned():
    lines = text(invented(), True, "utf-8").splitlines()
    ends = {len(line) for line in lines if line.endswith("fresh") and not line.startswith("Invented")}
    assert len(ends) == 1


def test_markdown_is_a_table_of_equal_width_with_the_notes_as_a_list():
    lines = markdown(invented()).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {6}
    assert [line for line in lines if line.startswith("- ")]
    assert "<script" not in "\n".join(lines)


def test_csv_holds_every_number_unrounded():
    built = invented()
    lines = list(csv.DictReader(numbers(built).splitlines()))
    assert len(lines) == len(built.cells)
    for line, (row, column, cell) in zip(lines, every(built), strict=True):
        assert (line["row"], line["column"], line["state"]) == (row.label, column.label, cell.state)
        assert line["mean"] == ("" if cell.mean is None else repr(cell.mean))
        if cell.gain:
            assert float(line["gain_low"]) == cell.gain.interval.low
            assert float(line["p"]) == cell.gain.p
        assert [float(value) for value in line["values"].split()] == [r.value for r in cell.runs if r.value is not None]


# ---------------------------------------------------------------------------------------------- HTML


class Reader(HTMLParser):
    """Which elements a page has, and the words in its cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        given = dict(attrs)
        self.ids += [given["id"]] if "id" in given else []
        self.targets += [given["popovertarget"]] if "popovertarget" in given else []


def test_strings_are_escaped_and_every_number_opens_a_chain_of_its_own(folder):
    page = (folder / "index.html").read_text()
    assert HOSTILE not in page
    reader = Reader(page)
    assert reader.tags.count("script") == 1
    assert len(reader.ids) == len(set(reader.ids))
    assert reader.targets
    assert set(reader.targets) <= set(reader.ids)


def test_a_chain_names_seeds_runs_code_and_weights():
    page = web.element(invented())
    chain = page[page.index("<h4>Swin-T: CRM / MF: mIoU</h4>") :].partition("<h4>")[2].partition("<h4>")[0]
    for part in ("11f3c0a1", "12f3c0a1", "3f2c9e1a0b", "51ab51ab51ab", "87110_2", "new training seeds", "p = 0.012"):
        assert part in chain


def test_costs_are_shown_if_given(folder):
    assert "What it cost" in (folder / "index.html").read_text()
    assert "12.2" in (folder / "index.html").read_text()
    assert "What it cost" not in web.page([invented()], {"main": web.element(invented())}, {})


# ---------------------------------------------------------------------------------------------- figures


def test_figures_drawn_before_are_the_same_bytes_and_not_drawn_again(tmp_path, monkeypatch):
    def files(name):
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    write(invented(), tmp_path / "plain")
    write(invented(), tmp_path / "first", cache=tmp_path / "cache")
    monkeypatch.setattr(figures, "draw", None)
    write(invented(), tmp_path / "again", cache=tmp_path / "cache")
    assert files("again") == files("first") == files("plain")
    with pytest.raises(TypeError):
        write(invented(), tmp_path / "wider", "neurips", tmp_path / "cache")  # another width is another figure


def test_a_figure_is_as_wide_as_the_venue_says_and_in_small_type():
    for make in EVERY:
        for width in (3.5, 7.16):
            figure = figures.draw(make(), width)
            assert figure.get_figwidth() == width
            sizes = {label.get_fontsize() for axes in figure.axes for label in axes.get_xticklabels()}
            assert all(7 <= size <= 8 for size in sizes)


def test_an_unknown_kind_of_figure_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'pie'.*dots, dose, optimism"):
        figures.draw(invented(figure="pie"), 3.5)


# ---------------------------------------------------------------------------------------------- the same bytes

AGAIN = """
import sys
from pathlib import Path
from analysis.paper.render import index, write
from tests.paper_fixture import doses, filled, invented, optimism
built = [invented(), doses(), optimism()]
for one in built:
    write(one, Path(sys.argv[1]))
index(built, Path(sys.argv[1]), costs={"components": {"GPU hours": 12.25, "failed": 1.5}, "ratio": 3.0})
"""


@pytest.mark.parametrize("hashseed", ["1", "2"])
def test_another_process_writes_the_same_bytes(folder, tmp_path, hashseed):
    environment = {**os.environ, "PYTHONHASHSEED": hashseed, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", AGAIN, str(tmp_path)], check=True, env=environment, cwd=ROOT)

    def hashes(place: Path) -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(place.iterdir())}

    assert hashes(tmp_path) == hashes(folder)


# ---------------------------------------------------------------------------------------------- LaTeX


def test_latex_bolds_the_best_and_names_every_cell():
    built = invented()
    lines = latex(built)
    assert lines.count(r"\crmcell{main:") == len(built.cells)
    assert lines.count(r"\bfseries ") == sum(cell.best and cell.mean is not None for cell in built.cells.values())
    assert r"S[table-format=2.1" in lines
    assert r"\cmidrule(lr){2-3}" in lines
    assert {row_id(row) for row in built.table.rows}.isdisjoint({column_id(c) for c in built.table.columns})


@pytest.fixture(scope="session")
def tex() -> str:
    if shutil.which("pdflatex") is None or shutil.which("pdftotext") is None:
        assert "tex" not in os.environ.get("CRM_REQUIRE", "").split(","), "CRM_REQUIRE names tex, but there is none"
        pytest.skip("there is no pdflatex or no pdftotext here")
    return "pdflatex"


def compiled(tex: str, document: Path, place: Path) -> str:
    """The words of the PDF that LaTeX makes of a document."""
    command = [tex, "-interaction=nonstopmode", "-halt-on-error", f"-output-directory={place}", document.name]
    done = subprocess.run(command, cwd=document.parent, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-3000:]
    pdf = place / document.with_suffix(".pdf").name
    return subprocess.run(["pdftotext", "-layout", pdf, "-"], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["main_alone", "ratio_alone", "selection_alone", "all"])
def test_latex_compiles_to_the_numbers_of_the_table(tex, folder, tmp_path, name):
    words_ = compiled(tex, folder / f"{name}.tex", tmp_path)
    for make in EVERY:
        built = make()
        if name not in (f"{built.table.name}_alone", "all"):
            continue
        for row, column, cell in every(built):
            if cell.mean is not None:
                assert f"{cell.mean:.{column.decimals}f}" in words_, row


@pytest.mark.slow
def test_a_document_may_give_the_cells_a_meaning_of_its_own(tex, folder, tmp_path):
    shutil.copy(folder / "main.tex", tmp_path)
    own = r"\newcommand{\crmcell}[2]{#2{\textsuperscript{\tiny [#1]}}}"
    document = (folder / "main_alone.tex").read_text().replace(r"\begin{document}", own + "\n\\begin{document}")
    (tmp_path / "own.tex").write_text(document)
    assert "main:Swin-T: CRM/MF: mIoU" in compiled(tex, tmp_path / "own.tex", tmp_path).replace("\n", " ")


@pytest.mark.slow
def test_every_table_of_the_paper_compiles(tex, tmp_path):
    built = [filled(table) for table in tables().values()]
    for one in built:
        (tmp_path / f"{one.table.name}.tex").write_text(latex(one))
    (tmp_path / "all.tex").write_text(alone([one.table.name for one in built]))
    words_ = compiled(tex, tmp_path / "all.tex", tmp_path)
    assert "Swin-B" in words_


@pytest.mark.parametrize("name", list(tables()))
def test_every_figure_that_a_table_asks_for_is_known(name):
    assert tables()[name].figure in ("", *figures.FIGURES)
