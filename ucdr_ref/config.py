"""One frozen Config of both methods' options: presets named after table rows, flags and JSON."""
from __future__ import annotations

import argparse
import json
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .machine.options import MACHINE, Shared
from .sre import options as sre
from .ucdr import options as ucdr


@dataclass(frozen=True)
class Config(sre.Options, ucdr.Options, Shared):
    """Every option of a run. Defaults are the paper's (or a careful reading's); a dataset's own values are
    in PRESETS.
    """


class Field(NamedTuple):
    kind: type
    choices: tuple[Any, ...]  # empty: any value of the kind
    rule: str  # the range of a number x, such as `0 <= x < 1`
    metavar: str
    help: str
    default: Any


def read_fields() -> Iterator[tuple[str, Field]]:
    """What the three option classes say of each field, Shared's first."""
    hints = typing.get_type_hints(Config, include_extras=True)
    for field in fields(Config):
        declared, kind = hints[field.name].__origin__, type(field.default)
        # the range of a number or the name of a text, and the help
        *told, text = hints[field.name].__metadata__
        choices = typing.get_args(declared) if typing.get_origin(declared) is Literal else ()
        rule = told[0] if kind in (int, float) and not choices else ""
        metavar = "" if choices else rule.replace("x", "N" if kind is int
                                                  else "X").replace(" ", "") or told[0]
        yield field.name, Field(kind, choices, rule, metavar, text, field.default)


FIELDS = dict(read_fields())

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": dict(mask="none", feature_token=1, evaluation_features="raw", train_normalization="imagenet",
                     selection="test",
                     query_feature="patch", ud_gallery="trained", triplet_distance="plain", triplet_mean="paired",
                     image_reading="as-is", momentum_start="random",
                     queue_push="before", stroke_domains=("sketch", "quickdraw"), balance="released",
                     structure_pairs="diagonal", test_attention="batch", retention_scale="scaled", bank_ring="released",
                     structure_classes=100, sre_report="best-test"),
}

DOMAINNET = dict(dataset="domainnet", data_root="data/DomainNet", weights="weights/ViT-B-32.pt")
SKETCHY = dict(dataset="sketchy", data_root="data/Sketchy", weights="weights/ViT-B-32.pt", held_out="none",
               prompt_length=4,
               context_vectors=8)
# The drawn data and its CLIP are small: larger steps, fewer of them, and a shorter context than the paper's.
TOY = dict(dataset="toy", context_vectors=4, source_batch=50, source_lr=1e-3, target_epochs=2, target_lr=1e-2,
           micro_batch=50)
# SRE-CLIP: labelled and unlabelled folders are given by flags; the drawn ones are made below data_root. D14
# is the other
# method's: no image is inverted here unless --stroke-domains says so.
SRE = dict(method="sre-clip", dataset="folder", data_root="", weights="weights/ViT-B-32.pt",
           stroke_domains=(), save_every=1000)
# Small for its small CLIP, which has read no words but the 60 class names and bears less dropout in 64 text
# dimensions.
SRE_TOY = dict(SRE, dataset="toy", data_root="data/toy-sre", weights="weights/demo-clip.pt", graph="toy",
               class_vectors="clip-classes", sre_hidden=256, sre_dropout=0.3, sre_iterations=1000, sre_warmup=100)
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
    "tuberlin": dict(dataset="tuberlin", data_root="data/TUBerlin", weights="weights/ViT-B-32.pt",
                     held_out="none",
                     prompt_length=4, context_vectors=8),
    "sre": SRE,
    "sre/toy": SRE_TOY,
    "sre/toy-fast": dict(SRE_TOY, data_root="data/toy-sre-fast", toy_images=8, sre_iterations=500),
    "i2awa": dict(SRE, graph="awa2", sre_kappa=0.3),
    "i2webv": dict(SRE, sre_kappa=0.82),
}


# What `--help` shows; `--help-all` shows everything.
ESSENTIAL = ("method", "dataset", "data_root", "weights", "variant", "seed", "held_out", "gallery",
             "class_split", "bad_images",
             "source", "target", "graph", "device", "workers", "precision")


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
            default = " ".join(field.default) if field.kind is tuple else field.default
            text = f"{field.help} (default: {'empty' if default == '' else default})"
            action = section.add_argument(
                "--" + name.replace("_",
                                    "-"), type=str if field.kind is tuple else field.kind, default=argparse.SUPPRESS,
                choices=field.choices or None, metavar=field.metavar or None, nargs="+" if field.kind is tuple else None,
                help=text if name in ESSENTIAL else argparse.SUPPRESS)
            action.whole_help = text  # type: ignore[attr-defined]


def resolve(flags: Mapping[str, Any], preset: str | None = None, fast: bool = False) -> Config:
    """Defaults < preset < variant < flags. Without a preset, the given method's and dataset's own values are
    taken.

    `fast`: the short demonstration. Raises ValueError for an unknown preset, or one of another dataset or
    method than the flag's.
    """
    folders = flags.get("source") or flags.get("target")
    sre = flags.get("method") == "sre-clip" or flags.get("method") == "closed-form" and bool(folders)
    if sre and preset is None and folders:
        preset = "sre"
    dataset = flags.get("dataset", "toy")
    if preset is None and sre:
        preset = "sre" if dataset != "toy" else "sre/toy-fast" if fast else "sre/toy"
    elif preset is None and fast:
        preset = "toy/fast"
    if preset is None:
        preset = next(name for name, values in PRESETS.items() if values["dataset"] == dataset)
        values = dict(PRESETS[preset], seen="") if dataset == "domainnet" else PRESETS[preset]
    elif preset not in PRESETS:
        raise ValueError(f"--preset {preset}: no such preset; there are {', '.join(PRESETS)}")
    else:
        values = PRESETS[preset]
        for name, default in (("dataset", "toy"), ("method", "ucdr-adapter")):
            own, given = values.get(name, default), flags.get(name, values.get(name, default))
            of_both = given == "closed-form"  # the baseline of either task
            if own != given and not of_both and ("sre-clip" in (own, given) or name == "dataset"):
                raise ValueError(f"--preset {preset} is for --{name} {own}, not {given}; give one of the two")
    variant = VARIANTS[flags.get("variant", "paper")]
    if values.get("method") == "sre-clip":
        variant = {name: value for name, value in variant.items()
                   if name != "stroke_domains"}  # D14 is the other method's
    merged = {**values, **variant, **{name: value for name, value in flags.items() if name in FIELDS}}
    if variant and merged["selection"] != "validation" and merged["dataset"] in ("sketchy", "tuberlin"):
        # D10: the released code holds the validation classes out of training on DomainNet alone.
        merged.setdefault("train_classes", "train+val")
    config = from_dict(merged)
    return replace(config, weights=located(config.weights))


def located(weights: str) -> str:
    """The path of weights; one beside the scripts where the current folder has no such file."""
    beside = Path(__file__).parents[1] / weights
    return str(beside) if os.path.exists(beside) and not os.path.exists(weights) else weights


def from_dict(values: Mapping[str, Any]) -> Config:
    """A checked Config from plain values (JSON lists become tuples); ValueError names a field that does not
    exist or fit.
    """
    unknown = sorted(map(str, set(values) - set(FIELDS)))
    if unknown:
        raise ValueError(f"unknown config fields {str(unknown)[:300]}; this version knows {len(FIELDS)} "
                         f"fields (see --help-all)")
    return Config(**{name: checked(name, value) for name, value in values.items()})


def checked(name: str, value: Any) -> Any:
    """The value of a field, of its type; ValueError in one sentence when it is no value of that field."""
    field = FIELDS[name]
    if field.kind is tuple and isinstance(value,
                                          (list, tuple)) and all(isinstance(item, str) for item in value):
        value = tuple(value)
    if field.kind is float and type(value) is int:
        value = float(value)
    expected = ""
    if type(value) is not field.kind:
        expected = field.kind.__name__
    elif field.choices and value not in field.choices:
        expected = f"one of {', '.join(map(str, field.choices))}"
    elif field.rule and not inside(typing.cast(float, value), field.rule):
        expected = f"a finite number x with {field.rule}"
    if expected:
        shown = " ".join(repr(value).split())[:100]
        raise ValueError(f"config field {name} is {shown}, expected {expected} (flag "
                         f"--{name.replace('_', '-')})")
    return value


def inside(x: float, rule: str) -> bool:
    """Whether a number is finite and obeys a rule such as `0 < x <= 1` or `1 <= x`."""
    low, at_least, at_most, high = re.fullmatch(r"(?:(\S+) (<=?) )?x(?: (<=?) (\S+))?",
                                                rule).groups()  # type: ignore[union-attr]
    above = low is None or x > float(low) or at_least == "<=" and x == float(low)
    below = high is None or x < float(high) or at_most == "<=" and x == float(high)
    return above and below and abs(x) < float("inf")


def to_json(config: Config) -> str:
    return json.dumps(asdict(config), indent=2) + "\n"


def differences(ours: Config, theirs: Config, also: Sequence[str] = ()) -> list[str]:
    """Fields in which two configs differ, as `name: theirs -> ours`; machine fields, and those in `also`, do
    not count.
    """
    return [f"{name}: {getattr(theirs, name)!r} -> {getattr(ours, name)!r}" for name in FIELDS
            if name not in (*MACHINE, *also) and getattr(ours, name) != getattr(theirs, name)]


def changes(config: Config) -> dict[str, Any]:
    """The fields that are not at their defaults."""
    return {name: getattr(config, name) for name, field in FIELDS.items()
            if getattr(config, name) != field.default}
