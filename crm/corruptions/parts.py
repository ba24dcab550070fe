"""What corruptions share: looking up a severity's parameters, lengths, blurs. h w = pixels, c = channels.

Lengths in tables are pixels of a frame 640 wide, as those of MF and KP are, and grow and shrink with the frame, so that
a severity means the same at every size.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from scipy.signal import oaconvolve

Pixels = np.ndarray  # (h, w, c) float32, grey levels 0..255
T = TypeVar("T")

WIDTH = 640  # of the frames that lengths are given for, pixels


def level(table: Sequence[T], severity: float) -> T:
    """The parameters of severity 1, 2, ..."""
    return table[round(severity) - 1]


def length(pixels: Pixels, at_640: int | float) -> float:
    """A length in pixels of this frame."""
    return at_640 * pixels.shape[1] / WIDTH


def convolved(pixels: Pixels, kernel: np.ndarray) -> Pixels:
    """Each channel with the same odd-sized kernel (i, j); the border is mirrored."""
    up, left = (side // 2 for side in kernel.shape)
    padded = np.pad(pixels, ((up, up), (left, left), (0, 0)), mode="symmetric")
    # in float64: by Fourier transforms, whose last bits depend on the processor
    return oaconvolve(padded.astype(np.float64), kernel[..., None], mode="valid", axes=(0, 1)).astype(np.float32)


def disk(radius: int | float) -> np.ndarray:
    """A disk of that radius, in pixels, as a kernel that sums to 1; its edge is covered in part."""
    reach, parts = int(np.ceil(radius)), 8
    at = (np.arange((2 * reach + 1) * parts) + 0.5) / parts - reach - 0.5
    inside = (at[:, None] ** 2 + at**2 <= radius**2).astype(float)
    kernel = inside.reshape(2 * reach + 1, parts, 2 * reach + 1, parts).sum(axis=(1, 3))
    return kernel / kernel.sum()


def streak(steps: int, sigma: int | float, scale: float, angle: float) -> np.ndarray:
    """A kernel that smears along a line, as a moving camera does.

    Weights fall as a Gaussian of `sigma` steps from the first of `steps` points, which are `scale` pixels apart in the
    direction `angle`, in degrees; each goes to the nearest pixel [imagecorruptions, motion_blur].
    """
    index = np.arange(steps)
    weights = np.exp(-(index**2) / (2 * sigma**2))
    dx = np.rint(index * scale * np.cos(np.deg2rad(angle))).astype(int)
    dy = np.rint(index * scale * np.sin(np.deg2rad(angle))).astype(int)
    reach = max(np.abs(dx).max(), np.abs(dy).max())
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    np.add.at(kernel, (reach + dy, reach + dx), weights / weights.sum())
    return kernel
