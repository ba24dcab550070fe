"""Frames as the network sees them: under a condition, or augmented and masked as in training.

Everything goes the way of the real thing, normalisation and padding included, and back to grey levels.

b = batch, h w = height, width in pixels
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from crm.conditions import Condition
from crm.config import Config
from crm.corruptions import corrupt, hidden_tokens, moved_label
from crm.data.frames import Frame
from crm.data.loader import view
from crm.data.show import View
from crm.data.specs import DatasetSpec
from crm.data.transforms import Batch, Pair, augment, collate, to_tensors
from crm.masking import TOKEN, configured_masks
from crm.randomness import derive


def under(frames: Sequence[Frame], spec: DatasetSpec, condition: Condition) -> list[View]:
    """What an evaluation under `condition` gives the network; hidden is what a mask token or a detour stands in for."""
    pairs = []
    for frame in frames:
        rgb = corrupt(frame, "rgb", condition.rgb, spec, condition.seed)
        thermal = corrupt(frame, "thermal", condition.thermal, spec, condition.seed)
        image = torch.from_numpy(np.concatenate([rgb, thermal], axis=2)).permute(2, 0, 1)
        sides = {"rgb": condition.rgb, "thermal": condition.thermal}
        label = moved_label(frame.label, sides, frame, condition.seed, spec.ignore_index)
        pairs.append((image, torch.from_numpy(label.copy())))
    batch = collate(pairs, spec)
    padded = (batch.label.shape[1], batch.label.shape[2])
    hidden = torch.zeros(len(frames), 2, *padded, dtype=torch.bool)
    for side, (modality, how) in enumerate((("rgb", condition.rgb), ("thermal", condition.thermal))):
        if how.kind == "missing_route":
            hidden[:, side] = True
        elif (tokens := hidden_tokens(frames, modality, how, condition.seed, padded)) is not None:
            hidden[:, side] = torch.from_numpy(tokens.repeat(TOKEN, axis=1).repeat(TOKEN, axis=2))
    return _views(frames, spec, batch, hidden)


def in_training(
    frames: Sequence[Frame], spec: DatasetSpec, config: Config, *, augmented: bool, masked: bool
) -> list[View]:
    """What the first step of a run gives the network, if these frames are its batch."""

    @cache
    def pair(place: int, purpose: str) -> Pair:
        generator = torch.Generator().manual_seed(derive(config.seed, 0, purpose, place))
        return augment(frames[place], config.data, generator) if augmented else to_tensors(frames[place])

    places = range(len(frames))
    if masked and config.masking.view != "clean":
        batch = view(config, 0, places, len(frames), pair, spec)
    else:
        batch = collate([pair(place, "augment") for place in places], spec)
    return _views(frames, spec, batch, _masks(config, batch) if masked else None)


def _masks(config: Config, batch: Batch) -> Tensor | None:
    """Pixels hidden at the first step, bool (b, 2, h, w); as in training, the masks end where the padding begins."""
    if config.masking.kind == "none":
        return None
    size, generator = (
        (batch.label.shape[1], batch.label.shape[2]),
        torch.Generator().manual_seed(derive(config.seed, 0, "mask")),
    )
    hidden = configured_masks(config.masking, len(batch.label), size, batch.valid[0], generator)
    return hidden.repeat_interleave(TOKEN, dim=2).repeat_interleave(TOKEN, dim=3)


def _views(frames: Sequence[Frame], spec: DatasetSpec, batch: Batch, hidden: Tensor | None) -> list[View]:
    """Normalisation undone, to the nearest grey level; the padding stays, as the network sees it too."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    levels = (batch.image * std + mean).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    views = []
    for i, frame in enumerate(frames):
        rgb, thermal = np.ascontiguousarray(levels[i, ..., :3]), np.ascontiguousarray(levels[i, ..., 3])
        seen = replace(frame, rgb=rgb, thermal=thermal, label=batch.label[i].numpy())
        views.append(View(seen, None if hidden is None else hidden[i].numpy(), padded=seen.size != batch.valid[i]))
    return views
