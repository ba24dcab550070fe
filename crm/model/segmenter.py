"""The whole network: two Swin branches, their fusion, and one head for fused and single-modality maps.

b = batch, q = queries, k = classes, h w = height and width in tokens of stride 4 (H W in pixels)
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from crm import config
from crm.model.backbone import STAGES, SwinBranch
from crm.model.fusion import FUSIONS
from crm.model.norm import BatchNorm
from crm.model.pixel_decoder import PixelDecoder, at_least_float32
from crm.model.query_decoder import Prediction, QueryDecoder
from crm.names import chosen

Image = Float[Tensor, "b 4 H W"]
Hidden = Bool[Tensor, "b 2 h w"]
Maps = list[Float[Tensor, "b _ _ _"]]  # strides 4, 8, 16, 32
Modality = Literal["rgb", "thermal"]


class Features(NamedTuple):
    fused: Maps
    rgb: Maps
    thermal: Maps


def build_segmenter(model: config.Model, num_classes: int) -> "Segmenter":
    """A freshly initialised network of the configured size."""
    swin = (model.embed, model.depths, model.heads, model.window, model.drop_path)
    rgb = SwinBranch(3, *swin)
    thermal = SwinBranch(1, *swin, shared=rgb, share_from=model.share_from)
    channels = [model.embed * 2**i for i in range(STAGES)]
    return Segmenter(
        Backbone(rgb, thermal, channels, chosen("fusion", model.fusion, FUSIONS), model.sync_norm),
        PixelDecoder(channels, model.width, model.encoder_layers, model.decoder_heads, model.encoder_ffn),
        QueryDecoder(
            num_classes, model.width, model.queries, model.decoder_layers, model.decoder_heads, model.decoder_ffn
        ),
    )


class Backbone(nn.Module):
    """Both branches, and what only the fused path has: the fusion and one BatchNorm per level."""

    def __init__(
        self,
        rgb: SwinBranch,
        thermal: SwinBranch,
        channels: Sequence[int],
        fusion: Callable[[Tensor, Tensor], Tensor],
        sync_norm: bool,
    ) -> None:
        super().__init__()
        self.rgb = rgb
        self.thermal = thermal
        self.fusion = fusion
        self.fusion_norms = nn.ModuleList(BatchNorm(wide, sync_norm) for wide in channels)


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

    def recompute(self, on: bool) -> None:
        """Whether activations of Swin blocks and pixel decoder layers are computed again in the backward pass."""
        self.backbone.rgb.recompute = self.backbone.thermal.recompute = self.pixel_decoder.recompute = on

    def compile_parts(self) -> None:
        """Branches and head through torch.compile, one by one; matching and losses stay as they are."""
        for part in (self.backbone.rgb, self.backbone.thermal, self.pixel_decoder, self.query_decoder):
            part.compile()

    def branch(self, modality: Modality, image: Image, hidden: Hidden | None = None) -> Maps:
        """Maps of one modality alone."""
        if modality == "rgb":
            return self.backbone.rgb(image[:, :3], None if hidden is None else hidden[:, 0])
        return self.backbone.thermal(image[:, 3:], None if hidden is None else hidden[:, 1])

    def fuse(self, rgb: Maps, thermal: Maps) -> Maps:
        """Fused and batch-normalised maps. In training each call updates the running statistics once."""
        levels = zip(self.backbone.fusion_norms, rgb, thermal, strict=True)
        return [norm(self.backbone.fusion(a, b)) for norm, a, b in levels]

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

    Sum over the last output's queries of class probability times mask probability, "no object" left out.
    """
    class_logits, mask_logits = (at_least_float32(logits[-1]) for logits in prediction)
    masks = F.interpolate(mask_logits, size=size, mode="bilinear", align_corners=False)
    probability = class_logits.softmax(dim=2)[..., :-1]
    return torch.einsum("bqk,bqhw->bkhw", probability, masks.sigmoid())
