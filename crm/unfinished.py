"""What is known of an evaluation that has not come to its end, on disk: a kill costs little of it.

numpy only. A part is one file in `evals/<selection>/unfinished/`: the evidence of consecutive images of one split under
some conditions. Parts are written while a group of conditions is computed, at most every EVERY seconds, and are gone
once the group's evaluations are written.

n = images, k = classes, m = bins of calibration, h w = pixels of a picture
"""

import io
import json
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crm.conditions import Condition
from crm.records import write_bytes

EVERY = 20.0  # seconds between two parts


class Evidence(NamedTuple):
    """Of one condition, an item per image."""

    matrices: list[np.ndarray]  # (k, k)
    histograms: list[np.ndarray]  # (m, 3)
    pictures: list[np.ndarray]  # (h, w); none where the condition keeps none


Found = Mapping[Condition, Evidence]


class Unfinished:
    """The parts of one split; those of another checkpoint, other frames or other corruptions count for nothing."""

    def __init__(self, folder: Path, about: Mapping[str, Any], check: Callable[[], None] = lambda: None) -> None:
        """
        Args:
            folder: of the parts; made when there is one.
            about: what evidence depends on, as JSON has it: split, checkpoint, frames.
            check: called before anything is written; raises if the run is no longer this process's.
        """
        self.folder, self.about, self.check = folder, dict(about), check
        self.images, self.seconds = 0, 0.0  # that the parts hold, and that computing them took
        self._parts: list[tuple[Path, dict[str, Any]]] = []
        self._written = time.monotonic()
        for path in sorted(folder.glob("*.npz")):
            meta = _meta(path)
            if meta is None or meta["about"] != self.about or meta["first"] != self.images:
                continue
            self._parts.append((path, meta))
            self.images, self.seconds = self.images + meta["count"], self.seconds + meta["seconds"]

    def conditions(self, wanted: Iterable[Condition]) -> list[Condition]:
        """Those of which the parts hold evidence."""
        names = [set(meta["conditions"]) for _, meta in self._parts]
        return [condition for condition in wanted if names and all(condition.name in held for held in names)]

    def load(self, conditions: Iterable[Condition]) -> dict[Condition, Evidence]:
        """The evidence of the first `images` images, if the parts hold it of all these conditions; else of none."""
        found = {condition: Evidence([], [], []) for condition in conditions}
        if self._parts and len(self.conditions(found)) < len(found):
            self.clear()
        for path, meta in self._parts:
            places = {name: place for place, name in enumerate(meta["conditions"])}
            with np.load(path, allow_pickle=False) as stored:
                confusion, calibration = stored["confusion"], stored["calibration"]
                for condition, (matrices, histograms, pictures) in found.items():
                    place = places[condition.name]
                    matrices += list(confusion[place])
                    histograms += list(calibration[place])
                    pictures += list(stored[name]) if (name := f"pictures_{place}") in stored else []
        self._written = time.monotonic()
        return found

    def keep(self, found: Found, now: bool = False) -> None:
        """Writes what the parts lack of the evidence, every EVERY seconds, or `now`."""
        waited = time.monotonic() - self._written
        count = min((len(evidence.matrices) for evidence in found.values()), default=0) - self.images
        if count < 1 or (waited < EVERY and not now):
            return
        new = slice(self.images, self.images + count)
        arrays: dict[str, Any] = {
            "confusion": np.stack([evidence.matrices[new] for evidence in found.values()]),
            "calibration": np.stack([evidence.histograms[new] for evidence in found.values()]),
            **{f"pictures_{place}": np.stack(evidence.pictures[new])
               for place, evidence in enumerate(found.values()) if evidence.pictures},
        }  # fmt: skip
        names = [condition.name for condition in found]
        meta = {"about": self.about, "conditions": names, "first": self.images, "count": count, "seconds": waited}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, meta=np.array(json.dumps(meta)), **arrays)
        self.check()
        path = self.folder / f"{self.about['split']}-{self.images:06d}.npz"
        write_bytes(path, buffer.getvalue())
        self._parts.append((path, meta))
        self.images, self.seconds = self.images + count, self.seconds + waited
        self._written = time.monotonic()

    def clear(self) -> None:
        """Takes all parts away, also those that count for nothing."""
        self.check()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._parts, self.images, self.seconds = [], 0, 0.0


def _meta(path: Path) -> dict[str, Any] | None:
    """What a part says of itself; None if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return json.loads(str(stored["meta"]))
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile):
        return None
