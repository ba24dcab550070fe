"""A table with its numbers: what is made from the records once, and what every rendering reads.

Numbers are as measured, unrounded. A cell without runs has state `missing` or `published only` and no mean.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from analysis.paper.spec import Column, Row, Table


@dataclass(frozen=True, kw_only=True)
class Interval:
    low: float
    high: float
    over: str  # what it speaks of, in words: "new training seeds, this test set"
    method: str  # how it was made: "t over 3 seeds"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run that a cell counts on."""

    sweep: str  # with its form, as in `ablation_losses@tiny`
    variant: str
    seed: int
    id: str
    state: str  # one of crm.records.State.name or of the scheduler, or `stale`
    reason: str = ""
    share: float = 0.0  # of the training steps done
    value: float | None = None  # None until evaluated
    chain: Mapping[str, Any] = field(default_factory=dict)  # commit, diff, data, checkpoint, job ids, log: the ledger's


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Paired with the group's first row at equal seed."""

    mean: float
    sd: float | None  # None below two pairs
    n: int
    reference: str  # label of the row it is over
    interval: Interval | None
    p: float | None = None  # Holm-corrected over the table
    verdict: str = ""  # gain, loss, within noise
    more_seeds: int | None = None  # that would probably decide; None where it is decided or unknown
    cost_hours: float | None = None  # of those


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A published number that stands beside the cell."""

    value: float
    source: str
    protocol: str  # how it was measured, in words
    verdict: str = ""  # reproduced, within noise, not reproduced, not comparable: WHY; "" where we have no number


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Where a row and a column meet."""

    row: str
    column: str
    state: str  # one of spec.STATES
    reason: str = ""  # of failed, stale and partial, in words
    wanted: int = 0  # seeds
    runs: Sequence[Run] = ()
    mean: float | None = None
    sd: float | None = None  # None below two seeds: n = 1 never gets a +-
    n: int = 0
    interval: Interval | None = None  # of the mean
    gain: Gain | None = None
    best: bool = False  # best of its group in this column, or not significantly worse than the best
    published: Reference | None = None
    waived: str = ""  # why a stale cell counts as fresh: crm accept
    protocol: str = ""  # recipe, checkpoint, split, classes: in words

    @property
    def usable(self) -> bool:
        """Whether its number may stand in a paper without a mark."""
        return self.state in ("fresh", "published only")

    @property
    def lacking(self) -> bool:
        """Whether it stops a table from being final: it wants runs, and they are not all there and fresh."""
        return bool(self.wanted) and not self.usable


@dataclass(frozen=True, kw_only=True)
class Built:
    """A table's spec with its cells."""

    table: Table
    form: str  # "" or "tiny"
    cells: Mapping[tuple[str, str], Cell]  # (row id, column id): see `row_id`, `column_id`
    notes: Sequence[str] = ()  # the spec's own, and what the statistics have to say
    commands: Sequence[str] = ()  # that would fill what is lacking
    work: Sequence[Any] = ()  # the same as data: analysis.paper.lacking.Work

    def cell(self, row: Row, column: Column) -> Cell:
        return self.cells[row_id(row), column_id(column)]


def row_id(row: Row) -> str:
    """What `crm cell TABLE:ROW/COLUMN` calls it: `group: label`, or the label alone."""
    return f"{row.group}: {row.label}" if row.group else row.label


def column_id(column: Column) -> str:
    return f"{column.group}: {column.label}" if column.group else column.label
