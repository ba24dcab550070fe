"""A training step and an evaluation arranged as in the released code, from the parts of our own network.

Two backbone passes, six head passes one after another, full-size mask logits after every layer, matching image by
image and layer by layer with a transfer each, grid_sample for deformable attention with all samples stacked, no fused
attention, an optimiser group per tensor. The same weights give the same losses as `crm.objective`, to rounding.

b = batch, s = tokens, m = heads, d = channels of a head, q = queries, n = pairs, p = points
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from crm.config import Loss, Optim
from crm.model import pixel_decoder
from crm.model.backbone import Block, Merge
from crm.model.pixel_decoder import LEVELS, sine_positions
from crm.model.query_decoder import Attention, Prediction, QueryDecoder
from crm.model.sampling import Size
from crm.model.segmenter import Features, Maps, Segmenter
from crm.model.window_attention import shift_mask
from crm.optim import build_optimizer
from crm.targets import Targets

Part = Callable[[str], Any]  # a context in which a part of the step is measured


@contextmanager
def as_released() -> Iterator[None]:
    """Inside, the parts of the network are computed as the released code does."""
    with ExitStack() as stack:
        for part, forward in ((Block, block), (Merge, merge), (pixel_decoder.EncoderLayer, encoder_layer)):
            stack.enter_context(patch.object(part, "forward", forward))
        stack.enter_context(patch.object(pixel_decoder, "deformable_sample", stacked_samples))
        yield


def losses(
    model: Segmenter, image: Tensor, hidden: Tensor, targets: Targets, loss: Loss, draw: torch.Generator, part: Part
) -> dict[str, Tensor]:
    """The six terms; points are drawn in the released order."""
    with as_released():
        with part("backbones"):
            clean, masked = features(model, image, None), features(model, image, hidden)
        found = [head(model, maps, part) for maps in (*clean, *masked)]
    fused, rgb, thermal, fused_masked, rgb_masked, thermal_masked = found
    terms = {}
    with part("matching and losses"):
        for name, prediction in (("fused", fused), ("rgb", rgb), ("thermal", thermal), ("masked", fused_masked)):
            terms[name] = getattr(loss, name) * criterion(prediction, targets, loss, draw)
        teacher = fused.class_logits[-1].detach()
        students = [(teacher - one.class_logits[-1]).abs().mean() for one in (fused_masked, rgb_masked, thermal_masked)]
        terms["complementary"] = loss.complementary * students[0]
        terms["non_local"] = loss.non_local * (students[1] + students[2])
    return terms


@torch.no_grad()
def predict(model: Segmenter, image: Tensor) -> Tensor:
    """Class map of one batch."""
    with as_released():
        prediction = head(model, features(model, image, None).fused, lambda name: ExitStack())
    masks = F.interpolate(prediction.mask_logits[-1], image.shape[2:], mode="bilinear", align_corners=False)
    probability = prediction.class_logits[-1].softmax(-1)[..., :-1]
    return torch.einsum("bqk,bqhw->bkhw", probability, masks.sigmoid()).argmax(1)


def optimizer(model: nn.Module, optim: Optim) -> AdamW:
    """One group per tensor, one tensor after another."""
    groups = build_optimizer(model, optim, fused=False).param_groups
    return AdamW(
        [{**group, "params": [one], "foreach": False} for group in groups for one in group["params"]], foreach=False
    )


def features(model: Segmenter, image: Tensor, hidden: Tensor | None) -> Features:
    rgb, thermal = model.branch("rgb", image, hidden), model.branch("thermal", image, hidden)
    return Features(model.fuse(rgb, thermal), rgb, thermal)


def head(model: Segmenter, maps: Maps, part: Part) -> Prediction:
    with part("pixel decoder"):
        mask_features, levels = model.pixel_decoder(maps)
    with part("query decoder"):
        return query_decoder(model.query_decoder, mask_features, levels)


def block(of: Block, x: Tensor) -> Tensor:
    x = x + of.drop_path1(window_attention(of, of.norm1(x)))
    return x + of.drop_path2(of.mlp(of.norm2(x)))


def merge(of: Merge, x: Tensor) -> Tensor:
    b, height, width, channels = x.shape
    x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
    x = x.reshape(b, x.shape[1] // 2, 2, x.shape[2] // 2, 2, channels).permute(0, 1, 3, 4, 2, 5).flatten(3)
    return of.reduction(of.norm(x))


def encoder_layer(of: pixel_decoder.EncoderLayer, x: Tensor, position: Tensor, sizes: tuple[Size, ...]) -> Tensor:
    x = of.norm1(x + of.attention(x + position, x, sizes))
    return of.norm2(x + of.linear2(F.relu(of.linear1(x))))


def window_attention(block: Block, x: Tensor) -> Tensor:
    """Padded, rolled, cut into windows, and all of that through the linear layers."""
    b, h, w, c = x.shape
    window, shift = block.window_size[0], block.shift_size[0]
    x = F.pad(x, (0, 0, 0, -w % window, 0, -h % window))
    height, width = x.shape[1:3]
    if shift:
        x = x.roll((-shift, -shift), (1, 2))
    x = x.view(b, height // window, window, width // window, window, c).transpose(2, 3).reshape(-1, window**2, c)
    heads = block.attn.num_heads
    q, k, v = block.attn.qkv(x).reshape(len(x), window**2, 3, heads, -1).permute(2, 0, 3, 1, 4)
    scores = (q * block.attn.scale) @ k.mT
    bias = block.attn.relative_position_bias_table[block.attn.relative_position_index.view(-1)]
    scores = scores + bias.view(window**2, window**2, heads).permute(2, 0, 1)
    if shift:
        apart = shift_mask(height, width, window, shift, x.device).clamp(min=-100)
        scores = (scores.view(b, -1, *scores.shape[1:]) + apart).view_as(scores)
    x = block.attn.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(len(x), window**2, c))
    x = x.view(b, height // window, width // window, window, window, c).transpose(2, 3).reshape(b, height, width, c)
    return (x.roll((shift, shift), (1, 2)) if shift else x)[:, :h, :w]


def stacked_samples(value: Tensor, offsets: Tensor, weights: Tensor, sizes: tuple[tuple[int, int], ...]) -> Tensor:
    """Deformable attention's PyTorch fall-back: all samples of all levels, then their weighted sum."""
    b, _, heads, channels = value.shape
    places = []
    for height, width in sizes:
        y, x = ((torch.arange(side, device=value.device, dtype=value.dtype) + 0.5) / side for side in (height, width))
        places.append(torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=2).flatten(0, 1))
    limits = value.new_tensor([[width, height] for height, width in sizes])
    grids = 2 * (torch.cat(places)[:, None, None, None] + offsets / limits[:, None]) - 1
    samples = []
    for level, (part, size) in enumerate(zip(value.split([h * w for h, w in sizes], dim=1), sizes, strict=True)):
        maps = part.flatten(2).transpose(1, 2).reshape(b * heads, channels, *size)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = weights.transpose(1, 2).flatten(0, 1).flatten(2)[:, None]
    found = (torch.stack(samples, dim=-2).flatten(-2) * weights).sum(-1)
    return found.view(b, heads * channels, -1).transpose(1, 2).contiguous().unflatten(2, (heads, channels))


def attention(of: Attention, query: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None = None) -> Tensor:
    """Scores, softmax and sum as three products; `blocked` is there once per head."""
    parts = zip((query, key, value), of.project.weight.chunk(3), of.project.bias.chunk(3), strict=True)
    q, k, v = (F.linear(x, w, bias).unflatten(2, (of.heads, -1)).transpose(1, 2).flatten(0, 1) for x, w, bias in parts)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if blocked is not None:
        scores = scores + torch.zeros_like(scores).masked_fill_(blocked, -torch.inf)
    found = (scores.softmax(-1) @ v).unflatten(0, (-1, of.heads)).transpose(1, 2).flatten(2)
    return of.output(found)


def query_decoder(of: QueryDecoder, features: Tensor, levels: list[Tensor]) -> Prediction:
    """Mask logits of full size after every layer; the attention masks are made from them."""
    values = [
        level.flatten(2).transpose(1, 2) + embed for level, embed in zip(levels, of.level_embed.weight, strict=True)
    ]
    sizes = [(level.shape[2], level.shape[3]) for level in levels]
    keys = [
        value + sine_positions(size, value.shape[2], value.device, value.dtype)
        for value, size in zip(values, sizes, strict=True)
    ]
    x, place = of.query_feat.weight.expand(len(features), -1, -1), of.query_embed.weight
    classes, masks = [], []

    def say(size: tuple[int, int]) -> Tensor:
        said = of.norm(x)
        classes.append(of.class_embed(said))
        masks.append(torch.einsum("bqc,bchw->bqhw", of.mask_embed(said), features))
        resized = F.interpolate(masks[-1], size=size, mode="bilinear", align_corners=False)
        heads = of.layers[0].get_submodule("cross_attention").heads if len(of.layers) else 1
        blocked = (resized.sigmoid().flatten(2)[:, None].repeat(1, heads, 1, 1).flatten(0, 1) < 0.5).detach()
        blocked[torch.where(blocked.sum(-1) == blocked.shape[-1])] = False
        return blocked

    blocked = say(sizes[0])
    for i, layer in enumerate(of.layers):
        level = i % LEVELS
        cross, own = layer.get_submodule("cross_attention"), layer.get_submodule("self_attention")
        assert isinstance(cross, Attention) and isinstance(own, Attention)
        x = layer.get_submodule("cross_norm")(x + attention(cross, x + place, keys[level], values[level], blocked))
        x = layer.get_submodule("self_norm")(x + attention(own, x + place, x + place, x))
        hidden = F.relu(layer.get_submodule("linear1")(x))
        x = layer.get_submodule("norm")(x + layer.get_submodule("linear2")(hidden))
        blocked = say(sizes[(i + 1) % LEVELS])
    return Prediction(torch.stack(classes), torch.stack(masks))


# ---------------------------------------------------------------------------------------------- criterion


def criterion(prediction: Prediction, targets: Targets, loss: Loss, draw: torch.Generator) -> Tensor:
    """Weighted sum over all decoder outputs, the last one first."""
    inside = targets.labels[:, 1:-1, 1:-1]
    masks = [
        (image == torch.tensor(present, device=image.device)[:, None, None]).to(prediction.mask_logits.dtype)
        for image, present in zip(inside, targets.classes, strict=True)
    ]
    order = (-1, *range(len(prediction.class_logits) - 1))
    found = [
        _one_output(prediction.class_logits[i], prediction.mask_logits[i], targets, masks, loss, draw) for i in order
    ]
    return torch.stack(found).sum()


def _one_output(
    classes: Tensor, logits: Tensor, targets: Targets, masks: list[Tensor], loss: Loss, draw: torch.Generator
) -> Tensor:
    pairs = [
        _matched(classes[i], logits[i], present, masks[i], loss, draw) for i, present in enumerate(targets.classes)
    ]
    wanted = torch.full(classes.shape[:2], classes.shape[2] - 1, device=classes.device)
    for i, (query, column) in enumerate(pairs):
        wanted[i, query] = torch.tensor(targets.classes[i], device=classes.device)[column]
    weights = classes.new_ones(classes.shape[2])
    weights[-1] = loss.no_object
    of_classes = F.cross_entropy(classes.transpose(1, 2), wanted, weights)
    ours = torch.cat([logits[i, query] for i, (query, _) in enumerate(pairs)])[:, None]
    theirs = torch.cat([masks[i][column] for i, (_, column) in enumerate(pairs)])[:, None]
    count = max(len(ours), 1)
    kept = int(loss.importance * loss.points)
    with torch.no_grad():
        tried = _uniform(draw, len(ours), int(loss.oversample * loss.points), ours.device)
        nearest = (-_sampled(ours, tried)[:, 0].abs()).topk(kept, dim=1).indices
        chosen = tried.gather(1, nearest[:, :, None].expand(-1, -1, 2))
        where = torch.cat([chosen, _uniform(draw, len(ours), loss.points - kept, ours.device)], dim=1)
        labels = _sampled(theirs, where)[:, 0]
    values = _sampled(ours, where)[:, 0]
    of_masks = F.binary_cross_entropy_with_logits(values, labels, reduction="none").mean(1).sum() / count
    probability = values.sigmoid()
    overlap = 2 * (probability * labels).sum(1)
    of_dice = (1 - (overlap + 1) / (probability.sum(1) + labels.sum(1) + 1)).sum() / count
    return loss.class_weight * of_classes + loss.mask_weight * of_masks + loss.dice_weight * of_dice


@torch.no_grad()
def _matched(
    classes: Tensor, logits: Tensor, present: tuple[int, ...], masks: Tensor, loss: Loss, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Queries of one image, and the places of their classes, ascending by query."""
    where = _uniform(draw, 1, loss.points, logits.device)
    labels = _sampled(masks[:, None], where.expand(len(masks), -1, -1))[:, 0]
    values = _sampled(logits[:, None], where.expand(len(logits), -1, -1))[:, 0]
    of_classes = -classes.softmax(-1)[:, list(present)]
    positive = F.binary_cross_entropy_with_logits(values, torch.ones_like(values), reduction="none")
    negative = F.binary_cross_entropy_with_logits(values, torch.zeros_like(values), reduction="none")
    of_masks = (positive @ labels.T + negative @ (1 - labels).T) / values.shape[1]
    probability = values.sigmoid()
    of_dice = 1 - (2 * probability @ labels.T + 1) / (probability.sum(1)[:, None] + labels.sum(1)[None] + 1)
    costs = loss.mask_weight * of_masks + loss.class_weight * of_classes + loss.dice_weight * of_dice
    query, column = linear_sum_assignment(costs.cpu())
    return torch.as_tensor(query, device=logits.device), torch.as_tensor(column, device=logits.device)


def _sampled(maps: Tensor, points: Tensor) -> Tensor:
    return F.grid_sample(maps, 2 * points[:, :, None].to(maps.dtype) - 1, align_corners=False)[..., 0]


def _uniform(draw: torch.Generator, rows: int, points: int, device: torch.device) -> Tensor:
    return torch.rand(rows, points, 2, generator=draw, device=draw.device).to(device)
