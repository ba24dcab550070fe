"""Weights of the released code: its names, ours, and its file format."""

import io
import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from crm.config import Model
from crm.model.segmenter import Segmenter

UNUSED = r"relative_position_index$|^(network\.)?criterion\.empty_weight$"

RENAMES = (
    (r"^network\.", ""),
    (r"^backbone\.RGB_branch\.", "backbone.rgb."),
    (r"^backbone\.THR_branch\.", "backbone.thermal."),
    (r"^(backbone\.\w+)\.layers\.(\d)\.downsample\.", r"\1.stages.\2.merge."),
    (r"^(backbone\.\w+)\.layers\.", r"\1.stages."),
    (r"^(backbone\.\w+)\.norm(\d)\.", r"\1.norms.\2."),
    (r"^backbone\.norm_layers\.res(\d)\.", lambda found: f"backbone.fusion_norms.{int(found[1]) - 2}."),
    (r"^sem_seg_head\.pixel_decoder\.", "pixel_decoder."),
    (r"^pixel_decoder\.input_proj\.", "pixel_decoder.projections."),
    (r"^pixel_decoder\.transformer\.level_embed$", "pixel_decoder.level_embed"),
    (r"^pixel_decoder\.transformer\.encoder\.layers\.", "pixel_decoder.layers."),
    (r"\.self_attn\.sampling_offsets\.", ".attention.offsets."),
    (r"\.self_attn\.attention_weights\.", ".attention.weights."),
    (r"\.self_attn\.value_proj\.", ".attention.value."),
    (r"\.self_attn\.output_proj\.", ".attention.output."),
    (r"^pixel_decoder\.adapter_1\.weight$", "pixel_decoder.lateral.0.weight"),
    (r"^pixel_decoder\.adapter_1\.norm\.", "pixel_decoder.lateral.1."),
    (r"^pixel_decoder\.layer_1\.weight$", "pixel_decoder.smooth.0.weight"),
    (r"^pixel_decoder\.layer_1\.norm\.", "pixel_decoder.smooth.1."),
    (r"^sem_seg_head\.predictor\.", "query_decoder."),
    (r"\.transformer_self_attention_layers\.(\d+)\.self_attn\.", r".layers.\1.self_attention."),
    (r"\.transformer_self_attention_layers\.(\d+)\.norm\.", r".layers.\1.self_norm."),
    (r"\.transformer_cross_attention_layers\.(\d+)\.multihead_attn\.", r".layers.\1.cross_attention."),
    (r"\.transformer_cross_attention_layers\.(\d+)\.norm\.", r".layers.\1.cross_norm."),
    (r"\.transformer_ffn_layers\.(\d+)\.", r".layers.\1."),
    (r"\.in_proj_", ".project."),
    (r"\.out_proj\.", ".output."),
    (r"^query_decoder\.decoder_norm\.", "query_decoder.norm."),
    (r"^query_decoder\.mask_embed\.layers\.(\d)\.", lambda found: f"query_decoder.mask_embed.{2 * int(found[1])}."),
)

# The way back, applied in this order.
BACK = (
    (r"^backbone\.rgb\.", "backbone.RGB_branch."),
    (r"^backbone\.thermal\.", "backbone.THR_branch."),
    (r"^(backbone\.\w+)\.stages\.(\d)\.merge\.", r"\1.layers.\2.downsample."),
    (r"^(backbone\.\w+)\.stages\.", r"\1.layers."),
    (r"^(backbone\.\w+)\.norms\.(\d)\.", r"\1.norm\2."),
    (r"^backbone\.fusion_norms\.(\d)\.", lambda found: f"backbone.norm_layers.res{int(found[1]) + 2}."),
    (r"^pixel_decoder\.projections\.", "pixel_decoder.input_proj."),
    (r"^pixel_decoder\.level_embed$", "pixel_decoder.transformer.level_embed"),
    (r"^pixel_decoder\.layers\.", "pixel_decoder.transformer.encoder.layers."),
    (r"\.attention\.offsets\.", ".self_attn.sampling_offsets."),
    (r"\.attention\.weights\.", ".self_attn.attention_weights."),
    (r"\.attention\.value\.", ".self_attn.value_proj."),
    (r"\.attention\.output\.", ".self_attn.output_proj."),
    (r"^pixel_decoder\.lateral\.0\.", "pixel_decoder.adapter_1."),
    (r"^pixel_decoder\.lateral\.1\.", "pixel_decoder.adapter_1.norm."),
    (r"^pixel_decoder\.smooth\.0\.", "pixel_decoder.layer_1."),
    (r"^pixel_decoder\.smooth\.1\.", "pixel_decoder.layer_1.norm."),
    (r"^query_decoder\.norm\.", "query_decoder.decoder_norm."),
    (r"^query_decoder\.mask_embed\.(\d)\.", lambda found: f"query_decoder.mask_embed.layers.{int(found[1]) // 2}."),
    (r"\.layers\.(\d+)\.self_attention\.", r".transformer_self_attention_layers.\1.self_attn."),
    (r"\.layers\.(\d+)\.self_norm\.", r".transformer_self_attention_layers.\1.norm."),
    (r"\.layers\.(\d+)\.cross_attention\.", r".transformer_cross_attention_layers.\1.multihead_attn."),
    (r"\.layers\.(\d+)\.cross_norm\.", r".transformer_cross_attention_layers.\1.norm."),
    (r"^query_decoder\.layers\.(\d+)\.(?=linear|norm)", r"query_decoder.transformer_ffn_layers.\1."),
    (r"\.project\.", ".in_proj_"),
    (r"^(query_decoder\..*)\.output\.", r"\1.out_proj."),
    (r"^pixel_decoder\.", "sem_seg_head.pixel_decoder."),
    (r"^query_decoder\.", "sem_seg_head.predictor."),
)

# The released modules rewrite the names of a state dict that does not say it is of this version (method.md 1.11).
VERSIONS = {"sem_seg_head": 2, "sem_seg_head.predictor": 2}


def released_name(name: str) -> str | None:
    """Our name of a tensor of the released state dict; None for what is no weight."""
    if re.search(UNUSED, name):
        return None
    for pattern, new in RENAMES:
        name = re.sub(pattern, new, name)
    return name


def export_name(name: str) -> str:
    """The released name of one of our tensors, without the prefix `network.`."""
    for pattern, new in BACK:
        name = re.sub(pattern, new, name)
    return name


def convert(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A released state dict under our names, and the names of what is no weight."""
    named = {name: released_name(name) for name in tensors}
    return (
        {new: tensors[name] for name, new in named.items() if new is not None},
        [name for name, new in named.items() if new is None],
    )


def load_released(model: Segmenter, state_dict: Mapping[str, Tensor]) -> None:
    """Fills `model` with released weights, with or without the prefix `network.`; refuses any gap or surplus."""
    renamed = {new: tensor for name, tensor in state_dict.items() if (new := released_name(name)) is not None}
    own = model.state_dict()
    skipped = {name for name in own if re.search(UNUSED, name)}
    missing = sorted(own.keys() - renamed.keys() - skipped)
    unexpected = sorted(renamed.keys() - own.keys())
    shapes = [
        f"{name} {tuple(renamed[name].shape)} instead of {tuple(own[name].shape)}"
        for name in sorted(own.keys() & renamed.keys())
        if own[name].shape != renamed[name].shape
    ]
    if missing or unexpected or shapes:
        raise ValueError(f"released weights do not fit: missing {missing}; unexpected {unexpected}; shapes {shapes}")
    model.load_state_dict(own | renamed)


def refuse_unreleased(model: Model) -> None:
    """ValueError for a network that the released code has no form of."""
    for name, has in (("inputs", ("both",)), ("fusion", ("max", "add"))):
        if (value := getattr(model, name)) not in has:
            raise ValueError(f"the released code has no network of model.{name} {value!r}, only of {', '.join(has)}")


def released_file(model: Segmenter, no_object: float, step: int) -> bytes:
    """A checkpoint file that the released code loads: trainer state with the weights under `network.`.

    Args:
        no_object: class weight of "no object"; the released state dict holds it.
        step: of training, as the trainer would have counted it.
    """
    buffer = io.BytesIO()
    state: dict[str, Any] = {
        "epoch": 0,
        "global_step": step,
        "pytorch-lightning_version": "1.9.2",  # the one of the released environment; it migrates files without
        "state_dict": released_state(model, no_object),
    }
    torch.save(state, buffer)
    return buffer.getvalue()


def released_state(model: Segmenter, no_object: float) -> "OrderedDict[str, Tensor]":
    """Our weights as the released code's own `state_dict()` would hold them, with the version of every module."""
    own = {export_name(name): tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(index := getattr(module, "relative_position_index", None), Tensor):
            side = math.isqrt(index.numel())  # a table that the released code stores
            own[f"{export_name(f'{name}.')}relative_position_index"] = index.view(side, side).cpu()
    weight = torch.ones(model.query_decoder.class_embed.out_features)
    weight[-1] = no_object
    own["criterion.empty_weight"] = weight
    state = OrderedDict((f"network.{name}", tensor) for name, tensor in sorted(own.items()))
    state._metadata = _versions(list(own))  # pyright: ignore[reportAttributeAccessIssue] - where torch keeps it
    return state


def _versions(names: list[str]) -> "OrderedDict[str, dict[str, int]]":
    """Module versions by path, as `nn.Module.state_dict` writes them."""
    paths = {"", "network"}
    for name in names:
        parts = name.split(".")[:-1]
        paths |= {".".join(["network", *parts[: i + 1]]) for i in range(len(parts))}
    versions = {f"network.{path}": version for path, version in VERSIONS.items()}
    versions |= {f"network.backbone.norm_layers.res{i}": 2 for i in range(2, 6)}  # BatchNorm counts its batches since 2
    return OrderedDict((path, {"version": versions.get(path, 1)}) for path in sorted(paths))
