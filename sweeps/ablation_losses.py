"""Which part of CRM earns its place?

The parts one after another (max fusion, + masked supervision, + modality-wise supervision, + L_SDC, + L_SDN), then the
method without each of them; a row that both designs have is trained once. The rows "+ masks", "+ MWS", "w/o MWS" and
"CRM" are the 2x2 of distillation and modality-wise supervision. Hypothesis: masks and MWS carry the robustness,
distillation adds the agreement, and it needs MWS: without it the single-modality heads that L_SDN teaches are taught
by nothing else.

Feeds the component table and the interaction below it. Cost: 8 rows of 3 seeds, 24 runs, of which those without MWS
and distillation cost a third of the others.
"""

from crm.sweep import Sweep, cumulative
from experiments.mf_swin_t import config
from sweeps import NO_MASKS, PLAIN

STEPS = cumulative(
    {
        "max fusion": PLAIN,
        "+ masks": {"masking.kind": config.masking.kind, "loss.masked": 1.0},
        "+ MWS": {"loss.rgb": 1.0, "loss.thermal": 1.0},
        "+ SDC": {"loss.complementary": 1.0},
        "+ SDN = CRM": {"loss.non_local": 1.0},
    }
)
WITHOUT = {  # w/o SDN is "+ SDC", w/o distillation is "+ MWS"
    "w/o SDC": {"loss.complementary": 0.0},
    "w/o MWS": {"loss.rgb": 0.0, "loss.thermal": 0.0},
    "w/o masks": NO_MASKS,
}

sweep = Sweep(
    title="Which part of CRM earns its place?",
    base=config,
    variants={**STEPS, **WITHOUT},
    seeds=(0, 1, 2),
    method="+ SDN = CRM",
    interaction=("+ masks", "+ MWS", "w/o MWS", "+ SDN = CRM"),
)
