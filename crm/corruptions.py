"""What a condition does to the pixels of one modality, on raw grey levels before normalisation.

numpy only. h w = pixels, c = channels (RGB 3, thermal 1). Every function is pure; its randomness comes from a generator
that depends on (image, modality, kind, severity) alone, so the result is the same on any machine, worker count and
batch size. missing_token and missing_route act inside the network (`crm.evaluate`) and leave the pixels alone.
"""

from collections.abc import Callable

import numpy as np

from crm.conditions import DEGRADATIONS, Degradation
from crm.randomness import derive

PATCH = 16  # side of a dropped patch, pixels

Pixels = np.ndarray  # (h, w, c) float32, grey levels 0..255
Corrupt = Callable[[Pixels, np.ndarray, float, np.random.Generator], Pixels]


def unchanged(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    return pixels


def mean_image(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    return np.broadcast_to(mean.astype(np.float32), pixels.shape).copy()


def black(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    return np.zeros_like(pixels)


def patch_dropout(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """A share `severity` of the patches, rounded to whole patches, becomes the mean image.

    The order of the patches is drawn first, so a greater share hides more of the same picture.
    """
    height, width, _ = pixels.shape
    rows, columns = -(-height // PATCH), -(-width // PATCH)
    hidden = np.zeros(rows * columns, dtype=bool)
    hidden[rng.permutation(rows * columns)[: round(severity * rows * columns)]] = True
    dropped = hidden.reshape(rows, columns).repeat(PATCH, axis=0).repeat(PATCH, axis=1)[:height, :width]
    return np.where(dropped[..., None], mean.astype(np.float32), pixels)


def gaussian_noise(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """Adds N(0, severity) grey levels to each pixel and channel, then clips to 0..255."""
    return np.clip(pixels + severity * rng.standard_normal(pixels.shape, dtype=np.float32), 0, 255)


CORRUPTIONS: dict[str, Corrupt] = {
    "clean": unchanged,
    "missing_mean": mean_image,
    "missing_zero": black,
    "missing_token": unchanged,
    "missing_route": unchanged,
    "patch_dropout": patch_dropout,
    "gaussian_noise": gaussian_noise,
}
assert CORRUPTIONS.keys() == DEGRADATIONS.keys()


def corrupt(pixels: np.ndarray, how: Degradation, mean: np.ndarray, image: str, modality: str) -> Pixels:
    """One modality of one image under a degradation; (h, w, c) in grey levels, float32.

    `mean` has one value per channel. Patch order and noise field do not depend on the severity, so that a curve over
    severities shows one picture getting worse.
    """
    rng = np.random.default_rng(derive(image, modality, how.kind))
    return CORRUPTIONS[how.kind](pixels.astype(np.float32), mean, how.severity, rng)
