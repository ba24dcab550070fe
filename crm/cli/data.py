"""Data sets: what is wrong with one, what one looks like, and a stand-in for frames one does not have."""

import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crm.cli import options
from crm.cli.options import Data, Json, Recipe, Set

if TYPE_CHECKING:
    from crm.config import Config
    from crm.data.check import Report

LINES = 20  # of findings on one screen
MOST = 8  # findings of one kind that are listed at most
WIDTH = 118  # of tables, in characters


def add_to(app: typer.Typer) -> None:
    data = typer.Typer(help="Data sets.", no_args_is_help=True, rich_markup_mode=None)
    data.command("check")(check)
    data.command("show")(show)
    data.command("synth")(synth)
    app.add_typer(data, name="data")


class Meter:
    """A line on stderr about long work, from its third second on: rewritten on a terminal, now and then elsewhere."""

    def __init__(self, verb: str) -> None:
        self.verb = verb  # as in "read"
        self.began = self.told = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def __call__(self, done: int, count: int) -> None:
        now = time.monotonic()
        if now - self.began < 2 or (now - self.told < (0.2 if self.terminal else 10) and done < count):
            return
        self.told = now
        left = options.duration((now - self.began) / done * (count - done))
        text = f"{done} of {count} frames {self.verb}, {left} to go"
        if self.terminal:
            sys.stderr.write("\r\033[K" + (text if done < count else ""))
        elif done < count:
            sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


# ---------------------------------------------------------------------------------------------- check


def check(
    dataset: Annotated[str, typer.Argument(help="A data set of files, as in `crm list data`.")],
    data: Data = None,
    json: Json = False,
) -> None:
    """Reads every frame and says what is wrong (exit code 1) and what is worth knowing.

    Frames are nearly alike where their thumbnails correlate by 0.85 or more, in RGB and in thermal. Where thermal lies
    against RGB is a median over the frames, by phase correlation of the edges; it is clear from a confidence of 4.5 on.
    """
    from dataclasses import asdict

    from crm.data.check import check
    from crm.machine import cores

    began = time.monotonic()
    report = check(dataset, options.data_folder(data), threads=cores(), tell=Meter("read"))
    if json:
        found = [{"level": finding.level, **asdict(finding)} for finding in report.findings]
        notes = len(found) - report.errors
        options.echo_json({**asdict(report), "errors": report.errors, "notes": notes, "findings": found})
    else:
        typer.echo("\n".join(_screen(report, time.monotonic() - began)))
    raise typer.Exit(1 if report.errors else 0)


def _screen(report: "Report", seconds: float) -> list[str]:
    """The report in about one screen: facts, class shares, findings."""
    from crm.data.specs import DATASETS

    frames = sum(facts["frames"] for facts in report.splits.values())
    notes = len(report.findings) - report.errors
    said = f"{_count(report.errors, 'error')}, {_count(notes, 'note')}"
    title = DATASETS[report.dataset].title
    lines = [f"{title} in {report.folder}: {_count(frames, 'frame')}, {said} ({options.duration(seconds)})", ""]
    header = [
        "split",
        "frames",
        "official",
        "day",
        "night",
        "size",
        "mean R G B T",
        "deviation R G B T",
        "thermal against RGB (confidence)",
    ]
    lines += options.table([_row(name, facts) for name, facts in report.splits.items()], header).split("\n")
    lines += ["", *_shares(report), *_listed(report)]
    return lines


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _row(name: str, facts: dict[str, Any]) -> list[str]:
    frames = f"{facts['frames']}" + (f" ({facts['usable']} usable)" if facts["usable"] < facts["frames"] else "")
    cells = [name, frames, facts["official"], facts["day"], facts["night"]]
    row = ["-" if cell is None else str(cell) for cell in cells]
    if not facts["usable"]:
        return [*row, "-", "-", "-", "-"]
    levels = [" ".join(f"{value:.1f}" for value in facts[which]) for which in ("mean", "deviation")]
    return [*row, "{}x{}".format(*facts["size"]), *levels, _where(facts["shift"])]


def _where(shift: dict[str, Any] | None) -> str:
    """As in `3 px below, 0.5 px left (6.5)`, the confidence last."""
    if shift is None:
        return "unclear"
    down, right = shift["down"], shift["right"]
    parts = [f"{abs(down):g} px {'above' if down < 0 else 'below'}"] if down else []
    parts += [f"{abs(right):g} px {'left' if right < 0 else 'right'}"] if right else []
    return f"{', '.join(parts) or 'aligned'} ({shift['confidence']:.1f})"


def _shares(report: "Report") -> list[str]:
    """Per cent of the pixels of each class, as many columns side by side as fit."""
    splits = {name: facts for name, facts in report.splits.items() if facts["usable"]}
    if not splits:
        return []
    classes = list(next(iter(splits.values()))["classes"])
    columns = [[one, *(_percent(facts["classes"][one]) for facts in splits.values())] for one in classes]
    if any(facts["ignored"] for facts in splits.values()):
        columns.append(["ignored", *(_percent(facts["ignored"]) for facts in splits.values())])
    lines, names = [], ["% of pixels", *splits]
    while columns:
        block = [names]
        while columns and sum(2 + max(map(len, column)) for column in [*block, columns[0]]) <= WIDTH:
            block.append(columns.pop(0))
        header, *rows = map(list, zip(*block, strict=True))
        lines += [*options.table(rows, header).split("\n"), ""]
    return lines


def _percent(share: float) -> str:
    return "-" if share == 0 else f"{share:.2g}" if share < 0.1 else f"{share:.1f}"


def _listed(report: "Report") -> list[str]:
    """The findings, as many of each kind as fit on a screen."""
    kinds: dict[str, list[str]] = {}
    for finding in report.findings:
        text = finding.message.replace(f"{report.folder}/", "").removeprefix(f"{report.folder}: ")
        kinds.setdefault(f"{finding.level:5}  {finding.kind}", []).append(text)
    each = next((n for n in range(MOST, 1, -1) if sum(min(n, len(those)) for those in kinds.values()) <= LINES), 1)
    width, lines = max(map(len, kinds), default=0), []
    for kind, those in kinds.items():
        shown = those if len(those) <= each + 1 else those[:each]  # "1 more" takes no less room than the one
        lines += [f"{kind.ljust(width)}  {text}" for text in shown]
        if len(those) > len(shown):
            lines.append(f"{'':{width}}  and {len(those) - len(shown)} more (--json lists all)")
    return lines


# ---------------------------------------------------------------------------------------------- show


def show(
    dataset: Annotated[str, typer.Argument(help="A data set, as in `crm list data`.")],
    split: Annotated[
        str, typer.Option(help="train, val or test. [default: the condition's, else test; train for training]")
    ] = "",
    names: Annotated[str, typer.Option(metavar="A,B", help="These frames. [default: the first of day and night]")] = "",
    rows: Annotated[int, typer.Option(min=1, max=20, help="Rows, each a day and a night frame.")] = 4,
    under: Annotated[
        str, typer.Option(metavar="CONDITION", help="As the network sees them, as in test.rgb=missing_mean.")
    ] = "",
    suite_name: Annotated[
        str, typer.Option("--suite", help="One frame under every corruption of a suite, as in `crm list suites`.")
    ] = "",
    augmented: Annotated[bool, typer.Option("--augmented", help="Crops as training sees them.")] = False,
    masked: Annotated[bool, typer.Option("--masked", help="With what training hides from the network.")] = False,
    experiment: Annotated[
        str, typer.Option(help="Whose augmentation and masks. [default: the data set's first experiment]")
    ] = "",
    recipe: Recipe = "clean",
    sets: Set = None,
    seed: Annotated[int, typer.Option(help="Training seed of augmentation and masks.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The PNG. [default: reports/DATASET.png]")] = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """Writes a contact sheet of RGB, thermal and label: as recorded, under a condition, or as training sees it.

    With --suite, a sheet of one frame under all corruptions of a suite, by severity.
    """
    import io
    from difflib import get_close_matches
    from functools import partial

    from crm.conditions import condition, suite
    from crm.config import override
    from crm.data.dataset import open_split
    from crm.data.show import as_recorded, contact_sheet, picked
    from crm.data.specs import DATASETS
    from crm.data.suite_sheet import SHOWN, suite_sheet
    from crm.machine import home
    from crm.names import chosen
    from crm.records import write_bytes

    spec = chosen("data set", dataset, DATASETS)
    training = augmented or masked
    if suite_name and (under or training):
        raise ValueError("--suite shows one frame under many conditions: leave --under, --augmented and --masked out")
    if under and training:
        raise ValueError("--under shows an evaluation, --augmented and --masked show training: choose one")
    asked = experiment or sets or seed or recipe != "clean"
    if asked and not (under or training):
        raise ValueError("--experiment, --recipe, --set and --seed need --augmented, --masked or --under")
    how = condition(under) if under else None
    if how and split and split != how.split:
        raise ValueError(f"--under {under} is about the split {how.split}, not {split}")
    split = split or (how.split if how else "train" if training else "test")
    conditions = suite(suite_name) if suite_name else []
    config = None
    if training or asked:
        config = override(_config(spec.name, experiment, recipe, sets), {"seed": seed})
    opened = open_split(
        spec.name,
        split,
        data_root=options.data_folder(data),
        size=config.data.size if config else SHOWN if suite_name and spec.layout == "generated" else None,
        carve_val=config.data.carve_val if config else True,
    )
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in opened.names:
            nearest = ", ".join(get_close_matches(name, opened.names, n=3, cutoff=0.0))
            raise ValueError(f"{spec.title} {split} has no frame {name!r}; the names most like it are {nearest}")
    view, subtitle = as_recorded, f"{split} split"
    if how:
        from crm.data import seen

        view, subtitle = partial(seen.under, spec=spec, condition=how), f"what the network sees under {how.name}"
    elif training and config:
        from crm.data import seen

        view = partial(seen.in_training, spec=spec, config=config, augmented=augmented, masked=masked)
        done = " and ".join(word for word, wished in (("augmented", augmented), ("masked", masked)) if wished)
        by = f"{experiment or _first_experiment(spec.name)}{'' if recipe == 'clean' else f', recipe {recipe}'}"
        subtitle = f"{split} split, {done} as in {by}, seed {seed}"
    indices = [opened.names.index(name) for name in wanted] or picked(opened, rows)
    buffer = io.BytesIO()
    if suite_name:
        if len(wanted) > 1:
            raise ValueError(f"--suite shows one frame: give one name, not {len(wanted)}")
        indices = indices[:1]
        sheet = suite_sheet(opened[indices[0]], spec, conditions, f"suite {suite_name}")
    else:
        sheet = contact_sheet(opened, indices=indices, view=view, subtitle=subtitle)
    sheet.save(buffer, format="PNG")
    path = out or home() / "reports" / (f"{dataset}-{suite_name}.png" if suite_name else f"{dataset}.png")
    write_bytes(path, buffer.getvalue())
    shown = {"file": path, "split": split, "frames": [opened.names[i] for i in indices]}
    options.echo_json(shown) if json else typer.echo(str(path))


def _config(dataset: str, experiment: str, recipe: str, sets: list[str] | None) -> "Config":
    """The settings of an experiment on this data set, by default its first one."""
    name = experiment or _first_experiment(dataset)
    config = options.with_changes(options.find_experiment(name, recipe), sets)
    if config.data.dataset != dataset:
        raise ValueError(f"{name} is an experiment on {config.data.dataset}, not on {dataset}")
    return config


def _first_experiment(dataset: str) -> str:
    """The published setting of the data set where there is one, else the first experiment on it."""
    every = options.modules("experiments")
    names = [name for name in every if options.find_experiment(name).data.dataset == dataset]
    if not names:
        raise ValueError(f"no experiment uses {dataset}: say whose augmentation and masks with --experiment")
    published = f"{dataset}_swin_t"
    return published if published in names else names[0]


# ---------------------------------------------------------------------------------------------- synth


def synth(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    layout: Annotated[str, typer.Option(help="mf, pst900 or kp.")],
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the scenes. [default: that of the data set 'synthetic']")
    ] = None,
    size: Annotated[str, typer.Option(metavar="HxW", help="Height and width. [default: the layout's own]")] = "",
    train: Annotated[int | None, typer.Option(help="Frames. [default: 256]")] = None,
    val: Annotated[int | None, typer.Option(help="Frames. [default: 32; none for pst900]")] = None,
    test: Annotated[int | None, typer.Option(help="Frames. [default: 40]")] = None,
    json: Json = False,
) -> None:
    """Writes the synthetic scenes as files, in the layout of a real data set."""
    from crm.data import synthetic
    from crm.data.export import write_synthetic
    from crm.data.files import LAYOUTS
    from crm.data.findings import DECLARATION
    from crm.data.specs import DATASETS
    from crm.names import chosen
    from crm.records import write_json

    spec = chosen("layout", layout, {name: spec for name, spec in DATASETS.items() if spec.layout in LAYOUTS})
    own = DATASETS["synthetic"]
    asked = {"train": train, "val": val, "test": test}
    counts = {
        split: own.splits[split] if count is None else count
        for split, count in asked.items()
        if count is not None or split in spec.splits
    }
    extent, seed = _size(size) or spec.size, own.seed if seed is None else seed
    folder = Path(os.path.abspath(folder))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is no empty folder: name a new one")
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    meter, total = Meter("written"), sum(counts.values())

    def tell(split: str, done: int, count: int) -> None:
        before = sum(counts[other] for other in list(counts)[: list(counts).index(split)])
        meter(before + done, total)

    try:
        write_synthetic(spec.name, scratch, counts=counts, size=extent, seed=seed, tell=tell)
        made = {"layout": layout, "frames": counts, "size": list(extent), "seed": seed, "generator": synthetic.VERSION}
        write_json(scratch / DECLARATION, made)
        os.replace(scratch, folder)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    what = ", ".join(f"{count} {split}" for split, count in counts.items())
    options.echo_json({"folder": folder, **made}) if json else typer.echo(f"{folder}: {what}")


def _size(text: str) -> tuple[int, int] | None:
    """`480x640` as height, width; None for nothing."""
    if not text:
        return None
    height, cross, width = text.lower().partition("x")
    if not (cross and height.isdecimal() and width.isdecimal()):
        raise ValueError(f"--size takes height and width in pixels, as in 480x640, not {text!r}")
    return int(height), int(width)
