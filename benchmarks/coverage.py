"""How often the intervals of a gain hold what they say: simulated studies with a known true gain.

    python -m benchmarks.coverage [--studies 5000] [--seeds 2,3,5,10] [--json [FILE]]

A study is two rows at s paired seeds on one test set of MF's size. The gain of a seed on an image is the true gain,
what the seed adds (both networks vary over seeds, so the gain's deviation is sqrt(2) times that of one), what the image
adds for all seeds alike, and what is left of image and seed together. Images of a recording of 20 frames are alike to
some degree. mIoU is taken as linear in the images, which for hundreds of them it nearly is. What each interval is
asked for:

    this test set   t over the paired gains: other seeds, these images (the target moves with the images)
    welch           t over seeds and images with Satterthwaite's degrees of freedom: other seeds, other images
    by image        the quantile of Cochran and Cox instead, images taken as independent: the same target
    offered         that, and recordings where they have more spread: the same target; what the tables show
    percentile      hierarchical bootstrap, seeds outside, images inside, percentiles: the same target
    studentised     the same draws, each measured in its own standard error: the same target
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt

import numpy as np
from scipy import special

from analysis.stats import (
    LEVEL,
    Interval,
    hierarchical_percentile,
    hierarchical_studentised,
    image_draws,
    over_seeds,
    over_seeds_and_images,
    recording_draws,
    spread,
)
from benchmarks.report import machine, machine_words, parser, say, show

IMAGES, RECORDING = 393, 20  # MF's test split, frames of one recording
DRAWS = 200
METHODS = ("this test set", "welch", "by image", "offered", "percentile", "studentised")


@dataclass(frozen=True)
class Planted:
    """Where the gains of a study vary from, in points of mIoU."""

    seed: float  # sd of one network over seeds; repeated runs on MF were reported with 0.3 to 0.8
    image: float  # sd of the gain over test sets of independent images, for all seeds alike
    own: float = 0.2  # sd of the gain over test sets that each seed has for itself
    alike: float = 0.0  # share of the images' variance that a recording has in common


PLANTED = [
    Planted(seed, image, alike=alike) for seed in (0.3, 0.8) for image in (0.2, 0.5) for alike in (0.0, 0.1)
]  # fmt: skip


def study(planted: Planted, seeds: int, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Each seed's gain on each image (s, n) around a true gain of 0, and the true gain on these images."""
    scale, groups = sqrt(IMAGES), -(-IMAGES // RECORDING)
    together = np.repeat(rng.standard_normal(groups), RECORDING)[:IMAGES]
    common = sqrt(1 - planted.alike) * rng.standard_normal(IMAGES) + sqrt(planted.alike) * together
    common *= planted.image * scale
    shifts = rng.standard_normal((seeds, 1)) * planted.seed * sqrt(2)
    return shifts + common + rng.standard_normal((seeds, IMAGES)) * planted.own * scale, float(common.mean())


def covered(
    planted: Planted, seeds: int, studies: int, rng: np.random.Generator, methods: Sequence[str] = METHODS
) -> dict[str, float]:
    """The share of studies whose 95 % interval holds the true gain, by method."""
    names = [str(i // RECORDING) for i in range(IMAGES)]
    by_image, by_recording = image_draws(IMAGES, DRAWS, rng), recording_draws(names, DRAWS, rng)
    weights = np.concatenate([by_image, by_recording]).astype(float)
    weights /= weights.sum(axis=1, keepdims=True)
    held = dict.fromkeys(methods, 0)
    for _ in range(studies):
        gains, here = study(planted, seeds, rng)
        values, drawn = gains.mean(axis=1), gains @ weights.T
        images, whole = spread(drawn[:, :DRAWS], IMAGES), spread(drawn[:, DRAWS:], len(set(names)))
        for method in methods:
            target = here if method == "this test set" else 0.0
            if method == "this test set":
                interval = over_seeds(values).interval()
            elif method == "welch":
                interval = _welch(values, images.common)
            elif method == "by image":
                interval = over_seeds_and_images(values, images).interval()
            elif method == "offered":
                interval = over_seeds_and_images(values, images, whole).interval()
            elif method == "percentile":
                interval = hierarchical_percentile(drawn[:, :DRAWS], rng)
            else:
                interval = hierarchical_studentised(values, drawn[:, :DRAWS], IMAGES, rng)
            assert interval is not None  # of two seeds or more
            held[method] += interval.low <= target <= interval.high
    return {method: count / studies for method, count in held.items()}


def _welch(values: np.ndarray, image: float) -> Interval:
    seed, s = float(np.var(values, ddof=1)) / len(values), len(values)
    freedom = (seed + image) ** 2 / (seed**2 / (s - 1) + image**2 / (IMAGES - 1))
    half = float(special.stdtrit(freedom, (1 + LEVEL) / 2)) * sqrt(seed + image)
    return Interval(float(values.mean()) - half, float(values.mean()) + half, "")


def main() -> None:
    options = parser("coverage", __doc__)
    options.add_argument("--studies", type=int, default=5000)
    options.add_argument("--seeds", default="2,3,5,10", help="numbers of paired seeds")
    given = options.parse_args()
    counts, rows, about = [int(number) for number in given.seeds.split(",")], [], machine()
    lines = [
        f"share of {given.studies} studies whose 95 % interval holds the true gain; {machine_words(about)}",
        "seed sd  image sd  alike  seeds  " + "  ".join(f"{method:>13}" for method in METHODS),
    ]
    for planted in PLANTED:
        for seeds in counts:
            shares = covered(planted, seeds, given.studies, np.random.default_rng(seeds))
            rows.append({**asdict(planted), "seeds": seeds, "studies": given.studies, "covered": shares})
            numbers = "  ".join(f"{shares[method]:13.3f}" for method in METHODS)
            lines.append(f"{planted.seed:7}  {planted.image:8}  {planted.alike:5}  {seeds:5}  {numbers}")
            say(f"{len(rows)} of {len(PLANTED) * len(counts)}")
    offered = {seeds: [row["covered"]["offered"] for row in rows if row["seeds"] == seeds] for seeds in counts}
    lowest = {seeds: min(shares) for seeds, shares in offered.items()}
    show(given, {**about, "studies": given.studies, "lowest": lowest, "rows": rows}, "\n".join(lines))


if __name__ == "__main__":
    main()
