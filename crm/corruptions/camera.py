"""Noise, blur, exposure, compression and geometry: what can befall the picture of either camera.

h w = pixels, c = channels. Parameters by severity 1 to 5 are those of ImageNet-C [Hendrycks and Dietterich, ICLR 2019]
in the library imagecorruptions (commit c959e65) where a table says so. Ours round to whole grey levels where the
library cuts off, draw from an explicit generator, and take one channel as well as three.
"""

import io

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates

from crm.corruptions.parts import Pixels, convolved, disk, length, level, streak

GAUSSIAN_NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)  # sd, shares of the full range [ImageNet-C]
SHOT_NOISE = (60, 25, 12, 5, 3)  # photons of a white pixel [ImageNet-C]
IMPULSE_NOISE = (0.03, 0.06, 0.09, 0.17, 0.27)  # share of elements that are 0 or 255 [ImageNet-C]
SPECKLE_NOISE = (0.15, 0.2, 0.35, 0.45, 0.6)  # sd, shares of the pixel's own value [ImageNet-C, extra]
GAUSSIAN_BLUR = (1, 2, 3, 4, 6)  # sd, pixels [ImageNet-C, extra]
DEFOCUS_BLUR = (3, 4, 6, 8, 10)  # radius, pixels [ImageNet-C; its second parameter smooths a disk drawn without edge]
MOTION_BLUR = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))  # radius and sd, pixels [ImageNet-C]
ZOOM_BLUR = ((1.1, 0.01), (1.15, 0.01), (1.2, 0.02), (1.24, 0.02), (1.3, 0.03))  # last factor, step [ImageNet-C]
BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)  # added to the value of HSV, shares of the full range [ImageNet-C]
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)  # gain about the mean [ImageNet-C]
JPEG = (25, 18, 15, 10, 7)  # quality [ImageNet-C]
PIXELATE = (0.6, 0.5, 0.4, 0.3, 0.25)  # scale [ImageNet-C]
SHIFT = (2, 4, 8, 16, 32)  # pixels, in a direction drawn per image (T13)
TIME_OFFSET = (1, 2, 5, 10, 20)  # frames (T14)
ROTATION = (0.5, 1, 2, 4, 8)  # degrees about the centre, either way (T13)


def gaussian_noise(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """noise N(0, severity) is added to the pixels, in grey levels of 0..255, then clipped"""
    return np.clip(pixels + severity * rng.standard_normal(pixels.shape, dtype=np.float32), 0, 255)


def gaussian_noise_c(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """gaussian_noise of ImageNet-C: sd 20 to 97 grey levels, as of a sensor in the dark"""
    return gaussian_noise(pixels, mean, 255 * level(GAUSSIAN_NOISE, severity), rng)


def shot_noise(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """ImageNet-C: photons are counted, 60 to 3 for white"""
    photons = level(SHOT_NOISE, severity)
    return (rng.poisson(pixels * (photons / 255)) * (255 / photons)).astype(np.float32)


def impulse_noise(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """ImageNet-C: 3 to 27 % of all pixels, channel by channel, are black or white"""
    struck = rng.random(pixels.shape, dtype=np.float32) < level(IMPULSE_NOISE, severity)
    return np.where(struck, 255 * rng.integers(2, size=pixels.shape), pixels).astype(np.float32)


def speckle_noise(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """ImageNet-C: noise in proportion to the pixel, sd 15 to 60 % of it"""
    return pixels * (1 + level(SPECKLE_NOISE, severity) * rng.standard_normal(pixels.shape, dtype=np.float32))


def gaussian_blur(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """ImageNet-C: Gaussian blur, sd 1 to 6 pixels; of thermal a lens of low contrast transfer (T8)"""
    sigma = length(pixels, level(GAUSSIAN_BLUR, severity))
    return gaussian_filter(pixels, (sigma, sigma, 0), mode="nearest")


def defocus_blur(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """ImageNet-C: every point becomes a disk of radius 3 to 10 pixels"""
    return convolved(pixels, disk(length(pixels, level(DEFOCUS_BLUR, severity))))


def motion_blur(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """ImageNet-C: smeared along a line of 21 to 41 pixels, within 45 degrees of level"""
    radius, sigma = level(MOTION_BLUR, severity)
    angle = rng.uniform(-45, 45)
    return convolved(pixels, streak(2 * radius + 1, sigma, length(pixels, 1), angle))


def platform_blur(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """motion_blur of a shaking platform: at once, both modalities are smeared by the same kernel"""
    return motion_blur(pixels, mean, severity, rng)


def zoom_blur(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """ImageNet-C: the mean of enlargements up to 1.1 to 1.3, as on the way forward"""
    last, step = level(ZOOM_BLUR, severity)
    height, width, _ = pixels.shape
    total, factors = pixels.copy(), np.arange(1, last + step / 2, step)
    for factor in factors:
        left, top = width * (1 - 1 / factor) / 2, height * (1 - 1 / factor) / 2
        total += _resampled(pixels, (width, height), Image.Resampling.BILINEAR, (left, top, width - left, height - top))
    return total / (len(factors) + 1)


def brightness(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """ImageNet-C: 26 to 128 grey levels are added to the value, hue and saturation stay; of thermal an offset"""
    value = pixels.max(axis=2, keepdims=True)
    raised = np.minimum(value + 255 * level(BRIGHTNESS, severity), 255)
    return np.where(value > 0, pixels * (raised / np.maximum(value, 1)), raised)


def contrast(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """ImageNet-C: 40 to 5 % of the contrast about the image's mean; of thermal the crossover of a whole scene (T9)"""
    middle = pixels.mean(axis=(0, 1), dtype=np.float64).astype(np.float32)
    return middle + np.float32(level(CONTRAST, severity)) * (pixels - middle)


def jpeg(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """ImageNet-C: JPEG of quality 25 to 7; the same wherever Pillow has the same libjpeg"""
    buffer = io.BytesIO()
    _picture(pixels).save(buffer, "JPEG", quality=level(JPEG, severity))
    return _values(Image.open(buffer))


def pixelate(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """ImageNet-C: as if recorded at 60 to 25 % of the side; of thermal a core with fewer pixels"""
    scale = level(PIXELATE, severity)
    height, width, _ = pixels.shape
    small = _picture(pixels).resize((int(width * scale), int(height * scale)), Image.Resampling.BOX)
    return _values(small.resize((width, height), Image.Resampling.NEAREST))


def shift(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """moved by 2 to 32 pixels of 640, at least one, the border repeated: parallax (T13); the label stays"""
    return moved(pixels, *displacement(pixels.shape[1], severity, rng))


def shift_with_label(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """as shift, and the label moves with this modality: tells a wrong place from a wrong modality (T13)"""
    return shift(pixels, mean, severity, rng)


def rotation(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """turned by 0.5 to 8 degrees about the centre, the border repeated (T13); the label stays"""
    angle = np.deg2rad(level(ROTATION, severity)) * rng.choice((-1, 1))
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    up, left = (side // 2 for side in pixels.shape[:2])
    at = [
        (y - up) * np.cos(angle) - (x - left) * np.sin(angle) + up,
        (y - up) * np.sin(angle) + (x - left) * np.cos(angle) + left,
    ]
    turned = [map_coordinates(channel, at, order=1, mode="nearest") for channel in np.moveaxis(pixels, 2, 0)]
    return np.stack(turned, axis=2)


def time_offset(pixels: Pixels, earlier: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """the picture of 1 to 20 frames before: cameras that do not record at the same time (T14); the label stays

    Takes that picture (h, w, c) instead of the mean image. How long a frame lasts is the data set's.
    """
    return earlier.astype(np.float32)


def previous_frame(pixels: Pixels, earlier: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """the picture of the frame before, as while the shutter is closed (T15, beside flat_field)"""
    return earlier.astype(np.float32)


def displacement(width: int, severity: float, rng: np.random.Generator) -> tuple[int, int]:
    """Whole pixels to the right and down that `shift` moves a frame of that width; drawn."""
    angle = rng.uniform(0, 2 * np.pi)
    distance = max(1.0, level(SHIFT, severity) * width / 640)
    return round(distance * np.cos(angle)), round(distance * np.sin(angle))


def moved(values: np.ndarray, dx: int, dy: int, outside: int | None = None) -> np.ndarray:
    """(h, w, ...) moved right and down; what comes in is the border repeated, or `outside`."""
    height, width = values.shape[:2]
    rows, columns = np.arange(height) - dy, np.arange(width) - dx
    found = values[np.ix_(rows.clip(0, height - 1), columns.clip(0, width - 1))]
    if outside is not None:
        found[(rows < 0) | (rows >= height)] = outside
        found[:, (columns < 0) | (columns >= width)] = outside
    return found


def _picture(pixels: Pixels) -> Image.Image:
    grey = np.rint(pixels).clip(0, 255).astype(np.uint8)
    return Image.fromarray(grey[..., 0] if grey.shape[2] == 1 else grey)


def _values(picture: Image.Image) -> Pixels:
    values = np.asarray(picture, dtype=np.float32)
    return values[..., None] if values.ndim == 2 else values


def _resampled(
    pixels: Pixels, size: tuple[int, int], how: Image.Resampling, box: tuple[float, float, float, float]
) -> Pixels:
    return _values(_picture(pixels).resize(size, how, box=box))
