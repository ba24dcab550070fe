"""A table as GitHub shows it: gains and published numbers small below the value, notes as a list."""

from analysis.paper.result import Built
from analysis.paper.words import Words, notes, row_groups, sources, words
from analysis.tables import escaped


def markdown(built: Built) -> str:
    table = built.table
    head = ["", *(f"{escaped(c.group)}<br>{escaped(c.label)}" if c.group else escaped(c.label) for c in table.columns)]
    lines = [f"### {escaped(table.title)}", "", _line(head), _line(["---", *["---:"] * len(table.columns)])]
    for group, rows in row_groups(built):
        if group:
            lines.append(_line([f"*{escaped(group)}*", *[""] * len(table.columns)]))
        for row in rows:
            lines.append(_line([escaped(row.label), *(_cell(words(built, row, column)) for column in table.columns)]))
    lines += ["", *(f"- {escaped(note)}" for note in notes(built))]
    lines += [f"- <sup>{letter}</sup> {escaped(source)}." for letter, source in sources(built)]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(each: Words) -> str:
    value = escaped(each.value) + (f" ± {each.sd}" if each.sd else "")
    value = f"**{value}**" if each.best else value
    raised = escaped(each.mark) + (each.tag if each.borrowed else "")
    text = value + (f"<sup>{raised}</sup>" if raised else "")
    if each.gain:
        text += f"<br><sub>{escaped(f'{each.gain} {each.interval}'.strip())}</sub>"
    if each.published:
        verdict = f", {escaped(each.reproduced)}" if each.reproduced else ""
        text += f"<br><sub>publ. {escaped(each.published)}<sup>{each.tag}</sup>{verdict}</sub>"
    return text
