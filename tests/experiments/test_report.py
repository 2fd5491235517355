"""What an evaluation leaves: tables that hold every class, a picture that shows what was found, a page for people."""
from __future__ import annotations

import csv
import html
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from ucdr_ref.data.images import Files
from ucdr_ref.experiments import report
from ucdr_ref.experiments.report import FRAME, FRAMES, GAP, LINE, MARK, SIZE, Shown, contact_sheet, thumbnail
from ucdr_ref.metrics import retrieval

SIDE = SIZE + 2 * FRAME
NAMES = ["<script>alert(1)</script>", "a & b", "cup", "not utf-8 \udcff", "owl", "pen"]


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    paths = []
    for i, colour in enumerate([(0, 0, 255), (255, 255, 0), (0, 255, 255)]):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.new("RGB", (8, 8), colour).save(paths[-1])
    return paths


def test_frames_marks_and_thumbnails_are_where_they_belong(images: list[str]) -> None:
    rows = [(Shown(images[0], "first"), [Shown(path, "", hit) for path, hit in zip(images, (True, False, None))]),
            (Shown(images[1], "second"), [Shown(images[2], "0.5", False)])]
    page = contact_sheet(rows)
    marks = {}
    for i, (query, hits) in enumerate(rows):
        for j, shown in enumerate([query, *hits]):
            x, y = j * (SIDE + GAP), i * (SIDE + 3 * LINE + GAP)
            with Image.open(shown.path) as image:
                assert page.getpixel((x + FRAME + SIZE // 2, y + FRAME + SIZE // 2)) == image.getpixel((4, 4))
            for corner in [(x, y), (x + SIDE - 1, y + SIDE - 1)]:
                assert page.getpixel(corner) == ImageColor.getrgb(FRAMES[shown.hit])
            badge = np.asarray(page.crop((x + SIDE - MARK, y + SIDE - MARK, x + SIDE, y + SIDE)))
            marks[shown.hit] = (badge == 255).all(axis=2).tolist()
    assert marks[True] != marks[False]  # without colour
    assert np.any(marks[True]) and np.any(marks[False]) and not np.any(marks[None])


def test_thumbnails_show_what_the_model_saw_or_grey(images: list[str], tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    shown = [Shown(images[1], ""), Shown(images[1], "", None, True),
             *(Shown(str(tmp_path / name), "\udcff\n\u732b" * 30) for name in ("gone.png", "bad.png", "\udcff\n.png"))]
    assert [thumbnail(image).getpixel((SIZE // 2, SIZE // 2)) for image in shown] == [(255, 255, 0), (0, 0, 255)] + [(128, 128, 128)] * 3
    contact_sheet([(Shown("", "a text"), shown)])


def retrieval_row(method: str, folder: Path, transductive: bool = False) -> dict[str, Any]:
    """Two queries and two gallery images of each class; the files do not exist."""
    torch.manual_seed(0)
    labels = torch.arange(len(NAMES)).repeat(2)
    queries, gallery = (Files([f"{folder}/{domain}/{i} {name}" for i in range(2) for name in NAMES], NAMES * 2,
                              [domain] * len(labels)) for domain in ("sketch", "photo"))
    features = torch.randn(2, len(labels), 4)
    metrics = retrieval(features[0], labels, features[1], labels)
    numbers = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
    return {"protocol": "UCDR", "query_domain": "sketch", "gallery_name": "unseen", "method": method,
            "transductive": transductive, **numbers,
            "details": {"metrics": metrics, "names": NAMES, "queries": queries, "gallery": gallery,
                        "query_features": features[0], "gallery_features": features[1]}}


def classification_row(method: str, folder: Path) -> dict[str, Any]:
    """Two images a class, all right but the second of class 1, which is taken for the last class, an unseen one."""
    labels = torch.arange(len(NAMES)).repeat(2)
    found = labels.clone()
    found[len(NAMES) + 1] = last = len(NAMES) - 1
    predicted = SimpleNamespace(everywhere=found, among_unseen=torch.full_like(found, last))
    return {"method": method, "details": {
        "predicted": predicted, "labels": labels, "names": NAMES, "unseen": [last],
        "paths": [f"{folder}/{i}.png" for i in range(len(labels))]}}


def about(run: Path, method: str = "ucdr-adapter") -> dict[str, Any]:
    return {"run": str(run), "table": "a table of <b> & 33.33", "config": {"method": method, "stroke_domains": ["sketch"]}}


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(encoding="utf-8", newline="")))


def check_page(path: Path) -> str:
    """The page's text: no script, nothing from elsewhere, every name as text, a width that phones understand."""
    page = path.read_text(encoding="utf-8")
    assert set(re.findall(r"<(\w+)", page)) <= set("html meta title style h1 h2 div pre p table tr th td i img".split())
    assert re.findall(r'\b(?:src|href|on\w+)="(.{11})', page) == ["data:image/"]
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    text = html.unescape(re.sub("<[^>]*>", "", page))
    assert "a table of <b> & 33.33" in text and "<script>alert(1)</script>" in text
    return text


def test_a_retrieval_leaves_numbers_of_every_class_and_a_page(tmp_path: Path) -> None:
    rows = [retrieval_row("zero-shot", tmp_path), retrieval_row("zero-shot, centred", tmp_path, True),
            {**retrieval_row("zero-shot", tmp_path), "gallery_name": "mixed"}]
    report.write_retrieval(rows, tmp_path, about(tmp_path))
    found = json.loads((tmp_path / "results.json").read_text(encoding="ascii"))
    assert [row["mAP@200"] for row in found["rows"]] == [row["mAP@200"] for row in rows] and "details" not in found["rows"][0]
    lines = read_csv(tmp_path / "per_class.csv")
    assert [line["method"] for line in lines] == [row["method"] for row in rows for _ in NAMES]
    assert {line["queries"] for line in lines} == {"2"}
    for key, part in (("mAP@200", "per_class"), ("mAP@all", "per_class@all")):
        expected = rows[0]["details"]["metrics"][part]
        assert [float(line[key]) for line in lines[:6]] == pytest.approx([expected[k] for k in range(6)], abs=1e-6)
    text = check_page(tmp_path / "report.html")
    for k, score in rows[0]["details"]["metrics"]["per_class"].items():
        assert f"{NAMES[k]} (2){100 * score:.1f}".encode(errors="backslashreplace").decode() in text
    assert "UCDR: queries of" in text  # and no chart: nothing was trained
    with Image.open(tmp_path / "queries.png") as picture:
        assert picture.height == 6 * (SIDE + 3 * LINE + GAP)  # one query a class, of the first test, not centred


def test_the_picture_shows_the_nearest(tmp_path: Path) -> None:
    row = retrieval_row("zero-shot", tmp_path)
    details = row["details"]
    lines = report.examples(row, ["sketch"])
    assert len({Path(query.path).name for query, _ in lines}) == len(NAMES)
    for query, hits in lines:
        i = details["queries"].paths.index(query.path)
        distances = [math.dist(details["query_features"][i], other) for other in details["gallery_features"]]
        order = sorted(range(len(distances)), key=distances.__getitem__)[:report.HITS]
        assert [hit.path for hit in hits] == [details["gallery"].paths[j] for j in order]
        assert [float(hit.caption) for hit in hits] == pytest.approx([distances[j] for j in order], abs=1e-3)
        assert [hit.hit for hit in hits] == [details["gallery"].classes[j] == details["queries"].classes[i] for j in order]
        assert query.inverted and not any(hit.inverted for hit in hits)


def test_a_classification_leaves_the_same(tmp_path: Path) -> None:
    rows = [classification_row("zero-shot", tmp_path), classification_row("sre-clip", tmp_path),
            {"method": "best-test", "evaluations": 3}]
    report.write_classification(rows, tmp_path, about(tmp_path, "sre-clip"))
    lines = read_csv(tmp_path / "per_class.csv")
    assert [line["method"] for line in lines] == ["zero-shot"] * 6 + ["sre-clip"] * 6
    assert [float(line["accuracy"]) for line in lines] == [1, 0.5, 1, 1, 1, 1] * 2
    assert [line["among_unseen"] for line in lines] == ([""] * 5 + ["1.000000"]) * 2
    text = check_page(tmp_path / "report.html")
    assert "a & b (seen)50.050.0" in text and "pen (unseen)100.0100.0" in text and "ZSL: images" in text
    with Image.open(tmp_path / "queries.png") as picture:
        assert picture.size == (3 * (SIDE + GAP), 6 * (SIDE + 3 * LINE + GAP))


def test_curves_are_of_what_was_logged_more_than_once(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    steps = [{"phase": "target", "epoch": 0, "step": i, "loss": value} for i, value in enumerate([3.0, 2.0, float("nan"), 1.0])]
    log.write_text("".join(json.dumps(line) + "\n" for line in [*steps, {"phase": "target", "epoch": 0, "score": 0.5}]) + '{"cut')
    [chart] = report.curves(report.read_log(log))
    assert "phase target: loss, by step" in chart and "1 to 3" in chart and 'points="0.0,0.0 150.0,50.0 300.0,100.0"' in chart
    [chart] = report.curves([{"phase": "target", "epoch": i, "score": i / 4} for i in range(3)])
    assert "0 to 50" in chart and "%" in chart
    [chart] = report.curves([{"phase": "sre", "step": i, "loss": float(i)} for i in range(5000)])
    assert 200 < chart.count(",") <= report.POINTS + 10
    log.write_text("no JSON\n")
    with pytest.raises(ValueError, match="no training's log .*name another --run"):
        report.read_log(log)
