"""Published results, from published.csv and published_gains.csv: data with their source, never typed into code.

`tag` says how sure a number is: R read in the method's own README, A in its abstract, X in somebody else's table. What
was found nowhere is absent. mIoU is in per cent, single scale, over all classes of the data set, class 0 included.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("published.csv")
GAINS = Path(__file__).with_name("published_gains.csv")


@dataclass(frozen=True, kw_only=True)
class Published:
    key: str  # method/data set
    method: str
    backbone: str
    year: int
    dataset: str
    experiment: str  # of ours, that is set up as this one; "" for other methods
    miou: float  # per cent, mean over all classes
    selection: str  # how the checkpoint was chosen
    tag: str
    source: str


def results() -> dict[str, Published]:
    """Every published result by its key."""
    with FILE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = [Published(**{**row, "miou": float(row["miou"]), "year": int(row["year"])}) for row in rows]  # pyright: ignore
    return {row.key: row for row in found}


def published() -> dict[str, Published]:
    """Those of the method itself, by experiment."""
    return {row.experiment: row for row in results().values() if row.experiment}


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
