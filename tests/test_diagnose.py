"""Diagnosis: every rule on both sides of its threshold, and measurements of networks whose faults are known."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from crm.checkpoint import load_checkpoint, save_weights
from crm.cli import app
from crm.cli.diagnose import _screen
from crm.conditions import suite
from crm.config import Config, flatten, override
from crm.data.dataset import open_run_split
from crm.diagnose import _gradients, _journal_measures, _measure, _parts, _terms, diagnose
from crm.model.segmenter import Segmenter, build_segmenter
from crm.records import file_hash, open_run, read_config
from crm.verdicts import NOTE, PROBLEM, RULES, THRESHOLDS, Diagnosis, Measures, judge
from crm.worker import DONE, attempt
from sweeps.demo import MODALITY_DROPOUT, PLAIN
from tests.tiny import TINY, machine

CRM = Config()
HEALTHY = Measures(
    clean=60.0,
    missing={"rgb": 45.0, "thermal": 48.0},
    head={"rgb": 50.0, "thermal": 47.0},
    labelled={"road": 0.7, "car": 0.2, "person": 0.1},
    silent={},
    masking="random_complementary",
    own_masking=True,
    masked=55.0,
    agreement=0.9,
    queries=12,
    speaking=6,
    matched=5,
    dead=6,
    gradient={"rgb": 1.0, "thermal": 1.2, "fusion": 0.1, "head": 2.0},
    cosine=0.2,
    term_gradient={"fused": 1.0, "rgb": 1.0, "thermal": 1.0, "masked": 1.0, "complementary": 0.5, "non_local": 0.5},
    parameters=75_000_000,
    terms={"fused": 0.5, "rgb": 0.5},
    trend=-0.02,
    trend_error=0.001,
    clipped=0.5,
    grad_norm=0.02,
)
SILENT = {"car": 0.2, "person": 0.1}
TAUGHT = {"fused": 1.0, "complementary": 0.6, "non_local": 0.5}

# rule, threshold, what is still in order, what is not any more (changes to HEALTHY), what is suggested then for CRM
CASES: list[tuple[str, str | None, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("finite", None, {}, {"not_finite": ("the predictions",)}, {"optim.lr": 5e-5}),
    ("learned", "learned", {"clean": 35.1}, {"clean": 34.9}, {"steps": 70_000}),
    ("reliance", "gap", {"missing": {"rgb": 55.0, "thermal": 40.1}}, {"missing": {"rgb": 55.0, "thermal": 39.9}},
     {"masking.kind": "complementary"}),
    ("retention", "retention", {"missing": {"rgb": 30.1, "thermal": 40.0}}, {"missing": {"rgb": 29.9, "thermal": 40.0}},
     {"masking.kind": "complementary"}),
    ("fusion", "fusion", {"head": {"rgb": 60.9, "thermal": 47.0}}, {"head": {"rgb": 61.1, "thermal": 47.0}},
     {"loss.fused": 2.0}),
    ("fusion_missing", "fusion_missing", {"head": {"rgb": 57.9, "thermal": 47.0}},
     {"head": {"rgb": 58.1, "thermal": 47.0}}, {"masking.kind": "complementary"}),
    ("branch", "branch", {"head": {"rgb": 50.0, "thermal": 25.1}}, {"head": {"rgb": 50.0, "thermal": 24.9}},
     {"loss.thermal": 2.0}),
    ("agreement", "agreement", {"agreement": 0.71}, {"agreement": 0.69}, {"loss.complementary": 2.0}),
    ("distillation", "distillation", {"term_gradient": {**TAUGHT, "fused": 1.2}}, {"term_gradient": TAUGHT},
     {"loss.complementary": 0.5, "loss.non_local": 0.5}),
    ("distillation", "erased", {"silent": {"car": 0.2}}, {"silent": SILENT},
     {"loss.complementary": 0.5, "loss.non_local": 0.5}),
    ("queries", None, {"speaking": 3, "dead": 9}, {"speaking": 2, "dead": 9}, {"loss.no_object": 0.05}),
    ("silent", "silent", {"silent": {"person": 0.0049}}, {"silent": {"person": 0.0051}}, {"steps": 70_000}),
    ("rising", "rising", {"trend": 0.049}, {"trend": 0.051}, {"optim.lr": 5e-5}),
    ("rising", "noise", {"trend": 0.3, "trend_error": 0.11}, {"trend": 0.3, "trend_error": 0.09}, {"optim.lr": 5e-5}),
    ("clip", "clip_epsilon", {"clipped": 1.0, "parameters": 99 * 10**8}, {"clipped": 1.0, "parameters": 101 * 10**8},
     {"optim.clip": 0.02}),
    ("gradient_share", "gradient_share", {"gradient": {"rgb": 0.21, "thermal": 0.79}},
     {"gradient": {"rgb": 0.19, "thermal": 0.81}}, {"loss.rgb": 2.0}),
    ("conflict", "conflict", {"cosine": -0.09}, {"cosine": -0.11}, {"loss.rgb": 0.5, "loss.thermal": 0.5}),
    ("falling", "falling", {"trend": -0.09}, {"trend": -0.11}, {"steps": 70_000}),
    ("clip", "clip_always", {"clipped": 0.98}, {"clipped": 1.0}, {}),
]  # fmt: skip
NOTES = {"gradient_share", "conflict", "falling", "clip_always"}  # thresholds beyond which a run is still healthy


def found(measures: Measures, config: Config = CRM) -> dict[str, Any]:
    return {finding.rule: finding for finding in judge(measures, config)}


def problems(measures: Measures, config: Config = CRM) -> set[str]:
    return {name for name, finding in found(measures, config).items() if finding.level == PROBLEM}


def test_a_healthy_network_is_called_so():
    assert found(HEALTHY) == {}


@pytest.mark.parametrize(("rule", "threshold", "inside", "outside", "settings"), CASES)
def test_each_rule_speaks_on_one_side_of_its_threshold(rule, threshold, inside, outside, settings):
    wanted = NOTE if threshold in NOTES else PROBLEM
    within = found(replace(HEALTHY, **inside)).get(rule)
    assert within is None or (wanted == PROBLEM and within.level == NOTE)
    beyond = found(replace(HEALTHY, **outside))[rule]
    assert (beyond.level, beyond.settings) == (wanted, settings)


def test_every_rule_and_every_threshold_has_its_case_and_every_threshold_its_reason():
    assert {case[0] for case in CASES} == set(RULES)
    assert {case[1] for case in CASES} - {None} == set(THRESHOLDS)
    assert all(len(threshold.reason) > 20 for threshold in THRESHOLDS.values())


def test_a_finding_names_its_numbers():
    text = found(replace(HEALTHY, missing={"rgb": 55.0, "thermal": 8.7}))["reliance"].text
    assert text == "relies on thermal: without it 51.3 of 60.0 points are lost, without RGB 5.0"
    text = found(replace(HEALTHY, speaking=2, dead=9))["queries"].text
    assert "dead queries 9 of 12" in text and "3 classes" in text
    few = {"queries": 4, "speaking": 2, "dead": 2}
    assert found(replace(HEALTHY, **few))["queries"].settings == {"model.queries": 8}


def test_where_nothing_was_learned_nothing_is_said_to_be_relied_on():
    blind = replace(HEALTHY, clean=20.0, missing={"rgb": 19.0, "thermal": 1.0}, head={"rgb": 30.0, "thermal": 1.0})
    assert problems(blind) == {"learned"}
    assert "20.0" in found(blind)["learned"].text and "23.3" in found(blind)["learned"].text


CONFIGS = {
    "plain fusion": override(CRM, PLAIN),
    "modality dropout": override(CRM, MODALITY_DROPOUT),
    "dropout, all terms": override(CRM, {"masking.kind": "modality_dropout"}),
    "CRM": CRM,
    "without distillation": override(CRM, {"loss.complementary": 0.0, "loss.non_local": 0.0}),
    "strictly complementary": override(CRM, {"masking.kind": "complementary"}),
    "released padding": override(CRM, {"masking.cover_padding": True}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_suggested_is_a_config_that_differs(name):
    for *_, outside, _ in CASES:
        measures = replace(HEALTHY, **outside, own_masking=CONFIGS[name].masking.kind != "none")
        for finding in judge(measures, CONFIGS[name]):  # refuses settings the config does not take
            now = flatten(CONFIGS[name])
            assert all(now[path] != value for path, value in finding.settings.items()) or not finding.settings


def test_against_reliance_a_plain_network_is_told_to_mask_and_a_masked_one_the_next_step():
    leaning = replace(HEALTHY, missing={"rgb": 55.0, "thermal": 8.7})
    tried = {name: found(leaning, config)["reliance"].settings for name, config in CONFIGS.items()}
    assert tried["plain fusion"]["masking.kind"] == "random_complementary"
    assert tried["plain fusion"].keys() == {"masking.kind", "loss.masked", "loss.rgb", "loss.thermal"}
    assert tried["modality dropout"] == {"loss.rgb": 1.0, "loss.thermal": 1.0}
    assert tried["without distillation"] == {"loss.complementary": 1.0, "loss.non_local": 1.0}
    assert tried["strictly complementary"] == {"masking.ratio": 0.35}  # hides 65 % of thermal, which it relies on


def test_rules_about_masks_and_heads_spare_a_network_that_was_trained_without():
    plain = replace(HEALTHY, own_masking=False, agreement=0.2, cosine=None, head={"rgb": 50.0, "thermal": 3.0})
    assert problems(plain, CONFIGS["plain fusion"]) == set()


def test_the_journal_gives_balance_trend_and_clipping():
    lines = [
        {"step": step, "total": 10.0, "terms": {"fused": 7.5, "masked": 2.5}, "grad_norm": 2.0} for step in range(20)
    ]
    for line in lines[-4:]:
        line.update(total=8.0, terms={"fused": 6.0, "masked": 2.0})
    for line in lines[:5]:
        line.update(grad_norm=0.5)
    got = _journal_measures(lines, clip=1.0)
    assert got["terms"] == {"fused": 0.75, "masked": 0.25}
    assert got["trend"] == pytest.approx(-0.2) and got["trend_error"] == 0
    assert got["term_trend"] == {"fused": pytest.approx(-0.2), "masked": pytest.approx(-0.2)}
    assert (got["clipped"], got["grad_norm"]) == (0.75, 2.0)
    assert _journal_measures([], clip=1.0) == {}  # an import
    assert "trend" not in _journal_measures(lines[:9], clip=1.0)


# ---------------------------------------------------------------------------------------------- real networks

MISSING = suite("missing")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A finished run, evaluated without modalities."""
    runs = tmp_path_factory.mktemp("home") / "runs"
    folder = open_run(runs, TINY)
    assert attempt(folder, machine(runs), "t", "last", MISSING, lambda: False, lambda progress: None) == DONE
    return folder


def measured(folder: Path, **arguments) -> Diagnosis:
    given = {"selection": "last", "split_name": None, "images": None, "draws": 2, "tell": lambda done, parts: None}
    return diagnose(folder, machine(folder.parent), **{**given, **arguments})


def network(folder: Path) -> Segmenter:
    model = build_segmenter(TINY.model, 6)
    model.load_state_dict(load_checkpoint(folder / "checkpoints" / "last.safetensors").weights)
    return model.eval()


def look(model: Segmenter, config: Config = TINY) -> Measures:
    split = open_run_split(config.data, "val", None)
    return _measure(model, config, split, None, 2, "cpu", [], lambda done, parts: None)


def test_scores_are_the_stored_ones_where_there_are_any_and_equal_them_where_they_are_computed(trained, tmp_path):
    stored = measured(trained, split_name="test", images=0)
    assert (stored.scores, stored.scored_images, stored.split) == ("stored", 3, "test")
    alone = tmp_path / trained.name
    (alone / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "result.json", "journal.jsonl", "checkpoints/last.safetensors"):
        (alone / name).write_bytes((trained / name).read_bytes())
    computed = measured(alone, split_name="test", images=0)
    assert computed.scores == "computed"
    assert replace(computed.measures, gradient={}) == replace(stored.measures, gradient={})


def test_a_diagnosis_repeats(trained):
    assert measured(trained).written() == measured(trained).written()


def test_stored_scores_of_another_checkpoint_are_not_taken(trained):
    path = trained / "checkpoints" / "last.safetensors"
    kept = path.read_bytes()
    checkpoint = load_checkpoint(path)
    try:
        save_weights(path, checkpoint.weights, {"step": 6})
        assert measured(trained, split_name="test").scores == "computed"
    finally:
        path.write_bytes(kept)


def test_a_network_without_thermal_loses_nothing_with_it(trained):
    config = override(TINY, {"model.fusion": "add"})
    model = network(trained)
    model.backbone.fusion = build_segmenter(config.model, 6).backbone.fusion
    for norm in model.backbone.thermal.norms:
        torch.nn.init.zeros_(norm.weight)
        torch.nn.init.zeros_(norm.bias)
    got = look(model, config)
    assert got.cost("thermal") == 0
    assert got.missing["rgb"] != got.clean


def test_a_network_that_does_not_look_agrees_with_itself_and_passes_no_gradient(trained):
    model = network(trained)
    for norm in model.backbone.fusion_norms:
        torch.nn.init.zeros_(norm.weight)
    got = look(model, override(TINY, PLAIN))  # the fused path alone is trained
    assert got.agreement == 1.0 and not got.own_masking
    assert got.gradient["rgb"] == got.gradient["thermal"] == 0
    assert got.branch_share is None
    assert got.gradient["head"] > 0


def test_masks_that_hide_nothing_leave_no_agreement_to_measure(trained):
    assert (
        look(network(trained), override(TINY, {"masking.ratio": 0.0, "masking.kind": "individual"})).agreement is None
    )


def test_queries_that_say_nothing_are_dead_unless_the_labels_are_matched_to_them(trained):
    model = network(trained)
    head = model.query_decoder.class_embed
    torch.nn.init.zeros_(head.weight)
    head.bias.data = torch.tensor([0.0] * 6 + [9.0])
    got = look(model)
    assert got.speaking == 0
    assert 0 < got.matched < got.queries == got.dead + got.matched
    assert "queries" in problems(got, TINY)


def test_a_class_never_predicted_is_named(trained):
    model = network(trained)
    head = model.query_decoder.class_embed
    torch.nn.init.zeros_(head.weight)
    head.bias.data = torch.tensor([0.0, 9.0] + [0.0] * 5)  # road everywhere
    got = look(model)
    assert set(got.silent) == set(got.labelled) - {"road"}
    assert math.isclose(sum(got.labelled.values()), 1)
    assert got.agreement == 1.0
    assert "classes are never predicted" in found(got, TINY)["distillation"].text


@pytest.mark.parametrize("share_from", [4, 2, 0])
def test_every_parameter_belongs_to_one_part(share_from):
    model = build_segmenter(override(TINY, {"model.share_from": share_from}).model, 6)
    parts = _parts(model)
    assert ("shared" in parts) == (share_from < 4)
    together = [id(parameter) for part in parts.values() for parameter in part]
    assert sorted(together) == sorted(map(id, model.parameters()))


def test_the_gradients_are_those_of_the_whole_objective(trained):
    config, model = read_config(trained), network(trained)
    split = open_run_split(config.data, "val", None)
    seen: dict[str, Any] = {}

    def spy(*arguments):
        seen["arguments"] = arguments
        return _terms(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crm.diagnose._terms", spy)
        got = _gradients(model, config, split, 0, "cpu")
    image, hidden, targets = seen["arguments"][2:5]
    assert image.shape[0] == len(split) and hidden.any()
    terms = _terms(model, config, image, hidden, targets, None, 0)
    torch.stack(list(terms.values())).sum().backward()
    whole = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    assert math.hypot(*got.parts.values()) == pytest.approx(float(whole.norm()), rel=1e-4)
    branch = torch.cat([each.grad.flatten() for each in model.backbone.rgb.parameters() if each.grad is not None])
    assert got.parts["rgb"] == pytest.approx(float(branch.norm()), rel=1e-4)
    assert set(got.terms) == set(terms)
    assert got.cosine is not None and -1 <= got.cosine <= 1


def test_the_fused_path_alone_has_no_cosine(trained):
    assert look(network(trained), override(TINY, PLAIN)).cosine is None


# ---------------------------------------------------------------------------------------------- the command


def crm(folder: Path, *arguments: str):
    return CliRunner().invoke(app, ["diagnose", *arguments, "--runs", str(folder.parent), "--threads", "1"])


def test_the_command_shows_one_screen_and_writes_what_it_says_as_json(trained):
    shown = crm(trained, trained.name[:6])
    written = json.loads((trained / "diagnosis.json").read_text())
    assert shown.exit_code == (0 if written["healthy"] else 1), shown.output
    assert "clean mIoU" in shown.stdout and "verdict:" in shown.stdout
    assert len(shown.stdout.splitlines()) < 50 and max(map(len, shown.stdout.splitlines()[:-1])) <= 120
    again = crm(trained, trained.name, "--json")
    assert json.loads(again.stdout) == written
    assert written["checkpoint_sha256"] == file_hash(trained / "checkpoints" / "last.safetensors")
    assert written["images"] == 3 and written["split"] == "val"


def test_nan_is_found_and_written_as_valid_json(trained, tmp_path):
    folder = tmp_path / trained.name
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "result.json", "journal.jsonl"):
        (folder / name).write_bytes((trained / name).read_bytes())
    weights = load_checkpoint(trained / "checkpoints" / "last.safetensors").weights
    weights["query_decoder.class_embed.bias"][0] = torch.nan
    save_weights(folder / "checkpoints" / "last.safetensors", weights, {"step": 6})
    done = crm(folder, trained.name, "--json")
    assert not done.exception or isinstance(done.exception, SystemExit), repr(done.exception)
    assert done.exit_code == 1

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    said = json.loads(done.stdout, parse_constant=refuse)
    assert next(finding["rule"] for finding in said["findings"]) == "finite"
    assert "query_decoder.class_embed.bias" in said["measures"]["not_finite"][0]


def test_an_import_has_no_journal_and_is_diagnosed_all_the_same(trained):
    (trained / "journal.jsonl").rename(trained / "kept")
    try:
        got = measured(trained)
    finally:
        (trained / "kept").rename(trained / "journal.jsonl")
    assert got.measures.terms is None and got.measures.clipped is None
    assert not any(line.startswith(("loss", "clipping")) for line in _screen(got))


def test_a_diagnosis_that_cannot_be_written_is_shown_and_fails(trained, tmp_path):
    folder = tmp_path / trained.name
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "diagnosis.json").mkdir()
    for name in ("config.json", "result.json", "journal.jsonl", "checkpoints/last.safetensors"):
        (folder / name).write_bytes((trained / name).read_bytes())
    done = crm(folder, trained.name)
    assert done.exit_code == 1 and "verdict:" in done.stdout
    assert "cannot be written: Is a directory" in done.stderr
    assert "written to" not in done.stdout


WRONG = {
    "no such run": (["ffffff"], "no run 'ffffff'"),
    "a sweep": (["demo"], "crm sweep demo"),
    "an experiment": (["synthetic_small"], "crm train synthetic_small"),
    "a selection": (["{id}", "--select", "best"], "val_best"),
    "a checkpoint it lacks": (["{id}", "--select", "test_best"], "it has last, val_best"),
    "a split": (["{id}", "--split", "vall"], "Did you mean 'val'"),
    "more images than there are": (["{id}", "--images", "4"], "has 3 images"),
    "a device": (["{id}", "--device", "gpu"], "cpu, cuda"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_answered_with_what_would_be_right(what, trained):
    arguments, hint = WRONG[what]
    done = crm(trained, *[argument.format(id=trained.name) for argument in arguments])
    assert isinstance(done.exception, (ValueError, FileNotFoundError))  # which `main` turns into exit code 2
    assert hint in str(done.exception)


def test_a_mistyped_id_is_answered_with_the_one_that_was_meant(trained):
    typo = trained.name[:3] + ("0" if trained.name[3] != "0" else "1") + trained.name[4:8]
    assert f"Did you mean {trained.name!r}" in str(crm(trained, typo).exception)


def test_an_untrained_run_is_refused_with_what_to_do(trained, tmp_path):
    folder = open_run(tmp_path, TINY)
    said = str(crm(folder, folder.name).exception)
    assert "not trained to its end" in said and "crm train" in said
    assert not (folder / "diagnosis.json").exists()
