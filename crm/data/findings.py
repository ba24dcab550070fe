"""What there is to find in a data set on disk: every kind of finding, and the functions that look for it.

Torch-free. Each function takes the data set's spec, its folder and what was measured of its splits.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from crm.data.files import DAY, LAYOUTS, NIGHT
from crm.data.measure import Measured, Shift, likenesses, typical
from crm.data.specs import DatasetSpec

ERROR, NOTE = "error", "note"  # something is wrong; worth knowing

# kind of finding -> its level, in the order in which a person wants to read them
KINDS = {
    "split": ERROR,  # a split whose names cannot be had, or are not those of the split they are a part of
    "missing": ERROR,  # a file that a list names
    "unreadable": ERROR,  # a file that is no whole picture
    "channels": ERROR,  # a picture or label stored in another way
    "mismatch": ERROR,  # RGB, thermal and label of different sizes
    "label ids": ERROR,  # outside the classes
    "size": ERROR,  # a frame of another size than the others
    "count": ERROR,  # more frames than the official split has, in no known variant of it
    "overlap": ERROR,  # frames that stand in two splits
    "duplicate": ERROR,  # the same pixels in two splits
    "constant": ERROR,  # RGB or thermal of one grey level
    "copy": ERROR,  # thermal that is a colour channel
    "ignored": ERROR,  # a label that is ignored everywhere
    "mostly empty": ERROR,  # a split whose labels show background only, by and large
    "synthetic": NOTE,  # scenes written by `crm data synth`
    "subset": NOTE,  # fewer frames than the official splits have
    "variant": NOTE,  # another known form of an official split
    "other size": NOTE,  # all frames of one size, which is not the official one
    "surplus": NOTE,  # files that no list names
    "absent class": NOTE,
    "misaligned": NOTE,
    "empty label": NOTE,  # background only: real sets have such frames
    "near across": NOTE,  # nearly the same picture in two splits
    "repeated": NOTE,  # the same pixels twice in one split
    "near inside": NOTE,  # nearly the same picture twice in one split
}

BACKGROUND = ("unlabeled", "background")  # what class 0 is called where it means "nothing"
ALIKE = 0.85  # correlation of thumbnails from which on frames are nearly the same; MF frames far apart reach 0.69
ASKEW = 1 / 128  # of the width: a typical misalignment from which on it is a finding (5 pixels of 640)
MOSTLY = 0.5  # share of empty labels above which they are no accident of the scenes
ONE_BY_ONE = 200  # surplus frames up to which each is a finding
ROWS = 512  # frames compared with all others at once
DECLARATION = "synthetic.json"  # written by `crm data synth`: {"frames": {split: count}, ...}


@dataclass(frozen=True)
class Finding:
    kind: str  # a key of KINDS
    file: str  # or folder
    message: str  # one line
    split: str = ""

    @property
    def level(self) -> str:
        return KINDS[self.kind]


@dataclass(frozen=True, eq=False)
class Usable:
    """A frame that training could read."""

    split: str
    name: str
    files: list[Path]  # pictures first, label last; the last picture holds thermal
    seen: Measured


@dataclass(frozen=True, eq=False)
class Part:
    """A split and what was measured of its frames."""

    names: tuple[str, ...]
    files: list[list[Path]]  # of every frame, usable or not
    carved: bool  # whether the spec's carve-out made it
    usable: list[Usable] = field(default_factory=list)


Parts = dict[str, Part]


# ---------------------------------------------------------------------------------------------- lists and files


def counts(spec: DatasetSpec, folder: Path, parts: Parts) -> Iterator[Finding]:
    """What the numbers of frames say."""
    names = {name: part.names for name, part in parts.items()}
    if "val" in parts and parts["val"].carved:
        text = f"{folder}: no val split, so {len(names['val'])} frames of train are held out as val, recordings whole"
        yield Finding("variant", str(folder), text, "val")
        names["train"] += names.pop("val")
    declared = declaration(folder)
    if declared is not None:
        at = str(folder / DECLARATION)
        yield Finding("synthetic", at, f"{at}: synthetic scenes in the layout of {spec.title}, no real frames")
    fewer = []
    for split, frames in names.items():
        at = str(_listing(folder, split))
        official = spec.splits[split] if declared is None else declared.get(split, 0)
        known = spec.list_variant(split, frames) if declared is None else None
        if len(frames) == official:
            continue
        if known:
            text = f"{at}: {split} has {len(frames)} names where the official split has {official}: {known}"
            yield Finding("variant", at, text, split)
        elif len(frames) < official and declared is None:
            fewer.append(f"{split} {len(frames)} of {official}")
        else:
            whose = f"{spec.title} has" if declared is None else "were written"
            yield Finding("count", at, f"{at}: {split} has {len(frames)} frames, but {official} {whose}", split)
    if fewer:
        yield Finding("subset", str(folder), f"{folder}: a subset of the official data set: {', '.join(fewer)}")


def _listing(folder: Path, split: str) -> Path:
    """Where a split's names come from: its list, or the folder."""
    listing = folder / f"{split}.txt"
    return listing if listing.exists() else folder


def declaration(folder: Path) -> dict[str, int] | None:
    """Frames of each split as `crm data synth` wrote them; None for a folder that it did not write."""
    try:
        written: Any = json.loads((folder / DECLARATION).read_text())
    except (OSError, ValueError):
        return None
    frames = written.get("frames") if isinstance(written, dict) else None
    sound = isinstance(frames, dict) and all(isinstance(count, int) for count in frames.values())
    return frames if sound else None


def halves(spec: DatasetSpec, folder: Path, parts: Parts) -> Iterator[Finding]:
    """Day and night lists that are no part of their split, or hold frames of the other time."""
    for half in spec.splits:
        listing, whole = folder / f"{half}.txt", half.removesuffix(DAY).removesuffix(NIGHT)
        if half == whole or whole not in parts or not listing.exists():
            continue
        try:
            names = LAYOUTS[spec.layout].names(spec, folder, half)
        except (ValueError, OSError) as error:
            yield Finding("split", str(listing), str(error), half)
            continue
        known = set(parts[whole].names)
        if stray := [name for name in names if name not in known]:
            yield Finding("split", str(listing), f"{listing} lists {_some(stray)}, not in {whole}", half)
        if wrong := [name for name in names if spec.is_night(name) is not half.endswith(NIGHT)]:
            yield Finding("split", str(listing), f"{listing} lists frames of the other time: {_some(wrong)}", half)


def overlaps(spec: DatasetSpec, folder: Path, parts: Parts) -> Iterator[Finding]:
    """Frames that stand in two splits."""
    merged = "train" in parts and "merged" in (spec.list_variant("train", parts["train"].names) or "")
    done: dict[str, Part] = {}
    for split, part in parts.items():
        for other, before in done.items():
            theirs = {files[0] for files in before.files}
            both = [name for name, files in zip(part.names, part.files, strict=True) if files[0] in theirs]
            at = _listing(folder, split)
            if both and merged and (other, split) == ("train", "val"):
                text = f"{at}: {len(both)} frames of val are in train too, so scores on val mean nothing"
                yield Finding("variant", str(at), text, split)
            elif both:
                yield Finding("overlap", str(at), f"{at}: {_some(both)} of {split} also in {other}", split)
        done[split] = part


def _some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def surplus(spec: DatasetSpec, folder: Path, parts: Parts) -> Iterator[Finding]:
    """Files beside those of the frames that no split has."""
    wanted = {path for part in parts.values() for files in part.files for path in files}
    beside: dict[tuple[Path, str], list[Path]] = {}  # files of one name below one folder are a frame
    for place in sorted({path.parent for path in wanted}):
        try:
            found = sorted(path for path in place.iterdir() if not path.name.startswith("."))
        except OSError:
            continue  # its frames are findings already
        for path in found:
            if path not in wanted:
                beside.setdefault((place.parent, path.stem), []).append(path)
    if len(beside) > ONE_BY_ONE:
        first = next(iter(beside.values()))[0]
        yield Finding("surplus", str(first), f"{first} and {len(beside) - 1} more frames are in no split")
        return
    for (_, name), files in beside.items():
        where = ", ".join(path.parent.name for path in files)
        yield Finding("surplus", str(files[0]), f"{files[0]}: {name} is in no split (it is in {where})")


def sizes(spec: DatasetSpec, folder: Path, parts: Parts) -> Iterator[Finding]:
    """Frames of another size than the others, or all of another size than the official one."""
    frames = [frame for part in parts.values() for frame in part.usable]
    if not frames:
        return
    (height, width), _ = Counter(frame.seen.size for frame in frames).most_common(1)[0]
    for frame in frames:
        if frame.seen.size != (height, width):
            is_, at = "{}x{}".format(*frame.seen.size), frame.files[0]
            yield Finding("size", str(at), f"{at} is {is_}, the other frames are {height}x{width}", frame.split)
    if (height, width) != spec.size:
        official = "{}x{}".format(*spec.size)
        yield Finding("other size", str(folder), f"{folder}: frames are {height}x{width}, officially {official}")


# ---------------------------------------------------------------------------------------------- pictures and labels


def pictures(spec: DatasetSpec, folder: Path, parts: Parts) -> Iterator[Finding]:
    """Modalities that say nothing."""
    for part in parts.values():
        for frame in part.usable:
            for modality in frame.seen.constant:
                at = frame.files[0 if modality == "RGB" else -2]
                yield Finding("constant", str(at), f"{at}: {modality} has one value everywhere", frame.split)
            if frame.seen.copied:
                at, text = frame.files[-2], f"thermal is a copy of the {frame.seen.copied} of RGB"
                yield Finding("copy", str(at), f"{at}: {text}", frame.split)


def labels(spec: DatasetSpec, folder: Path, parts: Parts) -> Iterator[Finding]:
    """Labels with nothing to learn, and classes that a split does not have."""
    nothing = [0, spec.ignore_index] if spec.classes[0] in BACKGROUND else [spec.ignore_index]
    usable = {split: part.usable for split, part in parts.items() if part.usable}
    for split, frames in usable.items():
        empty = []
        for frame in frames:
            at, pixels = frame.files[-1], frame.seen.labels
            if pixels[spec.ignore_index] == pixels.sum():
                yield Finding("ignored", str(at), f"{at}: every pixel is {spec.ignore_index}, which is ignored", split)
            elif pixels[nothing].sum() == pixels.sum():
                empty.append(frame)
                yield Finding("empty label", str(at), f"{at}: no object, only {spec.classes[0]}", split)
        if len(empty) > MOSTLY * len(frames):
            place = empty[0].files[-1].parent
            text = f"{place}: {len(empty)} of {len(frames)} labels of {split} have no object"
            yield Finding("mostly empty", str(place), text, split)
    pixels = {split: np.sum([frame.seen.labels for frame in frames], axis=0) for split, frames in usable.items()}
    absent = {split: {name for i, name in enumerate(spec.classes) if not counts[i]} for split, counts in pixels.items()}
    everywhere = set.intersection(*absent.values()) if len(absent) > 1 else set()
    for split, missing in {"": everywhere, **{split: those - everywhere for split, those in absent.items()}}.items():
        if missing:
            place = usable[split or next(iter(usable))][0].files[-1].parent
            names = ", ".join(name for name in spec.classes if name in missing)
            yield Finding("absent class", str(place), f"{place}: no {names} in {split or 'any split'}", split)


def alignment(spec: DatasetSpec, folder: Path, parts: Parts) -> Iterator[Finding]:
    """Splits whose thermal pictures do not lie on their RGB pictures."""
    for split, part in parts.items():
        shift = typical([frame.seen.shift for frame in part.usable])
        width = Counter(frame.seen.size[1] for frame in part.usable).most_common(1)[0][0] if part.usable else 0
        if shift and max(abs(shift.down), abs(shift.right)) >= ASKEW * width:
            place = part.usable[0].files[-2].parent
            text = f"{place}: thermal lies {in_words(shift)} of RGB in {split}, by the median over its frames"
            yield Finding("misaligned", str(place), text, split)


def in_words(shift: Shift) -> str:
    """As in `3 px below and 1 px right`."""
    down = f"{abs(shift.down):.3g} px {'below' if shift.down >= 0 else 'above'}"
    return f"{down} and {abs(shift.right):.3g} px {'right' if shift.right >= 0 else 'left'}"


# ---------------------------------------------------------------------------------------------- frames like others


def repetitions(spec: DatasetSpec, folder: Path, parts: Parts) -> Iterator[Finding]:
    """The same pixels in two frames, by the SHA-256 of either modality."""
    first: dict[str, Usable] = {}
    for part in parts.values():
        for frame in part.usable:
            before: dict[int, tuple[Usable, list[str]]] = {}
            for modality, digest in zip(("RGB", "thermal"), frame.seen.digests, strict=True):
                other = first.setdefault(digest, frame)
                same_file = other.files[0] == frame.files[0]  # itself, or a frame in two splits
                if not same_file and modality not in frame.seen.constant:
                    before.setdefault(id(other), (other, []))[1].append(modality)
            for other, modalities in before.values():
                at, whose = frame.files[0 if "RGB" in modalities else -2], f"{other.name} in {other.split}"
                kind = "repeated" if other.split == frame.split else "duplicate"
                text = f"{at} ({frame.split}) has the same {' and '.join(modalities)} as {whose}"
                yield Finding(kind, str(at), text, frame.split)


def resemblances(spec: DatasetSpec, folder: Path, parts: Parts) -> Iterator[Finding]:
    """Frames that look nearly like another: those like one of an earlier split, and how many are inside a split."""
    frames = [frame for part in parts.values() for frame in part.usable]
    if not frames:
        return
    splits = list(parts)
    belongs = np.array([splits.index(frame.split) for frame in frames])
    contents: dict[tuple[str, str], int] = {}
    same = np.array([contents.setdefault(frame.seen.digests, len(contents)) for frame in frames])
    looks = np.stack([frame.seen.thumbnails for frame in frames])
    inside: dict[str, list[tuple[float, int, int]]] = {split: [] for split in splits}
    for start in range(0, len(frames), ROWS):
        rows = slice(start, start + ROWS)
        alike = likenesses(looks[rows], looks)
        alike[same[rows, None] == same] = 0  # itself, and what is a finding of another kind
        for kept, across in ((belongs[rows, None] > belongs, True), (belongs[rows, None] == belongs, False)):
            found = np.where(kept, alike, 0)
            best = found.argmax(axis=1)
            for row in np.flatnonzero(found.max(axis=1) >= ALIKE):
                frame, other, how = frames[start + row], frames[best[row]], float(found[row, best[row]])
                if across:
                    at, text = frame.files[0], f"looks nearly like {other.name} in {other.split}"
                    text = f"{at} ({frame.split}) {text} (correlation {how:.2f})"
                    yield Finding("near across", str(at), text, frame.split)
                else:
                    inside[frame.split].append((how, start + int(row), int(best[row])))
    for split, pairs in inside.items():
        if pairs:
            how, one, other = max(pairs)
            at, count = frames[one].files[0], f"{len(pairs)} of {len(parts[split].usable)} frames of {split}"
            text = f"{at}: {count} look nearly like another of it, as this one and {frames[other].name} ({how:.2f})"
            yield Finding("near inside", str(at), text, split)


LOOK = (counts, halves, overlaps, surplus, sizes, pictures, labels, alignment, repetitions, resemblances)
