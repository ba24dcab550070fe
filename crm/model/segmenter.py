"""The whole network: two Swin branches, their fusion, and one head for fused and single-modality maps.

INPUTS has this network and the controls that it is compared with: one modality alone, early and late fusion.

b = batch, q = queries, k = classes, h w = height and width in tokens of stride 4 (H W in pixels)
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from crm import config
from crm.model.backbone import PATCH, STAGES, SwinBranch
from crm.model.fusion import FUSIONS, Fusion, Level
from crm.model.norm import BatchNorm
from crm.model.pixel_decoder import PixelDecoder, at_least_float32
from crm.model.query_decoder import Prediction, QueryDecoder
from crm.names import chosen

Image = Float[Tensor, "b 4 H W"]
Hidden = Bool[Tensor, "b 2 h w"]
Maps = list[Float[Tensor, "b _ _ _"]]  # strides 4, 8, 16, 32
Modality = Literal["rgb", "thermal"]

QUERIES = 8  # whose masks are there in the image's size at once


class Features(NamedTuple):
    fused: Maps
    rgb: Maps
    thermal: Maps


def build_segmenter(model: config.Model, num_classes: int) -> "Segmenter":
    """A freshly initialised network of the configured kind and size."""
    return chosen("inputs", model.inputs, INPUTS)(model, num_classes)


class Backbone(nn.Module):
    """Both branches, and what only the fused path has: per level the fusion and one BatchNorm."""

    def __init__(
        self, rgb: nn.Module, thermal: nn.Module, fusion: Sequence[Fusion] = (), norms: Sequence[BatchNorm] = ()
    ) -> None:
        super().__init__()
        self.rgb = rgb
        self.thermal = thermal
        self.fusion = nn.ModuleList(fusion)
        self.fusion_norms = nn.ModuleList(norms)


class AbsentBranch(nn.Module):
    """Stands for a branch that the network does not have: maps of zeros, whatever the image.

    Args:
        channels: of the four maps.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, image: Float[Tensor, "b i H W"], hidden: Bool[Tensor, "b h w"] | None) -> Maps:
        b, _, height, width = image.shape
        strides = [PATCH * 2**i for i in range(STAGES)]
        return [
            image.new_zeros(b, wide, height // stride, width // stride)
            for wide, stride in zip(self.channels, strides, strict=True)
        ]


class Segmenter(nn.Module):
    """RGB-thermal segmentation with masked-attention queries [CRM].

    An image is normalised, padded to a multiple of 32, and has channels R, G, B, thermal. `hidden` says which tokens
    are replaced by the mask token: index 0 in RGB, 1 in thermal, True = hidden.
    """

    def __init__(self, backbone: Backbone, pixel_decoder: PixelDecoder, query_decoder: QueryDecoder) -> None:
        super().__init__()
        self.backbone = backbone
        self.pixel_decoder = pixel_decoder
        self.query_decoder = query_decoder

    @property
    def queries(self) -> int:
        """How many there are in a prediction of the fused path."""
        return self.query_decoder.query_feat.num_embeddings

    @property
    def networks(self) -> list[list[nn.Parameter]]:
        """The parameters of what is trained as one network: their gradients are clipped together."""
        return [list(self.parameters())]

    def recompute(self, on: bool) -> None:
        """Whether activations of Swin blocks and pixel decoder layers are computed again in the backward pass."""
        for part in self.modules():
            if isinstance(part, (SwinBranch, PixelDecoder)):
                part.recompute = on

    def half_precision(self, on: bool) -> None:
        """Whether the pixel decoder's products too are in half precision under autocast."""
        for part in self.modules():
            if isinstance(part, PixelDecoder):
                part.follows_autocast = on

    def compile_parts(self) -> None:
        """Branches and head through torch.compile, one by one; matching and losses stay as they are."""
        for part in self.modules():
            if isinstance(part, (SwinBranch, PixelDecoder, QueryDecoder)):
                part.compile()

    def branch(self, modality: Modality, image: Image, hidden: Hidden | None = None) -> Maps:
        """Maps of one modality alone."""
        if modality == "rgb":
            return self.backbone.rgb(image[:, :3], None if hidden is None else hidden[:, 0])
        return self.backbone.thermal(image[:, 3:], None if hidden is None else hidden[:, 1])

    def fuse(self, rgb: Maps, thermal: Maps, hidden: Hidden | None = None, masked: bool = False) -> Maps:
        """Fused and batch-normalised maps, in float32 also under autocast.

        In training a call with clean input updates the running statistics once; FUSION_NORMS says what one with the
        masked input does, which comes after it.

        Args:
            hidden: tokens that are not there, for the fusion that goes by it; None: all are.
            masked: these are maps of the masked input of a training step.
        """
        fused = []
        with torch.autocast(rgb[0].device.type, enabled=False):
            for i, (fusion, norm) in enumerate(zip(self.backbone.fusion, self.backbone.fusion_norms, strict=True)):
                a, b = at_least_float32(rgb[i]), at_least_float32(thermal[i])
                seen = None if hidden is None else F.avg_pool2d((~hidden).to(a.dtype), 2**i)
                fused.append(norm(fusion(a, b, seen, masked), masked))
        return fused

    def reliance(self, rgb: Maps, thermal: Maps) -> dict[str, Float[Tensor, ""]]:
        """What the fusion has to tell about these maps, as in `reliance/rgb_4`: the mean weight of RGB at stride 4.

        Empty for a fusion that weighs nothing.
        """
        found = {}
        with torch.no_grad(), torch.autocast(rgb[0].device.type, enabled=False):
            for i, (fusion, a, b) in enumerate(zip(self.backbone.fusion, rgb, thermal, strict=False)):
                told = fusion.readout(at_least_float32(a), at_least_float32(b))
                found |= {f"reliance/{name}_{PATCH * 2**i}": value for name, value in told.items()}
        return found

    def penalty(self, rgb: Maps, thermal: Maps) -> Float[Tensor, ""] | None:
        """What the fusion of these maps adds to the loss, summed over images and levels; None: nothing."""
        levels = zip(self.backbone.fusion, rgb, thermal, strict=False)
        with torch.autocast(rgb[0].device.type, enabled=False):
            found = [fusion.penalty(at_least_float32(a), at_least_float32(b)) for fusion, a, b in levels]
        there = [value for value in found if value is not None]
        return torch.stack(there).sum() if there else None

    def features(self, image: Image, hidden: Hidden | None = None) -> Features:
        """Maps of all three paths."""
        rgb = self.branch("rgb", image, hidden)
        thermal = self.branch("thermal", image, hidden)
        return Features(self.fuse(rgb, thermal), rgb, thermal)

    def head(self, maps: Maps, deep: bool = True, with_masks: int | None = None) -> Prediction:
        """Predictions from the maps of one path.

        Args:
            deep: every decoder output, not the last alone.
            with_masks: mask logits of the first images only; the others give class logits alone. None is all.
        """
        features, levels = self.pixel_decoder(maps)
        return self.query_decoder(features, levels, deep, len(features) if with_masks is None else with_masks)

    def class_logits(self, maps: Maps) -> Float[Tensor, "b q k1"]:
        """Class logits of the last decoder output, without the cost of any mask logits."""
        return self.head(maps, deep=False, with_masks=0).class_logits[-1]

    def forward(self, image: Image, hidden: Hidden | None = None) -> Prediction:
        """Prediction of the fused path: every decoder output in training, the last one in evaluation."""
        rgb = self.branch("rgb", image, hidden)
        thermal = self.branch("thermal", image, hidden)
        return self.head(self.fuse(rgb, thermal), deep=self.training)


def semantic_scores(prediction: Prediction, size: tuple[int, int]) -> Float[Tensor, "b k H W"]:
    """Score of every class at every pixel of the padded image of `size` (released code); not normalised.

    Sum over the last output's queries of class probability times mask probability, "no object" left out. A few queries
    at a time: masks of the image's size are the largest tensors of an evaluation.
    """
    class_logits, mask_logits = (at_least_float32(logits[-1]) for logits in prediction)
    probability = class_logits.softmax(dim=2)[..., :-1].mT
    scores = probability.new_zeros(*probability.shape[:2], size[0] * size[1])
    for some, logits in zip(probability.split(QUERIES, dim=2), mask_logits.split(QUERIES, dim=1), strict=True):
        masks = F.interpolate(logits, size=size, mode="bilinear", align_corners=False).sigmoid_()
        scores = scores.baddbmm_(some, masks.flatten(2))
    return scores.unflatten(2, size)


# ---------------------------------------------------------------------------------------------- controls


class OneBranch(Segmenter):
    """One modality alone: its maps go to the head as they are, without fusion and its norms.

    The other branch is absent. What is done to that modality changes nothing, and a head that is fed it alone
    ("missing_route") sees zeros.
    """

    def __init__(
        self, backbone: Backbone, pixel_decoder: PixelDecoder, query_decoder: QueryDecoder, modality: Modality
    ) -> None:
        super().__init__(backbone, pixel_decoder, query_decoder)
        self.modality = modality

    def fuse(self, rgb: Maps, thermal: Maps, hidden: Hidden | None = None, masked: bool = False) -> Maps:
        return rgb if self.modality == "rgb" else thermal


class EarlyFusion(Segmenter):
    """One branch with a stem of four channels.

    What goes by the name of maps before the head are the pixels of one modality, 4 x 4 to a token, those of the other 0
    (the data set's mean): `fuse` puts them together and `head` has the branch. So a modality around which is routed is
    the mean image, and so are hidden tokens.
    """

    def branch(self, modality: Modality, image: Image, hidden: Hidden | None = None) -> Maps:
        own = slice(0, 3) if modality == "rgb" else slice(3, 4)
        pixels = torch.zeros_like(image)
        pixels[:, own] = image[:, own]
        tokens = F.pixel_unshuffle(pixels, PATCH)
        if hidden is not None:
            index = 0 if modality == "rgb" else 1
            tokens = tokens.masked_fill(hidden[:, index : index + 1], 0)
        return [tokens]

    def fuse(self, rgb: Maps, thermal: Maps, hidden: Hidden | None = None, masked: bool = False) -> Maps:
        return [rgb[0] + thermal[0]]

    def head(self, maps: Maps, deep: bool = True, with_masks: int | None = None) -> Prediction:
        return super().head(self.backbone.rgb(F.pixel_shuffle(maps[0], PATCH), None), deep, with_masks)


class LateFusion(Segmenter):
    """Two whole networks, one per modality, trained side by side; what is predicted is the average of their scores.

    They share nothing but the run: seed, images, optimiser settings. The gradient of each is clipped by itself. A score
    is a sum over queries, so the sum of both networks' scores is that of all their queries together, and the factor 1/2
    changes neither class nor confidence. What goes by the name of maps has the channels of both, those of a modality
    that is not there 0: a network whose modality is not there is left out, so that a modality around which is routed
    ("missing_route") is dropped.

    Args:
        heads: pixel and query decoder of RGB, then those of thermal.
    """

    def __init__(self, backbone: Backbone, *heads: tuple[PixelDecoder, QueryDecoder]) -> None:
        rgb, thermal = heads
        super().__init__(backbone, *rgb)
        self.pixel_decoder_thermal, self.query_decoder_thermal = thermal

    @property
    def queries(self) -> int:
        return super().queries + self.query_decoder_thermal.query_feat.num_embeddings

    @property
    def networks(self) -> list[list[nn.Parameter]]:
        thermal = (self.backbone.thermal, self.pixel_decoder_thermal, self.query_decoder_thermal)
        rgb = (self.backbone.rgb, self.pixel_decoder, self.query_decoder)
        return [[parameter for part in parts for parameter in part.parameters()] for parts in (rgb, thermal)]

    def branch(self, modality: Modality, image: Image, hidden: Hidden | None = None) -> Maps:
        maps = super().branch(modality, image, hidden)
        before, after = (1, 0) if modality == "thermal" else (0, 1)
        return [F.pad(level, (0, 0, 0, 0, before * level.shape[1], after * level.shape[1])) for level in maps]

    def fuse(self, rgb: Maps, thermal: Maps, hidden: Hidden | None = None, masked: bool = False) -> Maps:
        return [a + b for a, b in zip(rgb, thermal, strict=True)]

    def head(self, maps: Maps, deep: bool = True, with_masks: int | None = None) -> Prediction:
        """Queries of the network whose modality an image has; of both, RGB first, where any image has both.

        A query of a modality that an image does not have then says "no object" there.
        """
        halves = [[level.chunk(2, dim=1)[i] for level in maps] for i in (0, 1)]
        there = torch.stack([half[-1].flatten(1).any(dim=1) for half in halves]).tolist()
        rows = [[row for row, is_there in enumerate(one) if is_there] for one in there]
        found = [self._one(i, [level[rows[i]] for level in half], deep) for i, half in enumerate(halves) if rows[i]]
        if set(rows[0]) & set(rows[1]):
            spread = [_spread(one, own, len(maps[0])) for one, own in zip(found, rows, strict=True)]
            classes, masks = (torch.cat(parts, dim=2) for parts in zip(*spread, strict=True))
        else:
            place = torch.tensor(rows[0] + rows[1]).argsort()
            classes, masks = (torch.cat(parts, dim=1)[:, place] for parts in zip(*found, strict=True))
        return Prediction(classes, masks[:, : len(maps[0]) if with_masks is None else with_masks])

    def _one(self, index: int, maps: Maps, deep: bool) -> Prediction:
        pixel, query = (
            (self.pixel_decoder_thermal, self.query_decoder_thermal)
            if index
            else (self.pixel_decoder, self.query_decoder)
        )
        features, levels = pixel(maps)
        return query(features, levels, deep, len(features))


def _spread(prediction: Prediction, rows: Sequence[int], images: int) -> Prediction:
    """The prediction of some images among all; the others have queries whose classes have probability 0."""
    classes, masks = (x.new_zeros(x.shape[0], images, *x.shape[2:]) for x in prediction)
    classes[..., :-1] = -1e4
    classes[:, rows], masks[:, rows] = prediction
    return Prediction(classes, masks)


def _branch(model: config.Model, channels: int, **sharing) -> SwinBranch:
    return SwinBranch(channels, model.embed, model.depths, model.heads, model.window, model.drop_path, **sharing)


def _channels(model: config.Model) -> list[int]:
    """Of the four maps."""
    return [model.embed * 2**i for i in range(STAGES)]


def _head(model: config.Model, num_classes: int) -> tuple[PixelDecoder, QueryDecoder]:
    return (
        PixelDecoder(_channels(model), model.width, model.encoder_layers, model.decoder_heads, model.encoder_ffn),
        QueryDecoder(
            num_classes, model.width, model.queries, model.decoder_layers, model.decoder_heads, model.decoder_ffn
        ),
    )


def _two_branches(model: config.Model, num_classes: int) -> Segmenter:
    """Both modalities in two branches whose maps are fused: the published network."""
    rgb = _branch(model, 3)
    thermal = _branch(model, 1, shared=rgb, share_from=model.share_from)
    head = _head(model, num_classes)
    norm = partial(BatchNorm, sync=model.sync_norm, how=model.fusion_norm)
    make = chosen("fusion", model.fusion, FUSIONS)
    # last, so that everything else starts from the same values whatever the fusion
    fusion = [
        make(Level(channels, heads, norm, model.sparsity))
        for channels, heads in zip(_channels(model), model.heads, strict=True)
    ]
    return Segmenter(Backbone(rgb, thermal, fusion, [norm(channels) for channels in _channels(model)]), *head)


def _one_branch(model: config.Model, num_classes: int, modality: Modality) -> Segmenter:
    """One modality alone."""
    branches = {"rgb": _branch(model, 3), "thermal": _branch(model, 1)}
    branches = {
        name: branch if name == modality else AbsentBranch(_channels(model)) for name, branch in branches.items()
    }
    return OneBranch(Backbone(**branches), *_head(model, num_classes), modality=modality)


def _early(model: config.Model, num_classes: int) -> Segmenter:
    """One branch with a stem of four channels."""
    backbone = Backbone(_branch(model, 4), AbsentBranch(_channels(model)))
    return EarlyFusion(backbone, *_head(model, num_classes))


def _late(model: config.Model, num_classes: int) -> Segmenter:
    """The average of two networks of one modality each."""
    backbone = Backbone(_branch(model, 3), _branch(model, 1))
    return LateFusion(backbone, *(_head(model, num_classes) for _ in range(2)))


# name -> what makes the network
INPUTS: dict[str, Callable[[config.Model, int], Segmenter]] = {
    "both": _two_branches,
    "rgb": partial(_one_branch, modality="rgb"),
    "thermal": partial(_one_branch, modality="thermal"),
    "early": _early,
    "late": _late,
}
