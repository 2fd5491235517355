"""One frozen Config of both methods' options: presets named after table rows, flags and JSON."""
from __future__ import annotations

import argparse
import json
import math
import operator
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from .machine.options import MACHINE, Shared
from .sre import options as sre
from .ucdr import options as ucdr


@dataclass(frozen=True)
class Config(sre.Options, ucdr.Options, Shared):
    """Every option of a run. Defaults are the paper's, or a careful reading's; a dataset's own: PRESETS."""


class Field(NamedTuple):
    kind: type
    choices: tuple[Any, ...]  # empty: any value of the kind
    rule: str  # the range of a number x, such as `0 <= x < 1`
    metavar: str
    help: str
    default: Any


def read_fields() -> Iterator[tuple[str, Field]]:
    """What the option classes say of each field, Shared's first."""
    hints = typing.get_type_hints(Config, include_extras=True)
    for field in fields(Config):
        hint, kind = hints[field.name], type(field.default)
        *told, text = hint.__metadata__  # the range of a number or the name of a text, then the help
        choices = () if told else typing.get_args(hint.__origin__)
        if told and isinstance(told[0], tuple):
            low, high = told[0]
            told = [f"{low} <= x" + (f" <= {high}" if high < math.inf else "")]
        rule = "".join(told) if kind in (int, float) else ""
        metavar = rule.replace("x", "N" if kind is int else "X").replace(" ", "") or "".join(told)
        yield field.name, Field(kind, choices, rule, metavar, text, field.default)


FIELDS = dict(read_fields())

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": dict(
        mask="none", feature_token=1, evaluation_features="raw", train_normalization="imagenet",
        selection="test", query_feature="patch", ud_gallery="trained", triplet_distance="plain",
        triplet_mean="paired", image_reading="as-is", momentum_start="random", queue_push="before",
        stroke_domains=("sketch", "quickdraw"), balance="released", structure_pairs="diagonal",
        test_attention="batch", retention_scale="scaled", bank_ring="released", structure_classes=100,
        sre_report="best-test")}

DOMAINNET = dict(dataset="domainnet", data_root="data/DomainNet", weights="weights/ViT-B-32.pt")
SKETCHY = dict(dataset="sketchy", data_root="data/Sketchy", weights="weights/ViT-B-32.pt", held_out="none",
               prompt_length=4, context_vectors=8)
# The drawn data and its CLIP are small: larger steps, fewer of them, and a shorter context than the paper's.
TOY = dict(dataset="toy", context_vectors=4, source_batch=50, source_lr=1e-3, target_epochs=2, target_lr=1e-2,
           micro_batch=50)
# SRE-CLIP: labelled and unlabelled folders are given by flags; the drawn ones are made below data_root.
# D14 is the other method's: no image is inverted here unless --stroke-domains says so.
SRE = dict(method="sre-clip", dataset="folder", data_root="", weights="weights/ViT-B-32.pt",
           stroke_domains=(), save_every=1000)
# Its small CLIP has read no words but the 60 class names and bears less dropout in 64 text dimensions.
SRE_TOY = dict(SRE, dataset="toy", data_root="data/toy-sre", weights="weights/demo-clip.pt", graph="toy",
               class_vectors="clip-classes", sre_hidden=256, sre_dropout=0.3, sre_iterations=1000,
               sre_warmup=100)
# Named after the rows of the paper's tables; `seen` is the source domain its runs validate on.
PRESETS: dict[str, dict[str, Any]] = {
    "toy": TOY,
    "toy/fast": dict(TOY, data_root="data/toy-fast", toy_images=8, target_epochs=1),
    "folder": dict(dataset="folder", data_root="", weights="weights/ViT-B-16.pt"),
    **{f"domainnet/{held_out}": dict(DOMAINNET, held_out=held_out, seen=seen)
       for held_out, seen in (("sketch", "quickdraw"), ("quickdraw", "sketch"), ("painting", "infograph"),
                              ("infograph", "painting"), ("clipart", "painting"))},
    "sketchy/eccv": dict(SKETCHY, sketchy_split="eccv"),
    "sketchy/random": dict(SKETCHY, sketchy_split="random"),
    "tuberlin": dict(SKETCHY, dataset="tuberlin", data_root="data/TUBerlin"),
    "sre": SRE,
    "sre/toy": SRE_TOY,
    "sre/toy-fast": dict(SRE_TOY, data_root="data/toy-sre-fast", toy_images=8, sre_iterations=500),
    "i2awa": dict(SRE, graph="awa2", sre_kappa=0.3),
    "i2webv": dict(SRE, sre_kappa=0.82)}

# What `--help` shows; `--help-all` shows everything.
ESSENTIAL = ("method", "dataset", "data_root", "weights", "variant", "seed", "held_out", "gallery",
             "class_split", "bad_images", "source", "target", "graph", "device", "workers", "precision")


class HelpAll(argparse.Action):
    """`--help-all`: every flag, in the groups of the option classes."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        for action in parser._actions:
            action.help = getattr(action, "whole_help", action.help)
        parser.print_help()
        parser.exit()


def add_arguments(parser: argparse.ArgumentParser, names: Sequence[str] = ()) -> None:
    """A flag for each named field, or all; one that is not given leaves no trace, so presets show through."""
    parser.add_argument("--help-all", action=HelpAll, nargs=0, default=argparse.SUPPRESS,
                        help="show every flag and exit")
    for group in (Shared, ucdr.Options, sre.Options):
        section = parser.add_argument_group(str(group.__doc__).split(".")[0])
        for name in (field.name for field in fields(group) if not names or field.name in names):
            field = FIELDS[name]
            several = field.kind is tuple
            default = " ".join(field.default) if several else field.default
            text = f"{field.help} (default: {'empty' if default == '' else default})"
            action = section.add_argument(
                flag_of(name), type=str if several else field.kind, nargs="+" if several else None,
                choices=field.choices or None, metavar=field.metavar or None, default=argparse.SUPPRESS,
                help=text if name in ESSENTIAL else argparse.SUPPRESS)
            action.whole_help = text  # type: ignore[attr-defined]


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def resolve(flags: Mapping[str, Any], preset: str | None = None, fast: bool = False) -> Config:
    """Defaults < preset < variant < flags. fast: the short demonstration.

    Raises ValueError for an unknown preset, one of another dataset or method than the flag's, or a long one
    with `fast`.
    """
    name = default_preset(flags, fast) if preset is None else preset
    if name not in PRESETS:
        raise ValueError(f"--preset {name}: no such preset; there are {', '.join(PRESETS)}")
    if fast and not name.endswith("fast"):
        raise ValueError(f"--fast is short for the demonstration alone, and this is {name}; leave it out")
    values = {"method": "ucdr-adapter", **PRESETS[name]}
    if preset is None:
        values.pop("seen", None)  # of the table's rows
    for key in ("dataset", "method"):
        own, given = values[key], flags.get(key, values[key])
        same_task = key == "method" and "sre-clip" not in (own, given)
        if given != own and not same_task:
            raise ValueError(f"--preset {name} is for --{key} {own}, not {given}; give one of the two")
    variant = dict(VARIANTS[flags.get("variant", "paper")])
    if values["method"] == "sre-clip":
        variant.pop("stroke_domains", None)  # D14 is the other method's
    merged = {**values, **variant, **{key: value for key, value in flags.items() if key in FIELDS}}
    if variant and merged["selection"] != "validation" and merged["dataset"] in ("sketchy", "tuberlin"):
        # D10: the released code holds the validation classes out of training on DomainNet alone.
        merged.setdefault("train_classes", "train+val")
    config = from_dict(merged)
    return replace(config, weights=located(config.weights))


def default_preset(flags: Mapping[str, Any], fast: bool) -> str:
    """The preset of a command that names none: its method's and dataset's own."""
    method, dataset = flags.get("method"), flags.get("dataset", "toy")
    folders = bool(flags.get("source") or flags.get("target"))
    if method == "sre-clip":
        if folders or dataset != "toy":
            return "sre"
        return "sre/toy-fast" if fast else "sre/toy"
    if fast and dataset == "toy":
        return "toy/fast"
    return next(name for name in PRESETS if PRESETS[name]["dataset"] == dataset)


def located(weights: str) -> str:
    """The path of weights; one beside the scripts where the current folder has no such file."""
    beside = Path(__file__).parents[1] / weights
    return str(beside) if os.path.exists(beside) and not os.path.exists(weights) else weights


def from_dict(values: Mapping[str, Any]) -> Config:
    """A checked Config from plain values; ValueError names a field that does not exist or fit."""
    if unknown := sorted(map(str, set(values) - set(FIELDS))):
        raise ValueError(f"unknown config fields {str(unknown)[:300]}; --help-all lists the {len(FIELDS)} "
                         "of this version")
    return Config(**{name: checked(name, value) for name, value in values.items()})


def checked(name: str, value: Any) -> Any:
    """The value of a field, of its type; ValueError in one sentence when it is no value of that field."""
    field = FIELDS[name]
    if field.kind is tuple and isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = tuple(value)
    elif field.kind is float and type(value) is int:
        with suppress(OverflowError):
            value = float(value)
    if type(value) is not field.kind:
        expected = field.kind.__name__
    elif field.choices and value not in field.choices:
        expected = f"one of {', '.join(map(str, field.choices))}"
    elif field.rule and not inside(typing.cast(float, value), field.rule):
        expected = f"a finite number x with {field.rule}"
    else:
        return value
    shown = " ".join(repr(value).split())[:100]
    raise ValueError(f"config field {name} is {shown}, expected {expected} (flag {flag_of(name)})")


def inside(x: float, rule: str) -> bool:
    """Whether a number is finite and obeys a rule such as `0 < x <= 1` or `1 <= x`."""
    words = rule.split()
    numbers = [x if word == "x" else float(word) for word in words[::2]]
    obeys = {"<": operator.lt, "<=": operator.le}
    pairs = zip(numbers, words[1::2], numbers[1:])
    return abs(x) < math.inf and all(obeys[sign](left, right) for left, sign, right in pairs)


def to_json(config: Config) -> str:
    return json.dumps(asdict(config), indent=2) + "\n"


def differences(ours: Config, theirs: Config, also: Sequence[str] = ()) -> list[str]:
    """`name: theirs -> ours` where two configs differ; machine fields, and those in `also`, do not count."""
    old, new = asdict(theirs), asdict(ours)
    return [f"{name}: {old[name]!r} -> {new[name]!r}" for name in FIELDS
            if name not in (*MACHINE, *also) and old[name] != new[name]]


def changes(config: Config) -> dict[str, Any]:
    """The fields that are not at their defaults."""
    return {name: value for name, value in asdict(config).items() if value != FIELDS[name].default}
