"""What a run is: settings, their written form, and the identity that follows from them."""

import json
from dataclasses import asdict, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crm.config import (
    TERMS,
    Config,
    Loss,
    Masking,
    Model,
    Optim,
    difference,
    flatten,
    override,
    parse_set,
    plain,
    run_id,
    seeded,
)  # fmt: skip
from experiments.synthetic_small import config as small


def test_the_written_form_is_flat_and_reads_back_to_the_same_config():
    written = json.loads(json.dumps(flatten(small)))
    assert written["masking.patch"] == 16
    assert not any(isinstance(value, dict) for value in written.values())
    assert override(Config(), written) == small
    assert run_id(override(Config(), written)) == run_id(small)


def test_override_replaces_several_parts_together_and_leaves_the_rest():
    changed = override(Config(), {"masking.ratio": 0.3, "masking.patch": 16, "seed": 2})
    assert difference(changed, Config()) == {"masking.ratio": 0.3, "masking.patch": 16, "seed": 2}


def test_overrides_that_only_work_together_are_checked_together():
    with pytest.raises(ValueError, match=r"data\.crop"):
        override(Config(), {"data.size": (64, 96)})
    fits = override(Config(), {"data.size": (64, 96), "data.crop": (64, 96), "data.scale": (1.0, 1.0)})
    assert fits.data.crop == (64, 96)


def test_an_unknown_setting_is_refused_with_the_probable_one_and_those_that_exist():
    with pytest.raises(ValueError, match=r"no setting 'masking\.ration'\. Did you mean 'masking\.ratio'\?") as refusal:
        override(Config(), {"masking.ration": 0.3})
    assert "masking.patch" in str(refusal.value)
    assert "optim.lr" not in str(refusal.value)  # the settings of the part that was meant, not all of them


@pytest.mark.parametrize("path", ["masking", "seed.x", "maskin.ratio", ""])
def test_a_path_that_names_no_leaf_is_refused(path):
    with pytest.raises(ValueError, match="no setting"):
        override(Config(), {path: 1})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("masking.ratio", "0.3"),
        ("masking.ratio", True),
        ("steps", 2.5),
        ("steps", True),
        ("masking.kind", 1),
        ("loss.count_padding", 1),
        ("model.depths", (2, 2, 6)),
        ("model.depths", (2, 2, 6, 2.5)),
        ("model.depths", 2),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_naming_the_setting(path, value):
    with pytest.raises(ValueError, match=path.replace(".", r"\.")):
        override(Config(), {path: value})


def test_json_forms_stand_in_for_float_and_tuple_without_changing_the_identity():
    whole, listed = override(Config(), {"masking.drop": 0}), override(Config(), {"model.depths": [2, 2, 18, 2]})
    assert isinstance(whole.masking.drop, float)
    assert run_id(whole) == run_id(Config(masking=Masking(drop=0.0)))
    assert run_id(listed) == run_id(Config(model=Model(depths=(2, 2, 18, 2))))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("batch", 0),
        ("steps", -1),
        ("masking.ratio", 1.2),
        ("masking.ratio", float("nan")),
        ("masking.drop", 0.6),
        ("masking.patch", 6),
        ("model.heads", (3, 6, 12, 23)),
        ("model.width", 100),
        ("model.share_from", 5),
        ("data.scale", (2.0, 0.5)),
        ("data.crop", (480, 640)),
        ("loss.masked", -1.0),
        ("masking.kind", "none"),
    ],
)
def test_a_value_that_cannot_work_is_refused_naming_the_setting(path, value):
    with pytest.raises(ValueError, match=path.replace(".", r"\.")):
        override(Config(), {path: value})


def test_a_run_that_supervises_nothing_is_refused():
    with pytest.raises(ValueError, match=r"loss\.fused"):
        Config(loss=Loss(fused=0.0, rgb=0.0, thermal=0.0, masked=0.0))


def test_every_weighted_term_is_a_field_of_the_loss():
    assert set(TERMS) <= {f.name for f in fields(Loss)}


def test_the_defaults_have_the_identity_they_were_recorded_under():
    # A changed id orphans every finished run, so it changes on purpose only.
    assert run_id(Config()) == "44136fa355b3"


def test_the_identity_is_twelve_hex_digits_of_what_differs_from_the_defaults():
    ids = {run_id(Config(seed=seed)) for seed in range(20)}
    assert len(ids) == 20
    assert all(len(name) == 12 and int(name, 16) >= 0 for name in ids)
    assert run_id(Config(seed=0, optim=Optim(lr=1e-4))) == run_id(Config())


@given(ratio=st.floats(0, 1), patch=st.integers(1, 64).map(lambda n: 4 * n), seed=st.integers(0, 2**31))
def test_any_config_survives_its_written_form(ratio, patch, seed):
    config = Config(masking=Masking(ratio=ratio, patch=patch), seed=seed)
    again = override(Config(), json.loads(json.dumps(flatten(config))))
    assert (again, run_id(again)) == (config, run_id(config))


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("masking.ratio=0.3", ("masking.ratio", 0.3)),
        ("optim.lr = 1e-3", ("optim.lr", 1e-3)),
        ("model.depths=(2, 2, 2, 2)", ("model.depths", (2, 2, 2, 2))),
        ("masking.kind=none", ("masking.kind", "none")),
        ("loss.count_padding=true", ("loss.count_padding", True)),
        ("masking.kind=a=b", ("masking.kind", "a=b")),
    ],
)
def test_a_setting_typed_on_the_command_line_becomes_a_path_and_a_value(text, parsed):
    assert parse_set(text) == parsed


def test_a_typed_setting_without_a_value_is_refused_with_an_example():
    with pytest.raises(ValueError, match=r"path=value, as in masking\.ratio=0\.3"):
        parse_set("masking.ratio")


def test_another_seed_is_the_config_that_override_makes():
    config = override(Config(), {"masking.ratio": 0.3})
    assert run_id(config)  # which remembers it
    made = seeded(config, 7)
    assert made == override(config, {"seed": 7})
    assert run_id(made) == run_id(override(config, {"seed": 7})) != run_id(config)
    with pytest.raises(ValueError, match="seed takes a int"):
        seeded(config, True)


def test_the_written_forms_hold_every_field_in_order():
    config = override(Config(), {"model.depths": (1, 2, 1, 1), "steps": 9})
    expected = {}
    for name, value in asdict(config).items():
        expected |= (
            {f"{name}.{inner}": each for inner, each in value.items()} if isinstance(value, dict) else {name: value}
        )
    assert list(flatten(config).items()) == list(expected.items())
    assert plain(config) == json.loads(json.dumps(expected))
    assert flatten(config.masking, "masking.") == {
        path: value for path, value in expected.items() if path.startswith("masking.")
    }
