"""Predicting pictures that a person brings."""

import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crm.cli import options
from crm.cli.data import Meter
from crm.cli.evaluate import Select, Target, import_file, is_file, whole_network
from crm.cli.options import Device, Json, Runs
from crm.cli.runs import Threads, checkpoint_file, find_run, run_machine
from crm.machine import home
from crm.sweep import SELECTIONS

if TYPE_CHECKING:
    from crm.predict import Job


def add_to(app: typer.Typer) -> None:
    app.command()(predict)


def predict(
    target: Target,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures of four channels, or of RGB.")],
    thermal: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Thermal picture of an RGB one (repeatable, in the images' order)."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to. [default: predictions/RUN-CHECKPOINT]")] = None,
    selection: Select = "last",
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="What the network sees, as in 480x640. [default: the picture's]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    runs: Runs = None,
    device: Device = "cpu",
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Predicts pictures: a class map (palette PNG, ids as indexes) and an overlay with a legend for each.

    A picture is predicted at its own size, and so is its class map; --size changes only what the network sees. Thermal
    is the fourth channel of a picture, or a file of its own: 8 bits, brighter is warmer.
    """
    from crm.names import chosen
    from crm.predict import load_network, percent, predict_files, read_frame, refuse_size
    from crm.records import read_config

    chosen("selection", selection, dict.fromkeys(SELECTIONS))
    wanted = _size(size)
    folder, selection = _network(options.runs_folder(runs), target, selection)
    out = out or home() / "predictions" / f"{folder.name}-{selection}"
    jobs = _jobs(images, thermal or [], out, force)
    machine = run_machine(folder.parent, None, device, threads)
    machine.take_process()
    began = time.monotonic()
    model, spec = load_network(folder, selection, device)
    sizes = []
    for job in jobs:  # what is wrong is said before the work begins
        refuse_size(job.image, wanted, spec.num_classes, device)
        sizes.append(read_frame(job.image, job.thermal).size)
    done = predict_files(model, spec, jobs, out, wanted, device, (lambda *_: None) if json else Meter("predicted"))
    known = read_config(folder).data.size
    if wanted is None and (other := [each for each in sizes if each != known]):
        typer.echo(f"note: the run is evaluated at {_by(known)}; --size {_by(known)} would predict at that, not at "
                   f"{_by(other[0])}", err=True)  # fmt: skip
    if json:
        found = [{**asdict(each.job), "size": each.size, "shares": each.shares} for each in done]
        options.echo_json({"run": folder.name, "selection": selection, "out": out, "images": found})
        return
    rows = []
    for each in done:
        shares = ", ".join(f"{name} {percent(share)}" for name, share in list(each.shares.items())[:4])
        rows.append([each.job.image.name, _by(each.size), each.job.labels.name, each.job.overlay.name, shares])
    typer.echo(options.table(rows, ["image", "size", "class map", "overlay", "classes"]))
    typer.echo(f"{out}  ({options.duration(time.monotonic() - began)})")


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not match or min(int(match[1]), int(match[2])) < 1:
        raise ValueError(f"--size takes height x width in pixels, as in 480x640, not {text!r}")
    return int(match[1]), int(match[2])


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _network(runs: Path, target: str, selection: str) -> tuple[Path, str]:
    """The run folder and the checkpoint that predict; a file of weights is imported first."""
    if is_file(runs, target):
        return import_file(whole_network(target), runs), "last"
    folder = find_run(runs, target)
    checkpoint_file(folder, selection)
    return folder, selection


def _jobs(images: Sequence[Path], thermal: Sequence[Path], out: Path, force: bool) -> "list[Job]":
    """What is to be predicted; ValueError if a file would overwrite another, an input, or what is there."""
    from crm.predict import Job

    if thermal and len(thermal) != len(images):
        raise ValueError(f"{len(images)} images and {len(thermal)} --thermal files: give one for each, or none")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is no folder; --out names the folder to write to")
    jobs: dict[str, Job] = {}
    inputs = {path.resolve() for path in (*images, *thermal)}
    for image, heat in zip(images, thermal or [None] * len(images), strict=True):
        if (other := jobs.get(image.stem)) is not None:
            raise ValueError(f"{other.image} and {image} would both become {other.labels.name}; predict one at a time")
        job = Job(
            image=image,
            thermal=heat,
            labels=out / f"{image.stem}_labels.png",
            overlay=out / f"{image.stem}_overlay.png",
        )
        for path in (job.labels, job.overlay):
            if path.resolve() in inputs:
                raise ValueError(f"{path} would be overwritten, but it is an input; give another --out")
            if path.exists() and not force:
                raise ValueError(f"{path} is there already; --force overwrites, --out writes elsewhere")
        jobs[image.stem] = job
    return list(jobs.values())
