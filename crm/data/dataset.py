"""A split of a data set as a sequence of frames of one size, from files or from the scene generator.

Torch-free. h w = height, width in pixels
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from crm.config import Data
from crm.data import synthetic
from crm.data.cache import Mapped, Shared
from crm.data.files import LAYOUTS, earlier, locate
from crm.data.frames import Frame
from crm.data.pictures import read_label
from crm.data.specs import DATASETS, DatasetSpec
from crm.names import chosen


def open_split(
    dataset: str,
    split: str,
    *,
    data_root: Path | None = None,
    size: tuple[int, int] | None = None,
    limit: int = 0,
    seed: int | None = None,
    carve_val: bool = True,
) -> "Split":
    """Frames of a split, resized to `size` (the data set's own by default); `limit` keeps the first n, 0 keeps all.

    With `carve_val`, a data set without a val split gets one: the recordings that its spec holds out of train, which
    are then not in train. Without, train is everything, and asking for val is refused.
    `seed` is of a synthetic data set's scenes, by default the spec's: the data are the same for all training seeds.
    Synthetic data have as many frames as `limit` says, also more than the split's default. Raises ValueError or
    FileNotFoundError, in words for people, if the data set, the split or its files do not exist.
    """
    spec = chosen("data set", dataset, DATASETS)
    height, width = size or spec.size
    if limit < 0:
        raise ValueError(f"the number of frames of {split} must be 0 (all) or more, not {limit}")
    if spec.layout == "generated":
        count = limit or chosen(f"{spec.title} split", split, spec.splits)
        chosen(f"{spec.title} split", split, spec.splits)
        seed = spec.seed if seed is None else seed
        names = [synthetic.name(split, index) for index in range(count)]
        written = {"generator": synthetic.VERSION, "seed": seed, "split": split, "size": [height, width]}

        def draw(i: int, before: int = 0) -> Frame:
            return synthetic.scene(seed, split, i, (height, width), before)

        return Split(spec, split, names, (height, width), draw, written, earlier=draw)
    layout = LAYOUTS[spec.layout]
    folder = locate(spec, data_root)
    source, names, carved = _names(spec, folder, split, carve_val)
    if limit > len(names):
        raise ValueError(f"{spec.title} {split} has {len(names)} frames, fewer than the {limit} asked for")
    names = names[:limit] if limit else names

    def load(i: int) -> Frame:
        return resize(layout.read(spec, folder, source, names[i]), (height, width))

    def before(i: int, frames: int) -> Frame:
        return resize(earlier(spec, folder, source, names[i], frames), (height, width))

    files = [layout.files(folder, source, name) for name in names]
    return Split(spec, split, names, (height, width), load, files, carved, before)


def _names(spec: DatasetSpec, folder: Path, split: str, carve_val: bool) -> tuple[str, list[str], bool]:
    """The split of the files on disk that holds a split's frames, their names, and whether a carve-out made them."""
    layout = LAYOUTS[spec.layout]
    if spec.carve_out is None or split not in ("train", "val"):
        return split, list(layout.names(spec, folder, split)), False
    if not carve_val and split == "val":
        raise ValueError(
            f"{spec.title} has no val split; data.carve_val=True holds {spec.carve_out.share:.1%} of train out as val"
        )
    names = list(layout.names(spec, folder, "train"))
    if not carve_val:
        return "train", names, False
    try:
        held = spec.carve_out.held_out(names)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}; data.carve_val=False trains on all of them") from None
    return "train", [name for name in names if (name in held) is (split == "val")], True


def run_splits(data: Data) -> tuple[str, ...]:
    """The splits a run has: train, val and test, but no val where the data set has none and none is carved out."""
    spec = chosen("data set", data.dataset, DATASETS)
    has_val = "val" in spec.splits or (spec.carve_out is not None and data.carve_val)
    return ("train", "val", "test") if has_val else ("train", "test")


def open_run_split(data: Data, split: str, data_root: Path | None, cache: Path | None = None) -> "Split":
    """A split as a run uses it: data set, size and number of frames from the run's config.

    Remembered, so that the runs of one worker decode or draw each frame once between them. `cache` is a folder for
    decoded frames that all processes share; without, each process keeps its own in memory.
    """
    return _remembered(data, split, data_root, cache)


@lru_cache(maxsize=4)
def _remembered(data: Data, split: str, data_root: Path | None, cache: Path | None) -> "Split":
    limits = {"train": data.train_images, "val": data.val_images, "test": data.test_images}
    opened = open_split(
        data.dataset,
        split,
        data_root=data_root,
        size=data.size,
        limit=limits.get(split, 0),
        carve_val=data.carve_val,
    )
    opened.cache = cache
    return opened


def resize(frame: Frame, size: tuple[int, int]) -> Frame:
    """The frame at `size` (height, width): pictures bilinear with antialias, label nearest."""
    if frame.size == tuple(size):
        return frame

    smooth, nearest = Image.Resampling.BILINEAR, Image.Resampling.NEAREST
    # RGB and thermal apart: as RGBA, Pillow would weight the colours by the temperature
    rgb, thermal = _resized(frame.rgb, size, smooth), _resized(frame.thermal, size, smooth)
    return replace(frame, rgb=rgb, thermal=thermal, label=_resized(frame.label, size, nearest))


def _resized(array: np.ndarray, size: tuple[int, int], how: Image.Resampling) -> np.ndarray:
    return np.array(Image.fromarray(array).resize((size[1], size[0]), how))


def manifest(split: "Split") -> dict[str, Any]:
    """What a split is, for provenance: count, and a SHA-256 over names and the content of every file.

    For synthetic data the hash is over the generator's version and arguments.
    """
    digest = sha256()
    if isinstance(split.origin, dict):
        digest.update(repr((sorted(split.origin.items()), split.names)).encode())
    else:
        for name, paths in zip(split.names, split.origin, strict=True):
            digest.update(name.encode() + b"\0")
            for path in paths:
                digest.update(sha256(path.read_bytes()).digest())
    spec = split.spec
    night = sum(map(spec.is_night, split.names)) if spec.night_pattern else None  # None: names do not say
    return {
        "dataset": spec.name,
        "split": split.name,
        "count": len(split),
        "day": None if night is None else len(split) - night,
        "night": night,
        "size": list(split.size),
        "sha256": digest.hexdigest(),
        **({"generator": split.origin["generator"]} if isinstance(split.origin, dict) else {}),
        **({"carve_out": asdict(spec.carve_out)} if split.carved and spec.carve_out else {}),
        **({"list": _variant(split)} if _variant(split) else {}),
    }


def _variant(split: "Split") -> str | None:
    """Which known variant of its list a split from files is."""
    return None if isinstance(split.origin, dict) else split.spec.list_variant(split.name, split.names)


class Split(Sequence[Frame]):
    """Frames by number, decoded (or drawn) once and then kept in memory: 5 bytes per pixel.

    What is kept can be shared: with processes forked after `share()`, or with all, in files of the folder `cache`.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        name: str,
        names: Sequence[str],
        size: tuple[int, int],
        load: Callable[[int], Frame],
        origin: dict[str, Any] | list[list[Path]],
        carved: bool = False,
        earlier: Callable[[int, int], Frame] | None = None,
    ) -> None:
        self.spec, self.name, self.size = spec, name, size
        self.carved = carved  # whether the spec's carve-out decided which frames these are
        self.names = tuple(names)
        self.origin = origin  # the generator's arguments, or each frame's files
        self.cache: Path | None = None
        self._load, self._earlier = load, earlier  # a frame by number; the pictures so many frames before it
        self._kept: dict[int, Frame] = {}
        self._store: Shared | Mapped | None = None

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Frame: ...
    @overload
    def __getitem__(self, index: slice) -> list[Frame]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.spec.name} {self.name} has frames 0 to {len(self) - 1}, not {index}")
        index %= len(self)
        if index not in self._kept:
            frame = self._fetch(index)
            self._kept[index] = replace(frame, before=partial(self._earlier, index)) if self._earlier else frame
        return self._kept[index]

    def only(self, indices: Sequence[int]) -> "Split":
        """Some of the frames, as a split that shares what is kept here."""
        names = [self.names[index] for index in indices]
        origin = self.origin if isinstance(self.origin, dict) else [self.origin[index] for index in indices]
        earlier = self._earlier

        def before(i: int, frames: int) -> Frame:
            assert earlier
            return earlier(indices[i], frames)

        return Split(
            self.spec, self.name, names, self.size, lambda i: self[indices[i]], origin, self.carved, earlier and before
        )

    def _fetch(self, index: int) -> Frame:
        """The frame from the store, or decoded and stored."""
        if self._store is None and self.cache is not None:
            self.share()
        name = self.names[index]
        if self._store and (stored := self._store.get(index, name, self.spec.is_night(name))):
            return stored
        frame = self._load(index)
        for array in (frame.rgb, frame.thermal, frame.label):
            array.flags.writeable = False  # what is kept is shared
        return self._store.put(index, frame) if self._store else frame

    def native_label(self, index: int) -> np.ndarray:
        """A frame's label (h, w) as it is on disk, not resized: what predictions are compared with."""
        if isinstance(self.origin, dict):
            return self[index].label  # drawn at the size asked for
        path = self.origin[index][-1]
        with Image.open(path) as picture:
            height, width = picture.height, picture.width  # from the header; nothing is decoded yet
        if (height, width) == self.size:
            return self[index].label
        return read_label(path, f"the split {self.name}", self.spec, (height, width), "picture")

    def share(self) -> None:
        """From here on, what this process or one forked later decodes is there for all of them.

        With a cache folder all frames are decoded now, unless another process has done so before.
        """
        if self._store is not None:
            return
        if self.cache is None:
            self._store = Shared(len(self), self.size)
            for index, frame in self._kept.items():
                self._store.put(index, frame)
            self._kept.clear()  # from now on views of what is shared, not a second copy
            return
        about = {key: value for key, value in manifest(self).items() if key in ("dataset", "split", "size", "sha256")}
        file = f"{self.spec.name}-{self.name}-{self.size[0]}x{self.size[1]}-{about['sha256'][:16]}.frames"
        self._store = Mapped(self.cache / file, about, self.names, self._load)

    def verify(self) -> None:
        """Reads every frame that comes from files; raises what is wrong with the first one that is not in order."""
        if not isinstance(self.origin, dict):
            for index in range(len(self)):
                self[index]
