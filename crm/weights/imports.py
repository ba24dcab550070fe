"""Taking weights in: whole networks become run folders that can be evaluated, backbones files of the weights folder."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import save

from crm.checkpoint import load_checkpoint, save_weights
from crm.config import SCHEMA, Config, Data, Model, flatten, override
from crm.data.mapping import mapping
from crm.data.specs import DATASETS
from crm.model.fusion import FUSIONS
from crm.model.segmenter import Segmenter, build_segmenter
from crm.names import chosen
from crm.provenance import source as code_source
from crm.randomness import derive
from crm.records import file_hash, read_config, trained_on, write_bytes, write_json
from crm.weights.files import Source
from crm.weights.sizes import conflicts, infer, infer_swin, refuse_other_swin, swin_name

# What a kind of file has no tensor for; it keeps its initial value. Any other gap is refused.
INITIAL = {
    "huggingface": r"\.mask_token$|^backbone\.fusion_norms\.|^query_decoder\.class_embed\.",
    "imagenet": r"\.mask_token$|\.norms\.|^backbone\.fusion_norms\.|^pixel_decoder\.|^query_decoder\.",
}
CLASS_HEAD = "query_decoder.class_embed."


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of the tensors of a file."""

    source: str  # name of the file
    sha256: str
    title: str  # what kind of file it is
    model: str  # its Swin, in words
    loaded: tuple[str, ...]  # our tensors that were filled
    initial: tuple[str, ...]  # our tensors that keep their initial value
    misfits: tuple[str, ...]  # tensors of the file that did not fit, and why
    unused: tuple[str, ...]  # tensors of the file that no network of ours has a place for


@dataclass(frozen=True, kw_only=True)
class Imported:
    path: Path  # the run folder, or the file in the weights folder
    report: Report
    whole: bool  # can be evaluated


# ---------------------------------------------------------------------------------------------- whole networks


def import_network(
    source: Source, runs: Path, base: Config | None = None, dataset: str | None = None, changes: Mapping | None = None
) -> Imported:
    """Makes `runs/import-<hash>`, which `crm evaluate` takes like a trained run; what is there already is kept.

    The architecture is the file's. Everything else comes from `base`, or from the data set: the one given, else the
    only one with the file's number of classes. ValueError, before anything is written, for what does not fit.
    """
    config, num_classes = network_config(source, base, dataset, changes or {})
    written = json.loads(json.dumps(flatten(config)))
    folder = runs / f"import-{sha256(json.dumps([source.sha256, written], sort_keys=True).encode()).hexdigest()[:12]}"
    model, report = fill(source, config.model, num_classes, config.seed)
    if not (folder / "result.json").exists():
        _write_run(folder, config, model, source.step, {"kind": source.kind, **_plain(report)})
    return Imported(path=folder, report=report, whole=True)


def keep_network(run: Path, folder: Path, name: str) -> Path:
    """Puts an imported network into the weights folder too, where `model.init` finds it by name; the file.

    ValueError for a name that no setting could hold, and where another file of that name is there already.
    """
    return _keep(folder, name, (run / "checkpoints/last.safetensors").read_bytes())


def _keep(folder: Path, name: str, content: bytes) -> Path:
    override(Config(), {"model.init": name})  # refuses a name that no setting could hold
    path = folder / f"{name}.safetensors"
    if path.exists() and path.read_bytes() != content:
        raise ValueError(f"{path} is there already with other weights; give another --name")
    write_bytes(path, content)
    return path


def import_run(folder: Path, selection: str, dataset: str, runs: Path) -> Path:
    """A trained run's checkpoint as an import on another data set, at that one's own size; its run folder.

    The network keeps the classes it was trained on; ValueError if the data set has none of them.
    """
    config = read_config(folder)
    path = folder / "checkpoints" / f"{selection}.safetensors"
    trained, target = DATASETS[trained_on(folder)], chosen("data set", dataset, DATASETS)
    mapping(trained, target)
    config = replace(config, data=_data(dataset, None, folder.name))
    written = json.loads(json.dumps(flatten(config)))
    origin = {"kind": "run", "source": f"{folder.name} {selection}", "sha256": file_hash(path)}
    made = runs / f"import-{sha256(json.dumps([origin, written], sort_keys=True).encode()).hexdigest()[:12]}"
    if not (made / "result.json").exists():
        checkpoint = load_checkpoint(path)
        model = build_segmenter(config.model, trained.num_classes)
        model.load_state_dict(checkpoint.weights)
        _write_run(made, config, model, checkpoint.meta["step"], origin, trained.name)
    return made


def network_config(
    source: Source, base: Config | None, dataset: str | None, changes: Mapping[str, Any]
) -> tuple[Config, int]:
    """The config of an imported network, and its number of classes."""
    try:
        found, own_classes = infer(source.weights)
        found = replace(found, init="none", **_stated(source))
        Config(model=found)  # refuses sizes that no network of ours can have
    except ValueError as error:
        raise ValueError(f"{source.path} looks like a {source.title}, but {error}") from error
    dataset = dataset or changes.get("data.dataset") or (base.data.dataset if base else None)
    if base is None or base.data.dataset != dataset:
        data = _data(dataset or _only_dataset(source, own_classes), None, "")
    else:
        data = base.data
    model = found if base is None else replace(base.model, fusion=found.fusion, init="none")
    config = override(replace(base or Config(), data=data, model=model), changes)
    refuse_other_swin(found, config.model, str(source.path))
    if wrong := conflicts(config.model, found):
        raise ValueError(f"{source.path} does not fit the model: it has {'; '.join(wrong)}")
    num_classes = DATASETS[config.data.dataset].num_classes
    if num_classes != own_classes and source.kind != "huggingface":
        _data(config.data.dataset, own_classes, str(source.path))
    return config, num_classes


def fill(source: Source, model: Model, num_classes: int, seed: int = 0) -> tuple[Segmenter, Report]:
    """A network with the file's weights; ValueError for any gap or surplus that its kind does not explain.

    What the file does not hold is what training with this seed would start from.
    """
    weights, misfits = dict(source.weights), []
    shapes = _shapes(model, num_classes)
    for name in [name for name in weights if name.startswith(CLASS_HEAD) and source.kind == "huggingface"]:
        if name in shapes and weights[name].shape != shapes[name]:
            misfits.append(f"{name}: {len(weights.pop(name)) - 1} classes, not {num_classes}")
    wrong = [
        f"{name} has shape {tuple(weights[name].shape)}, not {tuple(shapes[name])}"
        for name in sorted(weights.keys() & shapes.keys())
        if weights[name].shape != shapes[name]
    ]
    initial = sorted(shapes.keys() - weights.keys())
    wrong += [f"{name} is missing" for name in initial if not re.search(INITIAL.get(source.kind, r"$^"), name)]
    wrong += [f"{name} has no place" for name in sorted(weights.keys() - shapes.keys())]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{source.path} does not fit: {'; '.join(wrong[:3])}{more}")
    torch.manual_seed(derive(seed, "initialisation"))
    network = build_segmenter(model, num_classes)
    network.load_state_dict(network.state_dict() | weights)
    return network, _report(source, model, sorted(weights), initial, misfits)


def _shapes(model: Model, num_classes: int) -> dict[str, torch.Size]:
    """The shapes of a network's tensors, without any memory for them: a hostile file may name any size."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in build_segmenter(model, num_classes).state_dict().items()}


def _stated(source: Source) -> dict[str, Any]:
    """The settings that tensors cannot say, where the released config inside a checkpoint does."""
    value: Any = source.settings if source.kind == "released" else {}
    for key in ("cfg", "MODEL", "FUSION", "AGGREGATION"):
        value = value.get(key, {}) if isinstance(value, dict) else {}
    if not isinstance(value, str):
        return {}
    chosen("fusion", value.lower(), FUSIONS)
    return {"fusion": value.lower()}


def _only_dataset(source: Source, num_classes: int) -> str:
    """The one data set with so many classes."""
    fitting = [name for name, spec in DATASETS.items() if spec.num_classes == num_classes]
    if len(fitting) != 1:
        several = f"{', '.join(fitting)} have" if fitting else "no data set has"
        raise ValueError(f"{source.path} has {num_classes} classes, and {several} so many; say --dataset NAME")
    return fitting[0]


def _data(dataset: str, num_classes: int | None, what: str) -> Data:
    """Settings for evaluating on a data set at its own size; ValueError if it has another number of classes."""
    spec = chosen("data set", dataset, DATASETS)
    if num_classes is not None and spec.num_classes != num_classes:
        fitting = [name for name, each in DATASETS.items() if each.num_classes == num_classes]
        raise ValueError(
            f"{what} has {num_classes} classes, but {dataset} has {spec.num_classes}; "
            f"with {num_classes} there is: {', '.join(fitting) or 'none'}"
        )
    return Data(dataset=dataset, size=spec.size, crop=(spec.size[0] // 2, spec.size[1] // 2))


def _write_run(
    folder: Path, config: Config, model: Segmenter, step: int, origin: Mapping[str, Any], trained: str | None = None
) -> None:
    """A run folder that counts as trained, all at once or not at all."""
    scratch = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}")
    try:
        write_json(scratch / "config.json", {"schema": SCHEMA, "id": folder.name, "config": flatten(config)})
        code = {name: value for name, value in code_source().items() if name != "diff"}
        write_json(scratch / "provenance.json", {"schema": SCHEMA, **code, "imported": origin})
        trained = trained or config.data.dataset
        meta = {"step": step, "id": folder.name, "classes": list(DATASETS[trained].classes)}
        meta["initial"] = list(origin.get("initial", ()))  # training that starts from it has its own there
        digest = save_weights(scratch / "checkpoints/last.safetensors", model.state_dict(), meta)
        write_json(
            scratch / "result.json",
            {
                "schema": SCHEMA,
                "id": folder.name,
                "imported": origin["source"],
                "trained_on": trained,
                "steps": step,
                "checkpoints": {"last": {"file": "checkpoints/last.safetensors", "sha256": digest}},
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
            },
        )
        os.rename(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# ---------------------------------------------------------------------------------------------- backbones


def import_backbone(source: Source, folder: Path, wanted: Model | None = None, name: str | None = None) -> Imported:
    """Puts both branches of an ImageNet Swin into the weights folder, as safetensors under `name` or the file's own.

    ValueError if the Swin is not of the `wanted` size, and where another file of that name is there already.
    """
    try:
        found = infer_swin(source.weights)
        Config(model=found)
    except ValueError as error:
        raise ValueError(f"{source.path} looks like a {source.title}, but {error}") from error
    if wanted is not None:
        refuse_other_swin(found, wanted, str(source.path))
    _, report = fill(source, found, 1)
    meta = {"schema": SCHEMA, "kind": source.kind, "source": source.path.name, "sha256": source.sha256}
    # clones: the branches share their tensors, which safetensors refuses to write
    content = save({name: tensor.clone() for name, tensor in source.weights.items()}, {"crm": json.dumps(meta)})
    path = _keep(folder, name or source.path.stem, content)
    return Imported(path=path, report=report, whole=False)


def _report(source: Source, model: Model, loaded: list[str], initial: list[str], misfits: list[str]) -> Report:
    return Report(
        source=source.path.name,
        sha256=source.sha256,
        title=source.title,
        model=swin_name(model),
        loaded=tuple(loaded),
        initial=tuple(initial),
        misfits=tuple(misfits),
        unused=tuple(source.unused),
    )


def _plain(report: Report) -> dict[str, Any]:
    """For provenance: everything but the names of what was loaded, which is the rest."""
    return {
        "source": report.source,
        "sha256": report.sha256,
        "model": report.model,
        "loaded": len(report.loaded),
        "initial": list(report.initial),
        "misfits": list(report.misfits),
        "unused": list(report.unused),
    }
