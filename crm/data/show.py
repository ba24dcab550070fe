"""Contact sheets: what a split looks like in RGB, thermal and labels.

Torch-free. h w = height, width in pixels
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from crm.data.dataset import Split, open_split
from crm.data.frames import Frame
from crm.data.specs import DatasetSpec

PAPER, INK, FAINT, EDGE = (250, 250, 248), (28, 30, 36), (118, 122, 132), (206, 208, 212)
WIDTH = 320  # of one picture, pixels
DRAWN = (240, 320)  # height, width that synthetic scenes are drawn anew at
GAP, MARGIN, HEAD, CAPTION = 8, 28, 92, 24
HATCH = 6  # distance of the lines over what is hidden, pixels


@dataclass(frozen=True, eq=False)
class View:
    """A frame as somebody sees it."""

    frame: Frame
    hidden: np.ndarray | None = None  # bool (2, h, w), pixels of RGB and of thermal that the network does not get
    padded: bool = False  # whether there is padding on the right or at the bottom


def as_recorded(frames: Sequence[Frame]) -> list[View]:
    return [View(frame) for frame in frames]


def contact_sheet(
    split: Split,
    rows: int = 4,
    indices: Sequence[int] | None = None,
    view: Callable[[Sequence[Frame]], list[View]] = as_recorded,
    subtitle: str = "",
) -> Image.Image:
    """Frames of a split, by day on the left and at night on the right, each as RGB, thermal and label.

    `indices` picks frames; else the first `rows` of each time of day. `view` makes of the frames what is shown. As
    recorded, synthetic scenes are drawn anew at 240x320.
    """
    spec = split.spec
    indices = picked(split, rows) if indices is None else indices
    if not indices:
        raise ValueError(f"{spec.title} {split.name}: no frame to show")
    if isinstance(split.origin, dict) and view is as_recorded:
        split = open_split(spec.name, split.name, size=DRAWN, limit=max(indices) + 1, seed=split.origin["seed"])
    views = view([split[i] for i in indices])
    times = [[one for one in views if one.frame.night is night] for night in (False, True)]
    columns = [(title, found) for title, found in zip(("Day", "Night"), times, strict=True) if found]
    size = (WIDTH, max(round(WIDTH * one.frame.size[0] / one.frame.size[1]) for one in views))
    block = 3 * WIDTH + 2 * GAP
    lines = max(len(found) for _, found in columns)
    legend = _legend(spec, views, len(columns) * block + (len(columns) - 1) * MARGIN)
    step = size[1] + CAPTION
    sheet = Image.new("RGB", (2 * MARGIN + legend.width, HEAD + lines * step + legend.height + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 18), spec.title, INK, font(26))
    after = MARGIN + 12 + draw.textlength(spec.title, font(26))
    draw.text((after, 27), subtitle or f"{split.name} split", FAINT, font(17))
    for number, (time, found) in enumerate(columns):
        left = MARGIN + number * (block + MARGIN)
        for column, kind in enumerate(("RGB", "thermal", "label")):
            text = f"{time}: {kind}" if column == 0 and spec.night_pattern else kind
            draw.text((left + column * (WIDTH + GAP), HEAD - 28), text, INK, font(16))
        for row, one in enumerate(found):
            top = HEAD + row * step
            for column, picture in enumerate(_pictures(one, spec, size)):
                x = left + column * (WIDTH + GAP)
                sheet.paste(picture, (x, top))
                draw.rectangle((x - 1, top - 1, x + size[0], top + size[1]), outline=EDGE)
            draw.text((left, top + size[1] + 3), one.frame.name, FAINT, font(12))
    sheet.paste(legend, (MARGIN, HEAD + lines * step + 8))
    return sheet


def picked(split: Split, rows: int) -> list[int]:
    """The first `rows` frames by day and the first at night."""
    night = [split.spec.is_night(name) for name in split.names]
    return [i for time in (False, True) for i in [i for i, dark in enumerate(night) if dark is time][:rows]]


def colourise(label: np.ndarray, spec: DatasetSpec) -> np.ndarray:
    """Class ids (h, w) as colours (h, w, 3) uint8; ignored pixels are white, or grey where a class is white."""
    table = np.full((256, 3), ignored_colour(spec), np.uint8)
    table[: len(spec.colours)] = spec.colours
    return table[label]


def ignored_colour(spec: DatasetSpec) -> tuple[int, int, int]:
    return (150, 150, 150) if (255, 255, 255) in spec.colours else (255, 255, 255)


def _pictures(view: View, spec: DatasetSpec, size: tuple[int, int]) -> list[Image.Image]:
    frame = view.frame
    smooth, nearest = Image.Resampling.BICUBIC, Image.Resampling.NEAREST
    how = nearest if frame.size[1] < size[0] else smooth  # enlarged pixels stay the pixels they are
    pictures = [Image.fromarray(frame.rgb), Image.fromarray(frame.thermal).convert("RGB")]
    pictures = [picture.resize(size, how) for picture in pictures]
    if view.hidden is not None:
        for picture, hidden in zip(pictures, view.hidden, strict=True):
            picture.paste(hatched(size), mask=Image.fromarray(hidden).resize(size, nearest))
    return [*pictures, Image.fromarray(colourise(frame.label, spec)).resize(size, nearest)]


def hatched(size: tuple[int, int]) -> Image.Image:
    """What stands where something is hidden: light, with diagonal lines."""
    x, y = np.arange(size[0])[None], np.arange(size[1])[:, None]
    line = (x + y) % HATCH == 0
    return Image.fromarray(np.where(line[..., None], (150, 155, 168), (226, 228, 233)).astype(np.uint8))


def _legend(spec: DatasetSpec, views: Sequence[View], width: int) -> Image.Image:
    """Class names beside their colours, and what else has one on this sheet, wrapped to `width`."""
    entries = []
    for name, colour in zip(spec.classes, spec.colours, strict=True):
        shown = spec.shows_in.get(name, "both")
        text = name if shown == "both" else f"{name} ({'RGB' if shown == 'rgb' else shown} only)"
        entries.append((text, Image.new("RGB", (17, 17), colour)))
    if any((view.frame.label >= len(spec.classes)).any() for view in views):
        text = "ignored or padding" if any(view.padded for view in views) else "ignored"
        entries.append((text, Image.new("RGB", (17, 17), ignored_colour(spec))))
    if any(view.hidden is not None and view.hidden.any() for view in views):
        entries.append(("hidden from the network", hatched((17, 17))))
    letters, line = font(15), 30
    image = Image.new("RGB", (width, line * len(entries)), PAPER)
    draw = ImageDraw.Draw(image)
    x = y = 0
    for text, swatch in entries:
        step = 26 + int(draw.textlength(text, letters)) + 26
        if x and x + step > width:
            x, y = 0, y + line
        image.paste(swatch, (x, y + 5))
        draw.rectangle((x, y + 5, x + 16, y + 21), outline=FAINT)
        draw.text((x + 26, y + 4), text, INK, letters)
        x += step
    return image.crop((0, 0, width, y + line))


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
