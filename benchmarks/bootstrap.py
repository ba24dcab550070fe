"""How long a hierarchical paired bootstrap takes: two rows, 5 seeds, 393 images, 9 classes, 10,000 draws.

python -m benchmarks.bootstrap [--draws 10000] [--seeds 5] [--images 393] [--classes 9] [--json [FILE]]
"""

import time

import numpy as np

from analysis.stats import bootstrap_mious, hierarchical_percentile, image_draws, over_seeds_and_images, spread
from benchmarks.report import machine, machine_words, parser, show


def main() -> None:
    options = parser("bootstrap", __doc__)
    for name, default in (("draws", 10_000), ("seeds", 5), ("images", 393), ("classes", 9)):
        options.add_argument(f"--{name}", type=int, default=default)
    given = options.parse_args()
    rng = np.random.default_rng(0)
    shape = (2 * given.seeds, given.images, given.classes, given.classes)
    matrices = rng.integers(0, 40_000, shape, dtype=np.int32)
    start = time.perf_counter()
    counts = image_draws(given.images, given.draws, rng)
    drawn = bootstrap_mious(matrices, counts)
    gains = drawn[: given.seeds] - drawn[given.seeds :]
    hierarchical_percentile(gains, rng)
    over_seeds_and_images(gains.mean(axis=1), spread(gains, given.images)).interval()
    seconds, about = time.perf_counter() - start, machine()
    sizes = {name: getattr(given, name) for name in ("draws", "seeds", "images", "classes")}
    text = f"{seconds:.2f} s for {given.draws} draws on {machine_words(about)}"
    show(given, {**about, **sizes, "seconds": round(seconds, 3)}, text)


if __name__ == "__main__":
    main()
