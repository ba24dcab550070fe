"""Contact sheets: what a split looks like in RGB, thermal and labels.

Torch-free.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from crm.data.dataset import Split, open_split
from crm.data.frames import Frame
from crm.data.specs import DatasetSpec

PAPER, INK, FAINT = (250, 250, 248), (28, 30, 36), (118, 122, 132)
CELL = (240, 320)  # height, width of one picture
GAP, MARGIN, HEAD, CAPTION = 8, 28, 92, 24


def contact_sheet(split: Split, rows: int = 4, indices: Sequence[int] | None = None) -> Image.Image:
    """Frames of a split, by day on the left and at night on the right, each as RGB, thermal and label.

    `indices` picks frames; else the first `rows` of each time of day. Synthetic scenes are drawn anew at 240x320.
    """
    spec = split.spec
    if indices is None:
        night = [i for i, name in enumerate(split.names) if spec.is_night(name)][:rows]
        indices = [i for i, name in enumerate(split.names) if not spec.is_night(name)][:rows] + night
    if not indices:
        raise ValueError(f"{spec.title} {split.name}: no frame to show")
    if isinstance(split.origin, dict):
        split = open_split(spec.name, split.name, size=CELL, limit=max(indices) + 1, seed=split.origin["seed"])
    frames = [split[i] for i in indices]
    times = [[frame for frame in frames if frame.night is night] for night in (False, True)]
    columns = [(title, found) for title, found in zip(("Day", "Night"), times, strict=True) if found]
    height, width = CELL
    block = 3 * width + 2 * GAP
    lines = max(len(found) for _, found in columns)
    legend, legend_height = _legend(spec, len(columns) * block + (len(columns) - 1) * MARGIN)
    total = (2 * MARGIN + legend.width, HEAD + lines * (height + CAPTION) + legend_height + MARGIN)
    sheet = Image.new("RGB", total, PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 18), spec.title, INK, _font(26))
    draw.text((MARGIN + 12 + draw.textlength(spec.title, _font(26)), 27), f"{split.name} split", FAINT, _font(17))
    for number, (title, found) in enumerate(columns):
        x0 = MARGIN + number * (block + MARGIN)
        for column, kind in enumerate(("RGB", "thermal", "label")):
            text = f"{title}: {kind}" if column == 0 else kind
            draw.text((x0 + column * (width + GAP), HEAD - 28), text, INK, _font(16))
        for row, frame in enumerate(found):
            y = HEAD + row * (height + CAPTION)
            for column, picture in enumerate(_pictures(frame, spec)):
                sheet.paste(picture, (x0 + column * (width + GAP), y))
            draw.text((x0, y + height + 3), frame.name, FAINT, _font(12))
    sheet.paste(legend, (MARGIN, HEAD + lines * (height + CAPTION) + 8))
    return sheet


def colourise(label: np.ndarray, spec: DatasetSpec) -> np.ndarray:
    """Class ids (h, w) as colours (h, w, 3) uint8; ignored pixels are white."""
    table = np.full((256, 3), 255, np.uint8)
    table[: len(spec.colours)] = spec.colours
    return table[label]


def _pictures(frame: Frame, spec: DatasetSpec) -> list[Image.Image]:
    size = (CELL[1], CELL[0])
    smooth, nearest = Image.Resampling.BICUBIC, Image.Resampling.NEAREST
    thermal = Image.fromarray(frame.thermal).convert("RGB")
    label = Image.fromarray(colourise(frame.label, spec))
    return [Image.fromarray(frame.rgb).resize(size, smooth), thermal.resize(size, smooth), label.resize(size, nearest)]


def _legend(spec: DatasetSpec, width: int) -> tuple[Image.Image, int]:
    """Class names beside their colours, wrapped to `width`; and the height it takes."""
    font, line = _font(15), 30
    image = Image.new("RGB", (width, line * (1 + len(spec.classes))), PAPER)
    draw = ImageDraw.Draw(image)
    x = y = 0
    for name, colour in zip(spec.classes, spec.colours, strict=True):
        shown = spec.shows_in.get(name, "both")
        text = name if shown == "both" else f"{name} ({'RGB' if shown == 'rgb' else shown} only)"
        step = 26 + int(draw.textlength(text, font)) + 26
        if x and x + step > width:
            x, y = 0, y + line
        draw.rounded_rectangle((x, y + 5, x + 17, y + 22), 3, fill=colour, outline=FAINT)
        draw.text((x + 26, y + 4), text, INK, font)
        x += step
    return image.crop((0, 0, width, y + line)), y + line


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
