"""crm tune: searches, and what they found."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from crm.cli import options
from crm.cli.options import Base, Data, Device, FromScratch, Json, OfBase, On, Runs, Set, Slurm, Tiny, Yes
from crm.machine import Machine, home
from crm.names import chosen, unknown

if TYPE_CHECKING:
    from crm.cluster.settings import Resources
    from crm.search import Search
    from crm.tuning.coordinator import Summary
    from crm.tuning.folder import Asked

CLUSTERS = ("local", "slurm")


class _Verbs(TyperGroup):
    """`crm tune distillation` is `crm tune start distillation`: whatever is no verb is a search."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = ["start", *args]
        return super().parse_args(ctx, args)


def add_to(app: typer.Typer) -> None:
    verbs = typer.Typer(cls=_Verbs, no_args_is_help=True, rich_markup_mode=None)
    for command in (start, status, cancel, best, importance, pareto, plot, promote, export):
        verbs.command()(command)
    verbs.command(hidden=True)(coordinate)
    app.add_typer(verbs, name="tune", help="Search for the best settings: crm tune NAME; then what it found, by verb.")


Study = Annotated[str, typer.Argument(metavar="STUDY", help="A study that was begun, as `crm tune` names it.")]


def find_search(name: str, base: str = "", recipe: str = "", small: bool = False) -> "tuple[str, Search]":
    """A search in one of its forms, and the name of that form: as sweeps have them (`crm.cli.options.find_sweep`)."""
    from crm.recipes import RECIPES

    plain, at, form = name.partition("@")
    if at:
        if base or recipe or small:
            raise ValueError(f"{name} says already which form of {plain} is meant")
        base, recipe, small = options.form_of(form)
    if plain not in options.searches():
        raise unknown("search", plain, options.searches())
    found: Search = import_module(f"sweeps.{options.SEARCH}{plain}").search
    if small:
        if base or recipe:
            raise ValueError("--tiny has a base of its own: leave out --base and --recipe")
        found = replace(found, base=options.find_experiment("synthetic_tiny"), trials=min(found.trials, 8))
    elif base or recipe:
        config = options.find_experiment(base) if base else found.base
        found = replace(found, base=chosen("recipe", recipe or "clean", RECIPES)(config))
    form = "tiny" if small else "-".join(part for part in (base, recipe if recipe != "clean" else "") if part)
    return f"{plain}@{form}" if form else plain, found


def search_of(asked: "Asked") -> "Search":
    """The search of a study, as it was asked."""
    from crm.config import override

    _, found = find_search(asked.search)
    if not found.calculated:
        found = replace(
            found, base=override(found.base, asked.changes or {}), objective=tuple(asked.objectives),
            replicates=asked.replicates,
        )  # fmt: skip
    return found


# ---------------------------------------------------------------------------------------------- searching


def start(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A search, as in `crm list searches`.")],
    trials: Annotated[int, typer.Option(min=0, help="Trials in all, those before included. [default: its own]")] = 0,
    budget: Annotated[float, typer.Option(min=0, help="Hours of device time in all; 0 is no limit.")] = 0.0,
    workers: Annotated[int, typer.Option("--workers", "-j", min=0, help="Trials at once. [default: one per core]")] = 0,
    sampler: Annotated[str, typer.Option(help="tpe, gp, nsga2, random, grid, or one of Optuna's.")] = "",
    pruner: Annotated[str, typer.Option(help="none, median, hyperband, wilcoxon, or one of Optuna's.")] = "",
    objective: Annotated[str, typer.Option(help="clean, missing, worst, or several: clean,worst.")] = "",
    replicates: Annotated[int, typer.Option(min=0, help="Seeds of every trial. [default: its own, mostly 1]")] = 0,
    storage: Annotated[str, typer.Option(help="sqlite, journal, or postgresql+psycopg2://HOST/DATABASE.")] = "",
    study: Annotated[str, typer.Option(help="Name of the study. [default: that of the search]")] = "",
    seed: Annotated[int, typer.Option(min=0, help="Of what the sampler draws.")] = 0,
    sets: Set = None,
    from_scratch: FromScratch = False,
    base: Base = "",
    recipe: OfBase = "",
    tiny: Tiny = False,
    runs: Runs = None,
    data: Data = None,
    cluster: Annotated[str, typer.Option(help="local (workers here) or slurm.")] = "local",
    resources: Slurm = None,
    gpus: Annotated[str, typer.Option(metavar="0,1", help="GPUs that the trials are dealt out to.")] = "",
    per_gpu: Annotated[int, typer.Option("--per-gpu", min=1, help="Trials at once on every GPU.")] = 1,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of one run. [default: its share]")] = 0,
    how: On = None,
    device: Device = "cpu",
    track: Annotated[bool, typer.Option(help="Mirror the runs into MLflow.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the plan.")] = False,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Searches for the best settings, from where the study stands; the same command goes on after anything."""
    from crm.cli.local import Places, places
    from crm.config import override
    from crm.tuning import storage as stores
    from crm.tuning.folder import Asked, ask, folder_of, signature
    from crm.tuning.methods import grid, pruner_note, refuse_pruner
    from crm.tuning.methods import sampler as draw

    form, found = find_search(name, base, recipe, tiny)
    chosen("cluster", cluster, dict.fromkeys(CLUSTERS))
    changes = options.changes(options.scratch(sets, from_scratch))
    if "seed" in changes:
        raise ValueError("a search has seeds of its own; --replicates says how many")
    if not found.calculated:
        found = replace(
            found, base=override(found.base, changes), replicates=replicates or found.replicates,
            objective=tuple(part.strip() for part in objective.split(",")) if objective else found.objective,
        )  # fmt: skip
    method, prune = sampler or found.sampler, pruner or found.pruner
    refuse_pruner(found, prune)
    draw(method, 0)
    total = trials or (len(grid(found)) if method == "grid" else found.trials)
    home_of_runs = options.runs_folder(runs)
    folder = folder_of(home_of_runs, study or form)
    asked = Asked(
        search=form, storage=stores.location(folder.path, storage or _begun(home_of_runs, folder.name), cluster),
        trials=total, hours=budget, sampler=method, pruner=prune, objectives=found.objectives,
        replicates=found.replicates, changes=changes, seed=seed, signature=signature(found),
    )  # fmt: skip
    machine = Machine(runs=home_of_runs, data=options.data_folder(data), weights=home() / "weights", device=device)
    if cluster == "slurm":
        wanted = _resources(resources, workers, found.calculated)
        where = Places(workers=min(wanted.throttle, total))
    else:
        wanted, where = None, places(workers, device, gpus, per_gpu, total)
    machine = options.with_machine(replace(machine, threads=threads or options.share_of_threads(where.workers)), how)
    if not found.calculated:
        _check(found, machine)
    say = (lambda text: None) if json else typer.echo
    say(_plan(folder.name, found, asked, where.workers, machine))
    if note := pruner_note(found, prune):
        say(note)
    if dry_run:
        options.echo_json(
            {"study": folder.name, **asdict(asked), "storage": stores.shown(asked.storage)}
        ) if json else None
        return
    if not yes:
        _confirm(total)
    if wanted is not None:
        job = _submit(folder.name, found, asked, machine, wanted)
        _list(folder.name, found, machine.runs) if track and not found.calculated else None
        say(f"submitted the coordinator as job {job}" if job else THERE)
        say(f"crm tune status {folder.name} shows how far it is")
        options.echo_json({"study": folder.name, "job": job}) if json else None
        return
    ask(folder, asked)
    with _mirrored(folder.name, found, machine.runs, track, json):
        summary = _carry_out(folder.name, found, asked, machine, where.workers, where.gpus, json)
    _tell(folder.name, asked, summary, json)


def _begun(runs: Path, name: str) -> str:
    """Where a study that was begun is kept, so that nobody has to say it again."""
    from crm.records import read_json
    from crm.tuning.folder import folder_of

    return (read_json(folder_of(runs, name).path / "study.json") or {}).get("storage", "")


def _check(found: "Search", machine: Machine) -> None:
    """Refuses before anything starts if data or weights are missing."""
    from crm.data.dataset import open_run_split
    from crm.machine import initial_file

    initial_file(found.base.model.init, None, machine.runs)
    for split in ("train", "val"):
        open_run_split(found.base.data, split, machine.data)


def _plan(name: str, found: "Search", asked: "Asked", workers: int, machine: Machine) -> str:
    from crm.history import History
    from crm.tuning.storage import shown

    lines = [f"study {name}: {found.title or 'a search'}", f"  seeks     {', '.join(found.labels)}"]
    lines += [f"  searches  {key}: {parameter}" for key, parameter in found.space.items()]
    prune = "" if asked.pruner == "none" else f", pruner {asked.pruner}"
    limit = f", at most {asked.hours:g} h of device time" if asked.hours else ""
    lines += [f"  {asked.trials} trials in all{limit}, {workers} at once, sampler {asked.sampler}{prune}"]
    if not found.calculated:
        cost = History(machine.runs, machine.device).cost(found.base)
        seconds = None if cost is None else cost.step * found.base.steps * found.replicates * asked.trials / workers
        lines += [f"  seeds     {', '.join(map(str, found.seeds))}; on val alone; about {options.duration(seconds)}"]
    return "\n".join([*lines, f"  kept in   {shown(asked.storage)}"])


def _confirm(count: int) -> None:
    if not sys.stdin.isatty():
        raise ValueError("there is no terminal to ask on; add --yes to search, or --dry-run to only see the plan")
    if not typer.confirm(f"Search with {count} trials?", default=False):
        typer.echo("nothing was started")
        raise typer.Exit(4)


def _carry_out(
    name: str, found: "Search", asked: "Asked", machine: Machine, workers: int, gpus: Sequence[str], json: bool
) -> "Summary":
    from crm.cli.progress import Board
    from crm.cluster.folder import Busy
    from crm.tuning.coordinator import Coordinator
    from crm.tuning.folder import folder_of
    from crm.tuning.work import Calculations, LocalRuns, queue_of

    folder = folder_of(machine.runs, name)
    if found.calculated:
        work: Any = Calculations(found, folder)
    else:
        work = LocalRuns(found, name, queue_of(found, machine, workers, gpus), _over_images(asked.pruner))
    try:
        with Board(quiet=json) as board:
            return Coordinator(folder, asked, found, work, workers, board.say, board.show).run()
    except KeyboardInterrupt:
        options.interrupted()
    except Busy:
        typer.echo(THERE, err=json)
        raise typer.Exit(0) from None


@contextmanager
def _mirrored(name: str, found: "Search", runs: Path, track: bool, json: bool) -> Iterator[None]:
    """The runs of the trials are copied into MLflow meanwhile, as those of a sweep are."""
    from crm.cli.local import untracked
    from crm.tracking.process import start as start_mirror

    if not track or found.calculated:
        yield
        return
    mirror = start_mirror(runs, _list(name, found, runs))
    try:
        yield
    finally:
        if trouble := mirror.finish():
            typer.echo(untracked(trouble), err=json)


def _list(name: str, found: "Search", runs: Path) -> str:
    """Has the study's runs mirrored from now on; the name that the mirror knows it by."""
    from crm.tracking.listing import list_study, listed
    from crm.tuning.folder import BESIDE

    title = f"{BESIDE}{name}"
    if title not in listed(runs):
        list_study(runs, title, found.title, found.selection, [], home() / "reports" / title)
    return title


def list_runs(name: str, runs: Path) -> None:
    """Lists the runs of a study that was begun without a mirror."""
    from crm.tuning.coordinator import list_trials, open_study
    from crm.tuning.folder import BESIDE
    from crm.tuning.folder import asked as asked_of

    asked = asked_of(runs, name)
    found = search_of(asked)
    title = f"{BESIDE}{name}"
    list_trials(runs, title, found, open_study(name, asked, found), home() / "reports" / title)


def _over_images(pruner: str) -> bool:
    return pruner in ("wilcoxon", "WilcoxonPruner")


def _tell(name: str, asked: "Asked", summary: "Summary", json: bool) -> None:
    """What the study has come to, and the exit code."""
    if json:
        options.echo_json({"study": name, **asdict(summary)})
    else:
        typer.echo(_summary_text(name, asked, summary))
        typer.echo(f"crm tune best {name} says what it found; crm tune plot {name} shows it")
    if summary.stopped and not summary.stopped.startswith("the budget"):
        raise typer.Exit(1)


def _summary_text(name: str, asked: "Asked", found: "Summary") -> str:
    parts = [f"{found.complete} complete"]
    parts += [f"{count} {word}" for word, count in
              (("pruned", found.pruned), ("failed", found.failed), ("reused", found.reused)) if count]  # fmt: skip
    parts += [f"{found.retried} asked again after a worker died"] if found.retried else []
    text = f"{name}: {found.trials} of {asked.trials} trials ({', '.join(parts)}), {found.hours:.2f} h of training"
    return f"{text}\n{found.stopped}" if found.stopped else text


# ---------------------------------------------------------------------------------------------- on a cluster


THERE = "a coordinator is at it already, and goes by this from now on"
AT_ONCE = 4  # trials on a cluster, unless another number is asked for: what runs teaches the sampler nothing yet


def _resources(given: list[str] | None, workers: int, calculated: bool) -> "Resources":
    """What a trial asks the cluster for; its throttle is how many trials run at once."""
    from crm.cluster.settings import resources

    wanted = resources(home(), given or [])
    return replace(wanted, throttle=workers or wanted.throttle or (1 if calculated else AT_ONCE))


def _submit(name: str, found: "Search", asked: "Asked", machine: Machine, wanted: "Resources") -> str:
    """The job of the coordinator; "" if there is one."""
    from crm.cluster import snapshot
    from crm.tuning.folder import ask, folder_of
    from crm.tuning.slurm import begin

    machine = replace(machine, device=wanted.device, threads=wanted.cpus)
    ask(folder_of(machine.runs, name), asked)
    return begin(machine.runs, name, found, machine, wanted, str(snapshot.take(machine.runs)))


def cancel(name: Study, runs: Runs = None, yes: Yes = False, json: Json = False) -> None:
    """Cancels the jobs of a study on a cluster; trials write a checkpoint, and the same search goes on from there."""
    from crm.tuning.folder import asked as asked_of
    from crm.tuning.slurm import cancel as cancel_jobs
    from crm.tuning.slurm import jobs_of

    folder = options.runs_folder(runs)
    search = asked_of(folder, name).search
    if jobs_of(folder, name).asked() is None:
        raise ValueError(f"{name} runs on this machine: Ctrl-C, where crm tune {search} was typed, ends it")
    found = cancel_jobs(folder, name, yes)
    if json:
        options.echo_json({"cancel": found, "done": yes})
    else:
        typer.echo(f"{'cancelled' if yes else 'would cancel'} {len(found)} jobs: {', '.join(found) or 'none'}")
    if not found:
        raise typer.Exit(3)


def coordinate(
    name: Study,
    token: Annotated[str, typer.Option(help="Submission of the job.")],
    runs: Runs = None,
) -> None:
    """What the coordinator's job does."""
    import time

    from crm.cluster import slurm
    from crm.cluster.folder import Busy
    from crm.tracking.listing import listed
    from crm.tracking.process import start as start_mirror
    from crm.tuning.coordinator import Coordinator
    from crm.tuning.folder import asked as asked_of
    from crm.tuning.folder import folder_of
    from crm.tuning.slurm import PATIENCE, SlurmRuns, jobs_of, succeed
    from crm.tuning.work import Calculations
    from crm.worker import StopFlag

    left = slurm.time_left()
    stop = StopFlag(None if left is None else time.time() + left - 60)
    stop.listen()
    home_of_runs = options.runs_folder(runs)
    asked, folder = asked_of(home_of_runs, name), jobs_of(home_of_runs, name)
    wanted = folder.asked()
    assert wanted is not None
    found, next_one = search_of(asked), succeed(folder, token)
    study = folder_of(home_of_runs, name)
    work: Any = (
        Calculations(found, study)
        if found.calculated
        else SlurmRuns(found, name, wanted.read_machine(), _over_images(asked.pruner))
    )
    try:
        summary = Coordinator(study, asked, found, work, wanted.resources["throttle"]).run(stop, PATIENCE)
    except Busy as error:
        typer.echo(str(error))
        raise typer.Exit(1) from error
    typer.echo(_summary_text(name, asked, summary))
    if stop():
        return
    if next_one:
        slurm.cancel([next_one])
    if os.environ.get("MLFLOW_TRACKING_URI") and folder.name in listed(home_of_runs):  # jobs sent their own runs alone
        typer.echo(start_mirror(home_of_runs, folder.name).finish() or "tracking: all is sent")


# ---------------------------------------------------------------------------------------------- what it found


def tuned(name: str, runs: Path | None) -> Any:  # of analysis.tuning, which the command alone may load
    from analysis.tuning import read
    from crm.tuning.folder import asked as asked_of

    folder = options.runs_folder(runs)
    asked = asked_of(folder, name)
    return read(name, asked, search_of(asked), folder)


def status(name: Study, runs: Runs = None, json: Json = False) -> None:
    """How far a study is, and what its trials are at."""
    from crm.records import alive, read_json
    from crm.tuning.folder import folder_of

    found = tuned(name, runs)
    holder = read_json(folder_of(found.runs, name).path / "lease.json")
    at_it = holder is not None and alive(holder)
    running = found.running()
    if json:
        options.echo_json({"study": name, **asdict(found.summary), "asked": found.asked.trials, "at_it": at_it,
                           "running": running})  # fmt: skip
        return
    typer.echo(_summary_text(name, found.asked, found.summary))
    for line in running:
        typer.echo(f"  trial {line['trial']}: {line['state']} {line['step']}/{line['steps']}")
    for number, reason in found.summary.reasons.items():
        typer.echo(f"  trial {number} failed: {reason}")
    if found.summary.trials < found.asked.trials:
        typer.echo("its coordinator is at it" if at_it else f"nobody is at it: crm tune {found.asked.search} goes on")


def best(name: Study, runs: Runs = None, json: Json = False) -> None:
    """The best trial of each objective, against the base, with the interval that allows for having been chosen."""
    found = tuned(name, runs)
    said = found.verdicts()
    if json:
        options.echo_json(said)
        return
    for one in said:
        settings = ", ".join(f"{key} {_plain(value)}" for key, value in one["settings"].items())
        typer.echo(f"{one['objective']}: trial {one['trial']}, {one['value']:.4g}  ({settings})")
        typer.echo("\n".join(f"  {line}" for line in one["words"]))


def _plain(value: Any) -> str:
    return (
        "off"
        if value == 0 and not isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def importance(name: Study, runs: Runs = None, json: Json = False) -> None:
    """How much of the objective's variation each parameter explains (fANOVA), with 95 % intervals."""
    found = tuned(name, runs)
    frames = {label: found.importance(i) for i, label in enumerate(found.search.objectives)}
    if json:
        options.echo_json({label: frame.to_dict("records") for label, frame in frames.items()})
        return
    for label, frame in frames.items():
        rows = [
            [row["parameter"], f"{row['importance']:.2f}", f"[{row['low']:.2f}, {row['high']:.2f}]"]
            for row in frame.to_dict("records")
        ]
        typer.echo(options.table(rows, [label, "share", "95 % interval over trials"]))


def pareto(name: Study, runs: Runs = None, json: Json = False) -> None:
    """The trials that no other one beats in every objective."""
    found = tuned(name, runs)
    frame = found.front()
    if json:
        options.echo_json(frame.to_dict("records"))
        return
    columns = ["trial", *found.search.objectives, *found.search.space]
    rows = [[_cell(row[column]) for column in columns] for _, row in frame.iterrows()]
    typer.echo(options.table(rows, columns))


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot(name: Study, runs: Runs = None, json: Json = False) -> None:
    """Writes the figures (PNG and SVG), the trials and the page of a study into reports/tune-STUDY/."""
    from analysis.tuning_report import report

    page = report(tuned(name, runs), home() / "reports")
    options.echo_json({"report": page}) if json else typer.echo(f"report: {page}")


def export(
    name: Study,
    to: Annotated[Path | None, typer.Option(help="File, .csv or .json. [default: print CSV]")] = None,
    runs: Runs = None,
    json: Json = False,
) -> None:
    """Every trial with its values, settings, runs and state."""
    frame = tuned(name, runs).trials
    if json or (to is not None and to.suffix == ".json"):
        text = str(frame.to_json(orient="records", indent=1, double_precision=15))
    else:
        text = str(frame.to_csv(index=False))
    if to is None:
        typer.echo(text.rstrip())
    else:
        to.write_text(text)
        typer.echo(f"{len(frame)} trials: {to}")


def promote(
    name: Study,
    trial: Annotated[list[int] | None, typer.Option(help="This one instead of the best (repeatable).")] = None,
    seeds: Annotated[str, typer.Option(metavar="0,1,2", help="Seeds of the sweep.")] = "0,1,2",
    to: Annotated[str, typer.Option("--as", help="Name of the sweep. [default: NAME_promoted]")] = "",
    runs: Runs = None,
    json: Json = False,
) -> None:
    """Writes a sweep of the base and the best trial with fresh seeds, evaluated on test: the evidence a table takes."""
    from crm.tuning.promotion import written

    found = tuned(name, runs)
    numbers = trial or ([int(n) for n in found.front()["trial"]] if len(found.search.objectives) > 1 else
                        [found.best(0)])  # fmt: skip
    title = (to or f"{name.replace('@', '_').replace('-', '_')}_promoted").removesuffix(".py")
    import sweeps

    experiments = {each: options.find_experiment(each) for each in options.modules("experiments")}
    text = written(name, found.search, {n: found.settings(n) for n in numbers}, seeds, experiments)
    if not title.isidentifier() or title.startswith(options.SEARCH):
        raise ValueError(f"--as takes the name of a module, as in tuned_weights, not {title!r}")
    path = Path(os.fspath(sweeps.__path__[0])) / f"{title}.py"
    if path.exists() and path.read_text() != text:
        raise ValueError(f"{path} is there already and says something else; --as gives another name")
    path.write_text(text)
    if json:
        options.echo_json({"sweep": title, "file": path, "trials": numbers})
    else:
        typer.echo(f"{path}\n  crm sweep {title}")
