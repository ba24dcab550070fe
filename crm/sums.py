"""The sum of an evaluation beside it, so that tables of thousands of runs open no per-image file.

    evals/<selection>/sums.jsonl   a line per evaluation written, the last of a condition counts: what is known of its
                                   file, what it says of itself, its images, and its confusion matrices summed, over
                                   all images and over those at night

The .npz stays the evidence. A line that is missing, torn or about another file is no loss: the .npz is read instead.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crm.conditions import Condition

if TYPE_CHECKING:
    from crm.confusion import Evaluation

FILE = "sums.jsonl"


@dataclass(frozen=True, kw_only=True)
class Sums:
    """One evaluation, without its images."""

    condition: str
    sha256: str  # of its file as it was written; "" where no line tells
    bytes: int  # of its file now
    images: int
    at_night: int  # of these
    names: str  # hash of the image names in their order
    meta: dict[str, Any]  # the evaluation's own
    whole: np.ndarray  # (k, k) int64
    night: np.ndarray  # (k, k) int64, of the images at night
    edited: bool = False  # whether its file is not the one that was written


def summed(evaluation: "Evaluation", content: bytes | None = None) -> dict[str, Any]:
    """The line of an evaluation; with the hash of its file where that is given."""
    night = evaluation.night.astype(bool)
    names = sha256("\n".join(str(name) for name in evaluation.names).encode()).hexdigest()[:16]
    return {
        "condition": evaluation.meta["condition"],
        "sha256": sha256(content).hexdigest() if content is not None else "",
        "bytes": len(content) if content is not None else 0,
        "images": len(evaluation.names),
        "at_night": int(night.sum()),
        "names": names,
        "meta": evaluation.meta,
        "whole": evaluation.confusion.sum(axis=0, dtype=np.int64).tolist(),
        "night": evaluation.confusion[night].sum(axis=0, dtype=np.int64).tolist(),
    }


def note(path: Path, evaluation: "Evaluation", content: bytes) -> None:
    """A line about an evaluation that has just been written to `path`. A torn line before it is ended first."""
    line = json.dumps(summed(evaluation, content)).encode() + b"\n"
    with (path.parent / FILE).open("ab+") as file:
        if file.seek(0, 2):
            file.seek(-1, 2)
            line = b"\n" * (file.read(1) != b"\n") + line
        file.write(line)


def read(folder: Path, selection: str, conditions: Sequence[Condition]) -> dict[str, Sums]:
    """The sums of a run's evaluations by name of the condition; those it has not been evaluated under are left out.

    Writes nothing. ValueError where there is no line that fits and the evaluation itself is damaged.
    """
    from crm.confusion import load_evaluation  # it writes these lines

    place = folder / "evals" / selection
    lines = dict(_lines(place / FILE, {condition.name for condition in conditions}))
    found = {}
    for condition in conditions:
        path = place / f"{condition.name}.npz"
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            continue
        line = lines.get(condition.name)
        if line is None:
            found[condition.name] = _sums({**summed(load_evaluation(path)), "bytes": size})
        elif line["bytes"] != size:
            now = summed(load_evaluation(path))
            found[condition.name] = _sums({**now, "bytes": size, "sha256": line["sha256"]}, edited=True)
        else:
            found[condition.name] = _sums(line)
    return found


def _lines(path: Path, wanted: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The whole lines about these conditions, oldest first; others are not parsed."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    starts = tuple(f'{{"condition": {json.dumps(name)},'.encode() for name in wanted)
    for line in content.split(b"\n"):
        if line.startswith(starts):
            try:
                value = json.loads(line)
            except ValueError:
                continue  # torn
            yield value["condition"], value


def _sums(line: dict[str, Any], edited: bool = False) -> Sums:
    matrices = {name: np.array(line[name], dtype=np.int64) for name in ("whole", "night")}
    return Sums(**{**line, **matrices}, edited=edited)
