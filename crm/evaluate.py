"""Evaluating a trained network under conditions, at a cost that does not multiply.

b = batch, h w = pixels, k = classes

The two branches are independent until fusion, so the maps of one modality under one degradation are computed once per
batch and shared by all conditions that need them: R kinds of RGB and T kinds of thermal cost R + T branch passes.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crm.checkpoint import load_checkpoint
from crm.conditions import PICTURED, Condition, Degradation
from crm.config import Config
from crm.confusion import Evaluation, confusion_matrix, save_evaluation
from crm.corruptions import corrupt
from crm.data.dataset import Split, open_run_split
from crm.data.frames import Frame
from crm.data.transforms import collate
from crm.machine import Machine
from crm.model.segmenter import Modality, Segmenter, build_segmenter, semantic_scores
from crm.records import Claim, append, evaluation, file_hash

Maps = list[Tensor]  # a branch's four feature maps

AT_ONCE = 16  # images evaluated together at least; without gradients they need little memory


def evaluate_run(
    config: Config,
    machine: Machine,
    claim: Claim,
    selection: str,
    conditions: Sequence[Condition],
    stop: Callable[[], bool],
) -> bool:
    """Evaluates the selected checkpoint of a trained run; False if `stop` asked it to end before.

    Conditions of one split are computed together and written one by one, so what is written is never computed again.
    """
    if not conditions:
        return True
    path = claim.folder / "checkpoints" / f"{selection}.safetensors"
    checkpoint = load_checkpoint(path)
    made_by = {"selection": selection, "step": checkpoint.meta["step"], "checkpoint_sha256": file_hash(path)}
    for name in sorted({condition.split for condition in conditions}):
        if stop():
            return False
        split = open_run_split(config.data, name, machine.data)
        model = build_segmenter(config.model, split.spec.num_classes).to(machine.device)
        model.load_state_dict(checkpoint.weights)
        wanted = [condition for condition in conditions if condition.split == name]
        for condition, result in evaluate(model, split, wanted, max(config.batch, AT_ONCE), machine.device):
            claim.check()
            result = replace(result, meta={**result.meta, **made_by})
            save_evaluation(evaluation(claim.folder, selection, condition), result)
            seconds = result.meta["seconds"]
            append(
                claim.folder,
                "evaluate",
                selection=selection,
                condition=condition.name,
                miou=result.miou,
                seconds=seconds,
            )
    return True


@torch.no_grad()
def evaluate(
    model: Segmenter, split: Split, conditions: Sequence[Condition], batch: int, device: str
) -> Iterator[tuple[Condition, Evaluation]]:
    """Each condition with its per-image confusion matrices, every image of the split counted exactly once."""
    model.eval()
    began = time.monotonic()
    matrices: dict[Condition, list[np.ndarray]] = {condition: [] for condition in conditions}
    pictures: dict[Condition, list[np.ndarray]] = {condition: [] for condition in conditions if condition in PICTURED}
    names, night = [], []
    for start in range(0, len(split), batch):
        frames = [split[index] for index in range(start, min(start + batch, len(split)))]
        names += [frame.name for frame in frames]
        night += [frame.night for frame in frames]
        for condition, predictions in _predict(model, split.spec, frames, conditions, device):
            for frame, prediction in zip(frames, predictions, strict=True):
                matrix = confusion_matrix(frame.label, prediction, split.spec.num_classes, split.spec.ignore_index)
                matrices[condition].append(matrix.astype(np.int32))
                if condition in pictures:
                    pictures[condition].append(prediction)
    seconds = round((time.monotonic() - began) / max(1, len(conditions)), 3)
    for condition in conditions:
        maps = np.stack(pictures[condition]) if condition in pictures else None
        meta = _meta(split, condition, seconds)
        yield condition, Evaluation(np.stack(matrices[condition]), np.array(names), np.array(night), maps, meta)


def _meta(split: Split, condition: Condition, seconds: float) -> dict[str, Any]:
    spec = split.spec
    return {
        "condition": condition.name,
        "split": condition.split,
        "dataset": spec.name,
        "classes": list(spec.classes),
        "ignore_index": spec.ignore_index,
        "size": list(split.size),
        "seconds": seconds,
    }


def _predict(
    model: Segmenter, spec: Any, frames: Sequence[Frame], conditions: Sequence[Condition], device: str
) -> Iterator[tuple[Condition, list[np.ndarray]]]:
    """Each condition with one (h, w) uint8 class map per frame."""
    maps: dict[tuple[str, Degradation], Maps] = {}

    def branch(side: Modality, how: Degradation) -> Maps:
        if (side, how) not in maps:
            image, hidden = _input(spec, frames, side, how, device)
            maps[side, how] = model.branch(side, image, hidden)
        return maps[side, how]

    for condition in conditions:
        rgb, thermal = condition.rgb, condition.thermal
        if rgb.kind == "missing_route":
            features = branch("thermal", thermal)
        elif thermal.kind == "missing_route":
            features = branch("rgb", rgb)
        else:
            features = model.fuse(branch("rgb", rgb), branch("thermal", thermal))
        padded = (4 * features[0].shape[2], 4 * features[0].shape[3])
        classes = semantic_scores(model.head(features), padded).argmax(dim=1).to(torch.uint8).cpu().numpy()
        yield (
            condition,
            [
                picture[: frame.label.shape[0], : frame.label.shape[1]]
                for picture, frame in zip(classes, frames, strict=True)
            ],
        )


def _input(
    spec: Any, frames: Sequence[Frame], side: str, how: Degradation, device: str
) -> tuple[Tensor, Tensor | None]:
    """The network's input (b, 4, h, w) in which one modality is degraded, and the tokens to hide, (b, 2, h/4, w/4)."""
    mean = np.array(spec.mean, dtype=np.float32)
    pairs = []
    for frame in frames:
        rgb, thermal = frame.rgb.astype(np.float32), frame.thermal[..., None].astype(np.float32)
        if side == "rgb":
            rgb = corrupt(rgb, how, mean[:3], frame.name, side)
        else:
            thermal = corrupt(thermal, how, mean[3:], frame.name, side)
        image = torch.from_numpy(np.concatenate([rgb, thermal], axis=2)).permute(2, 0, 1)
        pairs.append((image, torch.from_numpy(frame.label.copy())))
    image = collate(pairs, spec).image.to(device)
    if how.kind != "missing_token":
        return image, None
    hidden = torch.zeros(len(frames), 2, image.shape[2] // 4, image.shape[3] // 4, dtype=torch.bool, device=device)
    hidden[:, 0 if side == "rgb" else 1] = True
    return image, hidden
