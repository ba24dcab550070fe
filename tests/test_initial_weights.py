"""What training starts from: `model.init` names a file of the weights folder."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from crm.checkpoint import load_checkpoint
from crm.cli import app, main
from crm.config import Config, override
from crm.records import file_hash, open_run, read_json
from crm.worker import DONE, FAILED, attempt
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
