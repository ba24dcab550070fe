"""From which stage on can both branches share their blocks?

Hypothesis: late stages can, since what they hold is no longer of one sensor; early ones cannot. Sharing saves
parameters, not time.

Feeds the sharing table. Cost: 5 rows of 3 seeds, 15 runs. Norms and patch embeddings stay each branch's own.
"""

from crm.sweep import Sweep
from experiments.mf_swin_t import config

sweep = Sweep(
    title="From which stage on can both branches share their blocks?",
    base=config,
    variants={
        "no sharing": {"model.share_from": 4},
        "last stage": {"model.share_from": 3},
        "last two": {"model.share_from": 2},
        "last three": {"model.share_from": 1},
        "all stages": {"model.share_from": 0},
    },
    seeds=(0, 1, 2),
)
