"""Masks that hide tokens of the two modalities. True hides a token.

b = batch, h w = token grid (a token is 4x4 pixels)

A masking type decides how RGB and thermal masks depend on each other (MASKINGS); a shape decides what one mask looks
like (SHAPES). To add either: write the function, add its line to the dict; sweeps, tests and tables know it then.
"""

import math
import random
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor
from torch.nn import functional as F

from crm.config import Config
from crm.names import chosen
from crm.randomness import derive

TOKEN = 4  # side of a token, pixels

Mask = Bool[Tensor, "b h w"]
Draw = Callable[[], Tensor]  # a fresh Mask of the chosen shape, ratio and patch


# ---------------------------------------------------------------------------------------------- shapes


def patches(batch: int, tokens: tuple[int, int], ratio: float, patch: int, generator: Generator) -> Mask:
    """Hides exactly ceil(ratio * cells) cells of a grid of `patch` pixels, uniformly without replacement.

    A grid that does not divide the image is cut at the right and bottom edge [released code, which refuses that].
    """
    side = patch // TOKEN
    rows, columns = (math.ceil(extent / side) for extent in tokens)
    rank = torch.rand(batch, rows * columns, generator=generator).argsort(dim=1).argsort(dim=1)
    hidden = (rank < math.ceil(ratio * (rows * columns))).unflatten(1, (rows, columns))
    hidden = hidden.repeat_interleave(side, dim=1).repeat_interleave(side, dim=2)
    return hidden[:, : tokens[0], : tokens[1]].contiguous()


def square(batch: int, tokens: tuple[int, int], ratio: float, patch: int, generator: Generator) -> Mask:
    """Hides one box of the image's aspect whose area is `ratio`, anywhere inside the image; `patch` is not used.

    The released code draws it in pixels with swapped axes and area ratio**2, and cannot run it.
    """
    sides = [round(extent * math.sqrt(ratio)) for extent in tokens]
    inside = []
    for extent, side in zip(tokens, sides, strict=True):
        start = torch.randint(0, extent - side + 1, (batch, 1), generator=generator)
        position = torch.arange(extent)
        inside.append((position >= start) & (position < start + side))
    return inside[0][:, :, None] & inside[1][:, None, :]


SHAPES = {"patch": patches, "square": square}


# ---------------------------------------------------------------------------------------------- types


def none(draw: Draw, uniform: Float[Tensor, " b"], drop: float) -> tuple[Mask, Mask]:
    """Hides nothing."""
    nothing = torch.zeros_like(draw())
    return nothing, nothing


def modality_dropout(draw: Draw, uniform: Float[Tensor, " b"], drop: float) -> tuple[Mask, Mask]:
    """Hides RGB whole with probability `drop`, else thermal whole with probability `drop`; never both."""
    nothing = torch.zeros_like(draw())
    rgb, thermal = uniform < drop, (uniform >= drop) & (uniform < 2 * drop)
    return nothing | rgb[:, None, None], nothing | thermal[:, None, None]


def individual(draw: Draw, uniform: Float[Tensor, " b"], drop: float) -> tuple[Mask, Mask]:
    """Two independent masks: a token may be hidden in both modalities, or in neither."""
    return draw(), draw()


def complementary(draw: Draw, uniform: Float[Tensor, " b"], drop: float) -> tuple[Mask, Mask]:
    """Each token is hidden in exactly one modality."""
    rgb = draw()
    return rgb, ~rgb


def random_complementary(draw: Draw, uniform: Float[Tensor, " b"], drop: float) -> tuple[Mask, Mask]:
    """One third each: only thermal masked, only RGB masked, both complementary [CRM; `rand_comp` of the released code].

    No token is hidden in both; a third of the images keep all of RGB and a third all of thermal.
    """
    rgb = draw()
    keep_rgb, keep_thermal = uniform < 1 / 3, (uniform >= 1 / 3) & (uniform < 2 / 3)
    return rgb & ~keep_rgb[:, None, None], ~rgb & ~keep_thermal[:, None, None]


MASKINGS = {
    "none": none,
    "modality_dropout": modality_dropout,
    "individual": individual,
    "complementary": complementary,
    "random_complementary": random_complementary,
}


def draw_masks(
    kind: str,
    shape: str,
    batch: int,
    tokens: tuple[int, int],
    ratio: float,
    patch: int,
    drop: float,
    generator: Generator,
    valid: tuple[int, int] | None = None,
) -> Bool[Tensor, "b 2 h w"]:
    """The masks of a batch, RGB first: True where the token is replaced by its branch's mask token.

    A function of the generator alone. ValueError names the types and shapes that exist.

    Args:
        tokens: height and width of the token grid.
        valid: height and width in tokens of what is not padding; nothing beyond is hidden. None is all.
    """
    hide, cover = chosen("masking", kind, MASKINGS), chosen("mask shape", shape, SHAPES)
    inside = valid or tokens
    uniform = torch.rand(batch, generator=generator)
    hidden = torch.stack(hide(lambda: cover(batch, inside, ratio, patch, generator), uniform, drop), dim=1)
    return F.pad(hidden, (0, tokens[1] - inside[1], 0, tokens[0] - inside[0]))


def training_masks(
    config: Config, size: tuple[int, int], step: int, valid: tuple[int, int] | None = None
) -> Bool[Tensor, "b 2 h w"] | None:
    """The masks of a step's whole batch, a function of (seed, step); None where the config has none.

    Args:
        size: height and width of the padded images, pixels.
        valid: the same without padding; None is the training crop.
    """
    how = asdict(config.masking)
    if how["kind"] == "none":
        return None
    generator = Generator().manual_seed(derive(config.seed, step, "mask"))
    inside = None if how.pop("cover_padding") else _tokens(valid or config.data.crop)
    return draw_masks(batch=config.batch, tokens=_tokens(size), valid=inside, generator=generator, **how)


def _tokens(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width in tokens, a token that is only begun included."""
    return -(-size[0] // TOKEN), -(-size[1] // TOKEN)


def released_patches(
    kind: str, tokens: tuple[int, int], ratio: float, patch: int, cells: np.random.RandomState, choice: random.Random
) -> Bool[Tensor, "2 h w"]:
    """The patch masks of one image draw by draw as in the released code, whose generators are the global ones.

    Args:
        cells: orders the cells of the grid, once per mask.
        choice: of the three forms of "random_complementary".
    """
    side = patch // TOKEN
    rows, columns = tokens[0] // side, tokens[1] // side

    def draw() -> np.ndarray:
        hidden = np.zeros(rows * columns, dtype=bool)
        hidden[cells.permutation(rows * columns)[: math.ceil(ratio * (rows * columns))]] = True
        return hidden.reshape(rows, columns).repeat(side, axis=0).repeat(side, axis=1)

    rgb = draw()
    thermal = draw() if kind == "individual" else ~rgb
    form = choice.randrange(3) if kind == "random_complementary" else 2
    return torch.from_numpy(np.stack([rgb & (form != 0), thermal & (form != 1)]))
