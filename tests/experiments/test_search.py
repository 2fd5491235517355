"""retrieve.py from folders, paths and texts to answers: right ones, kept ones, and ones that say what was done."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import retrieve
import train
from tests.helpers import flags, refused, tiny_state_dict
from ucdr_ref.clip import load_clip, preprocess, tokenize
from ucdr_ref.images.features import Extractor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train.main(flags(world, folder)) == 0
    return folder


@pytest.fixture
def ask(capsys, tmp_path):
    """retrieve.py's JSON; indexes lie in the test's own folder."""
    def answer(*call: object) -> dict:
        capsys.readouterr()
        given = [str(part) for part in call]
        assert retrieve.main([*given, "--workers", "0", "--cache", str(tmp_path / "cache"), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return answer


def features(clip, paths: list[Path], invert: set[Path] = frozenset()) -> torch.Tensor:
    """Normalised features [n, e], image by image."""
    rows = []
    for path in paths:
        with Image.open(path) as image:
            image = image.convert("RGB")
        image = ImageOps.invert(image) if path in invert else image
        rows.append(F.normalize(clip.encode_image(preprocess(32)(image)[None]), dim=1)[0])
    return torch.stack(rows).detach()


def by_distance(query: torch.Tensor, gallery: torch.Tensor, paths: list[Path]) -> tuple[list[str], list[float]]:
    distances = (gallery.double() - query.double()).norm(dim=1)
    order = distances.argsort().tolist()
    return [str(paths[i]) for i in order], distances[order].tolist()


def expect_order(answer: dict, query: torch.Tensor, gallery: torch.Tensor, paths: list[Path]) -> None:
    names, distances = by_distance(query, gallery, paths)
    hits = answer["results"]
    assert [hit["path"] for hit in hits] == names[: len(hits)]
    assert [hit["distance"] for hit in hits] == pytest.approx(distances[: len(hits)], abs=1e-4)


def test_weights_alone_are_zero_shot_clip(world, ask, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    clip, paths = load_clip(world / "clip.pt"), sorted((world / "data/photo").rglob("*.png"))
    queries = sorted((world / "data/icon/shape_4").iterdir())
    gallery, asked = features(clip, paths), features(clip, queries)
    call = ("--weights", world / "clip.pt", "--gallery", world / "data/photo", "--k", "7")
    answer = ask(*call, "--query", *queries)
    assert answer["model"] == f"zero-shot CLIP of {world / 'clip.pt'}" and answer["centred"] == ""
    for found, query in zip(answer["queries"], asked, strict=True):
        expect_order(found, query, gallery, paths)
    texts = ["a red bus", "a photo of a hexagon"]
    found = ask(*call, "--text", *texts)["queries"]
    encoded = F.normalize(clip.encode_text(tokenize(texts)), dim=1).detach()
    for text, query, answer in zip(texts, encoded, found, strict=True):
        assert (answer["query"], answer["kind"]) == (text, "text")
        expect_order(answer, query, gallery, paths)
    assert retrieve.main([*map(str, call), "--text", "x", "--workers", "0"]) == 0
    assert (tmp_path / "runs" / "index").is_dir()  # below the current folder


def test_centring_removes_the_means_it_names(world, ask):
    clip, paths = load_clip(world / "clip.pt"), sorted((world / "data/photo").rglob("*.png"))
    icons = sorted((world / "data/icon").rglob("*.png"))
    gallery, like = features(clip, paths), features(clip, icons)
    moved = F.normalize(gallery - gallery.mean(0), dim=1)
    call = ("--weights", world / "clip.pt", "--gallery", world / "data/photo", "--k", "5", "--center")
    one = ask(*call, "--query", icons[3], "--queries-like", world / "data/icon")
    assert one["centred"] == f"the gallery less its mean; query images less the mean of 48 images in {world / 'data/icon'}"
    expect_order(one["queries"][0], F.normalize(like[3] - like.mean(0), dim=0), moved, paths)
    five = ask(*call, "--query", *icons[:5])
    assert five["centred"].endswith("query images less the mean of these 5")
    for found, row in zip(five["queries"], like, strict=False):
        expect_order(found, F.normalize(row - like[:5].mean(0), dim=0), moved, paths)
    texts = [f"a photo of a {name}" for name in ("bus", "cat", "shape", "square", "red star")]
    encoded = F.normalize(clip.encode_text(tokenize(texts)), dim=1).detach()
    found = ask(*call, "--text", *texts)
    for answer, row in zip(found["queries"], encoded, strict=True):
        expect_order(answer, F.normalize(row - encoded.mean(0), dim=0), moved, paths)


def test_a_trained_adapter_is_searched_by_text(run, world, ask):
    clip = load_clip(world / "clip.pt")
    found = ask("--run", run, "--gallery", world / "data/photo", "--text", "a red bus", "--k", "48")["queries"][0]
    assert len({hit["path"] for hit in found["results"]}) == 48
    shown = ask("--run", run, "--gallery", world / "data/photo", "--query", found["results"][0]["path"], "--k", "1")
    assert shown["queries"][0]["results"][0]["distance"] == pytest.approx(0, abs=1e-3)
    from ucdr_ref.experiments.experiment import restore
    method = restore(run, {}, torch.device("cpu"))[1]
    with Image.open(found["results"][0]["path"]) as image:
        row = method.encode(preprocess(32)(image.convert("RGB"))[None])[0]
    text = F.normalize(clip.encode_text(tokenize(["a red bus"])), dim=1)[0]
    assert found["results"][0]["distance"] == pytest.approx(float((row - text).norm()), abs=1e-4)


def test_what_cannot_be_searched_is_refused_in_one_sentence(run, world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def no(*call: object, says: tuple[str, ...]) -> None:
        refused(capsys, retrieve.main([*map(str, call), "--workers", "0", "--cache", str(tmp_path / "cache")]), *says)

    photos, query = world / "data/photo", world / "data/icon/shape_4/0.png"
    here = ("--weights", world / "clip.pt", "--gallery", photos)
    no("--gallery", photos, "--query", query, says=("no --run was given", "train first: python train.py"))
    no("--weights", world / "clip.pt", "--query", query, says=("--gallery DIR",))
    no("--run", run, "--query", query, says=("--gallery DIR",))
    no(*here, says=("nothing to do", "--text"))
    no(*here, "--center", "--query", query, says=("--queries-like DIR", "got 1"))
    no(*here, "--query", query, "--queries-like", photos, says=("--queries-like", "needs --center as well"))
    no(*here, "--center", "--text", "a", "b", says=("--center needs 5 texts", "got 2"))
    no(*here, "--center", "--query", query, "--queries-like", tmp_path / "no", says=("no such folder",))
    tower = {key: value for key, value in tiny_state_dict().items() if key.startswith("visual.")}
    torch.save(tower, tmp_path / "tower.pt")
    no("--weights", tmp_path / "tower.pt", "--gallery", photos, "--text", "a", says=("image tower alone",))
    for name, more in (("form", ("--method", "closed-form")), ("raw", ("--evaluation-features", "raw"))):
        assert train.main(flags(world, tmp_path / name, *more)) == 0
        no("--run", tmp_path / name, "--gallery", photos, "--text", "a", says=("--text cannot search", name))


def test_a_search_with_other_weights_leaves_the_index_alone(run, world, tmp_path, ask):
    torch.save(tiny_state_dict(7), tmp_path / "other.pt")
    call = ("--run", run, "--gallery", world / "data/photo", "--query", world / "data/sketch/shape_4/0.png")
    before = ask(*call)
    other = ask(*call, "--weights", tmp_path / "other.pt", "--other-weights")
    assert before["encoded"] == other["encoded"] == 48 and before["queries"] != other["queries"]
    after = ask(*call)
    assert (after["encoded"], after["cached"], after["queries"]) == (0, 48, before["queries"])
    for more in (("--precision", "bf16"), ("--invert-gallery", "yes")):
        assert ask(*call, *more)["encoded"] == 48, more


def scribbles(root: Path, count: int, size: int = 32) -> Path:
    for i in range(count):
        path = root / str(i % 20) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (8, 8), Random(i).randbytes(192)).resize((size, size)).save(path)
    return root


@pytest.mark.parametrize("count", [600, pytest.param(6000, marks=pytest.mark.slow)])
def test_only_new_and_touched_images_are_encoded(count, world, tmp_path, ask):
    gallery = scribbles(tmp_path / "gallery", count)
    call = ("--weights", world / "clip.pt", "--gallery", gallery, "--query", gallery / "3/3.png", "--k", "50")
    assert ask(*call)["encoded"] == count
    (gallery / "4" / "4.png").unlink()
    Image.new("RGB", (20, 20), "red").save(gallery / "5" / "5.png")
    Image.new("RGB", (20, 20), "blue").save(gallery / "5" / "new.png")
    (gallery / "6" / "broken.png").write_bytes(b"no image")
    found = ask(*call, "--bad-images", "skip")
    parts = [found[name] for name in ("images", "encoded", "cached", "skipped")]
    assert parts == [count, 2, count - 2, 1] and found["unreadable"] == [str(Path("6", "broken.png"))]
    fresh = ask(*call, "--bad-images", "skip", "--cache", tmp_path / "fresh")["queries"][0]["results"]
    ours = found["queries"][0]["results"]
    assert [hit["path"] for hit in ours] == [hit["path"] for hit in fresh]
    assert [hit["distance"] for hit in ours] == pytest.approx([hit["distance"] for hit in fresh], abs=1e-4)


def test_ctrl_c_keeps_what_is_encoded(world, tmp_path, ask, monkeypatch, capsys):
    whole, left = Extractor.stream, 3

    def stream(*arguments):
        for number, batch in enumerate(whole(*arguments)):
            if number == left:
                raise KeyboardInterrupt
            yield batch

    call = ("--weights", world / "clip.pt", "--gallery", world / "data/photo", "--text", "a", "--eval-batch", "10")
    monkeypatch.setattr(Extractor, "stream", stream)
    assert retrieve.main([*map(str, call), "--workers", "0", "--cache", str(tmp_path / "cache")]) == 130
    assert "run the same command to go on" in capsys.readouterr().err
    monkeypatch.undo()
    found = ask(*call)
    assert (found["encoded"], found["cached"]) == (18, 30)


def test_inversion_is_told_and_asked_for(world, tmp_path, ask, capsys):
    clip, photos = load_clip(world / "clip.pt"), sorted((world / "data/photo").rglob("*.png"))
    sketch, icon = (Image.new("RGB", (64, 64), "white") for _ in range(2))
    for x in range(12, 52):
        sketch.putpixel((x, x), (0, 0, 0))
        sketch.putpixel((x, 63 - x), (0, 0, 0))
        icon.paste((220, 0, 0), (20, x, 40, x + 1))
    (tmp_path / "mixed").mkdir()
    strokes, coloured = tmp_path / "mixed" / "strokes.png", tmp_path / "mixed" / "coloured.png"
    sketch.save(strokes)
    icon.save(coloured)
    call = ("--weights", world / "clip.pt", "--gallery", world / "data/photo", "--query", strokes, coloured)
    gallery = features(clip, photos)
    for mode, inverted in (("auto", {strokes}), ("yes", {strokes, coloured}), ("no", set())):
        found = ask(*call, "--invert-query", mode)
        assert [answer["inverted"] for answer in found["queries"]] == [path in inverted for path in (strokes, coloured)]
        for answer, row in zip(found["queries"], features(clip, [strokes, coloured], inverted), strict=True):
            expect_order(answer, row, gallery, photos)
    for mode, count in (("auto", 1), ("yes", 2), ("no", 0)):
        found = ask("--weights", world / "clip.pt", "--gallery", tmp_path / "mixed", "--query", strokes,
                    "--invert-gallery", mode, "--out", tmp_path / f"{mode}.png")
        assert found["inverted"] == count == sum(hit["inverted"] for hit in found["queries"][0]["results"])
    assert found["queries"][0]["inverted"]
    with Image.open(tmp_path / "auto.png") as auto, Image.open(tmp_path / "no.png") as plain:
        cell = slice(10, 100), slice(120, 214)  # the first result
        assert np.asarray(auto.convert("L"))[cell].mean() < 60 < 200 < np.asarray(plain.convert("L"))[cell].mean()
    capsys.readouterr()
    assert retrieve.main([*map(str, call), str(coloured), "--workers", "0", "--cache", str(tmp_path / "cache")]) == 0
    text = capsys.readouterr().out
    assert f"{strokes} (inverted)\n" in text and f"{coloured}\n" in text


def test_a_run_that_inverted_nothing_searches_without(world, tmp_path, ask):
    strokes = Image.new("RGB", (64, 64), "white")
    for x in range(12, 52):
        strokes.putpixel((x, x), (0, 0, 0))
    (tmp_path / "drawn").mkdir()
    strokes.save(tmp_path / "drawn" / "0.png")
    for domains, count in (("sketch", 1), ("none", 0)):
        run = tmp_path / domains
        assert train.main(flags(world, run, "--method", "zero-shot", "--stroke-domains", domains)) == 0
        call = ("--run", run, "--gallery", tmp_path / "drawn", "--query", tmp_path / "drawn" / "0.png")
        assert ask(*call)["inverted"] == count and ask(*call, "--invert-gallery", "yes")["inverted"] == 1


def test_the_answer_does_not_depend_on_how_a_path_is_typed(run, world, tmp_path, ask, monkeypatch):
    """Not even when a folder on the way is named like a domain of strokes."""
    home = tmp_path / "sketch" / "deep"
    shutil.copytree(world / "data/photo", home / "photos")
    (tmp_path / "link").symlink_to(home, target_is_directory=True)
    found = []
    for here, photos in ((tmp_path, home / "photos"), (home, Path("photos")), (home / "photos", Path(".")),
                         (tmp_path, Path("sketch/../link/photos")), (tmp_path, tmp_path / "link" / "photos")):
        monkeypatch.chdir(here)
        found.append(ask("--run", run, "--gallery", photos, "--query", photos / "shape_5" / "1.png"))
    assert [answer["encoded"] for answer in found] == [48, 0, 0, 0, 0]
    for answer in found[1:]:
        assert answer["queries"][0]["results"] == found[0]["queries"][0]["results"]
        assert answer["inverted"] == found[0]["inverted"] == 0


def test_a_reader_that_leaves_early_costs_no_file(world, tmp_path):
    """Also with names that this terminal cannot show, or that would steer it."""
    gallery = tmp_path / "gallery"
    gallery.mkdir()
    for name in (b"caf\xe9.png", "grün.png".encode(), b"red\x1b[31m.png", b"two\nlines.png"):
        shutil.copy(world / "data/photo/shape_5/1.png", os.fsencode(gallery) + b"/" + name)
    call = [sys.executable, str(ROOT / "retrieve.py"), "--weights", str(world / "clip.pt"), "--gallery", str(gallery),
            "--query", os.fsencode(gallery) + b"/caf\xe9.png", "--workers", "0", "--out", "sheet.png", "--export", "x.npy"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode("ascii").splitlines()
    for name in (r"caf\udce9.png", r"gr\xfcn.png", r"red\x1b[31m.png", r"two\nlines.png"):
        assert any(line.endswith(name) for line in lines), (name, lines)
    for name in ("sheet.png", "x.npy", "x.paths.txt"):
        (tmp_path / name).unlink()
    reader, writer = os.pipe()
    os.close(reader)  # as `head` does, only sooner
    done = subprocess.run(call, cwd=tmp_path, env=environment, stdout=writer, stderr=subprocess.PIPE, timeout=300)
    os.close(writer)
    assert done.returncode == 0 and b"Traceback" not in done.stderr and b"Broken" not in done.stderr, done.stderr
    assert all((tmp_path / name).exists() for name in ("sheet.png", "x.npy", "x.paths.txt"))


def test_vectors_are_those_that_were_searched(world, tmp_path, ask):
    photos, out = world / "data/photo", tmp_path / "x.npy"
    ask("--weights", world / "clip.pt", "--gallery", photos, "--export", out)
    expected = features(load_clip(world / "clip.pt"), sorted(photos.rglob("*.png")))
    assert np.load(out) == pytest.approx(expected.numpy(), abs=1e-4)
    ask("--weights", world / "clip.pt", "--gallery", photos, "--export", out, "--center")
    moved = F.normalize(expected - expected.mean(0), dim=1)
    assert np.load(out) == pytest.approx(moved.numpy(), abs=1e-3)
