"""What is the cheaper objective worth?

The single-modality head passes of one modality per step, drawn by a fair coin and counted twice, in place of both: four
head passes for six, three matchings for four, the same expected gradient. What a step saves is measured by
`python -m benchmarks.passes`. Hypothesis: the noise that the coin adds costs less than a seed does. It is in doubt: of
runs cut short (`--set steps=150 --set val_every=75`, suite clean) all three seeds lost by it, at equal steps.

Feeds the passes table, on `synthetic`; seconds per step stand beside the scores (`--workers 1`: runs that share a
machine slow each other down). `--base` puts it on a real data set. Cost: 2 rows of 3 seeds, 6 runs.
"""

from crm.sweep import Sweep
from experiments.synthetic_small import config

sweep = Sweep(
    title="What is the cheaper objective worth?",
    base=config,
    variants={"all passes": {}, "one single modality": {"loss.passes": "one_single_modality"}},
    seeds=(0, 1, 2),
    method="all passes",
    suite="robustness",
    measured=True,
)
