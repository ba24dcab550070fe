"""The cheaper objective: its expected loss and gradient are those of all passes, and its variance is what is said."""

from dataclasses import replace

import pytest
import torch

from crm.config import Config, Loss, override
from crm.passes import drawn_passes
from crm.points import Draw, Plan
from tests.test_objective import LOSS, gradients, run, tiny
from tests.test_objective import one_thread as one_thread

RGB = {"rgb": 2.0, "rgb_masked": 2.0, "thermal": 0.0, "thermal_masked": 0.0}
NOTHING = {"loss.rgb": 0.0, "loss.thermal": 0.0, "loss.non_local": 0.0}
THERMAL = {"rgb": 0.0, "rgb_masked": 0.0, "thermal": 2.0, "thermal_masked": 2.0}


def same_points(plan: Plan) -> Draw:
    """Points that are the same for a pass whichever others are there."""
    of_rows, of_pairs = len(plan.pairs) * plan.outputs, sum(plan.pairs) * plan.outputs

    def drawn(lines: int, points: int) -> torch.Tensor:
        one = torch.rand(lines, points, 2, generator=torch.Generator().manual_seed(lines + points))
        return one.repeat(len(plan.passes), 1, 1)

    class Same:
        def match(self, rows: slice) -> torch.Tensor:
            return drawn(of_rows, plan.match)[rows]

        def loss(self, pairs: slice) -> tuple[torch.Tensor, torch.Tensor]:
            return drawn(of_pairs, plan.candidates)[pairs], drawn(of_pairs, plan.extra)[pairs]

    return Same()


@pytest.mark.parametrize("head_passes", ["batched", "streamed"])
def test_both_sides_of_the_coin_have_the_mean_of_all_passes(head_passes):
    model = tiny().double()
    how = {"head_passes": head_passes, "points": same_points}
    whole, rgb, thermal = (run(model, **how, factors=factors) for factors in ({}, RGB, THERMAL))
    torch.testing.assert_close((rgb.total + thermal.total) / 2, whole.total)
    assert "thermal" not in rgb.terms and "rgb" not in thermal.terms
    wanted, one, two = (gradients(model, losses) for losses in (whole, rgb, thermal))
    for name, gradient in wanted.items():
        mean = (one.get(name, 0 * gradient) + two.get(name, 0 * gradient)) / 2
        torch.testing.assert_close(mean, gradient, rtol=1e-6, atol=1e-9)


def test_the_coin_is_fair_and_adds_the_variance_that_is_said():
    model, steps = tiny().double(), range(4000)
    with torch.no_grad():
        a, b = (run(model, points=same_points, factors=factors).total.item() for factors in (RGB, THERMAL))
    drawn = [drawn_passes("one_single_modality", 0, step) for step in steps]
    assert {tuple(sorted(one.items())) for one in drawn} == {tuple(sorted(one.items())) for one in (RGB, THERMAL)}
    totals = torch.tensor([a if one["rgb"] else b for one in drawn], dtype=torch.float64)
    half = abs(a - b) / 2
    assert abs(totals.mean().item() - (a + b) / 2) < 4 * half / len(steps) ** 0.5
    assert totals.var(correction=0).item() == pytest.approx(half**2, rel=0.02)


def test_a_coin_belongs_to_its_seed_and_step():
    def sides(seed):
        return [drawn_passes("one_single_modality", seed, step)["rgb"] for step in range(50)]

    assert sides(0) == sides(0) != sides(1)
    assert drawn_passes("all", 0, 0) == {}


def test_one_pass_of_each_kind_is_left_out(monkeypatch):
    model, images = tiny(), []
    monkeypatch.setattr(
        model, "head", lambda maps, **how: images.append(len(maps[0])) or type(model).head(model, maps, **how)
    )
    for factors in ({}, RGB):
        with torch.no_grad():
            run(model, replace(LOSS), factors=factors)
    assert images == [18, 12]


@pytest.mark.parametrize(
    ("changes", "hint"),
    [({"loss.passes": "one"}, "one_single_modality"),
     ({**NOTHING, "loss.passes": "one_single_modality"}, "nothing looks")],
)  # fmt: skip
def test_a_sample_of_nothing_is_refused(changes, hint):
    with pytest.raises(ValueError, match=hint):
        override(Config(), changes)


def test_all_passes_are_the_default():
    assert Loss().passes == "all"
