"""The benchmarks: which files are trained on, and which queries meet which gallery.

Every list is sorted and every draw has its own seeded generator, so a split is the same on every machine.
"""
from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from ..clip.tensorfile import regular_file
from ..config import Config
from ..images.batches import Files
from ..sre.graph import duplicates
from .datasets import DATASETS, Dataset, alias_list, class_list, compared, folder_key, some
from .trees import Listing, Tree, match, merge_spellings, only_listed, restored, scan

__all__ = ["DOMAINNET_DOMAINS", "Protocol", "Test", "build", "class_list", "folder_split", "scan"]
DOMAINNET_DOMAINS = tuple(DATASETS["domainnet"].domains)
UD_CLASSES = 45  # U^dCDR queries the first 45 training classes, as listed (released code)
UD_SHARE, UD_SHARE_QUICKDRAW = 0.25, 0.10  # of each class; quickdraw has more images than other domains
Choose = Callable[[str, int, list[str]], list[str]]  # (class, its place in the list, paths) -> some paths


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
    # The gallery and metric of `validation` that choose the epoch (D5); None: the last epoch is kept.
    selected: tuple[str, str] | None = None
    notes: list[str] = field(default_factory=list)  # what was found and what is not used, for people
    listing: Listing = field(default_factory=dict)  # every image that was found

    def digests(self) -> dict[str, str]:
        """A digest of every file list, so that two runs can be seen to use the same images."""
        lists = {"train": self.train}
        for test in [self.validation, *self.tests] if self.validation else self.tests:
            lists |= {f"{test.protocol} query": test.query}
            lists |= {f"{test.protocol} gallery {name}": files for name, files in test.galleries.items()}
        return {name: files.digest(self.root) for name, files in lists.items()}


def pick(tree: Tree, domain: str, classes: list[str], choose: Choose | None = None) -> Files:
    """Images of a domain's classes, class by class: all, or those that `choose` leaves."""
    paths, labels = [], []
    for place, name in enumerate(classes):
        found = tree[domain].get(name, [])
        if choose is not None and found:
            found = choose(name, place, found)
        paths += found
        labels += [name] * len(found)
    return Files(paths, labels, [domain] * len(paths))


def drawn(paths: list[str], count: int, seed: str) -> list[str]:
    chosen = set(random.Random(seed).sample(paths, count))
    return [path for path in paths if path in chosen]


def released_order(paths: list[str], place: int) -> list[str]:
    """The order in which the released code takes a class's files: numpy's permutation by its place (D7)."""
    return [paths[i] for i in np.random.RandomState(place).permutation(len(paths))]


def held_back(config: Config, domain: str) -> Choose:
    """For the mixed gallery: n - int((1 - holdback) n) images of a class, at least one (D10)."""
    def choose(name: str, place: int, paths: list[str]) -> list[str]:
        trained = int((1 - config.holdback) * len(paths))
        if config.ud_gallery == "trained":  # D7
            kept = set(released_order(paths, place)[trained:])
            return [path for path in paths if path in kept]
        return drawn(paths, max(1, len(paths) - trained), f"{config.split_seed}/holdback/{domain}/{name}")

    return choose


def ud_sample(config: Config, domain: str) -> Choose:
    """U^dCDR's sample of a class: a quarter, or a tenth where the queries are of quickdraw."""
    share = UD_SHARE_QUICKDRAW if config.held_out == "quickdraw" else UD_SHARE

    def choose(name: str, place: int, paths: list[str]) -> list[str]:
        if config.ud_gallery == "trained":  # D7: begins like the training draw, so all of it was trained on
            return sorted(released_order(paths, place)[:int(share * len(paths))])
        return drawn(paths, max(1, round(share * len(paths))), f"{config.split_seed}/ud/{domain}/{name}")

    return choose


def thin(tree: Tree, per_class: int, seed: int) -> Tree:
    """At most `per_class` images of each class in each domain (0: all), drawn by seed."""
    def draw(domain: str, name: str, paths: list[str]) -> list[str]:
        return drawn(paths, min(len(paths), per_class or len(paths)), f"{seed}/thin/{domain}/{name}")

    return {domain: {name: draw(domain, name, paths) for name, paths in classes.items()}
            for domain, classes in tree.items()}


def assemble(config: Config, tree: Tree, splits: dict[str, list[str]], gallery: str, seen: str, metric: str,
             notes: list[str]) -> Protocol:
    """The protocol of a class split (train, val, test), a held-out query domain and a gallery domain."""
    held_out, there = None if config.held_out == "none" else config.held_out, ", ".join(sorted(tree))
    for flag, domain in (("--held-out", held_out), ("--gallery", gallery), ("--seen", seen)):
        if domain is not None and domain not in tree:
            raise ValueError(f"{flag} {domain}: no such domain in {config.data_root}; there are {there}")
    if held_out == gallery:
        raise ValueError(f"--held-out {held_out} is the gallery domain; hold out another one of {there}")
    if seen == held_out:
        raise ValueError(f"--seen {seen} is held out; name a source domain for the validation queries")
    train, val, test = splits["train"], splits["val"], splits["test"]
    if config.train_classes == "train+val":  # D10
        if config.selection == "validation":
            raise ValueError("--train-classes train+val leaves no validation classes; add --selection last")
        train, val = train + val, []
    sources = sorted(domain for domain in tree if domain != held_out)
    if len(sources) < 2 and held_out is None:
        raise ValueError(f"{config.data_root}: only the domain {sources}; at least two are needed")

    tests: list[Test] = []
    kept = Files([], [], [])
    if held_out is None:
        tests.append(Test("UcCDR", seen, pick(tree, seen, test), {"unseen": pick(tree, gallery, test)}))
    else:
        kept = pick(tree, gallery, train, held_back(config, gallery))
        unseen = pick(tree, gallery, test)
        galleries = {"unseen": unseen, "mixed": unseen + kept}
        tests.append(Test("UCDR", held_out, pick(tree, held_out, test), galleries))
        first = train[:UD_CLASSES]
        ud_query = pick(tree, held_out, first, ud_sample(config, held_out))
        if config.ud_gallery == "trained":  # D7
            ud_gallery = pick(tree, gallery, first, ud_sample(config, gallery))
        else:
            of_first = set(first)
            ud_gallery = kept.keep([i for i, name in enumerate(kept.classes) if name in of_first])
        if config.ud_gallery == "trained" and not (ud_query and ud_gallery):
            notes.append("note     UdCDR is left out: int(p n), the released draw from a class, is 0 here")
        else:
            tests.append(Test("UdCDR", held_out, ud_query, {"seen": ud_gallery}))
    for item in tests:
        check(item)

    trained, kept_paths = Files([], [], []), set(kept.paths)
    for domain in sources:
        files = pick(tree, domain, train)
        if domain == gallery:
            files = files.keep([i for i, path in enumerate(files.paths) if path not in kept_paths])
        trained += files
    present = set(trained.classes)
    names = [name for name in train if name in present]
    if len(names) < 2:
        raise ValueError(f"{config.data_root}: {len(names)} training classes have images in "
                         f"{', '.join(sources)}; at least two are needed")
    of_val = Test("validation", seen, pick(tree, seen, val), {"unseen": pick(tree, gallery, val)})
    validation, selected = select(config, tests, of_val, metric, notes)
    if config.variant == "released" and config.prompt_length > 1:
        notes.append(f"note     the released code cannot run with p = {config.prompt_length} (D16): here a "
                     "class or domain has p rows, as the paper says")
    return Protocol(config.data_root, names, sources, trained, validation, tests, gallery, selected, notes)


def select(config: Config, tests: list[Test], validation: Test, metric: str,
           notes: list[str]) -> tuple[Test | None, tuple[str, str] | None]:
    """The queries, and the gallery and metric, that choose the epoch (D5); a line when they cannot choose."""
    if config.selection == "last":
        return None, None
    chosen = validation
    if config.selection == "test":  # D5: the mixed gallery where there is one
        chosen = tests[0]
    elif config.selection == "test-ud":
        if tests[-1].protocol != "UdCDR":
            raise ValueError("--selection test-ud: this protocol has no U^dCDR queries; choose test, "
                             "validation or last")
        chosen = tests[-1]
    name = "mixed" if "mixed" in chosen.galleries else next(iter(chosen.galleries))
    chosen = replace(chosen, galleries={name: chosen.galleries[name]})
    check(chosen)
    classes = len(set(chosen.galleries[name].classes))
    if classes < 2:
        notes.append(f"note     {classes} class cannot choose an epoch, since every ranking of it is right: "
                     f"the "
                     "last is kept")
        return chosen, None
    return chosen, (name, metric)


def check(test: Test) -> None:
    where = f"{test.protocol} with queries of {test.query_domain}"
    if not len(test.query):
        raise ValueError(f"{where}: no query left; the class split and the domain's folders have no class in "
                         "common")
    for name, gallery in test.galleries.items():
        if not len(gallery):
            raise ValueError(f"{where}: the {name} gallery is empty; the class split and its folders have no "
                             "class in common")


def folder_split(config: Config, tree: Tree) -> dict[str, list[str]]:
    """train, val, test classes of a folder dataset: of --class-split, or 70/10/20 % drawn by --split-seed."""
    present = sorted({name for classes in tree.values() for name in classes})
    if not config.class_split:
        order = random.Random(f"{config.split_seed}/classes").sample(present, len(present))
        if len(order) < 4:
            raise ValueError(f"{config.data_root}: {len(order)} classes cannot be split in three; at least 4 "
                             "are needed")
        test, val = max(1, len(order) // 5), max(1, len(order) // 10)
        return {"test": sorted(order[:test]), "val": sorted(order[test:test + val]),
                "train": sorted(order[test + val:])}
    try:
        data = json.loads(regular_file(config.class_split).read_text(encoding="utf-8"))
        aliases = {"train": ("train", "seen"), "val": ("val", "val_unseen"), "test": ("test", "unseen")}
        splits = {part: next(data[key] for key in keys if key in data) for part, keys in aliases.items()}
        assert all(isinstance(names, list) for names in splits.values())
        assert all(isinstance(name, str) for names in splits.values() for name in names)
    except (OSError, ValueError, TypeError, StopIteration, AssertionError, RecursionError):
        raise ValueError(f"--class-split {config.class_split}: expected a JSON file with lists of class "
                         f"names "
                         "under train (or seen), val (or val_unseen) and test (or unseen)") from None
    everything = [folder_key(name) for names in splits.values() for name in names]
    if twice := duplicates(everything):
        raise ValueError(f"--class-split {config.class_split}: {some(sorted(twice), 5)} stand in more than "
                         f"one "
                         "part, or twice in one")
    spelt = {folder_key(name): name for name in present}
    missing = sorted(name for name in everything if folder_key(name) not in spelt)
    if missing:
        raise ValueError(f"--class-split {config.class_split}: no folder in {config.data_root} for "
                         f"{some(missing, 5)}")
    return {part: [spelt[folder_key(name)] for name in names] for part, names in splits.items()}


def build(config: Config, before: Listing | None = None) -> Protocol:
    """The protocol of the config's dataset. before: `trees.restored` takes it.

    Raises ValueError or FileNotFoundError when the data does not fit.
    """
    root, notes = config.data_root, list[str]()
    sketchy = config.dataset == "sketchy"
    row: Dataset | None = DATASETS.get(f"sketchy/{config.sketchy_split}" if sketchy else config.dataset)
    for flag, given, where in (("--domains", " ".join(config.domains), "folder"),
                               ("--file-lists", config.file_lists, "domainnet")):
        if given and config.dataset != where:
            raise ValueError(f"{flag} {given} is for --dataset {where}, and this is {config.dataset}; leave "
                             f"the "
                             "flag out")
    domains = row.domains if row is not None else {name: (name,) for name in config.domains}
    tree, listing = restored(scan(root, domains, notes), root, before or {})
    if row is not None:
        splits = row.splits()
        gallery, seen = row.gallery, next(name for name in row.seen if name != config.held_out)
        if config.file_lists:
            tree = only_listed(tree, root, config.file_lists)
        aliases = {domain: alias_list(name) for domain, name in row.aliases.items()}
        tree = match(tree, sum(splits.values(), []), row.title, notes, aliases)
    else:
        tree = merge_spellings(tree, notes)
        if config.dataset == "toy":
            from ..demo.drawing import SPLIT
            splits = {part: list(SPLIT[part]) for part in ("train", "val", "test")}
            tree = match(tree, sum(splits.values(), []), "the drawn data", notes, {})
        else:
            splits = folder_split(config, tree)
        usual = ("real", "photo", "photos", "images")
        gallery = config.gallery or next((name for name in usual if name in tree), sorted(tree)[0])
        seen = next((name for name in sorted(tree) if name not in (gallery, config.held_out)), gallery)
    counts = {domain: (sum(map(len, classes.values())), len(classes)) for domain, classes in tree.items()}
    notes += compared(counts, row)
    gallery, seen = config.gallery or gallery, config.seen or seen
    metric = row.metric if row else "mAP@200"
    protocol = assemble(config, thin(tree, config.per_class, config.split_seed), splits, gallery, seen,
                        metric, notes)
    return replace(protocol, listing=listing)
