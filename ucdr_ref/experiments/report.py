"""What an evaluation leaves: a table, results.json, per_class.csv, a contact sheet and report.html."""
from __future__ import annotations

import base64
import csv
import io
import json
import math
import os
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from ..cli import as_value_error, write_atomic, write_text_atomic
from ..clip.weights import OPENAI_SHA256, file_digest
from ..config import Config
from ..data.folders import folder_key
from ..data.images import open_image
from ..metrics import class_means, search

SOFTWARE = "ucdr_ref"
FRAMES = {True: "green", False: "red", None: "grey"}  # hit, miss, unknown
# A tick and a cross, for readers who cannot tell green from red.
MARKS = {True: [(3, 8), (6, 11), (12, 4)], False: [(4, 4), (11, 11), (8, 8), (11, 4), (4, 11)]}
SIZE, FRAME, GAP, LINE, MARK = 96, 4, 6, 14, 15  # pixels: thumbnail, its frame, space, text, mark
SHOWN, HITS, POINTS = 8, 8, 400  # queries and hits of an evaluation's sheet, points of a curve
UCDR = ("All in %. UCDR: queries of a domain and classes that training never saw; UdCDR (U^dCDR): of an "
        "unseen domain and seen classes; UcCDR: the reverse; centred: queries and gallery have each lost "
        "their own mean, which takes unlabelled queries of many classes (transductive).")
SRE = ("All in %. ZSL: images of unseen classes, told apart among these; unseen, seen: images of such "
       "classes, among all; H: the harmonic mean of the two.")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: auto; padding: 12px }
h1 { font-size: 20px; overflow-wrap: break-word } figure { display: inline-block; margin: 0 16px 16px 0 }
svg { display: block; border: solid #999; border-width: 0 0 1px 1px; overflow: visible }
div { overflow: auto }
td, th { text-align: left; white-space: nowrap; padding-right: 14px }
i { display: inline-block; height: 10px; margin-right: 6px; background: #0072b2 }
"""
CENTER_CLASSES = 5  # of queries, for a centred row: the mean of one class is that class
METRICS = ("mAP@200", "Prec@200", "mAP@all", "Prec@100")
# As published (ViT-B/32), by dataset, protocol and gallery.
PUBLISHED = {
    ("domainnet", "UCDR", "unseen"):
        "mean of 5 query domains: CLIP mAP@200 44.35 Prec@200 38.40, ProS 60.52 56.26, UCDR-Adapter 60.71 "
        "56.55; query sketch: UCDR-Adapter mAP@200 65.91",
    ("domainnet", "UCDR", "mixed"):
        "mean of 5 query domains: ProS mAP@200 55.46 Prec@200 51.95, UCDR-Adapter 56.60 53.11",
    ("domainnet", "UdCDR", "seen"): "mean of 5 query domains: ProS mAP@200 63.32, UCDR-Adapter 63.70",
    ("sketchy", "UcCDR", "unseen"): "ProS mAP@200 69.91, UCDR-Adapter 72.85",
    ("tuberlin", "UcCDR", "unseen"): "ProS mAP@all 66.75, UCDR-Adapter 65.81"}
ACCURACIES = {"zsl": "ZSL", "unseen": "unseen", "seen": "seen", "h": "H"}
# Beside the whole AwA2 (50 classes) and OpenAI's weights alone.
PUBLISHED_AWA2 = ["published (I2AwA, instance): unseen 69.7, seen 88.0, H 77.7, an ablation",
                  "line in the released code"]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Shown:
    """An image of a contact sheet (path "": a text). hit: None where unknown; inverted: as encoded (D14)."""

    path: str
    caption: str
    hit: bool | None = None
    inverted: bool = False


Sheet = Sequence[tuple[Shown, Sequence[Shown]]]  # a query, or a class, and the images beside it


def published(config: Config, protocol: str, gallery: str) -> list[str]:
    """The published numbers beside a row; none unless it is of the usual protocol and OpenAI's ViT-B/32."""
    text = PUBLISHED.get((config.dataset, protocol, gallery))
    unusual = config.gallery not in ("", "real", "extended_photo", "images") or (
        protocol == "UdCDR" and config.ud_gallery != "trained")  # D7
    if text is None or unusual or file_digest(config.weights) != OPENAI_SHA256["ViT-B-32.pt"]:
        return []
    return textwrap.wrap(f"published (ViT-B/32): {text}", 80, initial_indent="  ", subsequent_indent="  ")


def retrieval_table(rows: Sequence[dict[str, Any]], config: Config) -> list[str]:
    """The rows as lines of at most 80 columns, in %, the paper's numbers under those they belong to."""
    lines = [f"{'in %':<28}" + "".join(f"{name:>10}" for name in METRICS)]
    tests = itemgetter("protocol", "query_domain", "gallery_name", "queries", "gallery", "no_relevant")
    for (protocol, domain, gallery, q, g, alone), group in groupby(rows, tests):
        lines.append(f"{protocol}: {q} queries ({domain}), {g} images in the {gallery} gallery")
        for row in group:
            lines.append(f"  {row['method']:<26}" + "".join(f"{100 * row[name]:10.2f}" for name in METRICS))
        if alone:
            lines.append(f"  {alone} queries have no relevant image here, and count as 0")
        lines += published(config, protocol, gallery)
    if any(row["k_used"] < row["k"] for row in rows):
        lines.append("@200 of a smaller gallery: all of it")
    if any(row["transductive"] for row in rows):
        lines += ["centred: queries and gallery have each lost their own mean (transductive;",
                  "supposes a query set that is balanced over many classes)"]
    if any(row["query_classes"] < CENTER_CLASSES for row in rows):
        lines.append(f"no centred row for queries of fewer than {CENTER_CLASSES} classes")
    return lines


def classification_table(rows: Sequence[dict[str, Any]], config: Config) -> list[str]:
    """The rows as lines of at most 80 columns, in %."""
    images, classes = rows[0]["images"], rows[0]["classes"]
    lines = [f"{images} target images of {classes} classes",
             f"{'in %':<14}{'mean over':<10}" + "".join(f"{title:>9}" for title in ACCURACIES.values())]
    for row in rows:
        for average, things in (("instance", "images"), ("class", "classes")):
            found = [row[average][name] for name in ACCURACIES]
            values = "".join(f"{'-':>9}" if value is None else f"{100 * value:9.2f}" for value in found)
            lines.append(f"{row['method']:<14}{things:<10}{values}")
        if "evaluations" in row:
            lines.append(f"  (each metric's maximum over {row['evaluations']} test evaluations, S6)")
    if config.graph == "awa2" and classes == 50 and file_digest(config.weights) in OPENAI_SHA256.values():
        lines += PUBLISHED_AWA2
    return lines


def write_retrieval(rows: Sequence[Row], folder: Path, about: Row) -> None:
    """The files of the rows that `retrieval.rank` returns; pictures and bars are of the first test.

    about: what results.json says beside the rows: `run`, `config`, `table` as it is printed, ...
    """
    test = ["protocol", "query_domain", "gallery_name"]
    per_class: list[list[Any]] = [[*test, "method", "class", "queries", "mAP@200", "mAP@all"]]
    shown = []
    for row in rows:
        details = row["details"]
        metrics, counts = details["metrics"], Counter(details["queries"].classes)
        for k, score in sorted(metrics["per_class"].items()):
            name = details["names"][k]
            per_class.append([*(row[key] for key in test), row["method"], name, counts[name], score,
                              metrics["per_class@all"][k]])
        if not row["transductive"] and all(row[key] == rows[0][key] for key in test):
            shown.append(examples(row, about["config"]["stroke_domains"]))
    write_files(rows, folder, about, UCDR, per_class, [line for lines in zip(*shown) for line in lines])


def examples(row: Row, stroke_domains: Sequence[str]) -> Sheet:
    """Queries of different classes, each with its nearest images and their distances."""
    details, strokes = row["details"], set(map(folder_key, stroke_domains))
    queries, gallery = details["queries"], details["gallery"]
    one_each = [queries.classes.index(name) for name in dict.fromkeys(queries.classes)]
    chosen, lines = one_each[::math.ceil(len(one_each) / SHOWN)], []
    found = search(details["query_features"][chosen], details["gallery_features"], HITS)
    for i, distances, nearest in zip(chosen, *(part.tolist() for part in found)):
        hits = [Shown(gallery.paths[j], f"{distance:.3f}", gallery.classes[j] == queries.classes[i],
                      folder_key(gallery.domains[j]) in strokes) for j, distance in zip(nearest, distances)]
        inverted = folder_key(queries.domains[i]) in strokes
        lines.append((Shown(queries.paths[i], row["method"], None, inverted), hits))
    return lines


def write_classification(rows: Sequence[Row], folder: Path, about: Row) -> None:
    """The same for `classification.evaluate`; queries.png shows what the last method makes of a few classes.

    A row's `details`: `paths`, `labels` and `predicted` of the images, the classes' `names`, `unseen` ids.
    """
    per_class: list[list[Any]] = [["method", "class", "split", "images", "accuracy", "among_unseen"]]
    sheet: list[tuple[Shown, list[Shown]]] = []
    for details, method in ((row["details"], row["method"]) for row in rows if "details" in row):
        names, labels, found = details["names"], details["labels"], details["predicted"][:, 0]
        among_unseen = class_means((details["predicted"][:, 1] == labels).double(), labels)
        sheet = []
        for k, accuracy in sorted(class_means((found == labels).double(), labels).items()):
            images, unseen = (labels == k).nonzero().flatten().tolist(), k in details["unseen"]
            per_class.append([method, names[k], "unseen" if unseen else "seen", len(images), accuracy,
                              among_unseen[k] if unseen else None])
            hits = [Shown(details["paths"][i], names[found[i]], bool(found[i] == k)) for i in images[:HITS]]
            sheet.append((Shown("", names[k]), hits))
    write_files(rows, folder, about, SRE, per_class, sheet[::math.ceil(len(sheet) / SHOWN)])


def write_files(rows: Sequence[Row], folder: Path, about: Row, words: str,
                per_class: Sequence[Sequence[Any]], sheet: Sheet) -> None:
    """per_class: a header and lines, where bars are drawn of the last column but one. Raises OSError."""
    kept = [{key: value for key, value in row.items() if key != "details"} for row in rows]
    write_text_atomic(folder / "results.json", json.dumps({**about, "rows": kept}, indent=2) + "\n")
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(
        [f"{value:.6f}" if isinstance(value, float) else value for value in line] for line in per_class)
    write_text_atomic(folder / "per_class.csv", table.getvalue())
    picture, jpeg = contact_sheet(sheet), io.BytesIO()
    write_png(picture, folder / "queries.png")
    picture.save(jpeg, "JPEG", quality=85)
    title = escape(f"{about['config']['method']}: {about['run']}")
    write_text_atomic(folder / "report.html", "\n".join([
        f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{title}</title>',
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>',
        f"<h1>{title}</h1><div><pre>{escape(about['table'])}</pre></div><p>{words}</p>",
        f'<div><img alt="" src="data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"></div>',
        *curves(read_log(Path(about["run"], "log.jsonl"))), *bars(*per_class)]))


def bars(header: Sequence[str], *lines: Sequence[Any]) -> Iterator[str]:
    """A table of the first test's classes, a column for each method."""
    m = header.index("method")
    first = [line for line in lines if line[:m] == lines[0][:m]]
    methods = "".join(f"<th>{escape(name)}" for name in dict.fromkeys(line[m] for line in first))
    yield f"<h2>{header[-2]} by class</h2><div><table><tr><th>class ({header[m + 2]}){methods}"
    for name, more in dict.fromkeys((line[m + 1], line[m + 2]) for line in first):
        yield f"<tr><td>{escape(name)} ({more})" + "".join(
            f'<td><i style="width:{60 * line[-2]:.0f}px"></i>{100 * line[-2]:.1f}'
            for line in first if line[m + 1] == name)
    yield "</table></div>"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl, without a last one that was cut off; none where nothing was trained."""
    with as_value_error(path, "is no training's log", "name another --run"):
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [dict(json.loads(line)) for line in text[:text.rfind("\n") + 1].splitlines()]


def curves(log: Iterable[Row]) -> Iterator[str]:
    """A chart of each number that a phase logs more than once."""
    found: dict[str, list[float]] = {}
    for line in log:
        for key, value in line.items():
            if key == "score":
                found.setdefault("score that chooses the epoch, %, by epoch", []).append(100 * value)
            elif key not in ("phase", "epoch", "step") and math.isfinite(value):
                found.setdefault(f"phase {line['phase']}: {key}, by step", []).append(value)
    for title, values in found.items():
        if len(values) > 1:
            low, high = min(values), max(values)
            points = [f"{300 * i / (len(values) - 1):.1f},{100 * (high - y) / (high - low or 1):.1f}"
                      for i, y in enumerate(values)][::math.ceil(len(values) / POINTS)]
            yield (f'<figure>{escape(title)}<svg width="300" height="100"><polyline fill="none" '
                   f'stroke="#0072b2" points="{" ".join(points)}"/></svg>'
                   f"x: 1 to {len(values)}, y: {low:.4g} to {high:.4g}</figure>")


def contact_sheet(rows: Sheet) -> Image.Image:
    """Thumbnails in a grid: a line for each query, first the query, then its hits.

    Below each stand its folder, its name and its caption. Hits are framed green and ticked, misses framed red
    and crossed. An image that cannot be read any more is a grey square.
    """
    side = SIZE + 2 * FRAME
    wide, tall = side + GAP, side + 3 * LINE + GAP
    sheet = Image.new("RGB", (wide * (1 + max(len(hits) for _, hits in rows)), tall * len(rows)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for i, (query, hits) in enumerate(rows):
        for j, shown in enumerate([query, *hits]):
            x, y, colour = j * wide, i * tall, FRAMES[shown.hit]
            if shown.path:
                pen.rectangle((x, y, x + side - 1, y + side - 1), colour)
                sheet.paste(thumbnail(shown), (x + FRAME, y + FRAME))
            if shown.hit is not None:
                left, top = x + side - MARK, y + side - MARK
                pen.rectangle((left, top, left + MARK - 1, top + MARK - 1), colour)
                pen.line([(left + dx, top + dy) for dx, dy in MARKS[shown.hit]], "white", width=2)
            folder, name = os.path.split(shown.path)
            for k, text in enumerate([os.path.basename(folder), name, shown.caption]):
                text = text.encode("ascii", "replace").decode()  # all that the font is sure to have
                while font.getlength(text) > side:
                    text = ".." + text[3:]  # the end says more
                pen.text((x, y + side + k * LINE), text, "black", font)
    return sheet


def thumbnail(shown: Shown) -> Image.Image:
    """The whole image on a square."""
    try:
        image = open_image(shown.path)
    except ValueError:
        image = Image.new("RGB", (1, 1), "grey")
    if shown.inverted:
        return ImageOps.pad(ImageOps.invert(image), (SIZE, SIZE), color="black")
    return ImageOps.pad(image, (SIZE, SIZE), color="white")


def write_png(picture: Image.Image, path: Path) -> None:
    """A picture that is marked as of this package. Raises OSError."""
    mark = PngInfo()
    mark.add_text("Software", SOFTWARE)
    write_atomic(path, lambda file: picture.save(file, "PNG", pnginfo=mark))
