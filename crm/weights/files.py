"""What a file of weights is, and its tensors under our names."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from crm.records import file_hash
from crm.weights import huggingface, imagenet, released
from crm.weights.unpickle import TorchFile

SAFETENSORS = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Kind:
    title: str
    sign: str  # a tensor's name that only this kind has
    convert: Callable[[Mapping[str, Tensor]], tuple[dict[str, Tensor], list[str]]]
    whole: bool = True  # a network that can predict, not a backbone alone


def _own(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    kept = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    return kept, []  # the rest is the optimiser's state


KINDS = {
    "released": Kind(
        title="released CRM checkpoint",
        sign="backbone.RGB_branch.patch_embed.proj.weight",
        convert=released.convert,
    ),
    "huggingface": Kind(
        title="Hugging Face Mask2Former",
        sign="model.pixel_level_module.decoder.mask_projection.weight",
        convert=huggingface.convert,
    ),
    "crm": Kind(title="crm checkpoint", sign="model.backbone.rgb.patch_embed.proj.weight", convert=_own),
    "imagenet": Kind(
        title="ImageNet Swin",
        sign="layers.0.blocks.0.attn.relative_position_bias_table",
        convert=imagenet.convert,
        whole=False,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Source:
    path: Path
    kind: str  # a key of KINDS
    sha256: str  # of the file
    weights: dict[str, Tensor]  # under our names
    unused: list[str]  # names of the file's tensors that no network of ours has a place for
    step: int = 0  # of the training it came from, where the file says so
    settings: Mapping[str, Any] = field(default_factory=dict)  # the config beside or inside it

    @property
    def title(self) -> str:
        return KINDS[self.kind].title


def read_source(path: Path) -> Source:
    """Opens a file or a Hugging Face folder; nothing of it is run.

    FileNotFoundError or ValueError, in one line, for what is absent, damaged, hostile, not finite or no weights of a
    network we know.
    """
    file = _file(path)
    state, settings, step = _read(file)
    kind = next((kind for kind, its in KINDS.items() if its.sign in state or f"network.{its.sign}" in state), None)
    if kind is None:
        names = ", ".join(list(state)[:3])
        known = ", ".join(each.title for each in KINDS.values())
        raise ValueError(f"{path} is none of: {known}; its first tensors are {names or 'none'}")
    if kind == "huggingface":
        settings = _json_beside(file)
    try:
        if kind == "huggingface":
            huggingface.check_settings(settings)
        weights, unused = KINDS[kind].convert(state)
        weights = {name: _sound(name, tensor) for name, tensor in weights.items()}
    except ValueError as error:
        raise ValueError(f"{path} looks like a {KINDS[kind].title}, but {error}") from error
    return Source(
        path=path, kind=kind, sha256=file_hash(file), weights=weights, unused=unused, step=step, settings=settings
    )


def _file(path: Path) -> Path:
    """The file itself, or the one with the weights of a folder."""
    if path.is_dir():
        found = [path / name for name in (SAFETENSORS, "pytorch_model.bin") if (path / name).is_file()]
        if not found or not (path / "config.json").is_file():
            raise ValueError(f"{path} is a folder, but not of a Mask2Former: it needs {SAFETENSORS} and config.json")
        return found[0]
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty")
    return path


def _read(file: Path) -> tuple[dict[str, Tensor], Mapping[str, Any], int]:
    """Tensors by the file's names, the pickled settings of the run they came from, and its step."""
    with file.open("rb") as opened:
        start = opened.read(9)
    if file.suffix == ".safetensors" or start[8:] == b"{":
        return _read_safetensors(file), {}, 0
    opened_file = TorchFile(file)
    content = opened_file.content
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not named tensors")
    inner = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content)
    step = content.get("global_step", 0)
    settings = content.get("hyper_parameters")
    return (
        opened_file.tensors(inner),
        settings if isinstance(settings, dict) else {},
        step if type(step) is int and step >= 0 else 0,
    )


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no whole safetensors file") from error


def _json_beside(file: Path) -> Mapping[str, Any]:
    try:
        settings = json.loads((file.parent / "config.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{file} needs the config.json of its model beside it") from None
    except ValueError as error:
        raise ValueError(f"{file.parent / 'config.json'} is no JSON file: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file.parent / 'config.json'} holds no settings")
    return settings


def _sound(name: str, tensor: Tensor) -> Tensor:
    """The tensor in the type ours have; ValueError if it has values that no training leaves behind."""
    if name.endswith("num_batches_tracked"):
        return tensor.long()
    if not tensor.is_floating_point():
        raise ValueError(f"{name} holds {tensor.dtype}, not floating-point numbers")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} holds values that are not finite")
    return tensor.to(torch.float32)
