"""The benchmarks: which files are trained on, and which queries meet which gallery.

Every list is sorted and every draw has its own seeded generator, so a split is the same on every machine.
"""
from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..clip.tensorfile import regular_file
from ..config import Config
from ..images.batches import ENDINGS, Files

DOMAINNET_DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
Tree = dict[str, dict[str, list[str]]]  # domain -> class -> sorted paths


@dataclass(frozen=True)
class Test:
    """Queries of one domain against one or more galleries."""

    protocol: str  # UCDR, UdCDR or UcCDR
    query_domain: str
    query: Files
    galleries: dict[str, Files]


@dataclass(frozen=True)
class Protocol:
    root: str
    class_names: list[str]  # in order of class id
    domain_names: list[str]  # source domains, in order of domain id
    train: Files
    validation: Test | None
    tests: list[Test]
    gallery_domain: str

    def digests(self) -> dict[str, str]:
        """A digest of every file list, so that two runs can be seen to use the same images."""
        lists = {"train": self.train}
        for test in [self.validation, *self.tests] if self.validation else self.tests:
            lists |= {f"{test.protocol} query": test.query}
            lists |= {f"{test.protocol} gallery {name}": files for name, files in test.galleries.items()}
        return {name: files.digest(self.root) for name, files in lists.items()}


def class_list(name: str) -> list[str]:
    """A class list of `splits/`, one name a line."""
    return (Path(__file__).parent / "splits" / f"{name}.txt").read_text(encoding="utf-8").split()


def scan(root: str, domains: Sequence[str] | None = None) -> Tree:
    """Images of `<root>/<domain>/<class>/*`, sorted; all domain folders, or those named.

    Raises FileNotFoundError for a missing root or domain, ValueError for a class folder without images, naming them.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"--data-root {root}: no such folder; expected <root>/<domain>/<class>/<image>")
    present = sorted(entry.name for entry in os.scandir(root) if os.path.isdir(entry) and not entry.name.startswith("."))
    for domain in domains or ():
        if domain not in present:
            raise FileNotFoundError(f"{root}: no domain folder {domain!r}; there are {', '.join(present) or 'none'}. "
                                    "Did the archive unpack one level too deep?")
    tree: Tree = {}
    for domain in domains or present:
        tree[domain] = {}
        for folder in sorted(entry.path for entry in os.scandir(os.path.join(root, domain)) if os.path.isdir(entry)):
            if os.path.basename(folder).startswith("."):
                continue
            paths = sorted(entry.path for entry in os.scandir(folder)
                           if os.path.splitext(entry.name)[1].lower() in ENDINGS and not entry.name.startswith("."))
            if not paths:
                raise ValueError(f"{folder}: a class folder without images; fill it or remove it")
            tree[domain][os.path.basename(folder)] = paths
    tree = {domain: classes for domain, classes in tree.items() if classes}
    if not tree:
        raise ValueError(f"{root}: found no images in <domain>/<class>/*; did the archive unpack one level too deep?")
    return tree


def canonical(name: str) -> str:
    """Class names are compared without case and punctuation: `t-shirt`, `t_shirt` and `T shirt` are one class."""
    return re.sub(r"[^0-9a-z]+", "_", name.lower()).strip("_")


def match(tree: Tree, expected: Sequence[str], title: str) -> Tree:
    """The tree with folders renamed to the benchmark's class names; ValueError when a domain lacks some."""
    renamed: Tree = {}
    for domain, classes in tree.items():
        by_name = {canonical(name): paths for name, paths in classes.items()}
        missing = [name for name in expected if canonical(name) not in by_name]
        if missing:
            raise ValueError(f"{title}, domain {domain}: found {len(classes)} classes, expected {len(expected)}; "
                             f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''} missing. Did the archive unpack one "
                             "level too deep?")
        renamed[domain] = {name: by_name[canonical(name)] for name in expected}
    return renamed


def pick(tree: Tree, domain: str, classes: Sequence[str], share: float = 1.0, seed: object = 0, rest: bool = False) -> Files:
    """Images of a domain's classes: all, or a seeded draw of at least one per class; `rest` gives what the draw leaves."""
    paths, labels = [], []
    for name in classes:
        found = tree[domain].get(name, [])
        if share < 1.0:
            count = min(len(found), max(1, round(share * len(found))))
            drawn = set(random.Random(f"{seed}/{domain}/{name}").sample(found, count))
            found = [path for path in found if (path in drawn) != rest]
        paths += found
        labels += [name] * len(found)
    return Files(paths, labels, [domain] * len(paths))


def thin(tree: Tree, per_class: int, seed: int) -> Tree:
    """At most `per_class` images of each class in each domain (0: all), drawn by seed."""
    def draw(domain: str, name: str, paths: list[str]) -> list[str]:
        return sorted(random.Random(f"{seed}/thin/{domain}/{name}").sample(paths, min(len(paths), per_class or len(paths))))

    return {domain: {name: draw(domain, name, paths) for name, paths in classes.items()} for domain, classes in tree.items()}


def assemble(config: Config, tree: Tree, splits: dict[str, list[str]], gallery: str, seen: str) -> Protocol:
    """The protocol of a class split (train, val, test), a held-out query domain and a gallery domain."""
    held_out = None if config.held_out == "none" else config.held_out
    for flag, domain in (("--held-out", held_out), ("--gallery", gallery), ("--seen", seen)):
        if domain is not None and domain not in tree:
            raise ValueError(f"{flag} {domain}: no such domain in {config.data_root}; there are {', '.join(sorted(tree))}")
    if held_out == gallery:
        raise ValueError(f"--held-out {held_out} is the gallery domain; hold out another one of {', '.join(sorted(tree))}")
    if seen == held_out:
        raise ValueError(f"--seen {seen} is held out; name a source domain for the validation queries")
    train, val, test = splits["train"], splits["val"], splits["test"]
    if config.train_classes == "train+val" or config.selection != "validation":  # D5, D10
        if config.train_classes == "train+val" and config.selection == "validation":
            raise ValueError("--train-classes train+val leaves no validation classes; add --selection last")
        if config.train_classes == "train+val" or config.dataset in ("sketchy", "tuberlin"):
            train, val = train + val, []
    sources = sorted(domain for domain in tree if domain != held_out)
    if len(sources) < 2 and held_out is None:
        raise ValueError(f"{config.data_root}: only the domain {sources}; at least two are needed")

    tests: list[Test] = []
    kept: Files | None = None
    if held_out is None:
        tests.append(Test("UcCDR", seen, pick(tree, seen, test), {"unseen": pick(tree, gallery, test)}))
    else:
        kept = pick(tree, gallery, train, config.holdback, f"{config.seed}/holdback")
        unseen = pick(tree, gallery, test)
        tests.append(Test("UCDR", held_out, pick(tree, held_out, test), {"unseen": unseen, "mixed": unseen + kept}))
        first = train[:45]
        ud_gallery = kept.keep([i for i, name in enumerate(kept.classes) if name in set(first)])  # D7
        if config.ud_gallery == "trained":  # D7
            ud_gallery = pick(tree, gallery, first, 0.25, f"{config.seed}/ud")
            kept_paths = set(kept.paths)
            ud_gallery = ud_gallery.keep([i for i, path in enumerate(ud_gallery.paths) if path not in kept_paths])
        share = 0.10 if held_out == "quickdraw" else 0.25
        tests.append(Test("UdCDR", held_out, pick(tree, held_out, first, share, f"{config.seed}/ud"), {"seen": ud_gallery}))
    for item in tests:
        check(item)

    trained = Files([], [], [])
    for domain in sources:
        trained += (pick(tree, domain, train, config.holdback, f"{config.seed}/holdback", rest=True)
                    if kept is not None and domain == gallery else pick(tree, domain, train))
    names = [name for name in train if name in set(trained.classes)]
    if len(names) < 2:
        raise ValueError(f"{config.data_root}: {len(names)} training classes have images in {', '.join(sources)}; at least two "
                         "are needed")
    validation = tests[0] if config.selection == "test" else None  # D5
    if config.selection == "validation":
        validation = Test("validation", seen, pick(tree, seen, val), {"unseen": pick(tree, gallery, val)})
        check(validation)
    return Protocol(config.data_root, names, sources, trained, validation, tests, gallery)


def check(test: Test) -> None:
    where = f"{test.protocol} with queries of {test.query_domain}"
    if not len(test.query):
        raise ValueError(f"{where}: no query left; the class split and the domain's folders have no class in common")
    for name, gallery in test.galleries.items():
        if not len(gallery):
            raise ValueError(f"{where}: the {name} gallery is empty; the class split and its folders have no class in common")


def folder_split(config: Config, tree: Tree) -> dict[str, list[str]]:
    """train, val, test class names of a folder dataset: from --class-split, or 70/10/20 % drawn by seed."""
    present = sorted({name for classes in tree.values() for name in classes})
    if not config.class_split:
        order = random.Random(f"{config.seed}/classes").sample(present, len(present))
        if len(order) < 4:
            raise ValueError(f"{config.data_root}: {len(order)} classes cannot be split in three; at least 4 are needed")
        test, val = max(1, len(order) // 5), max(1, len(order) // 10)
        return {"test": sorted(order[:test]), "val": sorted(order[test:test + val]), "train": sorted(order[test + val:])}
    try:
        data = json.loads(regular_file(config.class_split).read_text(encoding="utf-8"))
        aliases = {"train": ("train", "seen"), "val": ("val", "val_unseen"), "test": ("test", "unseen")}
        splits = {part: next(data[key] for key in keys if key in data) for part, keys in aliases.items()}
        assert all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in splits.values())
    except (OSError, ValueError, TypeError, StopIteration, AssertionError, RecursionError):
        raise ValueError(f"--class-split {config.class_split}: expected a JSON file with lists of class names under train (or "
                         "seen), val (or val_unseen) and test (or unseen)") from None
    everything = [name for names in splits.values() for name in names]
    if len(everything) != len(set(everything)):
        raise ValueError(f"--class-split {config.class_split}: {sorted({n for n in everything if everything.count(n) > 1})[:5]} "
                         "stand in more than one part")
    missing = sorted(set(everything) - set(present))
    if missing:
        raise ValueError(f"--class-split {config.class_split}: no folder in {config.data_root} for {', '.join(missing[:5])}")
    return splits


def build(config: Config) -> Protocol:
    """The protocol of the config's dataset. Raises ValueError or FileNotFoundError when the data does not fit."""
    root = config.data_root
    if config.domains and config.dataset != "folder":
        raise ValueError(f"--domains {' '.join(config.domains)}: --dataset {config.dataset} has its own; leave the flag out")
    if config.dataset == "domainnet":
        splits = {part: class_list(f"domainnet-{part}") for part in ("train", "val", "test")}
        assert [len(splits[part]) for part in ("train", "val", "test")] == [245, 55, 45]
        gallery, seen = "real", "painting" if config.held_out != "painting" else "infograph"
        tree = match(scan(root, DOMAINNET_DOMAINS), sorted(sum(splits.values(), [])), "DomainNet")
    elif config.dataset == "sketchy":
        everything, test = class_list("sketchy-all"), class_list(f"sketchy-test-{config.sketchy_split}")
        assert len(everything) == 125 and len(test) == {"eccv": 21, "random": 25}[config.sketchy_split]
        rest = [name for name in everything if name not in set(test)]
        val = sorted(random.Random(f"{config.seed}/val").sample(rest, 11))
        splits = {"train": [name for name in rest if name not in set(val)], "val": val, "test": test}
        gallery, seen = "extended_photo", "sketch"
        tree = match(scan(root, (seen, gallery)), everything, "Sketchy")
    elif config.dataset == "tuberlin":
        gallery, seen = "images", "sketches"
        tree = scan(root, (seen, gallery))
        test, val = class_list("tuberlin-test"), class_list("tuberlin-val")
        named = {canonical(name) for name in test + val}
        others = [name for name in tree[gallery] if canonical(name) not in named]
        if len(others) != 200:
            raise ValueError(f"TU-Berlin, domain {gallery}: found {len(tree[gallery])} classes, expected 250 with all test and "
                             "validation classes. Did the archive unpack one level too deep?")
        splits = {"train": others, "val": val, "test": test}
        tree = match(tree, others + val + test, "TU-Berlin")
    else:
        tree = scan(root, config.domains)
        if config.dataset == "toy":
            from ..demo.drawing import SPLIT
            splits = {part: list(SPLIT[part]) for part in ("train", "val", "test")}
            tree = match(tree, sum(splits.values(), []), "the drawn data")
        else:
            splits = folder_split(config, tree)
        gallery = next((name for name in ("real", "photo", "photos", "images") if name in tree), sorted(tree)[0])
        gallery = config.gallery or gallery
        seen = next((name for name in sorted(tree) if name not in (gallery, config.held_out)), gallery)
    gallery, seen = config.gallery or gallery, config.seen or seen
    return assemble(config, thin(tree, config.per_class, config.seed), splits, gallery, seen)
