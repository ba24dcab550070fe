from dataclasses import replace
from itertools import permutations, product

import pytest
import torch
from torch.nn import functional as F

from crm.config import SUPERVISED, Loss, Model
from crm.distillation import DISTILLATIONS, TEACHERS, Output
from crm.losses import class_loss, dice_loss, mask_loss, self_distillation
from crm.masking import FILLS
from crm.matching import assign
from crm.model.query_decoder import Prediction
from crm.model.segmenter import Segmenter, build_segmenter
from crm.objective import View, needed_passes, objective
from crm.points import OUTSIDE, PADDED, Plan, RandomPoints, ReleasedPoints, class_shares, label_corners, sample_maps
from crm.set_losses import set_losses
from crm.targets import Part, make_targets

IGNORE = 255
LOSS = Loss(points=60)
OFF = {"fused": 0.0, "rgb": 0.0, "thermal": 0.0, "masked": 0.0, "complementary": 0.0, "non_local": 0.0}
TERMS = list(OFF)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More only wait for each other in networks as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(seed: int = 0, **changes) -> Segmenter:
    torch.manual_seed(seed)
    part = Model(
        embed=8, depths=(1, 1, 1, 1), heads=(1, 1, 2, 2), drop_path=0.0, width=32, queries=6, encoder_layers=1,
        encoder_ffn=16, decoder_layers=2, decoder_ffn=16, decoder_heads=4,
    )  # fmt: skip
    return build_segmenter(replace(part, **changes), num_classes=4)


@pytest.fixture(scope="module")
def model() -> Segmenter:
    return tiny()


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


IMAGE = torch.randn(3, 4, 32, 64, generator=random())
HIDDEN = torch.rand(3, 2, 8, 16, generator=random(1)) < 0.5
LABELS = torch.randint(0, 4, (3, 4, 8), generator=random(2), dtype=torch.uint8)
LABELS = LABELS.repeat_interleave(8, 1).repeat_interleave(8, 2)
TARGETS = make_targets(LABELS, 4, IGNORE)
OTHER = View(IMAGE.flip(3) + 0.1, make_targets(LABELS.flip(2), 4, IGNORE))


def run(model, loss=LOSS, targets=TARGETS, head_passes="batched", points=None, **more):
    points = points or ReleasedPoints(random(3))
    image = IMAGE.to(next(model.parameters()).dtype)
    return objective(model, image, HIDDEN, targets, loss, points, head_passes, **more)


def gradients(model, losses) -> dict[str, torch.Tensor]:
    model.zero_grad()
    losses.total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def prediction(batch: int, outputs: int = 2, seed: int = 5) -> Prediction:
    classes = torch.randn(outputs, batch, 6, 5, generator=random(seed))
    return Prediction(classes, torch.randn(outputs, batch, 6, 8, 16, generator=random(seed + 1)))


def test_batched_and_streamed_passes_give_the_same_losses_gradients_and_statistics(model):
    model.double()  # in float32 rounding may flip a bit of an attention mask, and with it a whole term
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    results = []
    for head_passes in ("batched", "streamed"):
        model.load_state_dict(before)
        losses = run(model, head_passes=head_passes)
        results.append((losses, gradients(model, losses), {n: b.clone() for n, b in model.named_buffers()}))
    (batched, ours, buffers), (streamed, theirs, other) = results
    assert list(batched.terms) == list(streamed.terms) == TERMS
    for name in TERMS:
        torch.testing.assert_close(batched.terms[name], streamed.terms[name], rtol=1e-4, atol=1e-5)
    assert ours.keys() == theirs.keys() == dict(model.named_parameters()).keys()
    for name, gradient in ours.items():  # by norm: rounding flips the sign of some L1 terms
        assert (gradient - theirs[name]).norm() <= 2e-2 * gradient.norm() + 1e-4, name
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, other[name], rtol=1e-5, atol=1e-6)


def test_the_total_is_the_sum_of_the_terms_and_details_add_up_to_theirs(model):
    losses = run(model, replace(LOSS, rgb=0.5))
    torch.testing.assert_close(losses.total, sum(losses.terms.values()))
    for name in ("fused", "rgb", "thermal", "masked"):
        parts = [losses.details[f"{name}/{part}"] for part in ("class", "mask", "dice")]
        torch.testing.assert_close(sum(parts), losses.terms[name].detach())


def test_a_weight_scales_its_term_alone(model):
    full, half = run(model), run(model, replace(LOSS, masked=0.5, non_local=2.0))
    factors = {"masked": 0.5, "non_local": 2.0}
    for name in TERMS:
        torch.testing.assert_close(half.terms[name], factors.get(name, 1.0) * full.terms[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("weights", "branches", "heads", "passes"),
    [
        ({"fused": 1.0}, 2, 1, ["fused"]),
        ({"masked": 1.0}, 2, 1, ["masked"]),
        ({"rgb": 1.0}, 1, 1, ["rgb"]),
        ({"fused": 1.0, "rgb": 1.0, "thermal": 1.0}, 2, 3, ["fused", "rgb", "thermal"]),
        ({"fused": 1.0, "complementary": 1.0}, 4, 2, ["fused", "masked"]),
        ({"fused": 1.0, "non_local": 1.0}, 4, 3, ["fused", "rgb_masked", "thermal_masked"]),
        (dict.fromkeys(TERMS, 1.0), 4, 6, ["fused", "rgb", "thermal", "masked", "rgb_masked", "thermal_masked"]),
    ],
)
def test_terms_of_weight_0_cost_no_pass(model, monkeypatch, weights, branches, heads, passes):
    loss = replace(LOSS, **{**OFF, **weights})
    assert list(needed_passes(loss)) == passes
    calls = {"branch": 0, "head": 0}
    for name in calls:
        original = getattr(model, name)

        def counted(*args, name=name, original=original, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(model, name, counted)
    losses = run(model, loss, head_passes="streamed")
    assert calls == {"branch": branches, "head": heads}
    assert set(losses.terms) == set(weights)


def test_the_teacher_gets_no_gradient():
    teacher, student = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    loss = self_distillation(teacher, student)
    loss.backward()
    assert teacher.grad is None
    torch.testing.assert_close(loss, (teacher - student).abs().mean())


def test_a_masked_term_without_a_masked_input_is_refused(model):
    with pytest.raises(ValueError, match="hidden is None"):
        objective(model, IMAGE, None, TARGETS, LOSS, RandomPoints(random()))


def test_the_total_is_finite_when_nothing_is_labelled(model):
    nothing = make_targets(torch.full_like(LABELS, IGNORE), 4, IGNORE)
    assert not any(nothing.classes)
    losses = run(model, targets=nothing, points=RandomPoints(random()))
    assert losses.total.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(model, losses).values())


def test_one_image_of_the_batch_may_have_no_class(model):
    labels = LABELS.clone()
    labels[1] = IGNORE
    for counted in (False, True):
        assert run(model, replace(LOSS, count_ignored=counted), make_targets(labels, 4, IGNORE)).total.isfinite()


@pytest.mark.parametrize("what", ["count_ignored", "count_padding"])
def test_pixels_that_do_not_count_do_not_influence_the_loss(what):
    if what == "count_ignored":
        labels = LABELS.clone()
        labels[:, :, 32:] = IGNORE
        targets = make_targets(labels, 4, IGNORE)
    else:
        targets = make_targets(LABELS[:, :, :32], 4, IGNORE, padded=(32, 64))
    first = prediction(batch=3)
    masks = first.mask_logits.clone()
    masks[..., 9:] += 3.0  # column 8 may be read together with column 7, which counts
    differ = {}
    for counted in (False, True):
        loss = replace(LOSS, points=400, **{what: counted})
        ours, other = (
            set_losses(each, ["fused"], targets, loss, ReleasedPoints(random()))
            for each in (first, Prediction(first.class_logits, masks))
        )
        parts = zip((ours.costs, ours.masks, ours.dice), (other.costs, other.masks, other.dice), strict=True)
        differ[counted] = [not torch.allclose(a, b, atol=1e-6) for a, b in parts]
    assert differ == {False: [False] * 3, True: [True] * 3}


def test_what_counts_is_all_there_is_without_padded_or_ignored_pixels():
    either = [
        set_losses(
            prediction(3), ["fused"], TARGETS, replace(LOSS, count_padding=flag, count_ignored=flag),
            ReleasedPoints(random()),
        )
        for flag in (False, True)
    ]  # fmt: skip
    assert torch.equal(either[0].masks, either[1].masks)


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("sizes", [(3,), (1, 2), (2, 1), (1, 1, 1)])
def test_the_parts_of_a_batch_add_up_to_it(sizes, drop_path):
    """Losses and gradients, with random points and stochastic depth; the norms are frozen, for they see the part."""
    add_up(LOSS, sizes, drop_path)


ALL = replace(LOSS, rgb_masked=0.5, thermal_masked=0.5)
EXTRAS = {
    "all heads": (ALL, {}),
    "mean pixels": (ALL, {"fill": "mean"}),
    "a view, and masks": (replace(ALL, complementary=0.0, non_local=0.0), {"view": OTHER}),
    "a view, no masks": (replace(ALL, complementary=0.0, non_local=0.0), {"view": OTHER, "masks": False}),
    **{name: (replace(LOSS, distillation=name), {}) for name in DISTILLATIONS},
    "teacher eval": (replace(LOSS, teacher="eval"), {}),
    "teacher ema": (replace(LOSS, teacher="ema", distillation="pixel_kl"), {"teacher": True}),
}


@pytest.mark.parametrize("case", EXTRAS)
def test_the_parts_of_a_batch_add_up_with_every_alternative(case):
    loss, how = EXTRAS[case]
    add_up(loss, (1, 2), 0.5, **how)


def add_up(loss: Loss, sizes, drop_path: float, view: View | None = None, masks=True, teacher=False, fill="token"):
    network = tiny(init="none", drop_path=drop_path, depths=(1, 2, 1, 1)).double()
    network.backbone.fusion_norms.eval()
    asked = tiny(seed=1).double() if teacher else None
    labels = LABELS.clone()
    labels[1] = 2  # one class alone: parts with unequal numbers of masks
    targets = make_targets(labels, 4, IGNORE)
    if view is not None:
        mixed = LABELS.flip(2)
        mixed[0] = 1  # and the view has other numbers than the clean input
        other = make_targets(mixed, 4, IGNORE)
        view = View(view.image.double(), other, tuple(map(len, other.classes)))

    def losses(images: slice, part: Part | None):
        torch.manual_seed(3)
        return objective(
            network, IMAGE[images].double(), HIDDEN[images] if masks else None, targets.part(images), loss,
            RandomPoints(random(4)), part=part, view=view and view.part(images), fill=fill, teacher=asked,
        )  # fmt: skip

    whole = losses(slice(None), None)
    expected = gradients(network, whole)
    network.zero_grad()
    terms = dict.fromkeys(whole.terms, 0.0)
    for first, size in zip([sum(sizes[:i]) for i in range(len(sizes))], sizes, strict=True):
        share = losses(slice(first, first + size), Part(first, tuple(map(len, targets.classes))))
        share.total.backward()
        terms = {name: terms[name] + value.item() for name, value in share.terms.items()}
    assert terms == pytest.approx({name: value.item() for name, value in whole.terms.items()}, rel=1e-6)
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7 * gradient.norm().item() + 1e-12)


# ---------------------------------------------------------------------------------------------- alternatives


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("name", DISTILLATIONS)
def test_every_form_and_teacher_gives_both_terms_batched_as_streamed(name, teacher):
    network, average = tiny().double(), tiny(seed=1).double()
    loss = replace(LOSS, distillation=name, teacher=teacher)
    asked = average if teacher == "ema" else None
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    batched = run(network, loss, teacher=asked)
    network.load_state_dict(before)  # the running statistics, which a teacher in evaluation mode goes by
    streamed = run(network, loss, head_passes="streamed", teacher=asked)
    assert list(batched.terms) == list(streamed.terms) == TERMS
    for term in ("complementary", "non_local"):
        assert batched.terms[term].item() > 0
        torch.testing.assert_close(batched.terms[term], streamed.terms[term], rtol=1e-5, atol=1e-8)
    streamed.total.backward()
    assert all(parameter.grad is None for parameter in average.parameters())


@pytest.mark.parametrize("head_passes", ["batched", "streamed", "threaded"])
@pytest.mark.parametrize(
    ("changes", "network"),
    [
        ({}, {}),
        ({"loss": OFF | {"complementary": 1.0}}, {}),  # the teacher has no supervision, and neither has the student
        ({"distillation": "pixel_kl", "teacher": "eval"}, {}),
        ({"distillation": "feature_mse", "loss": OFF | {"masked": 1.0, "non_local": 1.0}}, {}),
        ({}, {"fusion": "token_exchange", "sparsity": 0.1}),  # a fusion that adds a term of its own
        ({}, {"inputs": "early"}),  # whose maps have no gradient
        ({"loss": OFF | {"fused": 1.0, "rgb": 1.0}}, {"inputs": "rgb"}),  # two paths of the same maps
        ({"loss": OFF | {"fused": 1.0, "masked": 1.0}}, {"inputs": "late"}),
    ],
)
def test_a_backward_pass_of_each_path_adds_up_to_that_of_the_total(head_passes, changes, network):
    changes = dict(changes)
    loss = replace(LOSS, **changes.pop("loss", {}), **changes)
    found = []
    for backward in (False, True):
        model = tiny(**network).double()
        torch.set_num_threads(3 if head_passes == "threaded" and backward else 1)  # one for each image
        points = RandomPoints(random(3))
        how = head_passes if backward else "batched"
        losses = run(model, loss, head_passes=how, points=points, backward=backward)
        torch.set_num_threads(1)
        assert losses.total.requires_grad is not backward
        if not backward:
            losses.total.backward()
        found.append((losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (whole, wanted), (ours, gradients) = found
    assert list(ours.terms) == list(whole.terms) and ours.details.keys() == whole.details.keys()
    for name, value in {**whole.terms, **whole.details}.items():
        # the sum of the class weights, a tenth in float32 for "no object", is counted for parts of a batch
        torch.testing.assert_close({**ours.terms, **ours.details}[name], value.detach(), rtol=1e-8, atol=1e-12)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():  # by norm: rounding flips the sign of some L1 terms
        assert (gradients[name] - gradient).norm() <= 2e-2 * gradient.norm() + 1e-4, name


def test_gradients_are_added_to_those_that_are_there():
    model = tiny()
    run(model, head_passes="streamed", backward=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.load_state_dict(tiny().state_dict())
    run(model, head_passes="streamed", backward=True)
    for name, parameter in model.named_parameters():
        if name in once:
            torch.testing.assert_close(parameter.grad, 2 * once[name], rtol=1e-3, atol=1e-5)


def test_the_temperature_reaches_both_distilled_terms():
    at = {}
    for temperature in (1.0, 3.0):
        losses = run(tiny().double(), replace(LOSS, distillation="kl", temperature=temperature))
        at[temperature] = [losses.terms[name].item() for name in ("complementary", "non_local")]
    assert all(one > 0 and three > 0 and one != pytest.approx(three) for one, three in zip(*at.values(), strict=True))


def test_a_teacher_in_evaluation_mode_says_what_evaluation_says():
    """Unlike the clean pass of the step, whose stochastic depth and statistics it does not share."""
    network = tiny(drop_path=0.5).double()
    distances = {}
    for teacher in ("train", "eval"):
        loss = replace(LOSS, teacher=teacher)
        torch.manual_seed(0)
        distances[teacher] = run(network, loss).terms["complementary"].item()
    assert network.training and all(part.training for part in network.modules())
    torch.manual_seed(0)
    fixed = replace(LOSS, teacher="ema", fused=0.0, rgb=0.0, thermal=0.0, non_local=0.0)
    other = tiny(drop_path=0.5).double()
    other.load_state_dict(network.state_dict())
    teacher = other.eval()
    with torch.no_grad():
        features = teacher.features(IMAGE.double())
        wanted = teacher.class_logits(features.fused)
    torch.manual_seed(0)
    network.load_state_dict(other.state_dict())
    ours = objective(network, IMAGE.double(), HIDDEN, TARGETS, fixed, RandomPoints(random()), teacher=other)
    torch.manual_seed(0)
    rgb, thermal = (network.branch(name, IMAGE.double(), HIDDEN) for name in ("rgb", "thermal"))
    student = network.class_logits(network.fuse(rgb, thermal, HIDDEN, masked=True))
    expected = DISTILLATIONS["l1_logits"].distance(Output(wanted), Output(student), None)
    torch.testing.assert_close(ours.terms["complementary"], expected)
    assert distances["train"] != pytest.approx(distances["eval"], rel=1e-3)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_another_teacher_than_the_step_itself_needs_no_clean_fused_pass_with_gradient(teacher):
    loss = replace(LOSS, fused=0.0, teacher=teacher)
    assert ("fused" in needed_passes(loss)) == (teacher == "train")


def test_distilling_features_needs_no_head_pass_of_its_own(model):
    loss = replace(LOSS, masked=0.0, distillation="feature_mse")
    assert list(needed_passes(loss)) == ["fused", "rgb", "thermal"]
    assert {"complementary", "non_local"} <= run(model.double(), loss).terms.keys()


SUBSETS = [names for names in product((0.0, 1.0), repeat=4) if any(names)]


@pytest.mark.parametrize("distilled", [0.0, 1.0])
@pytest.mark.parametrize("on", SUBSETS)
def test_every_combination_of_supervision_trains_what_it_supervises(on, distilled):
    network = tiny()
    weights = dict(zip(("fused", "rgb", "thermal", "masked"), on, strict=True))
    losses = run(network, replace(LOSS, **weights, complementary=distilled, non_local=distilled))
    assert losses.total.isfinite()
    assert list(losses.terms) == [name for name in TERMS if weights.get(name, distilled)]
    reached = gradients(network, losses)
    fused = bool(weights["fused"] or weights["masked"])
    for branch in ("rgb", "thermal"):
        wanted = fused or bool(weights[branch]) or bool(distilled)
        assert any(name.startswith(f"backbone.{branch}.") for name in reached) == wanted
    assert ("backbone.fusion_norms.0.weight" in reached) == (fused or bool(distilled))


@pytest.mark.parametrize("name", ["rgb_masked", "thermal_masked"])
def test_a_masked_modality_can_be_supervised_alone(model, name):
    loss = replace(LOSS, **OFF, **{name: 1.0})
    losses = run(model.double(), loss)
    assert list(losses.terms) == [name] and list(needed_passes(loss)) == [name]
    blind = HIDDEN.clone()
    blind[:, int(name == "rgb_masked")] = True  # the other modality is not looked at
    again = objective(model, IMAGE.double(), blind, TARGETS, loss, ReleasedPoints(random(3)))
    assert again.terms[name] == losses.terms[name]


def test_the_names_of_supervised_terms_are_those_of_the_passes():
    assert list(needed_passes(ALL)) == list(SUPERVISED)


def test_a_view_is_supervised_by_its_own_labels():
    """The masked pass on a view without masks is the fused pass on the view's images and labels."""
    for head_passes in ("batched", "streamed"):
        loss = replace(LOSS, **{**OFF, "masked": 1.0})
        masked = objective(tiny(), IMAGE, None, TARGETS, loss, RandomPoints(random()), head_passes, view=OTHER)
        loss = replace(LOSS, **{**OFF, "fused": 1.0})
        fused = objective(tiny(), OTHER.image, None, OTHER.targets, loss, RandomPoints(random()), head_passes)
        torch.testing.assert_close(masked.terms["masked"], fused.terms["fused"])


def test_two_plain_views_are_as_many_passes_as_crm(model, monkeypatch):
    """The compute-matched control; what differs is that its two last passes are supervised and not distilled into."""
    control = replace(ALL, complementary=0.0, non_local=0.0)
    images = {"branch": 0, "head": 0}
    for name in images:
        original = getattr(model, name)

        def counted(*args, name=name, original=original, **how):
            images[name] += len(args[1] if name == "branch" else args[0][0])
            return original(*args, **how)

        monkeypatch.setattr(model, name, counted)
    supervised = []

    class Counting(RandomPoints):
        def __call__(self, plan):
            supervised.extend(plan.passes)
            return super().__call__(plan)

    image = IMAGE.to(next(model.parameters()).dtype)
    view = replace(OTHER, image=OTHER.image.to(image.dtype))
    found = {}
    for name, loss, how in (("CRM", LOSS, {}), ("control", control, {"view": view})):
        images.update(branch=0, head=0)
        supervised.clear()
        objective(model, image, None if how else HIDDEN, TARGETS, loss, Counting(random()), **how)
        found[name] = {**{part: count / len(image) for part, count in images.items()}, "supervised": len(supervised)}
    assert found["CRM"] == {"branch": 4, "head": 6, "supervised": 4}
    assert found["control"] == {"branch": 4, "head": 6, "supervised": 6}


@pytest.mark.parametrize("fill", FILLS)
def test_a_fill_is_what_the_masked_passes_see(fill):
    loss = replace(LOSS, **{**OFF, "masked": 1.0})
    ours = objective(tiny(), IMAGE, HIDDEN, TARGETS, loss, RandomPoints(random()), fill=fill)
    seen, tokens = FILLS[fill](IMAGE, HIDDEN)
    other = objective(tiny(), seen, tokens, TARGETS, loss, RandomPoints(random()), view=View(seen, TARGETS))
    torch.testing.assert_close(ours.terms["masked"], other.terms["masked"])


def test_the_assignment_is_the_cheapest_of_all():
    costs = torch.randn(20, 5, 3, generator=random())
    present = [[1, 4, 7][: row % 4] for row in range(20)]
    pairs = assign(costs, present)
    for row, classes in enumerate(present):
        own = pairs.row == row
        assert sorted(pairs.category[own].tolist()) == classes
        columns = [classes.index(category) for category in pairs.category[own].tolist()]
        found = costs[row, pairs.query[own], columns].sum().item()
        choices = permutations(range(5), len(classes))
        best = min(sum(costs[row, q, c].item() for c, q in enumerate(choice)) for choice in choices)
        assert found == pytest.approx(best, abs=1e-5)


def test_more_classes_than_queries_leave_some_unmatched():
    pairs = assign(torch.randn(1, 2, 3), [[0, 1, 2]])
    assert pairs.query.tolist() == [0, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_costs_that_are_not_finite_say_so(value):
    costs = torch.zeros(3, 2, 2)
    costs[1, 0, 0] = value
    with pytest.raises(FloatingPointError, match="1 of 3 decoder outputs are not finite"):
        assign(costs, [[0, 1]] * 3)


def test_labels_read_at_points_equal_masks_sampled_there():
    labels = torch.randint(0, 3, (2, 6, 9), generator=random(), dtype=torch.uint8)
    points = torch.cat([torch.rand(2, 200, 2, generator=random()), torch.tensor([[[0.0, 0.0], [1.0, 1.0]]] * 2)], dim=1)
    targets = make_targets(labels, 3, IGNORE)
    shares = class_shares(label_corners(targets.labels, torch.arange(2), points), torch.arange(3).expand(2, -1))
    masks = F.one_hot(labels.long(), 3).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(shares, sample_maps(masks, points), rtol=0, atol=1e-5)


def test_many_maps_sampled_as_a_table_equal_grid_sample():
    maps = torch.randn(2, 20, 6, 9, dtype=torch.float64, generator=random())
    points = torch.cat([torch.rand(2, 200, 2, generator=random()), torch.tensor([[[0.0, 0.0], [1.0, 1.0]]] * 2)], dim=1)
    expected = F.grid_sample(maps, 2 * points.double()[:, None] - 1, align_corners=False)[:, :, 0]
    torch.testing.assert_close(sample_maps(maps, points.double()), expected)
    spread = maps.clone().requires_grad_()  # with a gradient it is grid_sample
    assert sample_maps(spread, points.double()).requires_grad


def test_targets_know_the_classes_the_padding_and_what_is_ignored():
    labels = torch.tensor([[[0, 2], [7, 2]], [[1, 1], [1, 1]]], dtype=torch.uint8)
    targets = make_targets(labels, 3, 7, padded=(2, 3), valid=[(2, 2), (1, 2)])
    assert targets.classes == ((0, 2), (1,))
    assert (sum(map(len, targets.classes)), targets.ignored, targets.padded) == (3, True, True)
    assert (targets.labels[:, 0, 1:3] == OUTSIDE).all()
    assert (targets.labels[1, 2:, 1:] == PADDED).all()


def test_an_impossible_label_is_refused():
    with pytest.raises(ValueError, match=r"labels contain \[5\]; classes are 0 to 2, ignored is 255"):
        make_targets(torch.full((1, 2, 2), 5, dtype=torch.uint8), 3, IGNORE)


def test_random_points_repeat_under_a_seed_and_fill_the_image():
    plan = Plan(["fused"], 2, [3, 4], match=50, candidates=300, extra=10, device=torch.device("cpu"))
    first, again = (RandomPoints(random(7))(plan) for _ in range(2))
    assert torch.equal(first.match(slice(0, 4)), again.match(slice(0, 4)))
    candidates, extra = first.loss(slice(0, 14))
    assert candidates.shape == (14, 300, 2)
    assert extra.shape == (14, 10, 2)
    assert (candidates >= 0).all()
    assert (candidates < 1).all()
    counts = torch.histc(candidates[..., 0], bins=4, min=0, max=1)
    assert (counts / counts.sum() - 0.25).abs().max() < 0.03


def test_released_points_are_drawn_output_by_output_the_last_first():
    plan = Plan(["fused", "rgb"], 2, [1, 2], match=2, candidates=4, extra=1, device=torch.device("cpu"))
    draw, stream = ReleasedPoints(random())(plan), random()
    last = [torch.rand(1, 2, 2, generator=stream) for _ in range(2)]
    tried = torch.rand(3, 4, 2, generator=stream)
    rows = draw.match(slice(0, plan.rows))
    assert torch.equal(rows[[1, 3]], torch.cat(last))  # rows: image 0 output 0, image 0 output 1, image 1 ...
    assert torch.equal(draw.loss(slice(0, 12))[0][[1, 4, 5]], tried)


def test_class_loss_is_the_weighted_mean_of_pytorch():
    logits, target = torch.randn(2, 6, 5, generator=random()), torch.tensor([[0, 4, 4, 4, 1, 4], [4, 4, 2, 4, 4, 4]])
    weight = torch.tensor([1, 1, 1, 1, 0.1])
    expected = F.cross_entropy(logits.flatten(0, 1), target.flatten(), weight)
    torch.testing.assert_close(class_loss(logits, target, 0.1), expected)


def test_mask_losses_with_full_weight_equal_those_without():
    values, target = torch.randn(3, 20), (torch.rand(3, 20) < 0.5).float()
    expected = F.binary_cross_entropy_with_logits(values, target, reduction="none").mean(1)
    torch.testing.assert_close(mask_loss(values, target, None), expected)
    for each in (mask_loss, dice_loss):
        torch.testing.assert_close(each(values, target, None), each(values, target, torch.ones(3, 20)))
    assert (dice_loss(100 * (2 * target - 1), target, None) < 1e-6).all()
