"""What a run's backbones start from: a file of the weights folder, put there by `crm weights import`."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from crm.config import Model
from crm.machine import initial_file
from crm.model.segmenter import Segmenter
from crm.records import file_hash
from crm.weights.sizes import infer_swin, refuse_other_swin


def initialise(network: Segmenter, model: Model, folder: Path | None) -> dict[str, Any]:
    """Fills both branches from the file that `model.init` names; what it says for provenance.

    Mask tokens, the norms of the stages, fusion and head keep their initial values, as in the released code. ValueError
    or FileNotFoundError, with nothing changed, if the file is not there or not of this Swin.
    """
    path = initial_file(model.init, folder)
    if path is None:
        return {"name": "none"}
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}; import it anew") from error
    try:
        found = infer_swin(weights)
    except ValueError as error:
        raise ValueError(f"{path} is no Swin: {error}") from error
    refuse_other_swin(found, model, str(path))
    own = network.state_dict()
    wrong = sorted(name for name in weights if name not in own or own[name].shape != weights[name].shape)
    if wrong:
        raise ValueError(f"{path} has {wrong[0]}, which the model has no place for; import it anew")
    with torch.no_grad():
        network.load_state_dict(weights, strict=False)
    return {"name": model.init, "sha256": file_hash(path), "tensors": len(weights)}
