"""Which outputs must be supervised?

Hypothesis: a head on each modality's features keeps both branches able to answer alone, and supervision of the masked
input does most of the rest; the norms after fusion, which see clean and masked features in turn, matter little.

Three factors around CRM, one at a time: the clean outputs that are supervised, the masked ones with their weight, and
what the masked pass does with the BatchNorm after fusion. The masked single-modality outputs are not supervised in the
released code. Feeds the supervision table. Cost: 10 rows of 3 seeds, 30 runs.
"""

from crm.sweep import Sweep
from experiments.mf_swin_t import config

sweep = Sweep(
    title="Which outputs must be supervised?",
    base=config,
    variants={
        "fused only": {"loss.rgb": 0.0, "loss.thermal": 0.0},
        "fused + RGB": {"loss.thermal": 0.0},
        "fused + thermal": {"loss.rgb": 0.0},
        "CRM: fused + both": {},
        "masked pair off": {"loss.masked": 0.0},
        "masked pair x 0.5": {"loss.masked": 0.5},
        "masked pair x 2": {"loss.masked": 2.0},
        "+ masked RGB and thermal": {"loss.rgb_masked": 1.0, "loss.thermal_masked": 1.0},
        "separate norm statistics": {"model.fusion_norm": "separate"},
        "frozen norm statistics": {"model.fusion_norm": "frozen"},
    },
    seeds=(0, 1, 2),
    baseline="CRM: fused + both",
    method="fused only",
)
