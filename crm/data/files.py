"""Data sets on disk: finding their folder, and reading and writing frames in the layouts they are published in.

mf      `images/NAME.png` has four channels, RGB and thermal where other pictures keep transparency (the colours are
        never premultiplied by it); `labels/NAME.png`; `SPLIT.txt` lists names.
pst900  `SPLIT/rgb/NAME.png`, `SPLIT/thermal/NAME.png` (one 8-bit channel), `SPLIT/labels/NAME.png`; no lists.
kp      NAME is setAA_VBBB_ICCCCC: `images/setAA/VBBB/visible/ICCCCC.jpg`, `images/setAA/VBBB/lwir/ICCCCC.jpg` (three
        equal channels), `labels/NAME.png`; `SPLIT_day.txt` and `SPLIT_night.txt` list names.

Labels have one channel of class ids, or a palette whose indexes are the ids. Torch-free.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from crm.data.frames import Frame
from crm.data.pictures import read_label, read_list, read_picture, save_list, save_picture, unreadable
from crm.data.specs import DATASETS, DatasetSpec
from crm.names import unknown

Pictures = tuple[np.ndarray, np.ndarray]  # RGB (h, w, 3) and thermal (h, w), uint8

DAY, NIGHT = "_day", "_night"  # endings of the splits that are a part of another


def locate(spec: DatasetSpec, data_root: Path | None) -> Path:
    """The data set's own folder; `data_root` is that folder or the one that holds it.

    FileNotFoundError says where it was looked for, what it must hold, what is there instead and how to get it.
    """
    if data_root is None:
        raise FileNotFoundError(f"{spec.title} is read from files: say where they are with --data. {_help(spec)}")
    try:
        data_root.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"the folder {data_root} does not exist. {_help(spec)}") from None
    except OSError as error:
        unreadable(data_root, error)
    layout = LAYOUTS[spec.layout]
    tried = [data_root / spec.folder, data_root]
    for folder in tried:
        if layout.recognise(folder):
            return folder
    looked = " and ".join(str(folder.absolute()) for folder in tried)
    others = [other for other in DATASETS.values() if other.layout not in ("generated", spec.layout)]
    found = [f"{folder} looks like {other.title}: use the data set {other.name!r} for it"
             for other in others for folder in (*tried, data_root / other.folder)
             if LAYOUTS[other.layout].recognise(folder)]  # fmt: skip
    instead = f" {found[0]}." if found else ""
    raise FileNotFoundError(
        f"{spec.title} was not found: looked in {looked} for {layout.needs}.{instead} {_help(spec)}"
    )


def _help(spec: DatasetSpec) -> str:
    return f"To get it, {spec.get}. To try without files, use the data set 'synthetic'."


def there(path: Path) -> bool:
    """Whether there is such a file or folder; an error in words for people where that cannot be seen."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        unreadable(path, error)
    return True


def listed(spec: DatasetSpec, folder: Path, split: str) -> list[str]:
    """The names in SPLIT.txt; of a day or night split that has no list of its own, those of the whole split."""
    listing = folder / f"{split}.txt"
    if there(listing):
        return read_list(listing)
    for ending, night in ((DAY, False), (NIGHT, True)):
        whole = split.removesuffix(ending)
        if whole != split and whole in spec.splits and there(folder / f"{whole}.txt"):
            return [name for name in read_list(folder / f"{whole}.txt") if spec.is_night(name) is night]
    raise _missing_list(spec, folder, split, listing)


def _missing_list(spec: DatasetSpec, folder: Path, split: str, listing: Path) -> ValueError | FileNotFoundError:
    lists = sorted(path.stem for path in folder.glob("*.txt"))
    if split not in spec.splits and split not in lists:
        return unknown(f"{spec.title} split", split, {*spec.splits, *lists})
    return FileNotFoundError(f"{listing} is missing; lists that are there: {', '.join(lists) or 'none'}")


def _by_list(split: str) -> str:
    return f"the list {split}.txt"


# MF ------------------------------------------------------------------------------------------------------------------


def recognise_mf(folder: Path) -> bool:
    return all(there(folder / name) for name in ("images", "labels")) and not recognise_kp(folder)


def files_mf(folder: Path, split: str, name: str) -> list[Path]:
    """The files a frame is made of: picture, label."""
    return [folder / "images" / f"{name}.png", folder / "labels" / f"{name}.png"]


def pictures_mf(folder: Path, split: str, name: str, by: str) -> Pictures:
    """RGB and thermal in the MF layout, at their own size."""
    wanted = "four channels, red, green, blue, thermal (RGBA)"
    image = read_picture(files_mf(folder, split, name)[0], by, ("RGBA",), wanted)
    return image[:, :, :3].copy(), image[:, :, 3].copy()


def read_mf(spec: DatasetSpec, folder: Path, split: str, name: str) -> Frame:
    """One frame in the MF layout, at its own size."""
    rgb, thermal = pictures_mf(folder, split, name, _by_list(split))
    label = files_mf(folder, split, name)[-1]
    ids = read_label(label, _by_list(split), spec, rgb.shape[:2], "picture")
    return Frame(name=name, rgb=rgb, thermal=thermal, label=ids, night=spec.is_night(name))


def write_mf(splits: Mapping[str, Iterable[Frame]], folder: Path) -> Path:
    """Writes frames in the MF layout and returns the folder; each list comes after the files that it names."""
    for split, frames in splits.items():
        names = []
        for frame in frames:
            picture, label = files_mf(folder, split, frame.name)
            save_picture(np.dstack([frame.rgb, frame.thermal]), picture)
            save_picture(frame.label, label)
            names.append(frame.name)
        save_list(names, folder / f"{split}.txt")
    return folder


# PST900 --------------------------------------------------------------------------------------------------------------


def recognise_pst900(folder: Path) -> bool:
    return any(there(folder / split / "rgb") for split in ("train", "test"))


def names_pst900(spec: DatasetSpec, folder: Path, split: str) -> list[str]:
    """Names of the pictures in SPLIT/rgb, sorted (the released code looks in rgb/ of the root, which no one has)."""
    if split not in spec.splits:
        raise unknown(f"{spec.title} split", split, spec.splits)
    rgb = folder / split / "rgb"
    if not there(rgb):
        raise FileNotFoundError(f"{rgb} is missing; it should hold the colour pictures of {spec.title} {split}")
    try:
        names = sorted(path.stem for path in rgb.iterdir() if path.suffix == ".png" and not path.name.startswith("."))
    except OSError as error:
        unreadable(rgb, error)
    if not names:
        raise ValueError(f"{rgb} holds no picture; it should hold NAME.png for every frame of {spec.title} {split}")
    return names


def files_pst900(folder: Path, split: str, name: str) -> list[Path]:
    """The files a frame is made of: RGB, thermal, label."""
    return [folder / split / part / f"{name}.png" for part in ("rgb", "thermal", "labels")]


def pictures_pst900(folder: Path, split: str, name: str, by: str) -> Pictures:
    """RGB and thermal in the PST900 layout, at their own size; the camera's 8-bit picture, not thermal_raw."""
    colour, heat, _ = files_pst900(folder, split, name)
    rgb = read_picture(colour, by, ("RGB",), "three 8-bit channels (RGB)")
    thermal = read_picture(heat, by, ("L",), "one 8-bit channel (thermal/, not thermal_raw/)")
    _same_size(heat, thermal, rgb)
    return rgb, thermal


def read_pst900(spec: DatasetSpec, folder: Path, split: str, name: str) -> Frame:
    """One frame in the PST900 layout, at its own size."""
    colour, _, label = files_pst900(folder, split, name)
    by = f"{colour.parent}"
    rgb, thermal = pictures_pst900(folder, split, name, by)
    ids = read_label(label, by, spec, rgb.shape[:2], "picture")
    return Frame(name=name, rgb=rgb, thermal=thermal, label=ids, night=spec.is_night(name))


def write_pst900(splits: Mapping[str, Iterable[Frame]], folder: Path) -> Path:
    """Writes frames in the PST900 layout and returns the folder; the RGB picture, which names a frame, comes last."""
    for split, frames in splits.items():
        for frame in frames:
            colour, heat, label = files_pst900(folder, split, frame.name)
            save_picture(frame.label, label)
            save_picture(frame.thermal, heat)
            save_picture(frame.rgb, colour)
    return folder


# KP ------------------------------------------------------------------------------------------------------------------

KP_NAME = re.compile(r"(set\d\d)_(V\d\d\d)_(I\d+)")
JPEG = {"quality": 95, "subsampling": 0}  # little is lost, and of every channel alike


def recognise_kp(folder: Path) -> bool:
    return there(folder / "images") and any((folder / "images").glob("set[0-9][0-9]"))


def names_kp(spec: DatasetSpec, folder: Path, split: str) -> list[str]:
    """Names in SPLIT_day.txt and SPLIT_night.txt together, sorted [released code]; for a day or night split, in one."""
    parts = [split] if split.endswith((DAY, NIGHT)) else [split + DAY, split + NIGHT]
    if split not in spec.splits:
        raise _missing_list(spec, folder, split, folder / f"{split}.txt")
    names = []
    for part in parts:
        listing = folder / f"{part}.txt"
        if not there(listing):
            raise _missing_list(spec, folder, part, listing)
        names += read_list(listing)
        if wrong := [name for name in names if not KP_NAME.fullmatch(name)]:
            raise ValueError(f"{listing} lists {wrong[0]!r}; names should be as in set00_V000_I00050")
    return sorted(names)


def files_kp(folder: Path, split: str, name: str) -> list[Path]:
    """The files a frame is made of: RGB, thermal, label."""
    match = KP_NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is no name of the KP layout, as in set00_V000_I00050")
    recording, part, number = match.groups()
    pictures = [folder / "images" / recording / part / kind / f"{number}.jpg" for kind in ("visible", "lwir")]
    return [*pictures, folder / "labels" / f"{name}.png"]


def pictures_kp(folder: Path, split: str, name: str, by: str) -> Pictures:
    """RGB and thermal in the KP layout, at their own size; thermal is the mean of the three channels it is stored in.

    The mean is rounded to the nearest grey level; the released code keeps the thirds.
    """
    colour, heat, _ = files_kp(folder, split, name)
    rgb = read_picture(colour, by, ("RGB",), "three 8-bit channels (RGB)")
    stored = read_picture(heat, by, ("RGB", "L"), "three equal 8-bit channels, or one")
    _same_size(heat, stored, rgb)
    return rgb, stored if stored.ndim == 2 else ((stored.sum(axis=2, dtype=np.uint16) + 1) // 3).astype(np.uint8)


def read_kp(spec: DatasetSpec, folder: Path, split: str, name: str) -> Frame:
    """One frame in the KP layout, at its own size."""
    by = _by_list(split) if split.endswith((DAY, NIGHT)) else _by_list(split + (NIGHT if spec.is_night(name) else DAY))
    rgb, thermal = pictures_kp(folder, split, name, by)
    label = files_kp(folder, split, name)[-1]
    ids = read_label(label, by, spec, rgb.shape[:2], "picture")
    return Frame(name=name, rgb=rgb, thermal=thermal, label=ids, night=spec.is_night(name))


def write_kp(splits: Mapping[str, Iterable[Frame]], folder: Path) -> Path:
    """Writes frames in the KP layout (JPEG, so nearly the same pixels) and returns the folder; lists come last."""
    for split, frames in splits.items():
        names: dict[str, list[str]] = {DAY: [], NIGHT: []}
        for frame in frames:
            colour, heat, label = files_kp(folder, split, frame.name)
            save_picture(frame.rgb, colour, **JPEG)
            save_picture(np.dstack([frame.thermal] * 3), heat, **JPEG)
            save_picture(frame.label, label)
            names[NIGHT if frame.night else DAY].append(frame.name)
        if not all(names.values()):
            raise ValueError(f"the KP layout lists day and night apart: {split} needs frames of both")
        for ending, those in names.items():
            save_list(those, folder / f"{split}{ending}.txt")
    return folder


def _same_size(path: Path, thermal: np.ndarray, rgb: np.ndarray) -> None:
    (height, width), (wanted_height, wanted_width) = thermal.shape[:2], rgb.shape[:2]
    if (height, width) != (wanted_height, wanted_width):
        raise ValueError(f"{path} is {height}x{width} but its RGB picture is {wanted_height}x{wanted_width}")


# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a family of data sets lies on disk."""

    needs: str  # what the folder must hold to be taken for the data set, in words
    recognise: Callable[[Path], bool]  # whether a folder holds that
    names: Callable[[DatasetSpec, Path, str], Sequence[str]]  # (spec, folder, split)
    read: Callable[[DatasetSpec, Path, str, str], Frame]  # (spec, folder, split, name)
    files: Callable[[Path, str, str], list[Path]]  # (folder, split, name): pictures first, label last
    pictures: Callable[[Path, str, str, str], Pictures]  # (folder, split, name, who asks, in words)
    write: Callable[[Mapping[str, Iterable[Frame]], Path], Path]  # frames of each split


LAYOUTS = {
    "mf": Layout("images and labels", recognise_mf, listed, read_mf, files_mf, pictures_mf, write_mf),
    "pst900": Layout(
        "train/rgb or test/rgb",
        recognise_pst900,
        names_pst900,
        read_pst900,
        files_pst900,
        pictures_pst900,
        write_pst900,
    ),
    "kp": Layout("images/setAA", recognise_kp, names_kp, read_kp, files_kp, pictures_kp, write_kp),
}


# earlier frames ------------------------------------------------------------------------------------------------------

NUMBERED = re.compile(r"(.*?)(\d+)(\D*)")  # the last number of a name counts the frames of a recording


def earlier(spec: DatasetSpec, folder: Path, split: str, name: str, frames: int) -> Frame:
    """Pictures of the recording so many frames before the one of that name, in a frame without labels (all 0).

    What counts are the pictures that are there, whatever list they are in, in the order of their numbers: a folder with
    every frame of a video has the true offset, one with the labelled frames alone a longer one. Where a recording has
    no frame so early, its first.
    """
    names = _recording(spec.layout, folder, split, name)
    there = names[max(0, names.index(name) - frames)]
    rgb, thermal = LAYOUTS[spec.layout].pictures(folder, split, there, f"the recording of {name}")
    return Frame(
        name=there, rgb=rgb, thermal=thermal, label=np.zeros(thermal.shape, np.uint8), night=spec.is_night(there)
    )


def _recording(layout: str, folder: Path, split: str, name: str) -> list[str]:
    """Names that differ from this one in their last number alone, of pictures that are there, in its order."""
    picture = LAYOUTS[layout].files(folder, split, name)[0]
    stem = picture.stem
    match = NUMBERED.fullmatch(stem)
    if match is None:
        return [name]
    before, _, after = match.groups()
    found = (NUMBERED.fullmatch(path) for path in _stems(picture.parent, picture.suffix))
    own = sorted((one for one in found if one and (one[1], one[3]) == (before, after)), key=lambda one: int(one[2]))
    return [name.removesuffix(stem) + one[0] for one in own]


@lru_cache(maxsize=64)
def _stems(folder: Path, suffix: str) -> tuple[str, ...]:
    return tuple(path.stem for path in folder.iterdir() if path.suffix == suffix and not path.name.startswith("."))
