"""The benchmarks: which files are trained on, and which queries meet which gallery.

Every list is sorted and every draw has its own seeded generator, so a split is the same on every machine.
"""
from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from ..clip.weights import check_file, read_text
from ..config import Config
from ..images.batches import Files
from .datasets import DATASETS, Dataset, alias_list, compared, folder_key, some
from .trees import Listing, Tree, match, merge_spellings, only_listed, restore, scan

UD_CLASSES = 45  # U^dCDR queries the first 45 training classes, as listed (released code)
UD_SHARE, UD_SHARE_QUICKDRAW = 0.25, 0.10  # of each class; quickdraw has more images than other domains
Splits = dict[str, list[str]]  # train, val and test classes


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
    class_names: list[str]  # in order of class id
    domain_names: list[str]  # source domains, in order of domain id
    train: Files
    validation: Test | None
    tests: list[Test]
    gallery_domain: str
    selected: tuple[str, str] | None = None  # gallery and metric that choose the epoch (D5); None: the last
    notes: list[str] = field(default_factory=list)  # what was found and what is not used, for people
    listing: Listing = field(default_factory=dict)

    @property
    def all_tests(self) -> list[Test]:
        """The validation's first, where there is one."""
        return [self.validation, *self.tests] if self.validation else self.tests

    def digests(self) -> dict[str, str]:
        """A digest of every file list, so that two runs can be seen to use the same images."""
        lists = {"train": self.train}
        for test in self.all_tests:
            lists |= {f"{test.protocol} query": test.query}
            lists |= {f"{test.protocol} gallery {name}": files for name, files in test.galleries.items()}
        return {name: files.digest(self.root) for name, files in lists.items()}


Choose = Callable[[str, int, list[str]], list[str]]  # (domain/class, the class's place, paths) -> some paths


def pick(tree: Tree, domain: str, classes: list[str], choose: Choose | None = None) -> Files:
    """Images of a domain's classes, class by class: all, or those that `choose` leaves."""
    paths, labels = [], []
    for place, name in enumerate(classes):
        found = tree[domain].get(name, [])
        if choose is not None and found:
            found = choose(f"{domain}/{name}", place, found)
        paths += found
        labels += [name] * len(found)
    return Files(paths, labels, [domain] * len(paths))


def drawn(paths: list[str], count: int, seed: str) -> list[str]:
    return sorted(random.Random(seed).sample(paths, count))


def released_order(paths: list[str], place: int) -> list[str]:
    """The order in which the released code takes a class's files: numpy's permutation by its place (D7)."""
    return [paths[i] for i in np.random.RandomState(place).permutation(len(paths))]


def held_back(config: Config, name: str, place: int, paths: list[str]) -> list[str]:
    """For the mixed gallery: n - int((1 - holdback) n) images of a class, at least one (D10)."""
    trained = int((1 - config.holdback) * len(paths))
    if config.ud_gallery == "trained":  # D7
        return sorted(released_order(paths, place)[trained:])
    return drawn(paths, max(1, len(paths) - trained), f"{config.split_seed}/holdback/{name}")


def ud_sample(config: Config, name: str, place: int, paths: list[str]) -> list[str]:
    """U^dCDR's sample of a class: a quarter, or a tenth where the queries are of quickdraw."""
    share = UD_SHARE_QUICKDRAW if config.held_out == "quickdraw" else UD_SHARE
    if config.ud_gallery == "trained":  # D7: begins like the training draw, so all of it was trained on
        return sorted(released_order(paths, place)[:int(share * len(paths))])
    return drawn(paths, max(1, round(share * len(paths))), f"{config.split_seed}/ud/{name}")


def build(config: Config, before: Listing | None = None) -> Protocol:
    """The protocol of the config's dataset; ValueError or FileNotFoundError where the data does not fit.

    before: as `trees.restore` takes it.
    """
    root, notes = config.data_root, list[str]()
    sketchy = config.dataset == "sketchy"
    row = DATASETS.get(f"sketchy/{config.sketchy_split}" if sketchy else config.dataset)
    tree, splits, listing = read(config, row, before or {}, notes)
    if config.per_class:
        for domain, classes in tree.items():
            for name, paths in classes.items():
                seed = f"{config.split_seed}/thin/{domain}/{name}"
                classes[name] = drawn(paths, min(len(paths), config.per_class), seed)
    held_out, gallery, seen = roles(config, row, tree)
    train, val, test = splits["train"], splits["val"], splits["test"]
    if config.train_classes == "train+val":  # D10
        if config.selection == "validation":
            raise ValueError("--train-classes train+val leaves no validation classes; add --selection last")
        train, val = train + val, []

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
    for item in tests:
        check(item)

    sources = sorted(domain for domain in tree if domain != held_out)
    trained, not_trained = Files([], [], []), set(kept.paths)
    for domain in sources:
        trained += images(domain, train)
    trained = trained.keep([i for i, path in enumerate(trained.paths) if path not in not_trained])
    present = set(trained.classes)
    names = [name for name in train if name in present]
    if len(names) < 2:
        there = ", ".join(sources)
        raise ValueError(f"{root}: {len(names)} training classes have images in {there}; give two or more")
    of_val = Test("validation", seen, images(seen, val), {"unseen": images(gallery, val)})
    validation, selected = select(config, tests, of_val, row.metric if row else "mAP@200", notes)
    if config.variant == "released" and config.prompt_length > 1:
        notes.append(f"note     the released code cannot run with p = {config.prompt_length} (D16): here a "
                     "class or domain has p rows, as the paper says")
    return Protocol(root, names, sources, trained, validation, tests, gallery, selected, notes, listing)


def read(config: Config, row: Dataset | None, before: Listing,
         notes: list[str]) -> tuple[Tree, Splits, Listing]:
    """The images of each domain and class, the class split, and the listing of all images."""
    root = config.data_root
    for flag, given, where in (("--domains", " ".join(config.domains), "folder"),
                               ("--class-split", config.class_split, "folder"),
                               ("--file-lists", config.file_lists, "domainnet")):
        if given and config.dataset != where:
            raise ValueError(f"{flag} {given} is for --dataset {where}, and this is {config.dataset}; "
                             "leave it out")
    tree = scan(root, row.domains if row else {name: (name,) for name in config.domains}, notes)
    listing = restore(tree, root, before)
    if config.file_lists:
        tree = only_listed(tree, root, config.file_lists)
    if config.dataset == "folder":
        tree = merge_spellings(tree, notes)
        splits = folder_split(config, tree)
    else:
        if row:
            title, splits = row.title, row.splits()
            aliases = {domain: alias_list(name) for domain, name in row.aliases.items()}
        else:
            from ..demo.drawing import SPLIT
            title, splits, aliases = "the drawn data", {part: [*names] for part, names in SPLIT.items()}, {}
        tree = match(tree, sum(splits.values(), []), title, notes, aliases)
    counts = {domain: (sum(map(len, classes.values())), len(classes)) for domain, classes in tree.items()}
    notes += compared(counts, row)
    return tree, splits, listing


def roles(config: Config, row: Dataset | None, tree: Tree) -> tuple[str | None, str, str]:
    """The held-out domain, if any, the gallery's, and that of the validation's queries."""
    held_out = None if config.held_out == "none" else config.held_out
    usual = [name for name in ("real", "photo", "photos", "images", *sorted(tree)) if name in tree]
    gallery = config.gallery or (row.gallery if row else usual[0])
    others = row.seen if row else sorted({*tree} - {gallery})
    seen = config.seen or next((name for name in others if name != held_out), gallery)
    there = ", ".join(sorted(tree))
    for flag, domain in (("--held-out", held_out), ("--gallery", gallery), ("--seen", seen)):
        if domain is not None and domain not in tree:
            raise ValueError(f"{flag} {domain or '(empty)'}: no such domain in {config.data_root}; "
                             f"there are {there}")
    if held_out == gallery:
        raise ValueError(f"--held-out {held_out} is the gallery domain; hold out another one of {there}")
    if seen == held_out:
        raise ValueError(f"--seen {seen} is held out; name a source domain for the validation queries")
    if held_out is None and len(tree) < 2:
        raise ValueError(f"{config.data_root}: only the domain {there}; give two or more")
    if held_out is None and seen == gallery:
        raise ValueError(f"--seen {seen} is the gallery domain, where each query would find itself; name "
                         f"another one of {there}")
    return held_out, gallery, seen


def select(config: Config, tests: list[Test], validation: Test, metric: str,
           notes: list[str]) -> tuple[Test | None, tuple[str, str] | None]:
    """The queries, and the gallery and metric, that choose the epoch (D5); a line when they cannot choose."""
    if config.selection == "last":
        return None, None
    chosen = {"validation": validation, "test": tests[0]}[config.selection]
    name = "mixed" if "mixed" in chosen.galleries else next(iter(chosen.galleries))  # D5
    chosen = replace(chosen, galleries={name: chosen.galleries[name]})
    check(chosen)
    classes = len(set(chosen.galleries[name].classes))
    if classes < 2:
        notes.append(f"note     {classes} class cannot choose an epoch, since every ranking of it is right: "
                     "the last is kept")
    return chosen, None if classes < 2 else (name, metric)


def check(test: Test) -> None:
    """ValueError where there is nothing to search, or to search for."""
    galleries = {f"{name} gallery": files for name, files in test.galleries.items()}
    for what, files in {"query": test.query, **galleries}.items():
        if not files:
            where = f"{test.protocol} with queries of {test.query_domain}"
            raise ValueError(f"{where}: no {what} left; class split and folders have no class in common")


def folder_split(config: Config, tree: Tree) -> Splits:
    """Classes of a folder dataset: of --class-split, or 70/10/20 % drawn by --split-seed."""
    present = sorted({name for classes in tree.values() for name in classes})
    if not config.class_split:
        count = len(present)
        if count < 4:
            raise ValueError(f"{config.data_root}: {count} classes cannot be split in three; give 4 or more, "
                             "or --class-split")
        order = random.Random(f"{config.split_seed}/classes").sample(present, count)
        test, val = max(1, count // 5), max(1, count // 10)
        return {"test": sorted(order[:test]), "val": sorted(order[test:test + val]),
                "train": sorted(order[test + val:])}
    where = f"--class-split {config.class_split}"
    keys = {"train": ("train", "seen"), "val": ("val", "val_unseen"), "test": ("test", "unseen")}
    check_file(config.class_split, "; --class-split wants a JSON file")
    try:
        data = json.loads(read_text(config.class_split))
        splits = {part: next(data[key] for key in names if key in data) for part, names in keys.items()}
        if not all(isinstance(names, list) for names in splits.values()):
            raise TypeError
        listed = [folder_key(name) for names in splits.values() for name in names]
    except (OSError, ValueError, TypeError, StopIteration, RecursionError):
        raise ValueError(f"{where}: expected a JSON file with lists of class names under train (or seen), "
                         "val (or val_unseen) and test (or unseen)") from None
    if twice := [name for name, count in Counter(listed).items() if count > 1]:
        raise ValueError(f"{where}: {some(sorted(twice), 5)} stand in more than one part, or twice in one")
    spelt = {folder_key(name): name for name in present}
    if missing := sorted(set(listed).difference(spelt)):
        raise ValueError(f"{where}: no folder in {config.data_root} for {some(missing, 5)}")
    return {part: [spelt[folder_key(name)] for name in names] for part, names in splits.items()}
