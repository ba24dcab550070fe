"""What runs have cost, attempts that failed or were stopped included: from the journals that every attempt leaves."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from crm.records import raw_lines


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Time from the first to the last line that an attempt wrote, times the devices that it took up."""

    attempts: int = 0
    hours: float = 0.0
    lost: float = 0.0  # hours, of those, of attempts that did not end well
    devices: frozenset[str] = frozenset()  # cpu, cuda

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(
            attempts=self.attempts + other.attempts,
            hours=self.hours + other.hours,
            lost=self.lost + other.lost,
            devices=self.devices | other.devices,
        )


def spent(folder: Path) -> Spent:
    """On one run; nothing where it has no journal."""
    total, attempt = Spent(), []
    for line in raw_lines(folder / "journal.jsonl"):
        if line["event"] == "attempt":
            total, attempt = total + _one(attempt), []
        attempt.append(line)
    return total + _one(attempt)


def _one(lines: list[dict]) -> Spent:
    """On one attempt; what was written before any, as an evaluation elsewhere does, is none."""
    if not lines or lines[0]["event"] != "attempt":
        return Spent()
    numerics = lines[0].get("numerics", {})
    hours = (lines[-1]["time"] - lines[0]["time"]) / 3600 * (numerics.get("processes", 1))
    well = any(line["event"] == "end" and line.get("outcome") == "done" for line in lines)
    device = frozenset([numerics["device"]] if "device" in numerics else [])
    return Spent(attempts=1, hours=hours, lost=0.0 if well else hours, devices=device)


def costs(runs: Path, ids: Mapping[str, Iterable[str]]) -> dict[str, dict[str, float | int]]:
    """What the page of tables shows as costs: label to attempts and hours.

    Args:
        runs: the folder of run folders; what was superseded there and trained anew counts too.
        ids: label to the ids of its runs.
    """
    found = {}
    for label, mine in ids.items():
        total = Spent()
        for one in dict.fromkeys(mine):
            for folder in (runs / one, *sorted((runs / ".superseded").glob(f"{one}.*"))):
                total += spent(folder)
        unit = "GPU hours" if "cuda" in total.devices else "CPU hours" if total.devices else "hours"
        found[label] = {"attempts": total.attempts, unit: total.hours, "of those lost": total.lost}
    return found
