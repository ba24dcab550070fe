"""`crm doctor`: it says what is there, what is not and what to do, on any machine, and changes nothing."""

import socket
import sqlite3
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from crm import doctor
from crm.data.specs import DATASETS
from crm.doctor import Check, diagnose


def named(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    return diagnose(tmp_path_factory.mktemp("home") / "runs")


def test_every_check_has_a_verdict_and_whoever_finds_fault_says_what_to_do(checks):
    assert len({check.name for check in checks}) == len(checks)
    for check in checks:
        assert check.status in ("ok", "warn", "missing")
        assert check.found
        assert bool(check.remedy) == (check.status != "ok"), check


def test_everything_a_run_needs_is_here(checks):
    assert [check for check in checks if check.needed and check.status == "missing"] == []
    assert "torch" in named(checks, "devices").found


def test_looking_leaves_nothing_behind(tmp_path):
    diagnose(tmp_path / "deep" / "runs")
    assert list(tmp_path.iterdir()) == []


def test_every_data_set_is_looked_for_and_the_missing_ones_say_how_to_get_them(checks):
    for spec in DATASETS.values():
        check = named(checks, f"data {spec.name}")
        assert check.status == ("ok" if spec.layout == "generated" else "missing")
        assert not check.needed


def test_a_version_that_was_not_tested_is_named_and_a_cpu_build_is_the_same_version(tmp_path, monkeypatch):
    versions = {"torch": "2.15.0+cpu", "timm": "0.9.1"}
    monkeypatch.setattr(doctor, "LOCK", tmp_path / "lock")
    (tmp_path / "lock").write_text("timm==1.0.31\ntorch==2.15.0\nabsent==1.0\n")
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "absent" else versions.get(name, "1"))
    check = doctor._versions()
    assert check.status == "warn"
    assert check.found == "1 of 2 packages as tested; not: timm 0.9.1 (tested 1.0.31)"


def test_a_runs_folder_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    check = doctor._runs(tmp_path / "file" / "runs")
    assert (check.status, check.needed) == ("missing", True)
    assert "--runs" in check.remedy


def test_a_tracking_file_is_counted_and_one_that_is_none_is_pointed_out(tmp_path):
    file = tmp_path / "mlflow.db"
    assert "made when" in doctor._tracking(f"sqlite:///{file}").found
    with closing(sqlite3.connect(file)) as store:
        store.execute("create table runs (id)")
        store.execute("insert into runs values (1)")
        store.commit()
    assert "1 runs" in doctor._tracking(f"sqlite:///{file}").found
    file.write_text("no database at all " * 100)
    assert doctor._tracking(f"sqlite:///{file}").status == "warn"


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *arguments):
        """Quiet."""


def test_a_tracking_server_is_asked_whether_it_answers():
    with HTTPServer(("127.0.0.1", 0), Healthy) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        check = doctor._tracking(f"http://127.0.0.1:{server.server_port}/")
        server.shutdown()
        thread.join()
    assert (check.status, check.found) == ("ok", f"http://127.0.0.1:{server.server_port} answers")


def test_a_silent_server_is_a_warning_and_its_password_is_never_shown():
    with closing(socket.socket()) as held:
        held.bind(("127.0.0.1", 0))  # bound and never listening: refused at once
        check = doctor._tracking(f"http://me:secret@127.0.0.1:{held.getsockname()[1]}")
    assert check.status == "warn"
    assert "secret" not in check.found + check.remedy


def test_a_cluster_is_silent_when_its_controller_is(tmp_path, monkeypatch):
    for name in ("sbatch", "squeue", "sacct", "scancel"):
        (tmp_path / name).write_text(
            '#!/bin/sh\n[ "$1" = --version ] && echo slurm 22.05 && exit\necho down >&2; exit 1\n'
        )
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    check = doctor._slurm()
    assert (check.status, check.found) == ("warn", "slurm 22.05: down")
    (tmp_path / "sacct").unlink()
    assert doctor._slurm().found == "slurm 22.05, without sacct"
