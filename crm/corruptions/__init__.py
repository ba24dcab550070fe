"""What a condition does to the pixels of one modality, on raw grey levels before normalisation.

numpy and scipy only. h w = pixels, c = channels (RGB 3, thermal 1). Every function is pure: (pixels, mean of each
channel, severity, generator) -> pixels. A corruption is one function, whose docstring says what it means, and one line
in the dict of its kind of severity. The generator depends on (seed, image, modality, kind, severity) alone, so the
result is the same on any machine, worker count and batch size. What comes out is rounded to whole grey levels, as an
8-bit camera does, except where AS_THEY_ARE says otherwise; that also takes away the last bits, in which libraries of
mathematics differ.

Not here: glass blur, elastic and spatter of ImageNet-C, which mean nothing to a camera on a road, and frost, which
needs photographs. On thermal, fog, snow and saturation are not physical, so no suite has them there.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from crm.conditions import SEVERE, Degradation
from crm.corruptions import availability, camera, rgb, thermal
from crm.corruptions.parts import Pixels, level
from crm.data.frames import Frame
from crm.data.specs import DatasetSpec
from crm.names import chosen
from crm.randomness import derive

Corrupt = Callable[[Pixels, np.ndarray, float, np.random.Generator], Pixels]

# Without a severity.
ALWAYS: dict[str, Corrupt] = {
    "clean": availability.unchanged,
    "missing_mean": availability.mean_image,
    "missing_zero": availability.black,
    "missing_token": availability.token_image,
    "missing_route": availability.routed_around,
    "polarity_flip": thermal.polarity_flip,
    "flat_field": thermal.flat_field,
    "previous_frame": camera.previous_frame,
}
# Severity is a share, above 0 and below 1.
SHARES: dict[str, Corrupt] = {
    "patch_dropout": availability.patch_dropout,
    "common_dropout": availability.common_dropout,
    "rest_dropout": availability.rest_dropout,
    "block_dropout": availability.block_dropout,
    "block_dropout_zero": availability.block_dropout_zero,
    "block_dropout_token": availability.block_dropout_token,
    "element_dropout": availability.element_dropout,
}
# Severity is an amount above 0.
AMOUNTS: dict[str, Corrupt] = {
    "gaussian_noise": camera.gaussian_noise,
}
# Severity is 1, 2 or 3.
THREE: dict[str, Corrupt] = {
    "nm": availability.nm,
    "nm_grey": availability.nm_grey,
}
# Severity is 1 to 5.
LEVELS: dict[str, Corrupt] = {
    "gaussian_noise_c": camera.gaussian_noise_c,
    "shot_noise": camera.shot_noise,
    "impulse_noise": camera.impulse_noise,
    "speckle_noise": camera.speckle_noise,
    "gaussian_blur": camera.gaussian_blur,
    "defocus_blur": camera.defocus_blur,
    "motion_blur": camera.motion_blur,
    "platform_blur": camera.platform_blur,
    "zoom_blur": camera.zoom_blur,
    "brightness": camera.brightness,
    "contrast": camera.contrast,
    "jpeg": camera.jpeg,
    "pixelate": camera.pixelate,
    "shift": camera.shift,
    "shift_with_label": camera.shift_with_label,
    "rotation": camera.rotation,
    "time_offset": camera.time_offset,
    "fog": rgb.fog,
    "snow": rgb.snow,
    "low_light": rgb.low_light,
    "over_exposure": rgb.over_exposure,
    "glare": rgb.glare,
    "netd_noise": thermal.netd_noise,
    "column_noise": thermal.column_noise,
    "stripes": thermal.stripes,
    "nonuniformity": thermal.nonuniformity,
    "halo": thermal.halo,
    "dead_pixels": thermal.dead_pixels,
    "dead_lines": thermal.dead_lines,
    "object_crossover": thermal.object_crossover,
    "agc": thermal.agc,
}
CORRUPTIONS: dict[str, Corrupt] = {**ALWAYS, **SHARES, **AMOUNTS, **THREE, **LEVELS}

VERSION = 2  # raised whenever a pixel of any corruption changes; part of every evaluation's record

TOKEN = 4  # side of a token, pixels
NORMALISED = ("nm",)  # take and give pixels as the network gets them: minus mean, over standard deviation
OBJECTS = ("object_crossover",)  # take the pixels (h, w) of people and vehicles instead of the mean
EARLIER = ("previous_frame", "time_offset")  # take the picture of an earlier frame instead of the mean
AS_THEY_ARE = (*NORMALISED, *AMOUNTS, *SHARES, "missing_mean")  # not rounded: floats, or the mean exactly

FROZEN = ("column_noise", "nonuniformity")  # drawn once for all frames of a size
TOGETHER = ("common_dropout", "rest_dropout", "platform_blur")  # both modalities have the same draws
DRAWN_AS = {  # kinds with the draws of another
    "rest_dropout": "common_dropout",
    "block_dropout_zero": "block_dropout",
    "block_dropout_token": "block_dropout",
    "shift_with_label": "shift",
}


def corrupt(frame: Frame, modality: str, how: Degradation, spec: DatasetSpec, seed: int = 0) -> Pixels:
    """One modality of one frame under a degradation; (h, w, c) in grey levels, float32."""
    own = slice(0, 3) if modality == "rgb" else slice(3, 4)
    raw = frame.rgb if modality == "rgb" else frame.thermal[..., None]
    mean = np.array(spec.mean[own], dtype=np.float32)
    about = mean
    if how.kind in OBJECTS:
        about = np.isin(frame.label, [i for i, name in enumerate(spec.classes) if name in thermal.WARM])
    if how.kind in EARLIER:
        if frame.before is None:
            raise ValueError(f"{how.kind}: {frame.name} is of no recording, so there is no frame before it")
        past = frame.before(level(camera.TIME_OFFSET, how.severity or 1.0))
        about = past.rgb if modality == "rgb" else past.thermal[..., None]
    pixels = raw.astype(np.float32)
    rng = generator(how, frame.name, modality, seed)
    if how.kind not in NORMALISED:
        return apply(pixels, how.kind, how.severity, about, rng)
    std = np.array(spec.std[own], dtype=np.float32)
    return apply((pixels - mean) / std, how.kind, how.severity, about, rng) * std + mean


def apply(pixels: Pixels, kind: str, severity: float, mean: np.ndarray, rng: np.random.Generator) -> Pixels:
    """The corruption of that name; at severity 0 the pixels as they are. ValueError for a name that there is not."""
    function = chosen("corruption", kind, CORRUPTIONS)
    if kind in SEVERE and severity == 0:
        return pixels
    made = function(pixels, mean, severity, rng)
    return made if kind in AS_THEY_ARE else np.rint(made).clip(0, 255).astype(np.float32)


def generator(how: Degradation, image: str, modality: str, seed: int = 0) -> np.random.Generator:
    """The generator of one corruption, at one severity, of one image."""
    whose = ("all frames" if how.kind in FROZEN else image, "both" if how.kind in TOGETHER else modality)
    # a rest is that of the share that is lost in the other modality
    severity = round(1 - how.severity, 9) if how.kind == "rest_dropout" else how.severity
    return np.random.default_rng(derive(*whose, DRAWN_AS.get(how.kind, how.kind), f"{severity:.12g}", seed))


def meaning(kind: str) -> str:
    """What a kind of degradation does, in words."""
    return (inspect.getdoc(chosen("corruption", kind, CORRUPTIONS)) or "").partition("\n\n")[0].replace("`", "")


def moved_label(
    label: np.ndarray, conditions: Mapping[str, Degradation], frame: Frame, seed: int, ignore_index: int
) -> np.ndarray:
    """The label (H, W) that goes with a frame whose sides are so degraded; what leaves the picture is ignored."""
    for modality, how in conditions.items():
        if how.kind == "shift_with_label":
            rng = generator(how, frame.name, modality, seed)
            dx, dy = camera.displacement(frame.size[1], how.severity, rng)
            factors = label.shape[1] / frame.size[1], label.shape[0] / frame.size[0]
            label = camera.moved(label, round(dx * factors[0]), round(dy * factors[1]), outside=ignore_index)
    return label


def hidden_tokens(
    frames: Sequence[Frame], modality: str, how: Degradation, seed: int, padded: tuple[int, int]
) -> np.ndarray | None:
    """Which tokens of 4 pixels become the mask token, bool (b, h/4, w/4) of the padded input; None: none can."""
    if how.kind not in ("missing_token", "block_dropout_token"):
        return None
    hidden = np.ones((len(frames), padded[0] // TOKEN, padded[1] // TOKEN), dtype=bool)
    if how.kind == "block_dropout_token":
        for own, frame in zip(hidden, frames, strict=True):
            rng = generator(how, frame.name, modality, seed)
            blocks = availability.hidden_blocks(frame.size, how.severity, rng)[::TOKEN, ::TOKEN]
            own[:] = False
            own[: blocks.shape[0], : blocks.shape[1]] = blocks
    return hidden
