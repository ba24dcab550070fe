"""Tensors on their way from the host to a device."""

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device`, for whose way there the host does not wait.

    A GPU fetches pinned memory by itself. What lies elsewhere the host hands over piece by piece, when all that was
    asked of the GPU before is done.
    """
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
