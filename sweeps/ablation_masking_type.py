"""Which masks: random complementary ones, or what else hides parts of the input?

Hypothesis: the order is none < cutout < individual < complementary where a modality is missing, and random
complementary, which leaves one modality whole in two thirds of the images, costs least when nothing is missing.

Everything else is CRM's objective. Three rows have to differ in it: without masks there is no masked input to
supervise or to distil into, CutMix shows another scene than the teacher sees, so it is supervised and not distilled,
and cross-modal CutMix is without L_SDN, which would teach a modality to name what it does not show. The Gaussian mask
is our reading of SpatialSeg's name and abstract.

Feeds the masking table. Cost: 14 rows of 3 seeds, 42 runs, and 3 more for every masking type, shape or view that is
added to its family. The released recipe knows masks of patches alone: the rows of other shapes are left out there.
"""

from crm.sweep import Sweep, Variants
from experiments.mf_swin_t import config
from sweeps import CROSS_CUTMIX, CUTMIX, M_CUTOUT, NO_MASKS, added

BOX = {"masking.shape": "square", "masking.fill": "mean", "masking.ratio": 0.25}

ROWS: Variants = {
    "no masks": NO_MASKS,
    "modality dropout": {"masking.kind": "modality_dropout"},
    "pixel dropout": {"masking.kind": "none", "masking.view": "pixel_dropout"},
    "cutout, same box": {**BOX, "masking.kind": "identical"},
    "cutout, two boxes": {**BOX, "masking.kind": "individual"},
    "M-CutOut": M_CUTOUT,
    "CutMix": CUTMIX,
    "cross-modal CutMix": CROSS_CUTMIX,
    "identical": {"masking.kind": "identical"},
    "individual": {"masking.kind": "individual"},
    "complementary": {"masking.kind": "complementary"},
    "complementary, square": {"masking.kind": "complementary", "masking.shape": "square"},
    "complementary, Gaussian": {"masking.kind": "complementary", "masking.shape": "gaussian"},
    "random complementary": {"masking.kind": "random_complementary", "masking.shape": "patch"},
}
ADDED: Variants = {
    **added("masking.kind", ROWS),
    **added("masking.shape", ROWS, {"masking.kind": "complementary"}),
    # the others are controls of `baselines`
    **added("masking.view", ROWS, {"masking.kind": "none"}, elsewhere=("clean", "second", "corrupted")),
}

sweep = Sweep(
    title="Which masks?",
    base=config,
    variants={**ROWS, **ADDED},
    seeds=(0, 1, 2),
    method="random complementary",
)
