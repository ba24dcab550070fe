"""Multi-scale deformable pixel decoder: mask features at stride 4 and three refined maps from four backbone maps.

b = batch, h w = height and width of a level, c = width, s = tokens of the three levels together, m = heads,
l = levels, p = sampling points, d = channels of a head
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from crm.model.feed_forward import feed_forward
from crm.model.sampling import Size, deformable_sample

LEVELS = 3  # strides 32, 16, 8, in this order
POINTS = 4  # samples of a head on a level
GROUPS = 32  # of every GroupNorm


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision as float32; float64 stays, so that the network can be compared with references in it."""
    return x if x.dtype == torch.float64 else x.float()


class _ExactLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x.to(dtype), weight.to(dtype))
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad = grad_outputs[0].flatten(0, -2)
        half = grad.to(x.dtype)
        of_x, of_weight = half @ weight, half.T @ x.flatten(0, -2)
        return of_x.to(grad.dtype).view(x.shape), of_weight.to(grad.dtype), grad.sum(0), None


def exact_linears(x: Float[Tensor, "*outer c"], layers: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """What several layers make of the same input, in its own precision also under autocast.

    Autocast then has the products of the backward pass alone, as those of every other layer.
    """
    weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    kind = x.device.type
    half = torch.is_autocast_enabled(kind) and not torch.compiler.is_compiling()
    with torch.autocast(kind, enabled=False):
        found = (
            _ExactLinear.apply(x, weight, bias, torch.get_autocast_dtype(kind)) if half else F.linear(x, weight, bias)
        )
    assert isinstance(found, Tensor)
    return found.split([layer.out_features for layer in layers], dim=-1)


def softmax_of_few(x: Float[Tensor, "*outer n"]) -> Float[Tensor, "*outer n"]:
    """`x.softmax(-1)`, which on a CPU takes several times as long for a dozen numbers as its parts one by one."""
    if x.device.type != "cpu":
        return x.softmax(dim=-1)
    x = (x - x.detach().amax(dim=-1, keepdim=True)).exp()
    return x / x.sum(dim=-1, keepdim=True)


@lru_cache(maxsize=64)
def sine_positions(size: Size, channels: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "n c"]:
    """Sine code of the cells of a map, row-major: half the channels for y, then half for x."""
    with torch.inference_mode(False):
        pairs = torch.arange(channels // 2, device=device, dtype=dtype) // 2
        period = 10_000 ** (4 * pairs / channels)
        codes = []
        for side in size:
            angle = (
                torch.arange(1, side + 1, device=device, dtype=dtype)[:, None] * 2 * math.pi / (side + 1e-6) / period
            )
            codes.append(torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=2).flatten(1))
        rows, columns = codes
        height, width = size
        return torch.cat(
            [rows[:, None].expand(height, width, -1), columns[None].expand(height, width, -1)], dim=2
        ).flatten(0, 1)


class DeformableAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.offsets = nn.Linear(width, heads * LEVELS * POINTS * 2)
        self.weights = nn.Linear(width, heads * LEVELS * POINTS)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self._initialise()

    def _initialise(self) -> None:
        """Each head looks in its own direction, 1 to 4 cells far, with equal weights (released code)."""
        angle = torch.arange(self.heads) * 2 * math.pi / self.heads
        direction = torch.stack([angle.cos(), angle.sin()], dim=1)
        direction = direction / direction.abs().amax(dim=1, keepdim=True)
        steps = direction[:, None, None] * torch.arange(1, POINTS + 1)[:, None]  # m 1 p 2
        with torch.no_grad():
            self.offsets.bias.copy_(steps.expand(-1, LEVELS, -1, -1).flatten())
        for zero in (self.offsets.weight, self.weights.weight, self.weights.bias, self.value.bias, self.output.bias):
            nn.init.zeros_(zero)
        nn.init.xavier_uniform_(self.value.weight)
        nn.init.xavier_uniform_(self.output.weight)

    def forward(
        self, query: Float[Tensor, "b s c"], source: Float[Tensor, "b s c"], sizes: tuple[Size, ...]
    ) -> Float[Tensor, "b s c"]:
        value = at_least_float32(self.value(source)).unflatten(2, (self.heads, -1))
        offsets, weights = exact_linears(query, (self.offsets, self.weights))  # where to look, and how much it counts
        offsets = offsets.unflatten(2, (self.heads, LEVELS, POINTS, 2))
        weights = softmax_of_few(weights.unflatten(2, (self.heads, LEVELS * POINTS))).unflatten(3, (LEVELS, POINTS))
        return self.output(deformable_sample(value, offsets, weights, sizes).flatten(2))


class EncoderLayer(nn.Module):
    """Deformable attention and a feed-forward part, each with residual, then LayerNorm."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm2 = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(
        self, x: Float[Tensor, "b s c"], position: Float[Tensor, "s c"], sizes: tuple[Size, ...]
    ) -> Float[Tensor, "b s c"]:
        x = self.norm1(x + self.attention(x + position, x, sizes))
        return self.norm2(x + feed_forward(x, self.linear1, self.linear2, "relu"))


class PixelDecoder(nn.Module):
    """Pixel decoder of the released code, which runs in float32 also under autocast.

    With `follows_autocast`, its convolutions and linear layers follow it. In float32 remain what decides where is
    looked, that is offsets, weights and the sampling itself; and norms, residuals and results.

    Args:
        channels: of the four backbone maps, strides 4 to 32.
        width: channels of everything inside and of the results.
        hidden: of the feed-forward parts.
    """

    def __init__(self, channels: Sequence[int], width: int, layers: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(wide, width, 1), nn.GroupNorm(GROUPS, width)) for wide in reversed(channels[1:])
        )
        self.level_embed = nn.Parameter(torch.randn(LEVELS, width))
        self.recompute = False  # layers' activations in the backward pass, to save memory
        self.follows_autocast = False
        self.layers = nn.ModuleList(EncoderLayer(width, heads, hidden) for _ in range(layers))
        self.lateral = nn.Sequential(nn.Conv2d(channels[0], width, 1, bias=False), nn.GroupNorm(GROUPS, width))
        self.smooth = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(GROUPS, width), nn.ReLU()
        )
        self.mask_features = nn.Conv2d(width, width, 1)
        for projection in self.projections:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)
        for conv in (self.lateral[0], self.smooth[0], self.mask_features):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)

    def forward(
        self, maps: Sequence[Float[Tensor, "b _ _ _"]]
    ) -> tuple[Float[Tensor, "b c h w"], list[Float[Tensor, "b c _ _"]]]:
        """Mask features at stride 4, and the refined maps of strides 32, 16, 8."""
        kind = maps[0].device.type
        follows = self.follows_autocast and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), enabled=follows):
            finest, *levels = (at_least_float32(level) for level in maps)
            levels = [
                project[1](at_least_float32(project[0](level)))
                for project, level in zip(self.projections, reversed(levels), strict=True)
            ]
            refined = self._encode(levels)
            # the other maps are channels last; one cut out of the tokens of three levels is not taken for such
            last = refined[-1].clone(memory_format=torch.channels_last)
            upsampled = F.interpolate(last, size=finest.shape[2:], mode="bilinear", align_corners=False)
            conv, norm = self.lateral
            x = norm(at_least_float32(conv(finest))) + upsampled
            conv, norm, relu = self.smooth
            x = relu(norm(at_least_float32(conv(x))))
            return at_least_float32(self.mask_features(x)), refined

    def _encode(self, levels: Sequence[Float[Tensor, "b c _ _"]]) -> list[Float[Tensor, "b c _ _"]]:
        sizes = tuple((level.shape[2], level.shape[3]) for level in levels)
        x = torch.cat([level.flatten(2) for level in levels], dim=2).transpose(1, 2)
        position = torch.cat(
            [
                sine_positions(size, x.shape[2], x.device, x.dtype) + embed
                for size, embed in zip(sizes, self.level_embed, strict=True)
            ]
        )
        for layer in self.layers:
            if self.recompute and self.training:
                x = checkpoint(layer, x, position, sizes, use_reentrant=False)
            else:
                x = layer(x, position, sizes)
        parts = x.transpose(1, 2).split([height * width for height, width in sizes], dim=2)
        return [part.unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]
