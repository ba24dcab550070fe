"""Which runs: a module per question, each with one value, `sweep`. Here stand the rows that several of them share."""

from crm.config import alternatives
from crm.sweep import Overrides, Variants

# max fusion alone: the fused features are supervised on the clean input, and nothing else is done
PLAIN = {
    "masking.kind": "none",
    "loss.rgb": 0.0,
    "loss.thermal": 0.0,
    "loss.masked": 0.0,
    "loss.complementary": 0.0,
    "loss.non_local": 0.0,
}
NO_DISTILLATION = {"loss.complementary": 0.0, "loss.non_local": 0.0}
# CRM's objective as far as it goes without a masked input
NO_MASKS = {**NO_DISTILLATION, "masking.kind": "none", "loss.masked": 0.0}
# Two plain views of each frame in place of clean and masked input: four passes through a branch and six through the
# head per step, as CRM has. CRM distils into two of the six, which here have nothing to learn from but labels: another
# crop is no teacher. So all six are supervised, with a matching each, where CRM supervises four. That makes a step of
# this control somewhat dearer than CRM's, never cheaper; `crm sweep overhead` measures both.
COMPUTE_MATCHED = {
    **NO_DISTILLATION,
    "masking.kind": "none",
    "masking.view": "second",
    "loss.rgb_masked": 1.0,
    "loss.thermal_masked": 1.0,
}
CUTMIX = {**NO_DISTILLATION, "masking.kind": "none", "masking.view": "cutmix"}
# without L_SDN, which would teach a modality to name what it does not show
CROSS_CUTMIX = {"masking.kind": "none", "masking.view": "cross_cutmix", "loss.non_local": 0.0}
# one box of 0.3 of each side, in half of the images, in RGB alone [SpiderMesh]
M_CUTOUT = {
    "masking.kind": "rgb_only",
    "masking.shape": "square",
    "masking.ratio": 0.09,
    "masking.probability": 0.5,
    "masking.fill": "mean",
}


def added(path: str, rows: Variants, besides: Overrides | None = None, elsewhere: tuple[str, ...] = ()) -> Variants:
    """A row for each alternative of a setting that no row has: what its family has gained since the rows were written.

    Args:
        besides: what such a row sets too.
        elsewhere: alternatives that another sweep asks about.
    """
    there = {changes.get(path) for changes in rows.values()} | {*elsewhere}
    new = [name for name in alternatives(path) if name not in there]
    return {name.replace("_", " "): {path: name, **(besides or {})} for name in new}
