"""Single files of a data set: pictures and lists read with errors for people, pictures written all or nothing.

Torch-free. h w = height, width in pixels
"""

import errno
import os
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image, UnidentifiedImageError

from crm.data.specs import DatasetSpec

MODES = {"L": "one 8-bit channel", "P": "palette indexes", "RGB": "three channels", "RGBA": "four channels"}
MODES |= {"LA": "grey and transparency", "1": "one bit", "I;16": "16 bit", "I;16B": "16 bit", "I": "32 bit"}
BROKEN = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)  # what Pillow raises


def read_picture(path: Path, named_by: str, modes: Sequence[str], wanted: str) -> np.ndarray:
    """The picture's values, uint8 (h, w) or (h, w, c); of a palette picture the indexes.

    `named_by` says where its name comes from; `modes` are the Pillow modes taken, `wanted` the same in words. Raises
    FileNotFoundError, PermissionError or ValueError in one line.
    """
    try:
        with Image.open(path) as image:
            mode = image.mode  # from the header, before anything is decoded
            # Pillow cuts 16 bits to 8 without a word where there are several channels; its decoder's name tells
            deep = mode in modes and any(";16" in str(tile[3]) for tile in image.tile)
            values = np.asarray(image) if mode in modes else None
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing, but {named_by} names it") from None
    except UnidentifiedImageError:
        empty = path.stat().st_size == 0
        found = "is empty (0 bytes)" if empty else "cannot be read as a picture: it has no known format"
        raise ValueError(f"{path} {found}; it should have {wanted}: copy it again") from None
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:
            unreadable(path, error)
        raise ValueError(f"{path} cannot be read as a picture: {error}; copy it again") from None
    if deep:
        raise ValueError(f"{path} has 16 bits per channel; it must have {wanted}, 8 bits each")
    if values is None:
        raise ValueError(f"{path} must have {wanted}, not {mode}{f' ({MODES[mode]})' if mode in MODES else ''}")
    return values


def unreadable(path: Path, error: OSError) -> NoReturn:
    """Raises what the operating system said about `path`, in words for people."""
    if error.errno == errno.ELOOP:
        loop = "is, or lies behind, a symbolic link that leads back to itself; it should lead to a file"
        raise FileNotFoundError(f"{path} {loop}") from None
    if error.errno in (errno.EACCES, errno.EPERM):
        raise PermissionError(f"{path} may not be read by this user; it should be readable (chmod u+r)") from None
    raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def read_list(path: Path) -> list[str]:
    """The names in a list, one per line, in its order, without `.png`; blank lines and Windows line ends are accepted.

    ValueError for a list that is empty, names a frame twice or is no text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors put a mark in front
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; it should have one frame's name per line") from None
    except OSError as error:
        unreadable(path, error)
    names = [line.strip().removesuffix(".png") for line in text.splitlines() if line.strip()]
    if not names:
        raise ValueError(f"{path} lists no frame; it should have one frame's name per line")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{path} lists {name} {times} times")
    return names


def read_label(path: Path, named_by: str, spec: DatasetSpec, size: tuple[int, ...], of: str) -> np.ndarray:
    """A label picture's class ids, uint8 (h, w); ValueError if its size is not that of `of` or an id is wrong."""
    ids = read_picture(path, named_by, ("L", "P"), "one 8-bit channel of class ids")
    if ids.shape != size:
        raise ValueError(f"{path} is {ids.shape[0]}x{ids.shape[1]} but its {of} is {size[0]}x{size[1]}")
    present = np.flatnonzero(np.bincount(ids.ravel(), minlength=256))
    wrong = [int(i) for i in present if i >= len(spec.classes) and i != spec.ignore_index]
    if wrong:
        known = f"{spec.title} has 0 to {len(spec.classes) - 1}, and {spec.ignore_index} for ignored pixels"
        raise ValueError(f"{path} has label id {wrong[0]}; {known}")
    return ids


def save_picture(values: np.ndarray, path: Path, **options: int) -> None:
    """Writes uint8 (h, w) or (h, w, c) as PNG or, by the file's name, JPEG; all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    Image.fromarray(values).save(scratch, format="JPEG" if path.suffix == ".jpg" else "PNG", **options)
    os.replace(scratch, path)


def save_list(names: Sequence[str], path: Path) -> None:
    """Writes one name per line; all or nothing."""
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    os.replace(scratch, path)
