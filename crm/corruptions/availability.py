"""What is left when a modality, or a part of it, is not there. For either modality.

b = blocks of the frame, c = channels, h w = pixels
"""

import numpy as np

from crm.corruptions.parts import Pixels, level

PATCH, BLOCK = 16, 32  # side of a dropped patch, and of a block (the patch of the released code's masks), pixels
NM = ((0.05, 0.1), (0.10, 0.2), (0.20, 0.5))  # density of salt and pepper, sd of the Gaussian in normalised units
NM_GREY = tuple((density, sd * 57.4) for density, sd in NM)  # the same sd in grey levels, as normalised RGB has it


def unchanged(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """the modality as recorded"""
    return pixels


def token_image(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """every token is the branch's learned mask token; needs a run trained with masks"""
    return pixels


def routed_around(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """the other branch's features go to the head alone, around fusion and its BatchNorm"""
    return pixels


def mean_image(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """every pixel is the data set's mean (0 after normalisation); the usual meaning of missing"""
    return np.broadcast_to(mean.astype(np.float32), pixels.shape).copy()


def black(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """every raw pixel is 0 (a black image)"""
    return np.zeros_like(pixels)


def patch_dropout(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """a share `severity` of the 16-pixel patches is the mean image; 1 equals missing_mean

    Rounded to whole patches.
    """
    hidden = _first(pixels, PATCH, severity, rng)
    return np.where(hidden[..., None], mean.astype(np.float32), pixels)


def common_dropout(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """as patch_dropout, in an order of the patches that both modalities share: at once they lose the same places"""
    return patch_dropout(pixels, mean, severity, rng)


def rest_dropout(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """as common_dropout, but the last patches of the common order: with shares s and 1 - s nothing is lost in both"""
    kept = _first(pixels, PATCH, round(1 - severity, 9), rng)
    return np.where(kept[..., None], pixels, mean.astype(np.float32))


def block_dropout(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """a share `severity` of the 32-pixel blocks is the mean image (T16; RMM by blocks)"""
    return np.where(_first(pixels, BLOCK, severity, rng)[..., None], mean.astype(np.float32), pixels)


def block_dropout_zero(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """a share `severity` of the 32-pixel blocks is black (T16)"""
    return np.where(_first(pixels, BLOCK, severity, rng)[..., None], np.float32(0), pixels)


def block_dropout_token(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """the tokens of a share `severity` of the 32-pixel blocks are the branch's mask token (T16), as in training"""
    return pixels


def hidden_blocks(size: tuple[int, int], severity: float, rng: np.random.Generator) -> np.ndarray:
    """The pixels (h, w) whose tokens block_dropout_token hides."""
    return _first(np.empty((*size, 0)), BLOCK, severity, rng)


def element_dropout(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """each pixel of each channel is the mean with probability `severity`: RMM as published, element by element

    0 in the network's normalised units [Liao et al., CVPR-W 2025, arXiv:2503.18445; the script of its repository].
    """
    return np.where(rng.random(pixels.shape, dtype=np.float32) < severity, mean.astype(np.float32), pixels)


def nm(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """NM as published: salt, pepper and Gaussian noise in the network's normalised units; low, mid, high are 1, 2, 3

    Takes normalised pixels. Salt is the image's greatest value and pepper its least, at places drawn with replacement,
    half of the density each; then N(0, sd) is added and nothing is clipped [Liao et al., CVPR-W 2025, arXiv:2503.18445;
    the script of its repository, which takes extremes and places over the batch, so that results depend on the batch:
    here over the image]. In these units the noise of RGB and of thermal differ in size.
    """
    return _noise_modes(pixels, *level(NM, severity), float(pixels.min()), float(pixels.max()), rng)


def nm_grey(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """NM in grey levels: the same densities, salt 255, pepper 0, sd 5.7, 11.5, 28.7, clipped; alike in both"""
    return np.clip(_noise_modes(pixels, *level(NM_GREY, severity), 0.0, 255.0, rng), 0, 255)


def _noise_modes(
    pixels: Pixels, density: float, sd: float, pepper: float, salt: float, rng: np.random.Generator
) -> Pixels:
    noisy = pixels.ravel().copy()
    count = int(density / 2 * noisy.size)
    for value in (salt, pepper):
        noisy[rng.integers(noisy.size, size=count)] = value
    return noisy.reshape(pixels.shape) + np.float32(sd) * rng.standard_normal(pixels.shape, dtype=np.float32)


def _first(pixels: Pixels, side: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """The pixels (h, w) of the first patches of a drawn order, so many that they are `share` of all, rounded."""
    height, width, _ = pixels.shape
    rows, columns = -(-height // side), -(-width // side)
    chosen = np.zeros(rows * columns, dtype=bool)
    chosen[rng.permutation(rows * columns)[: round(share * rows * columns)]] = True
    return chosen.reshape(rows, columns).repeat(side, axis=0).repeat(side, axis=1)[:height, :width]
