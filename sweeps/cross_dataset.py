"""Does what CRM gains survive on a data set that it was not trained on?

Hypothesis: yes. A network that leans on one modality leans on that sensor, and another camera breaks it.

Feeds the train x test matrix of MF and KP on the classes that both have (car, person, bike; crm/data/mapping.py), every
network scored on the same ones, also at home. PST900 shares no class with them and is left out. Cost: 4 rows of 3
seeds, 12 runs, which `datasets` has too and which are trained once for both, and the evaluation of each on the other
data set. --data names a folder that holds mfnet/ and kp/. The tiny form has one synthetic data set, so its matrix has
one column.
"""

from crm.data.mapping import mapping
from crm.data.specs import DATASETS
from crm.sweep import Sweep
from experiments.mf_swin_t import config
from sweeps import datasets

NAMES = {"MF": "mf", "KP": "kp"}


def refusal(trained: str, target: str) -> str:
    """Why a network trained on one data set cannot be scored on the other; "" if it can."""
    try:
        mapping(DATASETS[trained], DATASETS[target])
    except ValueError as error:
        return str(error)
    return ""


ROWS = datasets.rows({title: datasets.SETS[title] for title in NAMES})
TINY = datasets.rows({"MF": datasets.TINY_SETS["MF"], "KP": datasets.TINY_SETS["KP"]})

sweep = Sweep(
    title="Does what CRM gains survive on another data set?",
    base=config,
    variants=ROWS,
    seeds=(0, 1, 2),
    groups={title: [f"{title}, max fusion", f"{title}, CRM"] for title in NAMES},
    also_on=tuple(NAMES.values()),
    tiny=TINY,
    left_out={"PST900": refusal("pst900", "mf")},
)
