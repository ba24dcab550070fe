"""Maps of the paths of a step, from the images to what the head is given, and where the gradients stop on their way.

A step's branches are computed by shares of its images, the fusion by all of them, whose norms see the batch, and the
head by shares again. So maps are cut twice: gradients stop there, are kept, joined, and go on.

b = batch, h w = tokens of stride 4, H W = pixels
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from crm.masking import FILLS
from crm.model.segmenter import Hidden, Image, Maps, Segmenter
from crm.names import chosen

Levels = Mapping[str, list[Tensor]]  # maps by the name of their path, of a whole batch or a share of it
Gradients = dict[str, list[Tensor | None]]  # of maps, by the name of their path


class Second(NamedTuple):
    """The masked input."""

    image: Image
    tokens: Hidden | None  # replaced by the mask token
    hidden: Hidden | None  # not there, whatever stands in their place

    def part(self, images: slice) -> "Second":
        """Some images of it."""
        tokens, hidden = (None if one is None else one[images] for one in self[1:])
        return Second(self.image[images], tokens, hidden)


def second_input(image: Image, hidden: Hidden | None, seen: Image | None, fill: str) -> Second | None:
    """What the masked passes look at; None: there is no masked input.

    Args:
        seen: images of their own; None is the clean input's.
        fill: what stands for a hidden token, a key of FILLS.
    """
    if hidden is None:
        return None if seen is None else Second(seen, None, None)
    return Second(*chosen("fill", fill, FILLS)(image if seen is None else seen, hidden), hidden)


def branches(
    model: Segmenter, image: Image, second: Second | None, needed: Collection[str], together: bool
) -> dict[str, Maps]:
    """Maps of the branches that the needed paths begin with, by the names of their paths.

    Args:
        together: the clean and the masked input in one pass of a branch.
    """
    found: dict[str, Maps] = {}
    for modality in ("rgb", "thermal"):
        clean = modality in needed or "fused" in needed
        masked = f"{modality}_masked" in needed or "masked" in needed
        if clean and masked and together:
            assert second is not None
            tokens = None if second.tokens is None else torch.cat([torch.zeros_like(second.tokens), second.tokens])
            both = model.branch(modality, torch.cat([image, second.image]), tokens)
            halves = [level.chunk(2) for level in both]
            found[modality], found[f"{modality}_masked"] = ([half[i] for half in halves] for i in (0, 1))
            continue
        if clean:
            found[modality] = model.branch(modality, image)
        if masked:
            assert second is not None
            found[f"{modality}_masked"] = model.branch(modality, second.image, second.tokens)
    return found


def fused(
    model: Segmenter, maps: Mapping[str, Maps], second: Second | None, needed: Collection[str]
) -> dict[str, Maps]:
    """Fused maps of the needed paths, from those of all images; the norms see the clean input before the masked one."""
    found: dict[str, Maps] = {}
    if "fused" in needed:
        found["fused"] = model.fuse(maps["rgb"], maps["thermal"])
    if "masked" in needed:
        assert second is not None
        found["masked"] = model.fuse(maps["rgb_masked"], maps["thermal_masked"], second.hidden, masked=True)
    return found


# ---------------------------------------------------------------------------------------------- gradients


def cut(maps: Levels, images: slice = slice(None)) -> dict[str, list[Tensor]]:
    """The same values of these images, whose gradients stop here and are kept."""
    return {
        name: [level[images].detach().requires_grad_(level.requires_grad) for level in levels]
        for name, levels in maps.items()
    }


def joined(parts: Sequence[Levels]) -> dict[str, list[Tensor]]:
    """Maps of all images."""
    if len(parts) == 1:
        return dict(parts[0])
    return {name: [torch.cat(level) for level in levels] for name, levels in _level_by_level(parts).items()}


def kept(parts: Sequence[Levels]) -> Gradients:
    """The gradients that were kept at these maps, of all images; None where there is none."""
    return {name: [_joined_gradient(level) for level in levels] for name, levels in _level_by_level(parts).items()}


def _level_by_level(parts: Sequence[Levels]) -> dict[str, list[tuple[Tensor, ...]]]:
    return {name: list(zip(*(part[name] for part in parts), strict=True)) for name in parts[0]}


def _joined_gradient(leaves: Sequence[Tensor]) -> Tensor | None:
    if all(leaf.grad is None for leaf in leaves):
        return None
    return torch.cat([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves])


def descend(maps: Levels, gradients: Gradients, images: slice = slice(None)) -> None:
    """The backward pass from these maps; the gradients are of a batch in which they are these images."""
    pairs = [pair for name in maps for pair in zip(maps[name], gradients[name], strict=True)]
    pairs = [(level, gradient[images]) for level, gradient in pairs if level.requires_grad and gradient is not None]
    if pairs:
        levels, given = zip(*pairs, strict=True)
        with torch.autocast(levels[0].device.type, enabled=False):
            torch.autograd.backward(levels, given)
