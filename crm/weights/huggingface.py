"""A Mask2Former with Swin backbone of Hugging Face transformers, names of version 4 and 5, under our names.

Its backbone sees three channels; both of our branches get it, the thermal one with averaged first filters.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from crm.weights.imagenet import both_branches

UNUSED = r"^criterion\.|encoder\.(swin\.)?layernorm\.|relative_position_index$"

RENAMES = (
    # Swin
    (r"^model\.pixel_level_module\.encoder\.(swin\.)?", "swin."),
    (r"^swin\.embeddings\.patch_embeddings\.projection\.", "swin.patch_embed.proj."),
    (r"^swin\.embeddings\.norm\.", "swin.patch_embed.norm."),
    (r"^swin\.encoder\.layers\.(\d)\.downsample\.", r"swin.stages.\1.merge."),
    (r"^swin\.encoder\.layers\.", "swin.stages."),
    (r"^swin\.hidden_states_norms\.stage(\d)\.", lambda found: f"swin.norms.{int(found[1]) - 1}."),
    (r"\.attention\.(?:self|relative_position_bias)\.relative_position_bias_table$",
     ".attn.relative_position_bias_table"),
    (r"\.attention\.self\.(query|key|value)\.", lambda found: f".attn.qkv.{'qkv'['qkv'.index(found[1][0])]}."),
    (r"^(swin\..*)\.attention\.([qkv])_proj\.", r"\1.attn.qkv.\2."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    # pixel decoder
    (r"^model\.pixel_level_module\.decoder\.", "pixel_decoder."),
    (r"^pixel_decoder\.input_projections\.", "pixel_decoder.projections."),
    (r"^pixel_decoder\.encoder\.layers\.", "pixel_decoder.layers."),
    (r"\.self_attn\.sampling_offsets\.", ".attention.offsets."),
    (r"\.self_attn\.attention_weights\.", ".attention.weights."),
    (r"\.self_attn\.value_proj\.", ".attention.value."),
    (r"\.self_attn\.output_proj\.", ".attention.output."),
    (r"^(pixel_decoder\..*)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"^(pixel_decoder\..*)\.final_layer_norm\.", r"\1.norm2."),
    (r"^pixel_decoder\.adapter_1\.", "pixel_decoder.lateral."),
    (r"^pixel_decoder\.layer_1\.", "pixel_decoder.smooth."),
    (r"^pixel_decoder\.mask_projection\.", "pixel_decoder.mask_features."),
    # query decoder
    (r"^model\.transformer_module\.", "query_decoder."),
    (r"^query_decoder\.queries_features\.", "query_decoder.query_feat."),
    (r"^query_decoder\.queries_embedder\.", "query_decoder.query_embed."),
    (r"^query_decoder\.decoder\.layernorm\.", "query_decoder.norm."),
    (r"^query_decoder\.decoder\.mask_predictor\.mask_embedder\.(\d)\.0\.",
     lambda found: f"query_decoder.mask_embed.{2 * int(found[1])}."),
    (r"^query_decoder\.decoder\.layers\.", "query_decoder.layers."),
    (r"\.self_attn\.([qkv])_proj\.", r".self_attention.project.\1."),
    (r"\.self_attn\.out_proj\.", ".self_attention.output."),
    (r"\.cross_attn\.in_proj_", ".cross_attention.project."),
    (r"\.cross_attn\.out_proj\.", ".cross_attention.output."),
    (r"\.self_attn_layer_norm\.", ".self_norm."),
    (r"\.cross_attn_layer_norm\.", ".cross_norm."),
    (r"\.final_layer_norm\.", ".norm."),
    (r"^((?:pixel|query)_decoder\..*)\.fc([12])\.", r"\1.linear\2."),
    (r"^class_predictor\.", "query_decoder.class_embed."),
)  # fmt: skip


def convert(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under our names, and the names of what has no place."""
    kept = {name: tensor for name, tensor in tensors.items() if not re.search(UNUSED, name)}
    parts = {_own_name(name): tensor for name, tensor in kept.items()}
    whole = _packed(parts)
    swin = {name.removeprefix("swin."): tensor for name, tensor in whole.items() if name.startswith("swin.")}
    rest = {name: tensor for name, tensor in whole.items() if not name.startswith("swin.")}
    return both_branches(swin) | rest, sorted(tensors.keys() - kept.keys())


def check_settings(settings: Mapping[str, Any]) -> None:
    """ValueError for a config.json of another model, or of a Mask2Former that computes something else."""
    backbone = settings.get("backbone_config")
    backbone = backbone if isinstance(backbone, dict) else {}
    for what, value, wanted in (
        ("model_type", settings.get("model_type"), "mask2former"),
        ("backbone_config.model_type", backbone.get("model_type"), "swin"),
        ("pre_norm", settings.get("pre_norm", False), False),
        ("activation_function", settings.get("activation_function", "relu"), "relu"),
        ("backbone_config.hidden_act", backbone.get("hidden_act", "gelu"), "gelu"),
        ("backbone_config.patch_size", backbone.get("patch_size", 4), 4),
        ("backbone_config.use_absolute_embeddings", backbone.get("use_absolute_embeddings", False), False),
    ):
        if value != wanted:
            raise ValueError(f"its config.json has {what} {value!r}, and only {wanted!r} can be taken over")


def _own_name(name: str) -> str:
    for pattern, new in RENAMES:
        name = re.sub(pattern, new, name)
    return name


def _packed(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value projections, kept apart there, as the one of ours."""
    packed: dict[str, Tensor] = {}
    for name, tensor in parts.items():
        found = re.fullmatch(r"(.*\.(?:qkv|project))\.([qkv])\.(weight|bias)", name)
        if found is None:
            packed[name] = tensor
            continue
        three = [parts.get(f"{found[1]}.{which}.{found[3]}") for which in "qkv"]
        if any(part is None for part in three):
            raise ValueError(f"it has no query, key and value for {found[1]}")
        packed[f"{found[1]}.{found[3]}"] = torch.cat([part for part in three if part is not None])
    return packed
