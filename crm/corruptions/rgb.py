"""Weather and light: what befalls the RGB camera and hardly touches long-wave infrared.

h w = pixels. Thermal stays as recorded under all of these, which is what a second modality is for.
"""

import numpy as np
from PIL import Image

from crm.corruptions.parts import WIDTH, Pixels, convolved, length, level, streak

FOG = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))  # strength, decay of the roughness [ImageNet-C]
SNOW = (  # mean, sd, enlargement and threshold of the flakes; radius and sd of their fall; share of the picture kept
    (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
    (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
    (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
)  # [ImageNet-C]
LOW_LIGHT = ((0.6, 1.2, 60), (0.4, 1.4, 25), (0.25, 1.6, 12), (0.15, 1.8, 5), (0.08, 2.0, 3))  # gain, gamma, photons
OVER_EXPOSURE = (1.5, 2, 2.5, 3, 4)  # gain
GLARE = (1, 2, 3, 4, 5)  # head lights


def fog(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """ImageNet-C: a fractal haze is laid over the picture, and contrast is lost; as deep as the sky everywhere"""
    strength, decay = level(FOG, severity)
    haze = plasma(pixels.shape[:2], decay, rng)[..., None]
    top = max(float(pixels.max()), 1.0) / 255
    return ((pixels + 255 * strength * haze) * (top / (top + strength))).astype(np.float32)


def plasma(size: tuple[int, int], decay: int | float, rng: np.random.Generator) -> np.ndarray:
    """A fractal height map (h, w) of 0..1 by diamond-square, rougher the smaller `decay` [imagecorruptions]."""
    side = 1 << (max(size) - 1).bit_length()
    heights, step, rough = np.zeros((side, side)), side, 100.0

    def around(total: np.ndarray) -> np.ndarray:
        return total / 4 + rough * rng.uniform(-rough, rough, total.shape)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        square = corners + np.roll(corners, -1, axis=0)
        heights[half::step, half::step] = around(square + np.roll(square, -1, axis=1))
        centres = heights[half::step, half::step]
        rows = centres + np.roll(centres, 1, axis=0) + corners + np.roll(corners, -1, axis=1)
        heights[::step, half::step] = around(rows)
        columns = centres + np.roll(centres, 1, axis=1) + corners + np.roll(corners, -1, axis=0)
        heights[half::step, ::step] = around(columns)
        step, rough = half, rough / decay
    heights -= heights.min()
    return (heights / heights.max())[: size[0], : size[1]]


def snow(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """ImageNet-C: falling flakes, and the picture paler; the published severities are no even steps"""
    loc, scale, zoom, threshold, radius, sigma, kept = level(SNOW, severity)
    height, width, _ = pixels.shape
    across, down = WIDTH, max(1, round(WIDTH * height / width))
    drawn = loc + scale * rng.standard_normal((round(down / zoom), round(across / zoom)), dtype=np.float32)
    flakes = np.asarray(Image.fromarray(drawn).resize((across, down), Image.Resampling.BILINEAR))
    flakes = np.where(flakes < threshold, 0, flakes.clip(0, 1))[..., None].astype(np.float32)
    flakes = convolved(flakes, streak(2 * radius + 1, sigma, 1.0, rng.uniform(-135, -45)))
    flakes = np.asarray(Image.fromarray(flakes[..., 0]).resize((width, height), Image.Resampling.BILINEAR))[..., None]
    grey = pixels @ np.array([[0.299], [0.587], [0.114]], np.float32) if pixels.shape[2] == 3 else pixels
    pale = kept * pixels + (1 - kept) * np.maximum(pixels, 1.5 * grey + 127.5)
    return pale + 255 * (flakes + np.rot90(flakes, 2))


def low_light(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """darker by gain and gamma, and 60 to 3 photons for white are counted; no replacement for frames of a real night"""
    gain, gamma, photons = level(LOW_LIGHT, severity)
    light = gain * (pixels / 255) ** gamma
    return (rng.poisson(light * photons) * (255 / photons)).astype(np.float32)


def over_exposure(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """1.5 to 4 times as bright, and what is above white is white"""
    return pixels * np.float32(level(OVER_EXPOSURE, severity))


def glare(pixels: Pixels, mean: np.ndarray, severity: float, rng: np.random.Generator) -> Pixels:
    """1 to 5 head lights blind the camera: saturated cores with Gaussian halos"""
    height, width, _ = pixels.shape
    y, x = np.ogrid[:height, :width]
    lit = pixels.copy()
    lamps = rng.random((max(GLARE), 3))
    for across, down, size in lamps[: level(GLARE, severity)]:
        sigma = length(pixels, 12 + 20 * size)
        away = (x - across * width) ** 2 + (y - (0.35 + 0.45 * down) * height) ** 2
        halo = 420 * np.exp(-away / (2 * sigma**2)) + 40 * np.exp(-away / (2 * (5 * sigma) ** 2))
        lit += halo[..., None].astype(np.float32)
    return lit
