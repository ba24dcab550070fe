"""Frames as the network sees them: under a condition, or augmented and masked as in training.

Everything goes the way of the real thing, normalisation and padding included, and back to grey levels.

b = batch, h w = height, width in pixels
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from crm.conditions import Condition, Degradation
from crm.config import Config
from crm.corruptions import corrupt
from crm.data.frames import Frame
from crm.data.show import View
from crm.data.specs import DatasetSpec
from crm.data.transforms import Batch, augment, collate, to_tensors
from crm.masking import TOKEN, training_masks
from crm.randomness import derive


def under(frames: Sequence[Frame], spec: DatasetSpec, condition: Condition) -> list[View]:
    """What an evaluation under `condition` gives the network; hidden is what a mask token or a detour stands in for."""
    mean = np.array(spec.mean, dtype=np.float32)
    pairs = []
    for frame in frames:
        rgb = corrupt(frame.rgb, condition.rgb, mean[:3], frame.name, "rgb")
        thermal = corrupt(frame.thermal[..., None], condition.thermal, mean[3:], frame.name, "thermal")
        image = torch.from_numpy(np.concatenate([rgb, thermal], axis=2)).permute(2, 0, 1)
        pairs.append((image, torch.from_numpy(frame.label.copy())))
    batch = collate(pairs, spec)
    hidden = torch.zeros(len(frames), 2, *batch.label.shape[1:], dtype=torch.bool)
    hidden[:, 0], hidden[:, 1] = _absent(condition.rgb), _absent(condition.thermal)
    return _views(frames, spec, batch, hidden)


def _absent(how: Degradation) -> bool:
    """Whether no pixel of the modality reaches the network, which the pixels themselves do not show."""
    return how.kind in ("missing_token", "missing_route")


def in_training(
    frames: Sequence[Frame], spec: DatasetSpec, config: Config, *, augmented: bool, masked: bool
) -> list[View]:
    """What the first step of a run gives the network, if these frames are its batch."""
    pairs = []
    for place, frame in enumerate(frames):
        generator = torch.Generator().manual_seed(derive(config.seed, 0, "augment", place))
        pairs.append(augment(frame, config.data, generator) if augmented else to_tensors(frame))
    batch = collate(pairs, spec)
    return _views(frames, spec, batch, _masks(config, batch) if masked else None)


def _masks(config: Config, batch: Batch) -> Tensor:
    """Pixels hidden at the first step, bool (b, 2, h, w); as in training, the masks end where the padding begins."""
    height, width = batch.label.shape[1:]
    hidden = training_masks(replace(config, batch=len(batch.label)), (height, width), 0, valid=batch.valid[0])
    assert hidden is not None
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
