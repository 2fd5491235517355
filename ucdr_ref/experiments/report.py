"""Retrieval results as a picture, by Pillow."""
from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..images.batches import open_image
from ..machine.files import write_atomic

FRAMES = {True: (30, 160, 60), False: (205, 40, 40), None: (150, 150, 150)}  # hit, miss, unknown
FRAME, GAP, LINE = 4, 6, 16  # pixels: frame width, space between thumbnails, height of a caption

Result = tuple[str, bool | None] | tuple[str, bool | None, str]


def sheet(rows: Sequence[tuple[str, str, Sequence[Result]]], path: str | os.PathLike[str], size: int = 96) -> None:
    """Writes a grid of thumbnails: a row per query, first the query, then its results, framed green, red or grey.

    A row is (query file, caption, results); a result is (file, hit) or (file, hit, caption), hit None where unknown.
    `size` is a thumbnail's side in pixels. An image that cannot be read any more becomes a crossed box. The ending of
    `path` tells the format; the file is replaced at once when the picture is complete.
    Raises ValueError for no rows or an unknown ending, WriteError when the file cannot be written.
    """
    target = Path(path)
    kind = Image.registered_extensions().get(target.suffix.lower())
    if kind not in Image.SAVE or not rows:
        raise ValueError(f"{target}: a picture needs an ending such as .png and at least one query; got {len(rows)}")
    wide, tall = size + 2 * FRAME + GAP, size + 2 * FRAME + LINE + GAP
    lead = size // 2  # the first column is wider: its captions are longer
    columns = 1 + max(len(results) for _, _, results in rows)
    page = Image.new("RGB", (columns * wide + lead + GAP, len(rows) * tall + GAP), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default()
    for i, (query, caption, results) in enumerate(rows):
        for j, (file, hit, *text) in enumerate([(query, None, caption), *results]):
            x, y = GAP + j * wide + (lead if j else 0), GAP + i * tall
            if j:
                pen.rectangle((x, y, x + size + 2 * FRAME - 1, y + size + 2 * FRAME - 1), fill=FRAMES[hit])
            page.paste(thumbnail(file, size), (x + FRAME, y + FRAME))
            text_width = size if j else size + lead
            pen.text((x + FRAME, y + size + 2 * FRAME + 1), fit("".join(text), font, text_width), "black", font)

    def save(file: BinaryIO) -> None:
        page.save(file, format=kind)

    write_atomic(target, save)


def thumbnail(file: str, size: int) -> Image.Image:
    """The whole image, centred on a white square; a crossed box where it cannot be read."""
    try:
        return ImageOps.pad(open_image(file), (size, size), color="white")
    except ValueError:
        box = Image.new("RGB", (size, size), (225, 225, 225))
        ImageDraw.Draw(box).line([(0, 0), (size, size), (size, 0), (0, size)], fill="white", width=2)
        return box


def fit(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """`text` with what Pillow's own font lacks replaced, and cut at the front: the end of a path says more."""
    text = "".join(c if c.isascii() and c.isprintable() else "?" for c in text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(".." + text) > width:
        text = text[1:]
    return ".." + text
