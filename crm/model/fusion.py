"""Fusion of the maps of two modalities; each family member is a function of two maps of one level.

b = batch, c = channels, h w = height and width of the level
"""

import torch
from jaxtyping import Float
from torch import Tensor

Map = Float[Tensor, "b c h w"]


def maximum(rgb: Map, thermal: Map) -> Map:
    """Elementwise maximum: the released code's choice on every data set."""
    return torch.maximum(rgb, thermal)


def add(rgb: Map, thermal: Map) -> Map:
    """Elementwise sum: the other choice of the released code."""
    return rgb + thermal


FUSIONS = {"max": maximum, "add": add}
