"""One frozen Config of both methods' options: presets named after table rows, flags and JSON.

A field is `Annotated[type, (low, high), help]`: the closed range is a number's, choices are a `Literal`. No
PyTorch is imported.
"""
import argparse
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from .sre import options as sre
from .ucdr import options as ucdr


@dataclass(frozen=True)
class Shared:
    """The run, its images and its machine."""

    method: Annotated[
        Literal["ucdr-adapter", "zero-shot", "sre-clip", "closed-form"], "what to train"] = "ucdr-adapter"
    dataset: Annotated[
        Literal["toy", "domainnet", "sketchy", "sketchy-random", "tuberlin", "folder"],
        "sketchy: 21 test classes (ECCV 2018), sketchy-random: 25"] = "toy"
    data_root: Annotated[str, "<domain>/<class>/* lie here; drawn data is made here if absent"] = "data/toy"
    weights: Annotated[str, "CLIP: OpenAI's archive, a state dict or safetensors"] = "weights/demo-clip.pt"
    variant: Annotated[Literal["paper", "released"], "preset of the ledgers D and S"] = "paper"
    seed: Annotated[int, (0, inf), "seed of initial values, order and augmentation"] = 0

    # protocol
    held_out: Annotated[str, "query domain that training never sees; none: a seen one (U^cCDR)"] = "sketch"
    seen: Annotated[str, "source domain of validation and U^cCDR queries; empty: the protocol's"] = ""
    gallery: Annotated[str, "gallery domain; empty: the protocol's"] = ""
    domains: Annotated[tuple[str, ...], "own folders: all domains to use; empty: all there are"] = ()
    class_split: Annotated[str, "own folders: JSON with train, val and test classes; empty: drawn"] = ""
    stroke_domains: Annotated[
        tuple[str, ...], "domains of dark strokes on white, colour-inverted everywhere (D14)"] = (
        "sketch", "quickdraw", "sketches")
    toy_images: Annotated[int, (1, 10_000), "drawn images per domain and class"] = 20

    # machine
    device: Annotated[str, "cpu, cuda, cuda:1, ...; auto: a GPU when there is one"] = "auto"
    workers: Annotated[int, (0, 256), "processes that read images; 0: the main one does"] = 2
    precision: Annotated[
        Literal["fp32", "tf32", "bf16"],
        "arithmetic of the towers; LayerNorm stays float32, losses too but under tf32"] = "fp32"
    micro_batch: Annotated[
        int, (0, inf), "images of a phase-2 batch at once, to save memory; 0: 10 on a CPU, all on a GPU"] = 0


@dataclass(frozen=True)
class Config(sre.Options, ucdr.Options, Shared):
    """Every option of a run. Defaults are the paper's, or a careful reading's."""


# May differ when a run is resumed: what changes rounding alone, and paths, compared by digests.
MACHINE = ("device", "workers", "precision", "micro_batch")
PATHS = ("data_root", "class_split", "weights", "source", "target", "graph", "unseen")


class Field(NamedTuple):
    default: Any
    help: str
    choices: tuple[Any, ...] = ()  # none: any value of the default's type
    limits: tuple[float, float] = (-inf, inf)


def read_field(hint: Any, default: Any) -> Field:
    """A field from its annotation."""
    *limits, text = hint.__metadata__
    literal = typing.get_origin(hint.__origin__) is Literal
    return Field(default, text, typing.get_args(hint.__origin__) if literal else (), *limits)


HINTS = typing.get_type_hints(Config, include_extras=True)
FIELDS = {field.name: read_field(HINTS[field.name], field.default) for field in fields(Config)}

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": dict(
        mask="none", feature_token=1, evaluation_features="raw", train_normalization="imagenet",
        selection="test", query_feature="patch", ud_gallery="trained", triplet_distance="plain",
        triplet_mean="paired", momentum_start="random", queue_push="before",
        stroke_domains=("sketch", "quickdraw"), balance="released", structure_pairs="diagonal",
        test_attention="batch", retention_scale="scaled", bank_ring="released", structure_classes=100,
        sre_report="best-test")}

DOMAINNET = dict(dataset="domainnet", data_root="data/DomainNet", weights="weights/ViT-B-32.pt")
SKETCHY = dict(dataset="sketchy", data_root="data/Sketchy", weights="weights/ViT-B-32.pt", held_out="none",
               prompt_length=4, context_vectors=8)
# The drawn data is small: larger and fewer steps, a shorter context than the paper's.
TOY = dict(dataset="toy", context_vectors=4, source_batch=50, source_lr=1e-3, target_epochs=2, target_lr=1e-2,
           micro_batch=50)
# SRE-CLIP inverts no image by itself (D14 is the other method's), whatever the variant.
SRE = dict(method="sre-clip", dataset="folder", data_root="", weights="weights/ViT-B-32.pt",
           stroke_domains=())
# The small CLIP knows no words but the 60 class names.
SRE_TOY = dict(SRE, dataset="toy", data_root="data/toy-sre", weights="weights/demo-clip.pt", graph="toy",
               class_vectors="clip-classes", sre_hidden=256, sre_dropout=0.3, sre_iterations=1000,
               sre_warmup=100)
# Datasets' own, rows of the paper's tables, demonstrations.
PRESETS: dict[str, dict[str, Any]] = {
    "toy": TOY,
    "toy/fast": dict(TOY, data_root="data/toy-fast", toy_images=8, target_epochs=1),
    "folder": dict(dataset="folder", data_root="", weights="weights/ViT-B-16.pt"),
    "domainnet": DOMAINNET,
    **{f"domainnet/{held_out}": dict(DOMAINNET, held_out=held_out, seen=seen)
       for held_out, seen in (("sketch", "quickdraw"), ("quickdraw", "sketch"), ("painting", "infograph"),
                              ("infograph", "painting"), ("clipart", "painting"))},
    "sketchy": SKETCHY,
    "sketchy-random": dict(SKETCHY, dataset="sketchy-random"),
    "tuberlin": dict(SKETCHY, dataset="tuberlin", data_root="data/TUBerlin"),
    "sre": SRE,
    "sre/toy": SRE_TOY,
    "sre/toy/fast": dict(SRE_TOY, data_root="data/toy-sre-fast", toy_images=8, sre_iterations=500),
    "i2awa": dict(SRE, graph="awa2", sre_kappa=0.3),
    "i2webv": dict(SRE, sre_kappa=0.82)}


def add_arguments(parser: argparse.ArgumentParser, names: Sequence[str] = ()) -> None:
    """A flag for each named field, or all; one that is not given leaves no trace."""
    for options in (Shared, ucdr.Options, sre.Options):
        group = parser.add_argument_group(str(options.__doc__).split(".")[0])
        for name in (field.name for field in fields(options) if not names or field.name in names):
            default, text, choices, _ = FIELDS[name]
            several = isinstance(default, tuple)
            shown = (" ".join(default) if several else str(default)) or "empty"
            group.add_argument(
                flag_of(name), type=str if several else type(default), nargs="+" if several else None,
                choices=choices or None, help=f"{text} (default: {shown})", default=argparse.SUPPRESS)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"{' '.join(unknown)}: no flag here, see --help; a run's options need a training")
    return args


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def resolve(flags: Mapping[str, Any], preset: str | None = None, fast: bool = False) -> Config:
    """Defaults < variant < preset < flags; fast: the preset's short demonstration. Raises ValueError."""
    name = (preset or default_preset(flags)) + "/fast" * fast
    if name not in PRESETS:
        raise ValueError(f"--preset {name}: no such preset; there are {', '.join(PRESETS)}")
    variant = VARIANTS[flags.get("variant", "paper")]
    merged = {**variant, **PRESETS[name], **{key: value for key, value in flags.items() if key in FIELDS}}
    other_sets = merged["dataset"] in ("sketchy", "sketchy-random", "tuberlin")
    if variant and other_sets and merged["selection"] != "validation":
        # D10: the released code holds the validation classes out of training on DomainNet alone.
        merged.setdefault("train_classes", "train+val")
    merged["weights"] = locate_weights(merged.get("weights", Config.weights))
    return from_dict(merged)


def default_preset(flags: Mapping[str, Any]) -> str:
    """The preset of a command that names none."""
    dataset = flags.get("dataset", "toy")
    if flags.get("method") != "sre-clip":
        return str(dataset)
    own_folders = dataset != "toy" or flags.get("source") or flags.get("target")
    return "sre" if own_folders else "sre/toy"


def locate_weights(path: str) -> str:
    """The path of weights; beside the scripts where the current folder has no such file."""
    beside = Path(__file__).parents[1] / path
    return str(beside) if beside.exists() and not Path(path).exists() else path


def from_dict(values: Mapping[str, Any]) -> Config:
    """A checked Config from plain values; ValueError names a field that does not exist or fit."""
    if unknown := [str(name) for name in values if name not in FIELDS]:
        raise ValueError(f"{', '.join(unknown)[:300]}: no option of this version; see --help")
    return Config(**{name: check(name, value) for name, value in values.items()})


def check(name: str, value: Any) -> Any:
    """The value as the field's type; ValueError when it is no value of that field."""
    default, _, choices, (low, high) = FIELDS[name]
    if isinstance(default, tuple) and isinstance(value, list) and all(type(item) is str for item in value):
        return tuple(value)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        expected = f"of type {type(default).__name__}"
    elif choices and value not in choices:
        expected = f"one of {', '.join(map(str, choices))}"
    elif isinstance(value, (int, float)) and not (low <= value <= high and value < inf):
        expected = f"at least {low:g}" + f" and at most {high:g}" * (high < inf)
    else:
        return value
    raise ValueError(f"{flag_of(name)} {str(value)[:100]}: must be {expected}")


def differences(ours: Config, theirs: Config, also: Sequence[str] = ()) -> list[str]:
    """`name: theirs -> ours` where two configs differ, but for machine fields and those in `also`."""
    old, new = asdict(theirs), asdict(ours)
    return [f"{name}: {old[name]!r} -> {new[name]!r}" for name in FIELDS
            if name not in (*MACHINE, *also) and old[name] != new[name]]
