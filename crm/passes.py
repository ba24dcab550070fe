"""Which head passes a step computes: all of them, or a sample whose weights keep the expected gradient."""

from crm.names import chosen
from crm.randomness import derive

PASSES = {
    "all": "every head pass that a term needs, in every step",
    "one_single_modality": "of the passes on RGB and on thermal features alone those of one, drawn per step, twice",
}


def drawn_passes(passes: str, seed: int, step: int) -> dict[str, float]:
    """The factor of every pass whose factor is not 1, in this step; a pass of factor 0 is not computed.

    A fair coin takes one modality, for supervision and for L_SDN alike. Twice its terms have the expected value of both
    modalities' terms, and so has their gradient; the coin adds the square of half the difference of what it chooses
    between to the variance.
    """
    chosen("passes", passes, PASSES)
    if passes == "all":
        return {}
    taken, left = ("rgb", "thermal") if derive(seed, step, "passes") % 2 else ("thermal", "rgb")
    return {taken: 2.0, f"{taken}_masked": 2.0, left: 0.0, f"{left}_masked": 0.0}
