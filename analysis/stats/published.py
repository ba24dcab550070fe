"""Whether a published number was reached again."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from analysis.stats.seeds import LEVEL, over_seeds

REPRODUCED, WITHIN, MISSED = "reproduced", "within noise", "not reproduced"
OTHERWISE = "not comparable: protocol differs"
TOLERANCE = 0.5  # points of mIoU that two implementations may differ by and still be called the same
ASSUMED_SD = 0.8  # over seeds on MF, where one seed tells none: the larger end of what repeated runs reported show


@dataclass(frozen=True)
class Reproduction:
    verdict: str  # REPRODUCED, WITHIN, MISSED or OTHERWISE
    difference: float  # ours - theirs, points; NaN without a value of ours
    why: str  # in words


def against_published(
    ours: np.ndarray, theirs: float, differences: Sequence[str] = (), tolerance: float = TOLERANCE
) -> Reproduction | None:
    """The verdict on a published number, from our mIoU of each seed (s,) on the same test set; None without a seed.

    A published number is taken as one run. `not reproduced`: one more run of ours would not reach it, by the 95 %
    prediction interval, which is Student's t with the deviation times sqrt(1 + 1/s). `reproduced`: our mean is, by its
    95 % t interval, no more than the tolerance below it. `within noise`: neither, since the seeds are too few or too
    different. One seed has no deviation, so ASSUMED_SD stands for it, and it is never `reproduced`.

    Args:
        differences: how our protocol differs from the published one, in words; any makes it `not comparable`.
    """
    found = over_seeds(ours)
    if not found.n:
        return None
    difference = found.mean - theirs
    if differences:
        return Reproduction(OTHERWISE, difference, "; ".join(differences))
    interval = found.interval()
    if interval is None:
        reach = float(special.ndtri((1 + LEVEL) / 2)) * ASSUMED_SD * math.sqrt(2)
        verdict = MISSED if difference < -reach else WITHIN
        return Reproduction(verdict, difference, f"one seed; a deviation of {ASSUMED_SD} over seeds is assumed")
    reach = found.quantile() * found.sd * math.sqrt(1 + 1 / found.n)
    if difference < -max(reach, tolerance):
        return Reproduction(MISSED, difference, f"one more seed would reach {found.mean + reach:.1f} at most")
    if interval.low >= theirs - tolerance:
        return Reproduction(REPRODUCED, difference, f"the mean is {interval.low:.1f} or more, by its 95 % interval")
    return Reproduction(WITHIN, difference, f"{found.n} seeds leave the mean between {interval.low:.1f} and "
                        f"{interval.high:.1f}")  # fmt: skip
