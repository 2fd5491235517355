"""Folders as they come out of archives -> {domain: {class: paths}}, with a note for whatever is not used.

Links are followed, hidden names and the folders of runs passed over, and the order is that of the names.
"""
from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

Tree = dict[str, dict[str, list[str]]]  # domain -> class -> sorted paths
File = tuple[str, int, int, int]  # path below a folder, size, times of modification and of change in ns
ENDINGS = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".apng", ".webp", ".avif", ".gif",
                     ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico"))
AUGMENTED = "tx_000000000000"  # Sketchy's unchanged images, beside folders of shifted and scaled copies
DEEP = "did the archive unpack one level too deep?"


def walk(root: str, runs: list[str]) -> Iterator[tuple[str, list[str], list[str], list[str]]]:
    """(folder, names of the folders in it, paths of images, of other files) for `root` and all below it.

    Folders of this package's runs, whose pictures are no data, go to `runs`. ValueError for a folder that
    cannot be listed, and for a link back to a folder in which it lies.
    """
    def fail(error: OSError) -> None:
        raise ValueError(f"{error.filename}: cannot be listed ({error.strerror})") from error

    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        found = [name for name in sorted(folders) if not name.startswith(".")]
        folders.clear()  # what stays in this list is walked through
        for name in found:
            path = Path(folder, name)
            above = path.absolute().parents
            if path.is_symlink() and any(path.samefile(parent) for parent in above):
                raise ValueError(f"{path}: this link leads back to a folder in which it lies; remove it")
            is_run = (path / "config.json").is_file() and (path / "run.json").is_file()
            if is_run:
                runs.append(str(path))
            else:
                folders.append(name)
        paths = [os.path.join(folder, name) for name in sorted(files) if not name.startswith(".")]
        images = [path for path in paths if ending(path) in ENDINGS]
        yield folder, folders, images, [path for path in paths if ending(path) not in ENDINGS]


def ending(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def list_images(root: str, notes: list[str]) -> list[File]:
    """Each file below `root` with one of ENDINGS, sorted by path. `notes` gets a line about runs in it.

    Raises FileNotFoundError for a missing folder, ValueError for one without images, and as `walk`.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root}: no such folder; give a folder of images")
    found, others, runs = [], list[str](), list[str]()
    for _, _, images, more in walk(root, runs):
        others += more
        for path in images:
            try:
                status = os.stat(path)
            except OSError:  # a link to nowhere, or removed a moment ago
                continue
            if stat.S_ISREG(status.st_mode):
                name = os.path.relpath(path, root)
                found.append((name, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    if not found:
        raise ValueError(f"{root}: no images below this folder{formats(others)}")
    note(notes, runs, "folders of runs are not used")
    return sorted(found)


def scan(root: str, domains: Mapping[str, Sequence[str]], notes: list[str]) -> Tree:
    """Sorted images of `<root>/<domain>/<class>/*`; domains: {domain: folders that may be it}, or empty: all.

    `notes` gets a line for each kind of thing that is not used. Raises FileNotFoundError for a missing root
    or domain, ValueError for a named domain or a class folder without images, and as `walk`.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"--data-root {root or '(empty)'}: no such folder; "
                                "expected <domain>/<class>/* in it")
    runs, others, empty, no_domain = list[str](), list[str](), list[str](), list[str]()
    _, present, elsewhere, _ = next(walk(root, runs))
    tree: Tree = {}
    for domain in domains or present:
        names = domains.get(domain, [domain])
        place = next((path for name in names if os.path.isdir(path := os.path.join(root, name))), "")
        if not place:
            raise FileNotFoundError(f"{root}: no domain folder {' or '.join(map(repr, names))}; there are "
                                    f"{abbreviate(present) or 'none'}; {DEEP}")
        if os.path.isdir(unchanged := os.path.join(place, AUGMENTED)):
            if copies := sorted({*os.listdir(place)} - {AUGMENTED}):
                notes.append(f"note     {domain}: only {AUGMENTED} is used, not {abbreviate(copies)}")
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
        else:
            no_domain.append(domain)
    if not tree or domains and no_domain:
        where = abbreviate(no_domain if domains else ["<domain>"])
        raise ValueError(f"{root}: found no images in {where}/<class>/*{formats(others)}; {DEEP}")
    if empty:
        raise ValueError(f"{len(empty)} class folders without images, such as {empty[0]}{formats(others)}; "
                         "fill or remove them")
    note(notes, elsewhere, "images lie elsewhere than at <domain>/<class>/<image> and are not used")
    note(notes, others, "files have unknown endings and are not used")
    note(notes, no_domain, "folders hold no class folder with images and are no domains")
    note(notes, runs, "folders of runs are not used")
    return tree


def note(notes: list[str], found: Sequence[str], what: str) -> None:
    if found:
        notes.append(f"note     {len(found)} {what}, such as {min(found)}")


def formats(paths: Iterable[str]) -> str:
    """A remark about files of which none can be read as an image."""
    endings = sorted({ending(path) for path in paths} - {""})
    return f" (no readable format: {abbreviate(endings)})" if endings else ""


def folder_key(name: str) -> str:
    """A name for comparison: case, spaces, punctuation and the writing of accents (NFC) do not matter.

    `t-shirt`, `t_shirt` and `T shirt` are one class. A name of punctuation alone stands for itself; so do
    bytes that are not UTF-8.
    """
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
    kinds = (unicodedata.category(letter) for letter in folded)
    words = "".join(" " if kind[0] in "PSZC" and kind != "Cs" else letter
                    for letter, kind in zip(folded, kinds)).split()
    return "_".join(words) or folded


def abbreviate(names: Iterable[str], count: int = 8) -> str:
    """The first names of many, and how many more there are."""
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def compare_counts(found: Mapping[str, tuple[int, int]],
                   published: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A line per domain: its (images, classes) beside published counts, which inform and never refuse.

    published: {version: {domain: images}}.
    """
    total = sum(images for images, _ in found.values())
    versions = {name: {**counts, "total": sum(counts[domain] for domain in found)}
                for name, counts in published.items()}
    lines = []
    for domain, (images, classes) in [*found.items(), ("total", (total, 0))]:
        line = f"data     {domain:<14} {images:>7,} images" + (f", {classes} classes" if classes else "")
        counts = {name: version[domain] for name, version in versions.items()}
        if same := [name for name, count in counts.items() if count == images]:
            line += f"; as published ({', '.join(same)})"
        elif counts:
            differences = [f"{name} {count:,} ({images - count:+,})" for name, count in counts.items()]
            line += f"; differs from {', '.join(differences)}"
        lines.append(line)
    return lines


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
    merged: Tree = {domain: {} for domain in tree}
    for domain, classes in tree.items():
        for key, name in by_key(domain, classes, {}).items():
            first = spelling.setdefault(key, name)
            merged[domain][first] = classes[name]
            if first != name:
                other.setdefault(name, f"{name!r} ({domain}) = {first!r}")
    if other:
        notes.append("note     class folders spelt in two ways are one class each: "
                     f"{abbreviate(other.values())}")
    return merged


def match(tree: Tree, expected: Sequence[str], title: str, notes: list[str],
          aliases: Mapping[str, Mapping[str, str]]) -> Tree:
    """The tree under the benchmark's class names; other folders are left out, with a note.

    aliases: {domain: {folder: class}}. ValueError names the classes of each domain that have no folder.
    """
    keys = {folder_key(name): name for name in expected}
    renamed: Tree = {}
    problems = []
    for domain, classes in tree.items():
        other = {folder_key(folder): folder_key(name) for folder, name in aliases.get(domain, {}).items()}
        found = by_key(domain, classes, {key: name for key, name in other.items() if key not in keys})
        missing = sorted(name for key, name in keys.items() if key not in found)
        strange = abbreviate(sorted(name for key, name in found.items() if key not in keys), 100)
        if missing:
            problems.append(f"{title}, domain {domain}: no folder for {abbreviate(missing, 100)}; folders "
                            f"that are no class: {strange or 'none'}")
        elif strange:
            notes.append(f"note     {domain}: folders that are no class of {title} are not used: {strange}")
        renamed[domain] = {name: classes[found[key]] for key, name in keys.items() if key in found}
    if problems:
        raise ValueError(". ".join(problems) + ("" if all(renamed.values()) else f"; {DEEP}"))
    return renamed
