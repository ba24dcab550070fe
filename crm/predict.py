"""Class maps and overlays of pictures that a person brings.

h w = pixels of a picture as it is on disk, k = classes

A picture is predicted at its own size, padded to a multiple of 32, or resized first; either way its class map has its
own size.
"""

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
import psutil
import torch
from PIL import Image, ImageDraw, ImageFont

from crm.checkpoint import load_checkpoint
from crm.data.dataset import resize
from crm.data.frames import Frame
from crm.data.pictures import BROKEN, read_picture
from crm.data.show import colourise
from crm.data.specs import DATASETS, DatasetSpec
from crm.data.transforms import DIVISOR, to_input
from crm.evaluate import answer, image_scores
from crm.model.segmenter import Segmenter, build_segmenter
from crm.records import read_config, trained_on

Size = tuple[int, int]  # height, width, pixels

GIVEN = "the command line"
GREY = 12.0  # grey levels that the channels of a grey JPEG may differ, on average
SEEN_COST = 2000  # bytes per pixel that the network sees; measured: 1,100 to 1,800 for Swin-T to Swin-B, 100 queries
OWN_COST = 40  # bytes per pixel of the picture, and 12 more per class
BLEND = 0.5  # share of a class's colour in an overlay
UNPAINTED = ("unlabeled", "background")  # classes that say nothing
LEAST = 320  # pixels of the longer side of an overlay, and of the width of its legend, at least
PAPER, INK, EDGE = (250, 250, 248), (28, 30, 36), (118, 122, 132)


# ---------------------------------------------------------------------------------------------- pictures


def read_frame(image: Path, thermal: Path | None) -> Frame:
    """A picture of four channels, or one of RGB and its thermal one, as a frame without a label (all 0).

    Thermal has one 8-bit channel, or three that are grey, whose mean is taken. ValueError, FileNotFoundError or
    PermissionError, naming the file, for anything else.
    """
    if thermal is None:
        four = _read(image, ("RGBA",), "four channels, the fourth thermal, or three and a --thermal file beside it")
        rgb, heat = four[:, :, :3].copy(), four[:, :, 3].copy()
    else:
        rgb = _read(image, ("RGB",), "three 8-bit channels, as its thermal picture is given with --thermal")
        heat = _read(thermal, ("L", "RGB"), "one 8-bit channel, or three grey ones")
        if heat.ndim == 3:
            heat = _grey(thermal, heat)
        if heat.shape != rgb.shape[:2]:
            sizes = [f"{height}x{width}" for height, width in (heat.shape, rgb.shape[:2])]
            raise ValueError(f"{thermal} is {sizes[0]} but {image} is {sizes[1]}; they must match pixel by pixel")
    return Frame(name=image.stem, rgb=rgb, thermal=heat, label=np.zeros(heat.shape, np.uint8), night=False)


def _read(path: Path, modes: Sequence[str], wanted: str) -> np.ndarray:
    header = _header(path)
    if header and header[1]:
        raise ValueError(
            f"{path} has 16 bits per channel; scale it to 8 bits as the pictures the network was trained on were "
            "(thermal: one temperature range for all pictures, brighter is warmer)"
        )
    return read_picture(path, GIVEN, modes, wanted)


def _header(path: Path) -> tuple[Size, bool] | None:
    """Height and width, and whether there are 16 bits or more per channel; None for what is no picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `refuse_size` says it in other words
            with Image.open(path) as picture:
                # Pillow cuts 16 bits to 8 without a word where there are several channels; its decoder's name tells
                deep = picture.mode[0] in "IF" or any(";16" in str(tile[3]) for tile in picture.tile)
                return (picture.height, picture.width), deep
    except BROKEN:
        return None


def _grey(path: Path, channels: np.ndarray) -> np.ndarray:
    """The mean of three channels, rounded to the nearest grey level; ValueError if they are not nearly equal."""
    spread = channels.max(axis=2) - channels.min(axis=2)
    if spread.mean() > GREY:
        raise ValueError(f"{path} is in colours; a thermal picture must be grey, brighter where it is warmer")
    return ((channels.sum(axis=2, dtype=np.uint16) + 1) // 3).astype(np.uint8)


def refuse_size(path: Path, size: Size | None, num_classes: int, device: str) -> None:
    """ValueError if a picture is too small, or needs more memory than is free; `size` as in `predict`.

    Only the picture's header is read.
    """
    header = _header(path)
    if header is None:
        return  # no picture, which reading it explains
    own = header[0]
    if max(size or own) <= DIVISOR:  # one token at the last stride, of which a norm has no deviation
        raise ValueError(
            f"{path} is {own[0]}x{own[1]}: one side that the network sees must have more than {DIVISOR} pixels; "
            "--size enlarges"
        )
    height, width = (-(-side // DIVISOR) * DIVISOR for side in size or own)
    seen_bytes, own_bytes = SEEN_COST * height * width, (OWN_COST + 12 * num_classes) * own[0] * own[1]
    needed = seen_bytes + own_bytes
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = min(psutil.virtual_memory().available, _left_to_group())
    if needed > free:
        small = "" if own_bytes > free else "; a smaller --size needs less (the class map keeps the picture's own size)"
        raise ValueError(
            f"{path} is {own[0]}x{own[1]}: predicting it at {height}x{width} takes about {needed / 2**30:.0f} GiB of "
            f"memory, and {free / 2**30:.0f} GiB are free{small}"
        )


def _left_to_group() -> float:
    """Bytes that a container or a cluster's job may still take, beyond which the kernel kills it."""
    group = Path("/sys/fs/cgroup")
    try:
        most, taken = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return float("inf")
    return float("inf") if most == "max" else int(most) - int(taken)


# ---------------------------------------------------------------------------------------------- the network


def load_network(folder: Path, selection: str, device: str) -> tuple[Segmenter, DatasetSpec]:
    """A run's network with the weights of a checkpoint, ready to predict, and the data set whose classes it has."""
    spec = DATASETS[trained_on(folder)]
    model = build_segmenter(read_config(folder).model, spec.num_classes)
    model.load_state_dict(load_checkpoint(folder / "checkpoints" / f"{selection}.safetensors").weights)
    return model.to(device).eval(), spec


@torch.no_grad()
def predict(model: Segmenter, spec: DatasetSpec, frame: Frame, size: Size | None, device: str) -> np.ndarray:
    """Class ids (h, w) uint8 of a frame; `size` is what it is resized to for the network, by default its own."""
    seen = resize(frame, size) if size else frame
    image = to_input(seen, spec).image.to(device)
    features = model.fuse(model.branch("rgb", image), model.branch("thermal", image))
    padded = (image.shape[2], image.shape[3])
    scores = image_scores(model.head(features, deep=False), 0, padded, seen.size, frame.size)
    return answer(scores)[0]


# ---------------------------------------------------------------------------------------------- files


@dataclass(frozen=True, kw_only=True)
class Job:
    """One picture to predict, and what is written."""

    image: Path
    thermal: Path | None  # None: the picture's fourth channel
    labels: Path
    overlay: Path


@dataclass(frozen=True, kw_only=True)
class Predicted:
    job: Job
    size: Size
    shares: dict[str, float]  # of the pixels, by class, the largest first


def predict_files(
    model: Segmenter,
    spec: DatasetSpec,
    jobs: Sequence[Job],
    out: Path,
    size: Size | None,
    device: str,
    tell: Callable[[int, int], None],
) -> list[Predicted]:
    """Writes the class map and the overlay of every job into the folder `out`, or nothing if one of them fails.

    `tell` hears how many of how many are done.
    """
    done = []
    with all_or_nothing(out) as scratch:
        for job in jobs:
            frame = read_frame(job.image, job.thermal)
            classes = predict(model, spec, frame, size, device)
            palette_picture(classes, spec).save(scratch / job.labels.name)
            overlay(frame.rgb, classes, spec).save(scratch / job.overlay.name)
            done.append(Predicted(job=job, size=frame.size, shares=class_shares(classes, spec)))
            tell(len(done), len(jobs))
    return done


@contextmanager
def all_or_nothing(out: Path) -> Iterator[Path]:
    """A folder whose files go to `out` when all is done; where that fails nothing of it is left, nor a new `out`.

    ValueError, with the reason, if `out` cannot be written.
    """
    made = [path for path in (out, *out.parents) if not path.exists()]
    scratch = out / f".{uuid4().hex[:8]}"
    try:
        scratch.mkdir(parents=True)
        yield scratch
        for path in sorted(scratch.iterdir()):
            os.replace(path, out / path.name)
    except OSError as error:
        if error.errno is None:  # of `read_frame`, in words already
            raise
        raise ValueError(f"cannot write to {out}: {error.strerror}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


# ---------------------------------------------------------------------------------------------- what is shown


def palette_picture(classes: np.ndarray, spec: DatasetSpec) -> Image.Image:
    """A palette picture whose indexes are the class ids, in the data set's colours."""
    picture = Image.fromarray(classes)  # grey, which a palette turns into indexes
    picture.putpalette([level for colour in spec.colours for level in colour])
    return picture


def overlay(rgb: np.ndarray, classes: np.ndarray, spec: DatasetSpec) -> Image.Image:
    """The picture with its classes' colours blended in, above a legend of those that occur and their share of it.

    Where nothing is said (UNPAINTED) the picture stays as it is. A small one is enlarged by a whole number.
    """
    unpainted = np.isin(classes, [i for i, name in enumerate(spec.classes) if name in UNPAINTED])[..., None]
    blended = np.where(unpainted, rgb, (1 - BLEND) * rgb + BLEND * colourise(classes, spec)).round().astype(np.uint8)
    times = max(1, LEAST // max(classes.shape))
    blended = blended.repeat(times, axis=0).repeat(times, axis=1)
    height, width = blended.shape[:2]
    legend = _legend(class_shares(classes, spec), spec, max(width, LEAST))
    sheet = Image.new("RGB", (legend.width, height + legend.height), PAPER)
    sheet.paste(Image.fromarray(blended), (0, 0))
    sheet.paste(legend, (0, height))
    return sheet


def class_shares(classes: np.ndarray, spec: DatasetSpec) -> dict[str, float]:
    """The share of the pixels of each class that occurs, the largest first."""
    shares = np.bincount(classes.ravel(), minlength=spec.num_classes) / classes.size
    return {spec.classes[i]: float(shares[i]) for i in np.argsort(-shares, kind="stable") if shares[i]}


def _legend(shares: dict[str, float], spec: DatasetSpec, width: int) -> Image.Image:
    """Names and shares beside their colours, wrapped to `width`; larger under a larger picture."""
    side = max(12, width // 50)
    font, line, gap = ImageFont.load_default(side), side * 2, side
    picture = Image.new("RGB", (width, line * len(shares) + gap), PAPER)
    draw = ImageDraw.Draw(picture)
    x, y = gap, gap // 2
    for name, share in shares.items():
        text = f"{name} {percent(share)}"
        step = side + gap // 2 + int(draw.textlength(text, font)) + 2 * gap
        if x > gap and x + step - gap > width:
            x, y = gap, y + line
        draw.rectangle((x, y + side // 4, x + side, y + side // 4 + side), spec.colours[spec.classes.index(name)], EDGE)
        draw.text((x + side + gap // 2, y + side // 8), text, INK, font)
        x += step
    return picture.crop((0, 0, width, y + line))


def percent(share: float) -> str:
    return "<0.1%" if share < 0.0005 else f"{share:.1%}"
