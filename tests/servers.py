"""A PostgreSQL and an MLflow server of a test's own, on the loopback address."""

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

PATIENCE = 120.0  # seconds; a deadline for what takes seconds on an idle machine


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def postgres_programs() -> Path:
    """The folder of initdb and postgres, as Debian has them; skips, or fails under CRM_REQUIRE, where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if importlib.util.find_spec("psycopg2") is None:
        found = []
    if not found:
        words = "PostgreSQL or its driver is not installed: apt-get install postgresql, and the extra `postgres`"
        assert "postgres" not in os.environ.get("CRM_REQUIRE", ""), f"CRM_REQUIRE names postgres, but {words}"
        pytest.skip(words)
    return found[-1].parent


@contextmanager
def postgres() -> Iterator[str]:
    """The URI of an empty database of a new PostgreSQL, which refuses to run as root and so does not."""
    programs = postgres_programs()
    root = Path(tempfile.mkdtemp(prefix="crmpg", dir="/tmp"))
    user: dict = {}
    if os.geteuid() == 0:
        try:
            known = pwd.getpwnam("postgres")
        except KeyError:
            known = pwd.getpwnam("nobody")
        user = {"user": known.pw_uid, "group": known.pw_gid, "extra_groups": []}
        os.chown(root, known.pw_uid, known.pw_gid)
    port, data, quiet = free_port(), root / "data", subprocess.DEVNULL
    make = [programs / "initdb", "-D", data, "-U", "crm", "--auth=trust", "--no-sync", "--locale=C", "-E", "UTF8"]
    subprocess.run(make, check=True, stdout=quiet, cwd=root, **user)
    serve = [programs / "postgres", "-D", data, "-p", str(port), "-k", root, "-c", "fsync=off"]
    log = (root / "log").open("wb")
    process = subprocess.Popen(
        [*serve, "-c", "listen_addresses=127.0.0.1"], stdout=log, stderr=log, cwd=root, start_new_session=True, **user
    )
    try:
        deadline = time.monotonic() + PATIENCE
        ready = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port), "-U", "crm"]
        while subprocess.run(ready).returncode:
            assert process.poll() is None and time.monotonic() < deadline, (root / "log").read_text()
            time.sleep(0.1)
        yield f"postgresql+psycopg2://crm@127.0.0.1:{port}/postgres"
    finally:
        process.send_signal(signal.SIGINT)  # fast shutdown
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()
        shutil.rmtree(root, ignore_errors=True)


class Server:
    """An `mlflow server`, as the README starts one, that can be killed and started again."""

    def __init__(self, folder: Path, backend: str) -> None:
        self.folder, self.backend, self.port = folder, backend, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it and waits until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        own = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", self.backend]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env={**kept, **own}, stdout=log, stderr=log, start_new_session=True, cwd=self.folder
            )
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with urlopen(f"{self.uri}/health", timeout=5):
                    return
            except (URLError, OSError):
                assert self.process.poll() is None and time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.3)

    def kill(self) -> None:
        """SIGKILL to it and its workers, which are a session of their own."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
