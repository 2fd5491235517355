"""One frozen dataclass with every switch of both methods, presets named after table rows, flags and JSON."""
from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def option(default: Any, help: str, choices: tuple[Any, ...] | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Defaults are the paper's (or a careful reading's) for DomainNet; a dataset's own values are in PRESETS."""

    # what to run
    method: str = option("ucdr-adapter", "what to train", ("ucdr-adapter", "zero-shot", "sre-clip"))
    dataset: str = option("toy", "benchmark protocol", ("toy", "domainnet", "sketchy", "tuberlin", "folder"))
    data_root: str = option("data/toy", "folder that holds <domain>/<class>/*; the drawn data is made there when absent")
    weights: str = option("weights/demo-clip.pt", "CLIP weights: OpenAI's archive, a state dict or safetensors")
    heads: int = option(0, "attention heads of both towers; 0: width / 64, as in every released CLIP")
    variant: str = option("paper", "preset of the ledgers D and S", ("paper", "released"))
    seed: int = option(0, "seed of splits, initial values, order and augmentation")

    # protocol
    held_out: str = option("sketch", "query domain that training never sees; none: U^cCDR, where queries come from a seen domain")
    seen: str = option("", "source domain of the validation queries (and of the U^cCDR queries); empty: the protocol's")
    gallery: str = option("", "gallery domain; empty: the protocol's")
    domains: tuple[str, ...] = option((), "folder datasets: domain folders to use, gallery and held-out one included (the "
                                      "smallest decides how long an epoch is); empty: all")
    class_split: str = option("", "folder datasets: JSON file with train, val and test class names; empty: drawn by seed")
    sketchy_split: str = option("eccv", "Sketchy's test classes: 21 (ECCV 2018) or 25 (random)", ("eccv", "random"))
    holdback: float = option(0.08, "share of each gallery-domain training class kept for the mixed gallery, never trained on")
    stroke_domains: tuple[str, ...] = option(("sketch", "quickdraw", "sketches"),
                                             "domains of dark strokes on white, colour-inverted everywhere (D14)")
    bad_images: str = option("error", "unreadable images: stop at the first, or count and go on", ("error", "skip"))
    toy_images: int = option(20, "images drawn per domain and class for --dataset toy")
    per_class: int = option(0, "use at most this many images per domain and class; 0: all")

    # ledger D: paper or careful reading (default) against the released code
    mask: str = option("own", "D1: rows masked in phase 2", ("own", "none"))
    feature_token: int = option(0, "D2: token that is pooled; 0 the class token, 1 the first domain prompt", (0, 1))
    evaluation_features: str = option("normalized", "D3: features at test time", ("normalized", "raw"))
    train_normalization: str = option("clip", "D4: pixel mean and std in training", ("clip", "imagenet"))
    selection: str = option("validation", "D5: classes and queries that choose the best epoch; last: no choice",
                            ("validation", "test", "last"))
    query_feature: str = option("class", "D6: the generator's query: class token, or first patch of a sequence without one",
                                ("class", "patch"))
    ud_gallery: str = option("held-back", "D7: U^dCDR gallery: images kept from training, or a 25 %% draw of those trained on",
                             ("held-back", "trained"))
    triplet_distance: str = option("squared", "D8: squared or plain Euclidean", ("squared", "plain"))
    momentum_start: str = option("online", "D9: the momentum prompts start as a copy, or at random", ("online", "random"))
    train_classes: str = option("train", "D10: training classes, with the validation classes (as ProS) or without",
                                ("train", "train+val"))
    queue_push: str = option("after", "D12: momentum features enter the queues after or before the loss", ("after", "before"))
    class_features: str = option("template", "D13: class anchors: template, plain (a photo of a NAME), prototypes, or a .npy "
                                             "file [c, e] in class order")
    balance: str = option("exact", "D15: every batch holds the same number per domain, or the released grouping",
                          ("exact", "released"))

    # UCDR-Adapter
    prompt_length: int = option(1, "p, tokens of a source prompt")
    context_vectors: int = option(16, "m, learnable vectors of the text template")
    tau: float = option(0.07, "temperature of L-align")
    margin: float = option(0.2, "margin of L-triplet")
    triplet_pairs: int = option(2, "r, pairs per image; 0 leaves L-triplet out")
    queue_size: int = option(20, "momentum features kept per class")
    momentum: float = option(0.999, "alpha of the momentum average")
    temperature: float = option(0.75, "T of the target prompt generator")
    source_batch: int = option(400, "batch of phase 1")
    source_epochs: int = option(1, "epochs of phase 1")
    source_lr: float = option(1e-4, "Adam's learning rate in phase 1")
    target_batch: int = option(50, "batch of phase 2")
    target_epochs: int = option(10, "most epochs of phase 2; 0: phase 1 alone, encoding with the banks' mean prompts")
    target_lr: float = option(1e-4, "Adam's learning rate at the start of phase 2 (schedule: D11)")
    patience: int = option(2, "epochs without a better validation mAP before phase 2 stops")

    # SRE-CLIP
    source: tuple[str, ...] = option((), "labelled source folders <folder>/<class>/*")
    target: str = option("", "unlabelled target folder <folder>/<class>/* (class folders are read by evaluation alone)")
    graph: str = option("", "class graph, JSON of `python -m ucdr_ref.sre.wordnet`; awa2 and toy name the shipped ones")
    unseen: str = option("", "file with the unseen class names, one a line; empty: as marked in the class list")
    class_vectors: str = option("clip", "S4: node vectors: clip (text features), clip-classes (of the classes; "
                                      "ancestors: means), or a file `word v1 v2 ...`")
    structure_pairs: str = option("pairs", "S1: structure loss over pairs, or the released diagonal (no gradient)",
                                  ("pairs", "diagonal"))
    test_attention: str = option("alone", "S2: attention at test time", ("alone", "batch"))
    retention_scale: str = option("cosine", "S3: what retention compares with cosines", ("cosine", "scaled"))
    sre_kappa: float = option(0.3, "S5: kappa of L-bias")
    sre_report: str = option("last", "S6: the last iteration, or each metric's maximum over evaluations on the test images",
                             ("last", "best-test"))
    bank_ring: str = option("exact", "S7: target bank", ("exact", "released"))
    structure_classes: int = option(0, "S8: classes in the structure loss; 0: all, the released code takes the first 100")
    sre_iterations: int = option(3000, "iterations")
    sre_batch: int = option(256, "source and target batch")
    sre_hidden: int = option(1024, "h, width of adapter and graph head")
    sre_temperature: float = option(0.05, "temperature of the logits")
    sre_structure: float = option(100.0, "weight of L-structure")
    sre_retention: float = option(0.01, "weight of L-retain")
    sre_entropy: float = option(3.0, "weight of L-ent")
    sre_diversity: float = option(5.0, "weight of L-div")
    sre_bias: float = option(5.0, "weight of L-bias")
    sre_source: float = option(1.5, "weight of the source loss after the warm-up")
    sre_target: float = option(1.0, "weight of the target loss; 0 leaves L-ent, L-div and L-bias out")
    sre_bank: int = option(768, "rows of the target bank")
    sre_warmup: int = option(600, "iterations of the source loss alone")
    sre_dropout: float = option(0.5, "dropout in the graph head")
    sre_lr: float = option(1e-3, "learning rate of the adapter; the graph head's is five times it")

    # machine: none of these changes what is computed beyond rounding
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto: a GPU when there is one")
    workers: int = option(2, "processes that read and augment images; 0: in the main process")
    precision: str = option("fp32", "arithmetic of the towers; losses and LayerNorm stay float32", ("fp32", "tf32", "bf16"))
    compile: int = option(0, "1: compile the vision blocks (torch.compile), which takes a while at the start", (0, 1))
    micro_batch: int = option(0, "images of a phase-2 batch that pass at once, to save memory; 0: 10 on a CPU, all on a GPU")
    save_every: int = option(50, "steps between checkpoints; each epoch ends with one too")
    eval_batch: int = option(128, "images per batch when features are extracted")


# May differ when a run is resumed.
MACHINE = ("device", "workers", "precision", "compile", "micro_batch", "save_every", "eval_batch")
FIELDS: dict[str, dataclasses.Field[Any]] = {field.name: field for field in dataclasses.fields(Config)}

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": dict(mask="none", feature_token=1, evaluation_features="raw", train_normalization="imagenet", selection="test",
                     query_feature="patch", ud_gallery="trained", triplet_distance="plain", momentum_start="random",
                     queue_push="before", stroke_domains=("sketch", "quickdraw"), balance="released",
                     structure_pairs="diagonal", test_attention="batch", retention_scale="scaled", bank_ring="released",
                     structure_classes=100, sre_report="best-test"),
}

DOMAINNET = dict(dataset="domainnet", data_root="data/DomainNet", weights="weights/ViT-B-32.pt")
SKETCHY = dict(dataset="sketchy", data_root="data/Sketchy", weights="weights/ViT-B-32.pt", held_out="none", prompt_length=4,
               context_vectors=8)
# The drawn data and its CLIP are small: larger steps, fewer of them, and a shorter context than the paper's.
TOY = dict(dataset="toy", context_vectors=4, source_batch=50, source_lr=1e-3, target_epochs=2, target_lr=1e-2,
           micro_batch=50)
# SRE-CLIP: labelled and unlabelled folders are given by flags; the drawn ones are made below data_root. D14 is the other
# method's: no image is inverted here unless --stroke-domains says so.
SRE = dict(method="sre-clip", dataset="folder", data_root="", weights="weights/ViT-B-32.pt", stroke_domains=(), save_every=1000)
# Small for its small CLIP, which has read no words but the 60 class names and bears less dropout in 64 text dimensions.
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
    "tuberlin": dict(dataset="tuberlin", data_root="data/TUBerlin", weights="weights/ViT-B-32.pt", held_out="none",
                     prompt_length=4, context_vectors=8),
    "sre": SRE,
    "sre/toy": SRE_TOY,
    "sre/toy-fast": dict(SRE_TOY, data_root="data/toy-sre-fast", toy_images=8, sre_iterations=500),
    "i2awa": dict(SRE, graph="awa2", sre_kappa=0.3),
    "i2webv": dict(SRE, sre_kappa=0.82),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag per field; a flag that is not given leaves no trace, so presets show through."""
    for name, field in FIELDS.items():
        kind = type(field.default)
        choices = field.metadata["choices"]
        parser.add_argument("--" + name.replace("_", "-"), type=str if kind is tuple else kind, default=argparse.SUPPRESS,
                            choices=choices, metavar=None if choices else kind.__name__.upper(),
                            nargs="+" if kind is tuple else None, help=f"{field.metadata['help']} (default: {field.default})")


def resolve(flags: Mapping[str, Any], preset: str | None = None, fast: bool = False) -> Config:
    """Defaults < preset < variant < flags. Without a preset, the given method's and dataset's own values are taken.

    `fast`: the short demonstration. Raises ValueError for an unknown preset, or one of another dataset or method than the flag's.
    """
    sre = flags.get("method") == "sre-clip"
    if sre and preset is None and (flags.get("source") or flags.get("target")):
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
            if own != given and "sre-clip" in (own, given) or own != given and name == "dataset":
                raise ValueError(f"--preset {preset} is for --{name} {own}, not {given}; give one of the two")
    variant = VARIANTS[flags.get("variant", "paper")]
    if values.get("method") == "sre-clip":
        variant = {name: value for name, value in variant.items() if name != "stroke_domains"}  # D14 is the other method's
    merged = {**values, **variant, **{name: value for name, value in flags.items() if name in FIELDS}}
    return from_dict(merged)


def from_dict(values: Mapping[str, Any]) -> Config:
    """A checked Config from plain values (JSON lists become tuples); ValueError names a field that does not exist or fit."""
    unknown = sorted(map(str, set(values) - set(FIELDS)))
    if unknown:
        raise ValueError(f"unknown config fields {str(unknown)[:300]}; this version knows {len(FIELDS)} fields (see --help)")
    checked: dict[str, Any] = {}
    for name, value in values.items():
        kind, choices = type(FIELDS[name].default), FIELDS[name].metadata["choices"]
        shown = " ".join(repr(value).split())[:100]
        if kind is tuple and isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            value = tuple(value)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not kind or (choices and value not in choices):
            expected = f"one of {choices}" if choices else kind.__name__
            raise ValueError(f"config field {name} is {shown}, expected {expected}")
        if isinstance(value, (int, float)) and not 0 <= value < float("inf"):
            raise ValueError(f"config field {name} is {shown}, expected a finite number, not negative")
        checked[name] = value
    return Config(**checked)


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def differences(ours: Config, theirs: Config) -> list[str]:
    """Fields in which two configs differ, as `name: theirs -> ours`; machine fields do not count."""
    return [f"{name}: {getattr(theirs, name)!r} -> {getattr(ours, name)!r}" for name in FIELDS
            if name not in MACHINE and getattr(ours, name) != getattr(theirs, name)]
