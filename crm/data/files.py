"""Data sets on disk: finding their folder, reading frames, and writing any frames in the MF layout.

The MF layout: `images/NAME.png` has four channels, RGB and thermal where other pictures keep transparency (the colours
are never premultiplied by it); `labels/NAME.png` has one channel of class ids; `SPLIT.txt` lists names, one per line.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from crm.data.frames import Frame
from crm.data.specs import DatasetSpec
from crm.names import unknown


def locate(spec: DatasetSpec, data_root: Path | None) -> Path:
    """The data set's own folder; `data_root` is that folder or the one that holds it.

    FileNotFoundError says where it was looked for, what it must hold and how to get it.
    """
    need = LAYOUTS[spec.layout].needs
    if data_root is None:
        raise FileNotFoundError(f"{spec.title} is read from files: say where they are with --data. {_help(spec)}")
    tried = [data_root / spec.folder, data_root]
    for folder in tried:
        if all((folder / name).exists() for name in need):
            return folder
    looked = " and ".join(str(folder.absolute()) for folder in tried)
    raise FileNotFoundError(f"{spec.title} was not found: looked in {looked} for {' and '.join(need)}. {_help(spec)}")


def _help(spec: DatasetSpec) -> str:
    return f"To get it, {spec.get}. To try without files, use the data set 'synthetic'."


def read_names(spec: DatasetSpec, folder: Path, split: str) -> list[str]:
    """Names of a split's frames, in the order of its list."""
    listing = folder / f"{split}.txt"
    if not listing.is_file():
        there = sorted(path.stem for path in folder.glob("*.txt"))
        if split not in spec.splits and split not in there:
            raise unknown(f"{spec.title} split", split, {*spec.splits, *there})
        raise FileNotFoundError(f"{listing} is missing; lists that are there: {', '.join(there) or 'none'}")
    names = listing.read_text().split()
    if not names:
        raise ValueError(f"{listing} lists no frame")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{listing} lists {name} {times} times")
    return names


def read_mf(spec: DatasetSpec, folder: Path, split: str, name: str) -> Frame:
    """One frame in the MF layout, at its own size."""
    picture, label = (_open(path, split) for path in files_mf(folder, split, name))
    if picture.mode != "RGBA":
        wanted = "four channels, red, green, blue, thermal (RGBA)"
        raise ValueError(f"{folder / 'images' / name}.png must have {wanted}, not {picture.mode}")
    if label.mode not in ("L", "P"):
        raise ValueError(f"{folder / 'labels' / name}.png must have one 8-bit channel of class ids, not {label.mode}")
    image, ids = np.asarray(picture), np.asarray(label)
    _check_label(spec, image.shape[:2], ids, f"{folder / 'labels' / name}.png")
    rgb, thermal = image[:, :, :3].copy(), image[:, :, 3].copy()
    return Frame(name=name, rgb=rgb, thermal=thermal, label=ids.copy(), night=spec.is_night(name))


def files_mf(folder: Path, split: str, name: str) -> list[Path]:
    """The files a frame is made of: picture, label."""
    return [folder / "images" / f"{name}.png", folder / "labels" / f"{name}.png"]


def _open(path: Path, split: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing, but the list {split}.txt names it") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    return image


def _check_label(spec: DatasetSpec, size: tuple[int, ...], ids: np.ndarray, path: str) -> None:
    if ids.shape != size:
        raise ValueError(f"{path} is {ids.shape[0]}x{ids.shape[1]} but its picture is {size[0]}x{size[1]}")
    present = np.flatnonzero(np.bincount(ids.ravel(), minlength=256))
    wrong = [int(i) for i in present if i >= len(spec.classes) and i != spec.ignore_index]
    if wrong:
        last = len(spec.classes) - 1
        raise ValueError(
            f"{path} has label id {wrong[0]}; {spec.title} has 0 to {last}, and {spec.ignore_index} for ignored pixels"
        )


def write_mf(splits: Mapping[str, Iterable[Frame]], folder: Path) -> Path:
    """Writes frames in the MF layout and returns the folder; each list comes after the files that it names."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "labels").mkdir(exist_ok=True)
    for split, frames in splits.items():
        names = []
        for frame in frames:
            four = np.concatenate([frame.rgb, frame.thermal[:, :, None]], axis=2)
            picture, label = files_mf(folder, split, frame.name)
            _save(Image.fromarray(four, "RGBA"), picture)
            _save(Image.fromarray(frame.label, "L"), label)
            names.append(frame.name)
        scratch = folder / f"{split}.txt.tmp"
        scratch.write_text("".join(f"{name}\n" for name in names))
        os.replace(scratch, folder / f"{split}.txt")
    return folder


def _save(image: Image.Image, path: Path) -> None:
    scratch = path.with_suffix(".tmp")
    image.save(scratch, format="PNG")
    os.replace(scratch, path)


@dataclass(frozen=True)
class Layout:
    """How a family of data sets lies on disk."""

    needs: tuple[str, ...]  # what the folder must hold to be taken for the data set
    names: Callable[[DatasetSpec, Path, str], list[str]]  # (spec, folder, split)
    read: Callable[[DatasetSpec, Path, str, str], Frame]  # (spec, folder, split, name)
    files: Callable[[Path, str, str], list[Path]]  # (folder, split, name)


LAYOUTS = {"mf": Layout(needs=("images", "labels"), names=read_names, read=read_mf, files=files_mf)}
