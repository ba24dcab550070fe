"""What can be said of one frame by itself: grey levels, classes, fingerprints, how far thermal lies from RGB.

Torch-free. h w = height, width in pixels
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256

import numpy as np
from PIL import Image
from scipy import fft

from crm.data.frames import Frame

THUMBNAIL = (24, 32)  # height, width of the pictures that near-identical frames are found by
COPY = 0.99  # |correlation| with a colour channel from which on thermal is a copy of it; real frames stay below 0.9

BLUR = 1.5  # of the edges, standard deviation in pixels
REACH = 32  # pixels: the largest misalignment that is looked for, per direction
CLEAR = (
    4.5  # confidence from which on a shift is believed; of pictures that do not belong together 9 in 10 stay below 3.9
)
ENOUGH = 0.1  # share of the frames that must be clear


@dataclass(frozen=True, eq=False)
class Measured:
    size: tuple[int, int]
    levels: np.ndarray  # int64 (4, 256), how many pixels of R, G, B and thermal have each grey level
    labels: np.ndarray  # int64 (256,), how many pixels have each label id
    constant: tuple[str, ...]  # of "RGB" and "thermal", those with one grey level in all pixels
    copied: str | None  # the colour channel that thermal is a copy of
    digests: tuple[str, str]  # SHA-256 of the pixels of RGB, of thermal
    thumbnails: np.ndarray  # float32 (2, 768): grey and thermal, mean 0 and length 1, so products are correlations
    shift: "Shift"


@dataclass(frozen=True)
class Shift:
    """Where thermal lies against RGB."""

    down: float  # pixels
    right: float
    confidence: float  # height of the correlation's peak, in its standard deviations


def measure(frame: Frame) -> Measured:
    """Everything that is known of a frame by itself; nothing of its pixels is kept."""
    colour, heat = Image.fromarray(frame.rgb), Image.fromarray(frame.thermal)
    grey = colour.convert("L")
    levels = np.array([*colour.histogram(), *heat.histogram()], dtype=np.int64).reshape(4, 256)
    used = (levels > 0).sum(axis=1)
    constant = tuple(part for part, most in (("RGB", used[:3].max()), ("thermal", used[3])) if most == 1)
    return Measured(
        size=frame.size,
        levels=levels,
        labels=np.array(Image.fromarray(frame.label).histogram(), dtype=np.int64),
        constant=constant,
        copied=None if constant else _copied(frame, np.asarray(grey)),
        digests=(sha256(frame.rgb.tobytes()).hexdigest(), sha256(frame.thermal.tobytes()).hexdigest()),
        thumbnails=np.stack([_thumbnail(grey), _thumbnail(heat)]),
        shift=misalignment(np.asarray(grey), frame.thermal),
    )


def _copied(frame: Frame, grey: np.ndarray) -> str | None:
    """The colour channel that thermal follows, brightness, contrast and inversion aside."""
    red, green, blue = frame.rgb.transpose(2, 0, 1)
    channels = {"grey": grey, "red": red, "green": green, "blue": blue}
    heat = _unit(_every_second(frame.thermal))
    alike = {name: abs(float(_unit(_every_second(values)) @ heat)) for name, values in channels.items()}
    most = max(alike, key=lambda name: alike[name])
    return most if alike[most] > COPY else None


def _every_second(values: np.ndarray) -> np.ndarray:
    return values[::2, ::2].astype(np.float32).ravel()


def _thumbnail(picture: Image.Image) -> np.ndarray:
    small = picture.resize((THUMBNAIL[1], THUMBNAIL[0]), Image.Resampling.BOX)
    return _unit(np.asarray(small, dtype=np.float32).ravel())


def _unit(values: np.ndarray) -> np.ndarray:
    """Mean 0 and length 1; all zeros where every value is the same."""
    centred = values - values.mean()
    length = np.linalg.norm(centred)
    return centred / length if length > 0 else np.zeros_like(centred)


# ---------------------------------------------------------------------------------------------- alignment


def misalignment(grey: np.ndarray, thermal: np.ndarray) -> Shift:
    """How far thermal lies below and to the right of RGB, in whole pixels, by phase correlation of the edges.

    Edges (the logarithm of the gradient's magnitude) are what the two have in common; which side is brighter is not.
    The shift is one for the whole picture: with parallax it is that of most edges. At most REACH, and a quarter of the
    picture. Kuglin and Hines, The phase correlation image alignment method, 1975.
    """
    height, width = grey.shape
    if min(height, width) < 16:
        return Shift(0.0, 0.0, 0.0)
    window, low_pass = _windows(height - 2, width - 2)
    first, second = (np.asarray(fft.rfft2(_edges(picture) * window)) for picture in (grey, thermal))
    cross = second * np.conj(first)
    cross /= np.abs(cross) + 1e-6
    peaks = np.asarray(fft.irfft2(cross * low_pass, (height - 2, width - 2)))
    down, right = min(REACH, height // 4), min(REACH, width // 4)
    peaks = np.roll(peaks, (down, right), (0, 1))[: 2 * down + 1, : 2 * right + 1]
    if (spread := peaks.std()) == 0:  # one of them has no edges
        return Shift(0.0, 0.0, 0.0)
    y, x = np.unravel_index(peaks.argmax(), peaks.shape)
    return Shift(float(y - down), float(x - right), float((peaks.max() - peaks.mean()) / spread))


def _edges(picture: np.ndarray) -> np.ndarray:
    """Logarithm of the gradient's magnitude, mean 0, float32 (h - 2, w - 2)."""
    levels = picture.astype(np.float32)
    steps = np.hypot(levels[2:, 1:-1] - levels[:-2, 1:-1], levels[1:-1, 2:] - levels[1:-1, :-2])
    edges = np.log1p(steps)
    return edges - edges.mean()


@lru_cache(maxsize=4)
def _windows(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A Hann window over the picture, and a Gaussian low-pass over its spectrum."""
    window = np.outer(np.hanning(height), np.hanning(width)).astype(np.float32)
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    return window, np.exp(-2 * (np.pi * BLUR) ** 2 * (y**2 + x**2)).astype(np.float32)


def typical(shifts: Sequence[Shift]) -> Shift | None:
    """The median of the shifts that are clear, with their median confidence; None if too few are."""
    clear = [(one.down, one.right, one.confidence) for one in shifts if one.confidence >= CLEAR]
    if len(clear) < max(1, ENOUGH * len(shifts)):
        return None
    down, right, confidence = np.median(np.array(clear), axis=0)
    return Shift(float(down), float(right), float(confidence))


# ---------------------------------------------------------------------------------------------- many frames


def mean_and_deviation(levels: np.ndarray) -> tuple[list[float], list[float]]:
    """Per channel over all pixels, from counts (channels, 256) of grey levels."""
    value = np.arange(256.0)
    count = levels.sum(axis=1)
    mean = levels @ value / count
    return mean.tolist(), np.sqrt(levels @ value**2 / count - mean**2).tolist()


def likenesses(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How alike frames look, float32 (n, m): the smaller of the correlations of their grey and thermal thumbnails."""
    return np.minimum(first[:, 0] @ second[:, 0].T, first[:, 1] @ second[:, 1].T)
