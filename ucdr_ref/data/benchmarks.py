"""The benchmarks: which files are trained on, and which queries meet which gallery.

Every list is sorted and every draw has its own seeded generator, so a split is the same on every machine.
"""
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from ..cli import as_value_error, read_json
from ..config import Config
from .folders import Tree, abbreviate, compare_counts, folder_key, match, named_like, scan
from .images import Files

HERE = Path(__file__).parent
UD_CLASSES = 45  # U^dCDR queries the first 45 training classes, as listed (released code)
UD_SHARE, UD_SHARE_QUICKDRAW = 0.25, 0.10  # of each class; quickdraw has more images than other domains
MIXED_GALLERY_SHARE = 0.08  # of each gallery-domain training class, never trained on (D10)
Splits = dict[str, list[str]]  # train, val and test classes


@dataclass(frozen=True)
class Dataset:
    """A benchmark of `splits/datasets.json`."""

    domains: dict[str, list[str]]  # domain: folders below the root that may be it; empty: all folders
    gallery: str
    seen: list[str]  # domain of the validation queries: the first that is not held out
    lists: list[str]  # of `splits/`: train, without what stands in the others, val, test
    metric: str  # as published, and by which epochs are chosen (D5)
    counts: dict[str, dict[str, int]]  # {version: images of each domain}, to compare with

    def splits(self) -> Splits:
        train, val, test = map(class_list, self.lists)
        return {"train": [name for name in train if name not in {*val, *test}], "val": val, "test": test}


def class_list(name: str) -> list[str]:
    return (HERE / "splits" / f"{name}.txt").read_text(encoding="utf-8").split()


def alias_list(name: str) -> dict[str, str]:
    """{folder name as in the archive: class name}; empty where a domain has no such list."""
    path = HERE / "aliases" / f"{name}.tsv"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return dict(line.split("\t") for line in lines)


DATASETS = {name: Dataset(**row) for name, row in read_json(HERE / "splits" / "datasets.json").items()}


@dataclass(frozen=True)
class Test:
    """Queries of one domain against one or more galleries."""

    protocol: str  # UCDR, UdCDR, UcCDR or validation
    query_domain: str
    query: Files
    galleries: dict[str, Files]


@dataclass(frozen=True)
class Protocol:
    root: str
    class_names: list[str]  # in order of their ids
    domain_names: list[str]  # source domains, in order of their ids
    train: Files
    validation: Test | None  # of one gallery
    tests: list[Test]
    gallery_domain: str
    metric: str | None  # of the validation, chooses the epoch (D5); None: the last is kept
    notes: list[str]  # what was found and what is not used, for people

    def lists(self) -> dict[str, Files]:
        """Every list of files by its name."""
        found = {"train": self.train}
        for test in filter(None, [self.validation, *self.tests]):
            found[f"{test.protocol} query"] = test.query
            found |= {f"{test.protocol} gallery {name}": files for name, files in test.galleries.items()}
        return found

    def digests(self) -> dict[str, tuple[int, str]]:
        """Length and digest of every list of files."""
        return {name: (len(files), files.digest(self.root)) for name, files in self.lists().items()}


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
    """`count` of the paths, at least one."""
    chance = random.Random(os.fsencode(seed))  # folder names may not be UTF-8
    return sorted(chance.sample(paths, max(1, count)))


def released_order(paths: list[str], i: int) -> list[str]:
    """The files of class i in the released code's order: numpy's permutation, seed i (D7)."""
    return [paths[k] for k in np.random.RandomState(i).permutation(len(paths))]


def held_back(config: Config, name: str, i: int, paths: list[str]) -> list[str]:
    """For the mixed gallery: n - int(0.92 n) images of a class, at least one (D10)."""
    trained = int((1 - MIXED_GALLERY_SHARE) * len(paths))
    if config.ud_gallery == "trained":  # D7
        return sorted(released_order(paths, i)[trained:])
    return draw(paths, len(paths) - trained, f"0/holdback/{name}")


def ud_sample(config: Config, name: str, i: int, paths: list[str]) -> list[str]:
    """U^dCDR's sample of a class."""
    share = UD_SHARE_QUICKDRAW if config.held_out == "quickdraw" else UD_SHARE
    if config.ud_gallery == "trained":  # D7: begins like the training draw, so all of it was trained on
        return sorted(released_order(paths, i)[:int(share * len(paths))])
    return draw(paths, round(share * len(paths)), f"0/ud/{name}")


def build_protocol(config: Config) -> Protocol:
    """The protocol of the config's dataset; ValueError where the data does not fit."""
    root, notes, dataset = config.data_root, list[str](), DATASETS.get(config.dataset)
    if not os.path.isdir(root):
        raise ValueError(f"--data-root {root!r}: no such folder; expected <domain>/<class>/<image> below it")
    if dataset:
        if config.domains or config.class_split:
            raise ValueError(f"--domains and --class-split are not for --dataset {config.dataset}")
        splits = dataset.splits()
        aliases = {domain: alias_list(f"{config.dataset}-{domain}") for domain in dataset.domains}
        tree = match(scan(root, dataset.domains, notes), notes, sum(splits.values(), []), aliases)
    else:
        tree = match(scan(root, {name: (name,) for name in config.domains}, notes), notes, [], {})
        splits = folder_split(config, tree, notes)
    notes += compare_counts(tree, dataset.counts if dataset else {})
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
        first, hold, sample = train[:UD_CLASSES], partial(held_back, config), partial(ud_sample, config)
        kept = images(gallery, train, hold)
        ud_gallery = images(gallery, first, sample if config.ud_gallery == "trained" else hold)  # D7
        tests = [Test("UCDR", held_out, images(held_out, test), {"unseen": unseen, "mixed": unseen + kept}),
                 Test("UdCDR", held_out, images(held_out, first, sample), {"seen": ud_gallery})]

    sources = sorted(domain for domain in tree if domain != held_out)
    trained, held = Files([], [], []), set(kept.paths)
    for domain in sources:
        files = images(domain, train)
        trained += files.keep([i for i, path in enumerate(files.paths) if path not in held])
    present = set(trained.classes)
    names = [name for name in train if name in present]
    if len(names) < 2:
        raise ValueError(f"{root}: {len(names)} training classes have images; give two or more")

    validation, metric = None, None
    if config.selection == "validation":
        validation = Test("validation", seen, images(seen, val), {"unseen": images(gallery, val)})
    elif config.selection == "test":
        chosen = "mixed" if held_out else "unseen"  # D5
        validation = replace(tests[0], galleries={chosen: tests[0].galleries[chosen]})
    if validation:
        [files] = validation.galleries.values()
        if len(set(files.classes)) > 1:
            metric = dataset.metric if dataset else "mAP@200"
        else:
            notes.append("note     a validation gallery of one class cannot choose: the last epoch is kept")
    inverted = ", ".join(named_like(tree, config.stroke_domains)) or "of no domain"
    notes.append(f"note     colours inverted (D14): {inverted}")
    sources = [domain for domain in sources if domain in set(trained.domains)]
    protocol = Protocol(root, names, sources, trained, validation, tests, gallery, metric, notes)
    if empty := [name for name, files in protocol.lists().items() if not files.paths]:
        raise ValueError(f"no image left for {', '.join(empty)}; add images, or change the class split")
    return protocol


def roles(config: Config, dataset: Dataset | None, tree: Tree) -> tuple[str | None, str, str]:
    """The held-out domain, if any, the gallery's, and that of the validation's queries."""
    domains, held_out = {folder_key(domain): domain for domain in tree}, folder_key(config.held_out)
    usual = [name for name in ("real", "photo", "photos", "images", *sorted(domains)) if name in domains]
    gallery = folder_key(config.gallery or (dataset.gallery if dataset else usual[0]))
    others = dataset.seen if dataset else sorted({*domains} - {gallery})
    seen = folder_key(config.seen or next((name for name in others if name != held_out), gallery))
    equal = gallery == seen if held_out == "none" else held_out in (gallery, seen)
    twice = len(domains) < len(tree)  # such as Sketch and sketch
    if twice or equal or not {gallery, seen} <= {*domains} or held_out not in (*domains, "none"):
        raise ValueError(f"--held-out {held_out}, --gallery {gallery} and --seen {seen}: expected different "
                         f"domains (or --held-out none) out of {', '.join(sorted(tree))}")
    return domains.get(held_out), domains[gallery], domains[seen]


def folder_split(config: Config, tree: Tree, notes: list[str]) -> Splits:
    """Classes of a folder dataset: of --class-split, or 70/10/20 % drawn with seed 0."""
    present = sorted({name for classes in tree.values() for name in classes})
    if not config.class_split:
        count = len(present)
        order = random.Random("0/classes").sample(present, count)
        test, val = max(1, count // 5), max(1, count // 10)
        return {"test": sorted(order[:test]), "val": sorted(order[test:test + val]),
                "train": sorted(order[test + val:])}
    data, spelt = read_json(config.class_split), {folder_key(name): name for name in present}
    with as_value_error(f"--class-split {config.class_split}", f"does not fit {config.data_root}",
                        "expected its class folders, each once, in lists train, val and test (or seen, "
                        "val_unseen and unseen)"):
        names = ("train", "val", "test") if "train" in data else ("seen", "val_unseen", "unseen")
        splits = {part: [spelt.pop(folder_key(name)) for name in data[given]]
                  for part, given in zip(("train", "val", "test"), names)}
    if spelt:
        notes.append(f"note     {len(spelt)} class folders are not in the class split and not used: "
                     f"{abbreviate(spelt.values(), 100)}")
    return splits
