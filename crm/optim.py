"""The optimiser and its schedule.

Rules of the released code: everything below the backbone (Swins, mask tokens, fusion norms) has its own learning rate;
norms, position-bias tables and embeddings are not decayed, biases and mask tokens are. What a fusion learns beyond its
norms, which the released code has not, starts from nothing like the head and has the head's rate.
"""

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel

from crm.config import Optim
from crm.names import chosen

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)


def build_optimizer(model: nn.Module, optim: Optim, fused: bool = True) -> AdamW:
    """AdamW over four groups: backbone or head, decayed or not; a shared tensor counts once."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            plain = isinstance(module, (*_NORMS, nn.Embedding)) or "relative_position_bias_table" in name
            groups.setdefault((_in_backbone(path), plain), []).append(parameter)
    return AdamW(
        [
            {
                "params": parameters,
                "lr": optim.lr * (optim.backbone_factor if backbone else 1.0),
                "weight_decay": 0.0 if plain else optim.weight_decay,
            }
            for (backbone, plain), parameters in groups.items()
        ],
        fused=fused,
    )


@torch.no_grad()
def follow(average: AveragedModel, model: nn.Module, decay: float) -> None:
    """The exponential moving average of the weights after one more step; buffers are the model's.

    As `AveragedModel.update_parameters`, which on a GPU waits for the number of steps to arrive there, unused.
    """
    if average.n_averaged == 0:
        decay = 0.0
    torch._foreach_lerp_(list(average.module.parameters()), list(model.parameters()), 1 - decay)
    for own, theirs in zip(average.module.buffers(), model.buffers(), strict=True):
        own.copy_(theirs)
    average.n_averaged += 1


def _in_backbone(path: str) -> bool:
    """Whether a module belongs to the branches or the norms after fusion rather than to fusion or head."""
    return path.startswith(("rgb", "thermal", "fusion", "backbone")) and not path.startswith("backbone.fusion.")


def per_step(step: int, epoch_steps: int) -> int:
    """Every step counts, so that the decay ends at zero."""
    return step


def per_epoch(step: int, epoch_steps: int) -> int:
    """Only whole epochs count, one each, against a horizon in steps: nearly no decay at all (released code)."""
    return step // epoch_steps


SCHEDULES = {"step": per_step, "epoch": per_epoch}


def rate(step: int, steps: int, epoch_steps: int, optim: Optim) -> float:
    """The factor on every learning rate at `step` of `steps`: linear warm-up, then polynomial decay.

    Args:
        epoch_steps: steps of one pass over the training images.
    """
    rising = min(1.0, (step + 1) / optim.warmup) if optim.warmup else 1.0
    counted = chosen("schedule", optim.schedule, SCHEDULES)(step, epoch_steps)
    return rising * (1 - counted / steps) ** optim.power
