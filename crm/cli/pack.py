"""crm pack: a study in one file."""

from pathlib import Path
from typing import Annotated

import typer

from crm.cli import options
from crm.cli.options import Json, Runs
from crm.cli.started import cells_of
from crm.machine import home


def add_to(app: typer.Typer) -> None:
    app.command()(pack)


def pack(
    names: Annotated[
        list[str], typer.Argument(metavar="[SWEEP|TABLE]... FILE.tar.gz", help="Of nothing named: every run there is.")
    ],
    anonymous: Annotated[bool, typer.Option("--anonymous", help="Without names, hosts, places and history.")] = False,
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="With the weights, which are large.")] = False,
    runs: Runs = None,
    json: Json = False,
) -> None:
    """Packs records, ledgers, environment and code of sweeps or tables into one file; the same study, the same bytes.

    `crm report` and the tables work from what it unpacks to, on a laptop without torch. Anonymous, it says nothing of
    who made it and where.
    """
    from crm.capsule import imported
    from crm.capsule import pack as write
    from crm.names import unknown

    *wanted, target = names
    if not target.endswith(".tar.gz"):
        raise ValueError(f"the last argument is the file to write, FILE.tar.gz, not {target!r}")
    folder, reports = options.runs_folder(runs), home() / "reports"
    ids: list[str] = []
    sweeps: list[str] = []
    tables = {path.name.partition(".")[0]: path for path in sorted((reports / "tables").rglob("*.json"))}
    for name in wanted:
        if name.partition("@")[0] in options.modules("sweeps"):
            name, _, cells, _ = cells_of(name, None, "", "", "", False, folder)
            sweeps.append(name)
            ids += [cell.id for cell in cells if (folder / cell.id / "config.json").exists()]
        elif name in tables:
            from crm.capsule import runs_in

            ids += runs_in(tables[name], folder)
        else:
            raise unknown("sweep or table", name, [*options.modules("sweeps"), *tables])
    if not wanted:
        ids = sorted(path.parent.name for path in folder.glob("[!.]*/config.json"))
        sweeps = sorted(path.parent.name for path in folder.glob(".sweeps/*/asked.json"))
    if not ids:
        raise ValueError(f"there is no run of {', '.join(wanted) or 'anything'} in {folder}")
    ids += [id for id in imported(folder, ids) if (folder / id / "config.json").exists()]
    inside = write(Path(target), folder, ids, sweeps, reports, anonymous, checkpoints)
    size = Path(target).stat().st_size
    if json:
        options.echo_json({"file": target, "bytes": size, "runs": sorted(set(ids)), "sweeps": sweeps, "inside": inside})
    else:
        typer.echo(f"{target}: {len(set(ids))} runs, {len(inside)} files, {options.size(size)}")
