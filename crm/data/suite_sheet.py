"""What the corruptions of a suite look like: a row per corruption and modality, a column per severity.

Torch-free. h w = height, width in pixels
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from crm.conditions import IN_THE_NETWORK, Condition, Degradation
from crm.corruptions import corrupt, hidden_tokens
from crm.data.frames import Frame
from crm.data.show import EDGE, FAINT, GAP, INK, MARGIN, PAPER, font, hatched
from crm.data.specs import DatasetSpec

SHOWN = (240, 320)  # height, width that synthetic scenes are drawn at, so that a pixel is a pixel
TILE = 320  # width of one picture, pixels
NAMES = 190  # width of the column of names, pixels
HEAD, CAPTION = 84, 22


def suite_sheet(frame: Frame, spec: DatasetSpec, conditions: Sequence[Condition], title: str) -> Image.Image:
    """One frame under every degradation of a suite, beside itself as recorded.

    ValueError if the suite degrades nothing.
    """
    rows: dict[tuple[str, str, bool], dict[float, Condition]] = {}
    for condition in conditions:
        sides = [(side, how) for side, how in _sides(condition) if how.kind != "clean"]
        for side, how in sides:
            rows.setdefault((side, how.kind, len(sides) == 2), {}).setdefault(how.severity, condition)
    if not rows:
        raise ValueError(f"{title} leaves every frame as it is: there is nothing to show")
    columns = 1 + max(len(found) for found in rows.values())
    size = (TILE, round(TILE * frame.size[0] / frame.size[1]))
    step = size[1] + CAPTION
    sheet = Image.new("RGB", (2 * MARGIN + NAMES + columns * (TILE + GAP), HEAD + len(rows) * step + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 18), title, INK, font(26))
    draw.text((MARGIN, 52), f"{spec.title}, {frame.name}; from left to right as recorded, then worse", FAINT, font(15))
    for row, ((side, kind, both), found) in enumerate(rows.items()):
        top = HEAD + row * step
        draw.text((MARGIN, top + 4), kind, INK, font(15))
        draw.text((MARGIN, top + 24), f"{side}, with the other" if both else f"{side} alone", FAINT, font(13))
        for column, condition in enumerate([Condition(), *(found[severity] for severity in sorted(found))]):
            left = MARGIN + NAMES + column * (TILE + GAP)
            how = dict(_sides(condition))[side]
            sheet.paste(_picture(frame, spec, side, how, condition.seed, size), (left, top))
            draw.rectangle((left - 1, top - 1, left + size[0], top + size[1]), outline=EDGE)
            caption = "as recorded" if not column else f"{how.severity:g}" if how.severity else how.kind
            draw.text((left, top + size[1] + 2), caption, FAINT, font(12))
    return sheet


def _sides(condition: Condition) -> list[tuple[str, Degradation]]:
    return [("rgb", condition.rgb), ("thermal", condition.thermal)]


def _picture(
    frame: Frame, spec: DatasetSpec, side: str, how: Degradation, seed: int, size: tuple[int, int]
) -> Image.Image:
    """Grey levels to the nearest; what the network does not get at all is hatched."""
    levels = np.rint(corrupt(frame, side, how, spec, seed)).clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(levels if side == "rgb" else levels[..., 0]).convert("RGB")
    picture = picture.resize(size, Image.Resampling.BOX if picture.width > size[0] else Image.Resampling.NEAREST)
    if how.kind in IN_THE_NETWORK:
        hidden = hidden_tokens([frame], side, how, seed, frame.size)
        mask = Image.fromarray(hidden[0]) if hidden is not None else Image.new("1", size, 1)
        picture.paste(hatched(size), mask=mask.resize(size, Image.Resampling.NEAREST))
    return picture
