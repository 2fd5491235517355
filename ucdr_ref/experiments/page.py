"""report.html: an evaluation on one page that needs nothing else. No script, no address; charts and pictures stand inside.

Every chart can be read without colour (dashes, shapes, letters, words). Every name is escaped, and the page's own policy
forbids whatever an escape might have missed. The same rows give the same bytes.
"""
from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..metrics import search
from .report import LEGIBLE, confusion, confusion_picture, most_confused, plain, thumbnail

COLOURS = ("#0072b2", "#d55e00", "#00795a", "#a3497d", "#8a6100", "#3a7ca5", "#000000", "#6b4c9a")  # dark enough on white
DASHES = ("", "7 3", "2 3", "9 3 2 3")
POINTS, MAPPED_CLASSES = 600, 8  # of a map
RANKS = 200  # of the precision curve
EXTREMES, RESULTS, THUMB = 3, 8, 72  # best and worst queries, results of each, pixels
MOST_CLASSES = 200  # of a per-class chart
STYLE = """body{font:14px/1.45 system-ui,sans-serif;max-width:1080px;margin:24px auto;padding:0 16px;color:#1a1a1a}
h1{font-size:22px}h2{font-size:18px;margin-top:32px;border-bottom:1px solid #ccc}h3{font-size:15px;margin-bottom:4px}
table{border-collapse:collapse;margin:8px 0}th,td{padding:3px 10px;border-bottom:1px solid #e2e2e2;text-align:left;
vertical-align:top;overflow-wrap:anywhere}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.row{display:flex;flex-wrap:wrap;gap:16px}.scroll{max-height:560px;overflow:auto}p.note{color:#555;margin:4px 0}
svg text{font:11px system-ui,sans-serif;fill:#1a1a1a}figure{margin:0;width:84px;font-size:11px;overflow-wrap:anywhere}
figure img{display:block;border:3px solid #aaa}.hit img{border:3px solid #1e7a3a}.miss img{border:3px dashed #c02828}
.row.tight{gap:6px;margin:4px 0 12px}summary{cursor:pointer;margin-top:8px}.wide{max-width:100%;height:auto}"""

Rows = Sequence[Mapping[str, Any]]


def retrieval_page(rows: Rows, log_lines: Iterable[str], about: Mapping[str, Any]) -> str:
    """The page of a retrieval run, as text.

    rows: as `retrieval.evaluate` returns them; those whose details hold `query_features` [q, e] and `gallery_features`
    [g, e] get precision at rank, map and examples. log_lines: the lines of log.jsonl. about: `run`, `config`, `defaults`,
    `versions`, and, where there are any, `notes`: sentences below the table.
    """
    names = [key for key, value in rows[0].items() if isinstance(value, float)]
    header = ["protocol", "queries from", "gallery", "method", *names, "queries x gallery"]
    lines = [[row["protocol"], row["query_domain"], row["gallery_name"], row["method"], *(percent(row[name]) for name in names),
              f"{row['queries']} x {row['gallery']}"] for row in rows]
    notes = ["Per cent. mAP@k divides by the hits within the first k, mAP@k/relevant by min(relevant, k)."]
    parts = [table(header, lines, range(4, 5 + len(names))), *map(note, [*notes, *about.get("notes", ())]),
             curves(log_lines, "mAP@200 of the validation queries")]
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if "details" in row:
            groups.setdefault((row["protocol"], row["query_domain"], row["gallery_name"]), []).append(row)
    for number, ((protocol, domain, gallery), members) in enumerate(groups.items()):
        compared = before_and_after(members, about)
        ranked = {row["method"]: ranks(row["details"]) for row in members if "query_features" in row["details"]}
        parts.append(f"<h2>{escape(protocol)}: queries from {escape(domain)}, gallery {escape(gallery)}</h2>")
        if ranked:
            parts.append(svg_lines("Precision at rank, mean over the queries, in per cent",
                                   {name: precision_at_rank(hits) for name, (_, hits) in ranked.items()}, 560, 240, zero=True))
        parts.append(class_chart("mAP@200 by query class", compared, lambda row: {
            row["details"]["names"][label]: value for label, value in row["details"]["metrics"]["per_class"].items()}))
        if number == 0 and all(row["method"] in ranked for row in compared):
            parts += [maps(compared), examples(compared, ranked, about["config"].get("stroke_domains", ()))]
    return page(about, parts)


def classification_page(rows: Rows, log_lines: Iterable[str], about: Mapping[str, Any]) -> str:
    """The page of a classification run, as text: rows as `classification.evaluate` returns them, the rest as above."""
    titles = {"zsl": "ZSL", "unseen": "unseen", "seen": "seen", "h": "H"}
    lines = [[row["method"], average, *(percent(row[average][key]) for key in titles), row["images"], row["classes"]]
             for row in rows for average in ("instance", "class")]
    notes = ["Per cent. ZSL: images of unseen classes among the unseen classes; unseen, seen: among all classes; H: their "
             "harmonic mean. instance: mean over images; class: mean over classes."]
    detailed = [row for row in rows if "details" in row]
    compared = before_and_after(detailed, about)

    def accuracies(row: Mapping[str, Any]) -> dict[str, float]:
        counts, names, unseen = confusion(row["details"]).double(), row["details"]["names"], row["details"]["unseen"]
        return {names[k] + (" (unseen)" if k in unseen else ""): float(counts[k, k] / counts[k].sum())
                for k in range(len(names)) if counts[k].sum()}

    parts = [table(["method", "mean over", *titles.values(), "images", "classes"], lines, range(2, 8)),
             *map(note, [*notes, *about.get("notes", ())]), curves(log_lines, "H on the test images (S6)"),
             "<h2>Classes</h2>", class_chart("Accuracy by class, among all classes", compared, accuracies),
             "<h2>What is taken for what</h2>"]
    if len(detailed[0]["details"]["names"]) <= LEGIBLE:
        picture = data_uri(confusion_picture(compared), "PNG")
        parts.append(f'<img class="wide" alt="confusion matrices" src="{picture}">')
    parts.append('<div class="row">' + "".join(
        f"<div><h3>{escape(row['method'])}: most confused</h3>"
        + table(["true", "predicted", "images", "of the class"], [[*pair, percent(share)] for *pair, share in
                                                                  most_confused(row["details"], 15)], (2, 3)) + "</div>"
        for row in compared) + "</div>")
    return page(about, parts)


def log_lines(run: Path) -> list[str]:
    """The lines of a run's log.jsonl; none when nothing was trained."""
    path = run / "log.jsonl"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


# Sections


def page(about: Mapping[str, Any], parts: Sequence[str]) -> str:
    title = escape(f"{about['config'].get('method', '')}: {about['run']}")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return "\n".join(['<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
                      f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
                      f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>", *parts, settings(about),
                      "</body></html>\n"])


def settings(about: Mapping[str, Any]) -> str:
    """The config, fields that differ from the defaults first, and the versions."""
    defaults = {key: json.dumps(value) for key, value in about["defaults"].items()}
    config = {key: json.dumps(value) for key, value in about["config"].items()}
    changed = [[key, value, defaults.get(key, "")] for key, value in config.items() if value != defaults.get(key)]
    same = [[key, value] for key, value in config.items() if value == defaults.get(key)]
    return ("<h2>Config</h2>" + table(["differs from the default", "value", "default"], changed)
            + f"<details><summary>{len(same)} fields at their defaults</summary>" + table(["field", "value"], same)
            + "</details><h2>Versions</h2>" + table(["", ""], [[key, value] for key, value in about["versions"].items()]))


def curves(lines: Iterable[str], selection: str) -> str:
    """A chart for each number that a phase logs, and one of the value by which the best epoch is kept."""
    series: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        values = json.loads(line)
        for key in values.keys() - {"phase", "epoch", "step"}:
            series.setdefault((values["phase"], key), []).append(values[key])
    order = sorted(series, key=lambda item: (item[1] == "validation_mAP", item[0] == "target", item[0], item[1] != "loss", item[1]))
    charts = []
    for phase, key in order:
        values = series[phase, key]
        chosen = key == "validation_mAP"
        title = f"{selection}, by epoch" if chosen else f"{phase}: {key}, by step"
        points = list(enumerate(values, 1)) if chosen else thin(values)
        charts.append(svg_lines(title, {"": points}, 340, 170, dots=chosen))
    return "<h2>Training</h2><div class=\"row\">" + "".join(charts) + "</div>" if charts else ""


def class_chart(title: str, compared: Rows, values: Any) -> str:
    """Each class's number in per cent under the first and the last row, largest gain first."""
    found = [values(row) for row in compared]
    labels = sorted(found[0], key=lambda name: (found[0][name] - found[-1][name], -found[-1][name], name))
    half = MOST_CLASSES // 2
    left_out = labels[half:-half] if len(labels) > MOST_CLASSES else []
    kept = [name for name in labels if name not in set(left_out)]
    chart = svg_bars([row["method"] for row in compared], [(name, [row[name] for row in found]) for name in kept])
    more = note(f"{len(left_out)} classes between them are left out; see per_class.csv.") if left_out else ""
    return f"<h3>{escape(title)}, in per cent</h3>{more}<div class=\"scroll\">{chart}</div>"


def maps(compared: Rows) -> str:
    """Queries and gallery of a few classes in the plane of their two principal components, before and after."""
    first = compared[0]["details"]
    classes = spread(sorted(set(first["queries"].classes)), MAPPED_CLASSES)
    letters = dict(zip(classes, "ABCDEFGH"))
    charts = []
    for row in compared:
        details = row["details"]
        sides = [spread([i for i, name in enumerate(details[part].classes) if name in letters], POINTS // 2)
                 for part in ("queries", "gallery")]
        marks = [(letters[details["queries"].classes[i]], True) for i in sides[0]]
        marks += [(letters[details["gallery"].classes[i]], False) for i in sides[1]]
        features = torch.cat([details["query_features"][sides[0]], details["gallery_features"][sides[1]]])
        positions, share = plane(features)
        charts.append(svg_scatter(f"{row['method']}: two axes hold {share:.0%} of the variance", positions.tolist(), marks))
    legend = ", ".join(f"{letter} {escape(name)}" for name, letter in letters.items())
    return ("<h3>Map of queries and gallery</h3>" + '<div class="row">' + "".join(charts) + "</div>"
            + f'<p class="note">Capital, bold: query; small: gallery. {legend}.</p>')


def plane(features: Tensor) -> tuple[Tensor, float]:
    """[n, e] -> coordinates [n, 2] along the two principal axes, and the share of the variance that they hold.

    An axis points where its largest entry is positive, so that the picture does not flip between runs.
    """
    centred = features.double() - features.double().mean(dim=0)
    _, lengths, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:2] * axes[:2].gather(1, axes[:2].abs().argmax(dim=1, keepdim=True)).sign()
    positions = torch.nn.functional.pad(centred @ axes.T, (0, 2 - len(axes)))
    return positions, float((lengths[:2] ** 2).sum() / (lengths ** 2).sum().clamp(min=1e-30))


def examples(compared: Rows, ranked: Mapping[str, tuple[Tensor, Tensor]], strokes: Sequence[str]) -> str:
    """The best and the worst queries of the last row, each of another class, with every row's first results."""
    last = compared[-1]["details"]
    order = last["metrics"]["AP"].argsort(descending=True, stable=True).tolist()
    best = one_per_class(order, last["queries"].classes)
    worst = one_per_class([i for i in reversed(order) if i not in best], last["queries"].classes)
    parts = []
    for title, chosen in [("Best queries", best), ("Worst queries", worst)]:
        parts.append(f"<h3>{title} of {escape(compared[-1]['method'])}</h3>")
        for i in chosen:
            for row in compared:
                details = row["details"]
                queries, gallery = details["queries"], details["gallery"]
                order_of_i, hits = (part[i][:RESULTS].tolist() for part in ranked[row["method"]])
                score = f"{row['method']}: AP@200 {percent(float(details['metrics']['AP'][i]))}"
                figures = [figure(queries.paths[i], queries.classes[i], queries.domains[i] in strokes, "query")]
                figures += [figure(gallery.paths[j], gallery.classes[j], gallery.domains[j] in strokes, "hit" if hit else "miss")
                            for j, hit in zip(order_of_i, hits)]
                parts.append(note(score) + '<div class="row tight">' + "".join(figures) + "</div>")
    return "".join(parts)


# Numbers


def before_and_after(rows: Rows, about: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The first row and the row of the run's own method; one row where they are the same."""
    own = next((row for row in rows if row["method"] == about["config"].get("method")), rows[-1])
    return [rows[0]] if own is rows[0] else [rows[0], own]


def ranks(details: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Gallery indices [q, k] of each query's nearest images and whether they are hits [q, k], k at most RANKS."""
    order = search(details["query_features"], details["gallery_features"], RANKS)[1]
    ids = {name: i for i, name in enumerate(details["names"])}
    query, gallery = (torch.tensor([ids[name] for name in details[part].classes]) for part in ("queries", "gallery"))
    return order, gallery[order] == query[:, None]


def precision_at_rank(hits: Tensor) -> list[tuple[float, float]]:
    shares = hits.double().mean(dim=0).cumsum(0)
    return [(rank, 100 * total / rank) for rank, total in enumerate(shares.tolist(), 1)]


def one_per_class(order: Iterable[int], classes: Sequence[str]) -> list[int]:
    first: dict[str, int] = {}
    for i in order:
        first.setdefault(classes[i], i)
    return list(first.values())[:EXTREMES]


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spaced."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else list(items)


def thin(values: Sequence[float], count: int = 160) -> list[tuple[float, float]]:
    """(step, value), where there are more than `count` steps the mean of as many stretches."""
    edges = [len(values) * i // count for i in range(count + 1)] if len(values) > count else list(range(len(values) + 1))
    return [((a + 1 + b) / 2, sum(values[a:b]) / (b - a)) for a, b in zip(edges, edges[1:])]


# Charts and tables


def svg_lines(title: str, series: Mapping[str, Sequence[tuple[float, float]]], width: int, height: int, zero: bool = False,
              dots: bool = False) -> str:
    """Curves through (x, y), told apart by dash and end label; points that are not finite are left out.

    zero: the axis begins at 0. dots: a dot for each point, and a ring around the highest.
    """
    finite = {name: [point for point in points if math.isfinite(point[1])] for name, points in series.items()}
    xs, ys = zip(*(point for points in finite.values() for point in points)) if any(finite.values()) else ((1.0,), (0.0,))
    low, high = 0.0 if zero else min(ys), max(ys)
    left, right, top, bottom = 48, width - (120 if len(series) > 1 else 12), 26, height - 22

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - min(xs)) / ((max(xs) - min(xs)) or 1)
        return left + across * (right - left), bottom - (y - low) / ((high - low) or 1) * (bottom - top)

    parts = [words(0, 14, title, extra=' font-weight="bold"')]
    for value in (low, (low + high) / 2, high):
        y = place(xs[0], value)[1]
        parts += [f'<path d="M{left} {y:.1f}H{right}" stroke="#ddd"/>', words(left - 5, y + 4, f"{value:.3g}", "end")]
    parts += [words(place(x, low)[0], height - 6, f"{x:.0f}", anchor) for x, anchor in ((min(xs), "start"), (max(xs), "end"))]
    ends = sorted(points[-1][1] for points in finite.values() if points)
    for number, (name, points) in enumerate(finite.items()):
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (place(*point) for point in points))
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.8" stroke-dasharray="{dash}"/>' if path else "")
        if dots:
            best = max(points, key=lambda point: point[1], default=None)
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in (place(*p) for p in points)]
            parts += ['<circle cx="{:.1f}" cy="{:.1f}" r="6" fill="none" stroke="#000"/>'.format(*place(*best))] if best else []
        if name and points:
            level = bottom - 14 * ends.index(points[-1][1])
            end = place(*points[-1])[1]
            y = min(end, level) if len(finite) > 2 else end
            parts.append(words(right + 6, y + 4, shorten(name, 18), extra=f' style="fill:{colour}"'))
    return svg(width, height, parts, title)


def svg_bars(methods: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """For each label one or two numbers of 0..1 on a scale to 100: the first a ring, the last a square, a bar between."""
    left, right, step = 190, 640, 17
    height = 40 + step * len(rows)
    legend = [("ring", methods[0]), ("square", methods[-1])][-len(methods):]
    parts = [words(left + 220 * i, 12, f"{shape}: {method}") for i, (shape, method) in enumerate(legend)]
    for tick in range(0, 101, 25):
        x = left + tick / 100 * (right - left)
        parts += [f'<path d="M{x:.0f} 30V{height - 6}" stroke="#ddd"/>', words(x, 26, str(tick), "middle")]
    for number, (label, values) in enumerate(rows):
        y = 42 + step * number
        first, last = (left + value * (right - left) for value in (values[0], values[-1]))
        gain = f"  ({100 * (values[-1] - values[0]):+.1f})" if len(values) > 1 else ""
        numbers = " to ".join(percent(value, 1) for value in values)
        parts += [words(left - 8, y + 4, shorten(label, 28), "end"), words(right + 12, y + 4, numbers + gain),
                  f'<path d="M{first:.1f} {y}H{last:.1f}" stroke="{COLOURS[last < first]}" stroke-width="3"/>']
        if len(values) > 1:
            parts.append(f'<circle cx="{first:.1f}" cy="{y}" r="4" fill="#fff" stroke="#000"/>')
        parts.append(f'<rect x="{last - 3.5:.1f}" y="{y - 3.5}" width="7" height="7"/>')
    return svg(800, height, parts, " and ".join(methods))


def svg_scatter(title: str, positions: Sequence[Sequence[float]], marks: Sequence[tuple[str, bool]]) -> str:
    """A letter at each position, capital and bold for a query, small for an image of the gallery."""
    size, top = 500, 24
    lows = [min(position[axis] for position in positions) for axis in (0, 1)]
    span = max(max(position[axis] for position in positions) - lows[axis] for axis in (0, 1)) or 1
    parts = [words(0, 14, title, extra=' font-weight="bold"'),
             f'<rect x=".5" y="{top}.5" width="{size - 1}" height="{size - 1}" fill="none" stroke="#ccc"/>']
    for (x, y), (letter, query) in zip(positions, marks):
        colour = COLOURS[ord(letter) - ord("A")]
        look = f' style="fill:{colour}' + (';font-weight:bold;font-size:13px"' if query else '"')
        parts.append(words(10 + (x - lows[0]) / span * (size - 20), top + size - 8 - (y - lows[1]) / span * (size - 20),
                           letter if query else letter.lower(), "middle", look))
    return svg(size, top + size, parts, title)


def svg(width: int, height: int, parts: Iterable[str], label: str) -> str:
    return (f'<svg class="wide" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{escape(label)}">' + "".join(parts) + "</svg>")


def words(x: float, y: float, text: str, anchor: str = "start", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'


def table(header: Sequence[object], rows: Iterable[Sequence[object]], numeric: Iterable[int] = ()) -> str:
    right = set(numeric)

    def line(tag: str, values: Sequence[object]) -> str:
        return "<tr>" + "".join(f"<{tag}{' class=' + chr(34) + 'n' + chr(34) if i in right else ''}>{escape(value)}</{tag}>"
                                for i, value in enumerate(values)) + "</tr>"

    return "<table>" + line("th", header) + "".join(line("td", row) for row in rows) + "</table>"


def figure(path: str, name: str, inverted: bool, kind: str) -> str:
    picture = data_uri(thumbnail(path, THUMB, inverted), "JPEG")
    return (f'<figure class="{kind}"><img width="{THUMB}" height="{THUMB}" src="{picture}" alt="{escape(path)}" '
            f'title="{escape(path)}"><figcaption>{kind}: {escape(shorten(name, 30))}</figcaption></figure>')


def data_uri(picture: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    picture.save(file, format=kind, quality=75)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def percent(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}"


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length - 2] + ".."


def escape(text: object) -> str:
    return html.escape(plain(text))
