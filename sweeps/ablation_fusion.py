"""Does better fusion make masks superfluous?

Hypothesis: no. Fusion that attends to both modalities gains with both at hand and loses more than max when one is
missing; with CRM's masks the fusions come closer to each other. `gated` and `token_exchange` log how much they take
from each modality.

Every fusion alone and with CRM, and as controls the single modalities, one network on four channels, and the mean of
two networks. Gains are within "alone", against max, and within "CRM", against max with CRM.

Feeds the fusion table. Cost: 18 rows of 3 seeds, 54 runs; frm_ffm is the heaviest, with about twice the parameters of
max.
"""

from crm.sweep import Sweep
from experiments.mf_swin_t import config
from sweeps import PLAIN

FUSIONS = ("max", "add", "average", "concat", "gated", "frm_ffm", "token_exchange")
LATE = {**PLAIN, "model.inputs": "late", "loss.fused": 0.0, "loss.rgb": 1.0, "loss.thermal": 1.0}

ALONE = {f"{name} alone": {**PLAIN, "model.fusion": name} for name in FUSIONS}
CONTROLS = {
    "RGB only": {**PLAIN, "model.inputs": "rgb", "model.fusion": "max"},
    "thermal only": {**PLAIN, "model.inputs": "thermal", "model.fusion": "max"},
    "early, four channels": {**PLAIN, "model.inputs": "early", "model.fusion": "max"},
    "late, mean of two": {**LATE, "model.fusion": "max"},
}
WITH_CRM = {f"{name}, CRM": {"model.fusion": name} for name in FUSIONS}

sweep = Sweep(
    title="Does better fusion make masks superfluous?",
    base=config,
    variants={**ALONE, **CONTROLS, **WITH_CRM},
    seeds=(0, 1, 2),
    groups={"alone": [*ALONE, *CONTROLS], "CRM": list(WITH_CRM)},
)
