"""Why complementary random masking? Take a modality away and see which network still works.

Three variants on the synthetic road scenes: plain max fusion, modality dropout, and complementary random masking with
the full objective (modality-wise supervision, masked supervision, both self-distillation terms). All three see the same
images and augmentations at equal seed and train for the same number of steps. Feeds the report of `make demo`.
"""

from crm.sweep import Sweep
from experiments.synthetic_small import config
from sweeps import PLAIN

MODALITY_DROPOUT = {**PLAIN, "masking.kind": "modality_dropout", "loss.fused": 0.0, "loss.masked": 1.0}

VARIANTS = {"plain fusion": PLAIN, "modality dropout": MODALITY_DROPOUT, "CRM": {}}

sweep = Sweep(
    title="What is left when a modality is taken away?",
    base=config,
    variants=VARIANTS,
    seeds=(0, 1, 2),
    suite="robustness",
)
