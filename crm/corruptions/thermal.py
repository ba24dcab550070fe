"""What befalls a thermal camera: the suite T1 to T16 (T8, T9, T13, T14 and T16 are in `camera` and `availability`).

h w = pixels. No published standard exists; the sizes are grey levels of 8 bits, chosen after the noise bank of
HSIToolkit (stripes, dead lines), the offsets of columns that dominate in uncooled bolometers (Sensors 2023, 23(6):3033;
2018, 18(12):4299) and the composite degradations of DEAL (arXiv:2503.00905). Parameters by severity 1 to 5.
"""

import numpy as np
from scipy.ndimage import binary_dilation, label

from crm.corruptions.parts import Pixels, length, level

NETD = (4, 8, 12, 18, 26)  # sd, grey levels (T1)
COLUMNS = (3, 6, 10, 15, 22)  # sd of a column's offset, grey levels (T2)
STRIPES = ((0.05, 10), (0.10, 20), (0.15, 30), (0.20, 45), (0.30, 60))  # share of the lines, offset in grey levels (T3)
NONUNIFORM = ((0.02, 2), (0.04, 4), (0.06, 6), (0.09, 9), (0.13, 13))  # sd of the gain, sd of the offset (T4)
HALO = (15, 30, 45, 65, 90)  # grey levels in the corners (T5)
DEAD_PIXELS = (0.001, 0.005, 0.01, 0.02, 0.05)  # share of all pixels (T6)
DEAD_LINES = (1, 2, 4, 8, 16)  # lines (T7)
CROSSOVER = (0.25, 0.5, 0.75, 0.9, 1.0)  # share of the difference to the surroundings that is lost (T10)
AGC = ((6, 1), (5, 2), (4, 5), (3, 10), (2, 20))  # bits, per cent clipped at either end (T12)

WARM = ("person", "rider", "car", "truck", "bus", "survivor")  # classes that T10 makes as warm as what is round them
RING = 15  # reach of those surroundings, pixels of 640


def netd_noise(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """T1: temporal noise of the detector, sd 4 to 26 grey levels, new in every frame"""
    return pixels + level(NETD, severity) * rng.standard_normal(pixels.shape, dtype=np.float32)


def column_noise(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """T2: every column has an offset, sd 3 to 22 grey levels, the same in all frames of a size"""
    return pixels + level(COLUMNS, severity) * rng.standard_normal((1, pixels.shape[1], 1), dtype=np.float32)


def stripes(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """T3: 5 to 30 % of the rows, or of the columns, are 10 to 60 grey levels too warm or too cold"""
    share, offset = level(STRIPES, severity)
    axis = int(rng.integers(2))
    count = pixels.shape[axis]
    sign = np.where(rng.random(count) < 0.5, -1, 1) * (rng.permutation(count) < round(share * count))
    return pixels + offset * sign.astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))


def nonuniformity(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """T4: every pixel has a gain, sd 0.02 to 0.13, and an offset, sd 2 to 13, the same in all frames of a size"""
    gain, offset = level(NONUNIFORM, severity)
    draws = rng.standard_normal((2, *pixels.shape), dtype=np.float32)
    return pixels * (1 + gain * draws[0]) + offset * draws[1]


def halo(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """T5: the correction has drifted with the lens: corners 15 to 90 grey levels too warm or too cold"""
    height, width, _ = pixels.shape
    y, x = np.ogrid[:height, :width]
    away = (y - (height - 1) / 2) ** 2 + (x - (width - 1) / 2) ** 2
    amount = level(HALO, severity) * rng.choice((-1, 1))
    return pixels + (amount * away / away.max())[..., None].astype(np.float32)


def dead_pixels(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """T6: 0.1 to 5 % of the pixels are dead (0) or hot (255), a quarter of them in clusters of 2 x 2"""
    height, width, _ = pixels.shape
    order, value = rng.permutation(height * width), 255.0 * rng.integers(2, size=height * width)
    dead = round(level(DEAD_PIXELS, severity) * height * width)
    clusters = round(dead / 4 / 4)
    broken = pixels.copy()
    for place, (down, right) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        alone = dead - 4 * clusters if place == 0 else 0
        y, x = np.divmod(order[: clusters + alone], width)
        broken[(y + down).clip(max=height - 1), (x + right).clip(max=width - 1)] = value[: clusters + alone, None]
    return broken


def dead_lines(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """T7: 1 to 16 rows, or columns, are 0"""
    axis = int(rng.integers(2))
    lines = rng.permutation(pixels.shape[axis])[: level(DEAD_LINES, severity)]
    broken = pixels.copy()
    broken[(lines,) if axis == 0 else (slice(None), lines)] = 0
    return broken


def object_crossover(pixels: Pixels, objects: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """T10: people and vehicles lose 25 to 100 % of their difference to a ring round them; uses the label: a stress test

    Takes the pixels (h, w) that are such an object instead of the mean image. Objects that touch count as one.
    """
    found = np.asarray(label(objects)[0])  # pyright: ignore[reportIndexIssue]
    cooled = pixels.copy()
    reach = max(1, round(length(pixels, RING)))
    for number in range(1, int(found.max(initial=0)) + 1):
        own = found == number
        rows, columns = (np.flatnonzero(own.any(axis=axis)) for axis in (1, 0))
        near = tuple(slice(max(0, at[0] - reach), at[-1] + reach + 1) for at in (rows, columns))
        inner = own[near]
        ring = binary_dilation(inner, np.ones((3, 3), bool), iterations=reach) & ~objects[near]
        if ring.any():
            part = cooled[near]
            part[inner] -= level(CROSSOVER, severity) * (part[inner].mean(axis=0) - part[ring].mean(axis=0))
    return cooled


def polarity_flip(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """T11: black-hot instead of white-hot"""
    return 255 - pixels


def agc(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """T12: the gain control clips 1 to 20 % at either end and stretches the rest to 6 to 2 bits"""
    bits, clipped = level(AGC, severity)
    low, high = np.percentile(pixels, (clipped, 100 - clipped))
    steps = 2**bits - 1
    stretched = ((pixels - low) / max(high - low, 1.0)).clip(0, 1)
    return (np.rint(stretched * steps) * (255 / steps)).astype(np.float32)


def flat_field(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """T15: the shutter is closed: a flat picture at the mean of this one"""
    return np.full_like(pixels, pixels.mean(dtype=np.float64))
