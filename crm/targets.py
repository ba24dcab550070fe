"""What supervises the passes of a step: label maps, and which images of the batch they belong to.

b = batch, h w = pixels
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional as F

from crm.points import IGNORED, OUTSIDE, PADDED
from crm.transfer import sent


@dataclass(frozen=True)
class Targets:
    """Label maps with a border of one pixel, and the classes of each image, ascending."""

    labels: UInt8[Tensor, "b h w"]  # a class, IGNORED or PADDED; in the border OUTSIDE instead of a class
    classes: tuple[tuple[int, ...], ...]
    ignored: bool  # there are such pixels
    padded: bool

    def to(self, device: torch.device | str) -> "Targets":
        return replace(self, labels=sent(self.labels, device))

    def part(self, images: slice) -> "Targets":
        """Those of some images."""
        return replace(self, labels=self.labels[images], classes=self.classes[images])


@dataclass(frozen=True)
class Part:
    """Which images of a batch these are, where a step is computed in parts: micro-batches, or several processes.

    The losses of the parts, and their gradients, add up to those of the whole batch (to rounding; only BatchNorm sees
    the part alone).
    """

    first: int  # place of the first image in the whole batch
    counts: tuple[int, ...]  # number of classes present in every image of the whole batch


def make_targets(
    labels: UInt8[Tensor, "b h w"],
    num_classes: int,
    ignore_index: int,
    padded: tuple[int, int] | None = None,
    valid: Sequence[tuple[int, int]] | None = None,
) -> Targets:
    """One mask per class present in an image, kept as a label map; call it where the labels are, best on the host.

    Args:
        ignore_index: the id that belongs to no mask.
        padded: height and width the images were padded to, at the right and the bottom; None is those of `labels`.
        valid: height and width of each image in `labels` if they differ; the rest is padding.
    """
    b, height, width = labels.shape
    coded = torch.where(labels == ignore_index, IGNORED, labels).to(torch.uint8)
    for image, (rows, columns) in enumerate(valid or ()):
        coded[image, rows:] = PADDED
        coded[image, :, columns:] = PADDED
    bottom, right = (0, 0) if padded is None else (padded[0] - height, padded[1] - width)
    coded = F.pad(F.pad(coded, (0, right, 0, bottom), value=PADDED), (1, 1, 1, 1))
    for border, inside in ((0, 1), (-1, -2)):  # beyond an ignored or padded pixel is more of the same
        coded[:, border] = coded[:, inside].clamp(min=OUTSIDE)
        coded[:, :, border] = coded[:, :, inside].clamp(min=OUTSIDE)
    offset = 256 * torch.arange(b, device=labels.device)[:, None]
    counts = torch.bincount((coded.flatten(1).long() + offset).flatten(), minlength=256 * b).view(b, 256).cpu()
    if wrong := counts[:, num_classes:OUTSIDE].any(0).nonzero().flatten().tolist():
        ids = [code + num_classes for code in wrong]
        raise ValueError(f"labels contain {ids}; classes are 0 to {num_classes - 1}, ignored is {ignore_index}")
    classes = tuple(tuple(row.nonzero().flatten().tolist()) for row in counts[:, :num_classes])
    return Targets(coded, classes, bool(counts[:, IGNORED].any()), bool(counts[:, PADDED].any()))
