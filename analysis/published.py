"""Published results, from published.csv and published_gains.csv: data with their source, never typed into code."""

import csv
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("published.csv")
GAINS = Path(__file__).with_name("published_gains.csv")


@dataclass(frozen=True, kw_only=True)
class Published:
    experiment: str
    miou: float  # per cent, mean over all classes
    selection: str  # how the checkpoint was chosen
    source: str


def published() -> dict[str, Published]:
    """By experiment; a result that was not found anywhere is absent."""
    with FILE.open(newline="") as file:
        rows = [Published(**{**row, "miou": float(row["miou"])}) for row in csv.DictReader(file)]  # pyright: ignore
    return {row.experiment: row for row in rows}


@dataclass(frozen=True, kw_only=True)
class PublishedGain:
    claim: str  # its name in analysis.claims
    gain: float  # points of mIoU
    source: str


def published_gains() -> dict[str, PublishedGain]:
    """Gains that were published without the numbers they are differences of, by claim."""
    with GAINS.open(newline="") as file:
        rows = [PublishedGain(**{**row, "gain": float(row["gain"])}) for row in csv.DictReader(file)]  # pyright: ignore
    return {row.claim: row for row in rows}
