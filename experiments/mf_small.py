"""A small CRM network on MF frames at a quarter of their side, from scratch: does everything work on real input?

    crm train mf_small --data FOLDER

FOLDER holds the data set in its own format (images/, labels/, train.txt, val.txt, test.txt). The network sees frames at
120x160, and its predictions are counted at the labels' own size; the numbers are not comparable with published ones.
"""

from dataclasses import replace

from crm.config import Data
from experiments.synthetic_small import config as small

config = replace(
    small,
    data=Data(dataset="mf", size=(120, 160), crop=(96, 128), scale=(0.8, 1.4), jitter=1.0),
    steps=200,
    val_every=100,
)
