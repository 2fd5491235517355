"""The fake encoder's feature is the mean colour of a PNG, so a nearest neighbour can be told by looking at it."""
from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.helpers import files_of_at_most
from ucdr_ref.images import cache as index_module
from ucdr_ref.images.cache import Index, build_index
from ucdr_ref.images.listing import list_images
from ucdr_ref.machine.files import WriteError
from ucdr_ref.metrics import search

COLOURS = {"red.png": (250, 10, 10), "sub/green.png": (10, 250, 10), "sub/blue.png": (10, 10, 250),
           "sub/deep/grey.png": (128, 128, 128), "white.png": (255, 255, 255)}


def paint(path: Path, colour: tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path, format="png")


class Encoder:
    """Counts what it encodes; batches of two, the last batch first; unreadable images never come."""

    def __init__(self) -> None:
        self.encoded = 0

    def __call__(self, paths: list[str]) -> Iterator[tuple[list[int], Tensor]]:
        for start in reversed(range(0, len(paths), 2)):
            indices, features = [], []
            for i in range(start, min(start + 2, len(paths))):
                try:
                    with Image.open(paths[i]) as image:
                        features.append(np.asarray(image.convert("RGB"), dtype=np.float32).mean((0, 1)))
                except OSError:
                    continue
                indices.append(i)
            self.encoded += len(indices)
            yield indices, torch.from_numpy(np.array(features))


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    for name, colour in COLOURS.items():
        paint(tmp_path / "gallery" / name, colour)
    return tmp_path / "gallery"


def build(gallery: Path, key: str = "model", bad: str = "error",
          cache: Path | None = None) -> tuple[Index, int, list[str]]:
    """The index, how many images were encoded, the notices."""
    encoder, notices = Encoder(), []
    index = build_index(gallery, encoder, key, cache or gallery.parent / "cache", bad, notices.append)
    return index, encoder.encoded, notices


def entries(gallery: Path) -> list[Path]:
    return sorted((gallery.parent / "cache").iterdir())


def expect_right(index: Index, gallery: Path) -> None:
    names = sorted(str(p.relative_to(gallery)) for p in gallery.rglob("*.png"))
    assert index.paths == [name for name in names if name not in index.skipped]
    for path, row in zip(index.paths, index.features, strict=True):
        with Image.open(gallery / path) as image:
            assert tuple(row) == image.getpixel((0, 0))


def test_built_once_then_cached(gallery: Path) -> None:
    first, encoded, notices = build(gallery)
    assert (encoded, notices, first.cached, first.skipped) == (5, [], False, [])
    again, encoded, notices = build(gallery)
    assert (encoded, notices, again.cached) == (0, [], True)
    for index in (first, again):
        expect_right(index, gallery)
        assert index.features.dtype == np.float32 and isinstance(index.features, np.memmap)
    assert sorted(path.name for path in entries(gallery)[0].iterdir()) == ["features.npy", "files.json"]
    assert len(entries(gallery)) == 1


def test_search(gallery: Path) -> None:
    index, *_ = build(gallery)
    distances, rows = search(torch.tensor([[250.0, 10, 10], [255, 250, 255]]), index.features, 2)
    assert [[index.paths[i] for i in row] for row in rows.tolist()] == [
        ["red.png", "sub/deep/grey.png"], ["white.png", "sub/deep/grey.png"]]
    assert distances[:, 0].tolist() == [0.0, 5.0]
    assert Path(index.path(0)).samefile(gallery / "red.png")


@pytest.mark.parametrize("change", ["pixels", "pixels, size and times kept", "added", "removed", "renamed", "model",
                                    "moved"])
def test_a_stale_entry_is_never_used(gallery: Path, change: str) -> None:
    build(gallery)
    key, red, before = "model", gallery / "red.png", os.stat(gallery / "red.png")
    if change.startswith("pixels"):
        time.sleep(0.02)  # longer than a tick of the file system's clock
        paint(red, (251, 10, 10))
        if change != "pixels":
            assert os.stat(red).st_size == before.st_size
            os.utime(red, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "added":
        paint(gallery / "new.png", (1, 2, 3))
    elif change == "removed":
        red.unlink()
    elif change == "renamed":
        red.rename(gallery / "rouge.png")
    elif change == "model":
        key = "other model"
    else:
        gallery = gallery.rename(gallery.with_name("elsewhere"))
    index, encoded, _ = build(gallery, key)
    whole = change in ("model", "moved")
    assert not index.cached
    assert encoded == index.encoded == (5 if whole else 0 if change == "removed" else 1)
    expect_right(index, gallery)
    assert build(gallery, key)[0].cached
    assert len(entries(gallery)) == (2 if whole else 1)  # the entry of the state before is gone


def object_array(path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(path.parent.parent / "exploded"),)

    np.save(path, np.array([Bomb()], dtype=object), allow_pickle=True)


def changed(listing: Path, **changes: Callable) -> None:
    content = json.loads(listing.read_text())
    listing.write_text(json.dumps({**content, **{name: change(content[name]) for name, change in changes.items()}}))


def claim(features: Path, width: int) -> None:
    """A sparse file as large as its header says."""
    with open(features, "r+b") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (5, width)})
        file.truncate(10 ** 12)


DAMAGE = {
    "empty features": lambda f, j: f.write_bytes(b""),
    "truncated": lambda f, j: f.write_bytes(f.read_bytes()[:-4]),
    "flipped bit": lambda f, j: f.write_bytes(f.read_bytes()[:-1] + bytes([f.read_bytes()[-1] ^ 1])),
    "wrong header": lambda f, j: f.write_bytes(f.read_bytes().replace(b"(5, 3)", b"(9, 3)")),
    "other shape": lambda f, j: np.save(f, np.zeros((4, 3), np.float32)),
    "float64": lambda f, j: np.save(f, np.zeros((5, 3))),
    "pickle": lambda f, j: object_array(f),
    "missing features": lambda f, j: f.unlink(),
    "features are a FIFO": lambda f, j: (f.unlink(), os.mkfifo(f)),
    "empty list": lambda f, j: j.write_text(""),
    "half a list": lambda f, j: j.write_text(j.read_text()[:50]),
    "deep list": lambda f, j: j.write_text("[" * 100_000),
    "a number": lambda f, j: j.write_text("7"),
    "binary list": lambda f, j: j.write_bytes(b"\xff\xfe\x00"),
    "missing list": lambda f, j: j.unlink(),
    "the list is a FIFO": lambda f, j: (j.unlink(), os.mkfifo(j)),
    "other names": lambda f, j: j.write_text(j.read_text().replace("red.png", "rad.png")),
    "other order": lambda f, j: changed(j, files=lambda files: files[::-1]),
    "made-up skips": lambda f, j: changed(j, skipped=lambda skipped: [["x.png", 1, 2, 3]]),
    "nothing kept": lambda f, j: changed(j, files=lambda files: []),
    "a billion rows": lambda f, j: (claim(f, 10 ** 9), changed(j, width=lambda width: 10 ** 9)),
    "no width": lambda f, j: changed(j, width=lambda width: 0),
}
# Tried once more with a checksum that holds.
FORGED = ["empty features", "truncated", "wrong header", "other shape", "float64", "pickle", "nothing kept", "no width"]


@pytest.mark.parametrize(("damage", "forged"), [(name, False) for name in DAMAGE] + [(name, True) for name in FORGED])
def test_a_broken_entry_is_rebuilt_with_a_notice(gallery: Path, damage: str, forged: bool) -> None:
    build(gallery)
    features, listing = (entries(gallery)[0] / name for name in ("features.npy", "files.json"))
    DAMAGE[damage](features, listing)
    if forged:
        content = json.loads(listing.read_text())
        del content["crc32"]
        listing.write_text(json.dumps({**content, "crc32": index_module.checksum(content, features)}))
    index, encoded, notices = build(gallery)
    assert encoded == 5 and not index.cached
    assert len(notices) == 1 and "broken index" in notices[0] and "\n" not in notices[0]
    expect_right(index, gallery)
    assert len(entries(gallery)) == 1 and build(gallery)[0].cached
    assert not (gallery.parent / "cache" / "exploded").exists()


def test_mutated_entries_never_give_a_wrong_index(gallery: Path) -> None:
    """Whatever bytes change, the index is right, and each change of a byte that matters is noticed."""
    build(gallery)
    sound = {path.name: path.read_bytes() for path in entries(gallery)[0].iterdir()}
    rng, noticed = random.Random(0), 0
    for _ in range(100):
        name = rng.choice(sorted(sound))
        data = bytearray(sound[name])
        for _ in range(rng.choice([1, 1, 8])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (entries(gallery)[0] / name).write_bytes(data[:rng.choice([len(data), rng.randrange(len(data))])])
        index, _, notices = build(gallery)
        expect_right(index, gallery)
        noticed += len(notices)
        if not notices:
            (entries(gallery)[0] / name).write_bytes(sound[name])
    assert noticed > 90


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_unreadable_images(gallery: Path, content: bytes) -> None:
    for name in ("bad.png", "sub/worse.png"):
        (gallery / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"^2 of 7 images could not be read, the first is bad.png"):
        build(gallery)
    index, encoded, _ = build(gallery, bad="skip")
    assert index.cached and encoded == 0, "the readable images' features were not thrown away"
    assert index.skipped == ["bad.png", "sub/worse.png"]
    expect_right(index, gallery)
    with pytest.raises(ValueError, match="2 of 7 images"):  # nor does the cache hide the unreadable ones
        build(gallery)
    for name in COLOURS:
        (gallery / name).unlink()
    with pytest.raises(ValueError, match="2 of 2 images"):
        build(gallery, bad="skip")


def test_listing_takes_images_only(gallery: Path) -> None:
    (gallery / "notes.txt").write_text("x")
    (gallery / ".hidden.png").write_bytes(b"x")
    (gallery / ".git").mkdir()
    (gallery / ".git" / "a.png").write_bytes(b"x")
    (gallery / "folder.png").mkdir()
    os.mkfifo(gallery / "fifo.png")
    (gallery / "loop.png").symlink_to("loop.png")
    (gallery / "dangling.png").symlink_to("nowhere.png")
    (gallery / "UPPER.JPG").write_bytes(b"x")
    (gallery / "link.png").symlink_to("red.png")
    assert [name for name, *_ in list_images(str(gallery))] == sorted([*COLOURS, "UPPER.JPG", "link.png"])


def test_links_to_folders_are_followed_and_loops_refused(gallery: Path, tmp_path: Path) -> None:
    paint(tmp_path / "elsewhere" / "a.png", (1, 2, 3))
    (gallery / "once").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (gallery / "sub" / "twice").symlink_to("../once", target_is_directory=True)
    names = [name for name, *_ in list_images(str(gallery))]
    assert names == sorted([*COLOURS, "once/a.png", "sub/twice/a.png"])
    (tmp_path / "elsewhere" / "back").symlink_to(gallery / "sub", target_is_directory=True)
    with pytest.raises(ValueError, match="sub/twice/back.*leads back to a folder|once/back/twice.*leads back"):
        list_images(str(gallery))


def test_one_added_and_one_touched_of_6000_cost_two(tmp_path: Path) -> None:
    """The fake encoder's feature is a number that stands in the file."""
    gallery, calls = tmp_path / "gallery", []
    for i in range(6000):
        path = gallery / f"{i % 60}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(i))

    def encode(paths: list[str]) -> Iterator[tuple[range, Tensor]]:
        for start in range(0, len(paths), 100):
            part = range(start, min(start + 100, len(paths)))
            calls.extend(paths[i] for i in part)
            yield part, torch.tensor([[float(Path(paths[i]).read_text()), 1.0] for i in part])

    assert build_index(gallery, encode, "model", tmp_path / "cache").encoded == len(calls) == 6000
    calls.clear()
    (gallery / "7" / "7.png").unlink()
    (gallery / "8" / "8.png").write_text("-8")
    (gallery / "7" / "new.png").write_text("-7")
    index = build_index(gallery, encode, "model", tmp_path / "cache")
    assert index.encoded == 2 and sorted(calls) == [str(gallery / "7" / "new.png"), str(gallery / "8" / "8.png")]
    fresh = build_index(gallery, encode, "model", tmp_path / "fresh")
    assert fresh.encoded == 6000 and index.paths == fresh.paths and np.array_equal(index.features, fresh.features)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_what_stops_the_encoding_keeps_what_is_done(gallery: Path, stop: type[BaseException]) -> None:
    (gallery / "bad.png").write_bytes(b"no image")

    def encode(paths: list[str]) -> Iterator[tuple[list[int], Tensor]]:
        for n, batch in enumerate(Encoder()(paths)):
            if n == 2:
                raise stop
            yield batch

    with pytest.raises(stop):
        build_index(gallery, encode, "model", gallery.parent / "cache")
    assert len(entries(gallery)) == 1
    index, encoded, notices = build(gallery, bad="skip")
    assert (encoded, notices, index.skipped) == (1, [], ["bad.png"])  # an image that was not reached is not a bad one
    expect_right(index, gallery)
    assert len(entries(gallery)) == 1


def test_it_says_how_far_it_is(gallery: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "SAY_SECONDS", 0)
    _, _, notices = build(gallery)
    assert [line.split(",")[0] for line in notices] == [f"{done}/5 images encoded" for done in (1, 3, 5)]
    assert notices[-1].endswith("0m00s left") and "images/s" in notices[0]
    assert build(gallery)[2] == []


def test_an_unreadable_image_is_tried_again_when_it_changes(gallery: Path) -> None:
    (gallery / "bad.png").write_bytes(b"no image")
    tried: list[str] = []

    def encode(paths: list[str]) -> Iterator[tuple[list[int], Tensor]]:
        tried.extend(os.path.relpath(path, gallery) for path in paths)
        return Encoder()(paths)

    for change, expected in ((None, ["bad.png", *COLOURS]), (None, []), ("new", ["new.png"]), ("bad", ["bad.png"])):
        if change:
            paint(gallery / f"{change}.png", (1, 2, 3))
        index = build_index(gallery, encode, "model", gallery.parent / "cache", "skip")
        assert sorted(tried) == sorted(expected)
        assert index.skipped == ([] if change == "bad" else ["bad.png"])
        expect_right(index, gallery)
        tried.clear()


def test_an_entry_replaced_while_it_is_read_costs_nothing(gallery: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process puts a newer entry in its place between the listing of the cache and the reading."""
    build(gallery)
    paint(gallery / "new.png", (1, 2, 3))
    read, raced = index_module.read_entry, []

    def slow(folder: Path, digest: str) -> index_module.Entry:
        if not raced:
            raced.append(folder)
            assert build(gallery)[1] == 1
        return read(folder, digest)

    monkeypatch.setattr(index_module, "read_entry", slow)
    index, encoded, notices = build(gallery)
    assert (encoded, notices, index.cached) == (0, [], True) and not raced[0].exists()
    expect_right(index, gallery)


def test_an_index_in_use_survives_its_replacement(gallery: Path) -> None:
    index, *_ = build(gallery)
    before = np.array(index.features)
    paint(gallery / "new.png", (1, 2, 3))
    build(gallery)
    assert len(entries(gallery)) == 1 and np.array_equal(index.features, before)


def test_strange_names_survive(gallery: Path) -> None:
    names = [b"new\nline.png", b"back\\slash n.png", b"\xff\xfe.png", "\u96ea \u00e9.png".encode(), b"quote'\".png"]
    for i, name in enumerate(names):
        with open(os.path.join(os.fsencode(gallery), name), "wb") as file:
            Image.new("RGB", (4, 4), (i, i, i)).save(file, format="png")
    for cached in (False, True):
        index, _, _ = build(gallery)
        assert index.cached == cached and len(index.paths) == 10
        for i, name in enumerate(names):
            row = index.paths.index(os.fsdecode(name))
            assert index.features[row].tolist() == [i] * 3
            assert os.path.exists(index.path(row))
    text = index.export(gallery.parent / "vectors.npy").read_bytes()
    lines = text.split(b"\n")
    assert lines.pop() == b"" and len(lines) == 10
    unescaped = [line.replace(b"\\\\", b"\0").replace(b"\\n", b"\n").replace(b"\0", b"\\") for line in lines]
    assert unescaped == [os.fsencode(path) for path in index.paths]


def test_export(gallery: Path) -> None:
    index, *_ = build(gallery)
    names = index.export(gallery.parent / "out.npy")
    vectors = np.load(gallery.parent / "out.npy", allow_pickle=False)
    assert vectors.dtype == np.float32 and np.array_equal(vectors, index.features)
    assert names.name == "out.paths.txt" and names.read_text().splitlines() == index.paths
    with pytest.raises(ValueError, match="ending"):
        index.export(gallery.parent / "out.bin")
    with pytest.raises(WriteError, match="could not write"):
        index.export(gallery / "no such folder" / "out.npy")


def test_simultaneous_builds_all_end_right(gallery: Path) -> None:
    """Every builder is held in the middle of encoding until all are there, and all meet a broken entry before."""
    build(gallery)
    (entries(gallery)[0] / "features.npy").write_bytes(b"broken")
    barrier = threading.Barrier(4, timeout=20)

    def encode(paths: list[str]) -> Iterator[tuple[list[int], Tensor]]:
        for n, batch in enumerate(Encoder()(paths)):
            if n == 1:
                barrier.wait()
            yield batch

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(build_index, gallery, encode, "model", gallery.parent / "cache", "error", lambda line: None)
                for _ in range(4)]
        for job in jobs:
            expect_right(job.result(), gallery)
    assert all(not path.name.startswith(".") for path in entries(gallery))
    index, encoded, notices = build(gallery)
    assert (index.cached, encoded, notices) == (True, 0, [])


def test_a_build_that_fails_at_once_leaves_nothing(gallery: Path) -> None:
    with pytest.raises(ValueError, match="sub/blue.png: its features are not finite"):
        build_index(gallery, lambda paths: [(torch.tensor([1]), torch.tensor([[1.0, torch.nan, 0]]))], "model",
                    gallery.parent / "cache")
    assert entries(gallery) == []


def test_leftovers_of_killed_builds(gallery: Path) -> None:
    """A half-written folder is never read; it is removed once it is old, left to its owner before; the user's own stay."""
    build(gallery)
    cache, name = gallery.parent / "cache", entries(gallery)[0].name
    old, young, foreign, file = (cache / f".{name}.tmp" for name in (f"{name[:17]}aaaaaaa0", f"{name[:17]}aaaaaaa1",
                                                                     "my drafts", f"{name[:17]}aaaaaaa2"))
    for folder in (old, young, foreign):
        shutil.copytree(entries(gallery)[-1], folder / "entry")
    file.touch()
    for path in (*old.rglob("*"), old, *foreign.rglob("*"), foreign, file):
        os.utime(path, (1, 1))
    paint(gallery / "new.png", (9, 9, 9))
    index, encoded, _ = build(gallery)
    assert encoded == 1 and not old.exists() and young.exists() and foreign.exists() and file.exists()
    expect_right(index, gallery)


def test_a_users_folder_beside_the_entries_is_left_alone(gallery: Path) -> None:
    build(gallery)
    own = entries(gallery)[0].with_name(entries(gallery)[0].name + " backup")
    own.mkdir()
    name = entries(gallery)[0].name
    link = entries(gallery)[0].with_name(name[:-1] + ("a" if name.endswith("_") else "_"))
    link.symlink_to(gallery, target_is_directory=True)
    paint(gallery / "new.png", (9, 9, 9))
    index, encoded, notices = build(gallery)
    assert (encoded, notices) == (1, []) and own.exists() and link.is_symlink()
    expect_right(index, gallery)


def test_full_disk_and_blocked_cache(gallery: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (gallery.parent / "file").write_text("in the way")
    with pytest.raises(WriteError, match="could not write the index"):
        build(gallery, cache=gallery.parent / "file" / "cache")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "rename", "replace"):
        monkeypatch.setattr(os, name, full)
        with pytest.raises(WriteError, match="No space left"):
            build(gallery)
        assert entries(gallery) == []
        monkeypatch.undo()
    expect_right(build(gallery)[0], gallery)


@pytest.mark.parametrize("room", [20, 128 + 30, 128 + 60])
def test_a_write_that_fails_in_the_middle(gallery: Path, room: int) -> None:
    """A limit on the file's size, below its 188 bytes or the list's, acts like a full disk."""
    with files_of_at_most(room), pytest.raises(WriteError, match="could not write"):
        build(gallery)
    assert entries(gallery) == []


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        build(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images below"):
        build(tmp_path / "empty")
    with pytest.raises(ValueError, match='"error" or "skip"'):
        build(tmp_path / "empty", bad="ignore")
