"""Which runs: a module per question, each with one value, `sweep`. Here stand the rows that several of them share."""

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
# two plain views of each frame in place of clean and masked: six head passes, as CRM has
COMPUTE_MATCHED = {
    **NO_DISTILLATION,
    "masking.kind": "none",
    "masking.view": "second",
    "loss.rgb_masked": 1.0,
    "loss.thermal_masked": 1.0,
}
CUTMIX = {**NO_DISTILLATION, "masking.kind": "none", "masking.view": "cutmix"}
# one box of 0.3 of each side, in half of the images, in RGB alone [SpiderMesh]
M_CUTOUT = {
    "masking.kind": "rgb_only",
    "masking.shape": "square",
    "masking.ratio": 0.09,
    "masking.probability": 0.5,
    "masking.fill": "mean",
}
