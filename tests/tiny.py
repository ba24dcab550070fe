"""The smallest run that still has every part: seconds on one thread."""

from pathlib import Path

from crm.config import Config, override
from crm.machine import Machine
from experiments.synthetic_small import config

TINY: Config = override(
    config,
    {
        "data.train_images": 8,
        "data.val_images": 3,
        "data.test_images": 3,
        "model.embed": 8,
        "model.depths": (1, 1, 1, 1),
        "model.decoder_layers": 1,
        "model.drop_path": 0.1,  # so that resuming must restore its randomness too
        "loss.points": 64,
        "batch": 2,
        "steps": 6,
        "val_every": 3,
    },
)

# the same as --set options of the command
TINY_SETS = [
    argument
    for path, value in {
        "data.train_images": 8, "data.val_images": 3, "data.test_images": 3, "model.embed": 8,
        "model.depths": (1, 1, 1, 1), "model.decoder_layers": 1, "loss.points": 64, "batch": 2, "steps": 6,
        "val_every": 3,
    }.items()
    for argument in ("--set", f"{path}={value}")
]  # fmt: skip


def machine(runs: Path, **changes) -> Machine:
    """A machine whose runs lie below a test's folder; a journal line per step."""
    return Machine(runs=runs, **{"log_every": 1, "checkpoint_every": 2, **changes})
