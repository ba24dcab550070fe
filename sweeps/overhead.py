"""What does CRM cost in training, and does it cost anything afterwards?

Hypothesis: a training step costs 3 to 4 times as much as one of max fusion with Swin-T, nearly all of it for the head,
which runs six times in place of once. The network that is left is the same, so its parameters, operations, latency and
memory are those of max fusion.

Each term is switched on after the other, as in `ablation_losses`; the last row is the control that spends as many
passes on two plain views. Runs of 60 steps, since a step costs the same at any time; what they score means nothing.
Feeds the cost table: parameters, multiply-adds, operations of a training step, its time, latency and memory of
inference. Cost: 6 rows of 1 seed, 6 runs, minutes on a GPU. Run it with `--workers 1`: runs that share a machine slow
each other down, and what is measured is time.
"""

from crm.sweep import Sweep
from experiments.mf_swin_t import config
from sweeps import COMPUTE_MATCHED
from sweeps.ablation_losses import STEPS

ROWS = {**STEPS, "two views, as many passes": COMPUTE_MATCHED}

sweep = Sweep(
    title="What does CRM cost?",
    base=config,
    variants={row: {**changes, "steps": 60, "val_every": 0} for row, changes in ROWS.items()},
    seeds=(0,),
    method="+ SDN = CRM",
    suite="clean",
    measured=True,
)
