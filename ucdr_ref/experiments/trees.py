"""Folders as they come out of archives -> {domain: {class: paths}}, with a line for whatever is not used."""
from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..clip.tensorfile import regular_file
from ..images.batches import ENDINGS
from .datasets import AUGMENTED, folder_key, some

Tree = dict[str, dict[str, list[str]]]  # domain -> class -> sorted paths
Listing = dict[str, list[str]]  # folder -> sorted names of the images below it, which a run folder remembers
DEEP = "Did the archive unpack one level too deep?"


def scan(root: str, domains: Mapping[str, Sequence[str]] | None = None,
         notes: list[str] | None = None) -> Tree:
    """Images of `<root>/<domain>/<class>/*`, sorted: of all domain folders, or of those in `domains`,
    {domain: folders that may be it}.

    Links are followed. `notes` gets a line for images that lie deeper, files with unknown endings, and
    Sketchy's augmented copies, none of which are used. Raises FileNotFoundError for a missing root or domain,
    ValueError for a class folder without images and a link to a folder that it lies in, naming them.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"--data-root {root}: no such folder; expected "
                                "<root>/<domain>/<class>/<image>")
    notes = [] if notes is None else notes
    top = (os.path.realpath(root),)
    present = contents(root)[2]
    places = {name: locate(root, candidates, present) for name, candidates in domains.items()} \
        if domains else {os.path.basename(path): path for path in present}
    tree: Tree = {}
    nested: list[str] = []
    unknown: list[str] = []
    for domain, place in places.items():
        above, classes = enter(place, top), contents(place)[2]
        if (unchanged := os.path.join(place, AUGMENTED)) in classes:
            if copies := [os.path.basename(path) for path in classes if path != unchanged]:
                notes.append(f"note     {domain}: only {AUGMENTED} is used, not {some(copies)} beside it")
            above, classes = enter(unchanged, above), contents(unchanged)[2]
        tree[domain] = {}
        for folder in classes:
            within, (paths, others, folders) = enter(folder, above), contents(folder)
            deeper = images_below(folders, within)
            if not paths:
                below = f", but {deeper[0]} lies deeper" if deeper else ""
                raise ValueError(f"{folder}: a class folder without images{below}; fill it or remove it")
            nested += deeper
            unknown += others
            tree[domain][os.path.basename(folder)] = paths
    for found, what in ((nested, "images lie deeper than <domain>/<class>/<image>"),
                        (unknown, "files have unknown endings")):
        if found:
            notes.append(f"note     {len(found)} {what} and are not used, the first is {min(found)}")
    tree = {domain: classes for domain, classes in tree.items() if classes}
    if not tree:
        raise ValueError(f"{root}: found no images in <domain>/<class>/*; {DEEP[0].lower()}{DEEP[1:]}")
    return tree


def below(root: str, paths: Iterable[str]) -> list[str]:
    start = len(os.path.join(root, ""))
    return sorted(path[start:] for path in paths)


def with_gone(names: list[str], before: Sequence[str]) -> list[str]:
    """Sorted names with those of `before` that are gone from among them, as if they were there and not
    readable.

    Only where nothing else has changed: no name is new, and every folder still holds an image.
    """
    folders = {os.path.dirname(name) for name in names}
    gone = [name for name in set(before).difference(names) if os.path.dirname(name) in folders]
    return sorted([*names, *gone]) if gone and set(names) <= set(before) else names


def restored(tree: Tree, root: str, before: Listing) -> tuple[Tree, Listing]:
    """A scanned tree with the images that are gone since `before`, by `with_gone`, and its own listing."""
    names = below(root, (path for classes in tree.values() for paths in classes.values() for path in paths))
    listed = with_gone(names, before.get("data", ()))
    gone: dict[str, list[str]] = {}
    for name in set(listed).difference(names):
        path = os.path.join(root, name)
        gone.setdefault(os.path.dirname(path), []).append(path)
    tree = {domain: {label: sorted([*paths, *gone.get(os.path.dirname(paths[0]), ())])
                     for label, paths in classes.items()}
            for domain, classes in tree.items()}
    return tree, {"data": listed}


def locate(root: str, candidates: Sequence[str], present: list[str]) -> str:
    """The first candidate that is a folder below the root."""
    for candidate in candidates:
        if os.path.isdir(path := os.path.join(root, *candidate.split("/"))):
            return path
    wanted, there = " or ".join(map(repr, candidates)), some(map(os.path.basename, present)) or "none"
    raise FileNotFoundError(f"{root}: no domain folder {wanted}; there are {there}. {DEEP}")


def contents(folder: str) -> tuple[list[str], list[str], list[str]]:
    """Sorted paths of the images, other files and folders in a folder; hidden names are passed over."""
    images: list[str] = []
    others: list[str] = []
    folders: list[str] = []
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        # A link may lead nowhere, or to itself.
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            folders.append(entry.path)
        else:
            (images if os.path.splitext(entry.name)[1].lower() in ENDINGS else others).append(entry.path)
    return sorted(images), sorted(others), sorted(folders)


def enter(folder: str, above: tuple[str, ...]) -> tuple[str, ...]:
    """The real folders that `folder` lies in, and its own; ValueError when a link leads back to one."""
    real = os.path.realpath(folder)
    if real in above:
        raise ValueError(f"{folder}: this link leads back to {real}, in which it lies; remove it")
    return (*above, real)


def images_below(folders: Sequence[str], above: tuple[str, ...]) -> list[str]:
    """Images in these folders and all below them."""
    found: list[str] = []
    for folder in folders:
        within, (images, _, deeper) = enter(folder, above), contents(folder)
        found += images + images_below(deeper, within)
    return found


def by_key(domain: str, classes: Mapping[str, list[str]], aliases: Mapping[str, str]) -> dict[str, str]:
    """{`folder_key` of a class: folder name}; ValueError when two folders of the domain are one class."""
    found: dict[str, str] = {}
    for name in classes:
        key = aliases.get(folder_key(name), folder_key(name))
        if key in found:
            raise ValueError(f"domain {domain}: the folders {found[key]!r} and {name!r} are one class, as "
                             f"case "
                             "and punctuation do not tell classes apart; join or rename them")
        found[key] = name
    return found


def merge_spellings(tree: Tree, notes: list[str]) -> Tree:
    """The tree in which a class has one name in all domains: the one that it has in the first of them."""
    spelling: dict[str, str] = {}
    other: dict[str, str] = {}
    merged: Tree = {}
    for domain, classes in tree.items():
        merged[domain] = {}
        for key, name in by_key(domain, classes, {}).items():
            if spelling.setdefault(key, name) != name:
                other.setdefault(name, f"{name!r} ({domain}) = {spelling[key]!r}")
            merged[domain][spelling[key]] = classes[name]
    if other:
        notes.append(f"note     class folders spelt in two ways are one class each: {some(other.values())}")
    return merged


def match(tree: Tree, expected: Sequence[str], title: str, notes: list[str],
          aliases: Mapping[str, Mapping[str, str]]) -> Tree:
    """The tree with folders renamed to the benchmark's class names; other folders are left out, with a line.

    aliases: {domain: {folder: class}}. Raises ValueError with the names, of each domain, that have no folder.
    """
    keys = {folder_key(name): name for name in expected}
    renamed: Tree = {}
    problems: dict[str, list[str]] = {}  # sentence: domains
    for domain, classes in tree.items():
        other = {folder_key(folder): folder_key(name) for folder, name in aliases.get(domain, {}).items()
                 if folder_key(folder) not in keys}
        found = by_key(domain, classes, other)
        missing = sorted(name for key, name in keys.items() if key not in found)
        strange = sorted(name for key, name in found.items() if key not in keys)
        if missing:
            sentence = f"no folder for {some(missing)}; folders that are no class: {some(strange) or 'none'}"
            problems.setdefault(sentence, []).append(domain)
        elif strange:
            notes.append(f"note     {domain}: folders that are no class of {title} are not used: "
                         f"{some(strange)}")
        renamed[domain] = {name: classes[found[key]] for key, name in keys.items() if key in found}
    if problems:
        told = [f"{title}, domain {', '.join(domains)}: {sentence}" for sentence, domains in problems.items()]
        raise ValueError(". ".join(told) + ("" if all(renamed.values()) else f". {DEEP}"))
    return renamed


def only_listed(tree: Tree, root: str, lists: str) -> Tree:
    """The tree without images that `<lists>/<domain>_{train,test}.txt` do not name (the cleaned DomainNet).

    A line is `<domain>/<class>/<image> <number>`. Raises FileNotFoundError for a missing list, ValueError for
    a line of another form and for listed images that are not there.
    """
    kept: Tree = {}
    for domain, classes in tree.items():
        wanted: set[str] = set()
        for part in ("train", "test"):
            path = Path(lists) / f"{domain}_{part}.txt"
            if not path.is_file():
                raise FileNotFoundError(f"--file-lists {lists}: no {path.name}; expected <domain>_train.txt "
                                        "and <domain>_test.txt of every domain")
            lines = regular_file(path).read_text(encoding="utf-8").splitlines()
            for number, line in enumerate(lines, start=1):
                name, _, label = line.rpartition(" ")
                if line and (not label.isdigit() or not name.startswith(f"{domain}/")):
                    raise ValueError(f"{path}, line {number}: {line[:80]!r}; expected "
                                     f"{domain}/<class>/<image> <number>")
                wanted.add(name)
        wanted.discard("")
        start = len(os.path.join(root, ""))
        kept[domain] = {}
        for name, paths in classes.items():
            names = {path[start:].replace(os.sep, "/"): path for path in paths}
            if here := [path for short, path in names.items() if short in wanted]:
                kept[domain][name] = here
            wanted.difference_update(names)
        if wanted:
            raise ValueError(f"--file-lists {lists}: {len(wanted)} listed images of {domain} are not in "
                             f"{root}: {some(sorted(wanted), 3)}")
    return kept
