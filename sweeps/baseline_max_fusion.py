"""What does CRM add to the network that it is built on, max fusion of two branches with a Mask2Former head?

Hypothesis: a little with both modalities at hand, much when one is missing [CRM, abstract].

Feeds the first line of every table, and the claim that the harness reproduces what was published: compare with `crm
show EXPERIMENT`, recipe by recipe. Cost: 2 rows of 3 seeds, 6 runs; a step of CRM takes 3 to 4 times as long as one of
max fusion.
"""

from crm.sweep import Sweep
from experiments.mf_swin_t import config
from sweeps import PLAIN

sweep = Sweep(
    title="What does CRM add to max fusion?",
    base=config,
    variants={"max fusion": PLAIN, "CRM": {}},
    seeds=(0, 1, 2),
)
