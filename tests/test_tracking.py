"""Mirroring as a person has it: kills, failures of the store, single runs, the commands, and reading it all back."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from analysis.from_mlflow import read_from
from analysis.load import read
from crm.cli import app
from crm.conditions import CLEAN_TEST
from crm.config import Config
from crm.confusion import Evaluation, save_evaluation
from crm.records import append, claim, evaluation, open_run, raw_lines, read_json, write_json
from crm.sweep import Cell, Sweep
from crm.tracking.listing import list_run, list_study, list_sweep
from crm.tracking.process import mirror
from crm.tracking.sending import _parts as parts
from crm.tracking.sending import sync
from crm.tracking.store import Store, connect
from crm.tracking.tail import Tail, points
from tests.servers import PATIENCE, Server, free_port, postgres
from tests.tiny import TINY_SETS

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own, of its database library; nothing we could mend

SWEEP = Sweep(
    title="Which patch?",
    base=Config(),
    variants={"large": {}, "small": {"masking.patch": 16}},
    seeds=[0, 1],
    suite="missing",
)


def begin(runs: Path, cell: Cell, steps: range, step: int = 0, token: str = "") -> Path:
    """An attempt of this process that has journaled these steps."""
    folder = open_run(runs, cell.config)
    holder = claim(folder, token or f"{cell.id}{step}")
    assert holder is not None
    append(folder, "attempt", token=holder.token, attempt=1, step=step)
    for done in steps:
        append(folder, "train", step=done, total=2.0 / done, terms={"fused": 1.0 / done}, seconds=0.2 + step)
    return folder


def end(folder: Path, outcome: str = "done", **more) -> None:
    append(folder, "end", token=read_json(folder / "claim.json")["token"], outcome=outcome, **more)
    (folder / "attempts").mkdir(exist_ok=True)
    os.rename(folder / "claim.json", folder / "attempts" / f"{time.time()}.json")


def finished(runs: Path, cell: Cell) -> Path:
    """A run that is trained and evaluated, with numbers of its own."""
    folder = begin(runs, cell, range(10, 51, 10))
    rng = np.random.default_rng(int(cell.id[:6], 16))
    for where in SWEEP.conditions:
        meta = {"condition": where.name, "split": where.split, "classes": ["road", "car"], "dataset": "synthetic"}
        counts = rng.integers(1, 99, (3, 2, 2)).astype(np.int32)
        night = np.array([False, True, False])
        found = Evaluation(counts, np.array(["a", "b", "c"]), night, None, meta)
        save_evaluation(evaluation(folder, SWEEP.selection, where), found)
        append(folder, "evaluate", selection=SWEEP.selection, condition=where.name, miou=found.miou, seconds=1.0)
    result = {"schema": 1, "id": folder.name, "steps": 50, "seconds_per_step": 0.2, "train_seconds": 10.0}
    write_json(folder / "result.json", {**result, "parameters": 12})
    end(folder)
    return folder


def wanted(folder: Path) -> dict[str, list]:
    """The journal's points by an independent reading of it: key -> (step, value, ms), redone steps as first written."""
    found: dict[str, dict] = {}
    for line in raw_lines(folder / "journal.jsonl"):
        for key, value, when, step in points(line):
            found.setdefault(key, {}).setdefault(step, (step, value, when))
    return {key: sorted(each.values()) for key, each in found.items()}


def stored(store: Store, folder: Path) -> dict[str, list]:
    """Every point that the store holds of a run."""
    run = store.find({"crm.kind": "run", "crm.run_id": folder.name})
    return {
        key: sorted((point.step, point.value, point.timestamp) for point in store.client.get_metric_history(
            run.info.run_id, key)) for key in run.data.metrics
    }  # fmt: skip


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def place(request, tmp_path_factory) -> Iterator[tuple[str, Server | None]]:
    """The URI of a store, and its server if it has one."""
    folder = tmp_path_factory.mktemp("store")
    with ExitStack() as stack:
        if request.param == "sqlite":
            yield f"sqlite:///{folder}/mlflow.db", None
            return
        server = Server(folder, stack.enter_context(postgres()))
        stack.callback(server.kill)
        server.start()
        yield server.uri, server


@pytest.fixture
def cells(request) -> list[Cell]:
    """Cells that no other test has: a store is shared."""
    return SWEEP.cells({"steps": 50 + sum(request.node.name.encode()) % 9973})


@pytest.fixture
def name(request) -> str:
    return request.node.name.replace("[", "_").replace("]", "")


def changes(cells: list[Cell]) -> dict:
    return {"steps": cells[0].config.steps}


def test_the_store_alone_gives_the_same_frames(place, tmp_path, cells, name):
    uri, runs = place[0], tmp_path / "runs"
    for cell in cells[:2]:
        finished(runs, cell)
    end(begin(runs, cells[2], range(10, 31, 10)), "stopped", kind="preempted")  # the last one nobody has begun
    list_sweep(runs, name, SWEEP, cells)
    sync(connect(uri, runs), runs, name, final=True)

    ours = read(SWEEP, runs, changes(cells))
    theirs = read_from(SWEEP, uri, tmp_path / "cache", changes(cells))
    pd.testing.assert_frame_equal(theirs.records, ours.records)
    pd.testing.assert_frame_equal(theirs.costs, ours.costs)
    assert set(ours.records["state"]) == {"done", "interrupted", "missing"}
    assert theirs.evidence.keys() == ours.evidence.keys() and len(ours.evidence) == 2 * len(SWEEP.conditions)
    for key, found in ours.evidence.items():
        np.testing.assert_array_equal(theirs.evidence[key].confusion, found.confusion)
        assert theirs.evidence[key].meta == found.meta and list(theirs.evidence[key].names) == list(found.names)
    with pytest.raises(ValueError, match="holds no run of this sweep"):
        read_from(SWEEP, uri, tmp_path / "cache", {"steps": 7})


@pytest.mark.slow
def test_server_and_run_are_killed_and_the_store_holds_exactly_the_points_of_the_journal(tmp_path, cells, name):
    runs, line = tmp_path / "runs", range(10, 2001, 10)
    list_sweep(runs, name, SWEEP, cells[:1])
    with ExitStack() as stack:
        server = Server(tmp_path / "server", stack.enter_context(postgres()))
        stack.callback(server.kill)
        server.start()
        folder = begin(runs, cells[0], line[:50])
        command = [sys.executable, "-m", "crm.tracking.process", name, "--runs", str(runs), "--every", "0.2"]
        shipper = subprocess.Popen([*command, "--uri", server.uri], stdin=subprocess.PIPE)
        stack.callback(shipper.kill)
        deadline = time.monotonic() + 90
        while not (folder / "mirror.json").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        for done in line[50:100]:
            append(folder, "train", step=done, total=2.0 / done, terms={"fused": 1.0 / done}, seconds=0.2)
        time.sleep(0.3)
        server.kill()  # in the middle of it
        for done in line[100:150]:
            append(folder, "train", step=done, total=2.0 / done, terms={"fused": 1.0 / done}, seconds=0.2)
        time.sleep(1.0)
        with (folder / "journal.jsonl").open("a") as file:
            file.write('{"event": "train", "step"')  # the run is killed while it writes, and its mirror with it
        shipper.kill()
        shipper.wait()
        os.rename(folder / "claim.json", folder / "killed.json")
        server.start()
        begin(runs, cells[0], line[120:], step=1200, token="again")  # steps that were journaled already are redone
        end(folder)
        store = connect(server.uri, runs)
        assert sync(store, runs, name, final=True) > 0
        assert stored(store, folder) == wanted(folder)
        assert len(wanted(folder)["train/total"]) == len(line)
        (folder / "mirror.json").unlink()
        sync(store, runs, name, final=True)
        assert stored(store, folder) == wanted(folder)


# ---------------------------------------------------------------------------------------------- stores that fail


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A store that MLflow has made, for copies."""
    folder = tmp_path_factory.mktemp("made")
    connect(f"sqlite:///{folder}/mlflow.db", folder)
    return folder / "mlflow.db"


def trouble(runs: Path, name: str, uri: str) -> str:
    """What a mirror says that works once."""
    assert mirror(runs, name, uri, 0.1, lambda pause: True) == 1
    return (runs / "mirror.log").read_text().splitlines()[-1]


@pytest.fixture
def closing_later() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


OLDER = "bda7b8c39065"  # the schema that MLflow 3.1 leaves


def older_store(file: Path) -> None:
    """A store as an older MLflow has made it, by MLflow's own migrations up to there; it is in use."""
    from alembic import command
    from mlflow.store.db.utils import InitialBase, _get_alembic_config
    from sqlalchemy import create_engine, text
    from sqlalchemy.pool import NullPool

    with create_engine(f"sqlite:///{file}", poolclass=NullPool).begin() as connection:
        InitialBase.metadata.create_all(connection)
        config = _get_alembic_config(f"sqlite:///{file}")
        config.attributes["connection"] = connection
        command.upgrade(config, OLDER)
        connection.execute(text("insert into experiments (name, lifecycle_stage) values ('theirs', 'active')"))


def revision(file: Path) -> str:
    with closing(sqlite3.connect(file)) as database:
        return database.execute("select version_num from alembic_version").fetchone()[0]


def test_a_store_of_an_older_mlflow_is_left_as_it_is_until_a_person_upgrades_it(tmp_path, cells, name):
    runs, file = tmp_path / "runs", tmp_path / "mlflow.db"
    folder = begin(runs, cells[0], range(10, 51, 10))
    list_sweep(runs, name, SWEEP, cells[:1])
    older_store(file)
    uri = f"sqlite:///{file}"
    assert "mlflow db upgrade" in trouble(runs, name, uri)
    assert revision(file) == OLDER  # MLflow itself would have migrated it, whoever else uses it
    subprocess.run([sys.executable, "-m", "mlflow", "db", "upgrade", uri], check=True, capture_output=True)
    store = connect(uri, runs)
    sync(store, runs, name)
    assert stored(store, folder) == wanted(folder)


def test_a_database_that_is_full_is_filled_once_there_is_room(made, tmp_path, cells, name):
    runs, file = tmp_path / "runs", tmp_path / "mlflow.db"
    folder = begin(runs, cells[0], range(10, 5001, 10))
    list_sweep(runs, name, SWEEP, cells[:1])
    shutil.copy(made, file)
    uri = f"sqlite:///{file}"
    code = """
import sys
from sqlalchemy import event
from sqlalchemy.engine import Engine

@event.listens_for(Engine, "connect")
def small(connection, record):  # SQLite's own limit: it answers as it does where the disk is full
    (pages,) = connection.execute("pragma page_count").fetchone()
    connection.execute(f"pragma max_page_count = {pages + 4}")

from crm.tracking.process import main
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", code, name, "--runs", str(runs), "--uri", uri]
    done = subprocess.run(command, input="", timeout=120, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    said = (runs / "mirror.log").read_text().splitlines()[-1]
    assert "the disk is full" in said and "INSERT" not in said
    store = connect(uri, runs)
    sync(store, runs, name, final=True)
    assert stored(store, folder) == wanted(folder)


@pytest.mark.parametrize("how", ["uri", "port", "hang", "rights", "full", "rubbish"])
def test_a_store_that_fails_is_named_with_what_to_do_and_the_run_is_unharmed(
    how, made, tmp_path, cells, name, monkeypatch, closing_later
):
    runs, file = tmp_path / "runs", tmp_path / "mlflow.db"
    folder = begin(runs, cells[0], range(10, 51, 10))
    list_sweep(runs, name, SWEEP, cells[:1])
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    uri, word = f"sqlite:///{file}", ""
    if how == "uri":
        uri, word = "gopher://nowhere", "is no store"
    elif how == "port":
        uri, word = "http://user:secret@127.0.0.1:9", "does not answer"
    elif how == "hang":  # it takes connections, and never answers
        silent = closing_later.enter_context(socket.create_server(("127.0.0.1", 0)))
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        uri, word = f"http://127.0.0.1:{silent.getsockname()[1]}", "does not answer"
    elif how == "rights":
        (tmp_path / "file").touch()
        uri, word = f"sqlite:///{tmp_path}/file/mlflow.db", ""  # a folder that nobody can make, root neither
    elif how == "full":
        shutil.copy(made, file)
        monkeypatch.setenv("CRM_FAULT", "full mirror.json 1")
        word = "the disk is full"
    else:
        file.write_text("no database, whatever its name")
        word = "is no MLflow store"
    said = trouble(runs, name, uri)
    assert word in said and "secret" not in said and "Traceback" not in said
    assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    if how == "full":  # once there is room again, what was sent before is not sent twice
        monkeypatch.delenv("CRM_FAULT")
        store = connect(uri, runs)
        sync(store, runs, name)
        assert stored(store, folder) == wanted(folder)


def test_a_store_that_may_not_be_written_says_so(made, tmp_path, cells, name):
    runs, file = tmp_path / "runs", tmp_path / "closed" / "mlflow.db"
    begin(runs, cells[0], range(10, 51, 10))
    list_sweep(runs, name, SWEEP, cells[:1])
    file.parent.mkdir()
    shutil.copy(made, file)
    (file.parent / "mlflow.db.lock").touch()
    for path, mode in ((file, 0o444), (file.parent / "mlflow.db.lock", 0o666), (file.parent, 0o555)):
        path.chmod(mode)
    for path in (runs, *runs.rglob("*")):
        path.chmod(0o777)
    me = os.geteuid()
    for path in [each for each in (tmp_path, *tmp_path.parents) if not me and not each.stat().st_mode & 1]:
        path.chmod(0o711)
    os.seteuid(me or 65534)  # root may write everything
    try:
        assert "may not be written" in trouble(runs, name, f"sqlite:///{file}")
    finally:
        os.seteuid(me)


def test_what_a_job_inherits_of_mlflow_misdirects_nothing(made, tmp_path, cells, name):
    runs = tmp_path / "runs"
    finished(runs, cells[0])
    list_sweep(runs, name, SWEEP, cells[:1])
    shutil.copy(made, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    foreign = {
        "MLFLOW_TRACKING_URI": uri, "MLFLOW_RUN_ID": "0" * 32, "MLFLOW_EXPERIMENT_NAME": "theirs",
        "MLFLOW_EXPERIMENT_ID": "77", "MLFLOW_ENABLE_ASYNC_LOGGING": "true", "MLFLOW_REGISTRY_URI": "gopher://x",
        "MLFLOW_ACTIVE_MODEL_ID": "m-1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "7",
    }  # fmt: skip
    command = [sys.executable, "-m", "crm.tracking.process", name, "--runs", str(runs)]
    subprocess.run(command, env={**os.environ, **foreign}, input=b"", check=True, timeout=120)
    store = connect(uri, runs)
    assert [each.name for each in store.client.search_experiments()] == ["crm", "Default"]
    run = store.find({"crm.run_id": cells[0].id})
    assert run.info.run_id != "0" * 32 and run.info.status == "FINISHED"


# ---------------------------------------------------------------------------------------------- what is sent


def test_a_run_of_its_own_has_no_parent_until_a_sweep_asks_for_it(made, tmp_path, cells, name):
    runs, uri = tmp_path / "runs", f"sqlite:///{made}"
    folder = finished(runs, cells[0])
    store = connect(uri, runs)
    sync(store, runs, list_run(runs, "mf_swin_t", cells[0].config, folder.name).name)
    run = store.find({"crm.run_id": folder.name})
    assert "mlflow.parentRunId" not in run.data.tags and run.data.tags["mlflow.runName"] == "mf_swin_t/0"
    list_sweep(runs, name, SWEEP, cells[:1])
    sync(store, runs, name, final=True)
    again = store.find({"crm.run_id": folder.name})
    above = store.find({"crm.kind": "sweep", "crm.sweep": name})
    assert (again.info.run_id, again.data.tags["mlflow.parentRunId"]) == (run.info.run_id, above.info.run_id)
    assert above.info.status == "FINISHED"


def test_trials_stand_below_their_study_which_is_over_when_all_of_it_is(made, tmp_path, cells, name):
    runs, title = tmp_path / "runs", f"tune-{name}"
    rows = [{"variant": f"trial {number}", "seed": cell.seed, "id": cell.id} for number, cell in enumerate(cells)]
    finished(runs, cells[0])
    list_study(runs, title, "Which patch?", "last", rows[:1])
    store = connect(f"sqlite:///{made}", runs)
    sync(store, runs, title)
    above = store.find({"crm.kind": "sweep", "crm.sweep": title})
    assert above.info.status == "RUNNING"  # another trial may come
    end(begin(runs, cells[1], range(10, 31, 10)), "stopped", kind="preempted")  # pruned
    list_study(runs, title, "Which patch?", "last", rows[:2])
    sync(store, runs, title, final=True)
    below = store.client.search_runs([store.experiment], f"tags.`mlflow.parentRunId` = '{above.info.run_id}'")
    assert {run.data.tags["mlflow.runName"]: run.info.status for run in below} == {
        f"trial 0/{cells[0].seed}": "FINISHED", f"trial 1/{cells[1].seed}": "KILLED",
    }  # fmt: skip
    assert store.client.get_run(above.info.run_id).info.status == "FINISHED"


def test_tags_name_the_conditions_and_artifacts_are_by_choice(made, tmp_path, cells, name, monkeypatch):
    monkeypatch.setenv("CRM_HOME", str(tmp_path))
    runs, uri = tmp_path / "runs", f"sqlite:///{made}"
    folder = finished(runs, cells[0])
    append(folder, "evaluate", selection="last", condition="test.rgb=missing_mean", miou=12.0, seconds=1.0)
    (folder / "checkpoints").mkdir()
    for each in ("last", "last.previous"):
        (folder / "checkpoints" / f"{each}.safetensors").write_bytes(b"x")
    (tmp_path / "reports" / name).mkdir(parents=True)
    (tmp_path / "reports" / name / "table.md").write_text("| a |")
    list_sweep(runs, name, SWEEP, cells[:1], tmp_path / "reports" / name)
    store = connect(uri, runs)

    def there(run, below: str) -> list[str]:
        return [file.path for file in store.client.list_artifacts(run.info.run_id, below)]

    sync(store, runs, name, final=True)
    run, above = store.find({"crm.run_id": folder.name}), store.find({"crm.sweep": name, "crm.kind": "sweep"})
    assert run.data.tags["crm.condition.test.rgb:missing_mean"] == "test.rgb=missing_mean"
    assert run.data.metrics["last/test.rgb:missing_mean/miou"] == 12.0
    assert there(above, "report") == ["report/table.md"] and there(run, "checkpoints") == []
    crm("track", "sync", name, "--uri", uri, "--artifacts", "record,checkpoints")
    assert there(run, "checkpoints") == ["checkpoints/last.safetensors"]


def crm(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.stdout


def test_status_counts_what_is_behind_and_sync_sends_it(made, tmp_path, cells, name, monkeypatch):
    monkeypatch.setenv("CRM_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    runs, uri = tmp_path / "runs", f"sqlite:///{made}"
    list_sweep(runs, name, SWEEP, cells[:2])
    folder = begin(runs, cells[0], range(10, 51, 10))

    def behind() -> int:
        (line,) = json.loads(crm("track", "status", "--uri", uri, "--json"))["sweeps"]
        assert (line["cells"], line["begun"]) == (2, 1)
        return line["points"]

    assert behind() == 15  # total, fused and seconds of five steps
    assert json.loads(crm("track", "sync", "--uri", uri, "--json"))["sent"] == {name: 15}
    assert behind() == 0
    append(folder, "train", step=60, total=1.0, terms={}, seconds=0.2)
    append(folder, "train", step=20, total=1.0, terms={}, seconds=0.2)  # redone
    assert behind() == 2
    crm("track", "sync", "--uri", "http://127.0.0.1:9", code=1)
    assert behind() == 2


def test_what_a_run_takes_of_its_machine_is_mirrored_too(made, tmp_path, cells, name):
    runs = tmp_path / "runs"
    folder = begin(runs, cells[0], range(10, 21, 10))
    append(folder, "system", step=20, cpus=1.5, memory_gib=0.375)
    list_sweep(runs, name, SWEEP, cells[:1])
    store = connect(f"sqlite:///{made}", runs)
    sync(store, runs, name)
    found = stored(store, folder)
    assert [point[:2] for point in found["system/cpus"]] == [(20, 1.5)]
    assert [point[:2] for point in found["system/memory_gib"]] == [(20, 0.375)] and found == wanted(folder)


def test_a_long_journal_is_never_in_memory_as_a_whole(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with (folder / "journal.jsonl").open("w") as file:
        for step in range(1000):
            terms = {f"term{number}": float(number) for number in range(40)}
            file.write(json.dumps({"event": "train", "time": 1e9 + step, "step": step, "terms": terms}) + "\n")
    tail = Tail(folder)
    sending = parts((point for _, found in tail.news() for point in found), 1000)
    for taken in (1000, 2000, 3000):
        assert len(next(sending)) == 1000
        assert taken / 40 <= tail.story.lines <= taken / 40 + 1  # nothing is read before there is room for it
    assert tail.offset < (folder / "journal.jsonl").stat().st_size / 10


def test_following_a_journal_reads_every_line_once(tmp_path, cells):
    folder = begin(tmp_path, cells[0], range(10, 31, 10))
    tail = Tail(folder)
    assert [number for number, _ in tail.news()] == [0, 1, 2, 3]
    with (folder / "journal.jsonl").open("a") as file:
        file.write('{"event": "train", "st')
    assert list(tail.news()) == []
    append(folder, "train", step=30, total=9.0)
    append(folder, "train", step=40, total=1.0)
    assert [found[0][:2] for _, found in tail.news()] == [("train/total", 1.0)]
    assert tail.fits()
    (folder / "journal.jsonl").rename(folder / "old")
    append(folder, "attempt", token="new")
    assert not tail.fits()


@pytest.mark.slow
def test_a_single_run_is_mirrored_and_training_never_loads_mlflow(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "CRM_"))}
    environment |= {"CRM_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    arguments = ["train", "synthetic_small", *TINY_SETS, "--threads", "1"]
    code = "import sys; from crm.cli import app; app(sys.argv[1:], standalone_mode=False); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout.split() and "mlflow" not in done.stdout.split()
    (folder,) = (path.parent for path in tmp_path.glob("runs/*/result.json"))
    store = connect(f"sqlite:///{tmp_path}/runs/mlflow.db", tmp_path / "runs")
    assert stored(store, folder) == wanted(folder)
    assert store.find({"crm.run_id": folder.name}).info.status == "FINISHED"
    assert evaluation(folder, "last", CLEAN_TEST).exists()


@pytest.mark.slow
def test_the_page_is_really_there(made, tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "crm", "track", "ui", "--uri", f"sqlite:///{made}", "--runs", str(tmp_path)]
    process = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.PIPE, start_new_session=True)
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                    page = answer.read().decode()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.3)
        assert "<title>MLflow</title>" in page
        wanted = Request(
            f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search", b'{"max_results": 9}',
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urlopen(wanted, timeout=30) as answer:
            assert "crm" in {each["name"] for each in json.load(answer)["experiments"]}
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)


def test_the_page_opens_on_the_loopback_address_alone(made, tmp_path):
    command = [sys.executable, "-m", "crm", "track", "ui", "--uri", f"sqlite:///{made}", "--runs", str(tmp_path)]
    spied = tmp_path / "mlflow" / "__main__.py"  # what would be started, told instead of done
    spied.parent.mkdir()
    (spied.parent / "__init__.py").touch()
    spied.write_text("import os, sys; print(*sys.argv[1:], os.environ['MLFLOW_SERVER_ENABLE_JOB_EXECUTION'])")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "server --host 127.0.0.1 --port 5000 --workers 1 false"
