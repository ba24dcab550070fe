"""Does better fusion make masks superfluous?

Hypothesis: no. Fusion that attends to both modalities gains with both at hand and loses more than max when one is
missing; with CRM's masks the fusions come closer to each other. `gated` and `token_exchange` log how much they take
from each modality.

Every fusion alone and with CRM, and as controls the single modalities, one network on four channels, and the mean of
two networks. Four channels can be masked too, by the mean in place of a mask token, and taught to agree with themselves
(SDC); they have no single-modality features for the rest of CRM. Gains are within "alone", against max, and within
"CRM", against max with CRM.

Feeds the fusion table. Cost: 19 rows of 3 seeds, 57 runs, and 6 more for every fusion that is added to its family;
frm_ffm is the heaviest, with about twice the parameters of max.
"""

from crm.config import alternatives
from crm.sweep import Sweep, Variants
from experiments.mf_swin_t import config
from sweeps import PLAIN

LISTED = ("max", "add", "average", "concat", "gated", "frm_ffm", "token_exchange")
NEW = tuple(name for name in alternatives("model.fusion") if name not in LISTED)
FUSIONS = (*LISTED, *NEW)
LATE = {**PLAIN, "model.inputs": "late", "loss.fused": 0.0, "loss.rgb": 1.0, "loss.thermal": 1.0}

ALONE = {f"{name} alone": {**PLAIN, "model.fusion": name} for name in FUSIONS}
CONTROLS = {
    "RGB only": {**PLAIN, "model.inputs": "rgb", "model.fusion": "max"},
    "thermal only": {**PLAIN, "model.inputs": "thermal", "model.fusion": "max"},
    "early, four channels": {**PLAIN, "model.inputs": "early", "model.fusion": "max"},
    "late, mean of two": {**LATE, "model.fusion": "max"},
}
EARLY_CRM = {
    "model.inputs": "early",
    "model.fusion": "max",
    "masking.fill": "mean",
    "loss.rgb": 0.0,
    "loss.thermal": 0.0,
    "loss.non_local": 0.0,
}
WITH_CRM: Variants = {
    **{f"{name}, CRM": {"model.fusion": name} for name in FUSIONS},
    "early, masks and SDC": EARLY_CRM,
}
ADDED = [row for name in NEW for row in (f"{name} alone", f"{name}, CRM")]

sweep = Sweep(
    title="Does better fusion make masks superfluous?",
    base=config,
    variants={**ALONE, **CONTROLS, **WITH_CRM},
    seeds=(0, 1, 2),
    groups={"alone": [*ALONE, *CONTROLS], "CRM": list(WITH_CRM)},
)
