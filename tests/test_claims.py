"""What is claimed and what invented runs say to it."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from analysis.claims import CLAIMS, Claim, answers, chosen_claims, macro, macros
from analysis.published import published_gains
from analysis.tables import measures
from crm.cli import app
from crm.cli.options import find_experiment, find_sweep
from crm.conditions import CLEAN_TEST
from crm.records import append
from crm.sweep import Sweep
from tests.analysis_fixture import evaluated, trained

BASE = find_experiment("synthetic_tiny")
SWEEP = Sweep(title="?", base=BASE, variants={"a": {"loss.rgb": 0.5}, "b": {}}, seeds=(0, 1, 2, 3), suite="clean")
CLAIM = Claim(name="b_beats_a", text="b is better", sweep="s", subject="b", reference="a")


def hits(runs, right: dict[str, list[float]], sweep: Sweep = SWEEP) -> None:
    """Evaluated cells; each row's share of right pixels by seed, fewer where runs are missing."""
    for cell in sweep.cells():
        if cell.seed < len(right[cell.variant]):
            rng = np.random.default_rng(5)
            share = np.clip(right[cell.variant][cell.seed] + rng.normal(0, 0.02, 40), 0, 1)  # images alike for all
            right_ones = np.round(1000 * share).astype(int)[:, None, None]
            eye = np.eye(3, dtype=int)
            matrices = right_ones * eye + (1000 - right_ones) * np.roll(eye, 1, axis=1)
            folder = trained(runs, cell)
            evaluated(folder, CLEAN_TEST, matrices)
            append(folder, "evaluate", seconds=3.6)


def asked(runs, *claims: Claim, sweep: Sweep = SWEEP):
    return answers(claims, {"s": sweep}, runs)


def test_a_clear_gain_supports_a_claim_and_a_clear_loss_refutes_it(tmp_path):
    hits(tmp_path, {"a": [0.70, 0.71, 0.69, 0.70], "b": [0.80, 0.82, 0.79, 0.80]})
    opposite = replace(CLAIM, name="a_beats_b", subject="a", reference="b")
    too_much = replace(CLAIM, name="by_far", at_least=40.0)
    found = asked(tmp_path, CLAIM, opposite, too_much)
    assert [one.verdict for one in found] == ["supported", "refuted", "refuted"]
    assert found[0].more == 0 and found[0].low > 0 and found[0].p <= found[0].p_holm < 0.05
    assert found[0].gain == pytest.approx(-found[1].gain)


def test_noise_leaves_a_claim_undecided_with_seeds_and_cost(tmp_path):
    hits(tmp_path, {"a": [0.70, 0.73, 0.68, 0.71], "b": [0.72, 0.72, 0.71, 0.72]})
    (one,) = asked(tmp_path, CLAIM)
    assert one.verdict == "undecided" and one.more and "80 %" in one.why
    # two rows, a step of 0.2 s, an evaluation of 3.6 s
    assert one.hours == pytest.approx(one.more * 2 * (0.2 * BASE.steps + 3.6) / 3600)


def test_one_paired_seed_never_decides(tmp_path):
    hits(tmp_path, {"a": [0.5, 0.5], "b": [0.9]})
    (one,) = asked(tmp_path, CLAIM)
    assert (one.verdict, one.seeds, one.more) == ("undecided", 1, 2)
    assert one.over == "test images" and np.isnan(one.p) and np.isnan(one.sd)


def test_nothing_run_is_undecided_at_unknown_cost(tmp_path):
    (one,) = asked(tmp_path, CLAIM)
    assert (one.verdict, one.seeds, one.more, one.hours) == ("undecided", 0, 3, None)


def test_a_row_that_this_form_lacks_is_undecided_and_says_why(tmp_path):
    part = replace(SWEEP, variants={"a": SWEEP.variants["a"]}, left_out={"b": "there is no b here"})
    (one,) = asked(tmp_path, CLAIM, sweep=part)
    assert one.verdict == "undecided" and one.more is None and "no b here" in one.why


def test_a_row_or_measure_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ValueError, match="'c'"):
        asked(tmp_path, replace(CLAIM, subject="c"))
    with pytest.raises(ValueError, match="missing"):
        asked(tmp_path, replace(CLAIM, measure="missing"))
    with pytest.raises(ValueError, match="complementary_masking"):
        chosen_claims(["complementary_maskin"])


def test_a_claim_is_corrected_for_the_others(tmp_path):
    hits(tmp_path, {"a": [0.70, 0.71, 0.69, 0.70], "b": [0.80, 0.82, 0.79, 0.80]})
    alone = asked(tmp_path, CLAIM)[0]
    among = asked(tmp_path, CLAIM, *(replace(CLAIM, name=f"c{i}", at_least=alone.gain) for i in range(3)))[0]
    assert among.p_holm == pytest.approx(4 * alone.p_holm) and among.p == alone.p


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_every_claim_is_about_rows_and_a_measure_of_its_sweep(claim):
    for form in (claim.sweep, f"{claim.sweep}@tiny"):
        sweep = find_sweep(form)[1]
        assert {claim.subject, claim.reference} <= set(sweep.variants) | set(sweep.left_out)
        assert claim.measure in [one.key for one in measures(sweep.conditions)]


def test_published_gains_belong_to_claims_and_have_a_source():
    assert set(published_gains()) <= {claim.name for claim in CLAIMS}
    assert all(one.source for one in published_gains().values())


def test_macros_have_letters_alone_and_one_number_each(tmp_path):
    hits(tmp_path, {"a": [0.80, 0.82, 0.79], "b": [0.70, 0.71, 0.69]})
    text = macros(asked(tmp_path, replace(CLAIM, name="b_2 beats")))
    commands = re.findall(r"\\newcommand\{\\([^}]*)\}", text)
    assert all(re.fullmatch("[A-Za-z]+", command) for command in commands) and len(commands) == len(set(commands))
    assert "CrmBTwoBeatsGain" in commands and r"{$-$" in text, "a minus of LaTeX"
    assert macro("a_1", "low") == "\\CrmAOneLow"
    with pytest.raises(ValueError, match="would both be"):
        macros(asked(tmp_path, replace(CLAIM, name="x_y"), replace(CLAIM, name="x-y")))


def test_the_command_answers_writes_macros_and_checks(tmp_path, monkeypatch):
    monkeypatch.setenv("CRM_HOME", str(tmp_path))
    sweep = find_sweep("ablation_losses@tiny")[1]
    rows = {row: [0.6, 0.62] for row in sweep.variants}
    hits(tmp_path / "runs", {**rows, "+ MWS": [0.8, 0.82]}, sweep)
    done = CliRunner().invoke(app, ["claims", "--tiny", "--json"])
    assert done.exit_code == 0, done.output
    found = {one["claim"]["name"]: one for one in json.loads(done.stdout)["claims"]}
    assert found["modality_wise_supervision"]["seeds"] == 2
    assert found["complementary_masking"]["verdict"] == "undecided"
    assert r"\CrmModalityWiseSupervisionGain" in (tmp_path / "reports/tables/claims@tiny.tex").read_text()
    checked = CliRunner().invoke(app, ["claims", "--tiny", "--check"])
    assert checked.exit_code == 1
    assert "more paired seed" in checked.stdout and "published: +0.9" in checked.stdout
