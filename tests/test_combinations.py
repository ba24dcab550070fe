"""All alternatives with all others: every pair that makes sense trains together, every other is refused by name.

A design that covers pairs: each pair of values of any two axes occurs in at least one config that is trained for a step
and evaluated. Axes and values are read from the families, so an alternative that is added to one is in it.
"""

import random
import re
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from crm.conditions import CLEAN_TEST, MISSING
from crm.config import OF_MASKED_INPUT, TERMS, Config, alternatives, flatten, override
from crm.data.dataset import open_run_split
from crm.data.loader import make_batch
from crm.distillation import SOFTENED
from crm.evaluate import evaluate
from crm.records import open_run
from crm.step import Trainer
from crm.weights.files import read_source
from crm.weights.imports import import_backbone
from crm.weights.initial import initialise
from crm.worker import DONE, attempt
from tests.tiny import TINY, machine

BASE = override(
    TINY,
    {"data.train_images": 4, "loss.points": 32, "model.window": 7, "model.depths": (1, 2, 1, 1), "model.queries": 8,
     "steps": 1, "val_every": 0},
)  # fmt: skip
RUN = override(BASE, {"seed": 9})  # which others start from

Value = dict[str, object]  # settings
Axes = dict[str, dict[str, Value]]
Choice = dict[str, str]  # axis to the name of its value


def one_of(path: str, **besides: Value) -> dict[str, Value]:
    """A value for each alternative of a setting."""
    return {name: {path: name, **besides.get(name, {})} for name in alternatives(path)}


def weights(*above_0: str) -> Value:
    return {f"loss.{name}": float(name in above_0) for name in TERMS if name not in ("complementary", "non_local")}


AXES: Axes = {
    "network": {
        **one_of("model.fusion"),
        **{f"inputs {name}": {"model.inputs": name} for name in alternatives("model.inputs") if name != "both"},
    },
    "masks": one_of("masking.kind"),
    "shape": one_of("masking.shape"),
    "fill": one_of("masking.fill"),
    "view": one_of("masking.view"),
    "overlap": {"none": {}, "half": {"masking.overlap": 0.5}},
    "distilled": {
        "both": {},
        "SDC": {"loss.non_local": 0.0},
        "SDN": {"loss.complementary": 0.0},
        "off": {"loss.complementary": 0.0, "loss.non_local": 0.0},
    },
    "form": {
        **one_of("loss.distillation"),
        **{f"{name}, T 3": {"loss.distillation": name, "loss.temperature": 3.0} for name in SOFTENED},
    },
    "teacher": one_of("loss.teacher", ema={"optim.ema": 0.9}),
    "norm": one_of("model.fusion_norm"),
    "supervised": {
        "fused": weights("fused"),
        "fused and masked": weights("fused", "masked"),
        "masked": weights("masked"),
        "MWS": weights("fused", "rgb", "thermal"),
        "RGB and thermal": weights("rgb", "thermal"),
        "RGB and thermal, twice": weights("rgb", "thermal", "rgb_masked", "thermal_masked"),
        "CRM": weights("fused", "rgb", "thermal", "masked"),
        "all six": weights("fused", "rgb", "thermal", "masked", "rgb_masked", "thermal_masked"),
    },
    "sharing": {"none": {}, "half": {"model.share_from": 2}},
    "start": {
        "scratch": {"model.init": "none"},
        "Swin": {"model.init": "swin"},
        "Swin, stem sum": {"model.init": "swin", "model.thermal_stem": "sum"},
        "run": {"model.init": "run"},
    },
}
# where a search begins: configs that are accepted, from which one axis after the other is changed
CRM = {
    "network": "max", "masks": "random_complementary", "shape": "patch", "fill": "token", "view": "clean",
    "overlap": "none", "distilled": "both", "form": "l1_logits", "teacher": "train", "norm": "shared",
    "supervised": "CRM", "sharing": "none", "start": "scratch",
}  # fmt: skip
PLAIN = {**CRM, "masks": "none", "distilled": "off", "supervised": "fused"}
TEMPLATES: list[Choice] = [
    CRM,
    {**CRM, "start": "Swin"},
    {**CRM, "masks": "complementary"},
    {**CRM, "distilled": "off"},
    {**CRM, "view": "corrupted", "masks": "none"},
    {**CRM, "view": "second", "distilled": "off"},
    {**CRM, "supervised": "fused and masked", "distilled": "SDC"},
    PLAIN,
    {**PLAIN, "start": "Swin"},
    {**PLAIN, "supervised": "MWS"},
    {**PLAIN, "view": "second", "supervised": "fused and masked"},
    {**PLAIN, "network": "inputs rgb"},
    {**PLAIN, "network": "inputs rgb", "view": "corrupted", "supervised": "fused and masked", "distilled": "SDC"},
    {**PLAIN, "network": "inputs late", "supervised": "RGB and thermal"},
    {**PLAIN, "network": "inputs late", "view": "second", "supervised": "RGB and thermal, twice"},
    {**PLAIN, "network": "inputs rgb", "view": "corrupted", "supervised": "masked"},
    {**CRM, "network": "inputs early", "fill": "mean", "supervised": "fused and masked", "distilled": "SDC"},
    {**CRM, "network": "inputs early", "fill": "mean", "supervised": "fused and masked", "distilled": "off"},
]


def made(choice: Choice) -> Config:
    """The config; ValueError says why it makes no sense."""
    return override(BASE, {path: value for axis, name in choice.items() for path, value in AXES[axis][name].items()})


def refusal(choice: Choice) -> str:
    """Why a config is refused; "" where it is accepted."""
    try:
        made(choice)
    except ValueError as error:
        return str(error)
    return ""


Pair = tuple[tuple[str, str], tuple[str, str]]


def pairs(choice: Choice) -> set[Pair]:
    return set(combinations(choice.items(), 2))


@cache
def design() -> tuple[list[Choice], dict[Pair, set[str]]]:
    """Choices that cover every pair that some template accepts; the others, with what they were refused for."""
    rng = random.Random(0)
    values = [(axis, name) for axis in AXES for name in AXES[axis]]
    wanted = [(one, other) for one, other in combinations(values, 2) if one[0] != other[0]]
    rng.shuffle(wanted)
    covered: set[Pair] = set()
    choices, refused = [], {}
    for pair in wanted:
        if pair in covered:
            continue
        reasons, best = set(), None
        for template in rng.sample(TEMPLATES, len(TEMPLATES)):
            choice = {**template, **dict(pair)}
            if not (why := refusal(choice)):
                best = choice
                break
            reasons.add(why)
        if best is None:
            refused[pair] = reasons
            continue
        for axis in rng.sample([axis for axis in AXES if axis not in dict(pair)], len(AXES) - 2):
            more = {name: len(pairs({**best, axis: name}) - covered) for name in AXES[axis]}
            name = max(more, key=lambda name: more[name])  # which covers most; the other ones stay uncovered for now
            if more[name] > more[best[axis]] and not refusal({**best, axis: name}):
                best = {**best, axis: name}
        choices.append(best)
        covered |= pairs(best)
    return choices, refused


def test_every_member_of_every_family_is_in_a_config_that_is_trained():
    choices, _ = design()
    assert {item for choice in choices for item in choice.items()} == {
        (axis, name) for axis in AXES for name in AXES[axis]
    }


def names(axis: str) -> set[str]:
    """The settings that an axis is about."""
    return set().union(*(set(value) for value in AXES[axis].values()))


def test_a_pair_that_makes_no_sense_is_refused_by_the_names_of_both():
    """In one message, or where a third setting stands between them, in the messages of its values."""
    _, refused = design()
    for (one, other), reasons in refused.items():
        said = set(re.findall(r"\b(?:model|masking|loss|optim|data)\.\w+", " ".join(reasons)))
        assert said & names(one[0]) and said & names(other[0]), (one, other, reasons)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("network", "inputs late"), ("masks", "complementary")),
        (("network", "inputs rgb"), ("norm", "frozen")),
        (("network", "inputs early"), ("sharing", "half")),
        (("masks", "individual"), ("overlap", "half")),
        (("shape", "square"), ("overlap", "half")),
        (("view", "cutmix"), ("distilled", "SDC")),
        (("start", "Swin, stem sum"), ("network", "inputs rgb")),
    ],
)
def test_some_pairs_make_no_sense_with_anything(one, other):
    assert {(one, other), (other, one)} & design()[1].keys()


# ---------------------------------------------------------------------------------------------- trained

PARTS = 6  # so that several processes can share them


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a Swin in weights/ and trained runs in runs/, by what their branches share."""
    from timm.models.swin_transformer import SwinTransformer

    root = tmp_path_factory.mktemp("home")
    swin = SwinTransformer(embed_dim=8, num_heads=(1, 2, 4, 8), depths=(1, 2, 1, 1), num_classes=10)
    save_file(swin.state_dict(), root / "model.safetensors")
    import_backbone(read_source(root / "model.safetensors"), root / "weights", name="swin")
    for config in (RUN, override(RUN, {"model.share_from": 2})):
        folder = open_run(root / "runs", config)
        assert attempt(folder, machine(root / "runs"), "token", "last", [], lambda: False, lambda told: None) == DONE
        folder.rename(root / "runs" / f"run{config.model.share_from}")
    return root


def carry_out(config: Config, home: Path) -> None:
    """A step of training, and an evaluation with and without either modality."""
    if config.model.init == "run":
        config = override(config, {"model.init": f"run{config.model.share_from}"})
    train, test = (open_run_split(config.data, name, None) for name in ("train", "test"))
    trainer = Trainer(config, machine(home / "runs"), train.spec, epoch_steps=2)
    initialise(trainer.model, config.model, home / "weights", home / "runs", train.spec.classes)
    trainer.begin()
    step = trainer.step(make_batch(config, train, 0), 0)
    wanted = {name for name in TERMS if getattr(config.loss, name)}
    assert step.terms.keys() - {"sparsity"} == wanted
    assert np.isfinite(list(step.terms.values())).all() and step.grad_norm > 0
    assert (config.masking.kind == "none") <= (step.hidden["rgb"] == step.hidden["thermal"] == 0)
    if "complementary" in config.masking.kind and not config.masking.overlap:
        assert step.hidden["both"] == 0
    for _, result in evaluate(trainer.evaluated, test.only(range(1)), [CLEAN_TEST, *MISSING], 1, "cpu"):
        assert result.confusion.sum() == np.prod(config.data.size)


@pytest.mark.parametrize("part", range(PARTS))
def test_every_pair_that_makes_sense_trains_and_is_evaluated(part, home):
    torch.set_num_threads(1)
    choices, _ = design()
    failed = []
    for choice in choices[part::PARTS]:
        try:
            carry_out(made(choice), home)
        except (AssertionError, ValueError, RuntimeError, TypeError, KeyError, IndexError) as error:
            failed.append(f"{choice}: {type(error).__name__}: {error}")
    assert not failed, "\n".join(failed)


def test_the_published_setting_is_the_default_of_every_axis():
    """So that no alternative has moved it: CRM with everything at its default is the base, whatever is added."""
    assert {path for path, value in flatten(made(CRM)).items() if value != flatten(BASE)[path]} == set()
    default = flatten(Config())
    released = {"model.fusion": "max", "masking.kind": "random_complementary", "masking.shape": "patch",
                "masking.fill": "token", "masking.view": "clean", "masking.overlap": 0.0, "masking.probability": 1.0,
                "loss.distillation": "l1_logits", "loss.teacher": "train", "loss.temperature": 1.0,
                "model.fusion_norm": "shared", "model.inputs": "both", "model.share_from": 4,
                "model.thermal_stem": "mean", "optim.ema": 0.0}  # fmt: skip
    assert {path: default[path] for path in released} == released
    assert {name: default[f"loss.{name}"] for name in TERMS} == {
        name: 0.0 if name in ("rgb_masked", "thermal_masked") else 1.0 for name in TERMS
    }
    assert {*OF_MASKED_INPUT} <= {*TERMS}
