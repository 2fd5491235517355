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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from ..images.batches import open_image
from ..machine.files import write_atomic, write_text_atomic

FRAMES = {True: (30, 160, 60), False: (205, 40, 40), None: (150, 150, 150)}  # hit, miss, unknown
# Pixels: frame, space between thumbnails, line of text, mark of a hit or miss.
FRAME, GAP, LINE, BADGE = 4, 6, 14, 15
LEGIBLE = 80  # classes; a larger confusion matrix becomes a list of pairs
PAIRS = 40  # of that list
RED, GREY = (190, 30, 30), (150, 150, 150)
# Also full-width, and after the separator of other locales.
FORMULA = re.compile(r"(^|;)(?=[=+\-@\t\r\uff1d\uff0b\uff0d\uff20])")

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


@dataclass(frozen=True)
class Shown:
    """An image of a contact sheet. hit: None where unknown; inverted: as the model saw it (D14)."""

    path: str
    caption: str
    hit: bool | None = None
    inverted: bool = False


def plain(text: object) -> str:
    """`text` for a terminal: what does not print becomes an escape such as \\x1b or \\udcff.

    That is every control character, mark of writing direction and byte of a file name that is no UTF-8.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def cell(value: object) -> str:
    """A CSV cell: six digits for a float, nothing for None, `plain` text that no spreadsheet runs.

    A name that begins like a formula (= + - @, tab, carriage return) gets an apostrophe in front.
    """
    if isinstance(value, str):
        return plain(FORMULA.sub(r"\1'", value))
    return "" if value is None else f"{value:.6f}" if isinstance(value, float) else str(value)


def write_tables(rows: Sequence[Mapping[str, Any]], folder: Path, about: Mapping[str, Any],
                 tables: Mapping[str, Sequence[Sequence[object]]]) -> None:
    """results.json (`about`, and the rows without details) and a CSV file for each of `tables`, header first.

    Raises WriteError when a file cannot be written.
    """
    kept = [{key: value for key, value in row.items() if key != "details"} for row in rows]
    write_text_atomic(folder / "results.json", json.dumps({**about, "rows": kept}, indent=2) + "\n")
    for name, lines in tables.items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([cell(value) for value in line] for line in lines)
        write_text_atomic(folder / name, text.getvalue())


def write_retrieval(rows: Sequence[Mapping[str, Any]], folder: Path, about: Mapping[str, Any]) -> None:
    """results.json, per_class.csv, per_query.csv and queries.png of what `retrieval.evaluate` returns.

    The picture shows the first test's queries, a row for each method with its first ten results.
    """
    key = ["protocol", "query_domain", "gallery", "method"]
    per_class: list[list[object]] = [[*key, "class", "queries", "mAP@200", "mAP@all"]]
    per_query: list[list[object]] = [[*key, "query", "class", "AP@200", "AP@all"]]
    detailed = [row for row in rows if "details" in row]
    for row in detailed:
        start = [row["protocol"], row["query_domain"], row["gallery_name"], row["method"]]
        details = row["details"]
        metrics, queries = details["metrics"], details["queries"]
        for label, value in sorted(metrics["per_class"].items()):
            name = details["names"][label]
            count = queries.classes.count(name)
            per_class.append([*start, name, count, value, metrics["per_class@all"][label]])
        scores = zip(metrics["AP"].tolist(), metrics["AP@all"].tolist())
        per_query += [[*start, path, name, *pair]
                      for path, name, pair in zip(queries.paths, queries.classes, scores)]
    write_tables(rows, folder, about, {"per_class.csv": per_class, "per_query.csv": per_query})
    strokes = about["config"]["stroke_domains"]
    first = detailed[0]
    same = [row for row in detailed if not row.get("transductive")
            and (row["protocol"], row["gallery_name"]) == (first["protocol"], first["gallery_name"])]
    pictures = [shown_query(row, i, strokes) for i in range(len(first["details"]["shown"])) for row in same]
    sheet(pictures, folder / "queries.png")


def shown_query(row: Mapping[str, Any], i: int, strokes: Sequence[str]) -> tuple[Shown, list[Shown]]:
    """The i-th shown query of a row and its results; distances where the row has its features."""
    details = row["details"]
    queries, gallery = details["queries"], details["gallery"]
    index, nearest = details["shown"][i]
    captions = [""] * len(nearest)
    if "query_features" in details:
        lengths = (details["query_features"][index] - details["gallery_features"][nearest]).norm(dim=1)
        captions = [f"{length:.3f}" for length in lengths.tolist()]
    query = Shown(queries.paths[index], row["method"], None, queries.domains[index] in strokes)
    return query, [Shown(gallery.paths[j], caption, gallery.classes[j] == queries.classes[index],
                         gallery.domains[j] in strokes) for j, caption in zip(nearest, captions)]


def write_classification(rows: Sequence[Mapping[str, Any]], folder: Path, about: Mapping[str, Any]) -> None:
    """results.json, per_class.csv and confusion.png of the rows that `classification.evaluate` returns."""
    lines: list[list[object]] = [["method", "class", "split", "images", "accuracy", "accuracy_among_unseen"]]
    detailed = [row for row in rows if "details" in row]
    for row in detailed:
        details = row["details"]
        labels, names, unseen = details["labels"], details["names"], details["unseen"]
        predicted, among = details["predicted"].everywhere, details["predicted"].classes[:, 1]
        for k in sorted(set(labels.tolist())):
            mine = labels == k
            accuracy, among_unseen = (float((found[mine] == k).double().mean())
                                      for found in (predicted, among))
            lines.append([row["method"], names[k], "unseen" if k in unseen else "seen", int(mine.sum()),
                          accuracy, among_unseen if k in unseen else None])
    write_tables(rows, folder, about, {"per_class.csv": lines})
    save_picture(confusion_picture(detailed), folder / "confusion.png")


def confusion(details: Mapping[str, Any]) -> Tensor:
    """Counts [c, c] of a row's test images: true class down, predicted class across."""
    c = len(details["names"])
    return torch.bincount(details["labels"] * c + details["predicted"].everywhere, minlength=c * c).view(c, c)


def most_confused(details: Mapping[str, Any], count: int) -> list[tuple[str, str, int, float]]:
    """(true class, predicted class, images, their share of the true class), the largest shares first."""
    counts, names = confusion(details), details["names"]
    shares = (counts.double() / counts.sum(dim=1, keepdim=True).clamp(min=1)).fill_diagonal_(0)
    order = shares.flatten().argsort(descending=True, stable=True)[:count].tolist()
    pairs = [divmod(i, len(names)) for i in order]
    return [(names[a], names[b], int(counts[a, b]), float(shares[a, b])) for a, b in pairs if shares[a, b]]


def confusion_picture(rows: Sequence[Mapping[str, Any]]) -> Image.Image:
    """The rows' confusion matrices side by side, unseen classes last; the darker, the larger a row's share.

    More than LEGIBLE classes: the PAIRS most confused pairs of each row as a list.
    """
    names, unseen = (rows[0]["details"][key] for key in ("names", "unseen"))
    c = len(names)
    font = ImageFont.load_default(size=12)
    if c > LEGIBLE:
        page = Image.new("RGB", (len(rows) * 420, (PAIRS + 2) * 16), "white")
        pen = ImageDraw.Draw(page)
        for number, row in enumerate(rows):
            x = number * 420 + GAP
            title = f"{row['method']}: share of the true class, true > predicted"
            pen.text((x, 4), fit(title, font, 410), "black", font)
            for i, (a, b, _, share) in enumerate(most_confused(row["details"], PAIRS)):
                for dx, text, width in [(0, f"{share:.0%}", 40), (45, a, 175), (225, "> " + b, 185)]:
                    pen.text((x + dx, 24 + 16 * i), fit(text, font, width), "black", font)
        return page
    order = sorted(range(c), key=lambda k: (k in unseen, names[k]))
    cell_size = max(9, min(28, 720 // c))
    margin, top, side = 120, 134, c * cell_size
    page = Image.new("RGB", (len(rows) * (side + margin + 8), top + side + 44), "white")
    pen, small = ImageDraw.Draw(page), ImageFont.load_default(size=min(cell_size, 12))
    border = (c - len(unseen)) * cell_size
    for number, row in enumerate(rows):
        x = margin + number * (side + margin + 8)
        title = f"{row['method']}: true class down, predicted across"
        pen.text((x, 2), fit(title, font, side), "black", font)
        for i, k in enumerate(order):
            name, colour = (names[k] + " *", RED) if k in unseen else (names[k], (0, 0, 0))
            label = label_picture(name, small, colour)
            page.paste(label, (x - 4 - label.width, top + i * cell_size + (cell_size - label.height) // 2))
            upright = label.rotate(90, expand=True)
            across = x + i * cell_size + (cell_size - upright.width) // 2
            page.paste(upright, (across, top - 4 - upright.height))
        counts = confusion(row["details"])[order][:, order].double()
        shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
        grey = (255 - 255 * shares).round().to(torch.uint8).numpy()
        page.paste(Image.fromarray(grey).resize((side, side), Image.Resampling.NEAREST), (x, top))
        pen.rectangle((x, top, x + side, top + side), outline=GREY)
        pen.line([(x + border, top), (x + border, top + side)], RED)
        pen.line([(x, top + border), (x + side, top + border)], RED)
        for step in range(5):
            left, shade = x + step * 36, 255 - round(255 * step / 4)
            box = (left, top + side + 8, left + 35, top + side + 20)
            pen.rectangle(box, fill=(shade, shade, shade), outline=GREY)
            pen.text((left + 2, top + side + 24), f"{25 * step} %", "black", font)
        pen.text((x + 190, top + side + 6), "* unseen class" if unseen else "", RED, font)
    return page


def label_picture(text: str, font: Font, colour: tuple[int, int, int]) -> Image.Image:
    text = fit(text, font, 108, keep_end=False)
    left, top, right, bottom = font.getbbox("Ag" + text)
    picture = Image.new("RGB", (max(1, round(font.getlength(text))), round(bottom - top) + 1), "white")
    ImageDraw.Draw(picture).text((0, -top), text, colour, font)
    return picture


def sheet(rows: Sequence[tuple[Shown, Sequence[Shown]]], path: str | os.PathLike[str],
          size: int = 96) -> None:
    """Writes a grid of thumbnails: a row per query, first the query, then its results.

    Below each stand its folder, its name and its caption. Hits are framed green and ticked, misses framed red
    and crossed, others grey. `size` is a thumbnail's side in pixels. An image that cannot be read any more
    becomes a crossed box. The ending of `path` tells the format; the file is replaced at once when the
    picture is complete.
    Raises ValueError for no rows or an unknown ending, WriteError when the file cannot be written.
    """
    picture_format(Path(path), len(rows))
    wide, tall = size + 2 * FRAME + GAP, size + 2 * FRAME + 3 * LINE + GAP
    columns = 1 + max(len(results) for _, results in rows)
    page = Image.new("RGB", (columns * wide + 2 * GAP, len(rows) * tall + GAP), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default()
    for i, (query, results) in enumerate(rows):
        for j, shown in enumerate([query, *results]):
            x, y = GAP + j * wide + (GAP if j else 0), GAP + i * tall
            right, below = x + size + 2 * FRAME - 1, y + size + 2 * FRAME - 1
            if j:
                pen.rectangle((x, y, right, below), fill=FRAMES[shown.hit])
            page.paste(thumbnail(shown.path, size, shown.inverted), (x + FRAME, y + FRAME))
            if j and shown.hit is not None:
                mark(pen, right - BADGE, below - BADGE, shown.hit)
            folder, name = os.path.split(shown.path)
            for line, text in enumerate([os.path.basename(folder), name, shown.caption]):
                pen.text((x + FRAME, below + 1 + line * LINE), fit(text, font, size + FRAME), "black", font)
    save_picture(page, path)


def mark(pen: ImageDraw.ImageDraw, x: int, y: int, hit: bool) -> None:
    """A white tick or cross in the frame's colour, for readers who cannot tell green from red."""
    pen.rectangle((x, y, x + BADGE, y + BADGE), fill=FRAMES[hit])
    strokes = [[(3, 8), (6, 11), (12, 4)]] if hit else [[(4, 4), (11, 11)], [(4, 11), (11, 4)]]
    for stroke in strokes:
        pen.line([(x + dx, y + dy) for dx, dy in stroke], "white", width=2)


def picture_format(path: Path, rows: int) -> str:
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE or not rows:
        raise ValueError(f"{plain(path)}: a picture needs an ending such as .png and at least one query; "
                         f"got {rows}")
    return str(kind)


def save_picture(page: Image.Image, path: str | os.PathLike[str]) -> None:
    kind = picture_format(Path(path), 1)

    def save(file: BinaryIO) -> None:
        page.save(file, format=kind)

    write_atomic(path, save)


def thumbnail(file: str, size: int, inverted: bool = False) -> Image.Image:
    """The whole image, centred on a square, as the model saw it; a crossed box where it cannot be read.

    No path at all, as of a text, is an empty square.
    """
    if not file:
        return Image.new("RGB", (size, size), "white")
    try:
        image = open_image(file)
    except ValueError:
        box = Image.new("RGB", (size, size), (225, 225, 225))
        ImageDraw.Draw(box).line([(0, 0), (size, size), (size, 0), (0, size)], fill="white", width=2)
        return box
    if inverted:
        return ImageOps.pad(ImageOps.invert(image), (size, size), color="black")
    return ImageOps.pad(image, (size, size), color="white")


def fit(text: str, font: Font, width: float, keep_end: bool = True) -> str:
    """`text` without what Pillow's own font lacks, cut to `width` pixels: of a path the end says more."""
    text = "".join(c if c.isascii() and c.isprintable() else "?" for c in text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(".." + text) > width:
        text = text[1:] if keep_end else text[:-1]
    return ".." + text if keep_end else text + ".."
