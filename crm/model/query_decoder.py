"""Masked-attention query decoder: class and mask logits of every query after each layer.

b = batch, q = queries, c = width, m = heads, d = channels of a head, n = tokens of a level, k = classes + "no object",
l = outputs, h w = stride 4
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from crm.model.pixel_decoder import LEVELS, sine_positions


class Prediction(NamedTuple):
    """Outputs of the decoder, initial queries first, last layer last; the first axis indexes and iterates like a list.

    There may be fewer images with mask logits than with class logits (see `Segmenter.head`).
    """

    class_logits: Float[Tensor, "l b q k"]
    mask_logits: Float[Tensor, "l b2 q h w"]


class Attention(nn.Module):
    """Multi-head attention with one packed projection of query, key and value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        for linear in (self.project, self.output):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        query: Float[Tensor, "b q c"],
        key: Float[Tensor, "b n c"],
        value: Float[Tensor, "b n c"],
        allowed: Bool[Tensor, "b 1 q n"] | None = None,
    ) -> Float[Tensor, "b q c"]:
        weight, bias = self.project.weight, self.project.bias
        if torch.is_autocast_enabled(query.device.type):  # once, not each third by itself
            half = torch.get_autocast_dtype(query.device.type)
            weight, bias = weight.to(half), bias.to(half)
        parts = zip((query, key, value), weight.chunk(3), bias.chunk(3), strict=True)
        q, k, v = (F.linear(x, w, shift).unflatten(2, (self.heads, -1)).transpose(1, 2) for x, w, shift in parts)
        x = attend(q, k, v, allowed)
        return self.output(x.transpose(1, 2).flatten(2))


class _Attend(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
        scores = (q * q.shape[3] ** -0.5) @ k.mT
        if allowed is not None:
            scores += torch.where(allowed, 0.0, -torch.inf)  # a tenth of the time of masked_fill, which spreads a bool
        weights = scores.softmax(3).to(v.dtype)
        ctx.save_for_backward(q, k, v, weights)
        return weights @ v

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad,), (q, k, v, weights) = grad_outputs, ctx.saved_tensors
        of_weights = (grad @ v.mT).to(weights.dtype)
        of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, 3, weights.dtype) * q.shape[3] ** -0.5
        return of_scores @ k, of_scores.mT @ q, weights.mT @ grad, None


def attend(
    q: Float[Tensor, "b m q d"],
    k: Float[Tensor, "b m n d"],
    v: Float[Tensor, "b m n d"],
    allowed: Bool[Tensor, "b 1 q n"] | None,
) -> Float[Tensor, "b m q d"]:
    """Scaled dot-product attention; of few queries, whose fused form is slow on a CPU, written out there."""
    if q.device.type != "cpu" or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    found = _Attend.apply(q, k, v, allowed)
    assert isinstance(found, Tensor)
    return found


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward; each with residual, then LayerNorm."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.cross_attention = Attention(width, heads)
        self.cross_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads)
        self.self_norm = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(
        self,
        x: Float[Tensor, "b q c"],
        place: Float[Tensor, "q c"],
        key: Float[Tensor, "b n c"],
        value: Float[Tensor, "b n c"],
        allowed: Bool[Tensor, "b 1 q n"],
    ) -> Float[Tensor, "b q c"]:
        x = self.cross_norm(x + self.cross_attention(x + place, key, value, allowed))
        placed = x + place
        x = self.self_norm(x + self.self_attention(placed, placed, x))
        return self.norm(x + self.linear2(F.relu(self.linear1(x))))


def attention_mask(embed: Float[Tensor, "b q c"], features: Float[Tensor, "b c n"]) -> Bool[Tensor, "b 1 q n"]:
    """Where a query may look: where its own mask is at least 0.5, or everywhere if that is nowhere."""
    inside = embed.detach() @ features >= 0
    return (inside | ~inside.any(dim=2, keepdim=True))[:, None]


class _MaskProduct(torch.autograd.Function):
    """Of all masks the loss looks at those that have a class: the gradient of the others is 0, and is left out."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx: Any, embed: Tensor, features: Tensor) -> Tensor:
        masks = embed @ features
        ctx.save_for_backward(embed.to(masks.dtype), features.to(masks.dtype))
        ctx.kinds = embed.dtype, features.dtype
        return masks

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        embed, features = ctx.saved_tensors
        of_embed, of_features = torch.zeros_like(embed), torch.empty_like(features)
        for image, grad in enumerate(grad_outputs[0]):
            used = grad.any(dim=1).nonzero()[:, 0]
            of_embed[image, used] = grad[used] @ features[image].T
            torch.mm(embed[image, used].T, grad[used], out=of_features[image])
        return of_embed.to(ctx.kinds[0]), of_features.to(ctx.kinds[1])


def mask_product(embed: Float[Tensor, "b q c"], features: Float[Tensor, "b c n"]) -> Float[Tensor, "b q n"]:
    """`embed @ features`; on a CPU, where that costs no waiting, the gradient of few masks costs as little."""
    if embed.device.type != "cpu" or torch.compiler.is_compiling():
        return embed @ features
    found = _MaskProduct.apply(embed, features)
    assert isinstance(found, Tensor)
    return found


class QueryDecoder(nn.Module):
    """Query decoder of the released code. Layer i looks at level i mod 3 (strides 32, 16, 8).

    The attention masks come from mask features resized to the level, which equals resizing the mask logits: both are
    linear. So intermediate mask logits exist only where a loss needs them.
    """

    def __init__(self, classes: int, width: int, queries: int, layers: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.query_feat = nn.Embedding(queries, width)
        self.query_embed = nn.Embedding(queries, width)
        self.level_embed = nn.Embedding(LEVELS, width)
        self.layers = nn.ModuleList(DecoderLayer(width, heads, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.class_embed = nn.Linear(width, classes + 1)
        self.mask_embed = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        )

    def forward(
        self,
        features: Float[Tensor, "b c h w"],
        levels: Sequence[Float[Tensor, "b c _ _"]],
        deep: bool,
        with_masks: int,
    ) -> Prediction:
        """Class logits of all images, mask logits of the first `with_masks`.

        Args:
            features: mask features.
            levels: maps of strides 32, 16, 8.
            deep: every output, not the last alone.
        """
        keys, values, small = self._memory(features, levels)
        x = self.query_feat.weight.expand(len(features), -1, -1)
        outputs = [self.norm(x)]
        embeds = [self.mask_embed(outputs[0])]
        for i, layer in enumerate(self.layers):
            level = i % LEVELS
            allowed = attention_mask(embeds[-1], small[level])
            x = layer(x, self.query_embed.weight, keys[level], values[level], allowed)
            outputs.append(self.norm(x))
            embeds.append(self.mask_embed(outputs[-1]))
        kept = slice(None) if deep else slice(-1, None)
        embed = torch.stack(embeds[kept], dim=1)
        if with_masks < len(features):  # a slice, of all as well, costs its backward pass
            embed, features = embed[:with_masks], features[:with_masks]
        masks = mask_product(embed.flatten(1, 2), features.flatten(2))
        masks = masks.view(*embed.shape[:3], *features.shape[2:])
        return Prediction(self.class_embed(torch.stack(outputs[kept])), masks.transpose(0, 1))

    def _memory(
        self, features: Float[Tensor, "b c h w"], levels: Sequence[Float[Tensor, "b c _ _"]]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Keys and values (b n c) and mask features (b c n) of the levels that some layer looks at."""
        keys, values, small = [], [], []
        for level, embed in zip(levels[: len(self.layers)], self.level_embed.weight, strict=False):
            size = (level.shape[2], level.shape[3])
            values.append(level.flatten(2).transpose(1, 2) + embed)
            keys.append(values[-1] + sine_positions(size, level.shape[1], level.device, level.dtype))
            with torch.no_grad():
                resized = F.interpolate(features.detach(), size=size, mode="bilinear", align_corners=False)
            small.append(resized.flatten(2))
        return keys, values, small
