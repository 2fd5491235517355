"""The page of a run: complete, self-contained, the same each time, and deaf to whatever a folder is called."""
from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import train
from tests.helpers import flags
from ucdr_ref.config import Config
from ucdr_ref.experiments.page import (
    MOST_CLASSES,
    classification_page,
    examples,
    one_per_class,
    plane,
    retrieval_page,
    spread,
    thin,
)
from ucdr_ref.experiments.predictions import predict
from ucdr_ref.images.batches import Files
from ucdr_ref.metrics import retrieval

SCRIPT, FORMULA = "<script>alert(1)</script>", '=HYPERLINK("http://a.example")'
NAMES = [SCRIPT, FORMULA, "\x1b[31mred", "a' onload='alert(2)", *(f"class {i}" for i in range(8))]
VOID = {"meta", "img"}
BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
                if (found := shutil.which(name))), None)


class Page(HTMLParser):
    """Tags, attributes and text of a page; raises AssertionError when a tag is not closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def about(method: str) -> dict[str, Any]:
    config = {**asdict(Config()), "method": method, "target_lr": 0.07, "data_root": SCRIPT}
    return {"run": f"runs/{SCRIPT}", "config": config, "defaults": asdict(Config()), "versions": {"torch": "2"},
            "table": f"method\n{SCRIPT}  33.33"}


def retrieval_rows(folder: Path, classes: int = 12) -> list[dict[str, Any]]:
    """Zero-shot features that are noise, and trained ones that cluster by class; three images a class and side."""
    generator = torch.Generator().manual_seed(0)
    names = sorted((NAMES + [f"more {i}" for i in range(classes)])[:classes])
    labels = torch.arange(classes).repeat(3)
    sides = []
    for domain in ("sketch", "photo"):
        paths = [folder / f"{domain}{i}.png" for i in range(len(labels))]
        for path in paths[:6]:  # the others are gone
            Image.new("RGB", (20, 16), "white" if domain == "sketch" else "teal").save(path)
        sides.append(Files([str(path) for path in paths], names * 3, [domain] * len(labels)))
    centres = torch.randn(classes, 8, generator=generator)
    rows = []
    for method, weight in (("zero-shot", 0.1), ("ucdr-adapter", 2.0)):
        query, gallery = (weight * centres[labels] + torch.randn(len(labels), 8, generator=generator) for _ in sides)
        metrics = retrieval(query, labels, gallery, labels)
        numbers = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
        details = {"metrics": metrics, "names": names, "queries": sides[0], "gallery": sides[1],
                   "query_features": query, "gallery_features": gallery}
        rows.append({"protocol": "UCDR", "query_domain": SCRIPT, "gallery_name": "unseen", "method": method,
                     **numbers, "details": details})
    return rows


def classification_rows(classes: int) -> list[dict[str, Any]]:
    names = (NAMES + [f"more {i}" for i in range(classes)])[:classes]
    labels = torch.arange(classes).repeat(2)
    accuracies = {"zsl": None, "unseen": 0.25, "seen": 0.5, "h": 1 / 3}
    rows = []
    for method, wrong in (("zero-shot", 5), ("sre-clip", 2)):
        predicted = labels.clone()
        predicted[:wrong] = classes - 1
        details = {"predicted": predict(iter([(torch.arange(len(labels)), torch.eye(classes)[predicted])]), len(labels), classes, [classes - 1]), "labels": labels, "names": names, "unseen": [classes - 1]}
        rows.append({"method": method, "images": len(labels), "classes": classes, "instance": accuracies,
                     "class": accuracies, "details": details})
    return [*rows, {key: value for key, value in rows[1].items() if key != "details"} | {"method": "best-test"}]


LOG = [{"phase": "source", "epoch": 0, "step": i, "loss": value, "align": 1.0}
       for i, value in enumerate([3.0, 2.0, float("nan"), 1.0], 1)]
LOG += [{"phase": "target", "epoch": i, "validation_mAP": value} for i, value in enumerate([0.1, 0.4, 0.3])]


def check(text: str) -> Page:
    """Balanced, small, no script, nothing from elsewhere; the names are there as text."""
    page = Page(text)
    assert len(text.encode()) < 2_000_000
    assert not {"script", "link", "iframe", "object", "base", "form", "a"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on") and name != "href" and "url(" not in value
        assert name != "src" or value.startswith("data:image/"), value[:80]
    assert dict(page.attributes)["content"].startswith("default-src 'none'")
    assert "@import" not in text and "url(" not in text
    assert all(c.isprintable() or c == "\n" for c in text)
    words = "".join(page.texts)
    assert all(part in words for part in (f"{SCRIPT}  33.33", f'"{SCRIPT}"', "target_lr", "0.07", "torch"))
    return page


def test_a_retrieval_page_is_whole_and_harmless(tmp_path: Path) -> None:
    rows = retrieval_rows(tmp_path)
    text = retrieval_page(rows, LOG, about("ucdr-adapter"))
    page = check(text)
    words = "\n".join(page.texts)
    for part in (SCRIPT, FORMULA, "\\x1b[31mred", "Map of queries", "Best queries", "Worst queries",
                 "source: loss, by step", "mAP@200 of the validation queries"):
        assert part in words, part
    assert page.tags.count("img") == 2 * 3 * 2 and "NaN" not in text and "nan" not in page.texts
    assert retrieval_page(retrieval_rows(tmp_path), LOG, about("ucdr-adapter")) == text


def test_a_run_that_was_not_trained_has_no_curves(tmp_path: Path) -> None:
    page = check(retrieval_page(retrieval_rows(tmp_path), [], about("ucdr-adapter")))
    words = "\n".join(page.texts)
    assert "mAP@200 by query class" in words and "Training" not in words


def test_a_zero_shot_run_is_compared_with_nothing(tmp_path: Path) -> None:
    page = check(retrieval_page(retrieval_rows(tmp_path)[:1], [], about("zero-shot")))
    assert page.tags.count("img") == 2 * 3 and "zero-shot" in page.texts and "gain" not in page.texts


@pytest.mark.parametrize("classes", [12, 120])
def test_a_classification_page_is_whole_and_harmless(classes: int) -> None:
    page = check(classification_page(classification_rows(classes), LOG, about("sre-clip")))
    words = "\n".join(page.texts)
    for part in (SCRIPT, FORMULA, "H on the test images", "(unseen)", "taken for"):
        assert part in words, part
    assert page.tags.count("img") == 1


def test_classes_stand_by_gain(tmp_path: Path) -> None:
    rows = retrieval_rows(tmp_path)
    page = Page(retrieval_page(rows, [], about("ucdr-adapter")))
    gains = [float(text.split()[0]) for text in page.texts if re.fullmatch(r"[+-]\d+\.\d [\u2588\u2591]*", text)]
    first, last = (row["details"]["metrics"]["per_class"] for row in rows)
    assert gains == pytest.approx(sorted((100 * (last[k] - first[k]) for k in first), reverse=True), abs=0.051)


def test_many_classes_keep_the_page_small(tmp_path: Path) -> None:
    rows = retrieval_rows(tmp_path, MOST_CLASSES + 100)
    text = retrieval_page(rows, LOG, about("ucdr-adapter"))
    check(text)
    assert "100 classes in the middle are left out" in text


def test_the_plane_is_that_of_the_covariance_and_does_not_flip() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1)) * torch.tensor([9.0, 4, 1, 1, 1, 1])
    positions, share = plane(x)
    values, vectors = torch.linalg.eigh(torch.cov(x.double().T))
    assert share == pytest.approx(float(values[-2:].sum() / values.sum()))
    expected = (x.double() - x.double().mean(dim=0)) @ vectors[:, [-1, -2]]
    torch.testing.assert_close(positions.abs(), expected.abs())
    shuffled = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(plane(x[shuffled])[0], positions[shuffled])
    flat = plane(torch.ones(3, 4))
    assert flat[0].shape == (3, 2) and flat[1] == 0
    assert plane(torch.ones(1, 1))[0].shape == (1, 2)


def test_examples_show_extremes_of_different_classes(tmp_path: Path) -> None:
    rows = retrieval_rows(tmp_path)
    text = examples(rows, [])
    shown = [line for line in Page(text).texts if "ucdr-adapter: AP@200" in line]
    ap = sorted(rows[1]["details"]["metrics"]["AP"].tolist())
    assert shown[0].endswith(f" {100 * ap[-1]:.2f}") and shown[3].endswith(f" {100 * ap[0]:.2f}")
    assert one_per_class([4, 0, 3, 1, 2], ["a", "b", "b", "a", "a"]) == [4, 1]


def test_long_lists_are_thinned_evenly() -> None:
    assert spread(range(10), 5) == [0, 2, 4, 6, 8] and spread("abc", 5) == ["a", "b", "c"]
    assert thin([5.0, 3.0]) == [(1, 5.0), (2, 3.0)]
    assert thin([1.0, 3.0, 5.0, 7.0], 2) == [(2, 2.0), (4, 6.0)]


@pytest.mark.skipif(os.name != "posix", reason="names such as these are no file names here")
def test_hostile_folders_and_files_from_training_to_page(world: Path, tmp_path: Path, capsys: Any) -> None:
    data, names = tmp_path / "data", {"shape_4": "=HYPERLINK(1)", "shape_6": "<img src=x onerror=alert(1)>"}
    shutil.copytree(world / "data", data)
    for domain in data.iterdir():
        for old, new in names.items():
            (domain / old).rename(domain / new)
    os.rename(data / "photo" / names["shape_6"] / "0.png", os.fsencode(data / "photo" / names["shape_6"]) + b"/\xff\x1b.png")
    split = json.loads((world / "split.json").read_text())
    split["test"] = [names.get(name, name) for name in split["test"]]
    split["train"] = [names.get(name, name) for name in split["train"]]
    split["val"] = [names.get(name, name) for name in split["val"]]
    (tmp_path / "split.json").write_text(json.dumps(split))
    more = ["--data-root", str(data), "--class-split", str(tmp_path / "split.json")]
    assert train.main(flags(world, tmp_path / "run", *more)) == 0
    printed = capsys.readouterr()
    assert all(c.isprintable() or c in "\n\r" for c in printed.out)
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and not any(name.startswith("on") for name, _ in page.attributes)
    assert all(value.startswith("data:image/") for name, value in page.attributes if name == "src")
    assert "ucdr-adapter" in text and page.tags.count("img") == 8
    printed_rows = [line for line in printed.out.splitlines() if re.search(r"\d x \d", line)]
    assert len(printed_rows) > 3 and all(line in "".join(page.texts) for line in printed_rows)
    paths = [row["query"] for row in csv.DictReader((tmp_path / "run" / "per_query.csv").open(encoding="utf-8"))]
    assert paths and not any(path[0] in "=+-@" for path in paths)


def browse(path: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Console messages, and addresses that were asked for besides the browser's own; writes folder/shot.png."""
    log = folder / "net.json"
    quiet = ["--no-first-run", "--disable-sync", "--disable-background-networking", "--disable-component-update",
             "--host-resolver-rules=MAP * ~NOTFOUND"]
    found = subprocess.run([str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", *quiet, "--enable-logging=stderr",
                            f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", "--window-size=1100,4000",
                            f"--screenshot={folder / 'shot.png'}", path.as_uri()], capture_output=True, timeout=120)
    console = [line for line in found.stderr.decode(errors="replace").splitlines() if "CONSOLE" in line]
    text = log.read_text(errors="replace")
    asked = {part.split('"')[0] for part in text.split('"url":"')[1:]}
    own = ("google.com/", "googleapis.com/", "gstatic.com/")
    return console, sorted(url for url in asked if url.startswith("http") and not any(host in url for host in own))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_shows_it_without_a_word_or_a_request(tmp_path: Path) -> None:
    control = tmp_path / "control.html"
    control.write_text('<img src="http://elsewhere.example/x.png"><script>console.log("seen")</script>')
    console, asked = browse(control, tmp_path)
    assert console and asked == ["http://elsewhere.example/x.png"]  # so silence below means something
    pages = {"retrieval": retrieval_page(retrieval_rows(tmp_path), LOG, about("ucdr-adapter")),
             "classification": classification_page(classification_rows(12), LOG, about("sre-clip"))}
    for name, text in pages.items():
        path = tmp_path / f"{name}.html"
        path.write_text(text, encoding="utf-8")
        assert browse(path, tmp_path) == ([], []), name
        with Image.open(tmp_path / "shot.png") as shot:
            dark = (np.asarray(shot.convert("L")) < 128).mean(axis=1)
        assert (dark[:1000] > 0).mean() > 0.3, name  # something is drawn
