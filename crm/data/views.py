"""What the masked passes look at: the clean input, or a picture of its own in every place of the batch.

h w = height, width of a training crop

A view is made where batches are made, from augmented grey levels, and is a function of (seed, step) and the place in
the batch. So it takes the place of the clean input in the masked passes and in nothing else; masks can hide tokens of
it. Its weights are those of the masked terms: with `loss.masked` alone, training sees nothing but views.

To add one: write the function, add its line to VIEWS; sweeps, tests and tables know it then.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator

from crm.corruptions import apply
from crm.data.transforms import Pair

LEVELS = 5  # severities of a corruption
DROPPED = 0.75  # largest share of pixels that `pixel_dropout` takes away
CORRUPTED = 0.5  # probability that a modality is corrupted


@dataclass(frozen=True)
class Source:
    """What a view of one place in the batch may be made of."""

    augmented: Callable[
        [int, str], Pair
    ]  # the frame of a place, augmented by the draws of a purpose ("augment": clean)
    place: int
    batch: int  # images
    mean: Sequence[float]  # of the four channels, grey levels
    families: tuple[Sequence[str], Sequence[str]]  # corruptions of RGB and of thermal to choose from
    generator: Generator

    @property
    def clean(self) -> Pair:
        """What the clean passes see."""
        return self.augmented(self.place, "augment")

    def uniform(self, *shape: int) -> torch.Tensor:
        """Numbers from 0 to 1."""
        return torch.rand(*shape, generator=self.generator)


def clean(source: Source) -> Pair:
    """The clean input itself."""
    return source.clean


def second(source: Source) -> Pair:
    """Another augmentation of the same frame, with its own label: the control that has as many forward passes."""
    return source.augmented(source.place, "second view")


def cutmix(source: Source) -> Pair:
    """A box of another image of the batch pasted at the same place into RGB, thermal and label [Yun et al. 2019].

    The box has the crop's aspect, area 1 - lambda with lambda uniform, its centre anywhere; it is cut at the edge.
    """
    (image, label), (pasted, beneath), box = _mixed(source)
    return torch.where(box, pasted, image), torch.where(box, beneath, label)


def cross_cutmix(source: Source) -> Pair:
    """As `cutmix`, but the box is pasted into one modality alone, RGB or thermal at even odds, and the label stays.

    In the box one modality shows another scene, so that what the other shows has to be believed. Our reading of
    "cross-modal CutMix", for which there is no one definition.
    """
    (image, label), (pasted, _), box = _mixed(source)
    rgb = bool(source.uniform(1) < 0.5)
    channels = torch.tensor([rgb, rgb, rgb, not rgb])[:, None, None]
    return torch.where(box & channels, pasted, image), label


def _mixed(source: Source) -> tuple[Pair, Pair, torch.Tensor]:
    """The clean input, another image of the batch, and the box (h, w) that is pasted."""
    other = (source.place + 1 + int(source.uniform(1) * (source.batch - 1))) % source.batch
    clean = source.clean
    side = float(1 - source.uniform(1)) ** 0.5
    inside = []
    for extent, centre in zip(clean[1].shape, source.uniform(2).tolist(), strict=True):
        away = (torch.arange(extent) + 0.5 - centre * extent).abs()
        inside.append(away <= side * extent / 2)
    return clean, source.augmented(other, "augment"), inside[0][:, None] & inside[1]


def pixel_dropout(source: Source) -> Pair:
    """Every pixel and channel is the mean with probability r, which is uniform up to DROPPED for each modality.

    The random missing of RMM (Liao et al. 2025) as an augmentation: whether scores under it reflect training alone.
    """
    image, label = source.clean
    rgb, thermal = (DROPPED * source.uniform(2)).tolist()
    share = torch.tensor([rgb, rgb, rgb, thermal])[:, None, None]
    mean = torch.tensor(source.mean, dtype=torch.float32)[:, None, None]
    return torch.where(source.uniform(*image.shape) < share, mean, image.to(torch.float32)), label


def corrupted(source: Source) -> Pair:
    """RGB and thermal each corrupted with probability 1/2, by a family of the group and a severity of 1 to 5.

    The control that just trains on corruptions. Every family outside its group is held out: scores under it say what
    carries over. Lengths go by the crop's width, and what is frozen in a camera is drawn anew for every image.
    """
    image, label = source.clean
    parts = []
    for channels, families in zip((slice(0, 3), slice(3, 4)), source.families, strict=True):
        pixels = image[channels].to(torch.float32).permute(1, 2, 0).numpy()
        fires, which, severity, seed = torch.rand(4, generator=source.generator, dtype=torch.float64).tolist()
        if fires < CORRUPTED:
            kind = families[int(which * len(families))]
            rng, mean = np.random.default_rng(int(seed * 2**53)), np.array(source.mean[channels], np.float32)
            pixels = apply(pixels, kind, 1.0 + int(severity * LEVELS), mean, rng)
        parts.append(torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1))
    return torch.cat(parts), label


VIEWS = {
    "clean": clean,
    "second": second,
    "cutmix": cutmix,
    "cross_cutmix": cross_cutmix,
    "pixel_dropout": pixel_dropout,
    "corrupted": corrupted,
}

# views that show something else than the clean input does: what they say cannot be distilled from it
OTHER_SCENES = {"second": "another crop of the frame", "cutmix": "parts of two frames"}

# views that need another image of the batch
OF_TWO_IMAGES = {"cutmix": "whose box is pasted", "cross_cutmix": "whose box is pasted"}

# what `corrupted` trains on, by masking.corruptions: keys of crm.corruptions.CORRUPTIONS for RGB, and for thermal
GROUPS = {
    "noise": (
        ("gaussian_noise_c", "shot_noise", "impulse_noise", "speckle_noise"),
        ("netd_noise", "column_noise", "stripes", "nonuniformity"),
    ),
    "blur": (("gaussian_blur", "defocus_blur", "motion_blur"), ("gaussian_blur", "defocus_blur", "motion_blur")),
    "light": (("fog", "low_light", "over_exposure", "glare"), ("halo", "agc", "contrast")),
}
