"""Folders as they come out of archives -> {domain: {class: paths}}, with a note for whatever is not used.

Links are followed, hidden names and folders of runs passed over; the order is that of the names.
"""
from __future__ import annotations

import os
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

Tree = dict[str, dict[str, list[str]]]  # domain -> class -> sorted paths
File = tuple[str, int, int, int]  # path below a folder, size, times of modification and of change in ns
ENDINGS = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".webp", ".avif", ".gif", ".bmp",
                     ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico"))
AUGMENTED = "tx_000000000000"  # Sketchy's unchanged images, beside folders of shifted and scaled copies
ADVICE = "did the archive unpack one level too deep? images of your own need --dataset folder"


def walk(root: str, runs: list[str]) -> Iterator[tuple[str, list[str], list[str], list[str]]]:
    """(folder, names of folders in it, paths of images, of other files) for `root` and all folders below it.

    Folders of runs, whose pictures are no data, go to `runs`. ValueError for a folder that cannot be listed,
    and for a link back to a folder in which it lies.
    """
    def fail(error: OSError) -> None:
        raise ValueError(f"{error.filename!r}: cannot list this folder ({error.strerror})") from error

    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        found = [Path(folder, name) for name in sorted(folders) if not name.startswith(".")]
        folders.clear()  # what stays in this list is walked through
        for path in found:
            if path.is_symlink() and any(path.samefile(parent) for parent in path.absolute().parents):
                raise ValueError(f"{path}: this link leads back to a folder in which it lies; remove it")
            if (path / "config.json").is_file() and (path / "run.json").is_file():
                runs.append(str(path))
            else:
                folders.append(path.name)
        paths = [os.path.join(folder, name) for name in sorted(files) if not name.startswith(".")]
        images = [path for path in paths if ending(path) in ENDINGS]
        yield folder, folders, images, [path for path in paths if ending(path) not in ENDINGS]


def ending(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def list_images(root: str, notes: list[str]) -> list[File]:
    """Each file below `root` with one of ENDINGS, sorted by path. `notes` gets a line about runs in it.

    ValueError for a folder without images, and as `walk`.
    """
    found, others, runs = list[File](), list[str](), list[str]()
    for _, _, images, more in walk(root, runs):
        others += more
        for path in filter(os.path.isfile, images):
            info = os.stat(path)
            found.append((os.path.relpath(path, root), info.st_size, info.st_mtime_ns, info.st_ctime_ns))
    if not found:
        raise ValueError(f"{root}: no images below this folder{formats(others)}")
    note(notes, runs, "folders of runs are not used")
    return sorted(found)


def scan(root: str, domains: Mapping[str, Sequence[str]], notes: list[str]) -> Tree:
    """Sorted images of `<root>/<domain>/<class>/*`; domains: {domain: folders that may be it}, or empty: all.

    `notes` gets a line for each kind of thing that is not used. ValueError for a domain or a class folder
    without images, and as `walk`.
    """
    runs, others, empty = list[str](), list[str](), list[str]()
    _, present, elsewhere, _ = next(walk(root, runs))
    tree: Tree = {}
    for domain in domains or present:
        places = [os.path.join(root, name) for name in domains.get(domain, [domain])]
        place = next(filter(os.path.isdir, places), None)
        if place is None:
            continue
        if os.path.isdir(unchanged := os.path.join(place, AUGMENTED)):
            copies = sorted({*os.listdir(place)} - {AUGMENTED})
            notes.append(f"note     {domain}: only {AUGMENTED} is used, not {abbreviate(copies) or 'copies'}")
            place = unchanged
        classes, bare = {}, []
        for folder, _, images, more in walk(place, runs):
            name = os.path.relpath(folder, place)
            if name == "." or os.sep in name:
                elsewhere += images
            elif images:
                classes[name] = images
            else:
                bare.append(folder)
            others += more
        if classes:
            tree[domain] = classes
            empty += bare
    absent = [" or ".join(names) for domain, names in domains.items() if domain not in tree]
    if absent or not tree:
        where = abbreviate(absent) or "<domain>"
        raise ValueError(f"{root}: no images in {where}/<class>/*{formats(others)}; there are the folders "
                         f"{abbreviate(present) or 'none'}; {ADVICE}")
    if empty:
        raise ValueError(f"{len(empty)} class folders without images, such as {empty[0]}{formats(others)}; "
                         "fill or remove them")
    note(notes, [*elsewhere, *others], "files are no images at <domain>/<class>/<image> and are not used")
    note(notes, runs, "folders of runs are not used")
    return tree


def note(notes: list[str], found: Sequence[str], what: str) -> None:
    if found:
        notes.append(f"note     {len(found)} {what}, such as {min(found)}")


def formats(paths: Iterable[str]) -> str:
    endings = sorted({ending(path) for path in paths} - {""})
    return f" (no readable format: {abbreviate(endings)})" if endings else ""


def folder_key(name: str) -> str:
    """A name for comparison: case, spaces, punctuation and the writing of accents (NFC) do not matter.

    `t-shirt`, `t_shirt` and `T shirt` are one class. A name of punctuation alone stands for itself.
    """
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
    kinds = [unicodedata.category(letter) for letter in folded]  # Cs: a byte that is not UTF-8
    words = "".join(" " if kind[0] in "PSZC" and kind != "Cs" else letter
                    for letter, kind in zip(folded, kinds)).split()
    return "_".join(words) or folded


def named_like(names: Iterable[str], others: Collection[str]) -> list[str]:
    """Those of `names` that are one of `others` by `folder_key`."""
    keys = set(map(folder_key, others))
    return [name for name in names if folder_key(name) in keys]


def abbreviate(names: Iterable[str], count: int = 8) -> str:
    """The first names of many, and how many more there are."""
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def compare_counts(tree: Tree, published: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Lines of each domain's images beside {version: {domain: images}}; never an error."""
    found = {domain: sum(map(len, classes.values())) for domain, classes in tree.items()}
    lines = []
    for domain, images in [*found.items(), ("total", sum(found.values()))]:
        classes = f", {len(tree[domain])} classes" if domain in tree else ""
        beside = ""
        for name, version in published.items():
            count = version.get(domain, sum(version.values()))
            equal = count == images
            beside += f"; as published ({name})" if equal else f"; {name} {count:,} ({images - count:+,})"
        lines.append(f"data     {domain:<14} {images:>7,} images{classes}{beside}")
    return lines


def match(tree: Tree, notes: list[str], expected: Sequence[str] = (),
          aliases: Mapping[str, Mapping[str, str]] = {}) -> Tree:  # noqa: B006
    """The tree with one name for a class: the expected one, or the one that it has in its first domain.

    aliases: {domain: {folder: class}}. Folders of no expected class are left out, with a note. ValueError for
    an expected class without a folder, and for two folders of a domain that are one class.
    """
    names: dict[str, str] = {}
    for name in expected or [folder for classes in tree.values() for folder in classes]:
        names.setdefault(folder_key(name), name)
    matched, spelt = {}, list[str]()
    for domain, classes in tree.items():
        found: dict[str, str] = {}
        for folder in classes:
            key = folder_key(aliases.get(domain, {}).get(folder, folder))
            if key in found:
                raise ValueError(f"domain {domain}: the folders {found[key]!r} and {folder!r} are one class, "
                                 "whatever case and punctuation; join or rename them")
            found[key] = folder
            if not expected and folder != names[key]:
                spelt.append(f"{folder!r} ({domain}) = {names[key]!r}")
        strange = abbreviate(sorted(found[key] for key in found.keys() - names.keys()), 100)
        if missing := sorted(names[key] for key in names.keys() - found.keys() if expected):
            raise ValueError(f"domain {domain}: no folder for {abbreviate(missing, 100)}; folders of no "
                             f"class: {strange or 'none'}; {ADVICE}")
        if strange:
            notes.append(f"note     {domain}: folders of no class are not used: {strange}")
        matched[domain] = {name: classes[found[key]] for key, name in names.items() if key in found}
    if spelt:
        notes.append(f"note     class folders spelt in two ways are one class each: {abbreviate(spelt)}")
    return matched
