r"""A table for a paper: booktabs, numbers aligned by siunitx, notes below. pdfLaTeX compiles it.

Every value stands in `\crmcell{TABLE:ROW/COLUMN}{value}`, which prints the value. A document may define it otherwise
before it inputs a table, as long as what it makes of it still stands in an S column: text in braces beside #2.
`\crmsd{SD}` prints the deviation. `\crmcite{KEY}`, which prints nothing, names the row of published.csv that a number
is from.
"""

from collections.abc import Sequence

from analysis.paper.result import Built, column_id, row_id
from analysis.paper.spec import Column
from analysis.paper.words import Words, column_groups, keys, notes, row_groups, sources, words
from analysis.tables import latex_text

PACKAGES = ("booktabs", "graphicx", "siunitx")
SETTINGS = r"\sisetup{detect-weight=true, detect-inline-weight=math, table-align-text-post=false}"
MACROS = r"""\providecommand{\crmcell}[2]{#2}
\providecommand{\crmcite}[1]{}
\providecommand{\crmsd}[1]{\,$\pm$\,#1}
% as wide as it is, or as wide as the text allows
\providecommand{\crmfit}[1]{\sbox0{#1}\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi}"""
PREAMBLE = "\n".join(
    [
        r"\documentclass[10pt]{article}",
        r"\IfFileExists{lmodern.sty}{\usepackage{lmodern}\usepackage[T1]{fontenc}}{}",  # no bitmap fonts
        r"\usepackage[utf8]{inputenc}",
        r"\usepackage[a4paper, margin=20mm]{geometry}",
        *(rf"\usepackage{{{name}}}" for name in PACKAGES),
        SETTINGS,
        r"\begin{document}",
    ]
)
NARROW = 3  # columns; a table of more is set over both columns of a page


def latex(built: Built) -> str:
    r"""The table as a float with \label{tab:NAME}."""
    table = built.table
    float_ = "table" if len(table.columns) <= NARROW else "table*"
    shown = {(row_id(r), column_id(c)): words(built, r, c) for r in table.rows for c in table.columns}
    lines = [
        f"% needs {', '.join(PACKAGES)} and {SETTINGS}",
        MACROS,
        rf"\begin{{{float_}}}[t]",
        r"\centering",
        rf"\caption{{{latex_text(table.title)}}}",
        rf"\label{{tab:{table.name}}}",
        r"\small",
        r"\setlength{\tabcolsep}{4pt}",
        r"\crmfit{%",
        rf"\begin{{tabular}}{{@{{}}l{''.join(_column(built, column, shown) for column in table.columns)}@{{}}}}",
        r"\toprule",
        *_head(built),
        r"\midrule",
        *_body(built, shown),
        r"\bottomrule",
        r"\end{tabular}}",
        *_notes(built),
        rf"\end{{{float_}}}",
    ]
    return "\n".join(lines) + "\n"


def alone(names: Sequence[str]) -> str:
    """A document that shows the tables of these files and nothing else."""
    inputs = [rf"\input{{{name}}}" + "\n" + r"\clearpage" for name in names]
    return "\n".join([PREAMBLE, *inputs, r"\end{document}"]) + "\n"


def _column(built: Built, column: Column, shown: dict[tuple[str, str], Words]) -> str:
    """The S column: as many digits as its widest number has, and room for its marks."""
    mine = [shown[row_id(row), column_id(column)] for row in built.table.rows]
    values = [_plain(each.value) for each in mine if not _text(each)]
    if not values:
        return "c"
    sign = "-" if any(value.startswith("-") for value in values) else ""
    whole = max(len(value.lstrip("-").partition(".")[0]) for value in values)
    after = max((_after(each) for each in mine), key=len)
    room = f", table-space-text-post={{{after}}}" if after else ""
    return f"S[table-format={sign}{whole}.{column.decimals}{room}]"


def _head(built: Built) -> list[str]:
    groups, columns = column_groups(built), built.table.columns
    lines = []
    if any(name for name, _ in groups):
        cells, rules, place = [""], [], 2
        for name, members in groups:
            cells.append(rf"\multicolumn{{{len(members)}}}{{c}}{{{latex_text(name)}}}")
            if name:
                rules.append(rf"\cmidrule(lr){{{place}-{place + len(members) - 1}}}")
            place += len(members)
        lines += [" & ".join(cells) + r" \\", "".join(rules)]
    return [*lines, " & ".join(["", *(f"{{{latex_text(column.label)}}}" for column in columns)]) + r" \\"]


def _body(built: Built, shown: dict[tuple[str, str], Words]) -> list[str]:
    table, lines = built.table, []
    for number, (group, rows) in enumerate(row_groups(built)):
        if number:
            lines.append(r"\addlinespace")
        if group:
            lines.append(rf"\multicolumn{{{len(table.columns) + 1}}}{{@{{}}l}}{{\itshape {latex_text(group)}}} \\")
        for row in rows:
            mine = [shown[row_id(row), column_id(column)] for column in table.columns]
            ids = [f"{table.name}:{row_id(row)}/{column_id(column)}" for column in table.columns]
            cells = [rf"\crmcell{{{latex_text(i)}}}{{{_value(each)}}}" for i, each in zip(ids, mine, strict=True)]
            indent = r"\quad " if group else ""
            # braces: a row that began with a bracket would be read as an option of the line above
            lines.append(" & ".join([f"{{{indent}{latex_text(row.label)}}}", *cells]) + r" \\")
            for below in ([_gain(each) for each in mine], [_published(each) for each in mine]):
                if any(below):
                    lines.append(" & ".join(["", *below]) + r" \\")
    return lines


def _text(each: Words) -> bool:
    return each.value.strip("−-0123456789.,") != ""


def _plain(text: str) -> str:
    return text.replace("−", "-").replace(",", "")


def _value(each: Words) -> str:
    if _text(each):
        return f"{{{latex_text(each.value)}{_after(each)}}}"
    after = f"{{{_after(each)}}}" if _after(each) else ""
    return (r"\bfseries " if each.best else "") + _plain(each.value) + after


def _after(each: Words) -> str:
    r"""What stands behind a value: its deviation, which siunitx 3 would set apart by an odd gap, and raised marks."""
    raised = latex_text(each.mark) + (each.tag if each.borrowed else "")
    return (rf"\crmsd{{{each.sd}}}" if each.sd else "") + (rf"\textsuperscript{{{raised}}}" if raised else "")


def _gain(each: Words) -> str:
    return rf"{{\scriptsize {latex_text(f'{each.gain} {each.interval}'.strip())}}}" if each.gain else ""


def _published(each: Words) -> str:
    if not each.published:
        return ""
    verdict = f", {latex_text(each.reproduced)}" if each.reproduced else ""
    return rf"{{\scriptsize publ.\ {latex_text(each.published)}\textsuperscript{{{each.tag}}}{verdict}}}"


def _notes(built: Built) -> list[str]:
    cited = keys(built)
    by_source = list(cited.values())
    lines = [latex_text(note) for note in notes(built)]
    for (letter, source), names in zip(sources(built), by_source, strict=True):
        cites = rf"\crmcite{{{','.join(names)}}}" if names else ""
        lines.append(rf"\textsuperscript{{{letter}}}\,{latex_text(source)}.{cites}")
    if not lines:
        return []
    return [
        r"\par\smallskip",
        r"\parbox{\linewidth}{\raggedright\footnotesize",
        *(line + (r"\par" if number < len(lines) - 1 else "}") for number, line in enumerate(lines)),
    ]
