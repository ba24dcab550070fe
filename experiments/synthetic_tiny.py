"""The smallest network on a few synthetic scenes, for some steps: the base of every sweep's tiny form (`--tiny`).

    crm train synthetic_tiny

Seconds on one thread. It learns next to nothing: what it shows is that every part works together.
"""

from crm.config import override
from experiments.synthetic_small import config as small

config = override(
    small,
    {
        "data.train_images": 16,
        "data.val_images": 4,
        "data.test_images": 8,
        "model.embed": 8,
        "model.decoder_layers": 1,
        "loss.points": 64,
        "optim.warmup": 5,
        "batch": 4,
        "steps": 20,
        "val_every": 10,
    },
)
