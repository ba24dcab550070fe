"""Weights from elsewhere, and ours for elsewhere."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crm.cli import options
from crm.cli.options import Json, Runs, Set

if TYPE_CHECKING:
    from crm.weights.imports import Report


def add_to(app: typer.Typer) -> None:
    weights = typer.Typer(help="Weights from elsewhere, and ours for elsewhere.", no_args_is_help=True,
                          rich_markup_mode=None)  # fmt: skip
    weights.command("import")(import_)
    weights.command()(export)
    app.add_typer(weights, name="weights")


def import_(
    file: Annotated[Path, typer.Argument(help="A released checkpoint, an ImageNet Swin, or a Mask2Former folder.")],
    experiment: Annotated[
        str | None, typer.Option(help="Take everything but the weights from this experiment. [default: inferred]")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="What a whole network predicts. [default: by classes]")] = None,
    name: Annotated[
        str | None, typer.Option(help="What model.init will call it. [default: a backbone's file, a network's run]")
    ] = None,
    sets: Set = None,
    runs: Runs = None,
    json: Json = False,
) -> None:
    """Takes weights in; nothing of the file is run. A whole network becomes a run that `crm evaluate` takes.

    Training starts from it by the run's name, or by --name. The Swin of an ImageNet file goes into the weights folder,
    for both branches.
    """
    from dataclasses import asdict

    from crm.machine import home
    from crm.weights.files import KINDS, read_source
    from crm.weights.imports import import_backbone, import_network, keep_network

    base = options.find_experiment(experiment) if experiment else None
    source = read_source(file)
    if KINDS[source.kind].whole:
        made = import_network(source, options.runs_folder(runs), base, dataset, options.changes(sets))
        if name:
            keep_network(made.path, home() / "weights", name)
    elif dataset or sets:
        raise ValueError(f"{file} is a backbone alone, so --dataset and --set mean nothing for it")
    else:
        made = import_backbone(source, home() / "weights", base.model if base else None, name)
    if json:
        options.echo_json({"path": made.path, "run": made.path.name if made.whole else None, **asdict(made.report)})
        return
    typer.echo(report_text(made.report))
    start = f"--set model.init={name or made.path.stem}"
    typer.echo(f"{made.path}\nnext: {f'crm evaluate {made.path.name}, or train with ' if made.whole else ''}{start}")


def export(
    run: Annotated[str, typer.Argument(help="A run id, or enough of its first digits.")],
    file: Annotated[Path, typer.Argument(help="The checkpoint to write.")],
    selection: Annotated[str, typer.Option("--select", help="Which checkpoint of the run.")] = "last",
    runs: Runs = None,
    json: Json = False,
) -> None:
    """Writes a run's weights in the format of the released code, which loads them as its own."""
    from crm.checkpoint import load_checkpoint
    from crm.cli.runs import checkpoint_file, find_run
    from crm.model.segmenter import build_segmenter
    from crm.records import file_hash, read_config, write_bytes
    from crm.weights.released import refuse_unreleased, released_file
    from crm.weights.sizes import infer

    if file.exists():
        raise ValueError(f"{file} is there already")
    folder = find_run(options.runs_folder(runs), run)
    config = read_config(folder)
    refuse_unreleased(config.model)
    checkpoint = load_checkpoint(checkpoint_file(folder, selection))
    _, num_classes = infer(checkpoint.weights)
    model = build_segmenter(config.model, num_classes)
    model.load_state_dict(checkpoint.weights)
    write_bytes(file, released_file(model, config.loss.no_object, checkpoint.meta["step"]))
    if json:
        options.echo_json({"file": file, "sha256": file_hash(file), "run": folder.name, "selection": selection})
        return
    typer.echo(f"{file}: {selection} of run {folder.name}, {len(model.state_dict())} tensors, fusion "
               f"{config.model.fusion}")  # fmt: skip


def report_text(report: "Report") -> str:
    """What was loaded, what was left and what did not fit, by groups of tensors."""
    lines = [f"{report.title}: {report.source}, {report.model}", f"  loaded    {len(report.loaded)} tensors"]
    for title, names in (("initial", report.initial), ("unused", report.unused)):
        if names:
            lines.append(f"  {title:8}  {len(names)} tensors: {_groups(names)}")
    lines += [f"  no fit    {text}" for text in report.misfits]
    return "\n".join(lines)


def _groups(names: tuple[str, ...]) -> str:
    """Names with their numbers as *, each once, the first few of them."""
    groups = list(dict.fromkeys(re.sub(r"\.(weight|bias)$", "", re.sub(r"\d+", "*", name)) for name in names))
    return ", ".join(groups[:6]) + (f" and {len(groups) - 6} more" if len(groups) > 6 else "")
