"""report.html: an evaluation on one page that needs nothing else: no script, no address, pictures inside.

Every name is escaped, and the page's own policy forbids whatever an escape might have missed. The same rows
give the same bytes. Charts and tables are in charts.py.
"""
from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, product
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .charts import chart, escape, note, table
from .report import Row, class_accuracies, confusion_picture, contact_sheet, ranked_queries
from .run_folder import read_lines

POINTS, LETTERS = 600, "ABCDEFGH"  # points of a map, and its classes
EXTREMES, RESULTS, THUMB = 3, 8, 72  # best and worst queries, results of each, pixels
MOST_CLASSES = 200  # of a table of classes
STYLE = """
body{font:14px system-ui,sans-serif;max-width:1080px;margin:24px auto;overflow-wrap:anywhere}
th,td{padding:2px 8px;border-bottom:1px solid #ddd;text-align:left} th{white-space:nowrap}
td.n{text-align:right} pre{overflow:auto} svg{font-size:11px} svg,img{max-width:100%}
.row{display:flex;flex-wrap:wrap;gap:12px} .scroll{max-height:560px;overflow:auto}
"""


def retrieval_page(rows: Sequence[Row], log: Iterable[Row], about: Row) -> str:
    """The page of a retrieval run, as text.

    rows: as `retrieval.evaluate` returns them. log: the lines of log.jsonl. about: `run`, `table` (the rows
    as printed), `config`, `defaults`, `versions`.
    """
    parts = [note("Per cent. mAP@k divides by the hits within the first k."),
             training(log, "mAP@200 of the validation queries, by epoch (o: best)")]
    tests = groupby(rows, itemgetter("protocol", "query_domain", "gallery_name"))
    for (protocol, domain, gallery), group in tests:
        members = list(group)
        compared = before_and_after(members, about)
        classes = [{details["names"][k]: ap for k, ap in details["metrics"]["per_class"].items()}
                   for details in (row["details"] for row in compared)]
        title = f"{protocol}: queries from {domain}, gallery {gallery}"
        parts += [f"<h2>{escape(title)}</h2>",
                  class_table("mAP@200 by query class", compared, classes)]
        if members[0] is rows[0]:  # one test has examples enough
            parts += [maps(compared), examples(compared, about["config"]["stroke_domains"])]
    return page(about, parts)


def classification_page(rows: Sequence[Row], log: Iterable[Row], about: Row) -> str:
    """The page of a classification run: rows as `classification.evaluate` returns them, the rest as above."""
    compared = before_and_after([row for row in rows if "details" in row], about)
    classes = [{name if split == "seen" else f"{name} (unseen)": accuracy
                for name, split, _, accuracy, _ in class_accuracies(row["details"])} for row in compared]
    parts = [note("Per cent. ZSL: images of unseen classes among the unseen classes; unseen, seen: among "
                  "all; H: their harmonic mean. instance: mean over images; class: mean over classes."),
             training(log, "H on the test images (S6), by epoch (o: best)"),
             class_table("Accuracy by class, among all", compared, classes),
             "<h2>What is taken for what</h2>", embedded(confusion_picture(compared), "confusion")]
    return page(about, parts)


def log_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl; none when nothing was trained."""
    path = run / "log.jsonl"
    lines = read_lines(path) if path.exists() else []
    for number, values in enumerate(lines, 1):
        numbers = [value for key, value in values.items() if key != "phase"]
        sound = all(type(value) in (int, float) and abs(value) < 1e300 for value in numbers)
        if type(values.get("phase")) is not str or not sound:
            raise ValueError(f"{path}, line {number}: not a phase and numbers as training logs them; "
                             "name another --run")
    return lines


# Sections


def page(about: Row, parts: Sequence[str]) -> str:
    """The whole page: table, parts, the config (what differs from the defaults first) and the versions."""
    printed = "\n".join(map(escape, about["table"].splitlines()))
    title = escape(f"{about['config']['method']}: {about['run']}")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    fields = [[name, *(json.dumps(values[name], ensure_ascii=False)
                       for values in (about["config"], about["defaults"]))] for name in about["config"]]
    fields.sort(key=lambda field: field[1] == field[2])
    return "\n".join([
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{STYLE}</style></head>',
        f"<body><h1>{title}</h1><pre>{printed}</pre>", *parts,
        "<h2>Config</h2>", note("Fields that differ from their default come first."),
        f'<div class="scroll">{table(["field", "value", "default"], fields)}</div>',
        "<h2>Versions</h2>", table(["of", "version"], about["versions"].items()), "</body></html>\n"])


def training(log: Iterable[Row], selection: str) -> str:
    """A chart of each number that a phase logs; `selection`: the title of what chooses the best epoch."""
    found: dict[str, list[float]] = {}
    for values in log:
        for key in values.keys() - {"phase", "epoch", "step"}:
            title = selection if key == "validation_mAP" else f"{values['phase']}: {key}, by step"
            found.setdefault(title, []).append(values[key])
    charts = []
    for title, numbers in sorted(found.items()):
        points = thin(numbers)
        best = max(points, key=lambda point: point[1])
        charts.append(chart(title, {"": points}, [(best, "o")] if title == selection else ()))
    return '<h2>Training</h2><div class="row">' + "".join(charts) + "</div>" if charts else ""


def class_table(title: str, compared: Sequence[Row], found: Sequence[Mapping[str, float]]) -> str:
    """Each class's number under the compared rows, largest gain first; a bar shows it, light for a loss."""
    first, last = found[0], found[-1]
    names = sorted(first, key=lambda name: (first[name] - last[name], -last[name], name))
    header, more = ["class", *(row["method"] for row in compared)], ""
    if len(names) > MOST_CLASSES:
        more = note(f"{len(names) - MOST_CLASSES} classes in the middle are left out; see per_class.csv.")
        names = names[:MOST_CLASSES // 2] + names[-MOST_CLASSES // 2:]
    lines: list[list[object]] = [[name, *(numbers[name] for numbers in found)] for name in names]
    if len(found) > 1:
        header.append("gain")
        for line, name in zip(lines, names):
            gain = last[name] - first[name]
            line.append(f"{100 * gain:+.1f} " + ("\u2588" if gain > 0 else "\u2591") * round(40 * abs(gain)))
    return f'<h3>{escape(title)}, in per cent</h3>{more}<div class="scroll">{table(header, lines)}</div>'


def maps(compared: Sequence[Row]) -> str:
    """Queries and gallery of a few classes along their two principal axes, before and after."""
    classes = spread(sorted(set(compared[0]["details"]["queries"].classes)), len(LETTERS))
    letters = dict(zip(classes, LETTERS))
    charts = []
    for row in compared:
        details, marks, features = row["details"], "", []
        for part, rows in (("queries", "query_features"), ("gallery", "gallery_features")):
            labels = details[part].classes
            chosen = spread([i for i, name in enumerate(labels) if name in letters], POINTS // 2)
            found = "".join(letters[labels[i]] for i in chosen)
            marks += found if part == "queries" else found.lower()
            features.append(details[rows][chosen])
        positions, share = plane(torch.cat(features))
        edge = round(float(positions.abs().max()), 2)
        charts.append(chart(f"{row['method']}: two axes hold {share:.0%} of the variance", {},
                            list(zip(positions.tolist(), marks)), (-edge, edge, -edge, edge), 500, 500))
    legend = ", ".join(f"{letter} {name}" for name, letter in letters.items())
    return ('<h3>Map of queries and gallery</h3><div class="row">' + "".join(charts) + "</div>"
            + note(f"Capital: query; small: gallery. {legend}."))


def examples(compared: Sequence[Row], strokes: Sequence[str]) -> str:
    """The last row's best and worst queries, each of another class, with every row's first results."""
    last = compared[-1]["details"]
    order = last["metrics"]["AP"].argsort(descending=True, stable=True).tolist()
    best = one_per_class(order, last["queries"].classes)
    worst = one_per_class([i for i in reversed(order) if i not in best], last["queries"].classes)
    parts = []
    for title, chosen in [("Best queries", best), ("Worst queries", worst)]:
        parts.append(f"<h3>{title} of {escape(compared[-1]['method'])}</h3>")
        for i, row in product(chosen, compared):
            name, ap = last["queries"].classes[i], float(row["details"]["metrics"]["AP"][i])
            picture = contact_sheet(ranked_queries(row, [i], strokes, RESULTS), THUMB)
            parts += [note(f"{name}, {row['method']}: AP@200 {100 * ap:.2f}"),
                      embedded(picture, "a query and its first results")]
    return "".join(parts)


def embedded(picture: Image.Image, what: str) -> str:
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=85)
    return f'<img alt="{what}" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


# Numbers


def before_and_after(rows: Sequence[Row], about: Row) -> list[Row]:
    """The first row and the row of the run's own method, where that is another one."""
    return [rows[0], *(row for row in rows[1:] if row["method"] == about["config"]["method"])]


def plane(features: Tensor) -> tuple[Tensor, float]:
    """[n, e] -> coordinates [n, 2] along the two principal axes, and the share of the variance they hold.

    An axis points where its largest entry is positive, so that the picture does not flip between runs.
    """
    centred = features.double() - features.double().mean(dim=0)
    _, lengths, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:2] * axes[:2].gather(1, axes[:2].abs().argmax(dim=1, keepdim=True)).sign()
    positions = torch.nn.functional.pad(centred @ axes.T, (0, 2 - len(axes)))
    return positions, float((lengths[:2] ** 2).sum() / (lengths ** 2).sum().clamp(min=1e-30))


def one_per_class(order: Iterable[int], classes: Sequence[str]) -> list[int]:
    """The first EXTREMES indices of different classes."""
    first: dict[str, int] = {}
    for i in order:
        first.setdefault(classes[i], i)
    return list(first.values())[:EXTREMES]


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spaced."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else list(items)


def thin(values: Sequence[float], count: int = 160) -> list[tuple[float, float]]:
    """(step, value) from step 1; of more than `count` steps means of as many stretches, at the last step."""
    count = min(count, len(values))
    edges = [len(values) * i // count for i in range(count + 1)]
    return [(b, sum(values[a:b]) / (b - a)) for a, b in zip(edges, edges[1:])]
