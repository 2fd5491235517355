"""Folders as they come out of archives -> {domain: {class: paths}}, with a line for whatever is not used."""
from __future__ import annotations

import os
from bisect import insort
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

from ..clip.weights import read_text
from ..images.listing import opened, walk
from .datasets import AUGMENTED, folder_key, some

Tree = dict[str, dict[str, list[str]]]  # domain -> class -> sorted paths
Listing = dict[str, list[str]]  # folder -> sorted names of the images below it, which a run folder remembers
DEEP = "did the archive unpack one level too deep?"
LISTED = 100  # unmatched names that are told


def scan(root: str, domains: Mapping[str, Sequence[str]] | None = None,
         notes: list[str] | None = None) -> Tree:
    """Sorted images of `<root>/<domain>/<class>/*`; domains: {domain: folders that may be it}, or all.

    Links are followed. `notes` gets a line for what is not used: images elsewhere, files with unknown
    endings, Sketchy's augmented copies. Raises FileNotFoundError for a missing root or domain, ValueError for
    a named domain or a class folder without images, or a link to a folder that it lies in.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"--data-root {root or '(empty)'}: no such folder; "
                                "expected <domain>/<class>/* in it")
    notes = [] if notes is None else notes
    top = opened(root)
    present = {os.path.basename(path): path for path in top.folders}
    places = {name: locate(root, may_be, present) for name, may_be in (domains or {}).items()} or present
    tree: Tree = {}
    elsewhere, unknown = [*top.images], list[str]()
    for domain, place in places.items():
        within = opened(place, top.above)
        if (unchanged := os.path.join(place, AUGMENTED)) in within.folders:
            if copies := [os.path.basename(path) for path in within.folders if path != unchanged]:
                notes.append(f"note     {domain}: only {AUGMENTED} is used, not {some(copies)} beside it")
            within = opened(unchanged, within.above)
        elsewhere += within.images
        for path in within.folders:
            folder, *inner = walk(path, within.above)
            deeper = [image for each in inner for image in each.images]
            if not folder.images:
                below = f", but {min(deeper)} lies deeper" if deeper else ""
                raise ValueError(f"{path}: a class folder without images{below}; fill it or remove it")
            tree.setdefault(domain, {})[os.path.basename(path)] = folder.images
            elsewhere += deeper
            unknown += folder.others
    for found, what in ((elsewhere, "images lie elsewhere than at <domain>/<class>/<image>"),
                        (unknown, "files have unknown endings")):
        if found:
            notes.append(f"note     {len(found)} {what} and are not used, the first is {min(found)}")
    bare = [domain for domain in domains or () if domain not in tree]
    if bare or not tree:
        raise ValueError(f"{root}: found no images in {some(bare) or '<domain>'}/<class>/*; {DEEP}")
    return tree


def locate(root: str, may_be: Sequence[str], present: Iterable[str]) -> str:
    """The first that is a folder below the root."""
    for name in may_be:
        if os.path.isdir(path := os.path.join(root, *name.split("/"))):
            return path
    wanted = " or ".join(map(repr, may_be))
    raise FileNotFoundError(f"{root}: no domain folder {wanted}; there are {some(present) or 'none'}; {DEEP}")


def below(root: str, paths: Iterable[str]) -> list[str]:
    """Sorted names of the paths below the root."""
    start = len(os.path.join(root, ""))
    return sorted(path[start:] for path in paths)


def with_gone(names: list[str], before: Sequence[str]) -> list[str]:
    """Sorted names with those of `before` that are gone from among them, as if they could not be read.

    Only in folders that still hold an image, and only where no name is new.
    """
    if not set(names) <= set(before):
        return names
    folders = {os.path.dirname(name) for name in names}
    return sorted(name for name in set(before) if os.path.dirname(name) in folders)


def restore(tree: Tree, root: str, before: Listing) -> Listing:
    """Puts images that are gone since `before` back into a scanned tree, by `with_gone`; its listing."""
    folders = {os.path.dirname(paths[0]): paths for classes in tree.values() for paths in classes.values()}
    names = below(root, chain(*folders.values()))
    listed = with_gone(names, before.get("data", ()))
    for name in set(listed).difference(names):
        path = os.path.join(root, name)
        insort(folders[os.path.dirname(path)], path)
    return {"data": listed}


def by_key(domain: str, classes: Iterable[str], aliases: Mapping[str, str]) -> dict[str, str]:
    """{`folder_key` of a class: folder name}; ValueError when two folders of the domain are one class."""
    found: dict[str, str] = {}
    for name in classes:
        key = folder_key(name)
        other = found.setdefault(aliases.get(key, key), name)
        if other != name:
            raise ValueError(f"domain {domain}: the folders {other!r} and {name!r} are one class, as case "
                             "and punctuation do not tell classes apart; join or rename them")
    return found


def merge_spellings(tree: Tree, notes: list[str]) -> Tree:
    """The tree in which a class has one name in all domains: the one that it has in the first of them."""
    spelling: dict[str, str] = {}
    other: dict[str, str] = {}
    merged: Tree = {}
    for domain, classes in tree.items():
        merged[domain] = {}
        for key, name in by_key(domain, classes, {}).items():
            first = spelling.setdefault(key, name)
            merged[domain][first] = classes[name]
            if first != name:
                other.setdefault(name, f"{name!r} ({domain}) = {first!r}")
    if other:
        notes.append(f"note     class folders spelt in two ways are one class each: {some(other.values())}")
    return merged


def match(tree: Tree, expected: Sequence[str], title: str, notes: list[str],
          aliases: Mapping[str, Mapping[str, str]]) -> Tree:
    """The tree under the benchmark's class names; other folders are left out, with a line.

    aliases: {domain: {folder: class}}. ValueError names the classes of each domain that have no folder.
    """
    keys = {folder_key(name): name for name in expected}
    renamed: Tree = {}
    problems: dict[str, list[str]] = {}  # sentence: domains
    for domain, classes in tree.items():
        other = {folder_key(folder): folder_key(name) for folder, name in aliases.get(domain, {}).items()}
        found = by_key(domain, classes, {key: name for key, name in other.items() if key not in keys})
        missing = sorted(name for key, name in keys.items() if key not in found)
        strange = some(sorted(name for key, name in found.items() if key not in keys), LISTED)
        if missing:
            sentence = (f"no folder for {some(missing, LISTED)}; folders that are no class: "
                        f"{strange or 'none'}")
            problems.setdefault(sentence, []).append(domain)
        elif strange:
            notes.append(f"note     {domain}: folders that are no class of {title} are not used: {strange}")
        renamed[domain] = {name: classes[found[key]] for key, name in keys.items() if key in found}
    if problems:
        told = [f"{title}, domain {', '.join(domains)}: {sentence}" for sentence, domains in problems.items()]
        raise ValueError(". ".join(told) + ("" if all(renamed.values()) else f"; {DEEP}"))
    return renamed


def only_listed(tree: Tree, root: str, lists: str) -> Tree:
    """The tree without images that `<lists>/<domain>_{train,test}.txt` do not name (the cleaned DomainNet).

    Raises FileNotFoundError for a missing list, ValueError for a line other than
    `<domain>/<class>/<image> <number>` and for listed images that are not there.
    """
    kept: Tree = {}
    for domain, classes in tree.items():
        wanted: set[str] = set()
        for file in (Path(lists, f"{domain}_{part}.txt") for part in ("train", "test")):
            if not file.is_file():
                raise FileNotFoundError(f"--file-lists {lists}: no {file.name}; expected it of every domain")
            for number, line in enumerate(read_text(file).splitlines(), start=1):
                name, _, label = line.rpartition(" ")
                if line and not (label.isdigit() and name.startswith(f"{domain}/")):
                    raise ValueError(f"{file}, line {number}: {line[:80]!r}; expected "
                                     f"{domain}/<class>/<image> <number>")
                if line:
                    wanted.add(os.path.join(root, *name.split("/")))
        if absent := below(root, wanted.difference(*classes.values())):
            raise ValueError(f"--file-lists {lists}: {len(absent)} listed images of {domain} are not in "
                             f"{root}: {some(absent, 3)}")
        listed = {name: [path for path in paths if path in wanted] for name, paths in classes.items()}
        kept[domain] = {name: paths for name, paths in listed.items() if paths}
    return kept
