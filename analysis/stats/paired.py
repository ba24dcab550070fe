"""Two rows at equal seeds on the same test images: all that is needed of them, in a few numbers.

s = seeds, c = conditions, n = test images, k = classes, b = bootstrap draws
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.stats.bootstrap import DRAWS, bootstrap_miou, fixed_miou, image_draws, rare, recording_draws, stray
from analysis.stats.cache import Cache
from analysis.stats.seeds import Estimate, Spread, over_seeds, over_seeds_and_images, spread
from crm.confusion import load_evaluation
from crm.data.recordings import recording

REDUCE = {"mean": np.mean, "min": np.min}  # of the conditions' mIoU
Evaluated = Sequence[np.ndarray]  # one run: the per-image matrices (n, k, k) of each condition


@dataclass(frozen=True)
class Pairs:
    """The gains of one row over another, in points of mIoU over the fixed class set, and how images move them."""

    seeds: list[int]  # that both rows have
    gains: np.ndarray  # (s,)
    images: Spread  # over draws of single images
    recordings: Spread  # over draws of whole recordings
    without_rare: np.ndarray  # (s,) gains without the rare classes; the same where there is none
    rare: list[int]  # classes that few test images have, see `analysis.stats.rare`
    stray: list[int]  # classes that are predicted somewhere and labelled nowhere, which are in no mean here

    @property
    def this_test_set(self) -> Estimate:
        """For other training seeds on these very images."""
        return over_seeds(self.gains)

    @property
    def offered(self) -> Estimate:
        """For other training seeds and other test images: what tables show and verdicts are from."""
        return over_seeds_and_images(self.gains, self.images, self.recordings)

    @property
    def by_image(self) -> Estimate:
        """The same with images taken as independent of each other, to compare with."""
        return over_seeds_and_images(self.gains, self.images)

    @property
    def by_recording(self) -> Estimate:
        """The same with whole recordings drawn, as a check."""
        return over_seeds_and_images(self.gains, self.recordings)


def paired(
    subject: Mapping[int, Evaluated],
    reference: Mapping[int, Evaluated],
    recordings: Sequence[str],
    reduce: str = "mean",
    draws: int = DRAWS,
    seed: int = 0,
) -> Pairs | None:
    """The gains of `subject` over `reference`, both by training seed; None where they share none.

    Args:
        recordings: (n,) of each image.
        reduce: how the conditions of a run become one number, a key of REDUCE.
        seed: of the draws; the same seed draws the same images for every pair of rows.
    """
    seeds = sorted(set(subject) & set(reference))
    if not seeds:
        return None
    rng = np.random.default_rng(seed)
    counts = [image_draws(len(recordings), draws, rng), recording_draws(recordings, draws, rng)]

    def gains(of: Callable[[np.ndarray], Any]) -> np.ndarray:
        def score(run: Evaluated) -> Any:
            return REDUCE[reduce]([of(one) for one in run], axis=0)

        return np.array([score(subject[seed]) - score(reference[seed]) for seed in seeds])

    every = [one for seed in seeds for run in (subject[seed], reference[seed]) for one in run]
    few = rare(every[0])
    units = len(recordings), len(set(recordings))
    images, whole = (spread(gains(lambda one, drawn=drawn: bootstrap_miou(one, drawn)), size)
                     for drawn, size in zip(counts, units, strict=True))  # fmt: skip
    strays = sorted({name for one in every for name in stray(one)})
    return Pairs(seeds, gains(fixed_miou), images, whole, gains(lambda one: fixed_miou(one, few)), few, strays)


def paired_files(
    subject: Mapping[int, Sequence[Path]],
    reference: Mapping[int, Sequence[Path]],
    cache: Cache,
    reduce: str = "mean",
    draws: int = DRAWS,
    seed: int = 0,
) -> Pairs | None:
    """The same from the files of evaluations, a file per condition; what is in the cache opens none of them.

    ValueError where two of them are of other images or classes.
    """
    seeds = sorted(set(subject) & set(reference))
    if not seeds:
        return None
    rows = (subject, reference)
    contents = [[[cache.content(path) for path in row[one]] for one in seeds] for row in rows]
    key = ["paired", seeds, contents, reduce, draws, seed]

    def compute() -> dict[str, Any]:
        found = [{one: [load_evaluation(path) for path in row[one]] for one in seeds} for row in rows]
        first = found[0][seeds[0]][0]
        every = [(path, one) for row, side in zip(found, rows, strict=True) for s in seeds
                 for path, one in zip(side[s], row[s], strict=True)]  # fmt: skip
        for path, one in every:
            if list(one.names) != list(first.names) or one.meta["classes"] != first.meta["classes"]:
                raise ValueError(f"{path} was evaluated on other images or classes than {subject[seeds[0]][0]}")
        matrices = [{s: [one.confusion for one in run] for s, run in row.items()} for row in found]
        named = [recording(str(name), first.meta["dataset"]) for name in first.names]
        pairs = paired(matrices[0], matrices[1], named, reduce, draws, seed)
        assert pairs is not None  # there are seeds
        return _plain(pairs)

    return _pairs(cache.remembered(key, compute))


def _plain(pairs: Pairs) -> dict[str, Any]:
    """As JSON has it."""
    spreads = {name: {"covariance": one.covariance.tolist(), "units": one.units}
               for name, one in (("images", pairs.images), ("recordings", pairs.recordings))}  # fmt: skip
    arrays = {"gains": pairs.gains.tolist(), "without_rare": pairs.without_rare.tolist()}
    return {"seeds": pairs.seeds, "rare": pairs.rare, "stray": pairs.stray, **arrays, **spreads}


def _pairs(plain: Mapping[str, Any]) -> Pairs:
    images, recordings = (Spread(np.array(plain[name]["covariance"]), plain[name]["units"])
                          for name in ("images", "recordings"))  # fmt: skip
    arrays = np.array(plain["gains"]), np.array(plain["without_rare"])
    return Pairs(plain["seeds"], arrays[0], images, recordings, arrays[1], plain["rare"], plain["stray"])
