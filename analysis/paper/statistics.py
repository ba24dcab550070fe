"""Gains, what is told from noise, and what is marked as best: over all cells of a table together.

Gains are paired at equal seed with the first row of the group that has runs. mIoU of all images is compared on the
per-image matrices, over seeds and images (`analysis.stats.paired_files`, remembered in a cache); everything else over
seeds alone. p-values carry Holm's correction over the table.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from analysis.paper.evidence import Contribution
from analysis.paper.metrics import bootstrapped
from analysis.paper.result import Cell, Gain, Interval, column_id, row_id
from analysis.paper.spec import Column, Row, Table
from analysis.paper.wanted import Wanted
from analysis.stats import LEVEL, Cache, Estimate, best_rows, holm, more_seeds, over_seeds, paired_files

Key = tuple[str, str]
Found = Mapping[Key, Sequence[Contribution]]


@dataclass
class Compared:
    gains: dict[Key, Gain] = field(default_factory=dict)
    best: set[Key] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def of(self, key: Key) -> dict[str, Any]:
        """Fields of a cell."""
        return {"gain": self.gains.get(key), "best": key in self.best}


def compared(
    table: Table, asked: Mapping[Key, Wanted], found: Found, cells: Mapping[Key, Cell], cache: Cache
) -> Compared:
    """Of every cell that may be compared."""
    result = Compared()
    if table.compare == "none":
        return result
    estimates: dict[Key, tuple[Estimate, str]] = {}
    for column in (column for column in table.columns if column.gain):
        for group in dict.fromkeys(row.group for row in table.rows):
            rows = [row for row in table.rows if row.group == group and cells[_key(row, column)].n]
            if len(rows) < 2:
                continue
            reference = rows[0]
            for row in rows[1:]:
                if (estimate := _over(row, reference, column, found, cache, result)) is not None:
                    estimates[_key(row, column)] = (estimate, row_id(reference))
            result.best |= _best(rows, column, found, cells, cache, result)
    corrected = holm([estimate.p() if estimate.n > 1 else math.nan for estimate, _ in estimates.values()])
    for (key, (estimate, reference)), p in zip(estimates.items(), corrected, strict=True):
        result.gains[key] = _gain(estimate, reference, float(p), asked[key].column, found[key])
    result.notes = list(dict.fromkeys(result.notes))
    return result


def _over(row: Row, reference: Row, column: Column, found: Found, cache: Cache, result: Compared) -> Estimate | None:
    """The gain of a row over another; None where they share nothing that may be compared."""
    own, other = ({one.cell.seed: one for one in found[_key(each, column)] if one.usable} for each in (row, reference))
    seeds = sorted(own.keys() & other.keys())
    name = f"{row_id(row)}, {column_id(column)}"
    if {one.cell.id for one in own.values()} & {one.cell.id for one in other.values()}:
        result.notes.append(f"{name}: no gain, for it counts on the same runs as {row_id(reference)}")
        return None
    if not seeds:
        result.notes.append(f"{name}: no gain, for it shares no seed with {row_id(reference)}")
        return None
    if {one.protocol for one in own.values()} != {one.protocol for one in other.values()}:
        result.notes.append(f"{name}: no gain, for {row_id(reference)} was evaluated on other data")
        return None
    if own.keys() != other.keys():
        only = ", ".join(map(str, seeds))
        result.notes.append(
            f"{name}: the gain is over seed{'s' * (len(seeds) > 1)} {only} alone, which {row_id(reference)} has too"
        )
    sign = -1.0 if column.lower_is_better else 1.0
    if bootstrapped(column.metric):
        pairs = paired_files(
            {seed: own[seed].files for seed in seeds}, {seed: other[seed].files for seed in seeds}, cache, column.reduce
        )
        assert pairs is not None  # there are seeds
        if pairs.stray:
            result.notes.append(f"{name}: classes that are predicted and labelled nowhere are in no gain")
        return pairs.offered
    return over_seeds([sign * (own[seed].value - other[seed].value) for seed in seeds])  # type: ignore[operator]


def _best(
    rows: Sequence[Row], column: Column, found: Found, cells: Mapping[Key, Cell], cache: Cache, result: Compared
) -> set[Key]:
    """The rows to mark in a column of a group."""
    sign = -1.0 if column.lower_is_better else 1.0
    means = {row_id(row): sign * (cells[_key(row, column)].mean or 0.0) for row in rows}
    first = max(rows, key=lambda row: means[row_id(row)])
    unsaid = Compared()  # what cannot be compared was said of the gains already
    over = {row_id(row): _over(row, first, column, found, cache, unsaid) for row in rows if row is not first}
    known = {row: estimate for row, estimate in over.items() if estimate is not None and estimate.n > 1}
    return {(row, column_id(column)) for row in best_rows(means, known)}


def _gain(estimate: Estimate, reference: str, p: float, column: Column, found: Sequence[Contribution]) -> Gain:
    interval = estimate.interval()
    verdict = ""
    if estimate.n > 1:
        verdict = "within noise" if math.isnan(p) or p >= 1 - LEVEL else "gain" if estimate.mean > 0 else "loss"
    more = more_seeds(estimate).seeds if verdict in ("", "within noise") else None
    seconds = [float(one.chain["train_seconds"]) for one in found if one.chain.get("train_seconds")]
    return Gain(
        mean=estimate.mean,
        sd=estimate.sd if estimate.n > 1 else None,
        n=estimate.n,
        reference=reference,
        interval=interval and Interval(
            low=interval.low, high=interval.high, over=interval.over,
            method=f"t over {estimate.n} seeds" + (f" and {estimate.units} images" if estimate.units else ""),
        ),
        p=None if math.isnan(p) else p,
        verdict=verdict,
        more_seeds=more,
        # each more seed trains both rows, which cost about the same
        cost_hours=2 * more * sum(seconds) / len(seconds) / 3600 if more and seconds else None,
    )  # fmt: skip


def _key(row: Row, column: Column) -> Key:
    return row_id(row), column_id(column)
