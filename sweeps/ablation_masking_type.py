"""Which masks: random complementary ones, or what else hides parts of the input?

Hypothesis: the order is none < cutout < individual < complementary where a modality is missing, and random
complementary, which leaves one modality whole in two thirds of the images, costs least when nothing is missing.

Everything else is CRM's objective. Two rows have to differ in it: without masks there is no masked input to supervise
or to distil into, and CutMix shows another scene than the teacher sees, so it is supervised and not distilled. The
Gaussian mask is our reading of SpatialSeg's name and abstract.

Feeds the masking table. Cost: 13 rows of 3 seeds, 39 runs. The released recipe knows masks of patches alone: the rows
of other shapes are left out there.
"""

from crm.sweep import Sweep
from experiments.mf_swin_t import config
from sweeps import CUTMIX, M_CUTOUT, NO_MASKS

BOX = {"masking.shape": "square", "masking.fill": "mean", "masking.ratio": 0.25}

sweep = Sweep(
    title="Which masks?",
    base=config,
    variants={
        "no masks": NO_MASKS,
        "modality dropout": {"masking.kind": "modality_dropout"},
        "pixel dropout": {"masking.kind": "none", "masking.view": "pixel_dropout"},
        "cutout, same box": {**BOX, "masking.kind": "identical"},
        "cutout, two boxes": {**BOX, "masking.kind": "individual"},
        "M-CutOut": M_CUTOUT,
        "CutMix": CUTMIX,
        "identical": {"masking.kind": "identical"},
        "individual": {"masking.kind": "individual"},
        "complementary": {"masking.kind": "complementary"},
        "complementary, square": {"masking.kind": "complementary", "masking.shape": "square"},
        "complementary, Gaussian": {"masking.kind": "complementary", "masking.shape": "gaussian"},
        "random complementary": {},
    },
    seeds=(0, 1, 2),
)
