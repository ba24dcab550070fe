"""Benchmarks: their figures come from what was measured, the runner knows every one, and keeps what it does not run."""

import ast
import json

import pytest

from benchmarks.__main__ import HERE, RESULTS, page, run_all, section
from benchmarks.catalogue import BENCHMARKS, at, figures
from benchmarks.growth import draw, exponent
from benchmarks.report import host_kind

RECORDED = sorted(RESULTS.glob("*.json"))


def test_the_table_is_what_the_results_give():
    assert (HERE / "README.md").read_text() == page(RESULTS), "python -m benchmarks --table writes it again"


def test_the_runner_knows_every_benchmark():
    modules = {path.stem: ast.parse(path.read_text()) for path in HERE.glob("[!_]*.py")}
    benchmarks = {
        name for name, tree in modules.items()
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
    }  # fmt: skip
    assert set(BENCHMARKS) == benchmarks


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_every_figure_is_found_in_the_results(path):
    recorded = json.loads(path.read_text())
    found, on_gpu = recorded["benchmarks"], "gpu" in recorded
    lacking = [(name, figure.path) for name, benchmark in BENCHMARKS.items() for figure in benchmark.figures
               if name in found and at(found[name]["found"], figure.path) is None
               and (on_gpu or figure.target or not figure.on_gpu)]  # fmt: skip
    assert not lacking


def test_results_of_a_gpu_stand_by_themselves_with_targets_of_their_own():
    assert host_kind("NVIDIA H200") == "nvidia-h200"
    measured = {"date": "2026-01-01 00:00 UTC", "commit": "0" * 40, "dirty": False, "versions": {"python": "3.11"},
                "arguments": [], "seconds": 2.0, "load": [0.1, 0.9], "others": 0.0,
                "found": {"step": {"ratio_wall": 0.4}, "step_bf16_compiled": {"ratio_wall": 0.2}}}  # fmt: skip
    page = section({"cpu": "x", "cores": 2, "gpu": "NVIDIA H200", "benchmarks": {"step": measured}})
    assert "## NVIDIA H200, with x, 2 cores" in page
    assert "| training step, ours to released, wall, settled | 0.40 | <= 0.5 |" in page
    assert "| training step in bf16, compiled, ours to released, wall | 0.20 | <= 0.25 |" in page


def test_a_run_is_recorded_with_its_circumstances_and_leaves_other_results_alone(tmp_path):
    place = tmp_path / "host.json"
    other = {"seconds": 5.0, "found": {"ratio": 3.0}}
    place.write_text(json.dumps({"cpu": "x", "cores": 1, "benchmarks": {"robustness": other}}))
    assert run_all(["bootstrap"], place, quick=True) == []
    recorded = json.loads(place.read_text())["benchmarks"]
    assert recorded["robustness"] == other
    one = recorded["bootstrap"]
    assert one["found"]["draws"] == 200 and one["found"]["seconds"] > 0
    assert one["versions"]["torch"] and one["commit"] and one["date"].endswith("UTC") and one["others"] >= 0


def test_where_others_used_the_machine_the_table_says_so():
    measured = {"date": "2026-01-01 00:00 UTC", "commit": "0" * 40, "dirty": False, "versions": {"python": "3.11"},
                "arguments": [], "seconds": 2.0, "load": [0.1, 0.9],
                "found": {"draws": 9, "seeds": 2, "images": 3, "seconds": 0.5}}  # fmt: skip
    pages = [section({"cpu": "x", "cores": 2, "benchmarks": {"bootstrap": {**measured, "others": others}}})
             for others in (0.0, 0.6)]  # fmt: skip
    assert ["| bootstrap **busy** |" in each for each in pages] == [False, True]
    assert all("| 9 draws, 2 seeds, 3 images, seconds | 0.50 |" in each for each in pages)


def test_a_figure_that_a_result_lacks_has_no_line():
    assert figures(BENCHMARKS["bootstrap"], {"seconds_of_what": 1}) == []


def test_the_exponent_of_a_power_law_is_found_and_drawn(tmp_path):
    points = [{"size": size, "seconds": 0.02 * size**1.5, "bytes": 3 << 20} for size in (2, 4, 8, 16)]
    slopes = {f"{kind}_exponent": exponent(points, kind) for kind in ("seconds", "bytes")}
    assert slopes == {"seconds_exponent": 1.5, "bytes_exponent": 0.0}
    draw({"batch": {"what": "images", "points": points, **slopes}}, tmp_path / "growth-x")
    assert {path.name for path in tmp_path.iterdir()} == {"growth-x.png", "growth-x.svg"}
