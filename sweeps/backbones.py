"""Does the gain of CRM hold from Swin-T to Swin-B?

Hypothesis: it does, and it grows with capacity, since the same branches have to serve with and without masks.

Feeds the backbone table, gains within each backbone. Cost: 6 rows of 3 seeds, 18 runs; Swin-S and Swin-B cost about 1.5
and 2.2 times as much per step as Swin-T. Each starts from its own ImageNet file, brought by `crm weights import`.
"""

from crm.sweep import Sweep
from experiments import SWIN
from experiments.mf_swin_t import config
from sweeps import PLAIN

# stated in full, so that they are the same on any base
SWINS = {
    f"Swin-{size.upper()}": {
        "model.init": model.init,
        "model.embed": model.embed,
        "model.depths": model.depths,
        "model.heads": model.heads,
    }
    for size, model in SWIN.items()
}
TINY_SWINS = {
    "Swin-T": {},
    "Swin-S": {"model.depths": (1, 1, 2, 1)},
    "Swin-B": {"model.depths": (1, 1, 2, 1), "model.embed": 16},
}


def rows(swins: dict[str, dict]) -> dict[str, dict]:
    """Max fusion and CRM with each of them."""
    methods = {"max fusion": PLAIN, "CRM": {}}
    return {f"{swin}, {name}": {**size, **how} for swin, size in swins.items() for name, how in methods.items()}


sweep = Sweep(
    title="Does the gain of CRM hold from Swin-T to Swin-B?",
    base=config,
    variants=rows(SWINS),
    seeds=(0, 1, 2),
    groups={swin: [f"{swin}, max fusion", f"{swin}, CRM"] for swin in SWINS},
    tiny=rows(TINY_SWINS),
)
