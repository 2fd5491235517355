"""What an evaluation leaves: numbers of every class, a picture that shows what was found, a page for people."""
import csv
import html
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageOps

from ucdr_ref.data.images import Files
from ucdr_ref.experiments import report
from ucdr_ref.experiments.report import FRAME, FRAMES, LINE, SIZE, Shown, contact_sheet
from ucdr_ref.experiments.retrieval import score

WIDE, TALL = SIZE + 2 * FRAME, SIZE + 2 * FRAME + LINE
NAMES = ["<script>alert(1)<!script>", "a & b", "cup", "not utf-8 \udcff", "owl", "pen"]


def write_image(path: Path, colour: str = "red") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return str(path)


def test_a_sheet_shows_its_images_and_marks_hits_without_colour(tmp_path):
    path = write_image(tmp_path / "0.png", "yellow")
    rows = [(Shown(path, "a text \udcff\u732b" * 30), [Shown(path, "", hit) for hit in (True, False, None)]),
            (Shown("", "no image"), [Shown(path, ""), Shown(str(tmp_path / "gone.png"), "")])]
    page, marks = Image.open(io.BytesIO(contact_sheet(rows))), {}
    for i, (query, hits) in enumerate(rows):
        for j, shown in enumerate([query, *hits]):
            tile = page.crop((j * WIDE, i * TALL, (j + 1) * WIDE, i * TALL + WIDE))
            colour = "yellow" if shown.path == path else "grey" if shown.path else "white"
            assert tile.getpixel((WIDE // 2, WIDE // 2)) == ImageColor.getrgb(colour)
            if shown.path == path:
                assert tile.getpixel((0, 0)) == ImageColor.getrgb(FRAMES[shown.hit])
                marks[shown.hit] = int((np.asarray(ImageOps.crop(tile, FRAME)) != (255, 255, 0)).any(axis=2).sum())
    assert marks[True] > 20 and marks[False] == marks[None] == 0


def retrieval_row(method: str, folder: Path, gallery: str = "unseen") -> dict:
    """Two queries and two gallery images of each class."""
    features = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))
    sides = [Files([write_image(folder / domain / f"{i}.png") for i in range(12)], NAMES * 2, [domain] * 12)
             for domain in ("sketch", "photo")]
    metrics = score(*features, *sides)
    return {"protocol": "UCDR", "query_domain": "sketch", "gallery_name": gallery, "method": method,
            "transductive": method.endswith("centred"), "mAP@200": metrics["mAP@200"],
            "details": {"metrics": metrics, "queries": sides[0], "gallery": sides[1],
                        "query_features": features[0], "gallery_features": features[1]}}


def written(write, rows: list[dict], folder: Path) -> tuple[list[dict], list[dict[str, str]], str]:
    """Rows of results.json, lines of per_class.csv, and the page's text: no script, nothing from elsewhere, every name as text."""
    write(rows, folder, {"run": str(folder), "table": "a table of <b> & 33.33", "config": {"method": "a"}})
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert set(re.findall(r"<(\w+)", page)) <= set("html meta title style h1 div pre p table tr td i img".split())
    assert re.findall(r'\b(?:src|href|on\w+)="(.{11})', page) == ["data:image/"]
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    text = html.unescape(re.sub("<[^>]*>", "", page))
    assert "a table of <b> & 33.33" in text and NAMES[0] in text and "UCDR: queries of" in text and "ZSL: unseen" in text
    lines = list(csv.DictReader((folder / "per_class.csv").open(encoding="utf-8", newline="")))
    return json.loads((folder / "results.json").read_text(encoding="ascii"))["rows"], lines, text


def test_a_retrieval_leaves_numbers_of_every_class_and_a_page(tmp_path):
    rows = [retrieval_row("zero-shot", tmp_path), retrieval_row("zero-shot, centred", tmp_path),
            retrieval_row("zero-shot", tmp_path, "mixed")]
    found, lines, text = written(report.write_retrieval, rows, tmp_path)
    assert [row["mAP@200"] for row in found] == [row["mAP@200"] for row in rows] and "details" not in found[0]
    metrics = rows[0]["details"]["metrics"]
    assert [line["method"] for line in lines] == [row["method"] for row in rows for _ in NAMES]
    for k, name in enumerate(sorted(NAMES)):
        scores = [metrics[part][name] for part in ("per_class", "per_class@all")]
        assert [float(lines[k][key]) for key in ("mAP@200", "mAP@all", "queries")] == [*scores, 2]
        line = "\n".join(["", name, "zero-shot", *(f"{100 * score:.1f}" for score in scores), "2", "UCDR", "sketch", "mixed", ""])
        assert line.encode(errors="backslashreplace").decode() in text
    with Image.open(tmp_path / "queries.png") as picture:
        assert picture.height == 6 * TALL  # one query a class, of the first test, not centred


def test_the_picture_shows_the_nearest(tmp_path):
    details = retrieval_row("zero-shot", tmp_path)["details"]
    queries, gallery, lines = details["queries"], details["gallery"], report.examples("zero-shot", details)
    assert len({query.path for query, _ in lines}) == len(NAMES)
    for query, hits in lines:
        i = queries.paths.index(query.path)
        distances = [math.dist(details["query_features"][i], other) for other in details["gallery_features"]]
        order = sorted(range(12), key=distances.__getitem__)[:report.SHOWN]
        assert hits == [(gallery.paths[j], gallery.classes[j], gallery.classes[j] == queries.classes[i]) for j in order]


def test_a_classification_leaves_the_same(tmp_path):
    """Two images a class, all right but the second of class 1, which is taken for the last class, an unseen one."""
    labels, last = torch.arange(len(NAMES)).repeat(2), len(NAMES) - 1
    predicted = torch.stack([labels, torch.full_like(labels, last)], dim=1)  # among all, among unseen classes
    predicted[len(NAMES) + 1, 0] = last
    details = {"predicted": predicted, "labels": labels, "names": NAMES, "unseen": [last],
               "paths": [write_image(tmp_path / f"{i}.png") for i in range(12)]}
    rows = [{"method": "zero-shot", "details": details}, {"method": "sre-clip", "details": details}, {"method": "best-test"}]
    _, lines, text = written(report.write_classification, rows, tmp_path)
    assert [line["method"] for line in lines] == ["zero-shot"] * 6 + ["sre-clip"] * 6
    assert [float(line["accuracy"]) for line in lines] == [1, 0.5, 1, 1, 1, 1] * 2
    assert [line["among_unseen"] for line in lines] == ([""] * 5 + ["1.0"]) * 2
    assert "\na & b\nsre-clip\n50.0\n\n2\nseen\n" in text and "\npen\nsre-clip\n100.0\n100.0\n2\nunseen\n" in text
    with Image.open(tmp_path / "queries.png") as picture:
        assert picture.size == (3 * WIDE, 6 * TALL)


def test_curves_are_of_what_was_logged_more_than_once(tmp_path):
    log = tmp_path / "log.jsonl"

    def charts(lines: list[dict], end: str = "") -> list[str]:
        log.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
        return list(report.curves(log))

    lines = [{"phase": "target", "step": i, "loss": value} for i, value in enumerate([3.0, 2.0, float("nan"), 1.0])]
    [chart] = charts([*lines, {"phase": "target", "epoch": 0, "score": 0.5}], '{"cut')  # the score of a single epoch
    assert all(text in chart for text in ("target: loss, by step", "1 to 3, y: 1 to 3", 'points="0.0,0.0 150.0,50.0 300.0,100.0"'))
    [chart] = charts([{"phase": "target", "epoch": i, "score": i / 4} for i in range(3)])
    assert "%, by epoch" in chart and "y: 0 to 50" in chart
    [chart] = charts([{"phase": "sre", "step": i, "loss": float(i)} for i in range(5000)])
    assert 200 < chart.count(",") <= report.POINTS + 10
    with pytest.raises(ValueError, match="no training's log .*name another --run"):
        charts([], "no JSON\n")
