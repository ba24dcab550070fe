"""A Swin classifier trained on ImageNet, as Microsoft or timm publish it, for both of our branches.

The thermal branch is a copy whose first filters are the mean over the three colour channels (method.md 1.4).
"""

import re
from collections.abc import Mapping

from torch import Tensor

FIRST = "patch_embed.proj.weight"
UNUSED = r"^head\.|^norm\.|\.attn_mask$|relative_position_index$"  # classifier, last norm, what a size implies


def convert(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of both branches under our names, and the names of what has no place."""
    swin = {name: tensor for name, tensor in tensors.items() if not re.search(UNUSED, name)}
    # timm counts the merging of tokens to the stage after it, Microsoft to the one before
    after = any(name.startswith("layers.3.downsample.") for name in swin)
    renamed = {_own_name(name, 1 if after else 0): tensor for name, tensor in swin.items()}
    return both_branches(renamed), sorted(tensors.keys() - swin.keys())


def both_branches(swin: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One Swin's tensors, named without a branch, as those of both."""
    if FIRST not in swin or swin[FIRST].ndim != 4 or swin[FIRST].shape[1] != 3:
        raise ValueError(f"its {FIRST} is no filter of three colour channels")
    thermal = {**swin, FIRST: swin[FIRST].mean(dim=1, keepdim=True)}
    branches = {"backbone.rgb.": swin, "backbone.thermal.": thermal}
    return {branch + name: tensor for branch, part in branches.items() for name, tensor in part.items()}


def _own_name(name: str, shift: int) -> str:
    name = re.sub(r"^layers\.(\d)\.downsample\.", lambda found: f"stages.{int(found[1]) - shift}.merge.", name)
    return re.sub(r"^layers\.", "stages.", name)
