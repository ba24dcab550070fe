"""Evaluating a trained network under conditions, at a cost that does not multiply.

b = batch, k = classes, h w = pixels of a frame as the network sees it, H W = pixels of its label

The two branches are independent until fusion, so the maps of one modality under one degradation are computed once per
batch and shared by all conditions that need them: R kinds of RGB and T kinds of thermal cost R + T branch passes and
R * T head passes. Small batches go through the head several conditions at once. Another thread reads and corrupts the
images that come next while the network works on these. What is known of the images so far is kept on disk
(`crm.unfinished`), so that a kill costs little.

Predictions are made and counted at the label's own size, whatever size the frames were resized to. On a data set of
other classes than the network's, `crm.data.mapping` says what counts.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

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
from crm.corruptions import VERSION, corrupt, hidden_tokens, moved_label
from crm.data.dataset import Split, manifest, open_run_split
from crm.data.frames import Frame
from crm.data.mapping import OTHER, Mapping, mapping
from crm.data.specs import DATASETS, DatasetSpec
from crm.data.transforms import DIVISOR
from crm.evaluated import keep_code
from crm.machine import Machine
from crm.model.query_decoder import Prediction
from crm.model.segmenter import Hidden, Image, Maps, Modality, Segmenter, build_segmenter, semantic_scores
from crm.records import Claim, append, evaluation, file_hash, trained_on, unfinished
from crm.sums import note
from crm.transfer import sent
from crm.unfinished import Evidence, Unfinished

T = TypeVar("T")
Answer = tuple[np.ndarray, np.ndarray]  # of one image: class (H, W) uint8, and confidence in it (H, W) float32

AT_ONCE = 16  # images in the network together at least; without gradients they need little memory
JOINED = 8  # images of several conditions through the head together at most
CPU_PIXELS = 480 * 640  # in the network together at most on a CPU: more do not fit its caches, and are slower
GROUP = 48  # conditions of a split that are computed together and then written


@dataclass(frozen=True)
class Scored:
    """What a watcher is told after every head pass."""

    done: int  # pairs of image and condition
    count: int
    seconds: float  # so far

    @property
    def eta(self) -> float:
        """Seconds to go at the speed so far."""
        return self.seconds / self.done * (self.count - self.done)


Tell = Callable[[Scored], None]


def tell_nobody(scored: Scored) -> None:
    """For callers that watch nothing."""


def evaluate_run(
    config: Config,
    machine: Machine,
    claim: Claim,
    selection: str,
    conditions: Sequence[Condition],
    stop: Callable[[], bool],
    tell: Tell = tell_nobody,
) -> bool:
    """Evaluates the selected checkpoint of a trained run; False if `stop` asked it to end before.

    GROUP conditions of one split are computed together and written one by one, so what is written is never computed
    again. A stop takes effect between two batches and loses nothing; a kill loses the batch that was being computed and
    what had not been kept of those before (`crm.unfinished.EVERY` seconds).
    """
    if not conditions:
        return True
    path = claim.folder / "checkpoints" / f"{selection}.safetensors"
    checkpoint = load_checkpoint(path)
    trained = DATASETS[trained_on(claim.folder)]
    made_by = {"selection": selection, "step": checkpoint.meta["step"], "checkpoint_sha256": file_hash(path)}
    code = keep_code(claim.folder, selection)
    model = build_segmenter(config.model, trained.num_classes).to(machine.device)
    model.load_state_dict(checkpoint.weights)
    done, count, seconds = 0, 0, 0.0
    left = list(conditions)
    while left:
        if stop():
            return False
        split_name = min(condition.split for condition in left)
        split = open_run_split(config.data, split_name, machine.data, machine.cache)
        made_by["data_sha256"] = manifest(split)["sha256"]
        refuse_other_frames(claim.folder, selection, split_name, made_by["data_sha256"])
        kept = Unfinished(
            unfinished(claim.folder, selection), {**made_by, "split": split_name, "corruptions": VERSION}, claim.check
        )
        # what an attempt before has begun is finished first
        begun = kept.conditions(condition for condition in left if condition.split == split_name)
        _, wanted = grouped(begun or left)[0]
        left = [condition for condition in left if condition not in wanted]
        known = kept.images * len(wanted)
        count = (count or len(split) * len(conditions)) - known
        passed = Scored(done, count, seconds)

        def told(scored: Scored, before: Scored = passed) -> None:
            tell(Scored(before.done + scored.done, before.count, before.seconds + scored.seconds))

        batch = machine.at_once(at_once(max(config.batch, AT_ONCE), split.size, machine.device))
        written, began = 0, time.monotonic()
        for condition, result in evaluate(model, split, wanted, batch, machine.device, trained, stop, told, kept):
            claim.check()
            result = replace(result, meta={**result.meta, **made_by, "code": code})
            saved = evaluation(claim.folder, selection, condition)
            content = save_evaluation(saved, result)
            note(saved, result, content)
            written += 1
            append(
                claim.folder,
                "evaluate",
                selection=selection,
                condition=condition.name,
                miou=result.miou,
                seconds=result.meta["seconds"],
                sha256=content,
            )
        if written < len(wanted):
            return False  # stopped
        kept.clear()
        done, seconds = done + len(split) * len(wanted) - known, seconds + time.monotonic() - began
    return True


def at_once(images: int, size: tuple[int, int], device: str) -> int:
    """How many images go through the network together where `images` may."""
    return images if device != "cpu" else max(1, min(images, CPU_PIXELS // (size[0] * size[1])))


def refuse_other_frames(folder: Path, selection: str, split: str, data_sha256: str) -> None:
    """ValueError if what is stored of a split was evaluated on other frames: the numbers could not be compared."""
    for path in sorted((folder / "evals" / selection).glob(f"{split}*.npz"))[:1]:
        if load_evaluation(path).meta.get("data_sha256") not in (None, data_sha256):
            raise ValueError(
                f"the frames of {split} are not those that {path} was computed on; give the same data, "
                f"or delete {path.parent}"
            )


def grouped(conditions: Sequence[Condition]) -> list[tuple[str, list[Condition]]]:
    """Split and conditions that are computed together, so ordered that most branch passes are shared."""
    groups = []
    for name in sorted({condition.split for condition in conditions}):
        wanted = sorted(condition for condition in conditions if condition.split == name)
        groups += [(name, wanted[start : start + GROUP]) for start in range(0, len(wanted), GROUP)]
    return groups


def evaluate(
    model: Segmenter,
    split: Split,
    conditions: Sequence[Condition],
    batch: int,
    device: str,
    trained: DatasetSpec | None = None,
    stop: Callable[[], bool] = lambda: False,
    tell: Tell = tell_nobody,
    kept: Unfinished | None = None,
) -> Iterator[tuple[Condition, Evaluation]]:
    """Each condition with its per-image evidence, every image of the split counted exactly once.

    `batch` images go through the network at once; through the head also those of several conditions, where that is
    faster. Nothing if `stop` asked to end before. `trained` is the data set whose classes and normalisation the network
    has, by default the split's. What `kept` holds is not computed again, and what is computed it is given.
    ValueError if the two data sets share no class.
    """
    spec = trained or split.spec
    shared = mapping(spec, split.spec)
    began = time.monotonic()
    found = _evidence(model, split, spec, shared, conditions, batch, device, stop, tell, kept)
    took = kept.seconds if kept else time.monotonic() - began
    seconds = round(took / max(1, len(conditions)), 3)
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
    tell: Tell,
    kept: Unfinished | None,
) -> dict[Condition, Evidence]:
    """By condition; empty if asked to stop."""
    model.eval()
    num_classes = len(shared.classes) if shared else spec.num_classes
    ignore_index = shared.ignore_index if shared else split.spec.ignore_index
    found = kept.load(conditions) if kept else {condition: Evidence([], [], []) for condition in conditions}
    known = kept.images if kept else 0
    count = (len(split) - known) * len(conditions)
    began, done = time.monotonic(), 0
    for work in ahead(_prepared(split, spec, sorted(conditions), batch, stop, known)):
        if work is None:
            if kept:
                kept.keep(found, now=True)
            return {}
        frames, labels = work.frames, work.labels
        if shared:
            labels = [shared.labels[label] for label in labels]
        sizes = [(label.shape[0], label.shape[1]) for label in labels]
        for condition, answers in _predict(model, work, sizes, shared, device):
            matrices, histograms, pictures = found[condition]
            for frame, label, (prediction, confidence) in zip(frames, labels, answers, strict=True):
                sides = {"rgb": condition.rgb, "thermal": condition.thermal}
                label = moved_label(label, sides, frame, condition.seed, ignore_index)
                matrix = confusion_matrix(label, prediction, num_classes, ignore_index)
                matrices.append(matrix.astype(np.int32))
                counted = label != ignore_index
                histograms.append(histogram(confidence[counted], (prediction == label)[counted]))
                if condition in PICTURED:
                    pictures.append(_shrunk(prediction, frame.size))
            done += len(frames)
            tell(Scored(done, count, time.monotonic() - began))
        if kept:
            kept.keep(found)
    if kept:
        kept.keep(found, now=True)  # so that a kill while the evaluations are written costs nothing
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
        "corruptions": VERSION,
        "seconds": seconds,
    }
    if shared:
        taken = {name: shared.classes[i] for name, i in zip(trained.classes, shared.predictions, strict=True) if i}
        about |= {"classes": list(shared.classes), "ignore_index": shared.ignore_index, "unscored": [OTHER]}
        about |= {"trained_on": trained.name, "mapping": taken}
    return about


Side = tuple[Modality, Degradation, int]  # a modality, what is done to it, and the seed of that


@dataclass(frozen=True)
class Work:
    """Some images under some conditions."""

    frames: Sequence[Frame]
    labels: Sequence[np.ndarray]  # at their own size
    conditions: Sequence[Condition]  # in the order in which their inputs come
    inputs: Iterator[tuple[Side, tuple[Image, Hidden | None]]]


def ahead(made: Iterator[T]) -> Iterator[T]:
    """The items of an iterator, each made by another thread while the one before is being used."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(next, made, end)
        while (item := waiting.result()) is not end:
            waiting = thread.submit(next, made, end)
            yield item  # pyright: ignore[reportReturnType]


def _prepared(
    split: Split, spec: DatasetSpec, conditions: Sequence[Condition], batch: int, stop: Callable[[], bool], first: int
) -> Iterator[Work | None]:
    """The batches of a split from its image `first` on; None and no more once asked to stop."""
    sides = list(dict.fromkeys(side for condition in conditions for side in _sides(condition)))
    for start in range(first, len(split), batch):
        if stop():
            yield None
            return
        indices = range(start, min(start + batch, len(split)))
        frames, labels = [split[i] for i in indices], [split.native_label(i) for i in indices]
        yield Work(frames, labels, conditions, _inputs(spec, frames, sides))


def _inputs(
    spec: DatasetSpec, frames: Sequence[Frame], sides: Sequence[Side]
) -> Iterator[tuple[Side, tuple[Image, Hidden | None]]]:
    """What the branches are fed, made when asked for: by then the next batch may be in preparation."""
    for side in sides:
        yield side, modality_input(spec, frames, *side)


def _sides(condition: Condition) -> list[Side]:
    """The branch passes a condition needs; a modality around which is routed needs none."""
    pairs: list[tuple[Modality, Degradation]] = [("rgb", condition.rgb), ("thermal", condition.thermal)]
    # what draws nothing is the same under every seed
    return [(side, how, condition.seed if how.severity else 0) for side, how in pairs if how.kind != "missing_route"]


def _predict(
    model: Segmenter, work: Work, sizes: Sequence[tuple[int, int]], shared: Mapping | None, device: str
) -> Iterator[tuple[Condition, list[Answer]]]:
    """Each condition with the answer for every frame, at the size of its label."""
    uses = Counter(side for condition in work.conditions for side in _sides(condition))
    maps: dict[Side, tuple[Maps, Hidden | None]] = {}
    inputs = ahead(work.inputs)

    def branch(side: Side) -> tuple[Maps, Hidden | None]:
        """What one branch has computed; kept as long as a later condition needs it."""
        while side not in maps:
            made, (image, hidden) = next(inputs)
            hidden = None if hidden is None else sent(hidden, device)
            maps[made] = model.branch(made[0], sent(image, device), hidden), hidden
        uses[side] -= 1
        return maps[side] if uses[side] else maps.pop(side)

    waiting: list[tuple[Condition, Maps]] = []
    joined = at_once(JOINED, work.frames[0].size, device)
    for place, condition in enumerate(work.conditions):
        waiting.append((condition, _features(model, [(side, branch(side)) for side in _sides(condition)])))
        following = work.conditions[place + 1] if place + 1 < len(work.conditions) else None
        full = (len(waiting) + 1) * len(work.frames) > joined
        # paths do not mix: a network may treat what is not fused in another way
        if full or following is None or len(_sides(following)) != len(_sides(condition)) == 1:
            yield from _answers(model, work.frames, sizes, waiting, shared)
            waiting = []


def _features(model: Segmenter, passed: Sequence[tuple[Side, tuple[Maps, Hidden | None]]]) -> Maps:
    """What the head is given: fused maps, or those of one branch. The fusion is told which tokens are not there."""
    if len(passed) == 1:
        return passed[0][1][0]
    (_, (rgb, _)), (_, (thermal, _)) = passed
    if not any(how.kind.startswith("missing") or hidden is not None for (_, how, _), (_, hidden) in passed):
        return model.fuse(rgb, thermal)
    finest = rgb[0]
    gone = torch.zeros(len(finest), 2, *finest.shape[2:], dtype=torch.bool, device=finest.device)
    for (side, how, _), (_, hidden) in passed:
        index = 0 if side == "rgb" else 1
        if how.kind.startswith("missing"):
            gone[:, index] = True
        elif hidden is not None:
            gone[:, index] = hidden[:, index]
    return model.fuse(rgb, thermal, gone)


def _answers(
    model: Segmenter,
    frames: Sequence[Frame],
    sizes: Sequence[tuple[int, int]],
    waiting: Sequence[tuple[Condition, Maps]],
    shared: Mapping | None,
) -> Iterator[tuple[Condition, list[Answer]]]:
    """One head pass for several conditions."""
    features = [torch.cat(level) for level in zip(*(maps for _, maps in waiting), strict=True)]
    prediction = model.head(features, deep=False)
    padded = _padded(frames)
    for place, (condition, _) in enumerate(waiting):
        first = place * len(frames)
        yield (
            condition,
            [
                answer(image_scores(prediction, first + i, padded, frame.size, size), shared)
                for i, (frame, size) in enumerate(zip(frames, sizes, strict=True))
            ],
        )


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


def modality_input(
    spec: DatasetSpec, frames: Sequence[Frame], side: Modality, how: Degradation, seed: int
) -> tuple[Image, Hidden | None]:
    """One modality as the network gets it, in an image (b, 4, h, w) whose other channels are 0; and tokens to hide.

    Normalised and padded as `crm.data.transforms.collate` does.
    """
    own = slice(0, 3) if side == "rgb" else slice(3, 4)
    mean, std = (torch.tensor(values[own], dtype=torch.float32)[:, None, None] for values in (spec.mean, spec.std))
    image = torch.zeros(len(frames), 4, *_padded(frames))
    for i, frame in enumerate(frames):
        pixels = torch.from_numpy(corrupt(frame, side, how, spec, seed)).permute(2, 0, 1)
        torch.div(pixels.sub(mean), std, out=image[i, own, : frame.size[0], : frame.size[1]])
    if (tokens := hidden_tokens(frames, side, how, seed, _padded(frames))) is None:
        return image, None
    hidden = torch.zeros(len(frames), 2, *tokens.shape[1:], dtype=torch.bool)
    hidden[:, 0 if side == "rgb" else 1] = torch.from_numpy(tokens)
    return image, hidden


def _padded(frames: Sequence[Frame]) -> tuple[int, int]:
    """Height and width of the padded input."""
    height, width = (-(-max(side) // DIVISOR) * DIVISOR for side in zip(*(frame.size for frame in frames), strict=True))
    return height, width
