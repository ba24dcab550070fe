"""Measuring a trained network: what it relies on, what its parts are worth, where its gradients go.

What the measurements mean is said by `crm.verdicts`. Everything is a function of the checkpoint, the images and the
run's seed.

b = batch, q = queries, k = classes, h w = pixels, n = images
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import fmean, median, variance
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from crm.checkpoint import load_checkpoint
from crm.conditions import Condition, Degradation
from crm.config import TERMS, Config
from crm.confusion import confusion_matrix, load_evaluation, miou
from crm.data.dataset import Split, open_run_split, run_splits
from crm.data.loader import view
from crm.data.specs import DatasetSpec
from crm.data.transforms import Batch, Pair, augment, collate, to_tensors
from crm.evaluate import evaluate
from crm.machine import Machine
from crm.masking import FILLS, configured_masks
from crm.model.query_decoder import Prediction
from crm.model.segmenter import Segmenter, build_segmenter, semantic_scores
from crm.names import chosen
from crm.objective import View, objective
from crm.points import RandomPoints
from crm.randomness import derive
from crm.records import evaluation, file_hash, journal, read_config
from crm.set_losses import set_losses
from crm.targets import Targets, make_targets
from crm.verdicts import OTHER, Diagnosis, Measures, judge

IMAGES = 32  # of the split, if it has as many
AT_ONCE = 4  # images at once; gradients of more at full size would need more memory than a laptop has
GRADIENT_BATCHES = 4  # of AT_ONCE images, over which gradient norms are averaged
DRAWN = {"augment": "diagnose"}  # what the draws of an augmentation are called here
PROBE = "random_complementary"  # hides tokens of a network that was trained without masks
LATEST = 5  # the journal is cut into so many parts; the last speaks for the end, and is compared with the one before

Matrices = dict[str, np.ndarray]  # name of a condition to its (k, k) matrix, summed over images
Tell = Callable[[int, int], None]  # parts of the work done, parts in all


def diagnose(
    folder: Path, machine: Machine, selection: str, split_name: str | None, images: int | None, draws: int, tell: Tell
) -> Diagnosis:
    """Measures a trained run's checkpoint on so many images of a split, val by default, else test.

    Scores that are stored for the whole split and for this checkpoint are not computed again on the images.
    ValueError, before any work, for a split or a number of images that the run does not have.

    Args:
        images: evenly spaced ones; 0 is all, None is IMAGES or all there are.
        draws: of masks per image.
    """
    config = read_config(folder)
    path = folder / "checkpoints" / f"{selection}.safetensors"
    checkpoint, sha256 = load_checkpoint(path), file_hash(path)
    if (trained := checkpoint.meta.get("dataset", config.data.dataset)) != config.data.dataset:
        raise ValueError(
            f"run {folder.name} holds a network trained on {trained}, to be evaluated on {config.data.dataset}: its "
            "objective has no meaning there; diagnose the run it was imported from"
        )
    whole = _open(config, split_name, machine)
    split = _spread(whole, images)
    model = build_segmenter(config.model, whole.spec.num_classes).to(machine.device)
    model.load_state_dict(checkpoint.weights)
    model.eval()

    stored = _stored(folder, selection, sha256, whole.name)
    measures = _measure(model, config, split, stored, draws, machine.device, journal(folder), tell)
    return Diagnosis(
        run=folder.name,
        selection=selection,
        step=checkpoint.meta["step"],
        checkpoint_sha256=sha256,
        dataset=config.data.dataset,
        split=whole.name,
        images=len(split),
        scores="computed" if stored is None else "stored",
        scored_images=len(split) if stored is None else len(whole),
        draws=draws,
        measures=measures,
        findings=judge(measures, config),
    )


def _measure(
    model: Segmenter,
    config: Config,
    split: Split,
    stored: Matrices | None,
    draws: int,
    device: str,
    lines: Sequence[dict[str, Any]],
    tell: Tell,
) -> Measures:
    """All measurements; `stored` matrices, where there are any, are not computed again."""
    scored: Matrices = dict(stored or {})
    seen = _Seen(split.spec.num_classes, model.queries)
    parts, batches = range(0, len(split), AT_ONCE), list(_batches(len(split)))
    for done, start in enumerate(parts, 1):
        part = split.only(range(start, min(start + AT_ONCE, len(split))))
        _look(model, config, part, start, draws, device, seen)
        if not seen.finite:  # no class is the likeliest, so no score would mean anything
            scored, batches = _nothing(split), []
            break
        if stored is None:
            _add_scores(model, part, device, scored)
        tell(done, len(parts) + len(batches))
    gradients = []
    for done, indices in enumerate(batches, 1):
        gradients.append(_gradients(model, config, split.only(indices), done, device))
        tell(len(parts) + done, len(parts) + len(batches))

    score = {name: float(miou(matrix)) for name, matrix in scored.items()}
    steps = [line for line in lines if line["event"] == "train"]
    return Measures(
        clean=score["clean"],
        missing={side: score[f"{side} missing"] for side in OTHER},
        head={side: score[f"{side} alone"] for side in OTHER},
        **_classes(scored["clean"], split.spec.classes),
        **seen.measured(config),
        **_mean_gradients(gradients),
        **_journal_measures(steps, config.optim.clip),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        not_finite=tuple(_not_finite(steps, model, seen, gradients)),
    )


# ---------------------------------------------------------------------------------------------- which images


def _open(config: Config, split: str | None, machine: Machine) -> Split:
    """The whole split; ValueError if the run does not have it."""
    names = run_splits(config.data)
    split = split or ("val" if "val" in names else "test")
    chosen(f"split of {config.data.dataset}", split, dict.fromkeys(names))
    return open_run_split(config.data, split, machine.data, machine.cache)


def _spread(whole: Split, images: int | None) -> Split:
    """So many frames at equal distances: neighbours in a list are often neighbours in time, and day comes before night.

    ValueError if there are fewer.
    """
    if images is None:
        images = min(IMAGES, len(whole))
    if images > len(whole):
        raise ValueError(f"{whole.spec.title} {whole.name} has {len(whole)} images, fewer than the {images} asked for")
    images = images or len(whole)
    return whole.only([place * len(whole) // images for place in range(images)])


def _batches(images: int) -> Iterator[range]:
    """Up to GRADIENT_BATCHES batches of AT_ONCE images, each spread over all of them."""
    number = min(GRADIENT_BATCHES, math.ceil(images / AT_ONCE))
    for first in range(number):
        yield range(first, images, number)[:AT_ONCE]


# ---------------------------------------------------------------------------------------------- scores


def _conditions(split: str) -> dict[str, Condition]:
    """Clean, each modality missing (the mean image), and the head fed one modality's features alone."""
    missing, route = Degradation(kind="missing_mean"), Degradation(kind="missing_route")
    return {
        "clean": Condition(split=split),
        "rgb missing": Condition(split=split, rgb=missing),
        "thermal missing": Condition(split=split, thermal=missing),
        "rgb alone": Condition(split=split, thermal=route),
        "thermal alone": Condition(split=split, rgb=route),
    }


def _stored(folder: Path, selection: str, sha256: str, split: str) -> Matrices | None:
    """The stored matrices of all conditions; None unless all are there, of this checkpoint."""
    found = {}
    for name, condition in _conditions(split).items():
        path = evaluation(folder, selection, condition)
        if not path.exists():
            return None
        stored = load_evaluation(path)
        if stored.meta.get("checkpoint_sha256") != sha256:
            return None
        found[name] = stored.confusion.sum(axis=0, dtype=np.int64)
    return found


def _add_scores(model: Segmenter, part: Split, device: str, scored: Matrices) -> None:
    """Evaluates some images under all conditions, and adds their matrices."""
    names = {condition: name for name, condition in _conditions(part.name).items()}
    for condition, found in evaluate(model, part, list(names), len(part), device):
        name, total = names[condition], found.confusion.sum(axis=0, dtype=np.int64)
        scored[name] = scored[name] + total if name in scored else total


def _nothing(split: Split) -> Matrices:
    """Matrices without a pixel, whose scores are nan."""
    size = split.spec.num_classes
    return {name: np.zeros((size, size), np.int64) for name in _conditions(split.name)}


def _classes(matrix: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Classes in the labels and their shares, and those of them that are never predicted, from a (k, k) matrix."""
    shares = matrix.sum(axis=1) / max(1, matrix.sum())
    labelled = {name: float(share) for name, share in zip(names, shares, strict=True) if share}
    never = {name for name, predicted in zip(names, matrix.sum(axis=0), strict=True) if not predicted}
    return {"labelled": labelled, "silent": {name: share for name, share in labelled.items() if name in never}}


# ---------------------------------------------------------------------------------------------- queries and masks


@dataclass
class _Seen:
    """What has been seen of predictions so far."""

    classes: int
    queries: int
    same: float = 0.0  # sum over images and draws of the share of pixels that keep their class
    compared: int = 0  # images times draws in which something was hidden
    masked: np.ndarray = field(init=False)  # (k, k) on masked input
    speaking: set[int] = field(default_factory=set)
    matched: set[int] = field(default_factory=set)
    finite: bool = True

    def __post_init__(self) -> None:
        self.masked = np.zeros((self.classes, self.classes), np.int64)

    def measured(self, config: Config) -> dict[str, Any]:
        own = config.masking.kind != "none"
        return {
            "masking": config.masking.kind if own else PROBE,
            "own_masking": own,
            "masked": float(miou(self.masked)),
            "agreement": self.same / self.compared if self.compared else None,
            "queries": self.queries,
            "speaking": len(self.speaking),
            "matched": len(self.matched),
            "dead": self.queries - len(self.speaking | self.matched),
        }


@torch.no_grad()
def _look(
    model: Segmenter,
    config: Config,
    split: Split,
    first: int,
    draws: int,
    device: str,
    seen: _Seen,
) -> None:
    """Predictions on clean and on masked input: which queries speak, and which pixels keep their class.

    Args:
        first: place of the first image among all; the masks depend on it.
    """
    spec, frames = split.spec, list(split)
    batch = collate([to_tensors(frame) for frame in frames], spec)
    image = batch.image.to(device)
    rgb, thermal = model.branch("rgb", image), model.branch("thermal", image)
    clean = model.head(model.fuse(rgb, thermal), deep=False)
    size = (image.shape[2], image.shape[3])
    before = _class_maps(clean, size, seen)
    likeliest = clean.class_logits[-1].argmax(dim=2)
    seen.speaking |= set((likeliest < spec.num_classes).any(dim=0).nonzero().flatten().tolist())
    targets = _targets(batch, spec).to(device)
    if any(targets.classes) and seen.finite:
        points = RandomPoints(torch.Generator(device).manual_seed(derive(config.seed, "diagnose points", first)))
        try:
            pairs = set_losses(clean, ["fused"], targets, config.loss, points).pairs
        except FloatingPointError:
            seen.finite = False
        else:
            seen.matched |= set(pairs.query.tolist())
    for draw in range(draws):
        hidden = _masks(config, size, batch.valid, derive(config.seed, "diagnose mask", first, draw)).to(device)
        seen_image, tokens = FILLS[config.masking.fill](image, hidden)
        rgb, thermal = model.branch("rgb", seen_image, tokens), model.branch("thermal", seen_image, tokens)
        masked = model.fuse(rgb, thermal, hidden)
        after = _class_maps(model.head(masked, deep=False), size, seen)
        for i, (frame, (height, width)) in enumerate(zip(frames, batch.valid, strict=True)):
            one, other = before[i, :height, :width], after[i, :height, :width]
            seen.masked += confusion_matrix(frame.label, other, spec.num_classes, spec.ignore_index)
            if hidden[i].any():  # an image that a dropout left whole agrees with itself
                seen.same += float((one == other).mean())
                seen.compared += 1


def _class_maps(prediction: Prediction, size: tuple[int, int], seen: _Seen) -> np.ndarray:
    """The class of every pixel, (b, h, w) uint8."""
    scores = semantic_scores(prediction, size)
    seen.finite &= bool(scores.isfinite().all())
    return scores.argmax(dim=1).to(torch.uint8).cpu().numpy()


def _masks(
    config: Config, size: tuple[int, int], valid: Sequence[tuple[int, int]], seed: int
) -> Bool[Tensor, "b 2 h w"]:
    """Hidden tokens as in the run's training, or by PROBE where it had none."""
    masking = config.masking if config.masking.kind != "none" else replace(config.masking, kind=PROBE)
    return configured_masks(masking, len(valid), size, valid[0], torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------- gradients


@dataclass(frozen=True)
class _Gradients:
    """Of one batch: norms of the objective's gradient by part of the network, of every term's, and a cosine."""

    parts: dict[str, float]
    terms: dict[str, float]
    cosine: float | None


def _gradients(model: Segmenter, config: Config, split: Split, number: int, device: str) -> _Gradients:
    """Gradients of the run's objective on images augmented, cropped and masked as in its training.

    The network is in evaluation mode: no stochastic depth, and BatchNorm with the statistics it has learned, so that
    nothing depends on how few images a batch has.
    """
    spec = split.spec

    @cache
    def augmented(place: int, purpose: str) -> Pair:
        generator = torch.Generator().manual_seed(derive(config.seed, DRAWN.get(purpose, purpose), number, place))
        return augment(split[place], config.data, generator)

    places = range(len(split))
    batch = collate([augmented(place, "augment") for place in places], spec)
    other = None
    if config.masking.view != "clean":
        seen = view(config, number, places, len(split), augmented, spec)
        other = View(seen.image.to(device), _targets(seen, spec).to(device))
    targets = _targets(batch, spec).to(device)
    hidden = None
    if config.masking.kind != "none":
        size = (batch.image.shape[2], batch.image.shape[3])
        hidden = _masks(config, size, batch.valid, derive(config.seed, "diagnose mask", number)).to(device)
    try:
        terms = _terms(model, config, batch.image.to(device), hidden, targets, other, number)
    except FloatingPointError:  # nan reached the matching
        return _Gradients({"all": math.nan}, {}, None)
    parts = _parts(model)
    owner = [name for name, parameters in parts.items() for _ in parameters]
    parameters = [parameter for group in parts.values() for parameter in group]
    total = [torch.zeros_like(parameter) for parameter in parameters]
    norms: dict[str, float] = {}
    at_head: dict[str, Tensor] = {}
    for name, term in terms.items():
        found = torch.autograd.grad(term, parameters, retain_graph=True, materialize_grads=True)
        norms[name] = _norm(found)
        if name in OTHER:
            at_head[name] = torch.cat(
                [each.flatten() for each, part in zip(found, owner, strict=True) if part == "head"]
            )
        torch._foreach_add_(total, list(found))  # the objective is the sum of its terms, and so is its gradient
    by_part = {name: _norm([each for each, part in zip(total, owner, strict=True) if part == name]) for name in parts}
    both = len(at_head) == len(OTHER)
    cosine = float(torch.cosine_similarity(at_head["rgb"], at_head["thermal"], dim=0)) if both else None
    return _Gradients(by_part, norms, cosine)


def _targets(batch: Batch, spec: DatasetSpec) -> Targets:
    return make_targets(batch.label, spec.num_classes, spec.ignore_index, valid=batch.valid)


def _terms(
    model: Segmenter,
    config: Config,
    image: Tensor,
    hidden: Tensor | None,
    targets: Targets,
    other: View | None,
    number: int,
) -> dict[str, Float[Tensor, ""]]:
    """The terms of the objective; a teacher that is an average of the weights is the network itself here."""
    points = RandomPoints(torch.Generator(image.device).manual_seed(derive(config.seed, "diagnose points", number)))
    return objective(
        model,
        image,
        hidden,
        targets,
        config.loss,
        points,
        head_passes="streamed",  # so that the backward pass of a term runs through its own head passes alone
        view=other,
        fill=config.masking.fill,
    ).terms


def _parts(model: Segmenter) -> dict[str, list[nn.Parameter]]:
    """Every parameter once: "rgb", "thermal", what they share (where they do), "fusion", "head"."""
    backbone = model.backbone
    rgb, thermal = ({id(each): each for each in branch.parameters()} for branch in (backbone.rgb, backbone.thermal))
    shared = rgb.keys() & thermal.keys()
    parts = {
        "rgb": [each for key, each in rgb.items() if key not in shared],
        "thermal": [each for key, each in thermal.items() if key not in shared],
        "shared": [rgb[key] for key in rgb if key in shared],
        "fusion": [*backbone.fusion.parameters(), *backbone.fusion_norms.parameters()],
        "head": [each for name, each in model.named_parameters() if not name.startswith("backbone.")],
    }
    return {name: parameters for name, parameters in parts.items() if parameters}


def _norm(gradients: Sequence[Tensor]) -> float:
    """L2 norm over all elements."""
    return float(torch.stack(torch._foreach_norm(list(gradients))).norm())


def _mean_gradients(gradients: Sequence[_Gradients]) -> dict[str, Any]:
    """Means over the batches; a batch that was not finite is told by `not_finite` and counts for nothing."""
    finite = [each for each in gradients if _is_finite(each)]
    cosines = [each.cosine for each in finite if each.cosine is not None]
    if not finite:
        return {"gradient": {}, "term_gradient": {}, "cosine": None}
    return {
        "gradient": {name: fmean(each.parts[name] for each in finite) for name in finite[0].parts},
        "term_gradient": {
            name: fmean(each.terms[name] for each in finite) for name in TERMS if name in finite[0].terms
        },
        "cosine": fmean(cosines) if cosines else None,
    }


def _is_finite(gradients: _Gradients) -> bool:
    return all(map(math.isfinite, (*gradients.parts.values(), *gradients.terms.values())))


# ---------------------------------------------------------------------------------------------- journal, nan


def _journal_measures(lines: Sequence[dict[str, Any]], clip: float) -> dict[str, Any]:
    """Balance and trend of the loss terms, and how often the gradient was clipped, from the journal's train lines."""
    if not lines:
        return {}
    size = max(1, len(lines) // LATEST)
    names = list(lines[-1]["terms"])
    now = _term_means(lines[-size:], names)
    norms = [line["grad_norm"] for line in lines]
    found = {
        "terms": {name: value / sum(now.values()) for name, value in now.items()},
        "clipped": sum(norm > clip for norm in norms) / len(norms),
        "grad_norm": median(norms),
    }
    if len(lines) < 2 * LATEST:
        return found  # too few to tell a trend from noise
    last, former = lines[-size:], lines[-2 * size : -size]
    before = _term_means(former, names)
    totals = [[line["total"] for line in part] for part in (former, last)]
    error = math.sqrt(sum(variance(part) / size for part in totals)) if size > 1 else 0.0
    return {
        **found,
        "trend": fmean(totals[1]) / fmean(totals[0]) - 1,
        "trend_error": error / fmean(totals[0]),
        "term_trend": {name: now[name] / before[name] - 1 for name in names if before[name]},
    }


def _term_means(lines: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, float]:
    return {name: fmean(line["terms"].get(name, 0.0) for line in lines) for name in names}


def _not_finite(
    lines: Sequence[dict[str, Any]], model: Segmenter, seen: _Seen, gradients: Sequence[_Gradients]
) -> Iterator[str]:
    """Where nan or inf was found."""
    if wrong := [line["step"] for line in lines if not math.isfinite(line["total"] + line["grad_norm"])]:
        yield f"the journal at step {wrong[0]}"
    if wrong := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        yield f"{len(wrong)} tensors of the checkpoint, {wrong[0]} first"
    if not seen.finite:
        yield "the predictions"
    if not all(map(_is_finite, gradients)):
        yield "the gradients"
