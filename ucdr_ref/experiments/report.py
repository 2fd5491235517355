"""What an evaluation leaves: results.json, tables as CSV, pictures by Pillow.

Names of files and classes come from folders that others made. Here they become harmless: `plain` for a
terminal, `cell` for a spreadsheet; JSON holds them exactly, escaped to ASCII.
"""
from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from ..images.batches import open_image
from ..machine.files import write_atomic, write_text_atomic
from ..metrics import search

FRAMES = {True: (30, 160, 60), False: (205, 40, 40), None: (150, 150, 150)}  # hit, miss, unknown
# A tick and a cross, for readers who cannot tell green from red.
MARKS = {True: [(3, 8), (6, 11), (12, 4)], False: [(4, 4), (11, 11), (8, 8), (11, 4), (4, 11)]}
SHOWN, HITS = 8, 10  # queries and results of queries.png
FRAME, GAP, LINE, BADGE = 4, 6, 14, 15  # pixels: frame, space between thumbnails, line of text, mark
LEFT, TOP = 120, 134  # pixels of labels beside and above a confusion matrix
LEGIBLE, PAIRS = 80, 40  # a matrix of more classes becomes a list of so many pairs
# Also full-width, and after the separator of other locales.
FORMULA = re.compile(r"(^|;)(?=[=+\-@\t\r\uff1d\uff0b\uff0d\uff20])")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Shown:
    """An image of a contact sheet. hit: None where unknown; inverted: as the model saw it (D14)."""

    path: str
    caption: str
    hit: bool | None = None
    inverted: bool = False


def plain(text: object) -> str:
    """`text` for a terminal: what does not print (control characters, marks of writing direction, bytes of a
    file name that are no UTF-8) becomes an escape such as \\x1b or \\udcff.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def cell(value: object) -> str:
    """A CSV cell: six digits for a float, nothing for None, `plain` text, with an apostrophe before what a
    spreadsheet would run (= + - @, tab, carriage return in front).
    """
    if isinstance(value, str):
        return plain(FORMULA.sub(r"\1'", value))
    return "" if value is None else f"{value:.6f}" if isinstance(value, float) else str(value)


def write_tables(rows: Sequence[Row], folder: Path, about: Row,
                 tables: Mapping[str, list[list[Any]]]) -> None:
    """results.json (`about`, and the rows without details) and CSV files; WriteError where it fails."""
    kept = [{key: value for key, value in row.items() if key != "details"} for row in rows]
    write_text_atomic(folder / "results.json", json.dumps({**about, "rows": kept}, indent=2) + "\n")
    for name, lines in tables.items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(map(cell, line) for line in lines)
        write_text_atomic(folder / name, text.getvalue())


def write_retrieval(rows: Sequence[Row], folder: Path, about: Row) -> None:
    """results.json, per_class.csv, per_query.csv and queries.png of what `retrieval.evaluate` returns.

    The picture shows the first test's queries, a row for each method with its first ten results.
    """
    key = ["protocol", "query_domain", "gallery", "method"]
    per_class: list[list[Any]] = [[*key, "class", "queries", "mAP@200", "mAP@all"]]
    per_query: list[list[Any]] = [[*key, "query", "class", "AP@200", "AP@all"]]
    for row in rows:
        start = [row["protocol"], row["query_domain"], row["gallery_name"], row["method"]]
        names, metrics, queries = (row["details"][part] for part in ("names", "metrics", "queries"))
        counts = Counter(queries.classes)
        per_class += [[*start, names[k], counts[names[k]], value, metrics["per_class@all"][k]]
                      for k, value in sorted(metrics["per_class"].items())]
        scores = metrics["AP"].tolist(), metrics["AP@all"].tolist()
        per_query += [[*start, *line] for line in zip(queries.paths, queries.classes, *scores)]
    write_tables(rows, folder, about, {"per_class.csv": per_class, "per_query.csv": per_query})
    strokes, first = about["config"]["stroke_domains"], rows[0]
    same = [row for row in rows if not row.get("transductive")
            and all(row[part] == first[part] for part in ("protocol", "gallery_name"))]
    classes = first["details"]["queries"].classes
    one_each = [classes.index(name) for name in dict.fromkeys(classes)]
    chosen = one_each[::-(-len(one_each) // SHOWN)]
    shown = [ranked_queries(row, chosen, strokes, HITS) for row in same]
    sheet([picture for pictures in zip(*shown) for picture in pictures], folder / "queries.png")


def ranked_queries(row: Row, chosen: list[int], strokes: Sequence[str],
                   count: int) -> list[tuple[Shown, list[Shown]]]:
    """The queries of these indices, each with its `count` nearest results and their distances."""
    details, shown = row["details"], []
    queries, gallery = details["queries"], details["gallery"]
    found = search(details["query_features"][chosen], details["gallery_features"], count)
    for i, distances, nearest in zip(chosen, *(part.tolist() for part in found)):
        results = [Shown(gallery.paths[j], f"{distance:.3f}", gallery.classes[j] == queries.classes[i],
                         gallery.domains[j] in strokes) for j, distance in zip(nearest, distances)]
        shown.append((Shown(queries.paths[i], row["method"], None, queries.domains[i] in strokes), results))
    return shown


def write_classification(rows: Sequence[Row], folder: Path, about: Row) -> None:
    """results.json, per_class.csv and confusion.png of the rows that `classification.evaluate` returns."""
    lines = [["method", "class", "split", "images", "accuracy", "accuracy_among_unseen"]]
    detailed = [row for row in rows if "details" in row]
    lines += [[row["method"], *line] for row in detailed for line in class_accuracies(row["details"])]
    write_tables(rows, folder, about, {"per_class.csv": lines})
    save_picture(confusion_picture(detailed), folder / "confusion.png")


def class_accuracies(details: Row) -> list[list[Any]]:
    """Of each class that has images: name, seen or unseen, images, accuracy, that among unseen classes."""
    labels, predicted, lines = details["labels"], details["predicted"], []
    for k in labels.unique().tolist():
        mine, unseen = labels == k, k in details["unseen"]
        accuracy, among_unseen = (float((found[mine] == k).double().mean())
                                  for found in (predicted.everywhere, predicted.classes[:, 1]))
        lines.append([details["names"][k], "unseen" if unseen else "seen", int(mine.sum()), accuracy,
                      among_unseen if unseen else None])
    return lines


def confusion(details: Row) -> Tensor:
    """Counts [c, c] of a row's test images: true class down, predicted class across."""
    c = len(details["names"])
    return torch.bincount(details["labels"] * c + details["predicted"].everywhere, minlength=c * c).view(c, c)


def shares(counts: Tensor) -> Tensor:
    """Each row of counts [c, c] as shares of its sum."""
    return counts.double() / counts.sum(dim=1, keepdim=True).clamp(min=1)


def most_confused(details: Row, count: int) -> list[tuple[str, str, int, float]]:
    """(true class, predicted class, images, their share of the true class), the largest shares first."""
    counts, names = confusion(details), details["names"]
    wrong = shares(counts).fill_diagonal_(0)
    order = wrong.flatten().argsort(descending=True, stable=True)[:count].tolist()
    pairs = [divmod(i, len(names)) for i in order]
    return [(names[a], names[b], int(counts[a, b]), float(wrong[a, b])) for a, b in pairs if wrong[a, b]]


def confusion_picture(rows: Sequence[Row]) -> Image.Image:
    """The rows' confusion matrices, or most confused pairs of more than LEGIBLE classes, side by side."""
    draw = pair_list if len(rows[0]["details"]["names"]) > LEGIBLE else matrix_picture
    pictures = [draw(row) for row in rows]
    wide, tall = pictures[0].size
    page = Image.new("RGB", (len(rows) * wide, tall))
    for i, picture in enumerate(pictures):
        page.paste(picture, (i * wide, 0))
    return page


def pair_list(row: Row) -> Image.Image:
    page, font = Image.new("RGB", (420, (PAIRS + 2) * 16), "white"), ImageFont.load_default(12)
    lines = [f"{row['method']}: share of the true class (images), true > predicted"]
    lines += [f"{share:.0%} ({count})  {fit(a, font, 165)} > {b}"
              for a, b, count, share in most_confused(row["details"], PAIRS)]
    text = "\n".join(fit(line, font, 410, False) for line in lines)
    ImageDraw.Draw(page).text((GAP, 4), text, "black", font)
    return page


def matrix_picture(row: Row) -> Image.Image:
    """True classes down, predicted ones across, unseen classes last; the darker, the larger the share."""
    names, unseen = row["details"]["names"], row["details"]["unseen"]
    c = len(names)
    step = max(9, min(28, 720 // c))  # pixels of a class
    font, side = ImageFont.load_default(min(step, 12)), c * step
    page = Image.new("RGB", (LEFT + side + 8, TOP + side + 44), "white")
    across = Image.new("RGB", (LEFT, side), "white")  # to be turned upright
    pen, pen_across = ImageDraw.Draw(page), ImageDraw.Draw(across)
    order = sorted(range(c), key=lambda k: (k in unseen, names[k]))
    for i, k in enumerate(order):
        label = fit("* " * (k in unseen) + names[k], font, LEFT - 12, False)
        pen.text((LEFT - 4, TOP + (i + 0.5) * step), label, "black", font, "rm")
        pen_across.text((4, (i + 0.5) * step), label, "black", font, "lm")
    page.paste(across.rotate(90, expand=True), (LEFT, TOP - LEFT))
    title = f"{row['method']}: true class down, predicted across"
    pen.text((LEFT, 0), fit(title, font, side, False), "black", font)
    matrix = shares(confusion(row["details"]))[order][:, order]
    page.paste(greys(matrix, (side, side)), (LEFT, TOP))
    for size, colour in [(c, "grey"), (c - len(unseen), "red")]:
        pen.rectangle((LEFT, TOP, LEFT + size * step, TOP + size * step), outline=colour)
    page.paste(greys(torch.arange(5)[None] / 4, (180, 12)), (LEFT, TOP + side + 8))
    pen.text((LEFT, TOP + side + 24), "0 to 100 % of a class; * unseen", "black", font)
    return page


def greys(values: Tensor, size: tuple[int, int]) -> Image.Image:
    """Values [r, c] in 0..1 as boxes from white to black; size: width and height."""
    shades = (255 - (255 * values).round()).to(torch.uint8).numpy()
    return Image.fromarray(shades).resize(size, Image.Resampling.NEAREST)


def sheet(rows: Sequence[tuple[Shown, Sequence[Shown]]], path: str | os.PathLike[str],
          size: int = 96) -> None:
    """Writes `contact_sheet`; the ending of `path` tells the format.

    Raises ValueError for no rows or an unknown ending, WriteError when the file cannot be written.
    """
    if not rows:
        raise ValueError(f"{plain(path)}: a picture needs at least one query; got 0")
    save_picture(contact_sheet(rows, size), path)


def contact_sheet(rows: Sequence[tuple[Shown, Sequence[Shown]]], size: int) -> Image.Image:
    """A grid of thumbnails with sides of `size` pixels: a row per query, first the query, then its results.

    Below each stand its folder, its name and its caption. Hits are framed green and ticked, misses framed red
    and crossed, others grey. An image that cannot be read any more becomes a crossed box.
    """
    framed = size + 2 * FRAME
    wide, tall = framed + GAP, framed + 3 * LINE + GAP
    columns = 1 + max(len(results) for _, results in rows)
    page = Image.new("RGB", (columns * wide + 2 * GAP, len(rows) * tall + GAP), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default()
    for i, (query, results) in enumerate(rows):
        for j, shown in enumerate([query, *results]):
            x, y = GAP + j * wide + (GAP if j else 0), GAP + i * tall
            right, below = x + framed - 1, y + framed - 1
            if j:
                pen.rectangle((x, y, right, below), FRAMES[shown.hit])
            if shown.path:  # a text has none
                page.paste(thumbnail(shown.path, size, shown.inverted), (x + FRAME, y + FRAME))
            if shown.hit is not None:
                left, top = right - BADGE, below - BADGE
                pen.rectangle((left, top, right, below), FRAMES[shown.hit])
                pen.line([(left + dx, top + dy) for dx, dy in MARKS[shown.hit]], "white", width=2)
            folder, name = os.path.split(shown.path)
            for line, text in enumerate([os.path.basename(folder), name, shown.caption]):
                pen.text((x + FRAME, below + 1 + line * LINE), fit(text, font, size + FRAME), "black", font)
    return page


def save_picture(page: Image.Image, path: str | os.PathLike[str]) -> None:
    kind = Image.registered_extensions().get(Path(path).suffix.lower(), "")
    if kind not in Image.SAVE:
        raise ValueError(f"{plain(path)}: a picture needs an ending such as .png")
    write_atomic(path, lambda file: page.save(file, format=kind))


def thumbnail(file: str, size: int, inverted: bool = False) -> Image.Image:
    """The whole image on a square, as the model saw it; a crossed box where it cannot be read."""
    square = (size, size)
    try:
        image = open_image(file)
    except ValueError:
        box = Image.new("RGB", square, (225, 225, 225))
        ImageDraw.Draw(box).line([(0, 0), square, (size, 0), (0, size)], "white", width=2)
        return box
    if inverted:
        return ImageOps.pad(ImageOps.invert(image), square, color="black")
    return ImageOps.pad(image, square, color="white")


def fit(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: float,
        keep_end: bool = True) -> str:
    """`text` without what Pillow's own font lacks, cut to `width` pixels: of a path the end says more."""
    text = "".join(c if c.isascii() and c.isprintable() else "?" for c in text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(".." + text) > width:
        text = text[1:] if keep_end else text[:-1]
    return ".." + text if keep_end else text + ".."
