"""How many more seeds would decide."""

import math
from dataclasses import dataclass

from scipy import special

from analysis.stats.seeds import LEVEL, Estimate

POWER = 0.8  # probability with which a true effect of that size is found
MOST = 200  # seeds that anybody would train
LEAST = 3  # seeds without which no spread is known


def power(effect: float, sd: float, seeds: int, image: float = 0.0, level: float = LEVEL) -> float:
    """Probability that the test of a mean gain of `effect` points finds it with so many paired seeds.

    Two-sided, by the noncentral t distribution with seeds - 1 degrees of freedom [J. Cohen, Statistical Power Analysis,
    1988, section 2.3]; the images' variance is taken as known.

    Args:
        sd: of the gain over seeds, points.
        image: variance of the gain by test images, which more seeds do not lower.
    """
    if seeds < 2:
        return 0.0
    seed = sd**2 / seeds
    error = math.sqrt(seed + image)
    if error == 0:
        return float(effect != 0)
    known, tail = float(special.ndtri((1 + level) / 2)), float(special.stdtrit(seeds - 1, (1 + level) / 2))
    critical = (seed * tail + image * known) / (seed + image)
    freedom = (seeds - 1) * ((seed + image) / seed) ** 2 if seed else math.inf
    shift = abs(effect) / error
    if freedom > 1e5:
        return float(special.ndtr(shift - critical) + special.ndtr(-shift - critical))
    return float(1 - special.nctdtr(freedom, shift, critical) + special.nctdtr(freedom, shift, -critical))


def seeds_needed(
    effect: float, sd: float, image: float = 0.0, wanted: float = POWER, level: float = LEVEL
) -> int | None:
    """The fewest paired seeds with that power; None where MOST do not suffice.

    As in "with an sd of 0.41, 8 paired seeds find a gain of 0.5 points in 80 % of cases".
    """
    if effect == 0 or power(effect, sd, MOST, image, level) < wanted:
        return None
    return next(seeds for seeds in range(2, MOST + 1) if power(effect, sd, seeds, image, level) >= wanted)


@dataclass(frozen=True)
class More:
    """What would decide whether a gain is more or less than a threshold."""

    seeds: int | None  # more, paired; None where no number of them does
    why: str  # in words


def more_seeds(found: Estimate, against: float = 0.0, level: float = LEVEL) -> More:
    """How many more paired seeds would tell the gain from `against`, if it is in truth what it is so far."""
    if found.n < LEAST:
        return More(LEAST - found.n, f"{LEAST} seeds at least are needed for a spread; then this says how many more")
    image = 0.0 if math.isnan(found.image) else found.image
    effect = found.mean - against
    needed = seeds_needed(effect, found.sd, image, level=level)
    apart = f"{abs(effect):.2g} points from {against:g} with an sd of {found.sd:.2g}"
    if needed is None and image and power(effect, 0.0, MOST, image, level) < POWER:
        return More(None, f"{apart}: the test images are too few to tell, whatever the number of seeds")
    if needed is None:
        return More(None, f"{apart}: more than {MOST} seeds")
    more = max(1, needed - found.n)
    return More(more, f"{apart}: {found.n + more} paired seeds tell it in {100 * POWER:.0f} % of cases")
