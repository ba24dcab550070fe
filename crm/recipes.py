"""The two recipes of a run: `clean`, what a careful engineer would do, and `released`, what the released code does.

Torch-free. Experiments are written in the clean recipe; `released` puts every quirk of the released code that changes a
result onto one. Numbers are those of the method notes. Quirks that both recipes keep, because their alternatives are
ablation axes, are not listed: distillation of raw logits with the teacher in training mode, BatchNorm on the fused path
alone, masks that are complementary in a third of the images, a clip of 0.01, the mean filter for thermal.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from crm.config import Config, override


@dataclass(frozen=True, kw_only=True)
class Quirk:
    released: str  # what the released code does
    clean: str  # what the clean recipe does
    settings: Mapping[str, Any]  # what makes a run do as the released code does


QUIRKS = {
    1: Quirk(
        released="trains on all of train, and chooses the checkpoint on the test split",
        clean="chooses it on val, which is held out of train where there is none",
        settings={"data.carve_val": False, "test_best": True},
    ),
    2: Quirk(
        released="that choice leaves out the last, incomplete batch of the test split",
        clean="every image counts in every score that is reported",
        settings={},
    ),
    3: Quirk(
        released="the learning rate decays per epoch against a horizon in steps, so hardly at all",
        clean="it decays per step, to zero",
        settings={"optim.schedule": "epoch"},
    ),
    4: Quirk(
        released="float32 (TF32 on the GPUs of its time), whatever its config says",
        clean="as the machine is told (--machine precision=...), and recorded with the run",
        settings={},
    ),
    5: Quirk(
        released="colours are jittered as floats: saturation and hue go wrong in 9 of 32 images",
        clean="colours are jittered as 8-bit values",
        settings={"data.float_jitter": True},
    ),
    6: Quirk(
        released="frames are resized as floats without antialias",
        clean="frames are resized as 8-bit values with antialias",
        settings={"data.float_resize": True},
    ),
    9: Quirk(
        released="the grid of patches covers padding and must divide the padded crop; a square mask cannot run (8)",
        clean="the grid covers the image alone and is cut at its edge; a square has the wanted area",
        settings={"masking.cover_padding": True},
    ),
    11: Quirk(
        released="the masked input is always supervised, with weight 1",
        clean="that supervision has a weight of its own",
        settings={"loss.masked": 1.0},
    ),
    14: Quirk(
        released="padded pixels are negatives of every mask",
        clean="padded pixels do not count",
        settings={"loss.count_padding": True},
    ),
    15: Quirk(
        released="ignored pixels are negatives of every mask",
        clean="ignored pixels do not count",
        settings={"loss.count_ignored": True},
    ),
    16: Quirk(
        released="a class that occurs nowhere counts 0 in the mean",
        clean="it is left out and named; both means are reported",
        settings={},
    ),
    17: Quirk(
        released="the mean is over all classes, the unlabelled one included",
        clean="so it is; the mean without class 0 is reported too",
        settings={},
    ),
    18: Quirk(
        released="KP with Swin-B starts from ImageNet-22k, everything else from ImageNet-1k",
        clean="everything starts from ImageNet-1k",
        settings={},
    ),
    20: Quirk(
        released="an epoch leaves out its last, incomplete batch; each process normalises by its own images",
        clean="every image is seen equally often; the fusion norms see the images of all processes",
        settings={"data.drop_last": True, "model.sync_norm": False},
    ),
    21: Quirk(
        released="one run, of seed 1024",
        clean="the seeds of the sweep, at least three",
        settings={"seed": 1024},
    ),
    24: Quirk(
        released="whatever the list of MF that was downloaded holds",
        clean="`crm data check` says which list it is: 784 names, 1568 with flips, or 1176 merged with val",
        settings={},
    ),
}

INIT_22K = {("kp", "swin_base_patch4_window7_224"): "swin_base_patch4_window7_224_22kto1k"}  # quirk 18


def clean(config: Config) -> Config:
    """As written."""
    return config


def released(config: Config) -> Config:
    """With every quirk of the released code."""
    settings = {path: value for quirk in QUIRKS.values() for path, value in quirk.settings.items()}
    if config.masking.kind == "none":  # the released code crashes without masks; ours trains without the masked terms
        del settings["loss.masked"]
    init = INIT_22K.get((config.data.dataset, config.model.init), config.model.init)
    return override(config, {**settings, "model.init": init})


RECIPES: dict[str, Callable[[Config], Config]] = {"clean": clean, "released": released}
