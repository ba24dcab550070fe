"""What is wrong with a data set on disk, found before a cluster does.

Every frame of every split is read once, as training would read it, and measured (`crm.data.measure`); what training
would refuse is a finding, and the check goes on. What is looked for stands in `crm.data.findings`. Torch-free.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crm.data.dataset import open_split
from crm.data.files import LAYOUTS, locate
from crm.data.findings import ERROR, KINDS, LOOK, Finding, Part, Usable
from crm.data.measure import CLEAR, mean_and_deviation, measure, typical
from crm.data.pictures import BROKEN
from crm.data.specs import DATASETS, DatasetSpec
from crm.names import chosen

Tell = Callable[[int, int], None]  # frames read, frames in all


@dataclass(frozen=True)
class Report:
    dataset: str
    folder: str
    splits: dict[str, dict[str, Any]]  # facts of each split
    findings: list[Finding]  # errors first

    @property
    def errors(self) -> int:
        return sum(finding.level == ERROR for finding in self.findings)


def check(dataset: str, data_root: Path | None, threads: int = 1, tell: Tell = lambda done, count: None) -> Report:
    """Reads every frame of a data set on disk and says what is wrong or worth knowing.

    Raises ValueError or FileNotFoundError, in words for people, if there is no such data set or no folder of it.
    """
    spec = chosen("data set", dataset, DATASETS)
    if spec.layout == "generated":
        raise ValueError(
            f"{spec.title} are made on the fly: there are no files to check (`crm data synth` writes some)"
        )
    folder = locate(spec, data_root)
    parts, findings = _open(spec, folder)
    todo = [(split, index) for split, part in parts.items() for index in range(len(part.names))]
    with ThreadPoolExecutor(threads) as pool:  # decoding and Fourier transforms leave the interpreter to others
        for done, found in enumerate(pool.map(partial(_look, spec, folder, parts), todo), 1):
            if isinstance(found, Usable):
                parts[found.split].usable.append(found)
            else:
                findings += found
            tell(done, len(todo))
    for look in LOOK:
        findings += look(spec, folder, parts)
    order = list(KINDS)
    findings.sort(key=lambda finding: order.index(finding.kind))
    return Report(spec.name, str(folder), {name: _facts(spec, name, part) for name, part in parts.items()}, findings)


def _open(spec: DatasetSpec, folder: Path) -> tuple[dict[str, Part], list[Finding]]:
    """train, val and test, of which day and night splits are parts, as far as they can be listed; why others cannot."""
    parts: dict[str, Part] = {}
    findings: list[Finding] = []

    def listed(name: str, carve_val: bool) -> None:
        try:
            split = open_split(spec.name, name, data_root=folder, carve_val=carve_val)
        except (ValueError, OSError) as error:
            sources = [*(folder / f"{one}.txt" for one in spec.splits), folder / name]
            findings.append(Finding("split", _named(error, sources, folder), str(error), name))
        else:
            assert isinstance(split.origin, list)
            parts[name] = Part(split.names, split.origin, split.carved)

    for name in ("train", "val", "test"):
        if name in spec.splits:
            listed(name, carve_val=False)
        elif spec.carve_out and name == "val" and "train" in parts:
            listed("val", carve_val=True)
            if "val" in parts:
                listed("train", carve_val=True)
    return parts, findings


def _named(error: Exception, files: Iterable[Path], otherwise: Path) -> str:
    """The file that an error's message names."""
    return str(next((path for path in files if str(path) in str(error)), otherwise))


def _look(spec: DatasetSpec, folder: Path, parts: dict[str, Part], frame: tuple[str, int]) -> Usable | list[Finding]:
    """What was measured of a frame, or why training could not read it."""
    split, index = frame
    name, files = parts[split].names[index], parts[split].files[index]
    try:
        read = LAYOUTS[spec.layout].read(spec, folder, "train" if parts[split].carved else split, name)
    except (ValueError, OSError) as error:
        found = [Finding(_fault(error, files), _named(error, files, files[0]), str(error), split)]
        if isinstance(error, FileNotFoundError):  # the error is about the first of them
            others = [path for path in files if str(path) != found[0].file and not os.path.exists(path)]
            found += [Finding("missing", str(path), f"{path} is missing too", split) for path in others]
        return found
    return Usable(split, name, files, measure(read))


def _fault(error: Exception, files: list[Path]) -> str:
    """The kind of finding for a frame that could not be read."""
    if isinstance(error, FileNotFoundError):
        return "missing"
    sizes, label = set(), None
    try:
        for path in files:
            with Image.open(path) as label:
                label.load()
                sizes.add(label.size)
    except BROKEN:
        return "unreadable"
    if len(sizes) > 1:
        return "mismatch"
    return "label ids" if label and label.mode in ("L", "P") and "label id" in str(error) else "channels"


def _facts(spec: DatasetSpec, split: str, part: Part) -> dict[str, Any]:
    """A split in numbers: mean and deviation in grey levels of R, G, B, thermal; shares in per cent of all pixels."""
    frames = [frame.seen for frame in part.usable]
    night = sum(map(spec.is_night, part.names)) if spec.night_pattern else None
    facts: dict[str, Any] = {
        "frames": len(part.names),
        "official": spec.splits.get(split),
        "carved": part.carved,
        "day": None if night is None else len(part.names) - night,
        "night": night,
        "usable": len(frames),
    }
    if not frames:
        return facts
    mean, deviation = mean_and_deviation(np.sum([frame.levels for frame in frames], axis=0))
    pixels = np.sum([frame.labels for frame in frames], axis=0)
    shares = 100 * pixels / pixels.sum()
    shift = typical([frame.shift for frame in frames])
    return facts | {
        "size": list(Counter(frame.size for frame in frames).most_common(1)[0][0]),
        "mean": [round(value, 2) for value in mean],
        "deviation": [round(value, 2) for value in deviation],
        "classes": {name: round(float(share), 4) for name, share in zip(spec.classes, shares, strict=False)},
        "ignored": round(float(shares[spec.ignore_index]), 4),
        "shift": shift
        and {
            "down": shift.down,
            "right": shift.right,
            "confidence": round(shift.confidence, 2),
            "frames": sum(frame.shift.confidence >= CLEAR for frame in frames),
        },
    }
