"""What runs have cost, from journals written here line by line."""

import json
from pathlib import Path

import pytest

from analysis.spent import costs, spent


def journal(folder: Path, *lines: tuple) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    written = [json.dumps({"event": event, "time": time, **more}) for event, time, more in lines]
    (folder / "journal.jsonl").write_text("\n".join(written) + "\n")


def attempt(start: float, end: float, outcome: str, processes: int = 1, device: str = "cuda") -> list[tuple]:
    numerics = {"numerics": {"device": device, "processes": processes}}
    return [("attempt", start, numerics), ("train", end - 1, {"step": 1}), ("end", end, {"outcome": outcome})]


def test_failed_attempts_count_and_are_told_apart(tmp_path):
    journal(tmp_path, *attempt(0, 3600, "failed"), *attempt(10_000, 17_200, "done"))
    found = spent(tmp_path)
    assert (found.attempts, found.hours, found.lost) == (2, pytest.approx(3), pytest.approx(1))


def test_an_attempt_that_was_killed_counts_to_its_last_line(tmp_path):
    journal(tmp_path, *attempt(0, 3600, "failed")[:2], *attempt(9000, 12_600, "done"))
    assert spent(tmp_path).lost == pytest.approx(3599 / 3600)


def test_every_device_of_an_attempt_counts(tmp_path):
    journal(tmp_path, *attempt(0, 3600, "done", processes=4))
    assert spent(tmp_path).hours == pytest.approx(4)


def test_what_was_superseded_counts_and_a_run_that_two_rows_share_counts_for_both(tmp_path):
    journal(tmp_path / "aa", *attempt(0, 3600, "done"))
    journal(tmp_path / ".superseded" / "aa.1", *attempt(0, 7200, "failed"))
    found = costs(tmp_path, {"one": ["aa", "aa"], "other": ["aa"], "none": ["bb"]})
    assert found["one"] == {"attempts": 2, "GPU hours": pytest.approx(3), "of those lost": pytest.approx(2)}
    assert found["other"] == found["one"]
    assert found["none"]["attempts"] == 0


def test_processors_are_called_so(tmp_path):
    journal(tmp_path / "aa", *attempt(0, 3600, "done", device="cpu"))
    assert costs(tmp_path, {"a": ["aa"]})["a"]["CPU hours"] == pytest.approx(1)
