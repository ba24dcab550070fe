"""The architecture of a network, read off its tensors (under our names)."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, fields

import torch
from torch import Tensor

from crm.config import Model
from crm.model.backbone import STAGES
from crm.model.pixel_decoder import LEVELS, POINTS

NAMED = {
    "Swin-T": (96, (2, 2, 6, 2)),
    "Swin-S": (96, (2, 2, 18, 2)),
    "Swin-B": (128, (2, 2, 18, 2)),
    "Swin-L": (192, (2, 2, 18, 2)),
}
SWIN = ("embed", "depths", "heads", "window")
# what tensors cannot say for certain
FREE = ("init", "thermal_stem", "inputs", "drop_path", "fusion", "fusion_norm", "sparsity", "share_from", "sync_norm")

Weights = Mapping[str, Tensor]


def swin_name(model: Model) -> str:
    """`Swin-T (embed 96, depths 2-2-6-2, window 7)`; the numbers alone where the size has no name."""
    size = f"embed {model.embed}, depths {'-'.join(map(str, model.depths))}, window {model.window}"
    name = next((name for name, shape in NAMED.items() if shape == (model.embed, model.depths)), "a Swin")
    return f"{name} ({size})"


def infer_swin(weights: Weights, branch: str = "backbone.rgb.") -> Model:
    """The Swin of one branch; every other field of the result has its default. ValueError if it is no whole Swin."""
    depths, heads, windows = [], [], set()
    for stage in range(STAGES):
        depths.append(_count(weights, f"{branch}stages.{stage}.blocks."))
        rows, columns = _shape(weights, f"{branch}stages.{stage}.blocks.0.attn.relative_position_bias_table", 2)
        side = math.isqrt(rows)
        if side**2 != rows or side % 2 == 0:
            raise ValueError(f"stage {stage} has a bias table of {rows} rows, which no window has")
        windows.add((side + 1) // 2)
        heads.append(columns)
    if len(windows) > 1:
        raise ValueError(f"its stages have windows of {sorted(windows)} tokens; ours have one size")
    (embed,) = _shape(weights, f"{branch}patch_embed.norm.weight", 1)
    return Model(embed=embed, depths=tuple(depths), heads=tuple(heads), window=windows.pop())


def infer(weights: Weights) -> tuple[Model, int]:
    """The whole architecture and the number of classes; fusion and drop path keep their defaults."""
    swin = infer_swin(weights)
    offsets, width = _shape(weights, "pixel_decoder.layers.0.attention.offsets.weight", 2)
    found = {
        **{name: getattr(swin, name) for name in SWIN},
        "share_from": _shared_from(weights, swin.depths),
        "width": width,
        "queries": _shape(weights, "query_decoder.query_feat.weight", 2)[0],
        "encoder_layers": _count(weights, "pixel_decoder.layers."),
        "encoder_ffn": _shape(weights, "pixel_decoder.layers.0.linear1.weight", 2)[0],
        "decoder_layers": _count(weights, "query_decoder.layers."),
        "decoder_ffn": _shape(weights, "query_decoder.layers.0.linear1.weight", 2)[0],
        "decoder_heads": offsets // (LEVELS * POINTS * 2),
    }
    return Model(**found), _shape(weights, "query_decoder.class_embed.weight", 2)[0] - 1


def conflicts(model: Model, found: Model) -> list[str]:
    """Where a network of `found`'s tensors is not `model`, as `decoder_layers 9, not 6`; empty if they fit."""
    there, here = asdict(found), asdict(model)
    wrong = [
        f"{field.name} {there[field.name]}, not {here[field.name]}"
        for field in fields(Model)
        if field.name in there and field.name not in FREE and here[field.name] != there[field.name]
    ]
    if model.share_from < found.share_from:
        wrong.append(f"share_from {found.share_from}, not {model.share_from}")
    return wrong


def refuse_other_swin(found: Model, wanted: Model, what: str) -> None:
    """ValueError if a file's Swin is not the wanted one: names both.

    Args:
        what: the file, for the message.
    """
    if any(getattr(found, name) != getattr(wanted, name) for name in SWIN):
        raise ValueError(
            f"{what} holds {swin_name(found)}, but the model is {swin_name(wanted)}; "
            "take a file of that size, or an experiment of the file's"
        )


def _shared_from(weights: Weights, depths: tuple[int, ...]) -> int:
    """The first stage from which on both branches hold the same tensors."""
    for stage in reversed(range(len(depths))):
        rgb = {name for name in weights if name.startswith(f"backbone.rgb.stages.{stage}.")}
        twins = {name: name.replace(".rgb.", ".thermal.", 1) for name in rgb}
        if not all(twin in weights and torch.equal(weights[name], weights[twin]) for name, twin in twins.items()):
            return stage + 1
    return 0


def _count(weights: Weights, prefix: str) -> int:
    """How many numbered parts there are below a prefix; ValueError unless they are numbered from 0 without a gap."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    numbers = {int(found[1]) for name in weights if (found := pattern.match(name))}
    if not numbers or numbers != set(range(len(numbers))):
        raise ValueError(f"it has no {prefix}0, or a gap after it")
    return len(numbers)


def _shape(weights: Weights, name: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there."""
    if name not in weights:
        raise ValueError(f"it has no {name}")
    if weights[name].ndim != axes:
        raise ValueError(f"{name} has shape {tuple(weights[name].shape)}, which has not {axes} axes")
    return tuple(weights[name].shape)
