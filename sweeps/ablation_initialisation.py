"""What must training start from?

Hypothesis: from ImageNet at least: scratch loses by far at this budget. A Mask2Former that has seen scenes gains a
little more. Whether the filters of the thermal stem are the mean of RGB's or their sum is a factor of three in its
first activations, which the norm behind it takes away.

Feeds the initialisation table. Cost: 4 rows of 3 seeds, 12 runs. The rows but "from scratch" refuse to start without
their weights. "Mask2Former" is whatever network of the base's size is imported under that name: `crm weights import
FOLDER --dataset mf --name mask2former`, FOLDER being one of Hugging Face with config.json and model.safetensors, as of
facebook/mask2former-swin-tiny-cityscapes-semantic for Swin-T; provenance tells which. The tiny form has no weights, so
only scratch is left of it.
"""

from crm.sweep import Sweep
from experiments.mf_swin_t import config

NO_WEIGHTS = "there are no weights of this size"

sweep = Sweep(
    title="What must training start from?",
    base=config,
    variants={
        "from scratch": {"model.init": "none"},
        "ImageNet": {},
        "ImageNet, thermal stem sum": {"model.thermal_stem": "sum"},
        "Mask2Former": {"model.init": "mask2former"},
    },
    seeds=(0, 1, 2),
    method="ImageNet",
    tiny={
        "ImageNet": NO_WEIGHTS,
        "ImageNet, thermal stem sum": NO_WEIGHTS,
        "Mask2Former": NO_WEIGHTS,
    },
)
