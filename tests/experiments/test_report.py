"""What an evaluation leaves: numbers of every class, a picture that shows what was found, a page for people."""
from __future__ import annotations

import csv
import html
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from ucdr_ref.data.images import Files
from ucdr_ref.experiments import report
from ucdr_ref.experiments.report import FRAME, FRAMES, GAP, LINE, MARK, SIZE, Shown, contact_sheet
from ucdr_ref.metrics import retrieval

WIDE, TALL = SIZE + 2 * FRAME + GAP, SIZE + 2 * FRAME + 3 * LINE + GAP
NAMES = ["<script>alert(1)</script>", "a & b", "cup", "not utf-8 \udcff", "owl", "pen"]


def test_a_sheet_shows_images_as_the_model_saw_them_and_marks_hits_without_colour(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "yellow").save(tmp_path / "0.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    path, bad = str(tmp_path / "0.png"), [str(tmp_path / name) for name in ("bad.png", "gone.png", "\udcff\n.png")]
    rows = [(Shown(path, "first"), [Shown(path, "", hit) for hit in (True, False, None)]),
            (Shown("", "a text \udcff\n\u732b" * 30), [Shown(path, "0.5", False, True), *(Shown(name, "") for name in bad)])]
    page, marks = contact_sheet(rows), {}
    for i, (query, hits) in enumerate(rows):
        for j, shown in enumerate([query, *hits]):
            x, y, end = j * WIDE, i * TALL, SIZE + 2 * FRAME - 1
            expected = "white" if not shown.path else "grey" if shown.path in bad else "blue" if shown.inverted else "yellow"
            assert page.getpixel((x + end // 2, y + end // 2)) == ImageColor.getrgb(expected)
            if shown.path:
                assert {page.getpixel((x + k, y + k)) for k in (0, end)} == {ImageColor.getrgb(FRAMES[shown.hit])}
                badge = np.asarray(page.crop((x + end - MARK, y + end - MARK, x + end, y + end)))
                marks[shown.hit] = (badge == 255).all(axis=2).tolist()
    assert marks[True] != marks[False] and np.any(marks[True]) and np.any(marks[False]) and not np.any(marks[None])


def retrieval_row(method: str, folder: Path, transductive: bool = False, gallery: str = "unseen") -> dict[str, Any]:
    """Two queries and two gallery images of each class; the files do not exist."""
    labels, features = torch.arange(len(NAMES)).repeat(2), torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))
    sides = [Files([f"{folder}/{domain}/{i} {name}" for i in range(2) for name in NAMES], NAMES * 2, [domain] * 12)
             for domain in ("sketch", "photo")]
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
                                          "paths": [f"{folder}/{i}.png" for i in range(12)]}}


def about(run: Path) -> dict[str, Any]:
    return {"run": str(run), "table": "a table of <b> & 33.33", "config": {"method": "a", "stroke_domains": ["Sketch"]}}


def read_csv(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "per_class.csv").open(encoding="utf-8", newline="")))


def page_text(folder: Path) -> str:
    """The page's text: no script, nothing from elsewhere, every name as text, a width that phones understand."""
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert set(re.findall(r"<(\w+)", page)) <= set("html meta title style h1 h2 div pre p table tr th td i img".split())
    assert re.findall(r'\b(?:src|href|on\w+)="(.{11})', page) == ["data:image/"]
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    text = html.unescape(re.sub("<[^>]*>", "", page))
    assert "a table of <b> & 33.33" in text and "<script>alert(1)</script>" in text
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
    for k, score in metrics["per_class"].items():  # both rows of the first test
        assert f"{NAMES[k]} (2){2 * f'{100 * score:.1f}'}".encode(errors="backslashreplace").decode() in text
    assert "UCDR: queries of" in text  # and no chart: nothing was trained
    with Image.open(tmp_path / "queries.png") as picture:
        assert picture.height == 6 * TALL  # one query a class, of the first test, not centred


def test_the_picture_shows_the_nearest(tmp_path: Path) -> None:
    row = retrieval_row("zero-shot", tmp_path)
    details = row["details"]
    queries, gallery, lines = details["queries"], details["gallery"], report.examples(row, ["Sketch"])
    assert len({query.path for query, _ in lines}) == len(NAMES)
    for query, hits in lines:
        i = queries.paths.index(query.path)
        distances = [math.dist(details["query_features"][i], other) for other in details["gallery_features"]]
        order = sorted(range(12), key=distances.__getitem__)[:report.HITS]
        assert [hit.path for hit in hits] == [gallery.paths[j] for j in order]
        assert [float(hit.caption) for hit in hits] == pytest.approx([distances[j] for j in order], abs=1e-3)
        assert [hit.hit for hit in hits] == [gallery.classes[j] == queries.classes[i] for j in order]
        assert query.inverted and not any(hit.inverted for hit in hits)


def test_a_classification_leaves_the_same(tmp_path: Path) -> None:
    rows = [classification_row("zero-shot", tmp_path), classification_row("sre-clip", tmp_path), {"method": "best-test"}]
    report.write_classification(rows, tmp_path, about(tmp_path))
    lines, text = read_csv(tmp_path), page_text(tmp_path)
    assert [line["method"] for line in lines] == ["zero-shot"] * 6 + ["sre-clip"] * 6
    assert [float(line["accuracy"]) for line in lines] == [1, 0.5, 1, 1, 1, 1] * 2
    assert [line["among_unseen"] for line in lines] == ([""] * 5 + ["1.000000"]) * 2
    assert "a & b (seen)50.050.0" in text and "pen (unseen)100.0100.0" in text and "ZSL: images" in text
    with Image.open(tmp_path / "queries.png") as picture:
        assert picture.size == (3 * WIDE, 6 * TALL)


def test_curves_are_of_what_was_logged_more_than_once(tmp_path: Path) -> None:
    log, values = tmp_path / "log.jsonl", [3.0, 2.0, float("nan"), 1.0]
    lines = [{"phase": "target", "epoch": 0, "step": i, "loss": value} for i, value in enumerate(values)]
    lines.append({"phase": "target", "epoch": 0, "score": 0.5})  # a single epoch's
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
    [chart] = report.curves(report.read_log(log))
    assert "phase target: loss" in chart and "1 to 3" in chart and 'points="0.0,0.0 150.0,50.0 300.0,100.0"' in chart
    [chart] = report.curves([{"phase": "target", "epoch": i, "score": i / 4} for i in range(3)])
    assert "0 to 50" in chart and "%" in chart
    [chart] = report.curves([{"phase": "sre", "step": i, "loss": float(i)} for i in range(5000)])
    assert 200 < chart.count(",") <= report.POINTS + 10
    log.write_text("no JSON\n")
    with pytest.raises(ValueError, match="no training's log .*name another --run"):
        report.read_log(log)
