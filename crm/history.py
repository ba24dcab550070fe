"""What runs cost, from the finished runs of this project: seconds of a step and of an evaluation, bytes. Torch-free.

A cost is known from runs of the same settings at any seed, or else from similar ones: the same but for the number of
steps, the optimiser, the masks and the weights of the loss, with the same terms, so that a step does the same passes.
Where there is neither it is unknown, which is never 0.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from crm.config import TERMS, Config, flatten, plain, seeded
from crm.records import read_json

Known = tuple[Config, Mapping[str, Any]]  # a run's config and its result
SAME, SIMILAR = "the same settings", "similar settings"
TAIL = 1 << 18  # bytes at the end of a journal, where its evaluations stand


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one run; what it is known from is in `basis`."""

    step: float  # seconds of a training step
    condition: float | None  # seconds of evaluating one condition
    processes: int  # that share a step: as many devices are taken up
    device: str  # cpu or cuda
    runs: int  # that it is the mean of
    basis: str  # SAME or SIMILAR
    example: Path  # the folder of one of them


@dataclass(frozen=True)
class Size:
    """Bytes that a finished run takes up on disk."""

    training: int  # but for the evaluations
    condition: float | None  # one evaluation


@dataclass(frozen=True)
class _Past:
    """A finished run."""

    folder: Path
    step: float
    device: str
    processes: int


class History:
    """The finished runs below a folder, by their settings."""

    def __init__(self, runs: Path, device: str = "", known: Mapping[str, Known] | None = None) -> None:
        """Reads nothing yet.

        Args:
            device: cpu or cuda, whose runs count; "" is the one that most runs were trained on.
            known: run id -> config and result, of runs whose config.json and result.json were read already.
        """
        self.runs, self._device, self._read = runs, device.partition(":")[0], known or {}
        self._keys: dict[Config, tuple[str, str]] = {}
        self._costs: dict[str, Cost | None] = {}
        self._sizes: dict[Path, Size] = {}

    def cost(self, config: Config) -> Cost | None:
        """What a run of this config costs; None where nothing is known."""
        if not self._by_settings:
            return None
        exact, alike = self._of(config)
        return self._known(exact, SAME) or self._known(alike, SIMILAR)

    def _of(self, config: Config) -> tuple[str, str]:
        """What `same` and `similar` say of a config; asked once for all seeds of a row."""
        row = seeded(config, 0)
        if row not in self._keys:
            settings = plain(config)
            self._keys[row] = same(settings), similar(settings)
        return self._keys[row]

    def _known(self, key: str, basis: str) -> Cost | None:
        if key not in self._costs:
            self._costs[key] = self._cost(key, basis)
        return self._costs[key]

    def size(self, config: Config) -> Size | None:
        """What a run of this config takes up on disk, from the same run as its cost."""
        if (found := self.cost(config)) is None:
            return None
        if found.example not in self._sizes:
            self._sizes[found.example] = _size(found.example)
        return self._sizes[found.example]

    def _cost(self, key: str, basis: str) -> Cost | None:
        past = [one for one in self._by_settings.get(key, ()) if one.device == self.device]
        if not past:
            return None
        newest = max(past, key=lambda one: (one.folder / "result.json").stat().st_mtime)
        return Cost(
            step=sum(one.step for one in past) / len(past), condition=_evaluation_seconds(newest.folder),
            processes=newest.processes, device=newest.device, runs=len(past), basis=basis, example=newest.folder,
        )  # fmt: skip

    @property
    def device(self) -> str:
        return self._device or self._usual

    @cached_property
    def _usual(self) -> str:
        """The device that most runs were trained on."""
        every = Counter({one.folder: one.device for past in self._by_settings.values() for one in past}.values())
        return every.most_common(1)[0][0] if every else ""

    @cached_property
    def _by_settings(self) -> dict[str, list[_Past]]:
        found: dict[str, list[_Past]] = {}
        for settings, past in _finished(self.runs, self._read):
            alike = self._of(settings) if isinstance(settings, Config) else (same(settings), similar(settings))
            for key in alike:
                found.setdefault(key, []).append(past)
        return found


def _finished(runs: Path, read: Mapping[str, Known]) -> Iterator[tuple[Config | dict[str, Any], _Past]]:
    """Every trained run that tells how long its steps took, with its settings."""
    known = plain(Config())
    try:
        names = [
            entry.name for entry in os.scandir(runs) if entry.is_dir() and not entry.name.startswith((".", "import-"))
        ]
    except FileNotFoundError:
        return
    for name in names:
        folder = runs / name
        settings, result = read.get(name) or (None, read_json(f"{folder}/result.json"))
        if not result or not result.get("seconds_per_step"):
            continue
        if settings is not None:
            pass
        elif written := read_json(f"{folder}/config.json"):
            # a setting that is new has its default, which means "as before"; one that is gone counts for nothing
            settings = {path: written["config"].get(path, value) for path, value in known.items()}
        else:
            continue
        numerics = read_json(f"{folder}/numerics.json") or {}
        device = numerics.get("device", "cpu").partition(":")[0]
        yield settings, _Past(folder, result["seconds_per_step"], device, numerics.get("processes", 1))


def same(settings: Mapping[str, Any]) -> str:
    """Equal for runs that differ in their seed alone."""
    return repr([value for path, value in settings.items() if path != "seed"])


@cache
def _shared() -> tuple[str, ...]:
    """The settings that decide what one step computes, but for the terms of the loss."""
    apart = ("seed", "steps", "val_every", "test_best")
    return tuple(
        path
        for path in flatten(Config())
        if path not in apart and path.partition(".")[0] not in ("loss", "masking", "optim")
    )


def similar(settings: Mapping[str, Any]) -> str:
    """Equal for runs whose steps do the same passes through the same network with as many pixels."""
    terms = [term for term in TERMS if settings[f"loss.{term}"] > 0]
    return repr([[settings[path] for path in _shared()], terms, settings["masking.kind"] != "none"])


def _evaluation_seconds(folder: Path) -> float | None:
    """Mean seconds of evaluating one condition, from the end of a run's journal."""
    try:
        with (folder / "journal.jsonl").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return None
    seconds = []
    for line in lines:
        if b'"evaluate"' in line:
            try:
                seconds.append(json.loads(line)["seconds"])
            except (ValueError, KeyError):
                continue  # torn
    return sum(seconds) / len(seconds) if seconds else None


def _size(folder: Path) -> Size:
    evaluations, rest = [], 0
    for path in folder.rglob("*"):
        if path.is_file():
            size = path.stat().st_size
            if path.suffix == ".npz":
                evaluations.append(size)
            else:
                rest += size
    return Size(rest, sum(evaluations) / len(evaluations) if evaluations else None)
