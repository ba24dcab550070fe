"""Which way of fusing and masking keeps working when a sensor degrades, drifts or fails?

Hypothesis: masks that hide each place from one modality at most buy robustness to all kinds of loss, not only to the
one that is trained; fusion that attends to both modalities gains least from it and needs it most. Modality dropout
helps where a whole modality is gone and not where a part is.

Fusion x masking x objective: max, concat and FRM+FFM of CMX; no masks, modality dropout, individual, complementary and
random complementary masks; and beside max fusion the controls that train on other damage (a box cut out of RGB, CutMix,
corrupted pictures, pixels dropped as RMM drops them), on as many forward passes, or on one modality alone, which every
curve is compared with. Every run is evaluated under the whole suite `paper`. All combinations of the minimum grid are
the rows of `baselines`: `crm evaluate baselines --suite paper` evaluates those alike.

Feeds the robustness tables and figures. Cost: 24 rows of 5 seeds, 120 runs. `--tiny` is six of the rows at the demo's
size, 12 runs: minutes on two cores.
"""

from crm.config import difference
from crm.sweep import Sweep, Variants
from experiments.mf_swin_t import config
from experiments.synthetic_small import config as small
from experiments.synthetic_tiny import config as smallest
from sweeps import COMPUTE_MATCHED, CUTMIX, M_CUTOUT, NO_DISTILLATION, NO_MASKS, PLAIN

MASKED = {**PLAIN, "loss.fused": 0.0, "loss.masked": 1.0}  # trains on the masked input alone, without other terms
DROPOUT = {**MASKED, "masking.kind": "modality_dropout"}
MASKS = ("individual", "complementary", "random_complementary")

FUSIONS: Variants = {
    f"{fusion}, {name}": {"model.fusion": fusion, **changes}
    for fusion in ("max", "concat", "frm_ffm")
    for name, changes in {"no masks": PLAIN, "modality dropout": DROPOUT, "MWS": NO_MASKS, "CRM": {}}.items()
}
MASKINGS: Variants = {
    **{f"max, {kind} masks": {**MASKED, "masking.kind": kind} for kind in MASKS},
    **{f"max, {kind} masks, all losses": {"masking.kind": kind} for kind in MASKS[:2]},
}
CONTROLS: Variants = {
    **{f"{name} only": {**PLAIN, "model.inputs": inputs} for name, inputs in (("RGB", "rgb"), ("thermal", "thermal"))},
    "M-CutOut": {**NO_DISTILLATION, **M_CUTOUT},
    "CutMix": CUTMIX,
    "trained on noise": {**NO_DISTILLATION, "masking.kind": "none", "masking.view": "corrupted"},
    "trained on dropped pixels": {**NO_DISTILLATION, "masking.kind": "none", "masking.view": "pixel_dropout"},
    "as many passes": COMPUTE_MATCHED,
}
VARIANTS = {**FUSIONS, **MASKINGS, **CONTROLS}

# the demo's size in the tiny form, whose own networks learn too little to tell anything apart
DEMO = {path: value for path, value in difference(small, smallest).items() if path != "seed"}
SHOWN = (
    "max, no masks", "max, modality dropout", "max, CRM", "concat, no masks", "concat, CRM", "trained on noise",
)  # fmt: skip

sweep = Sweep(
    title="Which fusion and masking keep working when a sensor degrades or fails?",
    base=config,
    variants=VARIANTS,
    seeds=(0, 1, 2, 3, 4),
    suite="paper",
    baseline="max, no masks",
    method="max, CRM",
    tiny={
        label: {**changes, **DEMO} if label in SHOWN else "the tiny form has six rows, at the demo's size"
        for label, changes in VARIANTS.items()
    },
)
