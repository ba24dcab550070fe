"""What a missing modality does to single test images: which ones are shown is a rule, not a choice.

n = test images, h w = height, width in pixels
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from analysis.load import Study
from analysis.tables import percent, signed
from crm.conditions import CLEAN, MISSING, Condition
from crm.confusion import Evaluation, load_evaluation, miou
from crm.data.dataset import Split, open_split
from crm.data.frames import Frame
from crm.data.show import colourise
from crm.records import evaluation

RULE = (
    "At seed {seed}, the test images on which “{subject}” gains most over “{reference}” and least, and the median gain "
    "by day and at night, in mIoU of the single image. No image was chosen by hand."
)


@dataclass(frozen=True, eq=False)
class Picture:
    title: str
    pixels: np.ndarray  # uint8 (h, w, 3)
    note: str = ""  # what stands below it
    missing: bool = False  # this modality was taken away, the network saw nothing of it


@dataclass(frozen=True, eq=False)
class Example:
    name: str
    night: bool
    why: str  # why the rule picked it
    gain: float  # of the subject over the reference, points of this image's mIoU
    pictures: list[Picture]


@dataclass(frozen=True, eq=False)
class Panel:
    key: str  # "rgb" or "thermal": what is missing
    title: str
    rule: str
    examples: list[Example]
    legend: list[tuple[str, tuple[int, int, int], str]]  # class, colour, remark


def panels(study: Study, data_root: Path | None) -> list[Panel]:
    """A panel per missing modality for which subject and baseline have kept their predictions at a common seed.

    Raises ValueError or FileNotFoundError, in words for people, where the test images are not at hand.
    """
    sweep, made = study.sweep, []
    for condition in MISSING:
        seeds = [s for s in sweep.seeds if all((v, s, condition.name) in study.evidence for v in _pair(study))]
        if condition not in sweep.conditions or sweep.subject == sweep.reference or not seeds:
            continue
        seed = min(seeds)
        by_variant = {cell.variant: cell for cell in study.cells if cell.seed == seed}
        reference, subject = (
            load_evaluation(evaluation(study.runs / by_variant[v].id, sweep.selection, condition), predictions=True)
            for v in _pair(study)
        )
        if reference.predictions is None or subject.predictions is None:
            continue
        data = by_variant[sweep.subject].config.data
        limit = getattr(data, f"{condition.split}_images", 0)
        split = open_split(data.dataset, condition.split, data_root=data_root, size=data.size, limit=limit)
        if list(split.names) != list(subject.names):
            raise ValueError(f"{split.spec.title} {split.name} holds other images than the runs were evaluated on")
        made.append(_panel(study, condition, seed, split, reference, subject))
    return made


def _pair(study: Study) -> tuple[str, str]:
    return study.sweep.reference, study.sweep.subject


def _panel(
    study: Study, condition: Condition, seed: int, split: Split, reference: Evaluation, subject: Evaluation
) -> Panel:
    each = {"reference": miou(reference.confusion), "subject": miou(subject.confusion)}
    gains = each["subject"] - each["reference"]
    key = "thermal" if condition.rgb == CLEAN else "rgb"
    examples = []
    for why, index in pick(gains, subject.night).items():
        frame = split[index]
        pictures = [
            _modality("RGB", frame.rgb, missing=key == "rgb"),
            _modality("thermal", np.repeat(frame.thermal[..., None], 3, axis=2), missing=key == "thermal"),
            Picture("label", colourise(frame.label, split.spec)),
        ]
        for variant, values, found in zip(_pair(study), each.values(), (reference, subject), strict=True):
            note = f"mIoU {percent(float(values[index]))}"
            pictures.append(Picture(variant, _prediction(found, index, frame, split), note))
        examples.append(Example(frame.name, frame.night, why, float(gains[index]), pictures))
    legend = [
        (name, colour, {"rgb": "RGB only", "thermal": "thermal only"}.get(split.spec.shows_in.get(name, ""), ""))
        for name, colour in zip(split.spec.classes, split.spec.colours, strict=True)
    ]
    rule = RULE.format(seed=seed, subject=study.sweep.subject, reference=study.sweep.reference)
    return Panel(key, f"{'RGB' if key == 'rgb' else 'Thermal'} missing", rule, examples, legend)


def pick(gains: np.ndarray, night: np.ndarray) -> dict[str, int]:
    """Why -> image: largest gain (or smallest loss), median by day, median at night, smallest gain (or largest loss).

    Ties go to the first image; an image that two rules pick is shown once; images without a gain (no class) are out.
    """
    known = np.flatnonzero(~np.isnan(gains))
    if not known.size:
        return {}
    order = known[np.argsort(-gains[known], kind="stable")]
    wanted = {"largest gain" if gains[order[0]] >= 0 else "smallest loss": order[0]}
    for when, there in (("by day", order[~night[order]]), ("at night", order[night[order]])):
        if there.size:
            wanted[f"median gain {when}"] = there[there.size // 2]
    wanted["largest loss" if gains[order[-1]] < 0 else "smallest gain"] = order[-1]
    picked: dict[str, int] = {}
    for why, index in wanted.items():
        if index not in picked.values():
            picked[why] = int(index)
    return picked


def _modality(title: str, pixels: np.ndarray, missing: bool) -> Picture:
    """The picture, or its ghost where the network was given the mean image instead."""
    if not missing:
        return Picture(title, pixels)
    grey = pixels.mean(axis=2, keepdims=True)
    ghost = np.repeat(0.82 * 150 + 0.18 * grey, 3, axis=2).astype(np.uint8)
    return Picture(title, ghost, "missing", missing=True)


def _prediction(found: Evaluation, index: int, frame: Frame, split: Split) -> np.ndarray:
    """The predicted classes in colours; pixels that are not counted stay as blank as in the label."""
    classes = found.predictions[index]
    if classes.shape == frame.label.shape and split.spec.ignore_index >= len(split.spec.classes):
        classes = np.where(frame.label == split.spec.ignore_index, frame.label, classes)
    return colourise(classes, split.spec)


# ---------------------------------------------------------------------------------------------- as one picture

PAPER, INK, QUIET = (255, 255, 255), (28, 33, 39), (102, 112, 123)
GAP, SIDE, WIDTH = 10, 28, 224  # pixels; WIDTH is the least width of one picture


def fitted(pixels: np.ndarray, least: int = WIDTH, most: int = 320) -> Image.Image:
    """The picture at least `least` wide, enlarged by whole numbers so that it stays crisp, and at most `most`."""
    image = Image.fromarray(pixels)
    if image.width < least:
        times = -(-least // image.width)
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    if image.width > most:
        # class maps have few colours and must gain none
        flat = len(image.getcolors(256) or ()) > 0
        how = Image.Resampling.NEAREST if flat else Image.Resampling.LANCZOS
        return image.resize((most, round(image.height * most / image.width)), how)
    return image


def as_image(panel: Panel) -> Image.Image:
    """The whole panel as one picture for a paper: a row per example, with titles, rule and legend."""
    first = [fitted(picture.pixels) for picture in panel.examples[0].pictures]
    width, height = first[0].size
    columns = len(first)
    total = 2 * SIDE + columns * width + (columns - 1) * GAP
    rule, legend = _wrapped(panel.rule, total - 2 * SIDE, 15), _placed_legend(panel, total - 2 * SIDE)
    row = height + 52
    top = SIDE + 34 + 22 * len(rule) + 42
    foot = 30 * (1 + max(line for *_, line in legend)) + SIDE
    sheet = Image.new("RGB", (total, top + row * len(panel.examples) + foot), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((SIDE, SIDE - 4), panel.title, INK, _font(22, bold=True))
    for number, line in enumerate(rule):
        draw.text((SIDE, SIDE + 32 + 22 * number), line, QUIET, _font(15))
    for column, picture in enumerate(panel.examples[0].pictures):
        title = _cut(picture.title, width, _font(16, bold=True))
        draw.text((SIDE + column * (width + GAP), top - 27), title, INK, _font(16, bold=True))
    for number, example in enumerate(panel.examples):
        y = top + number * row
        for column, picture in enumerate(example.pictures):
            x = SIDE + column * (width + GAP)
            sheet.paste(fitted(picture.pixels), (x, y))
            if picture.missing:
                _strike(draw, (x, y, x + width - 1, y + height - 1))
            elif picture.note:
                draw.text((x, y + height + 5), picture.note, QUIET, _font(14))
        words = f"{example.why}: {signed(example.gain)}"
        draw.text((SIDE, y + height + 5), words, INK, _font(14, bold=True))
        draw.text((SIDE + width + GAP, y + height + 5), f"{example.name}, {_when(example)}", QUIET, _font(14))
    for text, colour, x, line in legend:
        y = top + row * len(panel.examples) + 30 * line
        draw.rounded_rectangle((SIDE + x, y + 2, SIDE + x + 16, y + 18), 3, fill=colour, outline=QUIET)
        draw.text((SIDE + x + 24, y + 1), text, INK, _font(14))
    return sheet


def _when(example: Example) -> str:
    return "night" if example.night else "day"


def _strike(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int]) -> None:
    """Two diagonals and the word."""
    x0, y0, x1, y1 = box
    draw.line((x0, y0, x1, y1), fill=(120, 120, 120), width=2)
    draw.line((x0, y1, x1, y0), fill=(120, 120, 120), width=2)
    font = _font(16, bold=True)
    half = draw.textlength("missing", font) / 2
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    draw.rounded_rectangle((x - half - 10, y - 15, x + half + 10, y + 15), 6, fill=INK)
    draw.text((x, y), "missing", PAPER, font, anchor="mm")


def _placed_legend(panel: Panel, width: int) -> list[tuple[str, tuple[int, int, int], int, int]]:
    """Each class with its colour and where its sign stands: x in pixels, line."""
    placed, x, line = [], 0, 0
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    for name, colour, remark in panel.legend:
        text = f"{name} ({remark})" if remark else name
        step = 24 + int(measure.textlength(text, _font(14))) + 26
        if x and x + step > width:
            x, line = 0, line + 1
        placed.append((text, colour, x, line))
        x += step
    return placed


def _wrapped(text: str, width: int, size: int) -> list[str]:
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and measure.textlength(longer, _font(size)) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _cut(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    while len(text) > 1 and measure.textlength(text, font) > width:
        text = text.rstrip("…")[:-1] + "…"
    return text


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu as matplotlib brings it, so that pictures look the same on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(mpl.get_data_path()) / "fonts" / "ttf" / name, size)
