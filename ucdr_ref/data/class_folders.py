"""Folders of SRE-CLIP's sources and target, `<root>/<class>/*`: the class of each image, batches of them."""
import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..distributed import derive_seed
from .folders import File, abbreviate, folder_key, list_images


@dataclass(frozen=True)
class ClassFolder:
    """Images of `<root>/<class>/*`, sorted by path."""

    root: str
    files: list[File]
    labels: list[int]  # class indices
    skipped: list[str]  # folders of other classes than wanted


def scan_class_folder(flag: str, root: str, names: Sequence[str], ids: Sequence[str],
                      only: Collection[int] | None = None) -> ClassFolder:
    """Lists `<root>/<class>/*` (AwA2: `<root>/JPEGImages/<class>/*`) without opening an image.

    names, ids: of the c classes, ids being WordNet's. A folder bears a class's name or id or both (I2AwA:
    `antelope-n02419796`); a name that several classes share identifies none. only: class indices; other
    folders are left out. ValueError for a folder without images of wanted classes and, without `only`,
    folders of no class.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{flag} {root}: no such folder; expected <folder>/<class>/<image>")
    if os.path.isdir(inner := os.path.join(root, "JPEGImages")):
        root = inner
    keys = [folder_key(name) for name in names]
    count = Counter(keys)
    known = {key: k for k, key in enumerate(keys) if count[key] == 1} | {ids[k]: k for k in range(len(names))}

    def class_of(folder: str) -> int:
        name, _, synset = folder.rpartition("-")
        both = (synset, folder_key(name)) if synset[:1] == "n" and synset[1:].isdigit() else ()
        return next((known[key] for key in (folder_key(folder), *both) if key in known), -1)

    files = list_images(root)
    folders = [path.split(os.sep)[0] for path, *_ in files]
    classes = {folder: class_of(folder) for folder in sorted(set(folders))}
    wanted = range(len(names)) if only is None else only
    skipped = [folder for folder, k in classes.items() if k not in wanted]
    if skipped and (only is None or len(skipped) == len(classes)):
        raise ValueError(f"{flag} {root}: expected <folder>/<class>/<image>, a folder named after one of the "
                         f"{len(wanted)} classes; there are {abbreviate(skipped)}")
    used = [(file, classes[folder]) for file, folder in zip(files, folders) if classes[folder] in wanted]
    return ClassFolder(root, [file for file, _ in used], [label for _, label in used], skipped)


@lru_cache(maxsize=8)
def shuffled(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def draw_batch(n: int, b: int, iteration: int, *seed: object) -> list[int]:
    """min(b, n) of n images, a function of iteration and seed: whole batches of shuffled passes.

    What a pass leaves over is another part of the images in every pass.
    """
    b = min(b, n)
    turn, batch = divmod(iteration, n // b)
    return shuffled(n, derive_seed(*seed, turn))[batch * b:(batch + 1) * b].tolist()
