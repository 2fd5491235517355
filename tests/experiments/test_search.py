"""retrieve.py from folders, paths and texts to answers: right ones, kept ones, and ones that say what was done."""
import json
import os
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

import retrieve
import train
from tests.helpers import files_of_at_most, flags, refused, tiny_state_dict
from ucdr_ref.clip import load_clip, preprocess, tokenize
from ucdr_ref.config import resolve
from ucdr_ref.demo.drawing import CLASSES, write_dataset
from ucdr_ref.experiments import search
from ucdr_ref.experiments.experiment import restore


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train.main(flags(world, folder)) == 0
    return folder


@pytest.fixture
def call(world, tmp_path):
    """retrieve.main; features lie in the test's own folder."""
    return lambda *given: retrieve.main([*map(str, given), "--workers", "0", "--cache", str(tmp_path / "cache")])


@pytest.fixture
def ask(capsys, call):
    """retrieve.py's JSON."""
    def answer(*given):
        capsys.readouterr()
        assert call(*given, "--json") == 0
        return json.loads(capsys.readouterr().out)

    return answer


def features(method, paths, invert=frozenset()):
    """Normalised features [n, e], image by image."""
    images = [Image.open(path).convert("RGB") for path in paths]
    images = [ImageOps.invert(image) if path in invert else image for path, image in zip(paths, images)]
    with torch.no_grad():
        return torch.cat([F.normalize(method.encode_image(preprocess(32)(image)[None]), dim=1) for image in images])


def expect_order(answer, query, gallery, paths):
    distances = (gallery.double() - query.double()).norm(dim=1)
    order = distances.argsort().tolist()[:len(answer["results"])]
    assert [hit["path"] for hit in answer["results"]] == [str(paths[i]) for i in order]
    assert [hit["distance"] for hit in answer["results"]] == pytest.approx(distances[order].tolist(), abs=1e-4)


@pytest.fixture(scope="module")
def photos(world):
    """Flags of zero-shot CLIP on the photos, CLIP, the photos' features, their paths."""
    clip, paths = load_clip(world / "clip.pt"), sorted((world / "data/photo").rglob("*.png"))
    return ("--weights", world / "clip.pt", "--gallery", world / "data/photo"), clip, features(clip, paths), paths


def draw_strokes(path):
    """A thin black line on white."""
    path.parent.mkdir(exist_ok=True)
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).line((12, 12, 52, 52), "black", 2)
    image.save(path)
    return path


def test_weights_alone_are_zero_shot_clip(world, ask, photos):
    given, clip, gallery, paths = photos
    icons = sorted((world / "data/icon/shape_4").iterdir())
    texts = ["a red bus", "a photo of a hexagon"]
    found = ask(*given, "--k", "7", "--query", *icons, "--text", *texts)
    assert found["model"] == f"zero-shot CLIP of {world / 'clip.pt'}" and found["encoded"] == 48
    assert [answer["query"] for answer in found["queries"]] == [*map(str, icons), *texts]
    rows = torch.cat([features(clip, icons), F.normalize(clip.encode_text(tokenize(texts)), dim=1).detach()])
    for answer, row in zip(found["queries"], rows, strict=True):
        expect_order(answer, row, gallery, paths)
    assert ask(*given, "--text", "a")["encoded"] == 0


def test_a_trained_adapter_is_searched_by_image_and_text(run, ask, photos):
    (*_, folder), clip, _, paths = photos
    images = torch.stack([preprocess(32)(Image.open(path).convert("RGB")) for path in paths])
    gallery = restore(run, {}, torch.device("cpu"))[1].encode(images)
    found = ask("--run", run, "--gallery", folder, "--query", paths[5], "--text", "a red bus", "--k", "100")["queries"]
    texts = F.normalize(clip.encode_text(tokenize(["a red bus"])), dim=1).detach()
    for answer, row in zip(found, [gallery[5], texts[0]], strict=True):
        assert len(answer["results"]) == 48  # no more than there are
        expect_order(answer, row, gallery, paths)


def test_center_removes_the_means_of_a_folder_and_of_the_gallery(world, ask, photos):
    given, clip, gallery, paths = photos
    icons = sorted((world / "data/icon").rglob("*.png"))
    like, moved = features(clip, icons), F.normalize(gallery - gallery.mean(0), dim=1)
    for asked in ([3], [0, 1, 2, 3, 4]):  # what a query finds does not depend on the others
        found = ask(*given, "--center", world / "data/icon", "--query", *(icons[i] for i in asked))
        assert f"queries centred by {world / 'data/icon'}" in found["model"]
        for i, answer in zip(asked, found["queries"], strict=True):
            expect_order(answer, F.normalize(like[i] - like.mean(0), dim=0), moved, paths)


def test_what_cannot_be_searched_is_refused_in_one_sentence(run, world, tmp_path, capsys, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    torch.save({key: value for key, value in tiny_state_dict().items() if key.startswith("visual.")}, "tower.pt")
    torch.save(tiny_state_dict(7), "other.pt")
    gallery, query, clip = ("--gallery", world / "data/photo"), ("--query", world / "data/icon/shape_4/0.png"), world / "clip.pt"
    here = ("--weights", clip, *gallery)
    for given, says in (((*gallery, *query), "runs/demo holds no best.pt; train first"), (("--weights", clip, *query), "--gallery DIR"),
                        (here, "nothing to do"), ((*here, "--out", "x.png", "--export", "x.npy"), "nothing to do"),
                        ((*here, "--text", " "), "--text: an empty text"),
                        ((*here, *query, "--k", "0"), "--k 0: must be at least 1"),
                        ((*here, "--center", world / "data/icon", "--text", "a"), "none of --text"),
                        ((*here, "--query", "gone.png"), "gone.png"),
                        (("--weights", "tower.pt", *gallery, "--text", "a"), "image tower alone"),
                        (("--run", run, *gallery, *query, "--weights", "other.pt"), "--force")):
        refused(capsys, call(*given), says)


@pytest.mark.parametrize("flags, says", [({"method": "sre-clip", "test_attention": "batch"}, "--test-attention batch"),
                                         ({"method": "closed-form"}, "--text cannot search")])
def test_features_that_do_not_compare_are_not_searched(monkeypatch, tmp_path, capsys, call, flags, says):
    monkeypatch.setattr(search, "restore", lambda *_: (resolve(flags), None, {}))
    (tmp_path / "best.pt").touch()
    refused(capsys, call("--run", tmp_path, "--gallery", tmp_path, "--text", "a"), says)


def test_other_weights_are_named_and_leave_the_index_alone(run, world, tmp_path, ask):
    torch.save(tiny_state_dict(7), tmp_path / "other.pt")
    given = ("--run", run, "--gallery", world / "data/photo", "--query", world / "data/sketch/shape_4/0.png")
    before = ask(*given)
    other = ask(*given, "--weights", tmp_path / "other.pt", "--force")
    assert before["encoded"] == other["encoded"] == 48 and before["queries"] != other["queries"]
    assert "other.pt" in other["model"] and before["model"].startswith(f"run {run}, CLIP of ")
    assert ask(*given)["queries"] == before["queries"] and ask(*given, "--invert", "none")["encoded"] == 48


def test_inversion_is_told_and_asked_for(world, tmp_path, ask, call, capsys, photos):
    given, clip, gallery, paths = photos
    look = draw_strokes(tmp_path / "mine" / "drawing.png")
    filed, icon = tmp_path / "Sketch/bus/0.png", tmp_path / "icon/bus/0.png"
    for path in (filed, icon):  # coloured; one of them lies where sketches do
        path.parent.mkdir(parents=True)
        Image.new("RGB", (40, 40), (220, 30, 0)).save(path)
    queries = [look, filed, icon]
    for mode, inverted in (("auto", {look, filed}), ("none", set())):
        found = ask(*given, "--query", *queries, "--invert", mode)
        assert [answer["inverted"] for answer in found["queries"]] == [path in inverted for path in queries]
        for answer, row in zip(found["queries"], features(clip, queries, inverted), strict=True):
            expect_order(answer, row, gallery, paths)
    (tmp_path / "bad.png").write_bytes(b"no image")
    found = ask("--weights", world / "clip.pt", "--gallery", tmp_path, "--query", icon)
    assert (found["images"], found["encoded"], found["inverted"]) == (3, 3, 2) and "bad.png" in found["unreadable"][0]
    assert call("--weights", world / "clip.pt", "--gallery", tmp_path, "--query", look) == 0
    printed = capsys.readouterr().out
    assert f"{look} (inverted)\n" in printed and "1 unreadable" in printed and "left out: " in printed
    run = tmp_path / "plain"  # a run that inverted nothing searches without
    assert train.main(flags(world, run, "--method", "zero-shot", "--stroke-domains", "none")) == 0
    assert not ask("--run", run, "--gallery", look.parent, "--query", look)["queries"][0]["inverted"]


def test_vectors_are_those_that_were_searched(world, tmp_path, ask, photos):
    (given, _, expected, paths), out = photos, tmp_path / "x.npy"
    for more, rows in (((), expected), (("--center", world / "data/icon"), F.normalize(expected - expected.mean(0), dim=1))):
        ask(*given, "--export", out, *more)  # the second time over its own
        assert np.load(out) == pytest.approx(rows.numpy(), abs=1e-3)
    names = (tmp_path / "x.paths.txt").read_text().splitlines()
    assert names == [str(path.relative_to(world / "data/photo")) for path in paths]


def test_no_file_of_others_is_overwritten(world, tmp_path, capsys, call):
    photos, query, picture = world / "data/photo", draw_strokes(tmp_path / "query.png"), draw_strokes(tmp_path / "picture.png")
    np.save(tmp_path / "mine.npy", np.zeros(3))
    (tmp_path / "own.paths.txt").touch()
    (tmp_path / "notes.png").write_text("notes")
    given = ("--weights", world / "clip.pt", "--gallery", photos, "--query", query)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}  # and no cache: it is told at once
    for flag, path in (("--out", query), ("--out", photos / "shape_4/0.png"), ("--out", photos / "new.png"),
                       ("--out", tmp_path / "notes.png"), ("--out", picture), ("--export", tmp_path / "mine.npy"),
                       ("--export", tmp_path / "own.npy"),
                       ("--out", tmp_path / "none/x.png"), ("--export", tmp_path / "none/x.npy")):
        refused(capsys, call(*given, flag, path), str(path), "name another")
    refused(capsys, call(*given, "--export", tmp_path / "x.bin"), "x.bin: must end in .npy")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    for _ in range(2):  # the second time over its own files
        assert call(*given, "--out", tmp_path / "sheet.png", "--export", tmp_path / "x.npy") == 0


def test_answers_survive_a_lost_reader_and_a_full_disk(world, tmp_path, capsys, monkeypatch, call, photos):
    given = (*photos[0], "--query", world / "data/icon/shape_4/0.png")
    reader, writer = os.pipe()
    os.close(reader)  # as `head` does, only sooner
    with monkeypatch.context() as patch, os.fdopen(writer, "w") as stdout:
        patch.setattr(sys, "stdout", stdout)
        assert call(*given, "--out", tmp_path / "sheet.png", "--export", tmp_path / "x.npy") == 1
    assert all((tmp_path / name).exists() for name in ("sheet.png", "x.npy", "x.paths.txt"))
    capsys.readouterr()
    with files_of_at_most(1000):  # as on a full disk
        assert call(*given, "--out", tmp_path / "other.png") == 2
    printed = capsys.readouterr()
    assert "   1  0." in printed.out and "could not write" in printed.err and "other.png" in printed.err


def test_a_text_is_its_own_caption(tmp_path, monkeypatch):
    sheets = []
    monkeypatch.setattr(search, "contact_sheet", lambda sheet: sheets.append(sheet) or b"")
    search.draw({"queries": [{"query": "black/white cat", "kind": "text", "results": []}]}, tmp_path / "x.png")
    assert sheets[0][0][0] == ("", "black/white cat", None)


def test_centring_the_documented_way_is_no_worse_on_one_class(tmp_path, ask):
    """Drawn sketches of a single class, centred by the mean of a folder of sketches of many classes."""
    data = write_dataset(tmp_path / "data", sorted({"giraffe", "bus", *CLASSES[::6]}), ["sketch", "real"], 6)
    for name in ("giraffe", "bus"):
        given = ("--weights", "weights/demo-clip.pt", "--gallery", data / "real", "--k", "6", "--query",
                 *sorted((data / "sketch" / name).iterdir()))
        plain, centred = (sum(f"/{name}/" in hit["path"] for answer in ask(*given, *more)["queries"] for hit in answer["results"])
                          for more in ((), ("--center", data / "sketch")))
        assert centred >= plain > 0, name
