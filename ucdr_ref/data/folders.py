"""Folders as they come out of archives -> {domain: {class: paths}}, with a note for whatever is not used.

Links are followed, hidden names and the folders of runs passed over, and the order is that of the names.
"""
from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

Tree = dict[str, dict[str, list[str]]]  # domain -> class -> sorted paths
File = tuple[str, int, int, int]  # path below a folder, size, times of modification and of change in ns
ENDINGS = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".webp", ".avif", ".gif", ".bmp",
                     ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico"))
AUGMENTED = "tx_000000000000"  # Sketchy's unchanged images, beside folders of shifted and scaled copies
DEEP = "did the archive unpack one level too deep?"
OWN = "images of your own need --dataset folder"


def walk(root: str, runs: list[str]) -> Iterator[tuple[str, list[str], list[str], list[str]]]:
    """(folder, names of the folders in it, paths of images, of other files) for `root` and all below it.

    Folders of this package's runs, whose pictures are no data, go to `runs`. ValueError for a folder that
    cannot be listed, and for a link back to a folder in which it lies.
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
            status = os.stat(path)
            name = os.path.relpath(path, root)
            found.append((name, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    if not found:
        raise ValueError(f"{root}: no images below this folder{formats(others)}")
    note(notes, runs, "folders of runs are not used")
    return sorted(found)


def scan(root: str, domains: Mapping[str, Sequence[str]], notes: list[str]) -> Tree:
    """Sorted images of `<root>/<domain>/<class>/*`; domains: {domain: folders that may be it}, or empty: all.

    `notes` gets a line for each kind of thing that is not used. ValueError for a missing domain, a named
    domain or a class folder without images, and as `walk`.
    """
    runs, others, empty, no_domain = list[str](), list[str](), list[str](), list[str]()
    _, present, elsewhere, _ = next(walk(root, runs))
    tree: Tree = {}
    for domain in domains or present:
        names = domains.get(domain, [domain])
        place = next((path for name in names if os.path.isdir(path := os.path.join(root, name))), "")
        if not place:
            raise ValueError(f"{root}: no domain folder {' or '.join(map(repr, names))}; there are "
                             f"{abbreviate(present) or 'none'}; {DEEP} ({OWN})")
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


def abbreviate(names: Iterable[str], count: int = 8) -> str:
    """The first names of many, and how many more there are."""
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def compare_counts(tree: Tree, published: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Lines of each domain's images beside {version: {domain: images}}; they inform and never refuse."""
    found = {domain: sum(map(len, classes.values())) for domain, classes in tree.items()}
    lines, total = [], sum(found.values())
    for domain, images in [*found.items(), ("total", total)]:
        counts = {name: version[domain] if domain in found else sum(version[each] for each in found)
                  for name, version in published.items()}
        line = f"data     {domain:<14} {images:>7,} images"
        line += f", {len(tree[domain])} classes" if domain in tree else ""
        if same := [name for name, count in counts.items() if count == images]:
            line += f"; as published ({', '.join(same)})"
        elif counts:
            differences = [f"{name} {count:,} ({images - count:+,})" for name, count in counts.items()]
            line += f"; differs from {', '.join(differences)}"
        lines.append(line)
    return lines


def match(tree: Tree, notes: list[str], expected: Sequence[str] = (), title: str = "",
          aliases: Mapping[str, Mapping[str, str]] = {}) -> Tree:  # noqa: B006
    """The tree with one name for a class: the expected one, or the one that it has in its first domain.

    aliases: {domain: {folder: class}}. Folders of no expected class are left out, with a note. ValueError
    names expected classes that have no folder, and two folders of a domain that are one class.
    """
    names = {folder_key(name): name for name in expected}
    other: dict[str, str] = {}  # spelling: sentence
    matched: Tree = {}
    problems = []
    for domain, classes in tree.items():
        also = {folder_key(folder): folder_key(name) for folder, name in aliases.get(domain, {}).items()}
        found: dict[str, str] = {}
        for folder in classes:
            key = folder_key(folder)
            before = found.setdefault(key if key in names else also.get(key, key), folder)
            if before != folder:
                raise ValueError(f"domain {domain}: the folders {before!r} and {folder!r} are one class, as "
                                 "case and punctuation do not tell classes apart; join or rename them")
        if not expected:
            for key, folder in found.items():
                if names.setdefault(key, folder) != folder:
                    other.setdefault(folder, f"{folder!r} ({domain}) = {names[key]!r}")
        missing = abbreviate(sorted(name for key, name in names.items() if key not in found), 100)
        strange = abbreviate(sorted(folder for key, folder in found.items() if key not in names), 100)
        if expected and missing:
            problems.append(f"{title}, domain {domain}: no folder for {missing}; folders that are no class: "
                            f"{strange or 'none'}")
        elif strange:
            notes.append(f"note     {domain}: folders that are no class of {title} are not used: {strange}")
        matched[domain] = {name: classes[found[key]] for key, name in names.items() if key in found}
    if problems:
        raise ValueError(". ".join(problems) + ("" if all(matched.values()) else f"; {DEEP} ({OWN})"))
    if other:
        notes.append("note     class folders spelt in two ways are one class each: "
                     f"{abbreviate(other.values())}")
    return matched
