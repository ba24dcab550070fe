"""Looking around: what there is, what this machine has, what a data set looks like."""

import os
from typing import Annotated

import typer

from crm.cli import options
from crm.cli.options import Data, Json, Recipe, Runs, Set


def add_to(app: typer.Typer) -> None:
    app.command("list")(list_)
    app.command("show")(show_experiment)
    app.command()(doctor)


def list_(
    what: Annotated[
        str, typer.Argument(help="experiments, sweeps, searches, suites, data, a setting as in model.fusion, or all.")
    ] = "all",
    json: Json = False,
) -> None:
    """What there is: experiments, sweeps, suites of conditions, data sets, and the alternatives of every setting."""
    from crm.conditions import SUITES
    from crm.config import FAMILIES
    from crm.data.specs import DATASETS
    from crm.names import explained, unknown

    sections = {
        "experiments": {name: options.question("experiments", name) for name in options.modules("experiments")},
        "sweeps": {name: options.question("sweeps", name) for name in options.modules("sweeps")},
        "searches": {name: options.question("sweeps", options.SEARCH + name) for name in options.searches()},
        "suites": {name: f"{len(conditions)} conditions" for name, conditions in SUITES.items()},
        "data": {name: f"{len(spec.classes)} classes: {', '.join(spec.classes)}" for name, spec in DATASETS.items()},
        **{path: explained(*where) for path, where in FAMILIES.items() if path != "data.dataset"},
    }
    if what not in (*sections, "all"):
        raise unknown("section", what, [*sections, "all"])
    chosen = sections if what == "all" else {what: sections[what]}
    if json:
        options.echo_json(chosen)
        return
    width = max(len(name) for names in chosen.values() for name in names)
    for title, names in chosen.items():
        typer.echo(f"{title}")
        for name, text in names.items():
            typer.echo(f"  {name.ljust(width)}  {text}".rstrip())


def show_experiment(
    experiment: Annotated[str, typer.Argument(help="An experiment, as in `crm list experiments`.")],
    recipe: Recipe = "clean",
    sets: Set = None,
    json: Json = False,
) -> None:
    """What an experiment is: its settings, what the recipe changes, and what was published for it."""
    from dataclasses import asdict

    from analysis.published import published
    from crm.config import Config, difference, run_id
    from crm.recipes import QUIRKS

    written = options.find_experiment(experiment)
    config = options.with_changes(options.find_experiment(experiment, recipe), sets)
    changed = difference(config, Config())
    known = published().get(experiment)
    quirks = {number: getattr(quirk, recipe) for number, quirk in QUIRKS.items()}
    command = f"crm train {experiment}" + (f" --recipe {recipe}" if recipe != "clean" else "")
    if json:
        options.echo_json(
            {
                "experiment": experiment,
                "recipe": recipe,
                "run": run_id(config),
                "command": command,
                "settings": changed,
                "changed_by_recipe": difference(options.find_experiment(experiment, recipe), written),
                "quirks": quirks,
                "published": asdict(known) if known else None,
            }
        )
        return
    typer.echo(f"{experiment}: {options.question('experiments', experiment)}\n\n  {command}   run {run_id(config)}\n")
    typer.echo("Settings that differ from the defaults:")
    typer.echo("\n".join(f"  {path} = {value}" for path, value in changed.items()) or "  none")
    typer.echo(f"\nRecipe {recipe} (numbers are those of the method notes):")
    typer.echo("\n".join(f"  {number:2}  {text}" for number, text in quirks.items()))
    if known:
        typer.echo(f"\nPublished: {known.miou:.1f} mIoU, {known.selection}\n  {known.source}")
    else:
        typer.echo("\nPublished: nothing was found")


def doctor(runs: Runs = None, data: Data = None, json: Json = False) -> None:
    """What this machine has (devices, Slurm, stores, data sets, disk), what is missing and how to get it."""
    from dataclasses import asdict

    from crm.doctor import diagnose

    checks = diagnose(options.runs_folder(runs), options.data_folder(data), os.environ.get("MLFLOW_TRACKING_URI"))
    lacking = [check for check in checks if check.needed and check.status == "missing"]
    if json:
        options.echo_json([asdict(check) for check in checks])
        raise typer.Exit(1 if lacking else 0)
    width = max(len(check.name) for check in checks)
    for check in checks:
        typer.echo(f"{check.status:7}  {check.name.ljust(width)}  {check.found}")
        if check.remedy:
            typer.echo(f"{'':7}  {'':{width}}  -> {check.remedy}")
    if lacking:
        raise typer.Exit(1)
