"""From frames to batches: augmentation of both recipes, normalisation and padding.

The clean recipe keeps pictures uint8 and resizes with antialias (torchvision v2). The released recipe goes through
floats: resized without antialias, and jittered in a way that breaks hue and saturation of a quarter of the images. In
both, RGB, thermal and label share their geometry, RGB and thermal are jittered apart, and labels are resized nearest.

b = batch, c = 4 channels R G B thermal, h w = height, width, H W = padded height, width
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Generator, Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as tv

from crm.config import Data
from crm.data.frames import Frame
from crm.data.hsv import byte_hsv, byte_rgb, float_hsv, float_rgb
from crm.data.specs import DatasetSpec

DIVISOR = 32  # padded sides are multiples of it: the backbone's total stride

Image = UInt8[Tensor, "4 h w"] | Float[Tensor, "4 h w"]  # grey levels 0..255; floats under the released recipe
Label = UInt8[Tensor, "h w"]
Pair = tuple[UInt8[Tensor, "4 _ _"] | Float[Tensor, "4 _ _"], UInt8[Tensor, "_ _"]]  # grey levels; of a size of its own
DRAWS = 16  # random numbers per image: scale, crop top and left, flip, and twelve of the jitter


def augment(frame: Frame, data: Data, generator: Generator) -> tuple[Image, Label]:
    """A random resize, crop, flip and photometric jitter of a frame; all randomness is the generator's.

    Every call takes the same number of draws, so that switching one step off leaves the others as they were.
    """
    draws = torch.rand(DRAWS, generator=generator, dtype=torch.float64).tolist()
    image, label = to_tensors(frame)
    height, width = resized(frame.size, data, draws[0])
    crop_height, crop_width = data.crop
    if (height, width) != frame.size or data.float_resize:
        image, label = RESIZES[data.float_resize](image, label, (height, width))
    if height < crop_height or width < crop_width:
        raise ValueError(f"a crop of {crop_height}x{crop_width} does not fit into a frame of {height}x{width}")
    top, left = int(draws[1] * (height - crop_height + 1)), int(draws[2] * (width - crop_width + 1))
    image = image[:, top : top + crop_height, left : left + crop_width]
    label = label[top : top + crop_height, left : left + crop_width]
    if draws[3] < data.flip:
        image, label = image.flip(-1), label.flip(-1)
    if image.is_floating_point() and not data.float_jitter:
        image = image.round().to(torch.uint8)
    if data.jitter:
        image = JITTERS[data.float_jitter](image, data.jitter, draws[4:])
    return image.contiguous(), label.contiguous()


def resized(size: tuple[int, int], data: Data, draw: float) -> tuple[int, int]:
    """Height and width after the random resize that a draw of 0..1 stands for.

    The short side is drawn: int(k * scale_step * base) for a whole k, where base is the short side of `data.size`, or
    any size in the range if scale_step is 0. The long side follows, `longest` at most; halves are rounded up [released
    code].
    """
    low, high = data.scale
    base = min(data.size)
    if data.scale_step:
        steps = short_sides(data)
        short = float(steps[int(draw * len(steps))])
    else:
        short = (low + (high - low) * draw) * base
    scale = short / min(size)
    if scale * max(size) > data.longest:
        scale = data.longest / max(size)
    return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


def short_sides(data: Data) -> list[int]:
    """The sizes the short side is drawn from, in pixels, equally likely; 16 of them under the published setting."""
    low, high = data.scale
    step, base = data.scale_step, min(data.size)
    few = 1e-9  # 0.3 / 0.1 is a little less than 3
    steps = range(math.ceil(low / step - few), math.floor(high / step + few) + 1)
    if not steps:
        raise ValueError(f"no multiple of data.scale_step {step} lies in data.scale {data.scale}")
    return [int(k * step * base) for k in steps]


def resize_bytes(image: Image, label: Label, size: tuple[int, int]) -> Pair:
    """Bilinear with antialias, uint8; the label nearest to pixel centres."""
    image = tv.resize(image, list(size), antialias=True)
    return image, tv.resize(label[None], list(size), interpolation=tv.InterpolationMode.NEAREST_EXACT)[0]


def resize_floats(image: Image, label: Label, size: tuple[int, int]) -> Pair:
    """Bilinear of floats without antialias, the label by torch's older nearest, floor(i * scale) [released code]."""
    image = interpolate(image[None].to(torch.float32), size, mode="bilinear", align_corners=False)[0]
    return image, interpolate(label[None, None], size, mode="nearest")[0, 0]


def jitter(image: UInt8[Tensor, "4 h w"], strength: float, draws: Sequence[float]) -> UInt8[Tensor, "4 h w"]:
    """SSD's colour jitter at `strength` times its ranges, each part with probability 1/2; takes 12 draws of 0..1.

    RGB gets brightness (+-32 of 255), contrast, saturation (0.5 to 1.5 each) and hue (+-36 degrees), contrast before or
    after the two; thermal gets contrast alone, of its own draw [released code, with one uint8 path].
    """
    rgb, thermal = image[:3], image[3:]
    fires = [draw < 0.5 for draw in draws[:6]]
    if fires[0]:
        shift = round(strength * 32 * (2 * draws[6] - 1))
        rgb = (rgb.to(torch.int16) + shift).clamp_(0, 255).to(torch.uint8)
    if fires[1] and fires[5]:
        rgb = _contrast(rgb, _factor(strength, draws[7]))
    if fires[2]:
        rgb = tv.adjust_saturation(rgb, _factor(strength, draws[8]))
    if fires[3]:
        rgb = tv.adjust_hue(rgb, max(-0.5, min(0.5, strength * 0.1 * (2 * draws[9] - 1))))
    if fires[1] and not fires[5]:
        rgb = _contrast(rgb, _factor(strength, draws[7]))
    if fires[4]:
        thermal = _contrast(thermal, _factor(strength, draws[10]))
    return torch.cat([rgb, thermal])


def released_jitter(image: Image, strength: float, draws: Sequence[float]) -> Float[Tensor, "4 h w"]:
    """The jitter of the released code, whose input is float: as `jitter`, with its defect; grey levels as floats.

    Brightness and contrast cut what they return down to uint8. Where neither has fired before, saturation and hue work
    on OpenCV's HSV of floats (hue 0..360, saturation 0..1) with numbers made for that of bytes (0..179, 0..255): the
    saturation becomes 0 or 1, and the hue is taken modulo 180. That befalls 9/32 of the images.
    """
    rgb, thermal = image[:3].to(torch.float32), image[3:].to(torch.float32)
    fires = [draw < 0.5 for draw in draws[:6]]
    cut = fires[0] or (fires[1] and fires[5])  # whether RGB has become uint8 when saturation and hue see it
    to_hsv, to_rgb = (byte_hsv, byte_rgb) if cut else (float_hsv, float_rgb)
    if fires[0]:
        rgb = _cut(rgb + strength * 32 * (2 * draws[6] - 1))
    if fires[1] and fires[5]:
        rgb = _cut(rgb * _factor(strength, draws[7]))
    if fires[2]:
        hue, saturation, value = to_hsv(rgb)
        rgb = to_rgb(torch.stack([hue, _cut(saturation * _factor(strength, draws[8])), value]))
    if fires[3]:
        hue, saturation, value = to_hsv(rgb)
        reach = round(strength * 18)
        turned = (hue.trunc() + int(draws[9] * (2 * reach + 1)) - reach) % 180
        rgb = to_rgb(torch.stack([turned, saturation, value]))
    if fires[1] and not fires[5]:
        rgb = _cut(rgb * _factor(strength, draws[7]))
    if fires[4]:
        thermal = _cut(thermal * _factor(strength, draws[10]))
    return torch.cat([rgb, thermal])


RESIZES = {False: resize_bytes, True: resize_floats}  # by data.float_resize
JITTERS = {False: jitter, True: released_jitter}  # by data.float_jitter


def _factor(strength: float, draw: float) -> float:
    """0.5 to 1.5 at strength 1."""
    return max(0.0, 1 + strength * (draw - 0.5))


def _cut(values: Tensor) -> Tensor:
    """What is left of floats that were stored as uint8: clipped, fractions cut off."""
    return values.clamp(0, 255).trunc()


def _contrast(image: UInt8[Tensor, "n h w"], factor: float) -> UInt8[Tensor, "n h w"]:
    """Values times `factor`, as SSD means it (about black, not about the mean)."""
    return image.to(torch.float32).mul_(factor).clamp_(0, 255).to(torch.uint8)


def to_tensors(frame: Frame) -> tuple[Image, Label]:
    """The frame as it is: four channels, and its label."""
    four = np.concatenate([frame.rgb.transpose(2, 0, 1), frame.thermal[None]])
    return torch.from_numpy(four), torch.from_numpy(frame.label.copy())


def to_input(frame: Frame, spec: DatasetSpec) -> "Batch":
    """A batch of one frame as it is, for evaluation."""
    return collate([to_tensors(frame)], spec)


def collate(pairs: Sequence[Pair], spec: DatasetSpec) -> "Batch":
    """Normalised images, padded right and bottom with zeros to multiples of 32 and to the largest of the batch."""
    sizes = [(label.shape[0], label.shape[1]) for _, label in pairs]
    height, width = (-(-max(side) // DIVISOR) * DIVISOR for side in zip(*sizes, strict=True))
    mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (spec.mean, spec.std))
    images = torch.zeros(len(pairs), 4, height, width)
    labels = torch.full((len(pairs), height, width), spec.ignore_index, dtype=torch.uint8)
    for i, ((image, label), (h, w)) in enumerate(zip(pairs, sizes, strict=True)):
        torch.div(image.to(torch.float32).sub(mean), std, out=images[i, :, :h, :w])
        labels[i, :h, :w] = label
    return Batch(image=images, label=labels, valid=sizes)


@dataclass(frozen=True, eq=False)
class Batch:
    image: Float[Tensor, "b 4 H W"]  # normalised; 0 in the padding
    label: UInt8[Tensor, "b H W"]  # ignore_index in the padding, and where a frame's own label says so
    valid: list[tuple[int, int]]  # height, width of each image without its padding
    view: "Batch | None" = None  # what the masked passes look at, where that is something else; as many images
