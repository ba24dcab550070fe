"""What training starts from: a file of the weights folder, put there by `crm weights import`, or a finished run.

A file holds both Swins alone, of ImageNet, or a whole network; a run, an imported one too (import-...), is whole.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from crm.checkpoint import load_checkpoint
from crm.config import Model
from crm.data.specs import DATASETS
from crm.machine import initial_file
from crm.model.segmenter import Segmenter
from crm.records import file_hash, read_config, trained_on
from crm.weights.sizes import conflicts, infer, infer_swin, refuse_other_swin

Weights = dict[str, Tensor]
Stem = Callable[[Float[Tensor, "c 3 h w"]], Float[Tensor, "c 1 h w"]]


def mean(rgb: Float[Tensor, "c 3 h w"]) -> Float[Tensor, "c 1 h w"]:
    """A grey picture in all three channels gives three times as much as the same picture as thermal (released code)."""
    return rgb.mean(dim=1, keepdim=True)


def total(rgb: Float[Tensor, "c 3 h w"]) -> Float[Tensor, "c 1 h w"]:
    """A grey picture in all three channels gives the same as that picture as thermal."""
    return rgb.sum(dim=1, keepdim=True)


STEMS: dict[str, Stem] = {"mean": mean, "sum": total}

RGB, THERMAL = (f"backbone.{modality}.patch_embed.proj.weight" for modality in ("rgb", "thermal"))
CLASS_HEAD = "query_decoder.class_embed."
FUSION = ("backbone.fusion.", "backbone.fusion_norms.")
# what a whole network may lack; it keeps its initial value
LACKING = r"\.mask_token$|^backbone\.fusion\.|^backbone\.fusion_norms\.|^query_decoder(_thermal)?\.class_embed\."


def initialise(
    network: Segmenter, model: Model, folder: Path | None, runs: Path | None = None, classes: Sequence[str] = ()
) -> dict[str, Any]:
    """Fills the network from what `model.init` names; what it says for provenance.

    From both Swins alone, mask tokens, the norms of the stages, fusion and head keep their initial values, as in the
    released code. From a whole network, what an import had no tensor for keeps them, the class head where the classes
    are not the same ones, and fusion with its norms where it is another fusion. A control takes the part that it has.
    ValueError or FileNotFoundError, with nothing changed, if it is not there or does not fit.

    Args:
        classes: of the data set that is trained on.
    """
    path = initial_file(model.init, folder, runs)
    if path is None:
        return {"name": "none"}
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}; import it anew") from error
    whole = any(name.startswith("model.") for name in weights)
    weights = _of_network(path, model, classes) if whole else _of_swins(weights, model, str(path))
    weights = _for_control(_with_stem(weights, model.thermal_stem, str(path)), model.inputs)
    own = network.state_dict()
    wrong = sorted(name for name in weights if name not in own or own[name].shape != weights[name].shape)
    if wrong:
        raise ValueError(f"{path} has {wrong[0]}, which the model has no place for; import it anew")
    left = sorted(own.keys() - weights.keys())
    if whole and (missing := [name for name in left if not re.search(LACKING, name)]):
        raise ValueError(f"{path} has no {missing[0]}, which the model needs; import it anew")
    with torch.no_grad():
        network.load_state_dict(weights, strict=False)
    made = {"name": model.init, "sha256": file_hash(path), "tensors": len(weights)}
    return {**made, "initial": left} if whole else made


def _of_swins(weights: Weights, model: Model, what: str) -> Weights:
    """Both branches; ValueError if they are no Swins of the model's size."""
    try:
        found = infer_swin(weights)
    except ValueError as error:
        raise ValueError(f"{what} is no Swin: {error}") from error
    refuse_other_swin(found, model, what)
    return weights


def _of_network(path: Path, model: Model, classes: Sequence[str]) -> Weights:
    """What is taken over of a whole network; ValueError if it is of another size."""
    checkpoint = load_checkpoint(path)
    weights, known = checkpoint.weights, checkpoint.meta.get("classes")
    left = tuple(checkpoint.meta.get("initial", ()))
    folder = path.parent.parent
    if (folder / "config.json").exists():  # a run, which knows more than its tensors say
        source = read_config(folder).model
        if source.inputs != "both":
            raise ValueError(
                f"run {folder.name} was trained with model.inputs {source.inputs!r}, and training starts from networks "
                "of both modalities only"
            )
        left += FUSION if source.fusion != model.fusion else ()
        known = DATASETS[trained_on(folder)].classes
    try:
        found, num_classes = infer(weights)
    except ValueError as error:
        raise ValueError(f"{path} is no whole network: {error}") from error
    refuse_other_swin(found, model, str(path))
    if wrong := conflicts(model, found):
        raise ValueError(f"{path} does not fit the model: it has {'; '.join(wrong)}")
    if num_classes != len(classes) or (known and tuple(known) != tuple(classes)):
        left += (CLASS_HEAD,)
    return {name: tensor for name, tensor in weights.items() if not name.startswith(left)}


def _with_stem(weights: Weights, stem: str, what: str) -> Weights:
    """With the wanted first filters of thermal; every source of ours has the mean ones, as in the released code."""
    if stem == "mean":
        return weights
    if not torch.allclose(mean(weights[RGB]), weights[THERMAL]):
        raise ValueError(
            f"{what} has first filters of thermal that were trained, not the mean of those of RGB, so "
            f"model.thermal_stem {stem!r} has no meaning for it"
        )
    return {**weights, THERMAL: STEMS[stem](weights[RGB])}


def _for_control(weights: Weights, inputs: str) -> Weights:
    """The part of a network of two branches that a network of these `inputs` has, under its names."""
    both = inputs in ("both", "late")
    absent = () if both else ("backbone.rgb.",) if inputs == "thermal" else ("backbone.thermal.",)
    if not both:
        absent += FUSION
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(absent)}
    if inputs == "early":
        kept[RGB] = torch.cat([weights[RGB], weights[THERMAL]], dim=1)
    if inputs != "late":
        return kept
    head = re.compile(r"^((?:pixel|query)_decoder)\.")
    kept |= {head.sub(r"\1_thermal.", name): tensor for name, tensor in kept.items() if head.match(name)}
    return {name: tensor for name, tensor in kept.items() if not name.startswith(FUSION)}
