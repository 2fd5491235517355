"""Reading images of every kind, transforms, stroke inversion, and the domain-balanced order."""
from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision import transforms

from ucdr_ref.bench import strokes
from ucdr_ref.clip.zero_shot import normalize, preprocess, resize_crop
from ucdr_ref.demo.drawing import write_dataset
from ucdr_ref.images.batches import (
    STATISTICS,
    Files,
    ImageDataset,
    augment,
    balanced_batches,
    chunks,
    is_strokes,
    load,
    open_image,
)
from ucdr_ref.machine.processes import fold

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def saved(tmp_path, image: Image.Image, name: str, **options) -> str:
    path = str(tmp_path / name)
    image.save(path, **options)
    return path


def test_every_kind_of_image_becomes_rgb(tmp_path):
    red = Image.new("RGB", (8, 8), (200, 0, 0))
    palette = red.convert("P")
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    clear_palette = red.convert("P")
    deep = Image.fromarray(np.full((8, 8), 51400, np.uint16))
    floating = Image.fromarray(np.full((8, 8), 0.5, np.float32))
    cases = {
        "palette.png": (palette, {}, (200, 0, 0)), "grey.png": (Image.new("L", (8, 8), 70), {}, (70, 70, 70)),
        "bits.png": (Image.new("1", (8, 8), 1), {}, (255, 255, 255)), "clear.png": (clear, {}, (255, 255, 255)),
        "half.png": (Image.new("LA", (8, 8), (0, 128)), {}, (127, 127, 127)),
        "clear_palette.png": (clear_palette, {"transparency": clear_palette.getpixel((0, 0))}, (255, 255, 255)),
        "clear_rgb.png": (Image.new("RGB", (8, 8), (9, 9, 9)), {"transparency": (9, 9, 9)}, (255, 255, 255)),
        "deep.png": (deep, {}, (200, 200, 200)), "deep.tiff": (deep, {}, (200, 200, 200)),
        "floating.tiff": (floating, {}, (128, 128, 128)),
        "print.jpg": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), {}, (255, 0, 0)),
        "moving.gif": (red, {"save_all": True, "append_images": [Image.new("RGB", (8, 8), (0, 0, 200))]}, (200, 0, 0)),
        "plain.webp": (red, {"lossless": True}, (200, 0, 0)),
    }
    for name, (image, options, expected) in cases.items():
        found = open_image(saved(tmp_path, image, name, **options))
        assert found.mode == "RGB" and found.size == (8, 8), name
        assert max(abs(a - b) for a, b in zip(found.getpixel((4, 4)), expected)) <= 6, (name, found.getpixel((4, 4)))


def at_once(image: Image.Image) -> Image.Image:
    """The same conversion of a whole image."""
    if image.mode == "F" or image.mode.startswith("I"):
        pixels = np.asarray(image, dtype=np.float64)
        scale = 1 / 257 if image.mode != "F" else 255.0 if pixels.max(initial=0) <= 1 else 1.0
        image = Image.fromarray((np.nan_to_num(pixels) * scale).clip(0, 255).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def test_tiles_make_the_same_image(tmp_path, monkeypatch):
    monkeypatch.setattr("ucdr_ref.images.batches.TILE", 16)
    random = np.random.default_rng(0)
    colour = Image.fromarray(random.integers(0, 256, (40, 50, 4), dtype=np.uint8), "RGBA")
    deep = Image.fromarray(random.integers(0, 2 ** 16, (40, 50), dtype=np.uint16))
    palette = colour.convert("RGB").convert("P")
    unit, wide, odd = random.random((40, 50), np.float32), *(random.normal(100, 90, (2, 40, 50)).astype(np.float32))
    unit[35, 45], odd[3, 4], odd[30, 40] = 1, np.nan, np.inf
    cases = {"rgba.png": colour, "la.png": colour.convert("LA"), "rgb.png": colour.convert("RGB"), "p.png": palette,
             "l.png": colour.convert("L"), "deep.png": deep, "deep.tiff": deep, "cmyk.tiff": colour.convert("CMYK"),
             "unit.tiff": Image.fromarray(unit), "wide.tiff": Image.fromarray(wide), "odd.tiff": Image.fromarray(odd),
             "big-endian.ppm": deep.convert("I"), "bits.png": colour.convert("1")}
    options = {"p.png": {"transparency": 3}, "rgb.png": {"transparency": (1, 2, 3)}}
    for name, image in cases.items():
        path = saved(tmp_path, image, name, **options.get(name, {}))
        with Image.open(path) as stored:
            expected = at_once(stored)
        assert np.array_equal(np.asarray(open_image(path)), np.asarray(expected)), name


def test_small_files_of_many_pixels_take_little_memory(tmp_path):
    """Eight bytes a pixel for what is read and what is returned, and some; in a process of its own."""
    cases = [((6000, 5000), "I;16", 30_000), ((100_000, 100), "I;16", 30_000), ((5000, 6000), "LA", (9, 128))]
    paths = [saved(tmp_path, Image.new(mode, size, colour), f"{i}.png", compress_level=1)
             for i, (size, mode, colour) in enumerate(cases)]
    code = ("import resource, sys; from ucdr_ref.images.batches import open_image\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "before = peak(); print(*(open_image(path).getpixel((0, 0))[0] for path in sys.argv[1:]), peak() - before)")
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, cwd=ROOT)
    *pixels, growth = map(int, done.stdout.split())
    assert pixels == [117, 117, 132], done.stderr
    assert growth * (1 if sys.platform == "darwin" else 1024) < 8 * 30e6 + 100e6


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (8, 4), "white")
    image.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    found = open_image(saved(tmp_path, image, "turned.png", exif=exif))
    assert found.size == (4, 8) and found.getpixel((3, 0)) == (0, 0, 0)


def test_as_is_neither_turns_nor_composites(tmp_path):
    image = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    image.putpixel((0, 0), (200, 0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path, image, "turned.png", exif=exif)
    found = open_image(path, as_is=True)  # D19
    assert found.size == (8, 4) and found.getpixel((0, 0)) == (200, 0, 0) and found.getpixel((5, 2)) == (0, 0, 0)
    assert open_image(path).size == (4, 8) and open_image(path).getpixel((1, 5)) == (255, 255, 255)
    data = ImageDataset(Files([path], ["a"], ["real"]), lambda image: torch.tensor(image.size), (), as_is=True)
    assert data[0][1].tolist() == [8, 4]


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_broken_images_are_named(tmp_path, content):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="broken.png: not a readable image"):
        open_image(str(path))


def test_folders_pipes_and_absent_files_are_not_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for name in ("", "pipe.png", "loop.png", "absent.png"):
        with pytest.raises(ValueError, match="not a readable image"):
            open_image(str(tmp_path / name))


def test_postscript_is_never_interpreted(tmp_path):
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match="script.png.*cannot identify"):
        open_image(str(tmp_path / "script.png"))


def test_truncated_image_is_an_error_and_a_bomb_too(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.effect_noise((64, 64), 50), "cut.png")
    content = open(path, "rb").read()
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cut.png"):
        open_image(path)
    for size in ((1, 1001), (1001, 1)):  # its short side would become hundreds of pixels, and the long one with it
        with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels: one side is more than 1000 times"):
            open_image(saved(tmp_path, Image.new("RGB", size), "strip.png"))
    assert open_image(saved(tmp_path, Image.new("RGB", (1, 1000)), "strip.png")).size == (1, 1000)
    monkeypatch.setattr("ucdr_ref.images.batches.MAX_PIXELS", 10)
    with pytest.raises(ValueError, match="8 x 8 pixels"):
        open_image(saved(tmp_path, Image.new("RGB", (8, 8)), "big.png"))


def test_preprocess_equals_the_written_out_computation():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    resized = image.resize((48, 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32))
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    expected = ((np.asarray(resized) / 255 - mean) / std).transpose(2, 0, 1)
    assert np.abs(preprocess(32)(image).numpy() - expected).max() < 1e-5


def test_bytes_normalised_later_have_the_bits_of_torchvisions_chain():
    """Evaluation and training, in batches and one by one, with either normalisation (D4)."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 50, 60, 3), dtype=np.uint8)
    ramp = np.arange(256, dtype=np.uint8).repeat(12).reshape(1, 32, 32, 3).repeat(2, 1)  # every value of a byte
    images = [Image.fromarray(pixels) for pixels in (*noise, *ramp)]
    means = {"clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
             "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])}
    for transform in (resize_crop(32), augment(32)):
        for name, (mean, std) in means.items():
            before = transforms.Compose([*transform.transforms[:-1], transforms.ToTensor(),
                                         transforms.Normalize(mean, std)])
            seeded = [(torch.manual_seed(i), before(image))[1] for i, image in enumerate(images)]
            pixels = [(torch.manual_seed(i), transform(image))[1] for i, image in enumerate(images)]
            assert all(part.dtype == torch.uint8 and part.shape == (3, 32, 32) for part in pixels)
            found = normalize(torch.stack(pixels), *STATISTICS[name])
            assert found.is_contiguous() and torch.equal(found, torch.stack(seeded))
            assert torch.equal(normalize(pixels[0], *STATISTICS[name]), seeded[0])
    assert torch.equal(preprocess(32)(images[0]), normalize(resize_crop(32)(images[0])))
    assert preprocess(32)(images[0]).is_contiguous()


def test_normalising_leaves_its_argument_alone():
    images = torch.full((1, 3, 2, 2), 7.0)
    normalize(images)
    assert torch.equal(images, torch.full((1, 3, 2, 2), 7.0))


def dataset(tmp_path, transform, seed=0) -> ImageDataset:
    images = [Image.new("RGB", (40, 40), (10 * i, 0, 0)) for i in range(4)]
    paths = [saved(tmp_path, image, f"{i}.png") for i, image in enumerate(images)]
    return ImageDataset(Files(paths, list("abab"), ["sketch", "real", "sketch", "real"]), transform, ("sketch",), seed)


def test_stroke_domains_are_inverted_and_others_are_not(tmp_path):
    data = dataset(tmp_path, lambda image: torch.tensor(image.getpixel((0, 0))))
    assert [data[i][1].tolist() for i in range(4)] == [[255, 255, 255], [10, 0, 0], [235, 255, 255], [30, 0, 0]]


def test_inversion_by_look_or_by_word_is_reported(tmp_path):
    sketch, photo = Image.new("RGB", (64, 64), "white"), Image.effect_noise((64, 64), 60).convert("RGB")
    ImageDraw.Draw(sketch).line((8, 8, 50, 40), fill="black", width=3)
    files = Files([saved(tmp_path, sketch, "a.png"), saved(tmp_path, photo, "b.png")], ["x"] * 2, ["real", "sketch"])
    for invert, expected in (("auto", [True, False]), ("yes", [True, True]), ("no", [False, False]),
                             ("domain", [False, True])):
        data = ImageDataset(files, resize_crop(64), ("sketch",), invert=invert)
        (_, images, inverted), = load(data, [[0, 1]], 0, False, CPU)
        assert inverted.tolist() == expected
        for pixels, plain, flag in zip(images, (sketch, photo), expected):
            plain = torch.from_numpy(np.array(plain)).permute(2, 0, 1)
            assert torch.equal(pixels, 255 - plain if flag else plain)
    with pytest.raises(ValueError, match="invert 'maybe'"):
        ImageDataset(files, resize_crop(64), (), invert="maybe")


def test_drawn_strokes_are_told_from_pictures(tmp_path, capsys):
    write_dataset(tmp_path, per_class=1)
    strokes.main(["--data", str(tmp_path)])
    assert "| images | 60 | 60 | 60 | 60 | 60 | 60 |" in capsys.readouterr().out
    share = strokes.taken_for_strokes(tmp_path)
    assert share.keys() == {"sketch", "quickdraw", "clipart", "infograph", "painting", "real"}
    for domain, (_, value) in share.items():
        assert value >= 0.93 if domain in ("sketch", "quickdraw") else value <= 0.02, (domain, value)


@pytest.mark.skipif(not os.environ.get("UCDR6"), reason="set UCDR6 to the folder of that data set")
def test_real_strokes_are_told_from_pictures():
    """Thin black icons and clip art in outlines are ambiguous: nobody could tell them from a neat sketch."""
    share = strokes.taken_for_strokes(Path(os.environ["UCDR6"]))
    most = {"photo": 0.005, "render3d": 0.01, "clipart": 0.08, "icon": 0.12}
    for domain, (_, value) in share.items():
        assert value >= 0.99 if domain in ("sketch", "quickdraw") else value <= most[domain], (domain, value)


def test_light_strokes_on_a_dark_ground_stay(tmp_path):
    for ink, paper, expected in (("black", "white", True), ("white", "black", False), ("grey", "white", False),
                                 ("red", "white", False), ("white", "white", False)):
        image = Image.new("RGB", (200, 150), paper)
        ImageDraw.Draw(image).line((20, 20, 150, 120), fill=ink, width=5)
        assert is_strokes(image) == expected, (ink, paper)


def test_augmentation_follows_from_seed_and_index_alone(tmp_path):
    data, again, other = (dataset(tmp_path, augment(32), seed) for seed in (1, 1, 2))
    order = [3, 0, 2, 1]
    torch.manual_seed(5)
    first, second = ({i: image for indices, images, _ in load(part, batches, workers, False, CPU)
                      for i, image in zip(indices.tolist(), images)}
                     for part, batches, workers in ((data, [order], 0), (again, [[0], [1, 2, 3]], 2)))
    assert all(torch.equal(first[i], second[i]) for i in range(4))
    assert not torch.equal(first[1], other[1][1])
    assert first[0].dtype == torch.uint8  # what crosses from process to process is a byte a value


def test_unreadable_images_stop_or_are_left_out(tmp_path, capsys):
    data = dataset(tmp_path, preprocess(32))
    (tmp_path / "1.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="1.png"):
        list(load(data, [[0, 1, 2]], 0, False, CPU))
    (indices, images, inverted), = load(data, [[0, 1, 2]], 0, True, CPU)
    assert indices.tolist() == [0, 2] and len(images) == 2 and inverted.tolist() == [True, True]
    (indices, _, inverted), = load(data, [[1]], 0, True, CPU)
    assert len(indices) == len(inverted) == 0
    assert "1.png" in capsys.readouterr().err


@pytest.mark.parametrize("sizes,batch", [((10, 20, 30), 9), ((7, 7), 2), ((5, 50), 20), ((40, 41, 42, 43), 50)])
def test_batches_are_balanced_and_as_many_as_the_smallest_domain_allows(sizes, batch):
    domain_ids = [domain for domain, size in enumerate(sizes) for _ in range(size)]
    groups = balanced_batches(domain_ids, batch, seed=3, epoch=0)
    share = min(batch // len(sizes), min(sizes))
    assert len(groups) == min(sizes) // share
    for group in groups:
        assert Counter(domain_ids[i] for i in group) == {domain: share for domain in range(len(sizes))}
    flat = [i for group in groups for i in group]
    assert len(flat) == len(set(flat))
    assert groups == balanced_batches(domain_ids, batch, seed=3, epoch=0)
    assert groups != balanced_batches(domain_ids, batch, seed=3, epoch=1)
    assert groups != balanced_batches(domain_ids, batch, seed=4, epoch=0)


def test_a_batch_must_hold_every_domain():
    with pytest.raises(ValueError, match="batch of 2 cannot hold the 3 source domains"):
        balanced_batches([0, 1, 2, 0, 1, 2], 2, 0, 0)


def test_small_helpers(tmp_path):
    assert [list(part) for part in chunks(5, 2)] == [[0, 1], [2, 3], [4]]
    assert fold(0, "a", 1) != fold(0, "a", 2) and fold(0, "a", 1) == fold(0, "a", 1) < 2 ** 63
    files = Files(["r/x.png", "r/y.png"], ["a", "b"], ["s", "s"])
    assert (files + files).keep([3]) == Files(["r/y.png"], ["b"], ["s"])
    assert files.digest("r") != files.keep([1, 0]).digest("r")
