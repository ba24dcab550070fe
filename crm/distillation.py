"""Self-distillation: how far what a masked pass says is from what the clean fused pass says.

b = batch, q = queries, k = classes + "no object", h w = mask logits, c = channels

Every form is a distance of two passes, the mean over images of what it is for each of them, 0 where they are equal. The
teacher gets no gradient. L_SDC compares the masked fused pass with the teacher, L_SDN both masked single-modality
passes [CRM, section on self-distillation]; every form serves both.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from crm.losses import self_distillation
from crm.model.pixel_decoder import at_least_float32
from crm.transfer import sent


class Output(NamedTuple):
    """What one pass says: of the last decoder output, and the maps the head was given. Only what the form needs."""

    class_logits: Float[Tensor, "b q k"] | None = None
    mask_logits: Float[Tensor, "b q h w"] | None = None
    maps: list[Float[Tensor, "b _ _ _"]] | None = None

    def part(self, images: slice) -> "Output":
        """What it says of some images."""
        classes, masks = (None if logits is None else logits[images] for logits in self[:2])
        return Output(classes, masks, self.maps and [level[images] for level in self.maps])


Counted = Bool[Tensor, "b h w"]  # places of stride 4 that are compared: those that are not padding
Distance = Float[Tensor, ""]


def l1_logits(teacher: Output, student: Output, counted: Counted | None) -> Distance:
    """L1 of raw class logits, "no object" included, query by query: the mean over queries and classes (released)."""
    return self_distillation(*_logits(teacher, student))


def l1_classes(teacher: Output, student: Output, counted: Counted | None) -> Distance:
    """As `l1_logits`, without the "no object" column, which is what most queries speak about."""
    return self_distillation(*(logits[..., :-1] for logits in _logits(teacher, student)))


def l1_softmax(teacher: Output, student: Output, counted: Counted | None) -> Distance:
    """L1 of class probabilities: the mean over queries and classes, so that a common shift of all logits is free."""
    return self_distillation(*(logits.softmax(2) for logits in _logits(teacher, student)))


def kl(teacher: Output, student: Output, counted: Counted | None) -> Distance:
    """KL(teacher || student) of the class distributions, nats; the mean over queries [Hinton et al. 2015]."""
    wanted, found = (logits.log_softmax(2) for logits in _logits(teacher, student))
    return F.kl_div(found, wanted, reduction="none", log_target=True).sum(2).mean()


def l1_aligned(teacher: Output, student: Output, counted: Counted | None) -> Distance:
    """As `l1_logits`, each query of the student beside the one of the teacher that the cheapest assignment gives it.

    The cost is the L1 distance itself: this is the least `l1_logits` that any order of the student's queries has.
    Raises FloatingPointError if it is not finite.
    """
    wanted, found = _logits(teacher, student)
    order = _aligned(wanted, found)[..., None].expand_as(found)
    return self_distillation(wanted, found.gather(1, order))


def pixel_kl(teacher: Output, student: Output, counted: Counted | None) -> Distance:
    """KL(teacher || student) of the class distributions of the pixels (stride 4), nats; the mean over them.

    A pixel's distribution is the network's score of every class there, the sum over queries of class probability times
    mask probability, divided by the sum over the classes.
    """
    wanted, found = _log_map(teacher).detach(), _log_map(student)
    apart = F.kl_div(found, wanted, reduction="none", log_target=True).sum(1)
    if counted is None:
        return apart.mean()
    return ((apart * counted).sum((1, 2)) / counted.sum((1, 2)).clamp(min=1)).mean()


def feature_mse(teacher: Output, student: Output, counted: Counted | None) -> Distance:
    """Mean squared difference of the four maps that the head is given: the mean over a level, then over the levels.

    Fused maps are normalised and those of one modality are not, but one head reads both. It needs no head pass.
    """
    assert teacher.maps is not None and student.maps is not None
    pairs = zip(teacher.maps, student.maps, strict=True)
    return torch.stack([F.mse_loss(at_least_float32(b), at_least_float32(a).detach()) for a, b in pairs]).mean()


@dataclass(frozen=True)
class Form:
    """A distance and what it looks at."""

    distance: Callable[[Output, Output, Counted | None], Distance]
    needs: frozenset[str] = frozenset({"class_logits"})  # fields of Output


_MAP = frozenset({"class_logits", "mask_logits"})

DISTILLATIONS = {
    "l1_logits": Form(l1_logits),
    "l1_classes": Form(l1_classes),
    "l1_softmax": Form(l1_softmax),
    "kl": Form(kl),
    "l1_aligned": Form(l1_aligned),
    "pixel_kl": Form(pixel_kl, _MAP),
    "feature_mse": Form(feature_mse, frozenset({"maps"})),
}

# forms of distributions that `loss.temperature` softens, and how the distance is put back to its scale
SOFTENED = {"kl": "times its square, so that gradients stay about as large [Hinton et al. 2015, section 2]"}

TEACHERS = {
    "train": "the clean fused pass of the step itself: stochastic depth, and statistics of its batch (released)",
    "eval": "the same weights in evaluation mode: a second clean fused pass, without gradient",
    "ema": "the average of the weights (optim.ema) in evaluation mode, as in mean teacher [Tarvainen & Valpola 2017]",
}


def distance(
    form: str, teacher: Output, student: Output, counted: Counted | None, temperature: float = 1.0
) -> Distance:
    """How far the student is from the teacher, by a key of DISTILLATIONS.

    Args:
        temperature: class logits of both are divided by it first, and the distance is multiplied by its square; 1
            but for the forms of SOFTENED.
    """
    if temperature != 1:
        assert form in SOFTENED
        teacher, student = (
            output._replace(class_logits=None if output.class_logits is None else output.class_logits / temperature)
            for output in (teacher, student)
        )
    return temperature**2 * DISTILLATIONS[form].distance(teacher, student, counted)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the network is in evaluation mode and records no gradient; then every part is in its mode again."""
    before = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in before:
            part.training = training


def _logits(teacher: Output, student: Output) -> tuple[Float[Tensor, "b q k"], Float[Tensor, "b q k"]]:
    assert teacher.class_logits is not None and student.class_logits is not None
    return teacher.class_logits.detach(), student.class_logits


@torch.no_grad()
def _aligned(wanted: Float[Tensor, "b q k"], found: Float[Tensor, "b q k"]) -> Integer[Tensor, "b q"]:
    """For every query of `wanted` the one of `found` that is assigned to it; solved on the host after one transfer."""
    costs = torch.cdist(wanted, found, p=1).cpu().numpy()
    if not np.isfinite(costs).all():
        raise FloatingPointError("the class logits to align are nan or inf, so training has diverged")
    return sent(torch.from_numpy(np.stack([linear_sum_assignment(cost)[1] for cost in costs])), found.device)


def _log_map(output: Output) -> Float[Tensor, "b k1 h w"]:
    """Log of every pixel's class distribution, "no object" left out."""
    assert output.class_logits is not None and output.mask_logits is not None
    classes = output.class_logits.softmax(2)[..., :-1]
    scores = torch.einsum("bqk,bqhw->bkhw", classes, at_least_float32(output.mask_logits).sigmoid())
    scores = scores + torch.finfo(torch.float32).eps  # where no query speaks the distribution is uniform
    return scores.log() - scores.sum(1, keepdim=True).log()
