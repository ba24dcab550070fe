"""What training starts from: `model.init` names a file of the weights folder, or a finished run."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from crm.checkpoint import load_checkpoint
from crm.cli import app, main
from crm.config import Config, override, run_id
from crm.data.specs import DATASETS
from crm.model.fusion import FUSIONS
from crm.model.segmenter import Segmenter, build_segmenter
from crm.records import file_hash, open_run, read_json
from crm.weights.initial import initialise
from crm.worker import DONE, FAILED, attempt
from tests.test_fusion import CONTROLS
from tests.test_weights import mask2former
from tests.tiny import TINY, TINY_SETS, machine

START = {"model.init": "start", "model.window": 7, "model.depths": (1, 2, 1, 1), "steps": 1, "val_every": 0}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CRM_HOME", str(tmp_path))
    return tmp_path


def imported(home: Path, name: str = "start", **sizes) -> Path:
    """A tiny timm Swin in the weights folder."""
    from timm.models.swin_transformer import SwinTransformer

    sizes = {"embed_dim": 8, "num_heads": (1, 2, 4, 8), "depths": (1, 2, 1, 1), "num_classes": 10, **sizes}
    save_file(SwinTransformer(**sizes).state_dict(), home / "model.safetensors")
    done = CliRunner().invoke(app, ["weights", "import", str(home / "model.safetensors"), "--name", name])
    assert done.exit_code == 0 and f"--set model.init={name}" in done.output
    return home / "weights" / f"{name}.safetensors"


def trained(home: Path, config: Config) -> tuple[int, Path]:
    folder = open_run(home / "runs", config)
    where = machine(home / "runs", weights=home / "weights")
    return attempt(folder, where, "token", "last", [], lambda: False, lambda told: None), folder


@pytest.mark.parametrize("share_from", [2, 4])
def test_a_run_starts_from_the_file_that_its_config_names(home, share_from):
    """One step at a vanishing rate: what is trained is what was in the file."""
    path = imported(home)
    code, folder = trained(home, override(TINY, {**START, "optim.lr": 1e-9, "model.share_from": share_from}))
    assert code == DONE
    weights, ours = load_file(path), load_checkpoint(folder / "checkpoints/last.safetensors").weights
    for name, tensor in weights.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=0)
    assert read_json(folder / "provenance.json")["weights"] == {
        "name": "start", "sha256": file_hash(path), "tensors": len(weights),
    }  # fmt: skip


def test_what_the_file_does_not_hold_is_what_a_run_from_scratch_has(home):
    imported(home)
    quiet = {**START, "optim.lr": 1e-9}
    (_, start), (_, scratch) = (
        trained(home, override(TINY, {**quiet, "model.init": init})) for init in ("start", "none")
    )
    assert read_json(scratch / "provenance.json")["weights"] == {"name": "none"}
    started, fresh = (load_checkpoint(folder / "checkpoints/last.safetensors").weights for folder in (start, scratch))
    own = load_file(home / "weights/start.safetensors").keys()
    for name in started.keys() - own:
        if not name.endswith(("running_mean", "running_var")):
            torch.testing.assert_close(started[name], fresh[name], atol=1e-6, rtol=0)


def test_a_swin_of_another_size_is_refused_when_training_starts(home):
    imported(home, depths=(1, 1, 3, 1))
    code, folder = trained(home, override(TINY, START))
    assert code == FAILED
    assert "depths 1-1-3-1" in read_json(folder / "failure.json")["reason"]


@pytest.mark.parametrize("command", [["train", "synthetic_small"], ["sweep", "demo", "--yes"]])
def test_weights_that_are_not_there_are_refused_with_the_command_that_imports_them(command, home, capsys, monkeypatch):
    imported(home, "other")
    monkeypatch.setattr("sys.argv", ["crm", *command, *TINY_SETS, "--set", "model.init=start"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert "crm weights import FILE --name start" in said and "there: other" in said
    assert not (home / "runs").exists()


@pytest.mark.parametrize("name", ["../start", "a/b", "", ".hidden", "with space"])
def test_a_name_that_leaves_the_weights_folder_is_refused(name):
    with pytest.raises(ValueError, match=r"model\.init"):
        override(TINY, {"model.init": name})


def test_a_damaged_file_is_named(home):
    path = imported(home)
    path.write_bytes(path.read_bytes()[:1000])
    code, folder = trained(home, override(TINY, START))
    assert code == FAILED
    assert "start.safetensors cannot be read" in read_json(folder / "failure.json")["reason"]


# ---------------------------------------------------------------------------------------------- stems and controls

RGB, THERMAL = (f"backbone.{side}.patch_embed.proj.weight" for side in ("rgb", "thermal"))
CLASSES = DATASETS["synthetic"].classes


def started(home: Path, config: Config) -> tuple[Segmenter, dict]:
    """A new network after its initialisation, and what provenance is told."""
    torch.manual_seed(0)
    network = build_segmenter(config.model, len(CLASSES))
    return network, initialise(network, config.model, home / "weights", home / "runs", CLASSES)


def fresh(config: Config) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_segmenter(config.model, len(CLASSES)).state_dict()


def test_the_summed_stem_answers_to_grey_as_the_stem_of_rgb_does(home):
    imported(home)
    changes = {**START, "model.thermal_stem": "sum"}
    network, _ = started(home, override(TINY, changes))
    plain, _ = started(home, override(TINY, START))
    ours, theirs = network.state_dict(), plain.state_dict()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == [THERMAL]
    torch.testing.assert_close(ours[THERMAL], 3 * theirs[THERMAL])
    grey = torch.randn(1, 1, 64, 64)
    filters = [
        torch.nn.functional.conv2d(x, ours[name]) for x, name in ((grey.expand(1, 3, 64, 64), RGB), (grey, THERMAL))
    ]
    torch.testing.assert_close(*filters, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inputs", CONTROLS)
def test_a_control_starts_from_the_part_that_it_has(home, inputs):
    weights = load_file(imported(home))
    config = override(TINY, {**START, **CONTROLS[inputs]})
    network, told = started(home, config)
    ours, scratch = network.state_dict(), fresh(config)
    if inputs == "early":
        torch.testing.assert_close(ours[RGB], torch.cat([weights.pop(RGB), weights.pop(THERMAL)], dim=1))
    taken = [name for name in weights if name in ours and name not in (RGB, THERMAL)]
    assert taken and all(torch.equal(ours[name], weights[name]) for name in taken)
    branches = {"rgb": {"rgb"}, "thermal": {"thermal"}, "early": {"rgb"}, "late": {"rgb", "thermal"}}[inputs]
    assert {name.split(".")[1] for name in taken} == branches
    assert told["tensors"] == len(taken) + len(branches)
    rest = ours.keys() - weights.keys() - {RGB, THERMAL}
    assert all(torch.equal(ours[name], scratch[name]) for name in rest)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_any_fusion_starts_from_the_same_file(home, fusion):
    weights = load_file(imported(home))
    network, _ = started(home, override(TINY, {**START, "model.fusion": fusion}))
    ours = network.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in weights.items())


# ---------------------------------------------------------------------------------------------- whole networks

HUGGING_FACE = {
    "model.depths": (1, 2, 1, 1), "model.encoder_layers": 2, "model.encoder_ffn": 24, "model.decoder_layers": 2,
    "model.decoder_ffn": 40, "model.queries": 5, "steps": 1, "val_every": 0, "optim.lr": 1e-9,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_training_starts_from_an_imported_mask2former(home):
    """Head and both branches are its own; the class head, of other classes, is that of this seed."""
    theirs = mask2former(home / "hf", classes=11)
    done = CliRunner().invoke(
        app, ["weights", "import", str(home / "hf"), "--dataset", "synthetic", "--name", "scenes"]
    )
    assert done.exit_code == 0 and "or train with --set model.init=scenes" in done.output, done.output
    (run,) = (home / "runs").glob("import-*")
    config = override(TINY, {**HUGGING_FACE, "model.init": run.name})
    code, folder = trained(home, config)
    assert code == DONE
    ours = load_checkpoint(folder / "checkpoints/last.safetensors").weights
    source = load_checkpoint(run / "checkpoints/last.safetensors").weights
    told = read_json(folder / "provenance.json")["weights"]
    left = set(told["initial"])
    norms = {f"backbone.fusion_norms.{i}" for i in range(4)}
    parts = {"backbone.rgb", "backbone.thermal", "query_decoder.class_embed"}  # of the branches: the mask tokens
    assert {name.rpartition(".")[0] for name in left} == parts | norms
    assert told["tensors"] == len(ours) - len(left) and told["sha256"] == file_hash(
        run / "checkpoints/last.safetensors"
    )
    for name in ours.keys() - left:
        torch.testing.assert_close(ours[name], source[name], atol=1e-6, rtol=0)
    torch.testing.assert_close(ours["query_decoder.query_feat.weight"],
                               theirs.model.transformer_module.queries_features.weight, atol=1e-6, rtol=0)  # fmt: skip
    _, by_name = started(home, override(config, {"model.init": "scenes"}))
    assert by_name == {**told, "name": "scenes"}
    _, scratch = trained(home, override(config, {"model.init": "none"}))
    expected = load_checkpoint(scratch / "checkpoints/last.safetensors").weights
    for name in left:
        if "fusion_norms" not in name:
            torch.testing.assert_close(ours[name], expected[name], atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A home folder with a trained run, and with controls and another fusion beside it."""
    root = tmp_path_factory.mktemp("source")
    for changes in ({}, {"model.fusion": "gated"}, CONTROLS["rgb"]):
        code, _ = trained(root, override(TINY, {"steps": 1, "val_every": 0, **changes}))
        assert code == DONE
    return root


def of(changes: dict) -> str:
    """Id of one of the runs in `source`."""
    return run_id(override(TINY, {"steps": 1, "val_every": 0, **changes}))


@pytest.mark.parametrize("inputs", ["both", *CONTROLS])
def test_training_starts_from_another_run(source, inputs):
    """With its class head, where the classes are the same ones."""
    config = override(TINY, {"model.init": of({}), "seed": 1, **CONTROLS.get(inputs, {})})
    weights = load_checkpoint(source / "runs" / of({}) / "checkpoints/last.safetensors").weights
    network, told = started(source, config)
    ours = network.state_dict()
    for name, tensor in ours.items():
        origin = name.replace("decoder_thermal.", "decoder.")
        if inputs == "early" and name == RGB:
            tensor, expected = tensor, torch.cat([weights[RGB], weights[THERMAL]], dim=1)
        else:
            expected = weights[origin]
        assert torch.equal(tensor, expected), name
    assert told["initial"] == []


def test_a_class_head_of_other_classes_stays_new_also_if_there_are_as_many(source):
    config = override(TINY, {"model.init": of({})})
    torch.manual_seed(0)
    network = build_segmenter(config.model, 6)
    told = initialise(network, config.model, None, source / "runs", [f"thing {i}" for i in range(6)])
    assert told["initial"] == ["query_decoder.class_embed.bias", "query_decoder.class_embed.weight"]
    assert torch.equal(network.query_decoder.class_embed.weight, fresh(config)["query_decoder.class_embed.weight"])


@pytest.mark.parametrize(("own", "other"), [({}, {"model.fusion": "gated"}), ({"model.fusion": "gated"}, {})])
def test_another_fusion_stays_new_with_its_norms(source, own, other):
    config = override(TINY, {**own, "model.init": of(other)})
    network, told = started(source, config)
    ours, scratch = network.state_dict(), fresh(config)
    assert told["initial"] == sorted(name for name in ours if ".fusion" in name)
    assert all(torch.equal(ours[name], scratch[name]) for name in told["initial"])
    _, kept = started(source, override(TINY, {**own, "model.init": of(own)}))
    assert kept["initial"] == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.queries": 7}, "queries 12, not 7"),
        ({"model.depths": (1, 2, 1, 1)}, "depths 1-1-1-1"),
        ({"model.thermal_stem": "sum"}, "that were trained"),
        ({"model.init": of(CONTROLS["rgb"])}, "model.inputs 'rgb'"),
        ({"model.init": "import-0123456789ab"}, "crm weights import FOLDER"),
        ({"model.init": "0123456789ab"}, "--from-scratch"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(source, changes, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        started(source, override(TINY, {"model.init": of({}), **changes}))


def test_a_run_that_is_not_finished_is_no_start(home):
    folder = open_run(home / "runs", TINY)
    with pytest.raises(FileNotFoundError, match=f"run {folder.name}, which is not finished"):
        started(home, override(TINY, {"model.init": folder.name}))


# ---------------------------------------------------------------------------------------------- --from-scratch


ONE_STEP = [*TINY_SETS, "--set", "steps=1", "--set", "val_every=0"]


@pytest.mark.parametrize(
    "command", [["train", "synthetic_small", "--threads", "1", *ONE_STEP], ["sweep", "demo", "--dry-run", "--json"]]
)
def test_from_scratch_is_init_none(command, home, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["crm", *command, "--set", "model.init=gone", "--from-scratch"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0, capsys.readouterr().err
    if command[0] == "train":
        (run,) = (home / "runs").glob("*/config.json")
        assert read_json(run)["config"]["model.init"] == "none"
