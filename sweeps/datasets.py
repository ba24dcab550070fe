"""Does the gain of CRM hold on all three data sets?

Hypothesis: yes, and most where one modality is often useless: MF and KP at night, PST900 in the dark of its tunnels.

Feeds the data set table, gains within each data set; scores of different data sets are not compared. Each has its own
crop, batch and validation interval, as published. Cost: 6 rows of 3 seeds, 18 runs. --data names a folder that holds
mfnet/, pst900/ and kp/. The tiny form has synthetic frames of three shapes in their place.
"""

from crm.sweep import Sweep
from experiments import BATCH, DATA, VAL_EVERY
from experiments.mf_swin_t import config
from sweeps import PLAIN

TITLES = {"mf": "MF", "pst900": "PST900", "kp": "KP"}
SETS = {
    title: {
        "data.dataset": name,
        "data.size": DATA[name].size,
        "data.crop": DATA[name].crop,
        "batch": BATCH[name],
        "val_every": VAL_EVERY[name],
    }
    for name, title in TITLES.items()
}
TINY_SETS = {
    "MF": {},
    "PST900": {"data.size": (48, 96), "data.crop": (48, 96)},
    "KP": {"data.size": (64, 80), "data.crop": (64, 80)},
}


def rows(sets: dict[str, dict]) -> dict[str, dict]:
    """Max fusion and CRM on each of them."""
    methods = {"max fusion": PLAIN, "CRM": {}}
    return {f"{title}, {name}": {**data, **how} for title, data in sets.items() for name, how in methods.items()}


sweep = Sweep(
    title="Does the gain of CRM hold on all three data sets?",
    base=config,
    variants=rows(SETS),
    seeds=(0, 1, 2),
    groups={title: [f"{title}, max fusion", f"{title}, CRM"] for title in SETS},
    tiny=rows(TINY_SETS),
)
