"""Colours as hue, saturation and value, the way OpenCV computes them on floats and on bytes.

The released code's colour jitter rests on both: what OpenCV means by hue and saturation depends on the array's type,
which is how the jitter breaks on floats (`crm.data.transforms.released_jitter`). The formulas are those of OpenCV's
`cvtColor`, restated; ours need no OpenCV.

h w = height, width
"""

import torch
from jaxtyping import Float
from torch import Tensor

Channels = Float[Tensor, "3 h w"]
TINY = 2.0**-23  # FLT_EPSILON, which OpenCV adds to denominators


def float_hsv(rgb: Channels) -> Channels:
    """Hue 0..360, saturation 0..1 and value of RGB on any scale: value keeps the scale."""
    red, green, blue = rgb
    value, low = rgb.amax(dim=0), rgb.amin(dim=0)
    spread = value - low
    turn = 60.0 / (spread + TINY)
    hue = torch.where(value == green, (blue - red) * turn + 120.0, (red - green) * turn + 240.0)
    hue = torch.where(value == red, (green - blue) * turn, hue)
    hue = torch.where(hue < 0, hue + 360.0, hue)
    return torch.stack([hue, spread / (value.abs() + TINY), value])


def float_rgb(hsv: Channels) -> Channels:
    """RGB of hue 0..360, saturation 0..1 and value, on the value's scale."""
    return _rgb(hsv, 360)


def _rgb(hsv: Channels, full: int) -> Channels:
    """RGB of a hue of which `full` is once round."""
    hue, saturation, value = hsv
    sixth = (hue * torch.tensor(6 / full)) % 6.0
    sector = sixth.floor()
    part = sixth - sector
    low = value * (1 - saturation)
    falling, rising = value * (1 - saturation * part), value * (1 - saturation * (1 - part))
    index = sector.long().clamp_(0, 5)[None]

    def channel(*sectors: Tensor) -> Tensor:
        return torch.stack(sectors).gather(0, index)[0]

    red = channel(value, falling, low, low, rising, value)
    green = channel(rising, value, value, falling, low, low)
    blue = channel(low, low, rising, value, value, falling)
    return torch.stack([red, green, blue])


def byte_hsv(rgb: Channels) -> Channels:
    """Hue 0..179 (steps of two degrees), saturation and value 0..255 of whole RGB values 0..255; whole numbers.

    Fixed-point division with tables of 12 bits, as OpenCV does it.
    """
    red, green, blue = rgb.to(torch.int64)
    value, low = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    spread = value - low
    sixths = torch.where(value == green, blue - red + 2 * spread, red - green + 4 * spread)
    sixths = torch.where(value == red, green - blue, sixths)
    hue = (sixths * _per(30.0)[spread] + 2048) >> 12
    saturation = (spread * _per(255.0)[value] + 2048) >> 12
    return torch.stack([torch.where(hue < 0, hue + 180, hue), saturation, value]).to(torch.float32)


def _per(scale: float) -> Tensor:
    """scale / i in fixed point, for i = 0 to 255; 0 for 0."""
    table = (scale * 4096 / torch.arange(256, dtype=torch.float64).clamp_(min=1)).round().to(torch.int64)
    table[0] = 0
    return table


def byte_rgb(hsv: Channels) -> Channels:
    """Whole RGB values 0..255 of hue 0..179, saturation and value 0..255; fractions are cut off, as OpenCV 4 does."""
    hue, saturation, value = hsv
    per_255 = torch.tensor(1 / 255)
    return (_rgb(torch.stack([hue, saturation * per_255, value * per_255]), 180) * 255.0).trunc().clamp_(0, 255)
