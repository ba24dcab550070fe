"""Weights from elsewhere: what is taken in, what is refused, and that nothing of a file is ever run."""

import json
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from io import BytesIO
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from crm.cli import app, main
from crm.config import Config, Model, override
from crm.confusion import miou, released_miou
from crm.data.specs import SYNTHETIC
from crm.model.segmenter import Segmenter, build_segmenter
from crm.records import file_hash, read_config, read_json
from crm.weights import export_name, load_released, released_name
from crm.weights.files import read_source
from crm.weights.imports import import_network
from crm.weights.released import released_file
from crm.weights.sizes import infer
from crm.weights.unpickle import Inert, TorchFile
from tests.conftest import GOLDEN

SMALL = Model(
    embed=8, depths=(1, 2, 1, 1), heads=(1, 2, 4, 8), window=4, width=32, queries=5, encoder_layers=2, encoder_ffn=24,
    decoder_layers=2, decoder_ffn=40, decoder_heads=4,
)  # fmt: skip


def randomised(part: Model = SMALL, classes: int = 9, seed: int = 0) -> Segmenter:
    """A network in which every tensor, buffers included, has a value of its own."""
    model = build_segmenter(part, classes).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.1)
    return model


def image() -> Tensor:
    return torch.randn(1, 4, 64, 96, generator=torch.Generator().manual_seed(3))


def released(path: Path, model: Segmenter | None = None) -> Path:
    """A file in the released format."""
    path.write_bytes(released_file(model or randomised(), no_object=0.1, step=7))
    return path


def state_of(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty home folder of the command."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("CRM_HOME", str(folder))
    monkeypatch.delenv("CRM_DEBUG", raising=False)
    return folder


def refused(arguments: list[str], capsys, monkeypatch) -> str:
    """The one line that the command answers; it must end with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["crm", *arguments])
    capsys.readouterr()  # what making the file printed
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("crm: ") and said.err.count("\n") == 1, said.err
    assert len(said.err) < 600
    return said.err


def crm(*arguments: str) -> dict:
    done = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert done.exit_code in (0, 3), done.output
    return json.loads(done.stdout)


# ---------------------------------------------------------------------------------------------- names and sizes


@pytest.mark.parametrize("share_from", [0, 2, 4])
def test_every_name_goes_to_the_released_one_and_back(share_from):
    names = build_segmenter(override(Config(), {"model.share_from": share_from}).model, 9).state_dict()
    there = {name: export_name(name) for name in names}
    assert {released_name(new) for new in there.values()} == set(names)
    assert all(released_name(new) == name for name, new in there.items())
    assert len(set(there.values())) == len(names)


def test_the_architecture_is_read_off_the_tensors():
    for share_from in range(5):
        part = override(Config(model=SMALL), {"model.share_from": share_from}).model
        found, classes = infer(randomised(part, classes=5).state_dict())
        assert (found, classes) == (override(Config(model=part), {"model.drop_path": 0.3}).model, 5)


# ---------------------------------------------------------------------------------------------- released format


@pytest.mark.skipif(not (GOLDEN / "released_format.ckpt").exists(), reason="no released_format.ckpt in CRM_GOLDEN")
def test_a_released_checkpoint_is_read_without_its_libraries(monkeypatch):
    path = GOLDEN / "released_format.ckpt"
    source = read_source(path)
    assert source.kind == "released" and source.step == 35_000
    assert isinstance(source.settings["cfg"], Inert)
    assert "detectron2" not in sys.modules
    module = ModuleType("detectron2.config.config")  # stands in for the library, to read the file the usual way
    module.__dict__["CfgNode"] = type("CfgNode", (dict,), {"__module__": module.__name__})
    for name in ("detectron2", "detectron2.config", "detectron2.config.config"):
        monkeypatch.setitem(sys.modules, name, module)
    state = torch.load(path, weights_only=False)["state_dict"]
    wanted = {released_name(name): tensor for name, tensor in state.items() if released_name(name)}
    assert source.weights.keys() == wanted.keys()
    assert all(torch.equal(source.weights[name], tensor) for name, tensor in wanted.items())


@pytest.mark.skipif(not (GOLDEN / "released_format.ckpt").exists(), reason="no released_format.ckpt in CRM_GOLDEN")
def test_an_imported_released_checkpoint_is_exported_as_it_came(home, tmp_path):
    path = GOLDEN / "released_format.ckpt"
    run = crm("weights", "import", str(path))["run"]
    crm("weights", "export", run, str(tmp_path / "out.ckpt"))
    before = TorchFile(path)
    before = before.tensors(before.content["state_dict"])
    after = state_of(tmp_path / "out.ckpt")
    assert after.keys() == before.keys()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )


@pytest.mark.parametrize("share_from", [1, 4])
@pytest.mark.parametrize("fusion", ["max", "add"])
@torch.no_grad()
def test_export_and_import_keep_every_bit_and_every_logit(home, tmp_path, share_from, fusion):
    part = override(Config(model=SMALL), {"model.share_from": share_from}).model
    model = randomised(part)
    path = released(tmp_path / "a.ckpt", model)
    said = crm("weights", "import", str(path), "--set", f"model.fusion={fusion}")
    folder = home / "runs" / said["run"]
    config = read_config(folder)
    assert (config.model.fusion, config.model.share_from, config.data.dataset) == (fusion, share_from, "mf")
    again = build_segmenter(config.model, 9).eval()
    load_released(again, state_of(path))
    stored = load_file(folder / "checkpoints/last.safetensors")
    assert all(torch.equal(stored[f"model.{name}"], tensor) for name, tensor in model.state_dict().items())
    if fusion == "max":
        for ours, theirs in zip(again(image()), model(image()), strict=True):
            assert torch.equal(ours, theirs)
    crm("weights", "export", said["run"], str(tmp_path / "b.ckpt"))
    before, after = state_of(path), state_of(tmp_path / "b.ckpt")
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_an_export_says_the_versions_that_the_released_modules_ask_for(tmp_path):
    # Without them the released head would rewrite the names of a dict that has the right ones.
    state = torch.load(released(tmp_path / "a.ckpt"), weights_only=True)["state_dict"]
    assert isinstance(state, OrderedDict)
    versions = {path: entry["version"] for path, entry in state._metadata.items()}
    assert versions["network.sem_seg_head"] == versions["network.sem_seg_head.predictor"] == 2
    assert versions["network.backbone.norm_layers.res3"] == 2
    assert versions[""] == versions["network"] == versions["network.backbone.THR_branch.layers.1.blocks.1.attn"] == 1
    assert all(name.startswith("network.") for name in state)
    assert state["network.criterion.empty_weight"].tolist() == pytest.approx([1.0] * 9 + [0.1])


def test_an_import_says_where_it_came_from_and_is_made_once(home, tmp_path):
    path = released(tmp_path / "a.ckpt")
    first, again = crm("weights", "import", str(path)), crm("weights", "import", str(path))
    assert first == again and first["run"].startswith("import-")
    folder = home / "runs" / first["run"]
    origin = read_json(folder / "provenance.json")["imported"]
    assert (origin["source"], origin["sha256"], origin["kind"]) == ("a.ckpt", file_hash(path), "released")
    assert origin["initial"] == [] and origin["loaded"] == len(first["loaded"]) == len(randomised().state_dict())
    assert read_json(folder / "result.json")["steps"] == 7
    other = crm("weights", "import", str(path), "--set", "model.fusion=add")
    assert other["run"] != first["run"]
    assert {each.name for each in (home / "runs").iterdir()} == {first["run"], other["run"]}


# ---------------------------------------------------------------------------------------------- evaluation


def test_imported_weights_are_evaluated_without_a_training_run(home, tmp_path):
    path = released(tmp_path / "a.ckpt", randomised(classes=SYNTHETIC.num_classes))
    run = crm("weights", "import", str(path), "--set", "data.size=(64,96)", "--set", "data.crop=(32,48)",
              "--set", "data.test_images=2", "--set", "data.scale=(1.0,1.0)")["run"]  # fmt: skip
    said = crm("evaluate", run, "--suite", "missing", "--threads", "1")
    assert said["run"] == run
    assert said["miou"].keys() == said["released_miou"].keys() and len(said["miou"]) == 9
    assert all(0 <= said["released_miou"][name] <= score for name, score in said["miou"].items())
    again = crm("evaluate", run[:12], "--on", "synthetic", "--suite", "missing")
    assert again["miou"] == said["miou"]


def test_the_released_metric_counts_absent_classes_as_nothing():
    matrix = np.array([[6, 2, 0], [0, 4, 0], [0, 0, 0]])
    assert miou(matrix) == pytest.approx((75.0 + 200 / 3) / 2)
    assert released_miou(matrix) == pytest.approx((75.0 + 200 / 3) / 3)


WRONG_TARGETS = {
    "a backbone": ("swin.safetensors", [], "a backbone alone predicts nothing"),
    "classes that the data set has not": (
        "nine.ckpt",
        ["--on", "synthetic"],
        f"9 classes, but synthetic has {SYNTHETIC.num_classes}",
    ),
    "a number of classes that no data set has": ("four.ckpt", [], "no data set has so many"),
    "a data set that does not exist": ("nine.ckpt", ["--on", "synthetik"], "Did you mean 'synthetic'"),
    "a data set that is not there": ("nine.ckpt", ["--on", "mf", "--data", "absent"], "absent"),
    "no file": ("absent.ckpt", [], "no run"),
}


@pytest.mark.parametrize("what", WRONG_TARGETS)
def test_evaluating_what_cannot_be_is_refused(what, home, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, more, hint = WRONG_TARGETS[what]
    save_file(imagenet(), "swin.safetensors")
    released(Path("nine.ckpt"))
    released(Path("four.ckpt"), randomised(classes=4))
    assert hint in refused(["evaluate", name, *more], capsys, monkeypatch)
    assert not list(home.iterdir())


def test_a_selection_that_an_import_has_not_is_refused(home, tmp_path, capsys, monkeypatch):
    run = crm("weights", "import", str(released(tmp_path / "a.ckpt")))["run"]
    assert "it has last" in refused(["evaluate", run, "--select", "val_best"], capsys, monkeypatch)


# ---------------------------------------------------------------------------------------------- ImageNet


def imagenet(depths: tuple[int, ...] = (1, 2, 1, 1), **changes) -> dict[str, Tensor]:
    """The state dict of a tiny timm Swin."""
    from timm.models.swin_transformer import SwinTransformer

    sizes = {"embed_dim": 8, "num_heads": (1, 2, 4, 8), "window_size": 7, "num_classes": 10, **changes}
    return SwinTransformer(depths=depths, **sizes).state_dict()


def microsoft(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under the names of Microsoft's files, with the buffers these hold."""
    own = {}
    for name, tensor in state.items():
        part = name.split(".")
        if "downsample" in part:
            part[1] = str(int(part[1]) - 1)
        own[".".join(part).replace("head.fc.", "head.")] = tensor
    own["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    own["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 49, 49)
    return own


@pytest.mark.parametrize("form", ["timm safetensors", "timm pth", "Microsoft pth", "Microsoft pth before torch 1.6"])
def test_an_imagenet_swin_fills_both_branches(form, home, tmp_path):
    state = imagenet()
    path = tmp_path / ("swin.safetensors" if "safetensors" in form else "swin.pth")
    if form == "timm safetensors":
        save_file(state, path)
    else:
        whole = {"model": microsoft(state)} if "Microsoft" in form else state
        torch.save(whole, path, _use_new_zipfile_serialization="before" not in form)
    said = crm("weights", "import", str(path))
    assert said["path"] == str(home / "weights" / "swin.safetensors") and said["run"] is None
    weights = load_file(said["path"])
    assert set(said["loaded"]) == weights.keys()
    stem = state["patch_embed.proj.weight"]
    assert torch.equal(weights["backbone.rgb.patch_embed.proj.weight"], stem)
    assert torch.equal(weights["backbone.thermal.patch_embed.proj.weight"], stem.mean(dim=1, keepdim=True))
    for branch in ("rgb", "thermal"):
        swin = build_segmenter(Model(embed=8, depths=(1, 2, 1, 1), heads=(1, 2, 4, 8)), 2).backbone.get_submodule(
            branch
        )
        own = {name.removeprefix(f"backbone.{branch}."): tensor for name, tensor in weights.items() if branch in name}
        lacking = swin.load_state_dict(own, strict=False)
        assert not lacking.unexpected_keys
        assert {name.partition(".")[0] for name in lacking.missing_keys} == {"norms", "mask_token"}
        for stage in range(3):
            merged = state[f"layers.{stage + 1}.downsample.reduction.weight"]
            assert torch.equal(weights[f"backbone.{branch}.stages.{stage}.merge.reduction.weight"], merged)
        assert torch.equal(weights[f"backbone.{branch}.stages.1.blocks.1.attn.qkv.bias"],
                           state["layers.1.blocks.1.attn.qkv.bias"])  # fmt: skip
    unused = set(said["unused"])
    assert {"norm.weight", "norm.bias"} <= unused
    assert any(name.startswith("head.") for name in unused)


def test_a_swin_of_another_size_is_refused_by_name(home, tmp_path, capsys, monkeypatch):
    # The real sizes' channels would need hundreds of megabytes here: tiny ones differ in the same two ways.
    path = tmp_path / "swin.safetensors"
    save_file(imagenet(depths=(1, 1, 3, 1), embed_dim=16, window_size=4), path)
    said = refused(["weights", "import", str(path), "--experiment", "synthetic_small"], capsys, monkeypatch)
    assert "embed 16, depths 1-1-3-1" in said and f"depths {'-'.join(map(str, small_depths()))}" in said
    assert not list(home.iterdir())


def small_depths() -> tuple[int, ...]:
    from experiments.synthetic_small import config

    return config.model.depths


def test_a_swin_s_file_for_a_swin_t_names_both():
    from crm.weights.sizes import refuse_other_swin

    small = Model(depths=(2, 2, 18, 2))
    with pytest.raises(ValueError, match=r"file holds Swin-S \(.*2-2-18-2.*but the model is Swin-T \(.*2-2-6-2"):
        refuse_other_swin(small, Model(), "file")


def test_a_second_file_of_the_same_name_does_not_replace_the_first(home, tmp_path, capsys, monkeypatch):
    path = tmp_path / "swin.safetensors"
    save_file(imagenet(), path)
    first = crm("weights", "import", str(path))["path"]
    before = file_hash(Path(first))
    save_file(imagenet(), path)
    assert "there already with other weights" in refused(["weights", "import", str(path)], capsys, monkeypatch)
    assert file_hash(Path(first)) == before


# ---------------------------------------------------------------------------------------------- Hugging Face


def mask2former(folder: Path, classes: int = 9):
    """A tiny Mask2Former with every tensor random, written as transformers writes it."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    stages = [f"stage{i}" for i in range(1, 5)]
    swin = SwinConfig(image_size=64, embed_dim=8, depths=[1, 2, 1, 1], num_heads=[1, 2, 4, 8], window_size=4,
                      out_features=stages, drop_path_rate=0.0)  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=24,
        encoder_layers=2, decoder_layers=3, num_attention_heads=4, dim_feedforward=40, num_queries=5,
        num_labels=classes, use_pretrained_backbone=False,
    )  # fmt: skip
    torch.manual_seed(5)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    return model


def spelled(folder: Path, names: dict[str, Tensor]) -> None:
    """Writes the same weights under the names of the running version, whichever `save_pretrained` chose."""
    save_file({name: tensor.contiguous() for name, tensor in names.items()}, folder / "model.safetensors")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spelling", ["as saved", "as in memory"])
@torch.no_grad()
def test_a_mask2former_folder_gives_its_own_logits_on_the_rgb_path(spelling, home, tmp_path):
    theirs = mask2former(tmp_path / "hf")
    if spelling == "as in memory":
        spelled(tmp_path / "hf", theirs.state_dict())
    said = crm("weights", "import", str(tmp_path / "hf"))
    model = build_segmenter(read_config(home / "runs" / said["run"]).model, 9).eval()
    stored = load_file(home / "runs" / said["run"] / "checkpoints/last.safetensors")
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in stored.items()})
    wanted = theirs(pixel_values=image()[:, :3])
    ours = model.head(model.branch("rgb", image()))
    torch.testing.assert_close(ours.class_logits[-1], wanted.class_queries_logits, rtol=0, atol=2e-5)
    torch.testing.assert_close(ours.mask_logits[-1], wanted.masks_queries_logits, rtol=1e-5, atol=2e-4)
    stem = stored["model.backbone.rgb.patch_embed.proj.weight"].mean(dim=1, keepdim=True)
    assert torch.equal(stored["model.backbone.thermal.patch_embed.proj.weight"], stem)
    left = {name.rpartition(".")[0].partition(".")[2].rstrip(".0123") for name in said["initial"]}
    assert left == {"rgb", "thermal", "fusion_norms"}


@pytest.mark.filterwarnings("ignore")
def test_a_class_head_of_other_classes_is_left_and_said(home, tmp_path, capsys, monkeypatch):
    mask2former(tmp_path / "hf", classes=11)
    assert "say --dataset" in refused(["weights", "import", str(tmp_path / "hf")], capsys, monkeypatch)
    said = crm("weights", "import", str(tmp_path / "hf"), "--dataset", "mf")
    assert [text.partition(": ")[2] for text in said["misfits"]] == ["11 classes, not 9"] * 2
    assert {"query_decoder.class_embed.weight", "query_decoder.class_embed.bias"} <= set(said["initial"])
    twin = crm("weights", "import", str(tmp_path / "hf"), "--dataset", "mf")
    assert twin["run"] == said["run"]
    refused(["evaluate", str(tmp_path / "hf"), "--on", "synthetic"], capsys, monkeypatch)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"model_type": "maskformer"}, "'maskformer'"),
        ({"backbone_config": {"model_type": "resnet"}}, "'resnet'"),
        ({"pre_norm": True}, "pre_norm"),
        (None, "config.json"),
    ],
)
def test_another_model_of_hugging_face_is_refused(change, hint, home, tmp_path, capsys, monkeypatch):
    mask2former(tmp_path / "hf")
    path = tmp_path / "hf/config.json"
    path.write_text("{" if change is None else json.dumps(json.loads(path.read_text()) | change))
    assert hint in refused(["weights", "import", str(tmp_path / "hf")], capsys, monkeypatch)
    assert not list(home.iterdir())


# ---------------------------------------------------------------------------------------------- hostile and broken


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Nested:
    """A call whose argument is the result of a call."""

    def __reduce__(self):
        return print, (Calls(os.getenv, "HOME"),)


def mark(folder: str) -> None:
    """What a hostile file would do here."""
    Path(folder, "executed").touch()


class Restores:
    """Runs code when its state is restored."""

    def __setstate__(self, state):
        mark(state)

    def __getstate__(self):
        return os.environ["MARK"]


def with_extra(path: Path, extra: object) -> Path:
    """A good released checkpoint that also pickles `extra`."""
    state = torch.load(released(path), weights_only=True)
    torch.save({**state, "hyper_parameters": {"cfg": extra}}, path)
    return path


def hand_made(path: Path, content: bytes) -> Path:
    """A zip file as torch.save writes it, around a pickle written by hand."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/version", "3")
    return path


def storage_bytes(command: str) -> object:
    buffer = BytesIO()
    torch.save(Calls(os.system, command), buffer)
    return Calls(torch.storage._load_from_bytes, buffer.getvalue())


HOSTILE = {
    "os.system": lambda path, command: with_extra(path, Calls(os.system, command)),
    "eval": lambda path, command: with_extra(path, Calls(eval, f"__import__('os').system({command!r})")),
    "a call inside a call": lambda path, command: with_extra(path, Nested()),
    "a call through getattr": lambda path, command: hand_made(
        path, b"cbuiltins\ngetattr\n(cos\nsystem\nS'__call__'\ntR(S'" + command.encode() + b"'\ntR."
    ),
    "storage bytes": lambda path, command: with_extra(path, storage_bytes(command)),
    "an old INST": lambda path, command: hand_made(path, b"(S'" + command.encode() + b"'\nios\nsystem\n."),
    "an OBJ": lambda path, command: hand_made(path, b"(cos\nsystem\nS'" + command.encode() + b"'\no."),
    "a bare pickle": lambda path, command: path.write_bytes(pickle.dumps(Calls(os.system, command))) and path,
    "the format before torch 1.6": lambda path, command: (
        torch.save({"a": Calls(os.system, command)}, path, _use_new_zipfile_serialization=False) or path
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(what, home, tmp_path, capsys, monkeypatch):
    executed = tmp_path / "executed"
    path = HOSTILE[what](tmp_path / "a.ckpt", f"touch {executed}")
    said = refused(["weights", "import", str(path)], capsys, monkeypatch)
    assert "nothing of it was run" in said
    refused(["evaluate", str(path)], capsys, monkeypatch)
    assert not executed.exists()
    assert not list(home.iterdir())


def test_state_is_never_restored(home, tmp_path, monkeypatch):
    # An object of an unknown class is what a released file has too: it is taken in as a note, and stays one.
    monkeypatch.setenv("MARK", str(tmp_path))
    path = with_extra(tmp_path / "a.ckpt", Restores())
    torch.load(path, weights_only=False)
    assert (tmp_path / "executed").exists(), "the file does run code when loaded the usual way"
    (tmp_path / "executed").unlink()
    settings = read_source(path).settings
    assert isinstance(settings["cfg"], Inert) and settings["cfg"].origin.endswith("Restores")
    assert not (tmp_path / "executed").exists()


def test_a_class_of_the_file_stays_a_note_even_if_it_can_be_imported(tmp_path, monkeypatch):
    # What find_class of pickle would import must not be imported: importing runs code.
    module = ModuleType("yacs_like")
    monkeypatch.setitem(sys.modules, "yacs_like", module)
    exec("class Node(dict): pass", module.__dict__)
    node = module.Node(MODEL=module.Node(FUSION={"AGGREGATION": "ADD"}))
    path = with_extra(tmp_path / "a.ckpt", node)
    monkeypatch.delitem(sys.modules, "yacs_like")
    source = read_source(path)
    assert import_network(source, tmp_path / "runs").report.loaded
    (folder,) = (tmp_path / "runs").iterdir()
    assert read_config(folder).model.fusion == "add", "what the released config says about the fusion is used"


def broken(state: dict[str, Tensor], path: Path) -> Path:
    torch.save({"state_dict": state}, path)
    return path


def without(path: Path, ending: str) -> Path:
    return broken({n: t for n, t in state_of(released(path)).items() if not n.endswith(ending)}, path)


def replaced(path: Path, ending: str, change) -> Path:
    state = state_of(released(path))
    return broken({name: change(tensor) if name.endswith(ending) else tensor for name, tensor in state.items()}, path)


def huge_memo(path: Path) -> Path:
    return hand_made(path, b"\x80\x02}r" + struct.pack("<I", 0xFFFFFFF0) + b".")


def far_stride(path: Path) -> Path:
    """A tensor that claims numbers beyond its record."""
    good = BytesIO()
    torch.save({"state_dict": {"network.backbone.RGB_branch.patch_embed.proj.weight": torch.zeros(7)}}, good)
    with zipfile.ZipFile(good) as archive:
        name = next(each for each in archive.namelist() if each.endswith("data.pkl"))
        content, record = archive.read(name), archive.read(name.replace("data.pkl", "data/0"))
    assert content.count(b"K\x07\x85") == 1
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", content.replace(b"K\x07\x85", b"K\xff\x85"))
        archive.writestr("a/data/0", record)
    return path


def compressed(path: Path) -> Path:
    with zipfile.ZipFile(released(path)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return path


def flipped(path: Path) -> Path:
    """One byte of one record differs: the file's own check sum says so."""
    content = bytearray(released(path).read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    return path


def cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def saved(state: dict[str, Tensor], path: Path) -> Path:
    save_file(state, path)
    return path


BROKEN = {
    "missing": (lambda path: path, "no file"),
    "empty": (lambda path: path.touch() or path, "is empty"),
    "a folder": (lambda path: path.mkdir() or path, "model.safetensors"),
    "a text": (lambda path: path.write_text("some text\n" * 9) and path, "no whole checkpoint"),
    "a binary": (lambda path: path.write_bytes(bytes(range(256)) * 40) and path, "was not loaded"),
    "another zip file": (lambda path: zipfile.ZipFile(path, "w").writestr("a", "b") or path, "was not loaded"),
    "half a file": (lambda path: cut(released(path), 0.5), "was not loaded"),
    "nearly a file": (lambda path: cut(released(path), 0.999), "was not loaded"),
    "half a safetensors file": (
        lambda path: cut(saved(imagenet(), path.with_suffix(".safetensors")), 0.5), "safetensors"
    ),
    "a damaged record": (flipped, "was not loaded"),
    "a compressed file": (compressed, "compressed"),
    "a memory bomb": (huge_memo, "memory"),
    "a tensor beyond its record": (far_stride, "record of 7 numbers"),
    "a number": (lambda path: broken(3, path), "int"),
    "a list": (lambda path: torch.save([1, 2], path) or path, "list"),
    "no tensors": (lambda path: broken({"a": 3}, path), "no tensor"),
    "another network": (lambda path: broken({"conv1.weight": torch.zeros(3)}, path), "conv1.weight"),
    "a missing tensor": (lambda path: without(path, "decoder_norm.weight"), "query_decoder.norm.weight is missing"),
    "a missing head": (lambda path: without(path, "class_embed.weight"), "class_embed.weight"),
    "a missing layer": (lambda path: without(path, "layers.0.linear1.weight"), "linear1.weight"),
    "a wrong shape": (
        lambda path: replaced(path, "RGB_branch.norm2.weight", lambda t: t[:-1]), "backbone.rgb.norms.2.weight has"
    ),
    "a wrong number of axes": (lambda path: replaced(path, "class_embed.weight", lambda t: t[0]), "class_embed"),
    "a wrong stem": (
        lambda path: replaced(path, "THR_branch.patch_embed.proj.weight", lambda t: t.repeat(1, 3, 1, 1)), "thermal"
    ),
    "a huge size": (
        lambda path: replaced(path, "patch_embed.norm.weight", lambda t: torch.ones(80_000)), "has shape"
    ),
    "a surplus tensor": (
        lambda path: broken({**state_of(released(path)), "network.more": torch.zeros(2)}, path), "more has no place"
    ),
    "not a number": (lambda path: replaced(path, "query_feat.weight", lambda t: t / 0 * 0), "not finite"),
    "infinite": (lambda path: replaced(path, "res4.running_var", lambda t: t / 0), "not finite"),
    "whole numbers": (lambda path: replaced(path, "query_feat.weight", lambda t: t.long()), "torch.int64"),
    "complex numbers": (lambda path: replaced(path, "query_feat.weight", lambda t: t.cfloat()), "was not loaded"),
    "a Swin with a hole": (
        lambda path: saved({n: t for n, t in imagenet().items() if "layers.2.blocks" not in n}, path), "stages.2"
    ),
    "a Swin that is not finite": (
        lambda path: saved(imagenet() | {"patch_embed.proj.bias": torch.full((8,), torch.nan)}, path), "not finite"
    ),
    "a Swin of one channel": (
        lambda path: saved(imagenet() | {"patch_embed.proj.weight": torch.zeros(8, 1, 4, 4)}, path), "colour"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_one_line_and_leaves_nothing(what, home, tmp_path, capsys, monkeypatch):
    make, hint = BROKEN[what]
    path = make(tmp_path / "a.ckpt")
    assert hint in refused(["weights", "import", str(path)], capsys, monkeypatch)
    assert not list(home.iterdir())


def test_any_damage_is_an_error_in_one_line(tmp_path):
    # Bytes changed anywhere in the pickle: whatever the pickle machine meets, the caller meets ValueError.
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(released(tmp_path / "a.ckpt")) as archive:
        name = next(each for each in archive.namelist() if each.endswith("data.pkl"))
        content = archive.read(name)
    for _ in range(150):
        damaged = bytearray(content)
        for place in rng.integers(0, 4000, size=3):
            damaged[place] = rng.integers(0, 256)
        path = hand_made(tmp_path / "b.ckpt", bytes(damaged))
        with pytest.raises(ValueError, match=r"b\.ckpt") as refusal:
            read_source(path)
        assert "\n" not in str(refusal.value)
