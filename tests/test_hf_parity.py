"""The single-modality path against Mask2Former of transformers, with random weights of ours in both.

transformers is a second implementation of everything but the fusion, the second branch and the mask token.
"""

import pytest
import torch
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from crm.config import Model
from crm.model.segmenter import Segmenter, build_segmenter, semantic_scores
from crm.weights import export_name

PART = Model(
    embed=16, depths=(2, 2, 3, 2), heads=(1, 2, 4, 4), drop_path=0.0, width=32, queries=7, encoder_layers=2,
    encoder_ffn=40, decoder_layers=4, decoder_ffn=24, decoder_heads=4,
)  # fmt: skip
CLASSES = 5
ENCODER, DECODER = "model.pixel_level_module.encoder.", "model.pixel_level_module.decoder."
TRANSFORMER = "model.transformer_module."

# Released names, the branch's and the head's prefixes left out, to those of transformers 5 (method.md 1.11); the
# longest fitting beginning counts.
NAMES = {
    "patch_embed.proj.": f"{ENCODER}swin.embeddings.patch_embeddings.projection.",
    "patch_embed.norm.": f"{ENCODER}swin.embeddings.norm.",
    "layers.": f"{ENCODER}swin.encoder.layers.",
    "pixel_decoder.input_proj.": f"{DECODER}input_projections.",
    "pixel_decoder.transformer.level_embed": f"{DECODER}level_embed",
    "pixel_decoder.transformer.encoder.": f"{DECODER}encoder.",
    "pixel_decoder.adapter_1.norm.": f"{DECODER}adapter_1.1.",
    "pixel_decoder.adapter_1.": f"{DECODER}adapter_1.0.",
    "pixel_decoder.layer_1.norm.": f"{DECODER}layer_1.1.",
    "pixel_decoder.layer_1.": f"{DECODER}layer_1.0.",
    "pixel_decoder.mask_features.": f"{DECODER}mask_projection.",
    "predictor.query_feat.": f"{TRANSFORMER}queries_features.",
    "predictor.query_embed.": f"{TRANSFORMER}queries_embedder.",
    "predictor.level_embed.": f"{TRANSFORMER}level_embed.",
    "predictor.decoder_norm.": f"{TRANSFORMER}decoder.layernorm.",
    "predictor.class_embed.": "class_predictor.",
    **{f"norm{i}.": f"{ENCODER}hidden_states_norms.stage{i + 1}." for i in range(4)},
    **{
        f"predictor.mask_embed.layers.{i}.": f"{TRANSFORMER}decoder.mask_predictor.mask_embedder.{i}.0."
        for i in range(3)
    },
}
PARTS = {
    ".attn.proj.": ".attention.o_proj.",
    ".attn.relative_position_bias_table": ".attention.relative_position_bias.relative_position_bias_table",
    ".attn.qkv.": ".attention.{}_proj.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
}
PIXEL_PARTS = {".norm1.": ".self_attn_layer_norm.", ".norm2.": ".final_layer_norm.", ".linear": ".fc"}
PREDICTOR_PARTS = {
    "transformer_self_attention_layers.": ("self_attn", ".self_attn.in_proj_", ".self_attn_layer_norm."),
    "transformer_cross_attention_layers.": ("cross_attn", None, ".cross_attn_layer_norm."),
    "transformer_ffn_layers.": (None, None, ".final_layer_norm."),
}


def theirs(name: str) -> str | None:
    """The name in transformers of one of our tensors; `{}` stands for q, k and v where ours are packed."""
    name = export_name(name)
    for prefix in ("backbone.RGB_branch.", "sem_seg_head."):
        name = name.removeprefix(prefix)
    if name.startswith("backbone.") or name.endswith("mask_token"):
        return None
    for start, (attention, packed, norm) in PREDICTOR_PARTS.items():
        if name.startswith(f"predictor.{start}"):
            name = name.removeprefix(f"predictor.{start}").replace(".norm.", norm).replace(".linear", ".fc")
            name = name.replace(".multihead_attn.", f".{attention}.")
            if packed and packed in name:
                name = name.replace(packed, ".self_attn.{}_proj.")
            return f"{TRANSFORMER}decoder.layers.{name}"
    for part, new in (PIXEL_PARTS if "encoder.layers" in name else PARTS).items():
        name = name.replace(part, new)
    start = max((start for start in NAMES if name.startswith(start)), key=len)
    return NAMES[start] + name.removeprefix(start)


def translated(model: Segmenter) -> dict[str, Tensor]:
    """Our RGB branch and head as a state dict of transformers."""
    found = {}
    for name, tensor in model.state_dict().items():
        if (new := theirs(name)) is None:
            continue
        if "{}" in new:
            found |= {new.format(letter): part for letter, part in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            found[new] = tensor
    return found


@pytest.fixture(scope="module")
def ours() -> Segmenter:
    """A network in which nothing is at its initial value."""
    torch.manual_seed(0)
    model = build_segmenter(PART, CLASSES).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def reference(ours) -> Mask2FormerForUniversalSegmentation:
    backbone = SwinConfig(
        embed_dim=PART.embed,
        depths=list(PART.depths),
        num_heads=list(PART.heads),
        window_size=PART.window,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=PART.width,
        mask_feature_size=PART.width,
        hidden_dim=PART.width,
        encoder_layers=PART.encoder_layers,
        encoder_feedforward_dim=PART.encoder_ffn,
        decoder_layers=PART.decoder_layers + 1,
        dim_feedforward=PART.decoder_ffn,
        num_attention_heads=PART.decoder_heads,
        num_queries=PART.queries,
        num_labels=CLASSES,
        use_auxiliary_loss=True,
        output_auxiliary_logits=True,
    )
    model = Mask2FormerForUniversalSegmentation(config).eval()
    given = model.load_state_dict(translated(ours), strict=False)
    assert not given.unexpected_keys
    unused = {"model.pixel_level_module.encoder.swin.layernorm.weight", "criterion.empty_weight"}
    assert set(given.missing_keys) == unused | {"model.pixel_level_module.encoder.swin.layernorm.bias"}
    return model


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(64, 96), (224, 224), (96, 160), (160, 32), (256, 320)])
def test_the_single_modality_path_equals_mask2former_of_transformers(ours, reference, height, width):
    image = torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(height * width))
    wanted = reference(pixel_values=image[:, :3], output_hidden_states=True)
    maps = ours.branch("rgb", image)
    for level, recorded in zip(maps, wanted.encoder_hidden_states, strict=True):
        torch.testing.assert_close(level, recorded, rtol=0, atol=2e-5)
    prediction = ours.head(maps)
    torch.testing.assert_close(prediction.class_logits[-1], wanted.class_queries_logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(prediction.mask_logits[-1], wanted.masks_queries_logits, rtol=1e-5, atol=2e-4)
    for output, auxiliary in enumerate(wanted.auxiliary_logits):
        torch.testing.assert_close(
            prediction.class_logits[output], auxiliary["class_queries_logits"], rtol=0, atol=1e-4
        )
        torch.testing.assert_close(
            prediction.mask_logits[output], auxiliary["masks_queries_logits"], rtol=1e-5, atol=2e-4
        )


@torch.no_grad()
def test_semantic_scores_equal_those_of_the_logits_of_transformers(ours, reference):
    image = torch.randn(1, 4, 64, 96, generator=torch.Generator().manual_seed(0))
    wanted = reference(pixel_values=image[:, :3])
    masks = torch.nn.functional.interpolate(wanted.masks_queries_logits, size=(64, 96), mode="bilinear").sigmoid()
    probability = wanted.class_queries_logits.softmax(2)[..., :-1]
    scores = (probability.transpose(1, 2) @ masks.flatten(2)).unflatten(2, (64, 96))
    prediction = ours.head(ours.branch("rgb", image), deep=False)
    torch.testing.assert_close(semantic_scores(prediction, (64, 96)), scores, rtol=0, atol=2e-4)
