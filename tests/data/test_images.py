"""Reading images of every kind, transforms, stroke inversion, processes that read, the domain-balanced order."""
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision import transforms

from ucdr_ref.cli import run_command
from ucdr_ref.clip.zero_shot import normalize, preprocess, resize_crop
from ucdr_ref.data import images as module
from ucdr_ref.data.images import (
    STATISTICS,
    Files,
    ImageDataset,
    augment,
    balanced_batches,
    is_strokes,
    load_batches,
    open_image,
)
from ucdr_ref.demo.drawing import draw


def saved(tmp_path, image: Image.Image, name: str, **options) -> str:
    path = str(tmp_path / name)
    image.save(path, **options)
    return path


def grey(*values: float, kind: type = np.uint16) -> Image.Image:
    return Image.fromarray(np.array([values] * 8, kind))


def test_every_kind_of_image_becomes_rgb(tmp_path):
    red = Image.new("RGB", (8, 8), (200, 0, 0))
    palette = red.convert("P")
    for name, image, options, expected in (
            ("palette.png", palette, {}, (200, 0, 0)), ("bits.png", Image.new("1", (8, 8), 1), {}, (255, 255, 255)),
            ("half.png", Image.new("LA", (8, 8), (0, 128)), {}, (127, 127, 127)),
            ("clear_palette.png", palette, {"transparency": palette.getpixel((0, 0))}, (255, 255, 255)),
            ("clear_rgb.png", Image.new("RGB", (8, 8), (9, 9, 9)), {"transparency": (9, 9, 9)}, (255, 255, 255)),
            ("print.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), {}, (255, 0, 0)),
            ("moving.gif", red, {"save_all": True, "append_images": [Image.new("RGB", (8, 8), (0, 0, 200))]}, (200, 0, 0)),
            ("plain.webp", red, {"lossless": True}, (200, 0, 0))):
        found = open_image(saved(tmp_path, image, name, **options))
        assert found.mode == "RGB" and found.size == (8, 8), name
        assert max(abs(a - b) for a, b in zip(found.getpixel((4, 4)), expected)) <= 6, (name, found.getpixel((4, 4)))


@pytest.mark.parametrize(("image", "expected"), [
    (grey(0, 25700, 65535), (0, 100, 255)), (grey(0, 0, 0), (0, 0, 0)), (grey(0, 70_000, 2 ** 17 - 1, kind=np.int32), (0, 136, 255)),
    (grey(-5, 0.5, 1, kind=np.float32), (0, 128, 255)), (grey(np.nan, 0.5, np.inf, kind=np.float32), (0, 255, 0))],
    ids=["short", "black", "int", "float", "not finite"])
def test_deep_grey_is_scaled_by_its_largest_value(image, expected, tmp_path):
    found = np.asarray(open_image(saved(tmp_path, image, "deep.tiff")))
    assert (found == found[:1, :, :1]).all() and tuple(found[0, :, 0].tolist()) == expected


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (8, 4), "white")
    image.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    found = open_image(saved(tmp_path, image, "turned.png", exif=exif))
    assert found.size == (4, 8) and found.getpixel((3, 0)) == (0, 0, 0)


@pytest.mark.parametrize("content", [
    b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40),
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"])
def test_what_is_no_image_is_named(tmp_path, content):
    (tmp_path / "broken.png").write_bytes(content)
    for name in ("broken.png", "absent.png", ""):
        with pytest.raises(ValueError, match=f"{name}: not a readable image"):
            open_image(str(tmp_path / name))


def test_truncated_images_and_those_of_too_many_pixels_are_errors(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.effect_noise((64, 64), 50), "cut.png")
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cut.png"):
        open_image(path)
    for size in ((1, 1001), (1001, 1)):  # its short side would become hundreds of pixels, and the long one with it
        with pytest.raises(ValueError, match="strip.png: .*a side is over 1000 times the other"):
            open_image(saved(tmp_path, Image.new("RGB", size), "strip.png"))
    assert open_image(saved(tmp_path, Image.new("RGB", (1, 1000)), "strip.png")).size == (1, 1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="big.png: not a readable image .*64 pixels"):
        open_image(saved(tmp_path, Image.new("RGB", (8, 8)), "big.png"))


def test_preprocess_equals_the_written_out_computation():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    resized = image.resize((48, 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32))
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    expected = ((np.asarray(resized) / 255 - mean) / std).transpose(2, 0, 1)
    assert np.abs(preprocess(32)(image).numpy() - expected).max() < 1e-5


def test_bytes_normalised_later_have_the_bits_of_torchvisions_chain():
    """Evaluation and training, with either normalisation (D4)."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 50, 60, 3), dtype=np.uint8)
    ramp = np.arange(256, dtype=np.uint8).repeat(12).reshape(1, 32, 32, 3).repeat(2, 1)  # every value of a byte
    images = [Image.fromarray(pixels) for pixels in (*noise, *ramp)]
    means = {"clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
             "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])}
    for transform in (resize_crop(32), augment(32)):
        for name, (mean, std) in means.items():
            before = transforms.Compose([*transform.transforms[:-1], transforms.ToTensor(),
                                         transforms.Normalize(mean, std)])
            expected = [(torch.manual_seed(i), before(image))[1] for i, image in enumerate(images)]
            pixels = [(torch.manual_seed(i), transform(image))[1] for i, image in enumerate(images)]
            assert all(part.dtype == torch.uint8 and part.shape == (3, 32, 32) for part in pixels)
            assert torch.equal(normalize(torch.stack(pixels), *STATISTICS[name]), torch.stack(expected))


# strokes

def test_inversion_by_the_look_or_by_the_folder(tmp_path):
    strokes, photo = Image.new("RGB", (64, 64), "white"), Image.effect_noise((64, 64), 60).convert("RGB")
    ImageDraw.Draw(strokes).line((8, 8, 50, 40), fill="black", width=3)
    paths = [saved(tmp_path, image, f"{i}.png") for i, image in enumerate((strokes, photo, strokes, photo))]
    files = Files(paths, ["x"] * 4, ["real", "sketches", "sketch", "SKETCH"])  # whatever the case of the folder
    for invert, expected in (("auto", [True, False, True, True]), ("domain", [False, False, True, True]),
                             ("none", [False] * 4)):
        data = ImageDataset(files, resize_crop(64), ("Sketch",), invert=invert)
        (_, images, inverted), = load_batches(data, [range(4)], 0)
        assert inverted.tolist() == expected
        for pixels, path, flag in zip(images, paths, expected):
            original = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
            assert torch.equal(pixels, 255 - original if flag else original)


def test_drawn_strokes_are_told_from_pictures():
    for domain in ("sketch", "quickdraw", "clipart", "infograph", "painting", "real"):
        flags = {is_strokes(draw(name, domain, 0)) for name in ("giraffe", "bus", "pear")}
        assert flags == {domain in ("sketch", "quickdraw")}, domain


# batches

def dataset(tmp_path, transform, seed=0) -> ImageDataset:
    paths = [saved(tmp_path, Image.new("RGB", (40, 40), (10 * i, 0, 0)), f"{i}.png") for i in range(4)]
    return ImageDataset(Files(paths, list("abab"), ["sketch", "real", "sketch", "real"]), transform, ("sketch",), seed)


def test_augmentation_follows_from_seed_and_index_alone(tmp_path, monkeypatch):
    """Arrays pass by a pipe: neither shared memory, often small, nor a temporary folder of a long name has a part in it."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("long" * 25)))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / ("long" * 25)).mkdir()
    data, again, other = (dataset(tmp_path, augment(32), seed) for seed in (1, 1, 2))
    torch.manual_seed(5)
    first, second = ({i: image for indices, images, _ in load_batches(part, batches, workers)
                      for i, image in zip(indices.tolist(), images)}
                     for part, batches, workers in ((data, [[3, 0, 2, 1]], 0), (again, [[0], [1, 2, 3]], 2)))
    assert all(torch.equal(first[i], second[i]) for i in range(4)) and type(data[0][1]) is np.ndarray
    assert not np.array_equal(first[1], other[1][1])


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_stop_or_are_left_out_and_listed(workers, tmp_path):
    data = dataset(tmp_path, resize_crop(32))
    (tmp_path / "1.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="1.png: not a readable image .*; replace or remove it"):
        list(load_batches(data, [[0, 1, 2]], workers))
    sentences: list[str] = []
    (indices, images, inverted), (none, _, _) = load_batches(data, [[0, 1, 2], [1]], workers, sentences)
    assert indices.tolist() == [0, 2] and len(images) == 2 and inverted.tolist() == [True, True] and len(none) == 0
    assert len(sentences) == 2 and "1.png: not a readable image" in sentences[0]


def stuck(image: Image.Image) -> torch.Tensor:
    if image.getpixel((0, 0))[0] == 30:
        time.sleep(600)  # as a read of a lost network folder
    return torch.zeros(3, 8, 8, dtype=torch.uint8)


def test_windows_has_no_signal_masks(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.new("RGB", (8, 8)), "a.png")
    monkeypatch.delattr(signal, "pthread_sigmask")
    monkeypatch.setattr(sys, "platform", "win32")
    [(indices, *_)] = load_batches(ImageDataset(Files([path], ["a"], ["b"]), resize_crop(8), ()), [[0]], 0)
    assert indices.tolist() == [0]


def test_a_stuck_reader_ends_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WAIT_SECONDS", 1)
    begin = time.monotonic()
    with pytest.raises(ValueError, match="timed out.*--workers 0.*--shm-size"):
        list(load_batches(dataset(tmp_path, stuck), [[0], [3]], 1))
    assert time.monotonic() - begin < 60


def test_a_reader_killed_in_a_step_is_one_line(tmp_path, capsys):
    def run(argv: object) -> None:
        for _ in load_batches(dataset(tmp_path, resize_crop(8)), [[0]] * 100, 1):
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(5)  # PyTorch's handler interrupts the step

    assert run_command(run, []) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: DataLoader worker") and error.count("\n") == 1


@pytest.mark.parametrize("sizes,batch", [((10, 20, 30), 9), ((5, 50), 20)])
def test_batches_are_balanced(sizes, batch):
    domain_ids = [domain for domain, size in enumerate(sizes) for _ in range(size)]
    groups = balanced_batches(domain_ids, batch, seed=3, epoch=0)
    share = min(batch // len(sizes), min(sizes))
    assert len(groups) == min(sizes) // share
    for group in groups:
        assert Counter(domain_ids[i] for i in group) == {domain: share for domain in range(len(sizes))}
    flat = [i for group in groups for i in group]
    assert len(flat) == len(set(flat))
    again = [balanced_batches(domain_ids, batch, seed, epoch) for seed, epoch in ((3, 0), (3, 1), (4, 0))]
    assert groups == again[0] and groups not in again[1:]
