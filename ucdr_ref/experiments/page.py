"""report.html: an evaluation on one page that needs nothing else: no script, no address, pictures inside.

Every name is escaped, and the page's own policy forbids whatever an escape might have missed. The same rows
give the same bytes. Charts are in charts.py.
"""
from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..clip.tensorfile import show
from ..metrics import search
from .charts import escape, note, percent, shorten, svg_bars, svg_lines, svg_scatter, table
from .report import LEGIBLE, confusion, confusion_picture, most_confused, thumbnail
from .run_folder import read_lines

POINTS, MAPPED_CLASSES = 600, 8  # of a map
RANKS = 200  # of the precision curve
EXTREMES, RESULTS, THUMB = 3, 8, 72  # best and worst queries, results of each, pixels
MOST_CLASSES = 200  # of a per-class chart
ACCURACIES = {"zsl": "ZSL", "unseen": "unseen", "seen": "seen", "h": "H"}
STYLE = """
body{font:14px/1.45 system-ui,sans-serif;max-width:1080px;margin:24px auto;padding:0 16px;color:#1a1a1a}
h1{font-size:22px;overflow-wrap:anywhere} h2{font-size:18px;margin-top:32px;border-bottom:1px solid #ccc}
h3{font-size:15px;margin-bottom:4px} p.note{color:#555;margin:4px 0} summary{cursor:pointer;margin-top:8px}
table{border-collapse:collapse;margin:8px 0} th{white-space:nowrap}
th,td{padding:3px 8px;border-bottom:1px solid #e2e2e2;text-align:left;vertical-align:top}
td.t{overflow-wrap:anywhere} th.n,td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.row{display:flex;flex-wrap:wrap;gap:16px} .tight{gap:6px;margin:4px 0 12px}
.scroll{max-height:560px;overflow:auto}
svg text{font:11px system-ui,sans-serif;fill:#1a1a1a} .wide{max-width:100%;height:auto}
figure{margin:0;width:84px;font-size:11px;overflow-wrap:anywhere} img{display:block}
figure img{border:3px solid #aaa}
.hit img{border:3px solid #1e7a3a} .miss img{border:3px dashed #c02828}
"""

Row = Mapping[str, Any]
Rows = Sequence[Row]


def retrieval_page(rows: Rows, log_lines: Iterable[str], about: Mapping[str, Any]) -> str:
    """The page of a retrieval run, as text.

    rows: as `retrieval.evaluate` returns them; details that hold `query_features` [q, e] and
    `gallery_features` [g, e] on the CPU give precision at rank, map and examples. log_lines: the lines of
    log.jsonl. about: `run`, `config`, `defaults`, `versions`, and, where there are any, `notes`: sentences
    below the table.
    """
    names = [key for key, value in rows[0].items() if isinstance(value, float)]
    lines = [[row["protocol"], row["query_domain"], row["gallery_name"], row["method"],
              *(percent(row[name]) for name in names), sizes(row)] for row in rows]
    meaning = "Per cent. mAP@k divides by the hits within the first k, mAP@k/relevant by min(relevant, k)."
    parts = [table(["protocol", "queries", "gallery", "method", *names, "queries x gallery"], lines,
                   range(4, 5 + len(names))),
             *map(note, [meaning, *about.get("notes", ())]),
             curves(log_lines, "mAP@200 of the validation queries")]
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if "details" in row:
            groups.setdefault((row["protocol"], row["query_domain"], row["gallery_name"]), []).append(row)
    for number, ((protocol, domain, gallery), members) in enumerate(groups.items()):
        compared = before_and_after(members, about)
        ranked = {row["method"]: ranks(row["details"]) for row in members
                  if "query_features" in row["details"]}
        parts.append(f"<h2>{escape(protocol)}: queries from {escape(domain)}, gallery {escape(gallery)}</h2>")
        if ranked:
            series = {name: precision_at_rank(hits) for name, (_, hits) in ranked.items()}
            title = "Precision at rank, mean over the queries, in per cent"
            parts.append(svg_lines(title, series, 640, 240, zero=True))
        parts.append(class_chart("mAP@200 by query class", compared, class_precisions))
        if number == 0 and all(row["method"] in ranked for row in compared):
            parts += [maps(compared), examples(compared, ranked, about["config"].get("stroke_domains", ()))]
    return page(about, parts)


def classification_page(rows: Rows, log_lines: Iterable[str], about: Mapping[str, Any]) -> str:
    """The page of a classification run: rows as `classification.evaluate` returns them, the rest as above."""
    lines = [[row["method"], average, *(percent(row[average][key]) for key in ACCURACIES),
              row["images"], row["classes"]] for row in rows for average in ("instance", "class")]
    meaning = ("Per cent. ZSL: images of unseen classes among the unseen classes; unseen, seen: among all; "
               "H: their harmonic mean. instance: mean over images; class: mean over classes.")
    compared = before_and_after([row for row in rows if "details" in row], about)
    parts = [table(["method", "mean over", *ACCURACIES.values(), "images", "classes"], lines, range(2, 8)),
             *map(note, [meaning, *about.get("notes", ())]), curves(log_lines, "H on the test images (S6)"),
             "<h2>Classes</h2>",
             class_chart("Accuracy by class, among all classes", compared, class_accuracies),
             "<h2>What is taken for what</h2>"]
    if len(compared[0]["details"]["names"]) <= LEGIBLE:
        picture = data_uri(confusion_picture(compared), "PNG")
        parts.append(f'<img class="wide" alt="confusion matrices" src="{picture}">')
    parts.append('<div class="row">')
    for row in compared:
        pairs = [[a, b, count, percent(share)] for a, b, count, share in most_confused(row["details"], 15)]
        parts.append(f"<div><h3>{escape(row['method'])}: most confused</h3>"
                     + table(["true", "predicted", "images", "% of the class"], pairs, (2, 3)) + "</div>")
    return page(about, [*parts, "</div>"])


def log_lines(run: Path) -> list[str]:
    """The lines of a run's log.jsonl; none when nothing was trained."""
    path = run / "log.jsonl"
    lines = read_lines(path) if path.exists() else []
    for number, values in enumerate(lines, 1):
        if not all(type(value) is str if key == "phase" else type(value) in (int, float)
                   for key, value in values.items()) \
                or "phase" not in values:
            raise ValueError(f"{show(path)}, line {number}: not a phase and numbers, as a training logs "
                             f"them; name another --run")
    return list(map(json.dumps, lines))


# Sections


def page(about: Mapping[str, Any], parts: Sequence[str]) -> str:
    title = escape(f"{about['config'].get('method', '')}: {about['run']}")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = (f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
            f"<title>{title}</title><style>{STYLE}</style>")
    body = "\n".join([f"<h1>{title}</h1>", *parts, settings(about)])
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def settings(about: Mapping[str, Any]) -> str:
    """The config, fields that differ from the defaults first, and the versions."""
    defaults, config = ({key: json.dumps(value, ensure_ascii=False) for key, value in about[name].items()}
                        for name in ("defaults", "config"))
    same = [[key, value] for key, value in config.items() if value == defaults.get(key)]
    changed = [[key, value, defaults.get(key, "")] for key, value in config.items()
               if value != defaults.get(key)]
    others = table(["field", "value"], same)
    return ("<h2>Config</h2>" + table(["differs from its default", "value", "default"], changed)
            + f"<details><summary>{len(same)} fields at their defaults</summary>{others}</details>"
            + "<h2>Versions</h2>" + table(["of", "version"], list(about["versions"].items())))


def curves(lines: Iterable[str], selection: str) -> str:
    """A chart for each number that a phase logs, and one of the value by which the best epoch is kept."""
    losses: dict[tuple[str, str], list[float]] = {}
    chosen_by: list[float] = []
    for line in lines:
        values = json.loads(line)
        if "validation_mAP" in values:
            chosen_by.append(values["validation_mAP"])
            continue
        for key in values.keys() - {"phase", "epoch", "step"}:
            losses.setdefault((values["phase"], key), []).append(values[key])
    order = sorted(losses, key=lambda item: (item[0], item[1] != "loss", item[1]))
    charts = [svg_lines(f"{phase}: {key}, by step", {"": thin(losses[phase, key])}, 340, 170)
              for phase, key in order]
    if chosen_by:
        points = {"": list(enumerate(chosen_by, 1))}
        charts.append(svg_lines(f"{selection}, by epoch", points, 340, 170, dots=True))
    return '<h2>Training</h2><div class="row">' + "".join(charts) + "</div>" if charts else ""


def class_chart(title: str, compared: Rows, values: Callable[[Row], dict[str, float]]) -> str:
    """Each class's number in per cent under the first and the last row, largest gain first."""
    found = [values(row) for row in compared]
    labels = sorted(found[0], key=lambda name: (found[0][name] - found[-1][name], -found[-1][name], name))
    more = ""
    if len(labels) > MOST_CLASSES:
        more = note(f"{len(labels) - MOST_CLASSES} classes in the middle are left out; see per_class.csv.")
        labels = labels[:MOST_CLASSES // 2] + labels[-MOST_CLASSES // 2:]
    rows = [(name, [numbers[name] for numbers in found]) for name in labels]
    chart = svg_bars([row["method"] for row in compared], rows)
    return f'<h3>{escape(title)}, in per cent</h3>{more}<div class="scroll">{chart}</div>'


def maps(compared: Rows) -> str:
    """Queries and gallery of a few classes along their two principal axes, before and after."""
    classes = spread(sorted(set(compared[0]["details"]["queries"].classes)), MAPPED_CLASSES)
    letters = dict(zip(classes, "ABCDEFGH"))
    charts = []
    for row in compared:
        marks, features = [], []
        for part, rows in (("queries", "query_features"), ("gallery", "gallery_features")):
            labels = row["details"][part].classes
            chosen = spread([i for i, name in enumerate(labels) if name in letters], POINTS // 2)
            marks += [(letters[labels[i]], part == "queries") for i in chosen]
            features.append(row["details"][rows][chosen])
        positions, share = plane(torch.cat(features))
        title = f"{row['method']}: two axes hold {share:.0%} of the variance"
        charts.append(svg_scatter(title, positions.tolist(), marks))
    legend = ", ".join(f"{letter} {shorten(name, 40)}" for name, letter in letters.items())
    return ('<h3>Map of queries and gallery</h3><div class="row">' + "".join(charts) + "</div>"
            + note(f"Capital and bold: query; small: gallery. {legend}."))


def examples(compared: Rows, ranked: Mapping[str, tuple[Tensor, Tensor]], strokes: Sequence[str]) -> str:
    """The last row's best and worst queries, each of another class, with every row's first results."""
    last = compared[-1]["details"]
    order = last["metrics"]["AP"].argsort(descending=True, stable=True).tolist()
    best = one_per_class(order, last["queries"].classes)
    worst = one_per_class([i for i in reversed(order) if i not in best], last["queries"].classes)
    parts = []
    for title, chosen in [("Best queries", best), ("Worst queries", worst)]:
        parts.append(f"<h3>{title} of {escape(compared[-1]['method'])}</h3>")
        for i, row in ((i, row) for i in chosen for row in compared):
            details = row["details"]
            nearest, hits = (part[i][:RESULTS].tolist() for part in ranked[row["method"]])
            shown = [(details["queries"], i, "query")]
            shown += [(details["gallery"], j, "hit" if hit else "miss") for j, hit in zip(nearest, hits)]
            figures = [figure(files.paths[j], files.classes[j], files.domains[j] in strokes, kind)
                       for files, j, kind in shown]
            parts.append(note(f"{row['method']}: AP@200 {percent(float(details['metrics']['AP'][i]))}"))
            parts.append('<div class="row tight">' + "".join(figures) + "</div>")
    return "".join(parts)


def figure(path: str, name: str, inverted: bool, kind: str) -> str:
    picture = data_uri(thumbnail(path, THUMB, inverted), "JPEG")
    image = f'<img width="{THUMB}" height="{THUMB}" alt="" title="{escape(path)}" src="{picture}">'
    caption = f"{kind}: {escape(shorten(name, 30))}"
    return f'<figure class="{kind}">{image}<figcaption>{caption}</figcaption></figure>'


def data_uri(picture: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    picture.save(file, format=kind, quality=75)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


# Numbers


def before_and_after(rows: Rows, about: Mapping[str, Any]) -> list[Row]:
    """The first row and the row of the run's own method; one row where they are the same."""
    own = next((row for row in rows if row["method"] == about["config"].get("method")), rows[-1])
    return [rows[0]] if own is rows[0] else [rows[0], own]


def sizes(row: Row) -> str:
    cut = f"; k cut to {row['k_used']}" if row["k_used"] < row["k"] else ""
    alone = f"; {row['no_relevant']} without a relevant image" if row["no_relevant"] else ""
    return f"{row['queries']} x {row['gallery']}{cut}{alone}"


def class_precisions(row: Row) -> dict[str, float]:
    details = row["details"]
    return {details["names"][label]: value for label, value in details["metrics"]["per_class"].items()}


def class_accuracies(row: Row) -> dict[str, float]:
    names, unseen = row["details"]["names"], row["details"]["unseen"]
    counts = confusion(row["details"]).tolist()
    return {name + (" (unseen)" if k in unseen else ""): counts[k][k] / sum(counts[k])
            for k, name in enumerate(names) if sum(counts[k])}


def plane(features: Tensor) -> tuple[Tensor, float]:
    """[n, e] -> coordinates [n, 2] along the two principal axes, and the share of the variance they hold.

    An axis points where its largest entry is positive, so that the picture does not flip between runs.
    """
    centred = features.double() - features.double().mean(dim=0)
    _, lengths, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:2] * axes[:2].gather(1, axes[:2].abs().argmax(dim=1, keepdim=True)).sign()
    positions = torch.nn.functional.pad(centred @ axes.T, (0, 2 - len(axes)))
    return positions, float((lengths[:2] ** 2).sum() / (lengths ** 2).sum().clamp(min=1e-30))


def ranks(details: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Gallery indices of each query's nearest images and whether they are hits, both [q, k]; k <= RANKS."""
    order = search(details["query_features"], details["gallery_features"], RANKS)[1]
    ids = {name: i for i, name in enumerate(details["names"])}
    query, gallery = (torch.tensor([ids[name] for name in details[part].classes])
                      for part in ("queries", "gallery"))
    return order, gallery[order] == query[:, None]


def precision_at_rank(hits: Tensor) -> list[tuple[float, float]]:
    """(k, Prec@k in per cent) for each k, from hits [q, k]."""
    counts = hits.double().mean(dim=0).cumsum(0).tolist()
    return [(rank, 100 * count / rank) for rank, count in enumerate(counts, 1)]


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
