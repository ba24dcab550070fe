"""What a table asks for, as data: rows are variants of sweeps, columns say where and how they are measured.

A cell is where both meet. Its runs are those of one sweep variant, one per seed; its value is a metric of their
evaluations. Nothing here reads a file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

STATES = ("published only", "missing", "queued", "running", "partial", "failed", "stale", "fresh")


@dataclass(frozen=True, kw_only=True)
class Column:
    """Where and how runs are measured."""

    label: str
    group: str = ""  # heading above neighbouring columns that share it: a data set, mostly
    key: str = ""  # fills the {} of the rows' variants: `MF` makes `{}, Swin-T, CRM` the variant `MF, Swin-T, CRM`
    metric: str = "miou"  # a key of analysis.paper.metrics.METRICS, as in `iou:guardrail` or `parameters`
    conditions: Sequence[str] = ("test",)  # names of crm.conditions; several are reduced to one number per run
    reduce: str = "mean"  # or "min", the worst case
    selection: str = ""  # which checkpoint; "" is the sweep's own
    recipe: str = ""  # form of the sweep: "" as declared, or "released"
    on: str = ""  # another data set on which the run is evaluated
    gain: bool = True  # whether the gain over the baseline is shown
    decimals: int = 1
    lower_is_better: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is compared."""

    label: str
    group: str = ""  # rows of a group are compared with each other, against its first row with runs
    sweep: str = ""  # module of `sweeps`; "" for a row of published numbers alone
    variant: str = ""  # of that sweep, with {} in the place of the column's key
    # column label -> key of published.csv; numbers of other papers, or of the paper for our row
    published: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of the paper."""

    name: str  # file name and what `crm tables NAME` takes
    title: str  # the caption's first sentence
    columns: Sequence[Column]
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    compare: str = "rows"  # what a gain compares with the group's first row; "none" shows no gains
    figure: str = ""  # kind of figure drawn from it, a key of analysis.paper.figures.FIGURES; "" is none
