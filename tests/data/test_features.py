"""The method's feature is the mean colour of an image, so a row can be told by looking at the file."""
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ucdr_ref.cli import load_state
from ucdr_ref.clip.zero_shot import CLIP_MEAN, CLIP_STD
from ucdr_ref.config import Config
from ucdr_ref.data import features as module
from ucdr_ref.data.features import FeatureCache, Index, load_index, stream_features
from ucdr_ref.data.folders import list_images
from ucdr_ref.data.images import Files

COLOURS = {"red.png": (250, 10, 10), "sub/green.png": (10, 250, 10), "sub/blue.png": (10, 10, 250),
           "sub/deep/grey.png": (128, 128, 128), "white.png": (255, 255, 255)}
MEAN, STD = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)


def paint(path: Path, colour: tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path, format="png")


class MeanColour:
    """Counts what it encodes; `before` is called with the number of images before each batch."""

    def __init__(self, before: Callable[[int], object] = lambda encoded: None) -> None:
        self.encoded, self.before = 0, before
        self.clip = SimpleNamespace(image_size=4, visual=SimpleNamespace(proj=torch.zeros(1)))

    def encode(self, images: Tensor) -> Tensor:
        self.before(self.encoded)
        self.encoded += len(images)
        return 255 * (images.mean(dim=(2, 3)) * STD + MEAN)


def inputs(method: MeanColour | None = None, strokes: tuple[str, ...] = ()) -> tuple[MeanColour, Config]:
    return method or MeanColour(), Config(workers=0, stroke_domains=strokes)


@pytest.fixture
def gallery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "EVAL_BATCH", 2)
    for name, colour in COLOURS.items():
        paint(tmp_path / "gallery" / name, colour)
    return tmp_path / "gallery"


def build(gallery: Path, key: str = "model", method: MeanColour | None = None, **more: object) -> tuple[Index, int]:
    """The index, and how many images were encoded."""
    method = method or MeanColour()
    index = load_index(gallery, *inputs(method), key, gallery.parent / "cache", **more)
    assert index.encoded == method.encoded
    return index, method.encoded


def expect_right(index: Index, gallery: Path, names: list[str] | None = None) -> None:
    assert index.paths == sorted(names or [str(p.relative_to(gallery)) for p in gallery.rglob("*.png")])
    assert index.features.dtype == torch.float32 and len(index.features) == len(index.paths) == len(index.inverted)
    for i, row in enumerate(index.features):
        with Image.open(index.path(i)) as image:
            assert row.tolist() == pytest.approx(image.getpixel((0, 0)), abs=1e-3)


def test_a_signal_at_the_readers_end_is_heard(gallery, monkeypatch):
    end, struck = _MultiProcessingDataLoaderIter._shutdown_workers, []

    def strike(loaded: object) -> None:
        end(loaded)
        struck.append(True)
        if struck == [True]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_MultiProcessingDataLoaderIter, "_shutdown_workers", strike)
        list(stream_features(MeanColour(), Config(workers=1), Files([str(gallery / "red.png")], ["a"], ["a"])))


@pytest.mark.parametrize("change,again", [("pixels", 1), ("pixels, size and times kept", 1), ("removed", 0), ("renamed", 1), ("model", 5),
                                          ("moved", 5)])
def test_what_changed_is_encoded_again(gallery, change, again):
    assert build(gallery)[1] == 5
    key, red, before = "model", gallery / "red.png", os.stat(gallery / "red.png")
    if change.startswith("pixels"):
        time.sleep(0.02)  # longer than a tick of the file system's clock
        paint(red, (251, 10, 10))
        if change != "pixels":
            assert os.stat(red).st_size == before.st_size
            os.utime(red, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "removed":
        red.unlink()
    elif change == "renamed":
        red.rename(gallery / "rouge.png")
    elif change == "model":
        key = "other model"
    else:
        gallery = gallery.rename(gallery.with_name("elsewhere"))
    for expected in (again, 0):
        index, encoded = build(gallery, key)
        assert encoded == expected
        expect_right(index, gallery)
    assert len([*(gallery.parent / "cache").iterdir()]) == (2 if again == 5 else 1)


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: content[:len(content) // 2], lambda content: content.replace(b"red.png", b"\0ed.png")])
def test_a_broken_file_is_made_anew_with_a_notice(gallery, damage, capsys):
    build(gallery)
    path, = (gallery.parent / "cache").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    index, encoded = build(gallery)
    assert encoded == 5 and capsys.readouterr().err.count("broken index;") == 1
    expect_right(index, gallery)
    assert build(gallery)[1] == 0


def test_unreadable_images_are_left_out_and_listed(gallery):
    for name in ("bad.png", "sub/worse.png"):
        (gallery / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match="bad.png: not a readable image .*; replace or remove it"):
        build(gallery)
    for expected in (5, 0):
        unreadable: list[str] = []
        index, encoded = build(gallery, unreadable=unreadable)
        assert encoded == expected and len(unreadable) == 2
        assert f"{gallery}/bad.png: not a readable image (" in unreadable[0]
        expect_right(index, gallery, [*COLOURS])
    paint(gallery / "bad.png", (7, 7, 7))
    assert build(gallery, unreadable=[])[1] == 1
    for name in COLOURS:
        (gallery / name).unlink()
    (gallery / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the 2 images below .*gallery is readable"):
        build(gallery, unreadable=[])


def test_what_was_encoded_survives_an_interruption_and_is_saved_before(gallery, monkeypatch):
    monkeypatch.setattr(module, "SAVE_SECONDS", 0)
    saved = []

    def stop(encoded: int) -> None:
        saved.extend(len(load_state(path)["rows"]) for path in (gallery.parent / "cache").glob("*.pt"))
        if encoded == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_index(gallery, *inputs(MeanColour(stop)), "model", gallery.parent / "cache")
    assert saved[0] < 4
    index, encoded = build(gallery)
    assert encoded == 1
    expect_right(index, gallery)


def test_files_left_out_are_not_read_and_stay_in_the_file(gallery):
    (gallery / "sub" / "bad.png").write_bytes(b"no image")
    some = [file for file in list_images(str(gallery)) if not file[0].startswith("sub")]
    index, encoded = build(gallery, files=some)
    assert encoded == 2
    expect_right(index, gallery, ["red.png", "white.png"])
    assert build(gallery, unreadable=[])[1] == 3 and build(gallery, files=some)[1] == 0


def test_folders_below_the_root_tell_strokes(tmp_path):
    """And none above it: a source below `.../sketch/` was inverted."""
    root = tmp_path / "sketch" / "source"
    names = ["Sketch/a/1.png", "cow/quickdraw/2.png", "cow/sketch.png", "sketches.png"]
    for name in names:
        paint(root / name, (10, 20, 30))
    index = load_index(root, *inputs(strokes=("sketch", "quickdraw", "sketches")), "m", tmp_path / "cache")
    assert index.paths == names and index.inverted.tolist() == [True, True, False, False]
    expected = [[245.0, 235, 225] if flag else [10.0, 20, 30] for flag in index.inverted]
    torch.testing.assert_close(index.features, torch.tensor(expected), rtol=0, atol=1e-3)


def test_strange_names_survive(gallery):
    names = [b"new\nline.png", b"back\\slash n.png", "\u96ea \u00e9.png".encode(), b"caf\xe9/quote'\".png"]
    (gallery / os.fsdecode(b"caf\xe9")).mkdir()
    for i, name in enumerate(names):
        with open(os.path.join(os.fsencode(gallery), name), "wb") as file:
            Image.new("RGB", (4, 4), (i, i, i)).save(file, format="png")
    for expected in (9, 0):
        index, encoded = build(gallery)
        assert encoded == expected and set(map(os.fsdecode, names)) <= set(index.paths)
        expect_right(index, gallery)


# in memory

def test_each_file_is_encoded_once_whatever_lists_it_is_in(gallery):
    paths = [str(gallery / name) for name in COLOURS]
    files = Files(paths, ["x"] * 5, ["sketch"] + ["real"] * 4)
    method = MeanColour()
    cache = FeatureCache(*inputs(method, ("sketch",)))
    first, rest = cache.encode(files.keep([0, 2])), cache.encode(files.keep([4, 0, 1]))
    assert method.encoded == 4
    expected = torch.tensor([[5.0, 245, 245], [10, 10, 250], [255, 255, 255], [5, 245, 245], [10, 250, 10]])
    torch.testing.assert_close(torch.cat([first, rest]), expected, rtol=0, atol=1e-3)
