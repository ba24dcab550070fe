"""Does a larger backbone stand more masking?

Hypothesis: yes. If the score breaks at a high ratio because the network is too small to learn from what is left, the
breaking point moves to the right from Swin-T to Swin-B; if it breaks because the frames hold no more than that, it
stays.

Feeds the ratio x backbone table, one curve and one breaking point per backbone. Cost: 15 rows of 3 seeds, 45 runs, a
third of them with Swin-B, which costs about twice as much per step as Swin-T.
"""

from crm.sweep import Sweep
from experiments.mf_swin_t import config
from sweeps.backbones import SWINS, TINY_SWINS

RATIOS = (0.5, 0.1, 0.3, 0.7, 0.9)


def row(swin: str, ratio: float) -> str:
    return f"{swin}, {ratio:g}"


sweep = Sweep(
    title="Does a larger backbone stand more masking?",
    base=config,
    variants={row(swin, r): {**size, "masking.ratio": r} for swin, size in SWINS.items() for r in RATIOS},
    seeds=(0, 1, 2),
    groups={swin: [row(swin, r) for r in RATIOS] for swin in SWINS},
    dose="masking.ratio",
    tiny={row(swin, r): {**size, "masking.ratio": r} for swin, size in TINY_SWINS.items() for r in RATIOS},
)
