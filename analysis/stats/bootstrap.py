"""What the test images say: bootstrap draws of per-image confusion matrices, and mIoU in each.

s = seeds, n = test images, k = classes, b = bootstrap draws
"""

from collections.abc import Sequence

import numpy as np

from analysis.stats.seeds import IMAGES, LEVEL, SEEDS_AND_IMAGES, Interval, spread

DRAWS = 2000
RARE = 10  # a class labelled in fewer images than this is rare: it comes and goes with the draw


# ---------------------------------------------------------------------------------------------- draws


def image_draws(images: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(b, n) how often each image occurs in each bootstrap draw of n images with replacement."""
    chosen = rng.integers(images, size=(draws, images), dtype=np.int32)
    chosen += np.arange(draws, dtype=np.int32)[:, None] * images
    return np.bincount(chosen.ravel(), minlength=draws * images).reshape(draws, images)


def recording_draws(recordings: Sequence[str], draws: int, rng: np.random.Generator) -> np.ndarray:
    """(b, n) how often each image occurs in draws of whole recordings with replacement, as many as there are.

    Neighbouring frames of a recording are nearly the same picture, so what images drawn one by one say of another test
    set may be too sure; recordings are drawn as wholes instead.

    Args:
        recordings: of every image, its recording, as crm.data.recordings.recording names it.
    """
    names, of_image = np.unique(np.asarray(recordings), return_inverse=True)
    return image_draws(len(names), draws, rng)[:, of_image]


# ---------------------------------------------------------------------------------------------- mIoU


def labelled(confusion: np.ndarray) -> np.ndarray:
    """(k,) the classes that a split (n, k, k) has labels of: the fixed class set of its comparisons."""
    return confusion.sum(axis=(0, 2)) > 0


def stray(confusion: np.ndarray) -> list[int]:
    """Classes that are predicted in a split (n, k, k) and labelled nowhere.

    crm.confusion.miou counts them as 0 for a network that predicts them, and not at all for one that does not, so that
    two networks would be compared on different classes; here they are in no mean, and only the pixels they were
    predicted for are lost to their true classes. Without such a class both are the same number.
    """
    return np.flatnonzero((confusion.sum(axis=(0, 1)) > 0) & ~labelled(confusion)).tolist()


def rare(confusion: np.ndarray, below: int = RARE) -> list[int]:
    """Classes that some images of a split (n, k, k) have labels of, but fewer than `below` and fewer than a tenth."""
    images = (confusion.sum(axis=2) > 0).sum(axis=0)
    return np.flatnonzero((images > 0) & (images < min(below, len(confusion) / 10))).tolist()


def fixed_miou(confusion: np.ndarray, without: Sequence[int] = ()) -> float:
    """mIoU in per cent of the whole split (n, k, k) over the classes that it has labels of, but for `without`."""
    return float(bootstrap_miou(confusion, np.ones((1, len(confusion)), int), without)[0])


def bootstrap_miou(confusion: np.ndarray, counts: np.ndarray, without: Sequence[int] = ()) -> np.ndarray:
    """(b,) mIoU in per cent of each draw, from the per-image matrices (n, k, k) and `image_draws`.

    The class set of a draw depends on its labels alone: a class without a labelled pixel in the draw is left out,
    whatever was predicted. So two networks are always compared on the same classes, also when a rare class is in few
    images and drops out of the draw. NaN for a draw without any label.

    Args:
        without: classes that are left out of the mean everywhere, such as `rare` ones; their pixels stay.
    """
    return bootstrap_mious(confusion[None], counts, without)[0]


def bootstrap_mious(confusions: np.ndarray, counts: np.ndarray, without: Sequence[int] = ()) -> np.ndarray:
    """(s, b) the same of several evaluations (s, n, k, k) of the same images, all in the same draws."""
    runs, images, classes, _ = confusions.shape
    hit = np.diagonal(confusions, axis1=2, axis2=3)  # (s, n, k)
    union = confusions.sum(axis=3) + confusions.sum(axis=2) - hit
    label = confusions.sum(axis=3).any(axis=0)  # (n, k), the same in all of them
    # a draw's matrix need not be summed whole: hits and unions are a quarter of it
    flat = np.concatenate([np.moveaxis(part, 0, 1).reshape(images, -1) for part in (hit, union)], axis=1)
    weights = counts.astype(float)
    hits, unions = (weights @ flat.astype(float)).reshape(-1, 2, runs, classes).swapaxes(0, 1)
    present = (weights @ label.astype(float) > 0) & ~np.isin(np.arange(classes), list(without))  # (b, k)
    counted = present[:, None, :]
    share = np.divide(hits, unions, out=np.zeros_like(hits), where=counted & (unions > 0))
    known = present.sum(axis=1)[:, None]
    total = 100 * share.sum(axis=2)
    return np.divide(total, known, out=np.full_like(total, np.nan), where=known > 0).T


# ---------------------------------------------------------------------------------------------- seeds outside
# Neither of the two intervals is what the tables offer: `python -m benchmarks.coverage` shows why. They are here to be
# compared with, and the first for what has no standard error, such as a breaking point.


def seed_means(drawn: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(v, b) means over seeds that are drawn with replacement, the same ones for all v, from (v, s, b) image draws."""
    _, seeds, draws = drawn.shape
    chosen = rng.integers(seeds, size=(draws, seeds))
    return drawn[:, chosen, np.arange(draws)[:, None]].mean(axis=2)


def hierarchical_percentile(drawn: np.ndarray, rng: np.random.Generator) -> Interval:
    """95 % percentile interval of the mean gain, from the gain of each seed in each image draw (s, b).

    Each draw also draws s seeds with replacement (outside), and all of them see the same drawn images (inside), since
    every seed is tested on the same images. Too narrow with few seeds: of three it sees few combinations, and takes
    their spread for the true one.
    """
    low, high = np.quantile(seed_means(drawn[None], rng)[0], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high), SEEDS_AND_IMAGES if len(drawn) > 1 else IMAGES)


def hierarchical_studentised(values: np.ndarray, drawn: np.ndarray, images: int, rng: np.random.Generator) -> Interval:
    """95 % bootstrap-t interval of the mean gain: the same draws, each mean measured in its own standard error.

    Args:
        values: (s,) gain of each seed on the full test set.
        drawn: (s, b) in each draw of so many images.

    [B. Efron, R. Tibshirani, An Introduction to the Bootstrap, 1993, section 12.5]
    """
    seeds, draws = drawn.shape
    image = spread(drawn, images).common
    chosen = drawn[rng.integers(seeds, size=(draws, seeds)), np.arange(draws)[:, None]]  # (b, s)
    drawn_again = chosen.var(axis=1, ddof=1) / seeds if seeds > 1 else 0.0
    own = np.var(values, ddof=1) / seeds if seeds > 1 else 0.0
    error, errors = np.sqrt(own + image), np.sqrt(drawn_again + image)
    shift = chosen.mean(axis=1) - np.mean(values)
    t = np.divide(shift, errors, out=np.zeros(draws), where=errors > 0)
    low, high = np.quantile(t, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    over = SEEDS_AND_IMAGES if seeds > 1 else IMAGES
    return Interval(float(np.mean(values) - high * error), float(np.mean(values) - low * error), over)
