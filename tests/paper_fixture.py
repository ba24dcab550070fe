"""A built table with every state, mark and kind of number. All numbers are invented."""

from collections.abc import Mapping

import numpy as np

from analysis.paper.result import Built, Cell, Gain, Interval, Reference, Run, column_id, row_id
from analysis.paper.spec import Column, Row, Table

SEEDS = (11, 12, 13)
HOSTILE = "<script>alert(1)</script> & 50 % of $x_1$ \\ {a} ~^# | *b* `c`"


def invented(name: str = "main", figure: str = "dots", rows: list[Row] | None = None) -> Built:
    """The table `name`; the values follow from the names alone."""
    columns = [
        Column(label="mIoU", group="MF", key="MF"),
        Column(label="night", group="MF", key="MF", conditions=("test_night",)),
        Column(label="mIoU", group="PST900", key="PST900"),
        Column(label="parameters, M", metric="parameters", gain=False, lower_is_better=True),
    ]
    rows = rows or [
        Row(label="RTFNet", group="Other methods", published={"mIoU": "rtfnet_mf"}),
        Row(label="plain", group="Swin-T", sweep="components", variant="{}, plain"),
        Row(label="CRM", group="Swin-T", sweep="components", variant="{}, CRM", published={"mIoU": "mf_swin_t"}),
        Row(label="CRM, w/o L_SDN", group="Swin-T", sweep="components", variant="{}, CRM, w/o L_SDN"),
        Row(label=HOSTILE, group="Swin-T", sweep="components", variant="{}, hostile"),
    ]
    notes = ("No gain is claimed below five seeds; p values are corrected by Holm over the table.",)
    table = Table(name=name, title="Invented numbers: 100 % made up", columns=columns, rows=rows, figure=figure)
    cells = {
        (row_id(row), column_id(column)): _cell(row, column, i, j)
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    }
    return Built(table=table, form="", cells=cells, notes=notes, commands=("crm sweep components --only 'MF, CRM'",))


def doses(name: str = "ratio") -> Built:
    """A table whose rows are the doses of one setting."""
    rows = [Row(label=f"ratio {x}", sweep="ratio", variant=f"{x}") for x in (0.1, 0.3, 0.5, 0.7)]
    return invented(name, figure="dose", rows=rows)


def optimism(name: str = "selection") -> Built:
    """A table that measures the same runs at two checkpoints."""
    columns = [
        Column(label="val-best", group="MF", selection="val_best"),
        Column(label="test-best", group="MF", selection="test_best"),
    ]
    rows = [Row(label=label, sweep="components", variant=label) for label in ("plain", "CRM")]
    table = Table(name=name, title="Invented: two checkpoints", columns=columns, rows=rows, figure="optimism")
    cells = {
        (r.label, column_id(c)): _cell(r, c, 1 + i, 2 * j) for i, r in enumerate(rows) for j, c in enumerate(columns)
    }
    return Built(table=table, form="tiny", cells=cells)


def filled(table: Table) -> Built:
    """Any table with invented numbers in every cell that asks for some."""
    cells = {}
    for i, row in enumerate(table.rows):
        for j, column in enumerate(table.columns):
            cells[row_id(row), column_id(column)] = _cell(row, column, i, j)
    return Built(table=table, form="", cells=cells)


def _cell(row: Row, column: Column, i: int, j: int) -> Cell:
    names = {"row": row_id(row), "column": column_id(column)}
    theirs = Reference(value=58.2 + i, source="Sun et al., RA-L 2019, Table II & III", protocol="test-best, one seed")
    if not row.sweep:
        if column.label != "mIoU" or column.group != "MF":
            return Cell(**names, state="missing")
        return Cell(**names, state="published only", published=theirs)
    if column.metric == "parameters":
        runs = [Run(sweep="components", variant=row.variant, seed=11, id="0f3c", state="done", value=88.25)]
        return Cell(**names, state="fresh", wanted=1, runs=runs, mean=88.25, n=1, protocol="counted")
    rng = np.random.default_rng([i, j])
    values = {seed: float(60 + 1.3 * i + j + rng.normal(0, 0.4)) for seed in SEEDS}
    state, reason, waived = "fresh", "", ""
    if (i, j) == (3, 0):
        state, reason = "partial", "seed 13 failed: out of memory"
        del values[13]
    elif (i, j) == (3, 1):
        state, reason = "stale", "losses.py changed: self_distillation"
    elif (i, j) == (3, 2):
        return Cell(**names, state="failed", reason="out of memory", wanted=3, runs=_runs(row, {}, "failed"))
    elif (i, j) == (4, 1):
        return Cell(**names, state="running", wanted=3, runs=_runs(row, {}, "running"))
    elif (i, j) == (4, 2):
        waived = "a comment was changed"
    found = np.array(list(values.values()))
    half = 4.3027 * found.std(ddof=1) / np.sqrt(len(found))
    gain = None
    if i != 1:
        over = f"{row.group}: plain" if row.group else "the first"
        interval = Interval(low=1.3 * i - 2.2, high=1.3 * i - 0.4, over="new training seeds and images", method="t")
        words = {"mean": 1.3 * i - 1.3, "sd": 0.3, "n": len(found), "reference": over, "interval": interval}
        gain = Gain(**words, p=0.012, verdict="gain" if i > 1 else "within noise", more_seeds=None if i > 1 else 4)
    ours = Reference(value=59.1, source="README of the released code", protocol="test-best", verdict="reproduced")
    return Cell(
        **names,
        state=state,
        reason=reason,
        waived=waived,
        wanted=3,
        runs=_runs(row, values, "done"),
        mean=float(found.mean()),
        sd=float(found.std(ddof=1)),
        n=len(found),
        interval=Interval(
            low=found.mean() - half,
            high=found.mean() + half,
            over="new training seeds, this test set",
            method="t over 3",
        ),
        gain=gain,
        best=i >= 3,
        published=ours if row.published and column.label == "mIoU" and column.group == "MF" else None,
        protocol="released recipe, val-best checkpoint, 393 images, 9 classes",
    )


def _runs(row: Row, values: Mapping[int, float], state: str) -> list[Run]:
    chain = {"commit": "3f2c9e1a0b", "diff": "", "checkpoint": "51ab" * 16, "data": "91ce", "jobs": ["87110_2"]}
    return [
        Run(
            sweep="components", variant=row.variant, seed=seed, id=f"{seed}f3c0a1", state=state,
            share=0.4 if state == "running" else 1.0, value=values.get(seed), chain=chain | {"log": HOSTILE},
        )
        for seed in SEEDS
    ]  # fmt: skip
