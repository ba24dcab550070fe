"""Sweeps on a cluster, as far as no scheduler is needed: settings, snapshot, the sweep's folder, and the refusals."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from crm.cluster import snapshot
from crm.cluster.folder import Asked, Busy, Submission, SweepFolder
from crm.cluster.settings import FILE, TEMPLATE, Resources, resources
from crm.cluster.submit import _parameters, new, scheduler_environment
from crm.provenance import SNAPSHOT
from crm.records import Superseded, claim, claims, open_run, raw_lines, read_json, write_bytes
from crm.worker import StopFlag
from tests.tiny import TINY, machine

ROOT = Path(__file__).resolve().parents[1]
CRM = [sys.executable, "-c", "from crm.cli import main; main()"]


def crm(*arguments: str, home: Path, path: str | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CRM_HOME": str(home), **({"PATH": path} if path is not None else {})}
    return subprocess.run([*CRM, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)


# ---------------------------------------------------------------------------------------------- settings


def test_the_template_states_every_setting_with_its_default(tmp_path):
    # Uncommented, the file must say what the defaults say: it documents them.
    lines = [line[2:] for line in TEMPLATE.splitlines() if line.startswith("# ") and not line.startswith("# What")]
    rest = ("]", '"module load cuda",')  # of the list that stands on lines of its own
    body = [line for line in lines if ("=" in line and not line.startswith("`")) or line.strip() in rest]
    (tmp_path / FILE).write_text("\n".join(body))
    found = resources(tmp_path)
    shown = {line.partition("=")[0].strip() for line in body if "=" in line}
    assert shown == set(Resources.__dataclass_fields__)
    for name in shown - {"partition", "gres", "setup"}:
        assert getattr(found, name) == getattr(Resources(), name), name
    assert found.setup == ("module load cuda",)


def test_the_file_is_changed_by_the_command_line(tmp_path):
    (tmp_path / FILE).write_text('partition = "gpu"\ncpus = 8\nmemory_gb = 32\n')
    found = resources(tmp_path, ["cpus=2", "memory_gb=1.5", "setup=module load x"])
    assert (found.partition, found.cpus, found.memory_gb, found.setup) == ("gpu", 2, 1.5, ("module load x",))


@pytest.mark.parametrize(
    ("text", "given", "said"),
    [
        ("partion = 'gpu'", [], r"no key in .*cluster.toml 'partion'. Did you mean 'partition'\?"),
        ("cpus = 'many'", [], "cpus takes a whole number, not 'many'"),
        ("cpus = true", [], "cpus takes a whole number"),
        ("cpus = [", [], "is no TOML"),
        ("setup = 3", [], "setup takes a list of texts"),
        ("", ["gpus=1"], r"no --slurm setting 'gpus'. Did you mean 'cpus'\?"),
        ("", ["cpus"], "takes NAME=VALUE"),
        ("", ["minutes=1"], "reserve_seconds 90 leaves nothing of minutes 1"),
        ("", ["device=tpu"], "cpu or cuda"),
        ("", ["nodes=0"], "nodes must be at least 1"),
    ],
)
def test_what_is_wrong_in_the_settings_is_named(tmp_path, text, given, said):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ValueError, match=said):
        resources(tmp_path, given)


def test_init_writes_the_file_once_and_never_over_one_that_is_there(tmp_path):
    assert crm("init", "cluster", home=tmp_path).returncode == 0
    assert (tmp_path / FILE).read_text() == TEMPLATE
    assert resources(tmp_path) == Resources()
    again = crm("init", "cluster", home=tmp_path)
    assert again.returncode == 2
    assert "is there already" in again.stderr
    assert "Did you mean 'cluster'" in crm("init", "clutser", home=tmp_path).stderr


# ---------------------------------------------------------------------------------------------- snapshot


@pytest.fixture
def project(tmp_path) -> Path:
    """A repository with a tracked, an edited, a new and an ignored file."""
    root = tmp_path / "project"
    (root / "crm").mkdir(parents=True)
    (root / "crm" / "one.py").write_text("1\n")
    (root / "crm" / "two.py").write_text("2\n")
    (root / ".gitignore").write_text("/secret\n")
    git = ["git", "-C", str(root), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "begun"]):
        subprocess.run([*git, *command], check=True)
    (root / "crm" / "two.py").write_text("two\n")
    (root / "crm" / "new.py").write_text("new\n")
    (root / "secret").write_text("no")
    (root / "runs").mkdir()
    (root / "runs" / "big").write_text("no")
    return root


def test_a_snapshot_is_what_git_tracks_or_would_with_the_diff_kept(project, tmp_path):
    made = snapshot.take(tmp_path / "runs", project)
    assert sorted(path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()) == [
        ".gitignore", SNAPSHOT, "crm/new.py", "crm/one.py", "crm/two.py", "uncommitted.diff",
    ]  # fmt: skip
    assert "+two" in (made / "uncommitted.diff").read_text()
    about = read_json(made / SNAPSHOT)
    assert about["dirty"] is True and about["hash"] == made.name
    assert len(about["commit"]) == 40


def test_the_same_code_is_copied_once_and_changed_code_anew(project, tmp_path):
    first = snapshot.take(tmp_path / "runs", project)
    assert snapshot.take(tmp_path / "runs", project) == first
    (project / "crm" / "one.py").write_text("one\n")
    second = snapshot.take(tmp_path / "runs", project)
    assert second != first
    assert (first / "crm" / "one.py").read_text() == "1\n"


def test_provenance_in_a_snapshot_is_that_of_the_code_it_was_taken_from(tmp_path):
    made = snapshot.take(tmp_path / "runs")
    code = "import json; from crm.provenance import source; print(json.dumps(source()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=made, env={**os.environ, "PYTHONPATH": str(made)},
                          capture_output=True, text=True, check=True)  # fmt: skip
    told = json.loads(done.stdout)
    assert told["commit"] == read_json(made / SNAPSHOT)["commit"]
    assert told["diff"] == (made / "uncommitted.diff").read_text()


def test_a_job_refuses_other_code_than_its_snapshot(project, tmp_path):
    with pytest.raises(RuntimeError, match="was to run the code in"):
        snapshot.refuse_other_code(snapshot.take(tmp_path / "runs", project))


# ---------------------------------------------------------------------------------------------- the folder


def asked(cells: list[str], **changes) -> Asked:
    values = {
        "name": "one", "title": "", "selection": "last", "conditions": ["test"], "cluster": "slurm",
        "machine": machine(Path("runs")).written(), "resources": {}, "snapshot": "",
        "cells": [{"variant": "a b", "seed": number, "id": id} for number, id in enumerate(cells)],
    }  # fmt: skip
    return Asked(**{**values, **changes})


def test_asking_for_some_cells_keeps_the_others_and_asking_for_all_does_not(tmp_path):
    folder = SweepFolder.of(tmp_path, "one@tiny")
    folder.ask(asked(["x", "y"]), partly=False)
    assert set(folder.ask(asked(["y", "z"]), partly=True).labels) == {"x", "y", "z"}
    assert set(folder.ask(asked(["z"]), partly=False).labels) == {"z"}
    assert folder.asked().labels == {"z": "a b/0"}


def test_one_process_at_a_time_has_the_lease(tmp_path):
    folder = SweepFolder.of(tmp_path, "one")
    at_once, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal at_once, most
        with folder.lease(patience=60.0):
            with lock:
                at_once += 1
                most = max(most, at_once)
            time.sleep(0.02)
            with lock:
                at_once -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    with pytest.raises(Busy, match="another process reconciles one"), folder.lease():  # noqa: SIM117
        with folder.lease():
            pass
    for thread in threads:
        thread.join()
    assert most == 1
    assert not list(folder.path.glob("*lease*"))


def test_the_lease_of_a_dead_process_is_taken_over(tmp_path):
    folder = SweepFolder.of(tmp_path, "one")
    code = (
        "import os, sys; from pathlib import Path; from crm.cluster.folder import SweepFolder\n"
        "with SweepFolder.of(Path(sys.argv[1]), 'one').lease(): os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)
    assert (folder.path / "lease.json").exists()
    with folder.lease():
        assert read_json(folder.path / "lease.json")["pid"] == os.getpid()


# ---------------------------------------------------------------------------------------------- submission


def submission(tmp_path: Path, **changes) -> Submission:
    folder = SweepFolder.of(tmp_path, "one $(touch x)")
    folder.ask(asked(["x"], resources={**Resources().__dict__, **changes}, snapshot="/a b/$(x)"), partly=False)
    return new(folder, "cells", ["x"])


def test_nothing_that_a_person_named_reaches_a_shell_unquoted(tmp_path):
    made = submission(tmp_path)
    assert made.token.startswith("crm-one-touch-x-c")
    lines = _parameters(made, Resources(), "", False)["setup"]
    assert "cd '/a b/$(x)'" in lines
    assert lines[0] == "set -e"


def test_tokens_never_repeat(tmp_path):
    assert len({submission(tmp_path).token for _ in range(50)}) == 50


def test_sbatch_is_asked_without_the_variables_of_the_job_that_asks(monkeypatch):
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "7")
    monkeypatch.setenv("SLURM_CONF", "/etc/x")
    with scheduler_environment():
        assert "SLURM_MEM_PER_NODE" not in os.environ
        assert os.environ["SLURM_CONF"] == "/etc/x"
    assert os.environ["SLURM_MEM_PER_NODE"] == "7"


def test_without_sbatch_a_sweep_is_refused_in_words_and_nothing_is_left_behind(tmp_path):
    bare = tmp_path / "bin"
    bare.mkdir()
    (bare / "git").symlink_to(subprocess.run(["which", "git"], capture_output=True, text=True).stdout.strip())
    done = crm(
        "sweep", "demo@tiny", "--cluster", "slurm", "--yes", "--slurm", "device=cpu", home=tmp_path, path=str(bare)
    )
    assert done.returncode == 1
    assert "there is no sinfo on the path: this machine has no Slurm" in done.stderr
    assert "--cluster local" in done.stderr
    assert not list(tmp_path.glob("runs/*"))
    assert "Traceback" not in done.stderr


def test_verbs_name_the_sweeps_that_were_started(tmp_path):
    SweepFolder.of(tmp_path / "runs", "demo").ask(asked([]), partly=False)
    done = crm("cancel", "dmo", home=tmp_path)
    assert done.returncode == 2
    assert "no started sweep 'dmo'. Did you mean 'demo'?" in done.stderr


# ---------------------------------------------------------------------------------------------- claims of jobs

JOB = {"name": "crm-one-c1", "task": 3, "id": "12_3", "restarts": 0, "node": "n1"}


def test_the_task_that_a_scheduler_starts_again_takes_its_run_over_and_the_orphan_may_write_no_more(tmp_path):
    run = open_run(tmp_path, TINY)
    first = claim(run, "one", JOB)
    assert claim(run, "two", {**JOB, "task": 4}) is None, "another task of the array has no right to it"
    second = claim(run, "three", {**JOB, "restarts": 1})
    assert second is not None
    second.check()
    with pytest.raises(Superseded):
        first.check()
    path = run / "checkpoints" / "last.safetensors"
    write_bytes(path, b"new", second.check)
    with pytest.raises(Superseded):
        write_bytes(path, b"orphan", first.check)
    assert path.read_bytes() == b"new"
    assert [one["token"] for one in claims(run)] == ["one", "three"]
    (end,) = (line for line in raw_lines(run / "journal.jsonl") if line["event"] == "end")
    assert (end["token"], end["outcome"], end["kind"]) == ("one", "lost", "preempted")


def test_where_no_scheduler_answers_nobody_is_declared_dead(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    run = open_run(tmp_path, TINY)
    assert claim(run, "one", JOB) is not None
    assert claim(run, "two", {**JOB, "name": "crm-other-c1"}) is None
    assert claim(run, "three") is None


def test_only_one_of_many_takes_a_dead_claim_over(tmp_path):
    run = open_run(tmp_path, TINY)
    code = (
        "import os, sys; from pathlib import Path; from crm.records import claim\n"
        "claim(Path(sys.argv[1]), 'dead'); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(run)], cwd=ROOT, check=True)
    won: list[str] = []

    def race(token: str) -> None:
        if claim(run, token) is not None:
            won.append(token)

    threads = [threading.Thread(target=race, args=(f"t{number}",)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert read_json(run / "claim.json")["token"] == won[0]


def test_a_warning_near_the_end_of_its_time_means_that_time_is_over_and_an_earlier_one_does_not():
    for left, over in ((60.0, True), (600.0, False)):
        stop = StopFlag(time.time() + left, warned=90.0)
        stop._raise(signal.SIGUSR2, None)
        assert stop() and stop.over is over
        other = StopFlag(time.time() + left, warned=90.0)
        other._raise(signal.SIGTERM, None)
        assert other() and not other.over
