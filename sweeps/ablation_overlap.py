"""Must the masks be complementary, or only plenty?

From complementary (0: no place is hidden in both) to identical masks (1: the same places are hidden in both) at one
ratio. Hypothesis: the score falls with the overlap, since what is hidden in both can be learned from neither.

Feeds the overlap curve. Cost: 5 rows of 3 seeds, 15 runs. The share of tokens hidden in both is in every run's journal.
"""

from crm.sweep import Sweep
from experiments.mf_swin_t import config

sweep = Sweep(
    title="Must the masks be complementary, or only plenty?",
    base=config,
    variants={
        f"overlap {share:g}": {"masking.kind": "complementary", "masking.overlap": share}
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    },
    seeds=(0, 1, 2),
    dose="masking.overlap",
)
