"""What a run is: every knob that changes a result, and nothing else.

Torch-free. What does not change a result (folders, device, threads) is `crm.machine.Machine`. A config has one written
form, flat dotted paths (`{"masking.ratio": 0.3}`), used in sweeps, `--set`, config.json, tracking and data frames.
The defaults are the published Swin-T setting on the MF data set under the clean recipe; experiments state what differs.
"""

import ast
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, cached_property
from hashlib import sha256
from typing import Any, TypeVar

from crm.names import family, unknown

T = TypeVar("T", bound=Any)

SCHEMA = 1  # version of what is written to disk; raised when a reader would misread an older record


def _as(old: Any, value: Any, path: str) -> Any:
    """`value` if it has the type of the field it replaces; JSON's int and list stand in for float and tuple."""
    if isinstance(old, float) and type(value) is int:
        return float(value)
    if isinstance(old, tuple) and isinstance(value, (list, tuple)):
        if all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in value):
            if len(value) != len(old):
                raise ValueError(f"{path} takes {len(old)} numbers, as in {old}, not {value!r}")
            return tuple(_as(kept, item, path) for kept, item in zip(old, value, strict=True))
    elif type(value) is type(old):
        return value
    raise ValueError(f"{path} takes a {type(old).__name__}, as in {old!r}, not {value!r}")


def _check_number(path: str, value: Any) -> None:
    """Refuses numbers, alone or in a tuple, that are not finite or are negative."""
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f"{path} must be a finite number, not {value}")
        if isinstance(number, (int, float)) and number < 0:
            raise ValueError(f"{path} must not be negative, but is {value}")


class _Part:
    """A part of a config, its values checked one by one when it is made: a sweep makes thousands that share theirs."""

    def __post_init__(self) -> None:
        name = type(self).__name__.lower()
        for f in fields(self):  # type: ignore[arg-type]
            path, value = f"{name}.{f.name}", getattr(self, f.name)
            kept = _as(f.default, value, path)  # 1 and 1.0, (1, 2) and [1, 2] must be one run
            if kept is not value:
                object.__setattr__(self, f.name, kept)
            _check_number(path, kept)

    @cached_property
    def _flat(self) -> dict[str, Any]:
        """Its values by dotted paths."""
        name = type(self).__name__.lower()
        return {f"{name}.{f.name}": getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    @cached_property
    def _plain(self) -> dict[str, Any]:
        return {path: list(value) if isinstance(value, tuple) else value for path, value in self._flat.items()}


@dataclass(frozen=True, kw_only=True)
class Data(_Part):
    dataset: str = "mf"  # a key of crm.data.specs.DATASETS
    size: tuple[int, int] = (480, 640)  # height, width of a frame in pixels; other frames are resized to it
    crop: tuple[int, int] = (240, 320)  # height, width of a training crop, pixels
    scale: tuple[float, float] = (0.5, 2.0)  # range of the random resize before the crop, relative to `size`
    scale_step: float = 0.1  # sizes are drawn in steps of this (16 of them, as released); 0 draws any size
    longest: int = 1920  # pixels; a resize that would make the longer side longer stops there
    flip: float = 0.5  # probability of a horizontal flip
    jitter: float = 1.0  # strength of the photometric jitter; 0 is off
    float_resize: bool = False  # random resize of floats, without antialias (True in the released code)
    float_jitter: bool = False  # jitter of floats, which breaks saturation and hue (True in the released code)
    drop_last: bool = False  # an epoch leaves out its last, incomplete batch (True in the released code)
    carve_val: bool = True  # a data set without a val split gets one, held out of train (False in the released code)
    train_images: int = 0  # the first n of the split; 0 is all of it
    val_images: int = 0
    test_images: int = 0


@dataclass(frozen=True, kw_only=True)
class Model(_Part):
    # what it starts from: a file of the weights folder (both Swins, or a whole network), a finished run, or "none"
    init: str = "swin_tiny_patch4_window7_224"
    thermal_stem: str = "mean"  # first filters of thermal, from the three of RGB: a key of crm.weights.initial.STEMS
    inputs: str = "both"  # a key of crm.model.segmenter.INPUTS: both modalities in two branches, or a control
    embed: int = 96  # channels of the first Swin stage; they double at each stage
    depths: tuple[int, ...] = (2, 2, 6, 2)  # blocks of the four stages
    heads: tuple[int, ...] = (3, 6, 12, 24)  # attention heads of the four stages
    window: int = 7  # side of an attention window, tokens
    drop_path: float = 0.3  # stochastic depth of the last block; grows linearly from 0
    fusion: str = "max"  # a key of crm.model.fusion.FUSIONS
    share_from: int = 4  # first Swin stage whose blocks both branches share; 4 shares none
    fusion_norm: str = "shared"  # what the masked pass does with the fusion norms: a key of crm.model.norm.FUSION_NORMS
    sparsity: float = 1e-4  # fusion "token_exchange": weight of the L1 norm of an image's scores
    sync_norm: bool = True  # the fusion norms see the images of all processes (False in the released code)
    width: int = 256  # channels of the pixel decoder and of a query
    queries: int = 100
    encoder_layers: int = 6  # deformable layers of the pixel decoder
    encoder_ffn: int = 1024
    decoder_layers: int = 9  # masked-attention layers of the query decoder
    decoder_ffn: int = 2048
    decoder_heads: int = 8  # attention heads of both decoders


@dataclass(frozen=True, kw_only=True)
class Masking(_Part):
    kind: str = "random_complementary"  # a key of crm.masking.MASKINGS
    shape: str = "patch"  # a key of crm.masking.SHAPES
    ratio: float = 0.5  # share of patches (or of the area) hidden by one mask
    patch: int = 32  # side of a patch, pixels
    cover_padding: bool = False  # the grid also covers padded rows and columns (True in the released code)
    drop: float = 0.25  # modality dropout: probability that a modality is hidden whole, per modality, never both
    overlap: float = 0.0  # share of what complementary masks hide that is hidden in both; 1: identical masks
    probability: float = 1.0  # that an image is masked at all
    fill: str = "token"  # what stands for a hidden token: a key of crm.masking.FILLS
    view: str = "clean"  # the picture the masked passes see, of which tokens are hidden: a key of crm.data.views.VIEWS
    corruptions: str = "noise"  # what the view "corrupted" trains on: a key of crm.data.views.GROUPS


@dataclass(frozen=True, kw_only=True)
class Loss(_Part):
    # weights of the terms; a term of weight 0 is not computed, nor are the head passes that only it needs
    fused: float = 1.0  # supervision of the fused features, clean input
    rgb: float = 1.0  # modality-wise supervision, RGB features alone
    thermal: float = 1.0  # modality-wise supervision, thermal features alone
    masked: float = 1.0  # supervision of the fused features, masked input
    complementary: float = 1.0  # L_SDC: fused clean teaches fused masked
    non_local: float = 1.0  # L_SDN: fused clean teaches RGB masked and thermal masked
    rgb_masked: float = 0.0  # supervision of RGB features alone, masked input (not in the paper)
    thermal_masked: float = 0.0  # supervision of thermal features alone, masked input (not in the paper)
    passes: str = "all"  # which head passes a step computes: a key of crm.passes.PASSES
    # what L_SDC and L_SDN compare
    distillation: str = "l1_logits"  # a key of crm.distillation.DISTILLATIONS
    teacher: str = "train"  # how the clean fused pass is made that teaches: a key of crm.distillation.TEACHERS
    temperature: float = 1.0  # softens both sides' class distributions, in the forms of crm.distillation.SOFTENED
    # inside one supervised term
    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object: float = 0.1  # class weight of "no object"
    points: int = 12_544  # points sampled per mask
    oversample: float = 3.0  # candidates per uncertain point
    importance: float = 0.75  # share of points taken where the mask is uncertain
    count_padding: bool = False  # padded rows and columns act as negatives (True in the released code)
    count_ignored: bool = False  # ignored pixels act as negatives (True in the released code)


@dataclass(frozen=True, kw_only=True)
class Optim(_Part):
    lr: float = 1e-4
    backbone_factor: float = 0.1  # learning rate of both Swins, mask tokens and fusion norms, relative to lr
    weight_decay: float = 0.05
    clip: float = 0.01  # global L2 norm of the gradient
    power: float = 0.9  # of the polynomial decay to zero
    ema: float = 0.0  # decay per step of an average of the weights, which is what is evaluated; 0 is off
    schedule: str = "step"  # a key of crm.optim.SCHEDULES: what the decay counts
    warmup: int = 0  # steps of linear warm-up


@dataclass(frozen=True, kw_only=True)
class Config:
    data: Data = Data()
    model: Model = Model()
    masking: Masking = Masking()
    loss: Loss = Loss()
    optim: Optim = Optim()
    batch: int = 14  # images per step
    steps: int = 35_000
    val_every: int = 280  # steps between validations; 0 is only at the end
    test_best: bool = False  # also keep the checkpoint that is best on the test split, as the released code does
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self)

    @cached_property
    def _id(self) -> str:
        delta = json.dumps(difference(self, STANDARD), sort_keys=True)
        return sha256(delta.encode()).hexdigest()[:12]


# settings that name one of a family of alternatives: its file and its dict
FAMILIES = {
    "data.dataset": ("data/specs.py", "DATASETS"),
    "model.inputs": ("model/segmenter.py", "INPUTS"),
    "model.fusion": ("model/fusion.py", "FUSIONS"),
    "model.fusion_norm": ("model/norm.py", "FUSION_NORMS"),
    "model.thermal_stem": ("weights/initial.py", "STEMS"),
    "masking.kind": ("masking.py", "MASKINGS"),
    "masking.shape": ("masking.py", "SHAPES"),
    "masking.fill": ("masking.py", "FILLS"),
    "masking.view": ("data/views.py", "VIEWS"),
    "masking.corruptions": ("data/views.py", "GROUPS"),
    "loss.distillation": ("distillation.py", "DISTILLATIONS"),
    "loss.teacher": ("distillation.py", "TEACHERS"),
    "loss.passes": ("passes.py", "PASSES"),
    "optim.schedule": ("optim.py", "SCHEDULES"),
}


def alternatives(path: str) -> tuple[str, ...]:
    """What there is to choose from for a setting of FAMILIES, without importing it."""
    return family(*FAMILIES[path])


def _check(config: Config) -> None:
    """Refuses values that cannot work, alone or together, naming the fields."""
    data, model, masking, loss = config.data, config.model, config.masking, config.loss
    for path in FAMILIES:
        part, _, name = path.partition(".")
        value = getattr(getattr(config, part), name)
        if value not in (known := alternatives(path)):
            raise unknown(path, value, known)
    for path in ("batch", "steps", "val_every"):
        _check_number(path, getattr(config, path))
    if not config.optim.lr or not config.optim.clip:
        raise ValueError("optim.lr and optim.clip must be above 0: nothing would be learned")
    if min(*data.size, *data.crop) < 1:
        raise ValueError(f"data.size and data.crop must be at least one pixel, not {data.size} and {data.crop}")
    positive = {
        "batch": config.batch,
        "steps": config.steps,
        "loss.points": loss.points,
        "model.queries": model.queries,
    }
    for path, value in positive.items():
        if value < 1:
            raise ValueError(f"{path} must be at least 1, not {value}")
    shares = {"masking.ratio": masking.ratio, "masking.drop": masking.drop, "data.flip": data.flip}
    shares |= {"masking.overlap": masking.overlap, "masking.probability": masking.probability}
    shares |= {"loss.importance": loss.importance, "model.drop_path": model.drop_path}
    for path, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{path} must be between 0 and 1, not {value}")
    if masking.drop > 0.5:
        raise ValueError(f"masking.drop must be at most 0.5 (never both modalities), not {masking.drop}")
    if masking.patch < 4 or masking.patch % 4:
        raise ValueError(f"masking.patch must be a multiple of 4 pixels (one token), not {masking.patch}")
    if masking.cover_padding and masking.shape != "patch":
        raise ValueError(
            f"masking.cover_padding is the released code's grid of patches, and masking.shape is {masking.shape!r}: "
            "the released code cannot train with any other shape"
        )
    padded = tuple(-(-side // 32) * 32 for side in data.crop)
    if masking.cover_padding and masking.kind != "none" and any(side % masking.patch for side in padded):
        raise ValueError(
            f"masking.patch {masking.patch} does not divide the padded crop {padded}, which the released code refuses; "
            "masking.cover_padding=False cuts the grid at the edge"
        )
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", model.init):
        raise ValueError(
            f"model.init takes none, or the name of a file of the weights folder or of a run, not {model.init!r}"
        )
    if len(model.depths) != 4 or len(model.heads) != 4:
        raise ValueError(f"model.depths and model.heads need 4 stages, not {model.depths} and {model.heads}")
    for stage, heads in enumerate(model.heads):
        if model.embed * 2**stage % heads:
            raise ValueError(f"model.heads[{stage}] = {heads} must divide model.embed * {2**stage}")
    if model.width % model.decoder_heads or model.width % 32:
        raise ValueError(f"model.width must be a multiple of model.decoder_heads and of 32, not {model.width}")
    if not 0 <= model.share_from <= 4:
        raise ValueError(f"model.share_from must be 0 to 4, not {model.share_from}")
    if data.scale[0] > data.scale[1] or data.scale[0] <= 0:
        raise ValueError(f"data.scale must be a rising range above 0, not {data.scale}")
    if any(crop > side * data.scale[0] for crop, side in zip(data.crop, data.size, strict=True)):
        raise ValueError(f"data.crop {data.crop} does not fit into data.size {data.size} scaled by {data.scale[0]}")
    _check_terms(config)
    _check_network(config)


def _check_terms(config: Config) -> None:
    """Refuses masks and terms of the loss that have no meaning together, naming both."""
    masking, loss = config.masking, config.loss
    if not any(getattr(loss, name) for name in SUPERVISED):
        raise ValueError(f"one of {', '.join(f'loss.{name}' for name in SUPERVISED)} must be above 0")
    wanted = [name for name in OF_MASKED_INPUT if getattr(loss, name)]
    distilled = [name for name in ("complementary", "non_local") if getattr(loss, name)]
    if masking.kind == "none" and masking.view == "clean" and wanted:
        raise ValueError(f"masking.kind is 'none', so loss.{wanted[0]} must be 0: there is no masked input")
    if masking.view != "clean" and not wanted:
        names = ", ".join(f"loss.{name}" for name in OF_MASKED_INPUT)
        raise ValueError(f"masking.view is {masking.view!r}, but nothing looks at it: {names} are 0")
    if masking.view in family("data/views.py", "OTHER_SCENES") and distilled:
        raise ValueError(
            f"masking.view is {masking.view!r}, so loss.{distilled[0]} must be 0: it is another scene than the clean "
            "input, which teaches"
        )
    if masking.view in family("data/views.py", "OF_TWO_IMAGES") and config.batch < 2:
        raise ValueError(f"masking.view {masking.view!r} mixes two images of a batch, and batch is 1")
    if masking.overlap and (masking.kind not in ("complementary", "random_complementary") or masking.shape == "square"):
        raise ValueError(
            f"masking.overlap is of complementary masks of patches, and masking.kind is {masking.kind!r} with "
            f"masking.shape {masking.shape!r}; masking.kind 'identical' hides the same in both whatever the shape"
        )
    if not loss.temperature:
        raise ValueError("loss.temperature must be above 0: logits are divided by it")
    softened = family("distillation.py", "SOFTENED")
    if loss.temperature != Loss.temperature and not (distilled and loss.distillation in softened):
        why = (
            f"loss.distillation is {loss.distillation!r}"
            if distilled
            else "loss.complementary and loss.non_local are 0"
        )
        raise ValueError(f"loss.temperature is of loss.distillation {', '.join(map(repr, softened))}, and {why}")
    if loss.teacher == "ema" and distilled and not config.optim.ema:
        raise ValueError("loss.teacher 'ema' is the average of the weights, so optim.ema must be above 0, as in 0.99")
    inputs = config.model.inputs
    if loss.passes != "all" and inputs != "both":
        raise ValueError(
            f"loss.passes is {loss.passes!r}, which draws one of two modalities, and model.inputs is {inputs!r}"
        )
    alone = ("rgb", "thermal", "non_local", "rgb_masked", "thermal_masked")
    if loss.passes != "all" and not any(getattr(loss, name) for name in alone):
        raise ValueError(
            f"loss.passes is {loss.passes!r}, and nothing looks at one modality alone: "
            f"{', '.join(f'loss.{name}' for name in alone)} are 0"
        )
    without = {"both": (), "late": ("masked",)}.get(inputs, ("rgb_masked", "thermal_masked"))
    for name in without:
        if getattr(loss, name):
            raise ValueError(f"model.inputs is {inputs!r}, so loss.{name} must be 0: it has no such path")


def _check_network(config: Config) -> None:
    """Refuses settings of the network that have no meaning together, naming both."""
    model, loss = config.model, config.loss
    if model.inputs != "both":
        standard = Model()
        for name in ("fusion", "fusion_norm", "share_from"):
            if getattr(model, name) != getattr(standard, name):
                raise ValueError(
                    f"model.inputs is {model.inputs!r}, so model.{name} must stay {getattr(standard, name)!r}: "
                    "there is nothing to fuse or to share"
                )
        if config.masking.kind != "none" and model.inputs != "early":
            raise ValueError(
                f"model.inputs is {model.inputs!r}, so masking.kind must be 'none': masks hide one modality where the "
                "other is seen, which needs a network of both"
            )
        if config.masking.kind != "none" and config.masking.fill == "token":
            raise ValueError(
                f"model.inputs is {model.inputs!r}, so masking.fill must be 'mean': a token of four channels has no "
                "mask token for one of its modalities"
            )
        without = ("fused", "complementary") if model.inputs == "late" else ("rgb", "thermal")
        without += ("non_local",)
        needed = ("rgb", "thermal") if model.inputs == "late" else ()
        for names, wrong, rule in ((without, True, "must be 0"), (needed, False, "must be above 0")):
            for name in names:
                if bool(getattr(loss, name)) == wrong:
                    why = (
                        "each network is trained by itself"
                        if model.inputs == "late"
                        else "it has one path, of loss.fused and loss.masked"
                    )
                    raise ValueError(f"model.inputs is {model.inputs!r}, so loss.{name} {rule}: {why}")
    if model.sparsity != Model.sparsity and model.fusion != "token_exchange":
        raise ValueError(f"model.sparsity is of model.fusion 'token_exchange', and model.fusion is {model.fusion!r}")
    if model.thermal_stem != "mean" and (model.init == "none" or model.inputs == "rgb"):
        why = "model.init is 'none'" if model.init == "none" else "model.inputs is 'rgb'"
        raise ValueError(f"model.thermal_stem {model.thermal_stem!r} is of the filters taken from RGB, and {why}")
    if model.fusion_norm != "shared":
        if not (loss.masked or loss.complementary):
            raise ValueError(f"model.fusion_norm {model.fusion_norm!r} needs loss.masked or loss.complementary above 0")
        if not (loss.fused or (loss.teacher == "train" and (loss.complementary or loss.non_local))):
            raise ValueError(
                f"model.fusion_norm {model.fusion_norm!r} takes its statistics from the clean fused pass in training, "
                "which needs loss.fused above 0, or a distilled term with loss.teacher 'train'"
            )


OF_MASKED_INPUT = ("masked", "complementary", "non_local", "rgb_masked", "thermal_masked")  # terms that need one
SUPERVISED = ("fused", "rgb", "thermal", "masked", "rgb_masked", "thermal_masked")
# the weighted terms of Loss
TERMS = ("fused", "rgb", "thermal", "masked", "complementary", "non_local", "rgb_masked", "thermal_masked")


def override(config: T, changes: Mapping[str, Any], prefix: str = "") -> T:
    """`config` with dotted paths replaced together: `override(config, {"masking.ratio": 0.3, "seed": 2})`."""
    names = [f.name for f in fields(config)]
    inner: dict[str, dict[str, Any]] = {}
    new: dict[str, Any] = {}
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        if name not in names:
            raise unknown("setting", prefix + path, _nearby(config, prefix, path))
        old = getattr(config, name)
        if is_dataclass(old) != bool(rest):
            raise unknown("setting", prefix + path, flatten(config, prefix))
        if rest:
            inner.setdefault(name, {})[rest] = value
        else:
            new[name] = _as(old, value, prefix + path)
    new |= {name: override(getattr(config, name), part, f"{prefix}{name}.") for name, part in inner.items()}
    return replace(config, **new)


def _nearby(config: Any, prefix: str, path: str) -> list[str]:
    """The settings to list for a wrong path: those of its part, or all of them if the part is wrong too."""
    whole = flatten(Config()) if not isinstance(config, Config) else flatten(config)
    part = [known for known in whole if known.startswith(prefix)] if prefix else list(whole)
    return part or list(flatten(config, prefix))


def parse_set(text: str, takes: str = "--set takes path=value, as in masking.ratio=0.3") -> tuple[str, Any]:
    """`masking.ratio=0.3` as path and value; what is not a Python literal is a string.

    Args:
        takes: what the option takes, for the message.
    """
    path, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{takes}, not {text!r}")
    value = {"true": "True", "false": "False"}.get(value.strip().lower(), value.strip())
    try:
        return path.strip(), ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return path.strip(), value


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted paths to plain values: the one written form of a config."""
    if isinstance(config, _Part):
        return {prefix + path.partition(".")[2]: value for path, value in config._flat.items()}
    flat: dict[str, Any] = {}
    for name in _names():
        value = getattr(config, name)
        if isinstance(value, _Part):
            flat |= value._flat  # made once: the thousands of cells of a sweep share most of their parts
        else:
            flat[name] = value
    return flat


def plain(config: Config) -> dict[str, Any]:
    """A config's values by dotted paths as config.json has them: a list for a tuple. To be read, not changed."""
    flat: dict[str, Any] = {}
    for name in _names():
        value = getattr(config, name)
        if isinstance(value, _Part):
            flat |= value._plain
        else:
            flat[name] = value
    return flat


@cache
def _names() -> tuple[str, ...]:
    return tuple(f.name for f in fields(Config))


def seeded(config: Config, seed: int) -> Config:
    """The config with another seed. It is not checked anew: no check looks at seeds, and a sweep makes thousands."""
    made = object.__new__(Config)
    made.__dict__.update(config.__dict__, seed=_as(config.seed, seed, "seed"))
    made.__dict__.pop("_id", None)
    return made


def difference(config: Config, reference: Config) -> dict[str, Any]:
    """The dotted paths whose values differ from `reference`, with this config's values."""
    there = flatten(reference)
    return {path: value for path, value in flatten(config).items() if value != there[path]}


def run_id(config: Config) -> str:
    """Twelve hex digits naming what differs from the defaults.

    A new field keeps every old id when its default means "as before"; a changed default is caught when its run is
    reopened (`crm.records.open_run`).
    """
    return config._id


STANDARD = Config()
