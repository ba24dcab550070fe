"""What a report shows of robustness, on run folders with invented numbers."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis import figures, robustness_figures
from analysis.load import Study, read
from analysis.readings import robustness
from analysis.stats import bootstrap_miou, image_draws
from crm import conditions
from crm.conditions import SUITES, Condition, on, together
from crm.config import override
from crm.robustness import Family, crossing, curve, summary
from crm.sweep import Sweep
from experiments.synthetic_small import config
from sweeps import PLAIN
from tests.analysis_fixture import evaluated, trained

FIVE = (1.0, 2.0, 3.0, 4.0, 5.0)
SUITE = list(
    dict.fromkeys([*SUITES["grid"], *on("rgb", "fog", FIVE), *together("common_dropout", (0.5,)), *SUITES["rmm"]])
)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    """Two variants, two seeds; every severity costs each modality something, the second variant half as much."""
    conditions.SUITES["invented"] = SUITE
    try:
        sweep = Sweep(
            title="invented", base=replace(config, steps=7), variants={"plain": {"loss.rgb": 0.5}, "tough": {}},
            seeds=(0, 1), suite="invented",
        )  # fmt: skip
        runs = tmp_path_factory.mktemp("runs")
        rng = np.random.default_rng(0)
        for cell in sweep.cells():
            folder = trained(runs, cell)
            for condition in SUITE:
                harm = sum(_harm(how) for how in (condition.rgb, condition.thermal))
                harm = harm / 2 if cell.variant == "tough" else harm
                right = np.clip(0.9 - harm - 0.02 * cell.seed + rng.normal(0, 0.02, 6), 0.05, 1)
                evaluated(folder, condition, np.array([_matrix(share) for share in right]))
        return read(sweep, runs)
    finally:
        del conditions.SUITES["invented"]


def _harm(how) -> float:
    if how.kind == "clean":
        return 0.0
    return 0.08 * how.severity if how.severity >= 1 else 0.4 * (how.severity or 1)


def _matrix(right: float) -> np.ndarray:
    hit = round(1000 * right)
    return np.array([[hit, 1000 - hit, 0], [0, hit, 1000 - hit], [1000 - hit, 0, hit]])


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(conditions.SUITES, "invented", SUITE)


def test_metrics_are_those_of_each_run_against_the_reference_at_its_seed(study):
    table = robustness_figures.metrics(study)
    assert table.index.tolist() == [("plain", 0), ("plain", 1), ("tough", 0), ("tough", 1)]
    named = {condition.name: condition for condition in SUITE}

    def scores(variant: str, seed: int) -> dict[Condition, float]:
        rows = study.records[(study.records["variant"] == variant) & (study.records["seed"] == seed)]
        return {named[name]: float(value) for name, value in zip(rows["condition"], rows["miou"], strict=True)}

    wanted = summary(scores("tough", 1), scores("plain", 1))
    for name, value in wanted.items():
        assert table.loc[("tough", 1), name] == pytest.approx(np.nan if value is None else value, nan_ok=True)
    assert table.loc[("plain", 0), "mCD rgb"] == pytest.approx(100)
    assert table.loc[("tough", 0), "mCD rgb"] < 100
    assert {"reliance gap, day", "reliance gap, night"} <= set(table.columns)


def test_curves_are_compared_with_the_best_network_of_one_modality_at_the_same_seed(study):
    alone = [
        replace(cell, config=override(cell.config, {**PLAIN, "model.inputs": "thermal"}))
        if cell.variant == "plain"
        else cell
        for cell in study.cells
    ]
    table = robustness_figures.metrics(replace(study, cells=alone))
    family = Family("rgb", "block_dropout")
    steps = robustness_figures.unusual(SUITE)[family]
    for seed in (0, 1):
        scores = robustness_figures._scores(study)["tough", seed]
        single = study.evidence["plain", seed, "test"].miou
        wanted = crossing(curve(scores, steps), single)
        assert table.loc[("tough", seed), f"crossing {family}"] == pytest.approx(wanted)


def test_labels_of_ticks_leave_one_another_room():
    assert figures.tick_labels([0, 5, 10, 25, 50, 100]) == ["0", "", "10", "25", "50", "100"]
    assert figures.tick_labels([0, 1, 2, 3, 4, 5]) == ["0", "1", "2", "3", "4", "5"]
    assert figures.tick_labels([0.0, 0.5, 0.95, 1.0]) == ["0", "0.5", "", "1"]


def test_a_run_without_all_conditions_is_in_no_mean(study):
    evidence = {key: found for key, found in study.evidence.items() if key != ("tough", 1, "test.rgb=fog-3")}
    assert ("tough", 1) not in robustness_figures.metrics(replace(study, evidence=evidence)).index


def test_the_band_over_images_is_the_bootstrap_of_the_mean_of_the_seeds(study):
    steps = robustness_figures.unusual(SUITE)[Family("rgb", "fog")]
    found = robustness_figures._bands(study, "tough", steps)
    assert found is not None
    at, seeds, low, high = found
    assert at.tolist() == [0, 1, 2, 3, 4, 5] and seeds.shape == (2, 6)
    counts = image_draws(6, robustness_figures.DRAWS, np.random.default_rng(0))
    matrices = [study.evidence["tough", seed, "test.rgb=fog-3"].confusion for seed in (0, 1)]
    drawn = np.mean([bootstrap_miou(matrix, counts) for matrix in matrices], axis=0)
    assert (low[3], high[3]) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))
    assert (low <= seeds.mean(axis=0)).all() and (seeds.mean(axis=0) <= high).all()


def test_a_grid_is_whole_or_no_grid():
    found = robustness_figures.grids(SUITES["grid"])
    assert {kinds: len(places) for kinds, places in found.items()} == {("low_light", "netd_noise"): 36}
    holed = [one for one in SUITES["grid"] if one.name != "test.rgb=low_light-3.thermal=netd_noise-2"]
    assert robustness_figures.grids(holed) == {}
    assert robustness_figures.grids(SUITES["robustness"]) == {}


@pytest.mark.parametrize("narrow", [False, True])
def test_figures_are_drawn_and_are_the_same_each_time(study, narrow):
    table = robustness_figures.metrics(study)
    drawn = [
        robustness_figures.multiples,
        robustness_figures.heat_map,
        lambda s, n: robustness_figures.bars(s, table, n),
    ]
    for draw in drawn:
        first, again = (figures.written(draw(study, narrow)) for _ in range(2))
        assert first[".svg"] == again[".svg"] and len(first[".png"]) > 5000


def test_every_family_has_a_panel_with_all_variants_and_its_own_title(study):
    figure = robustness_figures.multiples(study)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    for family in robustness_figures.unusual(SUITE):
        words = f"{family.side}: {family.kind.replace('_', ' ')}".replace("rgb", "RGB")
        assert words in [title.replace("\n", " ") for title in titles]
    legend = [text.get_text() for axes in figure.axes if axes.get_legend() for text in axes.get_legend().get_texts()]
    assert legend == ["plain", "tough", "seeds", "test images"]


def test_the_readings_of_a_report_hold_numbers_curves_and_grid(study):
    found = {reading.key: reading for reading in robustness(study)}
    assert list(found) == ["robustness_metrics", "robustness_families", "robustness_grid"]
    rows = dict(found["robustness_families"].shown.rows)
    fog = study.records[study.records["condition"].str.fullmatch(r"test\.rgb=fog-\d")]
    mean = fog[fog["variant"] == "tough"]["miou"].mean()
    assert rows["rgb fog"][1].value.startswith(f"{mean:.1f}")
    assert isinstance(found["robustness_grid"].table, pd.DataFrame)


def test_a_report_of_missing_modalities_alone_has_none_of_it(study):
    plain = replace(study, sweep=replace(study.sweep, suite="robustness"))
    assert robustness(plain) == []
