"""The demo's question on real frames of the MF data set: what is left when a modality is taken away?

The same three variants as in `demo`, shortened, on frames resized to 120x160. Give the data set's folder with --data.
"""

from crm.sweep import Sweep
from experiments.mf_small import config
from sweeps.demo import VARIANTS

sweep = Sweep(
    title="What is left when a modality is taken away, on real frames?",
    base=config,
    variants=VARIANTS,
    seeds=(0, 1, 2),
    suite="robustness",
)
