"""Sweeps: the designs that write variants, the cells they expand to, and the designs that are refused."""

import pytest

from crm.config import difference, override, run_id
from crm.sweep import Sweep, cumulative, factorial, grid, leave_one_out, one_factor, zipped
from experiments.synthetic_small import config
from sweeps.demo import sweep as demo


def ask(variants, **settings):
    return Sweep(**{"title": "A question?", "base": config, "variants": variants, "seeds": (0, 1), **settings})


def test_cells_are_variant_by_seed_in_the_order_of_the_table():
    cells = ask({"a": {}, "b": {"masking.ratio": 0.3}}).cells()
    assert [cell.label for cell in cells] == ["a/0", "a/1", "b/0", "b/1"]
    assert len({cell.id for cell in cells}) == 4
    assert [cell.config.seed for cell in cells] == [0, 1, 0, 1]


def test_a_cell_that_two_sweeps_share_is_one_run():
    here = ask({"base": {}, "ratio": {"masking.ratio": 0.3}}).cells()
    there = ask({"other label": {}, "patch": {"masking.patch": 32}}).cells()
    assert {cell.id for cell in here} & {cell.id for cell in there} == {cell.id for cell in here[:2]}


def test_changes_reach_every_cell_on_top_of_its_variant():
    cells = ask({"a": {}, "b": {"masking.ratio": 0.3}}).cells({"steps": 20, "val_every": 0})
    assert {cell.config.steps for cell in cells} == {20}
    assert {cell.config.masking.ratio for cell in cells} == {0.5, 0.3}


def test_two_rows_that_are_the_same_run_are_refused_by_name():
    with pytest.raises(ValueError, match="'a' and 'b' are the same run"):
        ask({"a": {}, "b": {"masking.ratio": 0.5}}).cells()


def test_changes_that_make_two_rows_equal_are_refused():
    with pytest.raises(ValueError, match="are the same run"):
        ask({"a": {}, "b": {"masking.ratio": 0.3}}).cells({"masking.ratio": 0.7})


@pytest.mark.parametrize(("path", "value"), [("steps", 700), ("batch", 4), ("data.train_images", 10)])
def test_rows_on_unequal_budgets_are_refused_unless_the_sweep_declares_them(path, value):
    variants = {"short": {}, "long": {path: value}}
    with pytest.raises(ValueError, match=f"another budget than 'short': {path}"):
        ask(variants).cells()
    assert len(ask(variants, budget=(path,)).cells()) == 4


def test_a_misspelt_setting_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match=r"Did you mean 'masking\.ratio'"):
        ask({"a": {}, "b": {"masking.raito": 0.3}}).cells()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"seeds": ()}, "at least one"),
        ({"seeds": (1, 1)}, "seeds repeat"),
        ({"variants": {}}, "at least one"),
        ({"selection": "best"}, "last, val_best"),
        ({"baseline": "c"}, "'c' is no variant of this sweep; there is: a, b"),
        ({"method": "c"}, "'c' is no variant"),
        ({"suite": "robust"}, "Did you mean 'robustness'"),
    ],
)
def test_a_sweep_that_cannot_be_carried_out_is_refused_with_what_would_do(settings, reason):
    with pytest.raises(ValueError, match=reason):
        ask(**{"variants": {"a": {}, "b": {"masking.ratio": 0.3}}, **settings})


def test_gains_are_measured_against_the_first_row_and_pictures_show_the_last_unless_named():
    variants = {"a": {}, "b": {"masking.ratio": 0.3}, "c": {"masking.ratio": 0.4}}
    assert (ask(variants).reference, ask(variants).subject) == ("a", "c")
    named = ask(variants, baseline="b", method="a")
    assert (named.reference, named.subject) == ("b", "a")


def test_a_grid_is_every_combination_that_its_filter_keeps():
    rows = grid({"masking.patch": (8, 16), "masking.ratio": (0.3, 0.5)})
    assert list(rows) == ["patch 8, ratio 0.3", "patch 8, ratio 0.5", "patch 16, ratio 0.3", "patch 16, ratio 0.5"]
    assert rows["patch 16, ratio 0.3"] == {"masking.patch": 16, "masking.ratio": 0.3}
    kept = grid({"masking.patch": (8, 16), "masking.ratio": (0.3, 0.5)}, where=lambda row: row["masking.patch"] == 8)
    assert list(kept) == ["patch 8, ratio 0.3", "patch 8, ratio 0.5"]


def test_a_filter_that_keeps_nothing_is_refused():
    with pytest.raises(ValueError, match="no row"):
        grid({"masking.patch": (8, 16)}, where=lambda row: False)


def test_zipped_paths_change_in_step_and_must_be_equally_long():
    rows = zipped({"masking.patch": (8, 16), "masking.ratio": (0.3, 0.5)})
    assert list(rows.values()) == [
        {"masking.patch": 8, "masking.ratio": 0.3},
        {"masking.patch": 16, "masking.ratio": 0.5},
    ]
    with pytest.raises(ValueError, match="equally many"):
        zipped({"masking.patch": (8, 16), "masking.ratio": (0.3,)})


def test_one_factor_is_a_row_per_value():
    assert one_factor("masking.ratio", (0.3, 0.7)) == {
        "ratio 0.3": {"masking.ratio": 0.3},
        "ratio 0.7": {"masking.ratio": 0.7},
    }


def test_leave_one_out_starts_from_the_full_method():
    rows = leave_one_out({"L_SDC": {"loss.complementary": 0.0}, "L_SDN": {"loss.non_local": 0.0}})
    assert list(rows) == ["full", "w/o L_SDC", "w/o L_SDN"]
    assert rows["full"] == {}


def test_cumulative_rows_hold_every_step_up_to_their_own():
    rows = cumulative({"base": {"loss.rgb": 0.0}, "+ masks": {"masking.ratio": 0.3}, "+ rgb": {"loss.rgb": 1.0}})
    assert rows["+ masks"] == {"loss.rgb": 0.0, "masking.ratio": 0.3}
    assert rows["+ rgb"] == {"loss.rgb": 1.0, "masking.ratio": 0.3}
    assert rows["base"] == {"loss.rgb": 0.0}  # later steps do not leak into earlier rows


def test_a_factorial_combines_named_levels_and_refuses_factors_that_overwrite_each_other():
    fusion = {"max": {"model.fusion": "max"}, "add": {"model.fusion": "add"}}
    rows = factorial({"fusion": fusion, "SDC": {"off": {"loss.complementary": 0.0}, "on": {}}})
    assert list(rows) == ["fusion max, SDC off", "fusion max, SDC on", "fusion add, SDC off", "fusion add, SDC on"]
    assert rows["fusion add, SDC off"] == {"model.fusion": "add", "loss.complementary": 0.0}
    with pytest.raises(ValueError, match=r"two factors set model\.fusion"):
        factorial({"fusion": fusion, "again": fusion})


def test_the_demo_sets_the_method_against_plain_fusion_at_equal_budget():
    cells = demo.cells()
    assert len(cells) == len({cell.id for cell in cells}) == 9
    assert (demo.reference, demo.subject) == ("plain fusion", "CRM")
    assert {path.partition(".")[0] for cell in cells for path in difference(cell.config, demo.base)} <= {
        "loss",
        "masking",
        "seed",
    }


def test_a_cells_identity_is_that_of_its_config():
    cell = demo.cells()[-1]
    assert cell.id == run_id(override(config, {"seed": 2}))
