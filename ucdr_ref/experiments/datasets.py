"""The benchmarks: a table with one row per dataset, and the names by which folders are told to be classes."""
from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

HERE = Path(__file__).parent
AUGMENTED = "tx_000000000000"  # Sketchy's unchanged images, beside folders of shifted and scaled copies


@dataclass(frozen=True)
class Dataset:
    """A benchmark: its folders, its classes, and the numbers of images that it was published with."""

    title: str
    domains: dict[str, tuple[str, ...]]  # domain: folders below the root that may be it, the first is taken
    gallery: str
    seen: tuple[str, ...]  # domain of the validation queries: the first that is not held out
    lists: tuple[str, str, str]  # of `splits/`: train, without what stands in the others, val, test
    metric: str = "mAP@200"  # as published, and by which epochs are chosen (D5)
    aliases: dict[str, str] = field(default_factory=dict)  # domain: list of `aliases/`
    versions: dict[str, dict[str, int]] = field(default_factory=dict)  # version: images of each domain

    def splits(self) -> dict[str, list[str]]:
        """train, val and test classes, in the order of the lists."""
        train, val, test = map(class_list, self.lists)
        others = {*val, *test}
        return {"train": [name for name in train if name not in others], "val": val, "test": test}


def class_list(name: str) -> list[str]:
    """A class list of `splits/`, one name a line."""
    return (HERE / "splits" / f"{name}.txt").read_text(encoding="utf-8").split()


def alias_list(name: str) -> dict[str, str]:
    """A list of `aliases/`: {folder name as in the archive: class name}."""
    lines = (HERE / "aliases" / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t") for line in lines)


def folder_key(name: str) -> str:
    """A class name for comparison: case, spaces, punctuation and the writing of accents (NFC) do not matter.

    `t-shirt`, `t_shirt` and `T shirt` are one class. A name of punctuation alone stands for itself.
    """
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
    words = "".join(" " if unicodedata.category(letter)[0] in "PSZC" else letter for letter in folded).split()
    return "_".join(words) or folded


def some(names: Iterable[str], count: int = 8) -> str:
    """The first names of many, and how many more there are."""
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def compared(found: Mapping[str, tuple[int, int]], dataset: Dataset | None) -> list[str]:
    """A line per domain: its (images, classes) beside the published counts, which inform and never refuse."""
    versions = {name: {**counts, "total": sum(counts[domain] for domain in found)}
                for name, counts in (dataset.versions if dataset else {}).items()}
    total = sum(images for images, _ in found.values())
    lines = []
    for domain, (images, classes) in [*found.items(), ("total", (total, 0))]:
        published = {name: counts[domain] for name, counts in versions.items()}
        line = f"data     {domain:<14} {images:>7,} images" + (f", {classes} classes" if classes else "")
        if same := [name for name, count in published.items() if count == images]:
            line += f"; as published ({', '.join(same)})"
        elif published:
            differences = [f"{name} {count:,} ({images - count:+,})" for name, count in published.items()]
            line += f"; differs from {', '.join(differences)}"
        lines.append(line)
    return lines


# Images: DomainNet's own pages; Sketchy and TU-Berlin: what the downloads hold, and what papers write.
SKETCHY = Dataset(
    "Sketchy",
    {"sketch": ("sketch", "256x256/sketch"),
     "extended_photo": ("extended_photo", "EXTEND_image_sketchy", "256x256/extended_photo",
                        "256x256/EXTEND_image_sketchy")},
    "extended_photo", ("sketch",), ("sketchy-all", "sketchy-val-eccv", "sketchy-test-eccv"),
    versions={"download": dict(sketch=75481, extended_photo=73002),
              "papers": dict(sketch=75471, extended_photo=73002)})
DATASETS = {
    "domainnet": Dataset(
        "DomainNet",
        {name: (name,) for name in ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")},
        "real", ("painting", "infograph"), ("domainnet-train", "domainnet-val", "domainnet-test"),
        versions={"original": dict(clipart=48837, infograph=53201, painting=75759, quickdraw=172500,
                                   real=175327, sketch=70386),
                  "cleaned": dict(clipart=48129, infograph=51605, painting=72266, quickdraw=172500,
                                  real=172947, sketch=69128)}),
    "sketchy/eccv": SKETCHY,
    "sketchy/random": replace(
        SKETCHY, lists=("sketchy-all", "sketchy-val-random", "sketchy-test-random"), metric="mAP@all"),
    "tuberlin": Dataset(
        "TU-Berlin", {"sketches": ("sketches", "png"), "images": ("images", "ImageResized")},
        "images", ("sketches",), ("tuberlin-train", "tuberlin-val", "tuberlin-test"), "mAP@all",
        aliases={"sketches": "tuberlin-sketches", "images": "tuberlin-images"},
        versions={"download": dict(sketches=20000, images=204070),
                  "papers": dict(sketches=20000, images=204489)}),
}
