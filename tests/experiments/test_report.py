"""What an evaluation leaves: numbers of every class, a picture that shows what was found, a page for people."""
from __future__ import annotations

import csv
import html
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageOps

from ucdr_ref.data.images import Files
from ucdr_ref.experiments import report
from ucdr_ref.experiments.report import FRAME, FRAMES, LINE, SIZE, Shown, contact_sheet
from ucdr_ref.metrics import retrieval

WIDE, TALL = SIZE + 2 * FRAME, SIZE + 2 * FRAME + LINE
NAMES = ["<script>alert(1)<!script>", "a & b", "cup", "not utf-8 \udcff", "owl", "pen"]


def test_a_sheet_shows_its_images_and_marks_hits_without_colour(tmp_path: Path) -> None:
    path = write_image(tmp_path / "0.png", "yellow")
    rows = [(Shown(path, "a text \udcff\u732b" * 30), [Shown(path, "", hit) for hit in (True, False, None)]),
            (Shown("", "no image"), [Shown(path, ""), Shown(str(tmp_path / "gone.png"), "")])]
    page = Image.open(io.BytesIO(contact_sheet(rows)))
    marks = {}
    for i, (query, hits) in enumerate(rows):
        for j, shown in enumerate([query, *hits]):
            tile = page.crop((j * WIDE, i * TALL, (j + 1) * WIDE, i * TALL + WIDE))
            colour = "yellow" if shown.path == path else "grey" if shown.path else "white"
            assert tile.getpixel((WIDE // 2, WIDE // 2)) == ImageColor.getrgb(colour)
            if shown.path == path:
                assert tile.getpixel((0, 0)) == ImageColor.getrgb(FRAMES[shown.hit])
                inside = np.asarray(ImageOps.crop(tile, FRAME))
                marks[shown.hit] = int((inside != (255, 255, 0)).any(axis=2).sum())
    assert marks[True] > 20 and marks[False] == marks[None] == 0


def write_image(path: Path, colour: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return str(path)


def retrieval_row(method: str, folder: Path, transductive: bool = False, gallery: str = "unseen") -> dict[str, Any]:
    """Two queries and two gallery images of each class."""
    labels, features = torch.arange(len(NAMES)).repeat(2), torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))
    sides = [Files([write_image(folder / domain / f"{i}{k}.png", "red") for i in range(2) for k in range(6)], NAMES * 2,
                   [domain] * 12) for domain in ("sketch", "photo")]
    metrics = retrieval(features[0], labels, features[1], labels)
    return {"protocol": "UCDR", "query_domain": "sketch", "gallery_name": gallery, "method": method,
            "transductive": transductive, "mAP@200": metrics["mAP@200"],
            "details": {"metrics": metrics, "names": NAMES, "queries": sides[0], "gallery": sides[1],
                        "query_features": features[0], "gallery_features": features[1]}}


def classification_row(method: str, folder: Path) -> dict[str, Any]:
    """Two images a class, all right but the second of class 1, which is taken for the last class, an unseen one."""
    labels = torch.arange(len(NAMES)).repeat(2)
    found = labels.clone()
    found[len(NAMES) + 1] = last = len(NAMES) - 1
    predicted = torch.stack([found, torch.full_like(found, last)], dim=1)  # among all, among unseen classes
    return {"method": method, "details": {"predicted": predicted, "labels": labels, "names": NAMES, "unseen": [last],
                                          "paths": [write_image(folder / f"{i}.png", "red") for i in range(12)]}}


def about(run: Path) -> dict[str, Any]:
    return {"run": str(run), "table": "a table of <b> & 33.33", "config": {"method": "a"}}


def read_csv(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "per_class.csv").open(encoding="utf-8", newline="")))


def page_text(folder: Path) -> str:
    """The page's text: no script, nothing from elsewhere, every name as text, a width that phones understand."""
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert set(re.findall(r"<(\w+)", page)) <= set("html meta title style h1 h2 div pre p table tr th td i img".split())
    assert re.findall(r'\b(?:src|href|on\w+)="(.{11})', page) == ["data:image/"]
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    text = html.unescape(re.sub("<[^>]*>", "", page))
    assert "a table of <b> & 33.33" in text and NAMES[0] in text
    return text


def test_a_retrieval_leaves_numbers_of_every_class_and_a_page(tmp_path: Path) -> None:
    rows = [retrieval_row("zero-shot", tmp_path), retrieval_row("zero-shot, centred", tmp_path, True),
            retrieval_row("zero-shot", tmp_path, gallery="mixed")]
    report.write_retrieval(rows, tmp_path, about(tmp_path))
    found = json.loads((tmp_path / "results.json").read_text(encoding="ascii"))["rows"]
    assert [row["mAP@200"] for row in found] == [row["mAP@200"] for row in rows] and "details" not in found[0]
    lines, metrics = read_csv(tmp_path), rows[0]["details"]["metrics"]
    assert [line["method"] for line in lines] == [row["method"] for row in rows for _ in NAMES]
    assert {line["queries"] for line in lines} == {"2"}
    for key, part in (("mAP@200", "per_class"), ("mAP@all", "per_class@all")):
        assert [float(line[key]) for line in lines[:6]] == pytest.approx([metrics[part][k] for k in range(6)], abs=1e-6)
    text = page_text(tmp_path)
    for k, score in metrics["per_class"].items():
        line = f"\n{NAMES[k]}\nzero-shot\n{100 * score:.1f}\n{100 * metrics['per_class@all'][k]:.1f}\n2\nUCDR\nsketch\nmixed\n"
        assert line.encode(errors="backslashreplace").decode() in text
    assert "UCDR: queries of" in text  # and no chart: nothing was trained
    with Image.open(tmp_path / "queries.png") as picture:
        assert picture.height == 6 * TALL  # one query a class, of the first test, not centred


def test_the_picture_shows_the_nearest(tmp_path: Path) -> None:
    row = retrieval_row("zero-shot", tmp_path)
    details = row["details"]
    queries, gallery, lines = details["queries"], details["gallery"], report.examples("zero-shot", details)
    assert len({query.path for query, _ in lines}) == len(NAMES)
    for query, hits in lines:
        i = queries.paths.index(query.path)
        distances = [math.dist(details["query_features"][i], other) for other in details["gallery_features"]]
        order = sorted(range(12), key=distances.__getitem__)[:report.SHOWN]
        assert [hit.path for hit in hits] == [gallery.paths[j] for j in order]
        assert [hit.caption for hit in hits] == [gallery.classes[j] for j in order]
        assert [hit.hit for hit in hits] == [gallery.classes[j] == queries.classes[i] for j in order]


def test_a_classification_leaves_the_same(tmp_path: Path) -> None:
    rows = [classification_row("zero-shot", tmp_path), classification_row("sre-clip", tmp_path), {"method": "best-test"}]
    report.write_classification(rows, tmp_path, about(tmp_path))
    lines, text = read_csv(tmp_path), page_text(tmp_path)
    assert [line["method"] for line in lines] == ["zero-shot"] * 6 + ["sre-clip"] * 6
    assert [float(line["accuracy"]) for line in lines] == [1, 0.5, 1, 1, 1, 1] * 2
    assert [line["among_unseen"] for line in lines] == ([""] * 5 + ["1.0"]) * 2
    assert "\na & b\nsre-clip\n50.0\n\n2\nseen\n" in text and "\npen\nsre-clip\n100.0\n100.0\n2\nunseen\n" in text
    with Image.open(tmp_path / "queries.png") as picture:
        assert picture.size == (3 * WIDE, 6 * TALL)


def test_curves_are_of_what_was_logged_more_than_once(tmp_path: Path) -> None:
    log, values = tmp_path / "log.jsonl", [3.0, 2.0, float("nan"), 1.0]
    lines = [{"phase": "target", "epoch": 0, "step": i, "loss": value} for i, value in enumerate(values)]
    lines.append({"phase": "target", "epoch": 0, "score": 0.5})  # a single epoch's
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
    [chart] = report.curves(log)
    assert all(text in chart for text in ("phase target: loss, by step", "x: 1 to 3, y: 1 to 3", 'points="0.0,0.0 150.0,50.0 300.0,100.0"'))
    log.write_text("".join(f'{{"phase": "target", "epoch": {i}, "score": {i / 4}}}\n' for i in range(3)))
    [chart] = report.curves(log)
    assert "%, by epoch" in chart and "y: 0 to 50" in chart
    log.write_text("".join(f'{{"phase": "sre", "step": {i}, "loss": {i}.0}}\n' for i in range(5000)))
    [chart] = report.curves(log)
    assert 200 < chart.count(",") <= report.POINTS + 10
    log.write_text("no JSON\n")
    with pytest.raises(ValueError, match="no training's log .*name another --run"):
        list(report.curves(log))
