"""Run folders as frames: one row per cell and condition, and one row per cell for what its training cost."""

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd

import sweeps
from crm.confusion import Evaluation, iou, load_evaluation, miou
from crm.names import chosen
from crm.records import evaluation, read_json, state
from crm.sweep import Cell, Sweep, tiny
from experiments import synthetic_tiny

Key = tuple[str, int, str]  # variant, seed, name of the condition
Evidence = dict[Key, Evaluation]  # what has been evaluated, without prediction maps


@dataclass(frozen=True, kw_only=True)
class Study:
    """All that the folders of one sweep hold, read once."""

    sweep: Sweep
    runs: Path
    cells: list[Cell]
    records: pd.DataFrame  # cell x condition, see `load`
    costs: pd.DataFrame  # one row per cell, see `_costs`
    evidence: Evidence

    @property
    def meta(self) -> dict[str, Any]:
        """What was evaluated: the same data set, split, classes and images in every evaluation of a part."""
        return next(iter(self.evidence.values())).meta if self.evidence else {}

    def parts(self) -> "dict[str, Study]":
        """The sweep's groups as studies of their own, by name; itself under "" where it has none."""
        if not self.sweep.groups:
            return {"": self}
        return {name: self._only(part) for name, part in self.sweep.parts().items()}

    def _only(self, part: Sweep) -> "Study":
        rows = part.variants.keys()
        return replace(
            self,
            sweep=part,
            cells=[cell for cell in self.cells if cell.variant in rows],
            records=self.records[self.records["variant"].isin(rows)],
            costs=self.costs[self.costs["variant"].isin(rows)],
            evidence={key: found for key, found in self.evidence.items() if key[0] in rows},
        )


def load(sweep: Sweep, runs: Path, changes: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """One row per cell and condition: what was run, in which state it is, and mIoU and IoU per class in per cent.

    An evaluation that does not exist is a row without metrics, so that a count leaves it out.
    """
    return read(sweep, runs, changes).records


def frame(name: str, runs: str | Path = "runs", changes: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """`load` for notebooks: a sweep by name, in any of its forms, as in `frame("demo@tiny", "runs")`.

    ValueError names the sweeps that there are.
    """
    plain, at, form = name.partition("@")
    known = sorted(info.name for info in pkgutil.iter_modules(sweeps.__path__))
    chosen("sweep", plain, dict.fromkeys(known))
    found = import_module(f"sweeps.{plain}").sweep
    if at:
        if form != "tiny":
            raise ValueError(f"{name}: only sweeps as declared and their tiny form go by name; `load` takes any Sweep")
        found = tiny(found, synthetic_tiny.config)
    return load(found, Path(runs), changes)


def read(sweep: Sweep, runs: Path, changes: Mapping[str, Any] | None = None) -> Study:
    """Everything the run folders hold about the sweep's cells; `changes` as given to `Sweep.cells`."""
    cells = sweep.cells(changes)
    evidence: Evidence = {}
    for cell in cells:
        for condition in sweep.conditions:
            path = evaluation(runs / cell.id, sweep.selection, condition)
            if path.exists():
                evidence[cell.variant, cell.seed, condition.name] = load_evaluation(path)
    for part in sweep.parts().values():
        _same_images({key: found for key, found in evidence.items() if key[0] in part.variants})
    records = _records(sweep, runs, cells, evidence)
    return Study(sweep=sweep, runs=runs, cells=cells, records=records, costs=_costs(runs, cells), evidence=evidence)


def _same_images(evidence: Evidence) -> None:
    """Refuses evaluations of different images or classes: no difference between them would mean anything."""
    first: dict[str, tuple[Key, Evaluation]] = {}  # by split
    for key, now in evidence.items():
        other, reference = first.setdefault(now.meta["split"], (key, now))
        same = list(now.names) == list(reference.names) and now.meta["classes"] == reference.meta["classes"]
        if not same:
            raise ValueError(
                f"{key[0]!r} seed {key[1]} and {other[0]!r} seed {other[1]} were evaluated on different images or "
                f"classes of the split {now.meta['split']!r}; evaluate one of them again"
            )


def _records(sweep: Sweep, runs: Path, cells: list[Cell], evidence: Evidence) -> pd.DataFrame:
    classes = next(iter(evidence.values())).meta["classes"] if evidence else []
    rows = []
    for cell in cells:
        now = state(runs, cell.config, sweep.selection, sweep.conditions).name
        for condition in sweep.conditions:
            row = {
                "variant": cell.variant,
                "seed": cell.seed,
                "id": cell.id,
                "state": now,
                "condition": condition.name,
                "split": condition.split,
                "rgb": condition.rgb.kind,
                "rgb_severity": condition.rgb.severity,
                "thermal": condition.thermal.kind,
                "thermal_severity": condition.thermal.severity,
                "images": pd.NA,
                "miou": float("nan"),
                **{f"iou.{name}": float("nan") for name in classes},
            }
            if (found := evidence.get((cell.variant, cell.seed, condition.name))) is not None:
                whole = found.confusion.sum(axis=0)
                row |= {"images": len(found.names), "miou": float(miou(whole))}
                own = found.meta["classes"]
                row |= {f"iou.{name}": float(value) for name, value in zip(own, iou(whole), strict=True)}
            rows.append(row)
    return pd.DataFrame(rows).astype({"images": "Int64"})


def _costs(runs: Path, cells: list[Cell]) -> pd.DataFrame:
    """One row per cell: steps, seconds per step, training seconds over all attempts, parameters; NaN until trained."""
    known = ("steps", "seconds_per_step", "train_seconds", "parameters")
    rows = []
    for cell in cells:
        result = read_json(runs / cell.id / "result.json") or {}
        values = {name: result.get(name, float("nan")) for name in known}
        rows.append({"variant": cell.variant, "seed": cell.seed, "id": cell.id, **values})
    return pd.DataFrame(rows)
