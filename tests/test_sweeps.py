"""The declared sweeps: what each asks, that it can be put anywhere, and that its tiny form runs."""

import importlib
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.paper.contents import tables
from crm.cli.options import find_experiment, find_sweep, modules
from crm.conditions import CLEAN_TEST
from crm.config import alternatives, difference, flatten, override, run_id
from crm.objective import needed_passes
from crm.recipes import released
from crm.records import open_run, read_json
from crm.sweep import Sweep, moved, tiny
from crm.worker import DONE, attempt
from experiments.synthetic_tiny import config as TINY
from sweeps import COMPUTE_MATCHED, PLAIN, added
from tests.tiny import machine

SWEEPS = modules("sweeps")
ASKED = {  # of issue and field: none may go missing
    "baseline_max_fusion", "ablation_patch_size", "ablation_mask_ratio", "mask_ratio_by_backbone",
    "ablation_masking_type", "ablation_overlap", "ablation_losses", "ablation_distillation_weight",
    "ablation_supervision", "ablation_distillation_form", "ablation_fusion", "ablation_sharing",
    "ablation_initialisation", "backbones", "datasets", "cross_dataset", "overhead", "baselines",
}  # fmt: skip


def declared(name: str) -> Sweep:
    return importlib.import_module(f"sweeps.{name}").sweep


def configs(sweep: Sweep) -> dict:
    """Of each row, the config of its first seed."""
    return {cell.variant: cell.config for cell in replace(sweep, seeds=sweep.seeds[:1]).cells()}


def test_every_question_of_the_method_has_its_sweep():
    assert set(SWEEPS) >= ASKED


@pytest.mark.parametrize("name", sorted(ASKED))
def test_a_sweep_says_its_question_its_hypothesis_its_table_and_its_cost(name):
    doc = importlib.import_module(f"sweeps.{name}").__doc__ or ""
    assert doc.partition("\n")[0].endswith("?")
    assert all(word in doc for word in ("Hypothesis", "Feeds", "Cost"))
    assert len(declared(name).cells()) == len(declared(name).variants) * len(declared(name).seeds)


@pytest.mark.parametrize("name", sorted(ASKED))
def test_a_cost_names_the_rows_and_the_runs_that_there_are(name):
    """Rows of alternatives that were added since cost as many runs each as there are seeds, which it says too."""
    module, sweep = importlib.import_module(f"sweeps.{name}"), declared(name)
    doc, added = " ".join((module.__doc__ or "").split()), getattr(module, "ADDED", ())
    rows, seeds = len(sweep.variants) - len(added), len(sweep.seeds)
    assert f"{rows} rows of {seeds} seed" in doc and f"{rows * seeds} runs" in doc


@pytest.mark.parametrize("name", sorted(ASKED))
def test_rows_that_are_compared_see_the_same_images_in_the_same_order(name):
    sweep = declared(name)
    found = configs(sweep)
    for part in sweep.parts().values():
        assert len({(found[row].data, found[row].batch, found[row].steps) for row in part.variants}) == 1


@pytest.mark.parametrize(
    ("base", "recipe"), [("pst900_swin_t", "released"), ("kp_swin_b", "clean"), ("mf_swin_s", "released")]
)
def test_every_sweep_can_be_put_on_another_published_setting(base, recipe):
    for name in SWEEPS:
        _, sweep = find_sweep(name, base=base, recipe=recipe)
        found = configs(sweep)
        assert sweep.reference in found and not set(found) & set(sweep.left_out)
        assert all(sweep.left_out.values()), "a reason for every row that is gone"
        expected = find_experiment(base, recipe)
        for row, config in list(found.items())[:: max(1, len(found) // 5)]:
            of_row = set(declared(name).variants[row])
            strange = {path for path in difference(config, expected) if path not in of_row | {"seed", "model.init"}}
            assert not strange, f"{name}, {row}: {strange}"


def test_a_patch_that_the_released_recipe_refuses_is_left_out_with_its_reason():
    _, there = find_sweep("ablation_patch_size", base="pst900_swin_t", recipe="released")
    assert "patch 64" not in there.variants
    assert "does not divide the padded crop (224, 320)" in there.left_out["patch 64"]
    for base, recipe in (("pst900_swin_t", "clean"), ("kp_swin_t", "released"), ("mf_swin_t", "released")):
        assert "patch 64" in find_sweep("ablation_patch_size", base=base, recipe=recipe)[1].variants


def test_a_row_that_is_the_same_run_as_another_on_that_base_is_left_out():
    _, there = find_sweep("ablation_initialisation", base="synthetic_small")  # which starts from scratch
    assert "same run as 'from scratch'" in there.left_out["ImageNet"]
    assert "model.thermal_stem" in there.left_out["ImageNet, thermal stem sum"]


def test_what_the_sweeps_own_base_refuses_is_an_error_and_no_reason():
    wrong = Sweep(title="?", base=TINY, variants={"a": {}, "b": {"masking.patch": 5}}, seeds=(0,))
    with pytest.raises(ValueError, match="multiple of 4"):
        moved(wrong, find_experiment("mf_swin_t"))


def test_a_baseline_that_is_impossible_there_refuses_the_sweep():
    sweep = Sweep(title="?", base=TINY, variants={"64": {"masking.patch": 64}, "32": {"masking.patch": 32}}, seeds=(0,))
    with pytest.raises(ValueError, match="baseline '64' is not possible here"):
        moved(sweep, released(find_experiment("pst900_swin_t")))


def test_rows_whose_baseline_is_left_out_go_with_it_and_other_groups_stay():
    rows = {"a": {"masking.patch": 64}, "a2": {"masking.ratio": 0.3}, "b": {}, "b2": {"masking.ratio": 0.4}}
    sweep = Sweep(title="?", base=find_experiment("mf_swin_t"), variants=rows, seeds=(0,),
                  groups={"A": ["a", "a2"], "B": ["b", "b2"]})  # fmt: skip
    there = moved(sweep, released(find_experiment("pst900_swin_t")))
    assert list(there.variants) == ["b", "b2"] and there.groups == {"B": ["b", "b2"]}
    assert there.left_out["a2"].startswith("its baseline is left out")


def test_kp_with_swin_b_starts_from_22k_in_the_released_recipe_in_every_sweep():
    init = "swin_base_patch4_window7_224"
    found = configs(find_sweep("backbones", base="kp_swin_t", recipe="released")[1])
    assert found["Swin-B, CRM"].model.init == f"{init}_22kto1k"
    assert found["Swin-T, CRM"].model.init == "swin_tiny_patch4_window7_224"
    found = configs(find_sweep("datasets", base="mf_swin_b", recipe="released")[1])
    assert [found[f"{title}, CRM"].model.init for title in ("MF", "KP")] == [init, f"{init}_22kto1k"]
    assert configs(find_sweep("datasets", base="mf_swin_b")[1])["KP, CRM"].model.init == init


@pytest.mark.parametrize(
    ("arguments", "form"),
    [
        ({}, "demo"),
        ({"base": "kp_swin_t"}, "demo@kp_swin_t"),
        ({"base": "kp_swin_t", "recipe": "released"}, "demo@kp_swin_t-released"),
        ({"base": "kp_swin_t", "recipe": "clean"}, "demo@kp_swin_t"),
        ({"recipe": "released"}, "demo@released"),
        ({"small": True}, "demo@tiny"),
    ],
)
def test_a_form_has_a_name_and_is_found_by_it(arguments, form):
    name, sweep = find_sweep("demo", **arguments)
    assert name == form
    assert [cell.id for cell in find_sweep(form)[1].cells()] == [cell.id for cell in sweep.cells()]


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("dmeo", {}, "Did you mean 'demo'"),
        ("demo@tniy", {}, "no experiment 'tniy'"),
        ("demo@kp_swin_x", {}, "Did you mean 'kp_swin"),
        ("demo@tiny", {"base": "kp_swin_t"}, "leave out --base"),
        ("demo", {"base": "kp_swin_t", "small": True}, "--tiny has a base of its own"),
        ("demo", {"recipe": "relaesed"}, "Did you mean 'released'"),
        ("demo", {"seeds": "0,x"}, "--seeds takes"),
    ],
)
def test_a_form_that_does_not_exist_is_refused_with_what_would_do(name, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        find_sweep(name, **arguments)


def test_rows_can_be_left_out_and_the_plan_says_so():
    _, found = find_sweep("ablation_losses", without=["+ MWS", "w/o SDC"])
    assert set(declared("ablation_losses").variants) - set(found.variants) == {"+ MWS", "w/o SDC"}
    assert found.left_out == dict.fromkeys(("+ MWS", "w/o SDC"), "not asked for (--without)")
    assert found.interaction == ()  # which needs a row that is gone
    kept = {cell.id for cell in found.cells()}
    assert kept < {cell.id for cell in declared("ablation_losses").cells()}, "the others are the same runs"


@pytest.mark.parametrize(
    ("row", "reason"),
    [("w/o SDX", "no row 'w/o SDX'. Did you mean 'w/o SDC'"), ("max fusion", "baseline 'max fusion'")],
)
def test_a_row_that_cannot_be_left_out_is_named(row, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        find_sweep("ablation_losses", without=[row])


def test_a_change_that_one_row_cannot_take_names_the_row():
    with pytest.raises(ValueError, match=r"row 'RGB only': model.inputs is 'rgb', so model.fusion must stay 'max'"):
        declared("ablation_fusion").cells({"model.fusion": "gated"})
    with pytest.raises(ValueError, match=r"^no setting 'model.fusoin'"):
        declared("ablation_fusion").cells({"model.fusoin": "gated"})


# ---------------------------------------------------------------------------------------------- what they compare


def test_leaving_parts_out_one_by_one_changes_that_part_alone():
    found = configs(declared("ablation_losses"))
    full = found["+ SDN = CRM"]
    assert difference(full, declared("ablation_losses").base) == {}
    gone = {row: set(difference(found[row], full)) for row in found if row.startswith("w/o")}
    assert gone["w/o SDC"] == {"loss.complementary"} and gone["w/o MWS"] == {"loss.rgb", "loss.thermal"}
    assert set(difference(found["+ SDC"], full)) == {"loss.non_local"}


def test_the_two_by_two_crosses_distillation_with_modality_wise_supervision():
    sweep = declared("ablation_losses")
    found = configs(sweep)
    levels = [(bool(found[row].loss.rgb), bool(found[row].loss.non_local)) for row in sweep.interaction]
    assert levels == [(False, False), (True, False), (False, True), (True, True)]


def test_the_compute_matched_control_runs_the_head_as_often_as_crm():
    crm = find_experiment("mf_swin_t")
    control = override(crm, COMPUTE_MATCHED)
    assert len(needed_passes(control.loss)) == len(needed_passes(crm.loss)) == 6
    assert len(needed_passes(override(crm, PLAIN).loss)) == 1


def test_the_minimum_grid_is_all_there():
    rows = configs(declared("baselines")).values()
    plain = [(c.model.fusion, c.masking.kind, bool(c.loss.rgb), bool(c.loss.non_local)) for c in rows
             if c.masking.shape == "patch" and c.masking.view == "clean" and c.masking.fill == "token"]  # fmt: skip
    kinds = ("modality_dropout", "individual", "complementary", "random_complementary")
    wanted = {(fusion, kind, mws, sdn) for fusion in ("max", "concat", "frm_ffm") for kind in kinds
              for mws, sdn in ((False, False), (True, False), (True, True))}  # fmt: skip
    wanted |= {(fusion, "none", mws, False) for fusion in ("max", "concat", "frm_ffm") for mws in (False, True)}
    assert sorted(plain) == sorted(wanted)


@pytest.mark.parametrize(
    ("name", "path"),
    [("ablation_fusion", "model.fusion"), ("ablation_masking_type", "masking.kind"),
     ("ablation_masking_type", "masking.shape"), ("ablation_distillation_form", "loss.distillation"),
     ("ablation_distillation_form", "loss.teacher"), ("ablation_supervision", "model.fusion_norm"),
     ("ablation_initialisation", "model.thermal_stem"), ("ablation_fusion", "model.inputs")],
)  # fmt: skip
def test_a_question_about_a_family_has_a_row_for_every_member(name, path):
    """Also for those that were added after the sweep was written."""
    assert {flatten(config)[path] for config in configs(declared(name)).values()} == set(alternatives(path))


def test_an_alternative_without_a_row_gets_one():
    rows = {"plain": {"model.fusion": "max"}, "other": {"model.fusion": "add"}}
    left = [name for name in alternatives("model.fusion") if name not in ("max", "add", "frm_ffm")]
    assert "token_exchange" in left
    assert added("model.fusion", rows, {"batch": 3}, elsewhere=("frm_ffm",)) == {
        name.replace("_", " "): {"model.fusion": name, "batch": 3} for name in left
    }


def test_pst900_has_no_place_in_the_matrix_and_the_reason_is_said():
    assert "share no class" in declared("cross_dataset").left_out["PST900"]


# ---------------------------------------------------------------------------------------------- tiny forms


@pytest.mark.parametrize("name", SWEEPS)
def test_the_tiny_form_needs_no_files_and_is_small(name):
    sweep = tiny(declared(name), TINY)
    for cell in sweep.cells():
        config = cell.config
        assert config.data.dataset == "synthetic" and config.model.init == "none"
        assert config.steps <= 300 and config.batch <= 8 and config.model.embed <= 16 and cell.seed < 2
    assert not {cell.id for cell in sweep.cells()} & {cell.id for cell in declared(name).cells()}
    assert set(sweep.variants) | set(sweep.left_out) >= set(declared(name).variants), (
        "every row is there or accounted for"
    )


def tiny_cells() -> dict[str, tuple[str, object]]:
    """Every distinct run of the tiny forms, for two steps: id to where it is from and its config."""
    short = {"steps": 2, "val_every": 0, "data.train_images": 4, "data.val_images": 1, "data.test_images": 1}
    found = {}
    for name in SWEEPS:
        sweep = tiny(declared(name), TINY)
        for row, config in configs(sweep).items():
            whole_batch = {"data.test_images": config.batch} if config.test_best else {}  # chosen on whole batches
            cut = override(config, {**short, **whole_batch})
            found.setdefault(run_id(cut), (f"{name}, {row}", cut))
    return found


def carry_out(runs: Path, cells) -> list[str]:
    """What failed of some runs, and why."""
    failed = []
    for where, config in cells:
        folder = open_run(runs, config)
        if attempt(folder, machine(runs), "t" * 16, "last", [CLEAN_TEST], lambda: False, lambda progress: None) != DONE:
            failed.append(f"{where}: {read_json(folder / 'failure.json')['reason']}")
    return failed


ONE_OF_EACH = (  # rows that differ much, for every day; the others are run by the slow test
    "ablation_fusion, late, mean of two", "ablation_masking_type, CutMix", "ablation_distillation_form, EMA teacher",
    "baselines, max, two views, as many passes", "datasets, PST900, CRM",
)  # fmt: skip


def test_one_row_of_each_kind_trains_and_is_evaluated(tmp_path):
    by_name = dict(tiny_cells().values())
    assert not set(ONE_OF_EACH) - set(by_name)
    assert carry_out(tmp_path, [(where, by_name[where]) for where in ONE_OF_EACH]) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_row_that_no_table_asks_for_trains_and_is_evaluated(tmp_path):
    """Those that one asks for are trained by `make tables TINY=1`, which continuous integration runs too."""
    asked = {f"{row.sweep}, {row.variant}" for table in tables(tiny=True).values() for row in table.rows}
    assert asked
    assert carry_out(tmp_path, [(where, made) for where, made in tiny_cells().values() if where not in asked]) == []


def test_plans_of_all_sweeps_load_neither_torch_nor_pandas():
    code = (
        "import sys\n"
        "from crm.cli.options import find_sweep, modules\n"
        "from crm.cli.plan import plan_text, planned\n"
        "from pathlib import Path\n"
        "for name in modules('sweeps'):\n"
        "    name, found = find_sweep(name)\n"
        "    print(plan_text(name, found, planned(found, found.cells(), Path('nowhere')), 1, Path('nowhere')))\n"
        "assert not {'torch', 'pandas', 'mlflow', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "left out: PST900: PST900 and MF share no class" in done.stdout
