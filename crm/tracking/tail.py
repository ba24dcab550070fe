"""A journal read once and then followed: every line as it was first written, a few in memory at a time."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Point = tuple[str, float, int, int]  # key, value, time in ms, step

KEY_LENGTH = 250
NO_METRICS = ("event", "time", "step", "terms", "details")


@dataclass
class Story:
    """What the lines of a journal say together."""

    lines: int = 0  # first-written ones; the journal only grows, so only those behind this number are new
    attempts: int = 0
    newest: float = 0.0  # time of the newest line, seconds
    last: Mapping[str, Any] = field(default_factory=dict)  # the last attempt or end
    reason: str | None = None  # of the last end
    odd: int = 0  # numbers that MLflow would turn into others
    first_odd: str = ""
    conditions: set[str] = field(default_factory=set)  # names of those that were evaluated


class Tail:
    """One run's journal.

    Redone steps, and evaluations repeated with the same result, count as they were written first, where
    `crm.records.journal` keeps the last: the first never changes, which makes sending again harmless. What is kept in
    memory is a key per line and the story, never the lines.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "journal.jsonl"
        self.inode = self.path.stat().st_ino if self.path.exists() else 0
        self.offset, self.story = 0, Story()
        self._seen: set[Any] = set()

    def fits(self) -> bool:
        """Whether the file is still the one that was read."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return self.offset == 0
        return found.st_ino == self.inode and found.st_size >= self.offset

    def news(self) -> Iterator[tuple[int, list[Point]]]:
        """Number and points of every new line, which the story then tells too."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for raw in file:
                if not raw.endswith(b"\n"):
                    return  # being written, or torn by a kill; then the next writer ends it
                self.offset += len(raw)
                line = parsed(raw)
                if line is None or (key := _key(line)) in self._seen:
                    continue
                if key is not None:
                    self._seen.add(key)
                found = points(line)
                self._tell(line, found)
                yield self.story.lines - 1, found

    def _tell(self, line: Mapping[str, Any], found: list[Point]) -> None:
        story, event = self.story, line["event"]
        story.lines += 1
        story.newest = max(story.newest, line["time"])
        if event in ("attempt", "end"):
            story.last = line
        story.attempts += event == "attempt"
        if event == "end":
            story.reason = line.get("reason", "")
        if event == "evaluate":
            story.conditions.add(line["condition"])
        for key, value, _, step in found:
            if not math.isfinite(value):
                story.odd += 1
                story.first_odd = story.first_odd or f"{key} at step {step}"


def parsed(raw: bytes) -> dict[str, Any] | None:
    """One line of a journal; None for one that a kill has torn."""
    try:
        value = json.loads(raw)
    except ValueError:
        return None
    return value if isinstance(value, dict) and "event" in value else None


def first_attempt(folder: Path) -> dict[str, Any] | None:
    """The line with which the first attempt began; None for a run that nobody has begun."""
    try:
        with (folder / "journal.jsonl").open("rb") as file:
            lines = (parsed(raw) for raw in file)
            return next((line for line in lines if line and line["event"] == "attempt"), None)
    except FileNotFoundError:
        return None


def _key(line: Mapping[str, Any]) -> Any:
    """What a line that is written again has in common with the first; None for lines that are never repeated."""
    if line["event"] in ("train", "val", "test", "system"):
        return line["event"], line["step"]
    if line["event"] == "evaluate":
        return line["selection"], line["condition"], str(line["miou"])
    return None


def points(line: Mapping[str, Any]) -> list[Point]:
    """The metrics of one journal line."""
    event, when = line["event"], ms(line["time"])
    if event == "evaluate":
        return [(f"{line['selection']}/{written(line['condition'])}/miou"[:KEY_LENGTH], line["miou"], when, 0)]
    if event not in ("train", "val", "test", "system"):
        return []
    values = {key: value for key, value in line.items() if key not in NO_METRICS}
    values |= line.get("terms", {}) | line.get("details", {})
    return [(written(key), value, when, line["step"]) for key, value in _flat(event, values)]


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every number in nested values under its path; what is none, such as the IoU of an absent class, is left out."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{prefix}/{key}", inner)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _flat(f"{prefix}/{number}", inner)
    elif isinstance(value, int | float):
        yield prefix, value


def written(name: str) -> str:
    """The name with what MLflow does not allow written as `:`."""
    return re.sub(r"[^\w./ :-]", ":", name)[:KEY_LENGTH]


def ms(seconds: float) -> int:
    return round(seconds * 1000)
