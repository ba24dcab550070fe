"""Every form of self-distillation against an independent formula, and what they all have in common."""

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from scipy.stats import entropy
from sklearn.metrics import mean_squared_error

from crm.distillation import (
    DISTILLATIONS,
    SOFTENED,
    TEACHERS,
    Output,
    distance,
    evaluating,
    feature_mse,
    l1_aligned,
    pixel_kl,
)

B, Q, K, SIZE = 3, 5, 4, (6, 8)
FORMS = pytest.mark.parametrize("name", DISTILLATIONS)


def output(seed: int, requires_grad: bool = False) -> Output:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_(requires_grad)

    maps = [drawn(B, 8 * 2**i, SIZE[0] // 2**i or 1, SIZE[1] // 2**i) for i in range(4)]
    return Output(drawn(B, Q, K), drawn(B, Q, *SIZE), maps)


def leaves(of: Output) -> list[torch.Tensor]:
    assert of.class_logits is not None and of.mask_logits is not None and of.maps is not None
    return [of.class_logits, of.mask_logits, *of.maps]


def images(of: Output, part: slice) -> Output:
    classes, masks, *maps = (tensor[part] for tensor in leaves(of))
    return Output(classes, masks, maps)


def numbers(of: Output) -> list[np.ndarray]:
    return [tensor.detach().double().numpy() for tensor in leaves(of)]


# ---------------------------------------------------------------------------------------------- the contract


@FORMS
def test_it_is_0_if_the_student_says_what_the_teacher_says(name):
    assert DISTILLATIONS[name].distance(output(1), output(1), None).item() == pytest.approx(0, abs=1e-7)
    assert DISTILLATIONS[name].distance(output(1), output(2), None).item() > 0.01


@FORMS
def test_the_student_gets_a_gradient_and_the_teacher_none(name):
    teacher, student = output(1, requires_grad=True), output(2, requires_grad=True)
    DISTILLATIONS[name].distance(teacher, student, None).backward()
    assert all(tensor.grad is None for tensor in leaves(teacher))
    reached = [tensor for tensor in leaves(student) if tensor.grad is not None and tensor.grad.any()]
    wanted = student._asdict()
    needed = [
        each for field in DISTILLATIONS[name].needs for each in ([wanted[field]] if field != "maps" else student.maps)
    ]
    assert {id(tensor) for tensor in reached} == {id(tensor) for tensor in needed}


@FORMS
def test_a_step_against_the_gradient_brings_the_student_nearer(name):
    teacher, student = output(1), output(2, requires_grad=True)
    before = DISTILLATIONS[name].distance(teacher, student, None)
    before.backward()
    moved = [t.detach() if t.grad is None else t.detach() - 0.1 * t.grad / t.grad.norm() for t in leaves(student)]
    assert DISTILLATIONS[name].distance(teacher, Output(moved[0], moved[1], moved[2:]), None) < before


@FORMS
def test_it_is_the_mean_over_the_images(name):
    teacher, student = output(1), output(2)
    parts = [(slice(0, 1), 1), (slice(1, 3), 2)]
    found = [
        DISTILLATIONS[name].distance(images(teacher, part), images(student, part), None) * size for part, size in parts
    ]
    torch.testing.assert_close(sum(found) / B, DISTILLATIONS[name].distance(teacher, student, None))


@FORMS
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_it_is_finite_whatever_the_logits(name, scale):
    teacher = output(1)
    student = Output(*(t * scale if isinstance(t, torch.Tensor) else t for t in output(2)))
    for tensor in (inputs := leaves(student)):
        tensor.requires_grad_()
    distance = DISTILLATIONS[name].distance(teacher, student, None)
    assert distance.isfinite()
    gradients = torch.autograd.grad(distance, inputs, allow_unused=True)
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


# ---------------------------------------------------------------------------------------------- each by its formula


def reference(name: str, teacher: Output, student: Output) -> float:
    """In float64 with SciPy, image by image and query by query."""
    (wanted, masks, *maps), (found, other, *others) = numbers(teacher), numbers(student)
    probabilities = softmax(wanted, axis=2), softmax(found, axis=2)
    if name == "l1_logits":
        return np.mean([abs(wanted[b, q, k] - found[b, q, k]) for b in range(B) for q in range(Q) for k in range(K)])
    if name == "l1_classes":
        return np.mean(
            [abs(wanted[b, q, k] - found[b, q, k]) for b in range(B) for q in range(Q) for k in range(K - 1)]
        )
    if name == "l1_softmax":
        return np.abs(probabilities[0] - probabilities[1]).mean()
    if name == "kl":
        return np.mean([entropy(probabilities[0][b, q], probabilities[1][b, q]) for b in range(B) for q in range(Q)])
    if name == "l1_aligned":  # every order of the student's queries
        orders = [list(order) for order in permutations(range(Q))]
        return np.mean([min(np.abs(wanted[b] - found[b][order]).mean() for order in orders) for b in range(B)])
    if name == "pixel_kl":
        scores = [
            np.einsum("bqk,bqhw->bhwk", p[..., :-1], expit(m))
            for p, m in zip(probabilities, (masks, other), strict=True)
        ]
        return entropy(scores[0], scores[1], axis=-1).mean()  # entropy normalises
    if name == "feature_mse":
        return np.mean([mean_squared_error(a.ravel(), b.ravel()) for a, b in zip(maps, others, strict=True)])
    raise AssertionError(f"{name} has no independent formula here")


@FORMS
def test_it_equals_its_formula(name):
    teacher, student = output(3), output(4)
    ours = DISTILLATIONS[name].distance(teacher, student, None).item()
    assert ours == pytest.approx(reference(name, teacher, student), rel=1e-5)


# ---------------------------------------------------------------------------------------------- what sets forms apart


def test_aligned_queries_may_stand_in_any_order():
    teacher = output(1)
    assert teacher.class_logits is not None
    shuffled = Output(teacher.class_logits[:, torch.randperm(Q)])
    assert l1_aligned(teacher, shuffled, None) == 0
    assert DISTILLATIONS["l1_logits"].distance(teacher, shuffled, None) > 0


def test_logits_to_align_that_are_not_finite_say_so():
    with pytest.raises(FloatingPointError, match="training has diverged"):
        l1_aligned(output(1), Output(torch.full((B, Q, K), torch.nan)), None)


@pytest.mark.parametrize(("name", "notices"), [("l1_logits", True), ("l1_classes", False), ("kl", True)])
def test_the_no_object_column_counts_where_the_form_says(name, notices):
    teacher = output(1)
    assert teacher.class_logits is not None
    changed = teacher.class_logits.clone()
    changed[..., -1] += 1
    assert (DISTILLATIONS[name].distance(teacher, Output(changed), None) > 0) == notices


@pytest.mark.parametrize(("name", "notices"), [("l1_logits", True), ("l1_softmax", False), ("kl", False)])
def test_a_common_shift_of_the_logits_counts_where_the_form_says(name, notices):
    teacher = output(1)
    assert teacher.class_logits is not None
    distance = DISTILLATIONS[name].distance(teacher, Output(teacher.class_logits + 3), None)
    assert (distance > 1e-5) == notices


def test_pixels_of_the_padding_do_not_count():
    teacher, student = output(1), output(2)
    assert student.class_logits is not None and student.mask_logits is not None
    counted = torch.ones(B, *SIZE, dtype=torch.bool)
    counted[:, :, 5:] = False
    masks = student.mask_logits.clone()
    masks[..., 5:] += 4
    cut = [pixel_kl(teacher, Output(student.class_logits, each), counted) for each in (masks, student.mask_logits)]
    assert cut[0] == cut[1]
    whole = pixel_kl(teacher, student, torch.ones_like(counted))
    torch.testing.assert_close(whole, pixel_kl(teacher, student, None))
    assert whole != cut[0]


def test_features_of_different_levels_weigh_the_same():
    teacher = output(1)
    assert teacher.maps is not None
    for level in range(4):
        maps = [each + (i == level) for i, each in enumerate(teacher.maps)]
        assert feature_mse(teacher, Output(maps=maps), None).item() == pytest.approx(0.25)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_temperature_softens_both_distributions_and_puts_the_distance_back_to_scale(temperature):
    teacher, student = output(3), output(4)
    wanted, found = (softmax(numbers(each)[0] / temperature, axis=2) for each in (teacher, student))
    expected = temperature**2 * np.mean([entropy(wanted[b, q], found[b, q]) for b in range(B) for q in range(Q)])
    assert distance("kl", teacher, student, None, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_a_high_temperature_is_half_the_variance_of_the_difference_of_logits():
    """The limit of Hinton et al. 2015, section 2.1: matching logits, whatever is common to a query's taken off."""
    teacher, student = (Output(output(seed).class_logits.double()) for seed in (3, 4))
    apart = (teacher.class_logits - student.class_logits).numpy()
    expected = (apart - apart.mean(2, keepdims=True)).var(2).mean() / 2
    assert distance("kl", teacher, student, None, 300.0).item() == pytest.approx(expected, rel=0.02)


@FORMS
def test_at_temperature_1_a_form_is_what_it_is(name):
    teacher, student = output(1), output(2)
    assert distance(name, teacher, student, None) == DISTILLATIONS[name].distance(teacher, student, None)


def test_what_can_be_softened_is_a_form():
    assert SOFTENED.keys() <= DISTILLATIONS.keys()


def test_asking_a_teacher_leaves_every_part_in_its_mode():
    network = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    network.train()
    network[1].eval()
    with evaluating(network):
        assert not any(part.training for part in network.modules())
        assert not network(torch.randn(4, 3)).requires_grad
    assert [part.training for part in network] == [True, False, True] and torch.is_grad_enabled()


def test_there_is_a_teacher_for_each_choice():
    assert list(TEACHERS) == ["train", "eval", "ema"]
