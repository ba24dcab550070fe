"""From frames to batches: the clean recipe's augmentation, normalisation and padding.

torchvision v2 on uint8 with antialias (CRM method notes, quirks 1 to 3 avoided: the released code jitters floats, which
collapses saturation, and resizes without antialias).

b = batch, c = 4 channels R G B thermal, h w = height, width, H W = padded height, width
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Generator, Tensor
from torchvision.transforms.v2 import functional as tv

from crm.config import Data
from crm.data.frames import Frame
from crm.data.specs import DatasetSpec

DIVISOR = 32  # padded sides are multiples of it: the backbone's total stride

Image = UInt8[Tensor, "4 h w"]
Label = UInt8[Tensor, "h w"]
Pair = tuple[UInt8[Tensor, "4 _ _"] | Float[Tensor, "4 _ _"], UInt8[Tensor, "_ _"]]  # grey levels; of a size of its own


def augment(frame: Frame, data: Data, generator: Generator) -> tuple[Image, Label]:
    """A random resize, crop, flip and photometric jitter of a frame; all randomness is the generator's.

    Every call takes the same number of draws, so that switching one step off leaves the others as they were.
    """
    draws = torch.rand(16, generator=generator, dtype=torch.float64).tolist()
    image, label = to_tensors(frame)
    low, high = data.scale
    scale = low + (high - low) * draws[0]
    height, width = round(data.size[0] * scale), round(data.size[1] * scale)
    crop_height, crop_width = data.crop
    if (height, width) != tuple(label.shape):
        image = tv.resize(image, [height, width], antialias=True)
        label = tv.resize(label[None], [height, width], interpolation=tv.InterpolationMode.NEAREST_EXACT)[0]
    if height < crop_height or width < crop_width:
        raise ValueError(f"a crop of {crop_height}x{crop_width} does not fit into a frame of {height}x{width}")
    top, left = int(draws[1] * (height - crop_height + 1)), int(draws[2] * (width - crop_width + 1))
    image = image[:, top : top + crop_height, left : left + crop_width]
    label = label[top : top + crop_height, left : left + crop_width]
    if draws[3] < data.flip:
        image, label = image.flip(-1), label.flip(-1)
    if data.jitter:
        image = jitter(image, data.jitter, draws[4:])
    return image.contiguous(), label.contiguous()


def jitter(image: Image, strength: float, draws: Sequence[float]) -> Image:
    """SSD's colour jitter at `strength` times its ranges, each part with probability 1/2; takes 12 draws of 0..1.

    RGB gets brightness (+-32 of 255), contrast, saturation (0.5 to 1.5 each) and hue (+-18 degrees), contrast before or
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
        rgb = tv.adjust_hue(rgb, max(-0.5, min(0.5, strength * 0.05 * (2 * draws[9] - 1))))
    if fires[1] and not fires[5]:
        rgb = _contrast(rgb, _factor(strength, draws[7]))
    if fires[4]:
        thermal = _contrast(thermal, _factor(strength, draws[10]))
    return torch.cat([rgb, thermal])


def _factor(strength: float, draw: float) -> float:
    """0.5 to 1.5 at strength 1."""
    return max(0.0, 1 + strength * (draw - 0.5))


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
