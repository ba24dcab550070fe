"""Reads a PyTorch checkpoint without running anything of it.

`torch.save` writes a zip file: one pickle, and one record of raw numbers per storage. A pickle is a program that may
call any function there is; here it can build plain containers and `Inert` objects alone, which note what the file says
and do nothing. Tensors are made afterwards, by this file, from those notes.
"""

import math
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
TENSOR, PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"

# What a pickled trainer state calls, other than the classes of its own libraries. A file that would call anything else
# is refused. Not even these are called: the call is noted.
CALLED = {
    TENSOR,
    PARAMETER,
    "torch.Size",
    "torch.device",
    "_codecs.encode",
    "copyreg._reconstructor",
    "copy_reg._reconstructor",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    *(f"collections.{name}" for name in ("OrderedDict", "defaultdict", "Counter", "deque")),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__")
      for name in ("set", "frozenset", "list", "dict", "tuple", "complex", "slice", "range", "xrange", "bytearray")),
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
}  # fmt: skip
LIBRARIES = ("detectron2.", "fvcore.", "yacs.", "omegaconf.", "pytorch_lightning.", "lightning.", "argparse.")

# What reading a broken pickle or zip file may raise; pickle's manual names no complete list.
UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


class _Noted(type):
    """The type of stand-ins for the classes and functions that a file names."""

    origin: str

    def __call__(cls, *args: Any, **kwargs: Any) -> "Inert":
        """What pickle's REDUCE does to a class or function of the file."""
        if cls.origin not in CALLED and not cls.origin.startswith(LIBRARIES):
            raise pickle.UnpicklingError(f"its pickle would call {cls.origin}; nothing of it was run")
        return Inert.__new__(cls, *args)  # pyright: ignore[reportArgumentType] - every class of this type is Inert


class Inert(dict[Any, Any], metaclass=_Noted):
    """An object as the file describes it: `origin` is the name of its class, `args` are those of its construction.

    Its items, if it is a mapping, are kept; its state is not.
    """

    origin = ""
    __slots__ = ("args",)
    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType] - two objects are never the same
    __eq__ = object.__eq__

    def __new__(cls, *args: Any) -> "Inert":
        self = dict.__new__(cls)
        self.args = args
        return self

    def _ignore(self, *args: Any) -> None:
        """State, and the items of anything that is no mapping."""

    __setstate__ = append = extend = add = _ignore


class _Notes(pickle.Unpickler):
    """An unpickler that finds no class and no function: every name becomes a stand-in."""

    def __init__(self, content: bytes) -> None:
        super().__init__(BytesIO(content))
        self.named: dict[str, _Noted] = {}

    def find_class(self, module_name: str, global_name: str, /) -> _Noted:
        origin = f"{module_name}.{global_name}"
        if origin not in self.named:
            self.named[origin] = _Noted(global_name, (Inert,), {"origin": origin, "__slots__": ()})
        return self.named[origin]

    def persistent_load(self, pid: Any, /) -> Any:
        return pid  # ("storage", class, key, device, number of elements), checked when a tensor is made of it


class TorchFile:
    """An opened checkpoint: `content` is what was saved, tensors in it still as notes; `tensors` makes them."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError, in one line, for a file that is damaged or that would run code."""
        self.path = path
        self._storages: dict[str, Tensor] = {}
        try:
            self.content = self._read_zip() if zipfile.is_zipfile(path) else _load_old(path)
        except UNREADABLE as error:
            raise ValueError(f"{path} was not loaded: {_line(error)}") from error

    def _read_zip(self) -> Any:
        with zipfile.ZipFile(self.path) as archive:
            found = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
            if len(found) != 1:
                raise ValueError("it is a zip file, but torch.save did not write it")
            self._prefix = found[0].removesuffix("data.pkl")
            order = f"{self._prefix}byteorder"
            if order in archive.namelist() and archive.read(order) != b"little":
                raise ValueError("it was written on a big-endian machine")
            return _notes(_stored(archive, found[0]))

    def tensors(self, mapping: Mapping[Any, Any]) -> dict[str, Tensor]:
        """The tensors of a state dict by name; ValueError for whatever else it holds."""
        try:
            made = {name: self._tensor(value) for name, value in mapping.items()}
        except UNREADABLE as error:
            raise ValueError(f"{self.path} was not loaded: {_line(error)}") from error
        if wrong := [name for name in made if not isinstance(name, str)]:
            raise ValueError(f"{self.path} was not loaded: a tensor's name is {wrong[0]!r}")
        return made

    def _tensor(self, value: Any) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach()
        if isinstance(value, Inert) and value.origin == PARAMETER:
            value = value.args[0]
        if not isinstance(value, Inert) or value.origin != TENSOR:
            raise ValueError(f"among its weights is a {type(value).__name__}, which is no tensor")
        (_, kind, key, _, count), offset, size, stride = value.args[:4]
        if not all(type(number) is int and number >= 0 for number in (count, offset, *size, *stride)):
            raise ValueError("a tensor's shape is not made of whole numbers")
        numbers = self._storage(key, DTYPES[kind.origin])
        last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
        if 0 not in size and (last >= len(numbers) or math.prod(size) > len(numbers)):
            raise ValueError(f"a tensor of shape {tuple(size)} has a record of {len(numbers)} numbers")
        return numbers.new_empty(size) if 0 in size else numbers.as_strided(size, stride, offset).contiguous()

    def _storage(self, key: str, dtype: torch.dtype) -> Tensor:
        if key not in self._storages:
            with zipfile.ZipFile(self.path) as archive:
                raw = bytearray(_stored(archive, f"{self._prefix}data/{key}"))
            if len(raw) % dtype.itemsize:
                raise ValueError(f"record {key} is no whole number of {dtype} values")
            self._storages[key] = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return self._storages[key]


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    """A record; refuses compressed ones, which torch.save never writes and which could be of any size unpacked."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError("it is a compressed zip file, which torch.save does not write")
    return archive.read(name)


def _notes(content: bytes) -> Any:
    """What a pickle describes. Its operations are looked through first: a wrong one could ask for any memory."""
    for operation, argument, _ in pickletools.genops(content):
        if operation.name.endswith("PUT") and int(argument or 0) > len(content):
            raise ValueError("its pickle asks for more memory than it can need")
    return _Notes(content).load()


def _load_old(path: Path) -> Any:
    """A file in PyTorch's format before 1.6, through PyTorch's own restricted reader."""
    try:
        _notes(path.read_bytes())  # the first of its pickles, which names what a hostile file would call
    except pickle.UnpicklingError:
        raise
    except UNREADABLE:
        pass
    with warnings.catch_warnings(action="ignore"):  # about what it then refuses
        return torch.load(path, map_location="cpu", weights_only=True)


def _line(error: BaseException) -> str:
    """What an error says, in one short line."""
    text = str(error)
    if called := re.search(r"GLOBAL (\S+)", text):
        return f"its pickle would call {called[1]}; nothing of it was run"
    if isinstance(error, (pickle.UnpicklingError, ValueError)) and "\n" not in text and len(text) < 200 and text:
        return text
    return "it is no whole checkpoint"
