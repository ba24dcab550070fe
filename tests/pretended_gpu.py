"""A GPU in pretence: tensors that say they are on `cuda:0`, and a CPU that computes them.

What a GPU refuses is refused: a tensor of the host among its own, numpy. Where the host would wait for it is noted.
Branches for other devices are taken, with real numbers. Not shown: kernels that only a GPU has, memory, speed, and
which operations its own autocast takes in half precision (the CPU's list counts instead).
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map

import crm
from crm.model import sampling

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
TORCH, CRM = (str(Path(package.__file__).parent) for package in (torch, crm))
aten = torch.ops.aten
SAID = {
    "_lazy_init": None, "is_available": True, "device_count": 1, "get_device_name": "a GPU in pretence",
    "synchronize": None, "reset_peak_memory_stats": None, "max_memory_allocated": 2**30, "memory_reserved": 2**30,
    "max_memory_reserved": 2**30, "mem_get_info": (2**33, 2**34),
}  # fmt: skip
# the host needs a value before it can go on
WAITING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten.bincount.default, aten._unique2.default, aten.unique_consecutive.default, aten.repeat_interleave.Tensor,
}  # fmt: skip
INDEXED = {aten.index.Tensor, aten.index_put_.default}  # these take indices of the host, and send them


class OnGPU(Tensor):
    """A tensor of the GPU; its numbers are `inner`'s."""

    inner: Tensor
    device = property(lambda self: GPU)  # pyright: ignore - to C++ it is one of the CPU, to Python it is not
    is_cuda = property(lambda self: True)  # pyright: ignore
    is_cpu = property(lambda self: False)  # pyright: ignore
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnGPU":
        made = Tensor._make_wrapper_subclass(  # pyright: ignore
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        given = args, kwargs or {}
        foreign = [one for one in map(_foreign, tree_iter(args, is_leaf=_is_list)) if one is not None]
        if foreign and func is not aten.copy_.default and func not in INDEXED and not _asked_by_autograd():
            raise RuntimeError(f"{func}: expected all tensors on one device, one of {foreign[0].shape} is on the CPU")
        if func in WAITING or (func in INDEXED and any(map(_awaited, args[1]))):
            _wait(str(func))
        inner_args, inner_kwargs = tree_map(_inner, given)
        out = tree_map(_outer, func(*inner_args, **inner_kwargs))
        return return_and_correct_aliasing(func, *given, out)


def _is_list(x: Any) -> bool:
    return isinstance(x, list)


def _foreign(x: Any) -> Tensor | None:
    """The tensor of the host that a GPU does not take; a single number it takes, but not in a list."""
    if isinstance(x, list):
        return next((one for one in x if isinstance(one, Tensor) and type(one) is not OnGPU), None)
    return x if isinstance(x, Tensor) and type(x) is not OnGPU and x.dim() else None


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, OnGPU) else x


def _outer(x: Any) -> Any:
    return OnGPU(x) if isinstance(x, Tensor) else x


def _awaited(index: Tensor | None) -> bool:
    """What is looked up waits for the index: a mask must be counted, what is on the host must come."""
    return index is not None and (index.dtype == torch.bool or (type(index) is not OnGPU and index.dim() > 0))


def _asked_by_autograd() -> bool:
    """Zeros that C++ makes for what has no gradient are on the CPU, as to C++ everything is."""
    for frame in reversed(traceback.extract_stack()):
        if frame.name == "_engine_run_backward":
            return True
        if not frame.filename.startswith((TORCH, __file__)):
            return False
    return False


class _Factories(TorchDispatchMode):
    """What is made on the GPU is one of its tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        asked = kwargs.get("device")
        if asked is not None:
            kwargs["device"] = CPU
        if OnGPU in types:
            return OnGPU.__torch_dispatch__(func, types, args, kwargs)
        made = func(*args, **kwargs)
        return OnGPU(made) if asked is not None and asked.type == "cuda" else made


class _Generator(torch.Generator):
    """Of the GPU, with the draws of a CPU."""

    def __new__(cls, device: torch.device | str = "cpu"):
        made = super().__new__(cls)
        made.asked = torch.device(device)
        return made

    device = property(lambda self: GPU if self.asked.type == "cuda" else CPU)  # pyright: ignore

    def clone_state(self) -> "_Generator":
        made = _Generator(self.asked)
        made.set_state(self.get_state())
        return made


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *given, **more) -> None:
        super().__init__("cpu", *given, **more)


_noted: list[str] | None = None


def _wait(what: str) -> None:
    callers = [frame for frame in traceback.extract_stack() if frame.filename.startswith(CRM)]
    if _noted is not None:
        _noted.append(f"{Path(callers[-1].filename).name}: {what}" if callers else what)


@contextmanager
def waits() -> Iterator[list[str]]:
    """Where the host would wait for the GPU, as "FILE: OPERATION"."""
    global _noted
    _noted = found = []
    try:
        yield found
    finally:
        _noted = None


def _pushed(x: Tensor) -> Tensor:
    """The tensor on the GPU."""
    if isinstance(x, OnGPU):
        return x
    if not getattr(x, "pinned", False):
        _wait("copy from memory that is not pinned")
    return OnGPU(x.detach().clone())


def _pulled(x: Tensor) -> Tensor:
    """The tensor on the host."""
    if not isinstance(x, OnGPU):
        return x
    _wait("copy to the host")
    return x.inner.detach().clone()


def _moving(to: Callable) -> Callable:
    def moved(self: Tensor, *args, **kwargs) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None or memory_format is not None:
            self = to(self, dtype=dtype or self.dtype, **({"memory_format": memory_format} if memory_format else {}))
        if device is None or device.type == self.device.type:
            return self
        return _pushed(self) if device.type == "cuda" else _pulled(self)

    return moved


def _made(make: Callable) -> Callable:
    def made(*args, device=None, **kwargs) -> Tensor:
        found = make(*args, **kwargs)
        return _pushed(found) if device is not None and torch.device(device).type == "cuda" else found

    return made


def _pinned(x: Tensor) -> Tensor:
    found = x.clone()
    found.pinned = True  # pyright: ignore
    return found


def _listed(self: Tensor) -> Any:
    return _pulled(self).numpy().tolist() if isinstance(self, OnGPU) else _tolist(self)


_tolist, _numpy, _new_tensor = Tensor.tolist, Tensor.numpy, Tensor.new_tensor


def _as_numpy(self: Tensor, *args, **kwargs) -> Any:
    if isinstance(self, OnGPU):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")
    return _numpy(self, *args, **kwargs)


def _new_from(self: Tensor, data: Any, **kwargs) -> Tensor:
    if isinstance(self, OnGPU):
        return _pushed(_new_tensor(self.inner, data, **kwargs))
    return _new_tensor(self, data, **kwargs)


def _grouped(lists: Any, *given) -> dict:
    """As C++ groups tensors, but by the device that they have to Python."""
    found = _group(lists, *given)
    return {(next(one.device for one in group[0][0]), dtype): group for (_, dtype), group in found.items()}


_group = clip_grad._group_tensors_by_device_and_dtype


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The device "cuda" is there, in pretence."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    monkeypatch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None)
    for name, result in SAID.items():
        monkeypatch.setattr(torch.cuda, name, lambda *given, result=result: result)
    # a tensor with another inside cannot enter inference mode
    monkeypatch.setattr(torch, "inference_mode", lambda on=True: torch.no_grad() if on else nullcontext())
    monkeypatch.setattr(sampling, "_faster_kernel", lambda *given: None)
    monkeypatch.setattr(clip_grad, "_group_tensors_by_device_and_dtype", _grouped)
    monkeypatch.setattr(torch, "Generator", _Generator)
    monkeypatch.setattr(torch, "autocast", _Autocast)
    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, _made(getattr(torch, name)))
    replaced = {"to": _moving(Tensor.to), "cpu": _pulled, "cuda": _pushed, "pin_memory": _pinned, "tolist": _listed,
                "numpy": _as_numpy, "new_tensor": _new_from}  # fmt: skip
    for name, work in replaced.items():
        monkeypatch.setattr(Tensor, name, work)
    with _Factories():
        yield
    torch.__future__.set_overwrite_module_params_on_conversion(False)
