from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont, ImageOps

from ucdr_ref.experiments import report
from ucdr_ref.experiments.predictions import predict
from ucdr_ref.experiments.report import (
    BADGE,
    FRAME,
    FRAMES,
    GAP,
    LINE,
    Shown,
    cell,
    confusion_picture,
    fit,
    most_confused,
    plain,
    sheet,
    thumbnail,
    write_classification,
    write_retrieval,
)
from ucdr_ref.images.batches import Files
from ucdr_ref.machine.files import WriteError
from ucdr_ref.metrics import retrieval

SIZE = 40
HOSTILE = ['=HYPERLINK("x")', "<script>alert(1)</script>", "\x1b[31mred\u202e", "not utf-8 \udcff", "\t=1+1", "a;=1+1"]


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    paths = []
    for i, colour in enumerate([(0, 0, 255), (255, 255, 0), (0, 255, 255)]):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.new("RGB", (8, 8), colour).save(paths[-1])
    return paths


def test_frames_and_thumbnails_are_where_they_belong(images: list[str], tmp_path: Path) -> None:
    hits = [True, False, None]
    rows = [(Shown(images[0], "first"), [Shown(path, "", hit) for path, hit in zip(images, hits)]),
            (Shown(images[1], "second"), [Shown(images[2], "0.5", False)])]
    sheet(rows, tmp_path / "sheet.png", size=SIZE)
    with Image.open(tmp_path / "sheet.png") as page:
        wide, tall = SIZE + 2 * FRAME + GAP, SIZE + 2 * FRAME + 3 * LINE + GAP
        for i, (query, results) in enumerate(rows):
            for j, shown in enumerate([query, *results]):
                x, y = GAP + j * wide + (GAP if j else 0), GAP + i * tall
                end = SIZE + 2 * FRAME - 1
                with Image.open(shown.path) as image:
                    assert page.getpixel((x + FRAME + SIZE // 2, y + FRAME + SIZE // 2)) == image.getpixel((4, 4))
                frame = FRAMES[shown.hit] if j else (255, 255, 255)
                for corner in [(x, y), (x + end, y + end)]:
                    assert page.getpixel(corner) == frame
                badge = page.crop((x + end - BADGE, y + end - BADGE, x + end - FRAME, y + end - FRAME))
                white = bool((np.asarray(badge) == 255).all(axis=2).any())
                assert white == (j > 0 and shown.hit is not None)
        for line in range(3):  # folder, name, caption
            top = GAP + SIZE + 2 * FRAME + line * LINE
            assert page.crop((GAP, top, GAP + SIZE, top + LINE)).getextrema()[0][0] < 128


def test_hits_and_misses_differ_without_colour(images: list[str], tmp_path: Path) -> None:
    marks = []
    for hit in (True, False):
        sheet([(Shown(images[0], ""), [Shown(images[0], "", hit)])], tmp_path / "sheet.png", size=SIZE)
        with Image.open(tmp_path / "sheet.png") as page:
            end = 2 * GAP + SIZE + 2 * FRAME + GAP + SIZE + 2 * FRAME - 1
            badge = page.crop((end - BADGE, 0, end, page.height))
            marks.append((np.asarray(badge) == 255).all(axis=2).tolist())
    assert marks[0] != marks[1]


def test_inverted_images_are_shown_as_the_model_saw_them(images: list[str]) -> None:
    with Image.open(images[1]) as image:
        assert thumbnail(images[1], SIZE, True).getpixel((20, 20)) == ImageOps.invert(image).getpixel((4, 4))
        assert thumbnail(images[1], SIZE).getpixel((20, 20)) == image.getpixel((4, 4))


def test_missing_images_and_odd_captions_do_not_stop_it(images: list[str], tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    unreadable = [Shown(str(tmp_path / name), "") for name in ("gone.png", "bad.png", "\udcff\n.png")]
    rows = [(Shown(images[0], "\udcff\n\u732b \u00e9" * 30), unreadable), (Shown(images[1], ""), [])]
    sheet(rows, tmp_path / "sheet.jpg", size=SIZE)
    with Image.open(tmp_path / "sheet.jpg") as page:
        assert page.format == "JPEG"


def test_captions_keep_their_end() -> None:
    font = ImageFont.load_default()
    assert fit("short", font, 500) == "short"
    cut = fit("a/very/long/path/to/an/image.png", font, 60)
    assert cut.startswith("..") and "a/very/long/path/to/an/image.png".endswith(cut[2:]) and len(cut) > 4
    assert font.getlength(cut) <= 60
    assert fit("a very long name of a class", font, 60, keep_end=False).startswith("a very")


def test_the_old_picture_survives(images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "sheet.png"
    target.write_bytes(b"old")

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.Image.Image, "save", full)
    with pytest.raises(WriteError, match="No space left"):
        sheet([(Shown(images[0], ""), [])], target)
    assert target.read_bytes() == b"old" and not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("name", ["sheet.txt", "sheet", "sheet.fli"])
def test_unknown_endings_and_no_rows_are_errors(images: list[str], tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="ending"):
        sheet([(Shown(images[0], ""), [])], tmp_path / name)
    with pytest.raises(ValueError, match="at least one query; got 0"):
        sheet([], tmp_path / "sheet.png")


def test_what_is_printed_has_no_control_characters() -> None:
    assert plain("\x1b[31m \u732b \u202e \udcff\n") == "\\x1b[31m \u732b \\u202e \\udcff\\n"
    assert all(plain(text).isprintable() and plain(text).encode() for text in HOSTILE)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\uff1d1+1"])
def test_no_spreadsheet_runs_a_name(text: str) -> None:
    assert cell(text) == "'" + plain(text)


def test_numbers_and_harmless_names_stay_as_they_are() -> None:
    values = [-0.25, -3, None, "t-shirt", "a = b", "\u732b"]
    assert [cell(value) for value in values] == ["-0.250000", "-3", "", "t-shirt", "a = b", "\u732b"]
    assert cell("a;=1+1") == "a;'=1+1"  # a cell of its own where ; separates


def retrieval_row(method: str, folder: Path) -> dict[str, Any]:
    """Two queries and two gallery images of each hostile class; the files do not exist."""
    torch.manual_seed(0)
    names = sorted(HOSTILE)
    labels = torch.arange(len(names)).repeat(2)
    sides = [Files([f"{folder}/{i} {name}" for i in range(2) for name in names], names * 2,
                   [domain] * len(labels)) for domain in ("sketch", "photo")]
    query, gallery = torch.randn(2, len(labels), 4)
    metrics = retrieval(query, labels, gallery, labels)
    numbers = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
    details = {"metrics": metrics, "names": names, "queries": sides[0], "gallery": sides[1],
               "query_features": query, "gallery_features": gallery}
    return {"protocol": "UCDR", "query_domain": "=sketch", "gallery_name": "unseen", "method": method, **numbers,
            "details": details}


def test_files_of_a_retrieval_hold_every_query_and_no_formula(tmp_path: Path) -> None:
    row = retrieval_row("zero-shot", tmp_path)
    write_retrieval([row], tmp_path, {"run": "\udcff", "config": {"stroke_domains": ["sketch"]}})
    found = json.loads((tmp_path / "results.json").read_text(encoding="ascii"))
    assert found["run"] == "\udcff" and "details" not in found["rows"][0]
    queries = list(csv.DictReader((tmp_path / "per_query.csv").open(encoding="utf-8", newline="")))
    details = row["details"]
    assert [line["query"] for line in queries] == [cell(path) for path in details["queries"].paths]
    assert [float(line["AP@200"]) for line in queries] == pytest.approx(details["metrics"]["AP"].tolist(), abs=1e-6)
    assert [float(line["AP@all"]) for line in queries] == pytest.approx(details["metrics"]["AP@all"].tolist(), abs=1e-6)
    classes = list(csv.DictReader((tmp_path / "per_class.csv").open(encoding="utf-8", newline="")))
    assert {line["class"] for line in classes} == {cell(name) for name in HOSTILE}
    assert {line["queries"] for line in classes} == {"2"}
    for name in ("per_query.csv", "per_class.csv"):
        text = (tmp_path / name).read_bytes().decode()
        assert all(c.isprintable() or c == "\n" for c in text)
        assert not any(value[:1] in "=+-@" for line in csv.reader(text.splitlines()) for value in line if value)


def test_the_picture_shows_one_query_a_class_with_its_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(report, "sheet", lambda rows, path: shown.extend(rows))
    row = retrieval_row("zero-shot", tmp_path)
    details = row["details"]
    write_retrieval([row], tmp_path, {"config": {"stroke_domains": []}})
    queries = [details["queries"].paths.index(query.path) for query, _ in shown]
    classes = [details["queries"].classes[i] for i in queries]
    assert 1 < len(shown) <= report.SHOWN and len(set(classes)) == len(classes)
    for i, (_, results) in zip(queries, shown):
        distances = (details["gallery_features"] - details["query_features"][i]).norm(dim=1)
        order = distances.argsort().tolist()[:report.HITS]
        assert [result.path for result in results] == [details["gallery"].paths[j] for j in order]


def test_the_picture_of_a_retrieval_inverts_strokes_alone(tmp_path: Path) -> None:
    row = retrieval_row("zero-shot", tmp_path)
    details = row["details"]
    [(query, results)] = report.ranked_queries(row, [3], ["sketch"], 2)
    assert query.inverted and not any(result.inverted for result in results)
    for result in results:
        j = details["gallery"].paths.index(result.path)
        assert result.hit == (details["gallery"].classes[j] == details["queries"].classes[3])
        distance = math.dist(details["query_features"][3].tolist(), details["gallery_features"][j].tolist())
        assert float(result.caption) == pytest.approx(distance, abs=1e-3)


def classification_row(classes: int) -> dict[str, Any]:
    """Two images a class; all right but class 1, whose second image is taken for the last class, which is unseen."""
    labels = torch.arange(classes).repeat(2)
    predicted = labels.clone()
    predicted[classes + 1] = classes - 1
    names = (HOSTILE + [f"class {i}" for i in range(classes)])[:classes]
    details = {"predicted": predict(iter([(torch.arange(len(labels)), torch.eye(classes)[predicted])]), len(labels), classes, [classes - 1]), "labels": labels, "names": names, "unseen": [classes - 1]}
    return {"method": "sre-clip", "details": details}


def test_confused_pairs_are_counted() -> None:
    details = classification_row(8)["details"]
    names = details["names"]
    assert most_confused(details, 5) == [(names[1], names[7], 1, 0.5)]


@pytest.mark.parametrize("classes", [8, 120])
def test_files_of_a_classification(tmp_path: Path, classes: int) -> None:
    row = classification_row(classes)
    write_classification([row, {"method": "best-test", "evaluations": 3}], tmp_path, {"run": "run"})
    lines = list(csv.DictReader((tmp_path / "per_class.csv").open(encoding="utf-8", newline="")))
    assert [line["class"] for line in lines] == [cell(name) for name in row["details"]["names"]]
    assert [float(line["accuracy"]) for line in lines] == [0.5 if i == 1 else 1 for i in range(classes)]
    assert [line["accuracy_among_unseen"] for line in lines] == [""] * (classes - 1) + ["1.000000"]
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.width < 1100 and picture.convert("L").getextrema() == (0, 255)


def test_a_matrix_has_labels_on_both_sides_and_a_scale() -> None:
    page = confusion_picture([classification_row(8)]).convert("L")
    matrix = 8 * 28
    for box in [(0, 134, 116, 134 + matrix), (120, 20, 120 + matrix, 130), (120, 134 + matrix + 22, 300, page.height)]:
        assert page.crop(box).getextrema()[0] < 128, box
    scale = [page.getpixel((120 + 36 * step + 18, 134 + matrix + 14)) for step in range(5)]
    assert scale == [255, 191, 127, 64, 0]
    assert page.getpixel((120 + 14, 134 + 14)) == 0 and page.getpixel((120 + 14, 134 + 28 + 14)) == 255
