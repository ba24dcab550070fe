"""Where does self-distillation begin to erase what is specific to a modality?

Both terms together, from off to thirty times the published weight. Hypothesis: the fused score gains up to some weight;
beyond it the heads on RGB alone and thermal alone, which are pulled towards one answer, lose what only they could see,
and then everything goes.

Feeds the weight table and its curve, with the heads on one modality's features beside the fused score. `crm diagnose
ablation_distillation_weight` shows the share of the gradient that distillation takes. Cost: 7 rows of 3 seeds, 21 runs.
"""

from crm.sweep import Sweep
from experiments.mf_swin_t import config

sweep = Sweep(
    title="Where does distillation begin to erase what is specific to a modality?",
    base=config,
    variants={
        f"weight {weight:g}": {"loss.complementary": weight, "loss.non_local": weight}
        for weight in (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    },
    seeds=(0, 1, 2),
    method="weight 1",
    dose="loss.complementary",
)
