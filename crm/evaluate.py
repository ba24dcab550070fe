"""Evaluating a trained network under conditions, at a cost that does not multiply.

b = batch, k = classes, h w = pixels of a frame as the network sees it, H W = pixels of its label

The two branches are independent until fusion, so the maps of one modality under one degradation are computed once per
batch and shared by all conditions that need them: R kinds of RGB and T kinds of thermal cost R + T branch passes.

Predictions are made and counted at the label's own size, whatever size the frames were resized to. On a data set of
other classes than the network's, `crm.data.mapping` says what counts.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from crm.calibration import CONFIDENCE, histogram
from crm.checkpoint import load_checkpoint
from crm.conditions import PICTURED, Condition, Degradation
from crm.config import Config
from crm.confusion import Evaluation, confusion_matrix, load_evaluation, save_evaluation
from crm.corruptions import corrupt
from crm.data.dataset import Split, manifest, open_run_split
from crm.data.frames import Frame
from crm.data.mapping import OTHER, Mapping, mapping
from crm.data.specs import DATASETS, DatasetSpec
from crm.data.transforms import collate
from crm.machine import Machine
from crm.model.query_decoder import Prediction
from crm.model.segmenter import Modality, Segmenter, build_segmenter, semantic_scores
from crm.records import Claim, append, evaluation, file_hash, trained_on

Maps = list[Tensor]  # a branch's four feature maps
Answer = tuple[np.ndarray, np.ndarray]  # of one image: class (H, W) uint8, and confidence in it (H, W) float32

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

    Conditions of one split are computed together and written one by one, so what is written is never computed again. A
    stop between two batches loses what was computed of the split.
    """
    if not conditions:
        return True
    path = claim.folder / "checkpoints" / f"{selection}.safetensors"
    checkpoint = load_checkpoint(path)
    trained = DATASETS[trained_on(claim.folder)]
    made_by = {"selection": selection, "step": checkpoint.meta["step"], "checkpoint_sha256": file_hash(path)}
    for name in sorted({condition.split for condition in conditions}):
        if stop():
            return False
        split = open_run_split(config.data, name, machine.data, machine.cache)
        made_by["data_sha256"] = manifest(split)["sha256"]
        refuse_other_frames(claim.folder, selection, name, made_by["data_sha256"])
        model = build_segmenter(config.model, trained.num_classes).to(machine.device)
        model.load_state_dict(checkpoint.weights)
        wanted = [condition for condition in conditions if condition.split == name]
        batch = max(config.batch, AT_ONCE)
        written = 0
        for condition, result in evaluate(model, split, wanted, batch, machine.device, trained, stop):
            claim.check()
            result = replace(result, meta={**result.meta, **made_by})
            save_evaluation(evaluation(claim.folder, selection, condition), result)
            written += 1
            append(
                claim.folder,
                "evaluate",
                selection=selection,
                condition=condition.name,
                miou=result.miou,
                seconds=result.meta["seconds"],
            )
        if written < len(wanted):
            return False  # stopped
    return True


def evaluate(
    model: Segmenter,
    split: Split,
    conditions: Sequence[Condition],
    batch: int,
    device: str,
    trained: DatasetSpec | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Condition, Evaluation]]:
    """Each condition with its per-image evidence, every image of the split counted exactly once.

    Nothing if `stop` asked to end before. `trained` is the data set whose classes and normalisation the network has, by
    default the split's. ValueError if the two share no class.
    """
    spec = trained or split.spec
    shared = mapping(spec, split.spec)
    began = time.monotonic()
    found = _evidence(model, split, spec, shared, conditions, batch, device, stop)
    seconds = round((time.monotonic() - began) / max(1, len(conditions)), 3)
    names, night = list(split.names), [split.spec.is_night(name) for name in split.names]
    for condition, (matrices, histograms, pictures) in found.items():
        yield (
            condition,
            Evaluation(
                confusion=np.stack(matrices),
                names=np.array(names),
                night=np.array(night),
                predictions=np.stack(pictures) if pictures else None,
                meta=_meta(split, spec, shared, condition, seconds),
                calibration=np.stack(histograms),
            ),
        )


class _Evidence(NamedTuple):
    """Of one condition, an item per image."""

    matrices: list[np.ndarray]
    histograms: list[np.ndarray]
    pictures: list[np.ndarray]  # none where the condition keeps none


def refuse_other_frames(folder: Path, selection: str, split: str, data_sha256: str) -> None:
    """ValueError if what is stored of a split was evaluated on other frames: the numbers could not be compared."""
    for path in sorted((folder / "evals" / selection).glob(f"{split}*.npz"))[:1]:
        if load_evaluation(path).meta.get("data_sha256") not in (None, data_sha256):
            raise ValueError(
                f"the frames of {split} are not those that {path} was computed on; give the same data, "
                f"or delete {path.parent}"
            )


@torch.no_grad()
def _evidence(
    model: Segmenter,
    split: Split,
    spec: DatasetSpec,
    shared: Mapping | None,
    conditions: Sequence[Condition],
    batch: int,
    device: str,
    stop: Callable[[], bool],
) -> dict[Condition, _Evidence]:
    """By condition; empty if asked to stop."""
    model.eval()
    num_classes = len(shared.classes) if shared else spec.num_classes
    ignore_index = shared.ignore_index if shared else split.spec.ignore_index
    found = {condition: _Evidence([], [], []) for condition in conditions}
    for start in range(0, len(split), batch):
        if stop():
            return {}
        indices = range(start, min(start + batch, len(split)))
        frames, labels = [split[i] for i in indices], [split.native_label(i) for i in indices]
        if shared:
            labels = [shared.labels[label] for label in labels]
        sizes = [(label.shape[0], label.shape[1]) for label in labels]
        for condition, answers in _predict(model, spec, frames, sizes, conditions, shared, device):
            matrices, histograms, pictures = found[condition]
            for frame, label, (prediction, confidence) in zip(frames, labels, answers, strict=True):
                matrix = confusion_matrix(label, prediction, num_classes, ignore_index)
                matrices.append(matrix.astype(np.int32))
                counted = label != ignore_index
                histograms.append(histogram(confidence[counted], (prediction == label)[counted]))
                if condition in PICTURED:
                    pictures.append(_shrunk(prediction, frame.size))
    return found


def _meta(
    split: Split, trained: DatasetSpec, shared: Mapping | None, condition: Condition, seconds: float
) -> dict[str, Any]:
    spec = split.spec
    about = {
        "condition": condition.name,
        "split": condition.split,
        "dataset": spec.name,
        "classes": list(spec.classes),
        "ignore_index": spec.ignore_index,
        "size": list(split.size),
        "confidence": CONFIDENCE,
        "seconds": seconds,
    }
    if shared:
        taken = {name: shared.classes[i] for name, i in zip(trained.classes, shared.predictions, strict=True) if i}
        about |= {"classes": list(shared.classes), "ignore_index": shared.ignore_index, "unscored": [OTHER]}
        about |= {"trained_on": trained.name, "mapping": taken}
    return about


def _predict(
    model: Segmenter,
    spec: DatasetSpec,
    frames: Sequence[Frame],
    sizes: Sequence[tuple[int, int]],
    conditions: Sequence[Condition],
    shared: Mapping | None,
    device: str,
) -> Iterator[tuple[Condition, list[Answer]]]:
    """Each condition with the answer for every frame, at the size of its label."""
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
        prediction = model.head(features, deep=False)
        answers = []
        for i, (frame, size) in enumerate(zip(frames, sizes, strict=True)):
            answers.append(answer(image_scores(prediction, i, padded, frame.size, size), shared))
        yield condition, answers


def image_scores(
    prediction: Prediction, index: int, padded: tuple[int, int], valid: tuple[int, int], size: tuple[int, int]
) -> Float[Tensor, "k H W"]:
    """Class scores of one image of a batch at `size`, to which the `valid` part of the padded input is stretched.

    The order of the released code: scores at the padded size, the padding cut off, then bilinear to the wanted size.
    """
    one = Prediction(*(logits[-1:, index : index + 1] for logits in prediction))
    scores = semantic_scores(one, padded)[:, :, : valid[0], : valid[1]]
    if size != valid:
        scores = interpolate(scores, size, mode="bilinear", align_corners=False)
    return scores[0]


def answer(scores: Float[Tensor, "k H W"], shared: Mapping | None = None) -> Answer:
    """The class with the highest score, and the confidence in it (`crm.calibration`).

    With `shared`, the class that it counts as, with the confidence of all classes together that count as the same.
    """
    best, classes = scores.max(dim=0)
    if shared:
        counts_as = torch.from_numpy(shared.predictions).to(scores.device, torch.long)
        classes = counts_as[classes]
        together = scores.new_zeros(len(shared.classes), *scores.shape[1:]).index_add_(0, counts_as, scores)
        best = together.gather(0, classes[None])[0]
    confidence = best / scores.sum(dim=0).clamp_min(torch.finfo(scores.dtype).tiny)
    return classes.to(torch.uint8).cpu().numpy(), confidence.clamp_max(1).cpu().numpy()


def _shrunk(classes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The class map at the size of the frame it is shown beside, nearest to pixel centres."""
    if classes.shape == size:
        return classes
    rows, columns = (((np.arange(n) + 0.5) * own / n).astype(int) for n, own in zip(size, classes.shape, strict=True))
    return classes[np.ix_(rows, columns)]


def _input(
    spec: DatasetSpec, frames: Sequence[Frame], side: str, how: Degradation, device: str
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
