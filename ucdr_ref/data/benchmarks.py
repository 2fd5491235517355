"""The benchmarks: which files are trained on, and which queries meet which gallery.

Every list is sorted and every draw has its own seeded generator, so a split is the same on every machine.
"""
from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..cli import read_json
from ..config import Config
from .folders import Tree, abbreviate, compare_counts, folder_key, match, scan
from .images import Files

HERE = Path(__file__).parent
UD_CLASSES = 45  # U^dCDR queries the first 45 training classes, as listed (released code)
UD_SHARE, UD_SHARE_QUICKDRAW = 0.25, 0.10  # of each class; quickdraw has more images than other domains
MIXED_GALLERY_SHARE = 0.08  # of each gallery-domain training class, never trained on (D10)
Splits = dict[str, list[str]]  # train, val and test classes


@dataclass(frozen=True)
class Dataset:
    """A benchmark: its folders, its classes, and the numbers of images that it was published with."""

    title: str
    domains: dict[str, tuple[str, ...]]  # domain: folders below the root that may be it; empty: all folders
    gallery: str
    seen: tuple[str, ...]  # domain of the validation queries: the first that is not held out
    lists: tuple[str, str, str]  # of `splits/`: train, without what stands in the others, val, test
    metric: str = "mAP@200"  # as published, and by which epochs are chosen (D5)
    aliases: dict[str, str] = field(default_factory=dict)  # domain: list of `aliases/`
    versions: dict[str, dict[str, int]] = field(default_factory=dict)  # version: images of each domain

    def splits(self) -> Splits:
        train, val, test = map(class_list, self.lists)
        others = {*val, *test}
        return {"train": [name for name in train if name not in others], "val": val, "test": test}


def class_list(name: str) -> list[str]:
    return (HERE / "splits" / f"{name}.txt").read_text(encoding="utf-8").split()


def alias_list(name: str) -> dict[str, str]:
    """{folder name as in the archive: class name}."""
    lines = (HERE / "aliases" / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t") for line in lines)


# Images: DomainNet's own pages; Sketchy and TU-Berlin: what the downloads hold, and what papers write.
SKETCHY = Dataset(
    "Sketchy",
    {"sketch": ("sketch", "256x256/sketch"),
     "extended_photo": ("extended_photo", "EXTEND_image_sketchy", "256x256/extended_photo",
                        "256x256/EXTEND_image_sketchy")},
    "extended_photo", ("sketch",), ("sketchy-all", "sketchy-val-eccv", "sketchy-test-eccv"),
    versions={"download": dict(sketch=75481, extended_photo=73002),
              "papers": dict(sketch=75471, extended_photo=73002)})
DATASETS = {
    "toy": Dataset("the drawn data", {}, "real", ("clipart", "infograph"),
                   ("toy-train", "toy-val", "toy-test")),
    "domainnet": Dataset(
        "DomainNet",
        {name: (name,) for name in ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")},
        "real", ("painting", "infograph"), ("domainnet-train", "domainnet-val", "domainnet-test"),
        versions={"original": dict(clipart=48837, infograph=53201, painting=75759, quickdraw=172500,
                                   real=175327, sketch=70386),
                  "cleaned": dict(clipart=48129, infograph=51605, painting=72266, quickdraw=172500,
                                  real=172947, sketch=69128)}),
    "sketchy": SKETCHY,
    "sketchy-random": replace(
        SKETCHY, lists=("sketchy-all", "sketchy-val-random", "sketchy-test-random"), metric="mAP@all"),
    "tuberlin": Dataset(
        "TU-Berlin", {"sketches": ("sketches", "png"), "images": ("images", "ImageResized")},
        "images", ("sketches",), ("tuberlin-train", "tuberlin-val", "tuberlin-test"), "mAP@all",
        aliases={"sketches": "tuberlin-sketches", "images": "tuberlin-images"},
        versions={"download": dict(sketches=20000, images=204070),
                  "papers": dict(sketches=20000, images=204489)})}


@dataclass(frozen=True)
class Test:
    """Queries of one domain against one or more galleries."""

    protocol: str  # UCDR, UdCDR, UcCDR or validation
    query_domain: str
    query: Files
    galleries: dict[str, Files]

    def __post_init__(self) -> None:
        for what, files in {"query": self.query, **self.galleries}.items():
            if not files:
                raise ValueError(f"{self.protocol} with queries of {self.query_domain}: no image left for "
                                 f"{what}; class split and folders have no class in common")


@dataclass(frozen=True)
class Protocol:
    root: str
    class_names: list[str]  # in order of class id
    domain_names: list[str]  # source domains, in order of domain id
    train: Files
    validation: Test | None
    tests: list[Test]
    gallery_domain: str
    selected: tuple[str, str] | None = None  # gallery and metric that choose the epoch (D5); None: the last
    notes: list[str] = field(default_factory=list)  # what was found and what is not used, for people

    @property
    def all_tests(self) -> list[Test]:
        """The validation's first, where there is one."""
        return [self.validation, *self.tests] if self.validation else self.tests

    def digests(self) -> dict[str, tuple[int, str]]:
        """Length and digest of every file list, so that two runs can be seen to use the same images."""
        lists = {"train": self.train}
        for test in self.all_tests:
            lists |= {f"{test.protocol} query": test.query}
            lists |= {f"{test.protocol} gallery {name}": files for name, files in test.galleries.items()}
        return {name: (len(files), files.digest(self.root)) for name, files in lists.items()}


Choose = Callable[[str, int, list[str]], list[str]]  # (domain/class, the class's id, paths) -> some paths


def pick(tree: Tree, domain: str, classes: list[str], choose: Choose | None = None) -> Files:
    """Images of a domain's classes, class by class: all, or those that `choose` leaves."""
    paths, labels = [], []
    for i, name in enumerate(classes):
        found = tree[domain].get(name, [])
        if choose is not None and found:
            found = choose(f"{domain}/{name}", i, found)
        paths += found
        labels += [name] * len(found)
    return Files(paths, labels, [domain] * len(paths))


def draw(paths: list[str], count: int, seed: str) -> list[str]:
    return sorted(random.Random(os.fsencode(seed)).sample(paths, count))  # folder names may not be UTF-8


def released_order(paths: list[str], i: int) -> list[str]:
    """The order in which the released code takes the files of class i: numpy's permutation, seed i (D7)."""
    return [paths[k] for k in np.random.RandomState(i).permutation(len(paths))]


def held_back(config: Config, name: str, i: int, paths: list[str]) -> list[str]:
    """For the mixed gallery: n - int(0.92 n) images of a class, at least one (D10)."""
    trained = int((1 - MIXED_GALLERY_SHARE) * len(paths))
    if config.ud_gallery == "trained":  # D7
        return sorted(released_order(paths, i)[trained:])
    return draw(paths, max(1, len(paths) - trained), f"0/holdback/{name}")


def ud_sample(config: Config, name: str, i: int, paths: list[str]) -> list[str]:
    """U^dCDR's sample of a class: a quarter, or a tenth where the queries are of quickdraw."""
    share = UD_SHARE_QUICKDRAW if config.held_out == "quickdraw" else UD_SHARE
    if config.ud_gallery == "trained":  # D7: begins like the training draw, so all of it was trained on
        return sorted(released_order(paths, i)[:int(share * len(paths))])
    return draw(paths, max(1, round(share * len(paths))), f"0/ud/{name}")


def build_protocol(config: Config) -> Protocol:
    """The protocol of the config's dataset; ValueError or FileNotFoundError where the data does not fit."""
    root, notes, dataset = config.data_root, list[str](), DATASETS.get(config.dataset)
    if dataset and (config.domains or config.class_split):
        raise ValueError("--domains and --class-split are for --dataset folder, and this is "
                         f"{config.dataset}; leave them out")
    tree = scan(root, dataset.domains if dataset else {name: (name,) for name in config.domains}, notes)
    if dataset:
        splits = dataset.splits()
        aliases = {domain: alias_list(name) for domain, name in dataset.aliases.items()}
        tree = match(tree, notes, sum(splits.values(), []), dataset.title, aliases)
    else:
        tree = match(tree, notes)
        splits = folder_split(config, tree, notes)
    notes += compare_counts(tree, dataset.versions if dataset else {})
    held_out, gallery, seen = roles(config, dataset, tree)
    train, val, test = splits["train"], splits["val"], splits["test"]
    if config.train_classes == "train+val":  # D10
        train, val = train + val, []
    if config.selection == "validation" and not val:
        raise ValueError("no validation classes are left to choose the epoch by; add --selection last")

    images = partial(pick, tree)
    unseen, kept = images(gallery, test), Files([], [], [])
    if held_out is None:
        tests = [Test("UcCDR", seen, images(seen, test), {"unseen": unseen})]
    else:
        hold, sample, first = partial(held_back, config), partial(ud_sample, config), train[:UD_CLASSES]
        kept = images(gallery, train, hold)
        galleries = {"unseen": unseen, "mixed": unseen + kept}
        tests = [Test("UCDR", held_out, images(held_out, test), galleries)]
        released = config.ud_gallery == "trained"  # D7
        ud_query = images(held_out, first, sample)
        ud_gallery = images(gallery, first, sample if released else hold)
        if released and not (ud_query and ud_gallery):
            notes.append("note     UdCDR is left out: int(p n), the released draw from a class, is 0 here")
        else:
            tests.append(Test("UdCDR", held_out, ud_query, {"seen": ud_gallery}))

    sources = sorted(domain for domain in tree if domain != held_out)
    trained, not_trained = Files([], [], []), set(kept.paths)
    for domain in sources:
        trained += images(domain, train)
    trained = trained.keep([i for i, path in enumerate(trained.paths) if path not in not_trained])
    present = set(trained.classes)
    names = [name for name in train if name in present]
    if len(names) < 2:
        raise ValueError(f"{root}: {len(names)} training classes have images in {', '.join(sources)}; give "
                         "two or more")

    validation, selected = None, None
    if config.selection != "last":
        validation = tests[0]
        if config.selection == "validation":
            validation = Test("validation", seen, images(seen, val), {"unseen": images(gallery, val)})
        chosen = "mixed" if "mixed" in validation.galleries else "unseen"  # D5
        validation = replace(validation, galleries={chosen: validation.galleries[chosen]})
        if len(set(validation.galleries[chosen].classes)) > 1:
            selected = chosen, dataset.metric if dataset else "mAP@200"
        else:
            notes.append("note     one class of validation images, of which any ranking is right: the last "
                         "epoch is kept")
    if config.variant == "released" and config.prompt_length > 1:
        notes.append(f"note     the released code cannot run with p = {config.prompt_length} (D16): here a "
                     "class or domain has p rows, as the paper says")
    strokes = set(map(folder_key, config.stroke_domains))
    inverted = [domain for domain in tree if folder_key(domain) in strokes]
    notes.append(f"note     colours inverted (D14): {', '.join(inverted) or 'of no domain'}")
    return Protocol(root, names, sources, trained, validation, tests, gallery, selected, notes)


def roles(config: Config, dataset: Dataset | None, tree: Tree) -> tuple[str | None, str, str]:
    """The held-out domain, if any, the gallery's, and that of the validation's queries."""
    there = ", ".join(sorted(tree))

    def named(flag: str, name: str) -> str:
        for domain in (name, *tree):
            if domain in tree and folder_key(domain) == folder_key(name):
                return domain
        raise ValueError(f"{flag} {name!r}: no such domain in {config.data_root}; there are {there}")

    held_out = None if config.held_out == "none" else named("--held-out", config.held_out)
    usual = [name for name in ("real", "photo", "photos", "images", *sorted(tree)) if name in tree]
    gallery = named("--gallery", config.gallery or (dataset.gallery if dataset else usual[0]))
    others = dataset.seen if dataset else sorted({*tree} - {gallery})
    seen = named("--seen", config.seen or next((name for name in others if name != held_out), gallery))
    if held_out in (gallery, seen) or held_out is None and seen == gallery:
        raise ValueError(f"--held-out {config.held_out}, --gallery {gallery} and --seen {seen}: expected "
                         f"different domains; there are {there}")
    return held_out, gallery, seen


def folder_split(config: Config, tree: Tree, notes: list[str]) -> Splits:
    """Classes of a folder dataset: of --class-split, or 70/10/20 % drawn with seed 0."""
    present = sorted({name for classes in tree.values() for name in classes})
    where = f"--class-split {config.class_split}"
    if not config.class_split:
        count = len(present)
        if count < 4:
            raise ValueError(f"{config.data_root}: {count} classes cannot be split in three; give 4 or more, "
                             "or --class-split")
        order = random.Random("0/classes").sample(present, count)
        test, val = max(1, count // 5), max(1, count // 10)
        return {"test": sorted(order[:test]), "val": sorted(order[test:test + val]),
                "train": sorted(order[test + val:])}
    data = read_json(config.class_split)
    keys = {"train": ("train", "seen"), "val": ("val", "val_unseen"), "test": ("test", "unseen")}
    splits: dict[str, Any] = {part: next((data[key] for key in names if key in data), None)
                              for part, names in keys.items()}
    try:
        listed = [folder_key(name) for names in splits.values() for name in names]
    except TypeError:
        raise ValueError(f"{where}: expected lists of class names under train (or seen), val (or val_unseen) "
                         "and test (or unseen)") from None
    if twice := [name for name, count in Counter(listed).items() if count > 1]:
        raise ValueError(f"{where}: {abbreviate(sorted(twice))} stand in more than one part, or twice in one")
    spelt = {folder_key(name): name for name in present}
    if missing := sorted({*listed} - {*spelt}):
        raise ValueError(f"{where}: no folder in {config.data_root} for {abbreviate(missing)}")
    if others := [name for key, name in spelt.items() if key not in set(listed)]:
        notes.append(f"note     {len(others)} class folders are not in the class split and not used: "
                     f"{abbreviate(others, 100)}")
    return {part: [spelt[folder_key(name)] for name in names] for part, names in splits.items()}
