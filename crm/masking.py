"""Masks that hide tokens of the two modalities. True hides a token.

b = batch, h w = token grid (a token is 4x4 pixels), H W = pixels

A masking type decides how RGB and thermal masks depend on each other (MASKINGS), a shape what one mask looks like
(SHAPES), a fill what stands in a hidden token's place (FILLS). To add one: write the function, add its line to the
dict; sweeps, tests and tables know it then. What the literature calls
    cutout              is `identical` or `individual` with `square` and fill `mean`
    M-CutOut            is `rgb_only` with `square`, ratio 0.09, probability 0.5 and fill `mean` [SpiderMesh]
    modality dropout    is `modality_dropout`; with fill `mean` a missing modality is the mean image
Masks are of whole tokens, so the border of a box lies on a multiple of 4 pixels.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor
from torch.nn import functional as F

from crm.config import Config, Masking
from crm.names import chosen
from crm.randomness import derive

TOKEN = 4  # side of a token, pixels

Mask = Bool[Tensor, "b h w"]
SPREAD = 0.25  # standard deviation of the Gaussian of the shape "gaussian", relative to the image's sides


# ---------------------------------------------------------------------------------------------- shapes


def patches(batch: int, tokens: tuple[int, int], ratio: float, patch: int, generator: Generator) -> Mask:
    """Hides exactly ceil(ratio * cells) cells of a grid of `patch` pixels, uniformly without replacement.

    A grid that does not divide the image is cut at the right and bottom edge [released code, which refuses that].
    """
    rows, columns = _cells(tokens, patch)
    rank = torch.rand(batch, rows * columns, generator=generator).argsort(dim=1).argsort(dim=1)
    return _grown((rank < math.ceil(ratio * (rows * columns))).unflatten(1, (rows, columns)), tokens, patch)


def gaussian(batch: int, tokens: tuple[int, int], ratio: float, patch: int, generator: Generator) -> Mask:
    """Hides exactly ceil(ratio * cells) cells, without replacement, with weights of a Gaussian at a random place.

    Our reading of the "Gaussian-guided regional balancing mask" of SpatialSeg (2026), of which we know the name and the
    abstract only: a cell's weight is exp(-d^2 / 2), d its distance in units of SPREAD of each side. The place is
    uniform in every image, so that no region is hidden more often in one modality (but the borders, a little less).
    """
    rows, columns = _cells(tokens, patch)
    centre = torch.rand(batch, 2, 1, generator=generator)
    away = [
        ((torch.arange(count) + 0.5) / count - centre[:, axis]) / SPREAD for axis, count in enumerate((rows, columns))
    ]
    weight = -(away[0][:, :, None].square() + away[1][:, None, :].square()) / 2  # its logarithm
    uniform = torch.rand(batch, rows * columns, generator=generator).clamp(1e-9, 1 - 1e-6)
    key = weight.flatten(1) - (-uniform.log()).log()  # the largest of these are drawn by weight [Gumbel top-k]
    rank = key.argsort(dim=1, descending=True).argsort(dim=1)
    return _grown((rank < math.ceil(ratio * (rows * columns))).unflatten(1, (rows, columns)), tokens, patch)


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


SHAPES = {"patch": patches, "square": square, "gaussian": gaussian}


def _cells(tokens: tuple[int, int], patch: int) -> tuple[int, int]:
    """Rows and columns of the grid of patches, those included that are cut at the edge."""
    side = patch // TOKEN
    return math.ceil(tokens[0] / side), math.ceil(tokens[1] / side)


def _grown(cells: Bool[Tensor, "b r c"], tokens: tuple[int, int], patch: int) -> Mask:
    """The tokens of cells."""
    side = patch // TOKEN
    grown = cells.repeat_interleave(side, dim=1).repeat_interleave(side, dim=2)
    return grown[:, : tokens[0], : tokens[1]].contiguous()


def _opposite(hidden: Mask, patch: int, overlap: float, generator: Generator) -> Mask:
    """The complement, but in a share `overlap` of the cells that are hidden, and of those that are not, the same.

    So a share `overlap` of what is hidden is hidden in both, and how much is hidden goes from 1 - ratio to the ratio.
    Halves are rounded up.
    """
    if not overlap:
        return ~hidden
    cells = hidden[:, :: patch // TOKEN, :: patch // TOKEN]
    drawn = torch.rand(cells.shape, generator=generator).flatten(1)
    same = torch.zeros_like(cells).flatten(1)
    for group in (cells.flatten(1), ~cells.flatten(1)):
        rank = torch.where(group, drawn, 2.0).argsort(dim=1).argsort(dim=1)
        same |= rank < (overlap * group.sum(dim=1, keepdim=True) + 0.5).floor()
    tokens = (hidden.shape[1], hidden.shape[2])
    return _grown(same.view_as(cells), tokens, patch) ^ ~hidden


# ---------------------------------------------------------------------------------------------- types


@dataclass(frozen=True)
class Draws:
    """What a masking type makes the masks of a batch of."""

    fresh: Callable[[], Mask]  # a mask of the chosen shape, ratio and patch, independent of the others
    opposite: Callable[[Mask], Mask]  # its complement, or as much of it as `overlap` asks for
    uniform: Float[Tensor, " b"]  # a number from 0 to 1 for every image
    drop: float


def none(draws: Draws) -> tuple[Mask, Mask]:
    """Hides nothing."""
    nothing = torch.zeros_like(draws.fresh())
    return nothing, nothing


def modality_dropout(draws: Draws) -> tuple[Mask, Mask]:
    """Hides RGB whole with probability `drop`, else thermal whole with probability `drop`; never both."""
    nothing, uniform, drop = torch.zeros_like(draws.fresh()), draws.uniform, draws.drop
    rgb, thermal = uniform < drop, (uniform >= drop) & (uniform < 2 * drop)
    return nothing | rgb[:, None, None], nothing | thermal[:, None, None]


def individual(draws: Draws) -> tuple[Mask, Mask]:
    """Two independent masks: a token may be hidden in both modalities, or in neither."""
    return draws.fresh(), draws.fresh()


def identical(draws: Draws) -> tuple[Mask, Mask]:
    """The same tokens in both modalities, as cutout on a stack of channels."""
    both = draws.fresh()
    return both, both


def rgb_only(draws: Draws) -> tuple[Mask, Mask]:
    """RGB alone is masked [M-CutOut of SpiderMesh]."""
    rgb = draws.fresh()
    return rgb, torch.zeros_like(rgb)


def complementary(draws: Draws) -> tuple[Mask, Mask]:
    """Each token is hidden in exactly one modality (with `overlap` 0)."""
    rgb = draws.fresh()
    return rgb, draws.opposite(rgb)


def random_complementary(draws: Draws) -> tuple[Mask, Mask]:
    """One third each: only thermal masked, only RGB masked, both complementary [CRM; `rand_comp` of the released code].

    No token is hidden in both (with `overlap` 0); a third of the images keep all of RGB and a third all of thermal.
    """
    rgb, uniform = draws.fresh(), draws.uniform
    thermal = draws.opposite(rgb)
    keep_rgb, keep_thermal = uniform < 1 / 3, (uniform >= 1 / 3) & (uniform < 2 / 3)
    return rgb & ~keep_rgb[:, None, None], thermal & ~keep_thermal[:, None, None]


MASKINGS = {
    "none": none,
    "modality_dropout": modality_dropout,
    "individual": individual,
    "identical": identical,
    "rgb_only": rgb_only,
    "complementary": complementary,
    "random_complementary": random_complementary,
}


# ---------------------------------------------------------------------------------------------- fills


def mask_token(
    image: Float[Tensor, "b 4 H W"], hidden: Bool[Tensor, "b 2 h w"]
) -> tuple[Float[Tensor, "b 4 H W"], Bool[Tensor, "b 2 h w"] | None]:
    """The branch's learned mask token, after patch embedding [CRM]."""
    return image, hidden


def mean_pixels(
    image: Float[Tensor, "b 4 H W"], hidden: Bool[Tensor, "b 2 h w"]
) -> tuple[Float[Tensor, "b 4 H W"], Bool[Tensor, "b 2 h w"] | None]:
    """The data set's mean colour, 0 after normalisation [cutout]; mask tokens are then never used nor trained."""
    pixels = hidden.repeat_interleave(TOKEN, dim=2).repeat_interleave(TOKEN, dim=3)
    pixels = pixels[:, :, : image.shape[2], : image.shape[3]]
    rgb, thermal = pixels.split(1, dim=1)
    return torch.where(torch.cat([rgb, rgb, rgb, thermal], dim=1), 0.0, image), None


# what the network gets instead of hidden tokens: an image, and tokens that its mask tokens replace
FILLS = {"token": mask_token, "mean": mean_pixels}


# ---------------------------------------------------------------------------------------------- masks of a batch


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
    overlap: float = 0.0,
    probability: float = 1.0,
) -> Bool[Tensor, "b 2 h w"]:
    """The masks of a batch, RGB first: True where the token is hidden.

    A function of the generator alone. ValueError names the types and shapes that exist.

    Args:
        tokens: height and width of the token grid.
        valid: height and width in tokens of what is not padding; nothing beyond is hidden. None is all.
        overlap: share of what complementary masks hide that they hide in both modalities.
        probability: that an image is masked at all.
    """
    hide, cover = chosen("masking", kind, MASKINGS), chosen("mask shape", shape, SHAPES)
    inside = valid or tokens
    uniform = torch.rand(batch, generator=generator)
    draws = Draws(
        fresh=lambda: cover(batch, inside, ratio, patch, generator),
        opposite=lambda hidden: _opposite(hidden, patch, overlap, generator),
        uniform=uniform,
        drop=drop,
    )
    hidden = torch.stack(hide(draws), dim=1)
    if probability < 1:  # else nothing is drawn: masks stay those of a setting without this choice
        hidden &= (torch.rand(batch, generator=generator) < probability)[:, None, None, None]
    return F.pad(hidden, (0, tokens[1] - inside[1], 0, tokens[0] - inside[0]))


def training_masks(
    config: Config, size: tuple[int, int], step: int, valid: tuple[int, int] | None = None
) -> Bool[Tensor, "b 2 h w"] | None:
    """The masks of a step's whole batch, a function of (seed, step); None where the config has none.

    Args:
        size: height and width of the padded images, pixels.
        valid: the same without padding; None is the training crop.
    """
    if config.masking.kind == "none":
        return None
    generator = Generator().manual_seed(derive(config.seed, step, "mask"))
    return configured_masks(config.masking, config.batch, size, valid or config.data.crop, generator)


def configured_masks(
    masking: Masking, batch: int, size: tuple[int, int], valid: tuple[int, int], generator: Generator
) -> Bool[Tensor, "b 2 h w"]:
    """Masks as the config says, of images of `size` pixels, of which all but `valid` are padding."""
    return draw_masks(
        masking.kind,
        masking.shape,
        batch,
        _tokens(size),
        masking.ratio,
        masking.patch,
        masking.drop,
        generator,
        valid=None if masking.cover_padding else _tokens(valid),
        overlap=masking.overlap,
        probability=masking.probability,
    )


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
