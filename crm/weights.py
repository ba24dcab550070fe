"""Weights of the released code, renamed to ours."""

import re
from collections.abc import Mapping

from torch import Tensor

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


def released_name(name: str) -> str | None:
    """Our name of a tensor of the released state dict; None for what is no weight."""
    if re.search(UNUSED, name):
        return None
    for pattern, new in RENAMES:
        name = re.sub(pattern, new, name)
    return name


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
