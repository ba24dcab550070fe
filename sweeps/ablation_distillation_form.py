"""What should clean and masked outputs be made to agree on?

Hypothesis: the L1 on raw class logits of index-aligned queries, as released, is not special. Agreement of the semantic
maps says more, since it also binds the masks, and a teacher without noise of its own is the better one.

All forms have weight 1, and their sizes differ: read a tie with `ablation_distillation_weight` in mind. The EMA teacher
is the average of the weights, and that average is also what is evaluated; "EMA weights" has the average without the
teacher, so that the two can be told apart. Feeds the form table. Cost: 12 rows of 3 seeds, 36 runs, and 3 more for
every form that is added to its family.
"""

from crm.sweep import Sweep, Variants
from experiments.mf_swin_t import config
from sweeps import NO_DISTILLATION, added

EMA = {"optim.ema": 0.999}

ROWS: Variants = {
    "off": NO_DISTILLATION,
    "L1 on class logits (CRM)": {"loss.distillation": "l1_logits"},
    "L1 without no-object": {"loss.distillation": "l1_classes"},
    "L1 on probabilities": {"loss.distillation": "l1_softmax"},
    "KL": {"loss.distillation": "kl"},
    "KL, temperature 4": {"loss.distillation": "kl", "loss.temperature": 4.0},
    "L1, aligned queries": {"loss.distillation": "l1_aligned"},
    "KL per pixel": {"loss.distillation": "pixel_kl"},
    "MSE of features": {"loss.distillation": "feature_mse"},
    "teacher in evaluation mode": {"loss.teacher": "eval"},
    "EMA weights": EMA,
    "EMA teacher": {**EMA, "loss.teacher": "ema"},
}
ADDED = added("loss.distillation", ROWS)

sweep = Sweep(
    title="What should clean and masked outputs agree on?",
    base=config,
    variants={**ROWS, **ADDED},
    seeds=(0, 1, 2),
    baseline="L1 on class logits (CRM)",
    method="KL per pixel",
)
