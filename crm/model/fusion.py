"""Fusion of the maps of two modalities: each family member makes the part of one level, a map of two.

b = batch, c = channels, h w = height and width of the level, n = its places (h * w)

Every fusion runs on the four output maps of two branches that know nothing of each other, so that a branch can be
computed once and fused many times. Methods that let the branches exchange inside (CMX, TokenFusion) are therefore our
reading of them: their exchange is applied to the four maps. A BatchNorm per level follows each fusion.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from crm.model.norm import BatchNorm

Map = Float[Tensor, "b c h w"]
Tokens = Float[Tensor, "b n c"]
Seen = Float[Tensor, "b 2 h w"]
Scalar = Float[Tensor, ""]

EXCHANGED = 0.02  # TokenFusion replaces tokens whose score is below this
SQUEEZE = 16  # reduction of the squeeze-and-excitation of the gate


@dataclass(frozen=True)
class Level:
    """What a fusion is made for."""

    channels: int
    heads: int  # attention heads of the Swin stage
    norm: Callable[[int], BatchNorm]  # the network's BatchNorm over so many channels
    sparsity: float  # weight of what a fusion adds to the loss


class Fusion(nn.Module):
    """Two maps of one level to one of the same shape."""

    def forward(self, rgb: Map, thermal: Map, seen: Seen | None, masked: bool) -> Map:
        """The fused map, before the BatchNorm that follows.

        Args:
            seen: share of each place that is there in RGB and in thermal; None is all of it.
            masked: the second, masked input of a training step, which a BatchNorm inside must know.
        """
        raise NotImplementedError

    def readout(self, rgb: Map, thermal: Map) -> dict[str, Scalar]:
        """What there is to log about these maps, by name; means over batch and places."""
        return {}

    def penalty(self, rgb: Map, thermal: Map) -> Scalar | None:
        """What these maps add to the loss, summed over the images; None: nothing."""
        return None


Function = Callable[[Map, Map], Map]


def maximum(rgb: Map, thermal: Map) -> Map:
    """Elementwise maximum: the released code's choice on every data set. c operations per place."""
    return torch.maximum(rgb, thermal)


def add(rgb: Map, thermal: Map) -> Map:
    """Elementwise sum: the other choice of the released code. c operations per place."""
    return rgb + thermal


class Plain(Fusion):
    """A function of two maps, without parameters."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, rgb: Map, thermal: Map, seen: Seen | None, masked: bool) -> Map:
        return self.function(rgb, thermal)


def plain(function: Function) -> Callable[[Level], Fusion]:
    """A function as a member of the family."""
    return lambda level: Plain(function)


class Average(Fusion):
    """The mean of what is available: a place hidden or missing in one modality is the other's alone.

    Where a coarse place is hidden in part, the weights are the shares that are seen; where both are hidden, the plain
    mean. 3c operations per place.
    """

    def __init__(self, level: Level) -> None:
        super().__init__()

    def forward(self, rgb: Map, thermal: Map, seen: Seen | None, masked: bool) -> Map:
        if seen is None:
            return (rgb + thermal) / 2
        total = seen.sum(dim=1, keepdim=True)
        weights = torch.where(total > 0, seen / total.clamp_min(torch.finfo(seen.dtype).tiny), 0.5)
        return weights[:, :1] * rgb + weights[:, 1:] * thermal


class Concat(Fusion):
    """1x1 convolution of both maps, without the bias that the BatchNorm takes away. 2c^2 multiply-adds per place."""

    def __init__(self, level: Level) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * level.channels, level.channels, 1, bias=False)

    def forward(self, rgb: Map, thermal: Map, seen: Seen | None, masked: bool) -> Map:
        return self.conv(torch.cat([rgb, thermal], dim=1))


class Gated(Fusion):
    """A convex combination at every place, whose weights say what the network relies on.

    Squeeze-and-excitation over the channels of both maps [Hu et al., CVPR 2018], then a 1x1 convolution to one score
    per modality and a softmax over the two. 8c multiply-adds per place, and c^2 / 2 per image.
    """

    def __init__(self, level: Level) -> None:
        super().__init__()
        both = 2 * level.channels
        hidden = max(both // SQUEEZE, 4)
        self.squeeze = nn.Sequential(nn.Linear(both, hidden), nn.ReLU(), nn.Linear(hidden, both), nn.Sigmoid())
        self.gate = nn.Conv2d(both, 2, 1)

    def weights(self, rgb: Map, thermal: Map) -> Float[Tensor, "b 2 h w"]:
        """Weight of RGB and of thermal at every place; they add up to 1."""
        both = torch.cat([rgb, thermal], dim=1)
        excited = both * self.squeeze(both.mean(dim=(2, 3)))[:, :, None, None]
        return self.gate(excited).softmax(dim=1)

    def forward(self, rgb: Map, thermal: Map, seen: Seen | None, masked: bool) -> Map:
        weights = self.weights(rgb, thermal)
        return weights[:, :1] * rgb + weights[:, 1:] * thermal

    def readout(self, rgb: Map, thermal: Map) -> dict[str, Scalar]:
        return {"rgb": self.weights(rgb, thermal)[:, 0].mean()}


class Rectify(nn.Module):
    """FRM of CMX: each map gets from the other what channel and place weights let through, half and half."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 4 * channels
        self.channel = nn.Sequential(nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, wide // 2), nn.Sigmoid())
        self.place = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 1), nn.ReLU(), nn.Conv2d(channels, 2, 1), nn.Sigmoid()
        )

    def forward(self, rgb: Map, thermal: Map) -> tuple[Map, Map]:
        both = torch.cat([rgb, thermal], dim=1)
        pooled = torch.cat([both.mean(dim=(2, 3)), both.amax(dim=(2, 3))], dim=1)
        channel = self.channel(pooled)[:, :, None, None].chunk(2, dim=1)
        place = self.place(both).chunk(2, dim=1)
        from_rgb, from_thermal = ((channel[i] + place[i]) / 2 * x for i, x in enumerate((rgb, thermal)))
        return rgb + from_thermal, thermal + from_rgb


class CrossAttention(nn.Module):
    """First half of FFM of CMX: each stream asks the other's context, a (d, d) matrix per head, not (n, n).

    Args:
        heads: of the attention; divides the channels.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.split = nn.ModuleList(nn.Linear(channels, 2 * channels) for _ in range(2))
        self.key_value = nn.ModuleList(nn.Linear(channels, 2 * channels, bias=False) for _ in range(2))
        self.end = nn.ModuleList(nn.Linear(2 * channels, channels) for _ in range(2))
        self.norm = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))

    def forward(self, rgb: Tokens, thermal: Tokens) -> tuple[Tokens, Tokens]:
        streams = (rgb, thermal)
        halves = [F.relu(split(x)).chunk(2, dim=2) for split, x in zip(self.split, streams, strict=True)]
        contexts = [self._context(project(u)) for project, (_, u) in zip(self.key_value, halves, strict=True)]
        asked = [
            (self._by_head(u) @ context).transpose(1, 2).flatten(2)
            for (_, u), context in zip(halves, reversed(contexts), strict=True)
        ]
        first, second = (
            self.norm[i](streams[i] + self.end[i](torch.cat([halves[i][0], asked[i]], dim=2))) for i in (0, 1)
        )
        return first, second

    def _by_head(self, x: Tokens) -> Float[Tensor, "b heads n d"]:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def _context(self, key_value: Float[Tensor, "b n c2"]) -> Float[Tensor, "b heads d d"]:
        """The sum over all places, not their mean, goes into the softmax (code of CMX)."""
        key, value = (self._by_head(x) for x in key_value.chunk(2, dim=2))
        return (key.mT @ value * key.shape[3] ** -0.5).softmax(dim=2)


class RectifyAndMix(Fusion):
    """FRM + FFM of CMX [Zhang et al., T-ITS 2023, and its code], attention heads as in the Swin stage, reduction 1.

    Our reading: applied to the four maps, the branches stay independent. In CMX the rectified maps also go on to the
    next stage. The last norm of FFM is the BatchNorm that follows every fusion here. About 17c^2 + 4c^2 / heads
    multiply-adds per place, and 24c^2 per image.
    """

    def __init__(self, level: Level) -> None:
        super().__init__()
        channels = level.channels
        self.rectify = Rectify(channels)
        self.cross = CrossAttention(channels, level.heads)
        self.residual = nn.Conv2d(2 * channels, channels, 1, bias=False)
        self.embed = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 1),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
        )
        self.norm = level.norm(channels)
        self.apply(_as_in_cmx)

    def forward(self, rgb: Map, thermal: Map, seen: Seen | None, masked: bool) -> Map:
        streams = self.cross(*(x.flatten(2).transpose(1, 2) for x in self.rectify(rgb, thermal)))
        both = torch.cat(streams, dim=2).transpose(1, 2).unflatten(2, rgb.shape[2:])
        return self.residual(both) + self.norm(self.embed(both), masked)


def _as_in_cmx(module: nn.Module) -> None:
    """Initial values: linear layers truncated normal of std 0.02, convolutions normal by fan-out, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        height, width = module.kernel_size
        nn.init.normal_(module.weight, std=math.sqrt(2 * module.groups / (height * width * module.out_channels)))
    if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
        nn.init.zeros_(module.bias)


class TokenExchange(Fusion):
    """TokenFusion [Wang et al., CVPR 2022, and its code]: a token of little use gives way to the other modality's.

    A score net per modality gives every token a score in (0, 1) that the token is multiplied by; below EXCHANGED the
    other's token stands there instead. `penalty` is the L1 norm of the scores, without which nothing ever falls so low.
    Our reading: applied to the four maps once, the branches stay independent; in TokenFusion it is inside every block.
    Its learned average of two predictions is here one of two maps. About 3.3c^2 multiply-adds per place.
    """

    def __init__(self, level: Level) -> None:
        super().__init__()
        sizes = [level.channels, level.channels, level.channels // 2, level.channels // 4]
        self.nets = nn.ModuleList(_score_net(sizes) for _ in range(2))
        self.mix = nn.Parameter(torch.ones(2))
        self.sparsity = level.sparsity

    def scores(self, rgb: Map, thermal: Map) -> Float[Tensor, "b 2 h w"]:
        """Of every token of RGB and of thermal."""
        nets = zip(self.nets, (rgb, thermal), strict=True)
        return torch.stack([net(x.permute(0, 2, 3, 1)).softmax(dim=3)[..., 0] for net, x in nets], dim=1)

    def forward(self, rgb: Map, thermal: Map, seen: Seen | None, masked: bool) -> Map:
        scores = self.scores(rgb, thermal)
        rgb, thermal = scores[:, :1] * rgb, scores[:, 1:] * thermal
        exchanged = scores < EXCHANGED
        first = torch.where(exchanged[:, :1], thermal, rgb)
        second = torch.where(exchanged[:, 1:], rgb, thermal)
        mix = self.mix.softmax(dim=0)
        return mix[0] * first + mix[1] * second

    def readout(self, rgb: Map, thermal: Map) -> dict[str, Scalar]:
        scores = self.scores(rgb, thermal)
        shares = (scores < EXCHANGED).to(scores.dtype).mean(dim=(0, 2, 3))
        return {"rgb": self.mix.softmax(dim=0)[0], "rgb_exchanged": shares[0], "thermal_exchanged": shares[1]}

    def penalty(self, rgb: Map, thermal: Map) -> Scalar | None:
        return self.sparsity * self.scores(rgb, thermal).sum() if self.sparsity else None


def _score_net(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = [nn.LayerNorm(sizes[0])]
    for i, (narrow, wide) in enumerate(zip(sizes[1:], sizes, strict=False)):
        layers += [nn.GELU()] * bool(i) + [nn.Linear(wide, narrow)]
    return nn.Sequential(*layers, nn.GELU(), nn.Linear(sizes[-1], 2))


# name -> what makes the fusion of one level
FUSIONS: dict[str, Callable[[Level], Fusion]] = {
    "max": plain(maximum),
    "add": plain(add),
    "average": Average,
    "concat": Concat,
    "gated": Gated,
    "frm_ffm": RectifyAndMix,
    "token_exchange": TokenExchange,
}
