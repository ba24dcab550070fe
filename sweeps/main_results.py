"""Does CRM gain on every data set, with every backbone?

Hypothesis: it does, on MF, PST900 and KP and from Swin-T to Swin-B. `datasets` and `backbones` ask for one line of this
each; their runs are among these and are trained once.

Feeds the main table, the per-class table and the one by day and night; gains within one data set and backbone. Cost: 18
rows of 3 seeds, 54 runs, a third of them with Swin-B. --data names a folder that holds mfnet/, pst900/ and kp/. The
tiny form has Swin-T on frames of three shapes, and the other two backbones on the first of them.
"""

from crm.sweep import Overrides, Sweep
from experiments.mf_swin_t import config
from sweeps import PLAIN
from sweeps.backbones import SWINS, TINY_SWINS
from sweeps.datasets import SETS, TINY_SETS

METHODS = {"max fusion": PLAIN, "CRM": {}}


def rows(sets: dict[str, dict], swins: dict[str, dict]) -> dict[str, Overrides]:
    return {
        f"{title}, {swin}, {name}": {**data, **size, **how}
        for title, data in sets.items()
        for swin, size in swins.items()
        for name, how in METHODS.items()
    }


def in_tiny_form(row: str) -> bool:
    """Whether another tiny sweep has it too, so that nothing is trained for this one alone."""
    return row.startswith("MF") or "Swin-T" in row


LEFT_OUT = "the tiny form has the larger backbones on the first shape alone"

sweep = Sweep(
    title="Does CRM gain on every data set, with every backbone?",
    base=config,
    variants=rows(SETS, SWINS),
    seeds=(0, 1, 2),
    groups={f"{title}, {swin}": [f"{title}, {swin}, {name}" for name in METHODS] for title in SETS for swin in SWINS},
    tiny={row: changes if in_tiny_form(row) else LEFT_OUT for row, changes in rows(TINY_SETS, TINY_SWINS).items()},
)
