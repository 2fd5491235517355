"""Folders as they come out of archives -> {domain: {class: paths}}, with a note for whatever is not used.

Links are followed, hidden names and folders of runs passed over; the order is that of the names.
"""
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


def walk(root: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """(folder, paths of images, of other files) for `root` and all folders below it, but for those of runs.

    OSError for a folder that cannot be listed, ValueError for a link back to a folder in which it lies.
    """
    def fail(error: OSError) -> None:
        raise error

    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        if "run.json" in files:
            folders.clear()  # what stays in this list is walked through
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(folder, name) for name in folders):
            if path.is_symlink() and any(path.samefile(parent) for parent in path.absolute().parents):
                raise ValueError(f"{path}: this link leads back to a folder in which it lies; remove it")
        paths = [os.path.join(folder, name) for name in sorted(files) if not name.startswith(".")]
        images = [path for path in paths if ending(path) in ENDINGS]
        yield folder, images, [path for path in paths if ending(path) not in ENDINGS]


def ending(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def list_images(root: str) -> list[File]:
    """Each image below `root`, sorted by path. Raises as `walk`, ValueError where there is none."""
    found, others = list[File](), list[str]()
    for _, images, more in walk(root):
        others += more
        for path in filter(os.path.isfile, images):
            info = os.stat(path)
            found.append((os.path.relpath(path, root), info.st_size, info.st_mtime_ns, info.st_ctime_ns))
    if not found:
        raise ValueError(f"{root}: no images below this folder{formats(others)}")
    return sorted(found)


def scan(root: str, domains: Mapping[str, Sequence[str]], notes: list[str]) -> Tree:
    """Sorted images of `<root>/<domain>/<class>/*`; domains: {domain: folders that may be it}, or empty: all.

    `notes` gets a line for each kind of thing that is not used. ValueError for a domain or a class folder
    without images, and as `walk`.
    """
    present = sorted(path.name for path in Path(root).iterdir() if path.is_dir() and path.name[0] != ".")
    tree: Tree = {}
    unused, others, empty = list[str](), list[str](), list[str]()
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
        for folder, images, more in walk(place):
            name = os.path.relpath(folder, place)
            if name == "." or os.sep in name:
                unused += images
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
                         "move images in subfolders up, and empty folders away")
    if unused := unused + others:
        notes.append(f"note     {len(unused)} files are no images at <domain>/<class>/<image> and are not "
                     f"used, such as {min(unused)}")
    return tree


def formats(paths: Iterable[str]) -> str:
    endings = sorted({ending(path) for path in paths} - {""})
    return f" (no readable format: {abbreviate(endings)})" if endings else ""


def folder_key(name: str) -> str:
    """A name for comparison: case, spaces, punctuation and the writing of accents (NFC) do not matter.

    `t-shirt`, `t_shirt` and `T shirt` are one class. A name of punctuation alone stands for itself.
    """
    folded = unicodedata.normalize("NFC", name.casefold())
    kept = ("L", "M", "N", "Cs")  # letters, marks, numbers, bytes that are not UTF-8
    words = "".join(letter if unicodedata.category(letter).startswith(kept) else " " for letter in folded)
    return "_".join(words.split()) or folded


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
        line = f"data     {domain:<14} {images:>7,} images"
        if domain in tree:
            line += f", {len(tree[domain])} classes"
        for name, version in published.items():
            count = version.get(domain, sum(version.values()))
            equal = count == images
            line += f"; as published ({name})" if equal else f"; {name} {count:,} ({images - count:+,})"
        lines.append(line)
    return lines


def match(tree: Tree, notes: list[str], expected: Sequence[str],
          aliases: Mapping[str, Mapping[str, str]]) -> Tree:
    """The tree with one name for a class: the expected one, or without any the one in its first domain.

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
        strange = abbreviate([folder for key, folder in found.items() if key not in names], 100)
        if expected and names.keys() - found.keys():
            missing = sorted(name for key, name in names.items() if key not in found)
            raise ValueError(f"domain {domain}: no folder for {abbreviate(missing, 100)}; folders of no "
                             f"class: {strange or 'none'}; {ADVICE}")
        if strange:
            notes.append(f"note     {domain}: folders of no class are not used: {strange}")
        matched[domain] = {name: classes[found[key]] for key, name in names.items() if key in found}
    if spelt:
        notes.append(f"note     class folders spelt in two ways are one class each: {abbreviate(spelt)}")
    return matched
