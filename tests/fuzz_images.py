"""Mutated images, pixel bombs, and folders with everything that a file system allows."""
from __future__ import annotations

import io
import os
import random
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from tests.fuzzing import Harness, mutated, png, tidied
from ucdr_ref.experiments import trees
from ucdr_ref.images.batches import open_image
from ucdr_ref.images.listing import list_images


def base_images() -> dict[str, bytes]:
    """Small images of every format and mode that this Pillow writes."""
    pixels = np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8)
    rgb = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    forms: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "png": (rgb, {}), "jpg": (rgb, {"exif": exif}), "gif": (rgb.convert("P"), {"transparency": 3}), "bmp": (rgb, {}),
        "tif": (rgb, {"compression": "tiff_lzw"}), "tiff": (rgb.convert("L"), {}), "ppm": (rgb, {}), "tga": (rgb, {}),
        "ico": (rgb.resize((16, 16)), {}), "apng": (rgb.convert("RGBA"), {}), "dib": (rgb.convert("1"), {}),
        "jpeg": (rgb.convert("CMYK"), {}), "jfif": (rgb.convert("L"), {"progressive": True})}
    if features.check("webp"):
        forms["webp"] = rgb.convert("RGBA"), {}
    if features.check("jpg_2000"):
        forms["jp2"] = rgb, {}
    if features.check("avif"):
        forms["avif"] = rgb, {}
    kinds = {"jfif": "JPEG", "apng": "PNG", "jp2": "JPEG2000"}
    out = {}
    for ending, (image, options) in forms.items():
        stream = io.BytesIO()
        image.save(stream, kinds.get(ending) or Image.registered_extensions()["." + ending], **options)
        out[ending] = stream.getvalue()
    stream = io.BytesIO()
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)).save(stream, "PNG")
    return {**out, "pgm": stream.getvalue()}


def bombs() -> dict[str, bytes]:
    text = zlib.compress(bytes(100 << 20))
    return {"wide.png": png(1 << 30, 1 << 30), "flat.png": png(200_000_000, 1), "grey.png": png(60_000, 60_000, 1, 0),
            "claimed.png": png(10_000, 11_000),
            "zlib.png": png(10, 10, data=bytes(64 << 20)),
            "text.png": png(8, 8)[:-12] + struct.pack(">I", len(text) + 3) + b"zTXta\0\0" + text + bytes(4) + png(8, 8)[-12:],
            "wide.ppm": b"P6 99999999 99999999 255\n",
            "wide.bmp": b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 1 << 30, 1 << 30, 1, 24, 0) + bytes(40),
            "claimed.ppm": b"P5 10000 11000 255\n",
            "wide.gif": b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\0\0\0\0\xff\xff\xff\xff\0\2"}


def fill_folder(folder: Path, r: random.Random) -> None:
    """Odd entries, of which none may stop a listing for long."""
    sound = png(2, 2, data=bytes(14))
    for name in (b"a b.png", b"new\nline.png", b"\xff\xfe.png", b"-rf.png", b"'\"$(ls).png", b"UPPER.PNG", b".hidden.png",
                 "\u96ea\u202e.png".encode(), b"x" * 250 + b".png"):
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(sound)
    os.mkfifo(folder / "fifo.png")
    for name, target in (("loop.png", "loop.png"), ("dangling.png", "nowhere.png"), ("up.png", ".."), ("zero.png", "/dev/zero"),
                         ("link.png", "UPPER.PNG")):
        (folder / name).symlink_to(target)
    if r.random() < 0.3:
        for parent in (folder, folder.parent, folder.parent.parent):
            (parent / "loop").symlink_to("loop", target_is_directory=True)
    if r.random() < 0.3:
        (folder / "up").symlink_to("../..", target_is_directory=True)
    (folder / "folder.png").mkdir()


def fuzz_images(harness: Harness, folder: Path, count: int, seed: int) -> None:
    r, bases = random.Random(f"images/{seed}"), base_images()
    endings, hard = sorted(bases), bombs()
    for name, data in hard.items():
        (folder / name).write_bytes(data)
        harness.run("bombs", name, lambda name=name: open_image(str(folder / name)), name)
    for ending in endings:
        path = folder / f"sound.{ending}"
        path.write_bytes(bases[ending])
        harness.sound("images", ending, lambda path=path: open_and_close(str(path)))
        path.unlink()
    sound_folder(harness, folder / "sound")
    for i in range(count):
        ending = r.choice(endings)
        what, data = mutated(bases[ending], r)
        if r.random() < 0.3:
            what, data = f"{what} twice", mutated(data, r)[1]
        name = f"{i}.{r.choice(endings) if r.random() < 0.3 else ending}"
        path = folder / name
        path.write_bytes(data)
        harness.run("images", f"{i} {ending} {what}", lambda path=path: open_image(str(path)), name)
        path.unlink()
    for i in range(max(2, count // 100)):
        root = folder / "tree" / r.choice(("photo", "new\nline", "\udcff", "a b")) / r.choice(("cat", "\n", "\udcfe\udcff", "-"))
        root.mkdir(parents=True)
        fill_folder(root, r)
        tree = str(folder / "tree")
        harness.run("folders", f"{i} list_images", lambda tree=tree: [open_and_close(os.path.join(tree, name))
                                                                      for name, *_ in list_images(tree)])
        harness.run("folders", f"{i} scan", lambda tree=tree: tidied(lambda: trees.scan(tree)))
        for entry in sorted(os.scandir(root), key=lambda entry: os.fsencode(entry.name)):
            harness.run("entries", f"{i} {entry.name!r}", lambda entry=entry: open_and_close(entry.path))
        shutil.rmtree(folder / "tree")


def sound_folder(harness: Harness, tree: Path) -> None:
    """A folder of one image is listed, scanned and opened."""
    path = tree / "photo" / "cat" / "a.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(png(2, 2, data=bytes(14)))

    def listed() -> None:
        assert [name for name, *_ in list_images(str(tree))] == ["photo/cat/a.png"]

    def scanned() -> None:
        assert trees.scan(str(tree)) == {"photo": {"cat": [str(path)]}}

    harness.sound("folders", "list_images", listed)
    harness.sound("folders", "scan", scanned)
    harness.sound("entries", "a.png", lambda: open_and_close(str(path)))


def open_and_close(path: str) -> None:
    open_image(path).close()
