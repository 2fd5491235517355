"""What an evaluation leaves: a table, results.json, per_class.csv, queries.png and report.html."""
import csv
import io
import json
import math
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from ..cli import as_value_error, write_atomic, write_text_atomic
from ..data.images import open_image
from ..metrics import search

SOFTWARE = "ucdr_ref"  # a mark in our pictures
FRAMES = {True: "green", False: "red", None: "grey"}  # hit, miss, unknown
SIZE, FRAME, LINE = 96, 4, 20  # pixels: thumbnail, its frame, caption
SHOWN, POINTS = 8, 400  # at most: queries of a sheet and hits of each, points of a curve
TEST = ("protocol", "query_domain", "gallery_name")
PAGE = Template("""<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: auto; padding: 12px }
h1 { font-size: 20px; overflow-wrap: break-word } figure { display: inline-block; margin: 16px 16px 16px 0 }
svg { display: block; border: solid #999; border-width: 0 0 1px 1px } div { overflow: auto }
td { font-size: 12px; white-space: nowrap; padding-right: 12px } tr:first-child { font-weight: bold }
i { display: inline-block; height: 10px; margin-right: 6px; background: #0072b2 }
</style><h1>$title</h1><div><pre>$table</pre></div>
<p>In %. UCDR: queries of a domain and of classes that training never saw; UdCDR (U^dCDR): of such a domain;
UcCDR: of such classes. ZSL: unseen classes told apart among themselves; unseen, seen: among all; H: their
harmonic mean.</p>
<div><img alt="" src="data:image/png;base64,$picture"></div>$curves<div><table>$bars</table></div>
""")
CENTER_CLASSES = 5  # of queries, for a centred row: the mean of one class is that class
METRICS = ("mAP@200", "Prec@200", "mAP@all", "Prec@100")
ACCURACIES = {"zsl": "ZSL", "unseen": "unseen", "seen": "seen", "h": "H"}
Row = Mapping[str, Any]


class Shown(NamedTuple):
    """An image of a contact sheet, or a text alone (path "")."""

    path: str
    caption: str
    hit: bool | None = None  # None: unknown


Sheet = list[tuple[Shown, list[Shown]]]  # a query, or a class, and the images beside it


def retrieval_table(rows: Sequence[Row]) -> list[str]:
    """The rows as lines of at most 80 columns, in %."""
    lines = [f"{'in %':<28}" + "".join(f"{name:>10}" for name in METRICS)]
    tests = itemgetter(*TEST, "queries", "gallery", "no_relevant")
    for (protocol, domain, gallery, q, g, alone), group in groupby(rows, tests):
        lines.append(f"{protocol}: {q} queries ({domain}), {g} images in the {gallery} gallery")
        for row in group:
            lines.append(f"  {row['method']:<26}" + "".join(f"{100 * row[name]:10.2f}" for name in METRICS))
        if alone:
            lines.append(f"  {alone} queries have no relevant image here, and count as 0")
    if any(row["k_used"] < row["k"] for row in rows):
        lines.append("@200 of a smaller gallery: all of it")
    if any(row["transductive"] for row in rows):
        lines += ["centred: queries and gallery have each lost their own mean (transductive;",
                  "supposes a query set that is balanced over many classes)"]
    if any(row["query_classes"] < CENTER_CLASSES for row in rows):
        lines.append(f"no centred row for queries of fewer than {CENTER_CLASSES} classes")
    return lines


def classification_table(rows: Sequence[Row]) -> list[str]:
    """The rows as lines of at most 80 columns, in %."""
    images, classes = rows[0]["images"], rows[0]["classes"]
    lines = [f"{images} target images of {classes} classes",
             f"{'in %':<14}{'mean over':<10}" + "".join(f"{title:>9}" for title in ACCURACIES.values())]
    for row in rows:
        for average, things in (("instance", "images"), ("class", "classes")):
            found = [row[average][name] for name in ACCURACIES]
            values = "".join(f"{'-':>9}" if value is None else f"{100 * value:9.2f}" for value in found)
            lines.append(f"{row['method']:<14}{things:<10}{values}")
        if "evaluations" in row:
            lines.append(f"  (each metric's maximum over {row['evaluations']} test evaluations, S6)")
    return lines


def write_retrieval(rows: Sequence[Row], folder: Path, about: Row) -> None:
    """Files for the rows of `retrieval.rank`; about: what results.json says beside them. Raises OSError."""
    per_class, sheets = [], []
    for row in rows:
        metrics, counts = row["details"]["metrics"], Counter(row["details"]["queries"].classes)
        for name, score in metrics["per_class"].items():
            per_class.append({
                "class": name, "method": row["method"], "mAP@200": score,
                "mAP@all": metrics["per_class@all"][name], "queries": counts[name],
                **{key: row[key] for key in TEST}})
        if not row["transductive"] and all(row[key] == rows[0][key] for key in TEST):  # of the first test
            sheets.append(examples(row["method"], row["details"]))
    write_files(rows, folder, about, per_class, [line for of_query in zip(*sheets) for line in of_query])


def examples(method: str, details: Row) -> Sheet:
    """Queries of different classes, each with its nearest images."""
    queries, gallery, sheet = details["queries"], details["gallery"], []
    one_each = list({name: i for i, name in enumerate(queries.classes)}.values())
    chosen = at_most(SHOWN, one_each)
    _, nearest = search(details["query_features"][chosen], details["gallery_features"], SHOWN)
    for i, found in zip(chosen, nearest.tolist()):
        name = queries.classes[i]
        hits = [Shown(gallery.paths[j], gallery.classes[j], gallery.classes[j] == name) for j in found]
        sheet.append((Shown(queries.paths[i], f"{name}: {method}"), hits))
    return sheet


def write_classification(rows: Sequence[Row], folder: Path, about: Row) -> None:
    """The same for `classification.evaluate`; the picture is of the last method that predicts."""
    per_class = []
    sheet: Sheet = []
    for method, details in ((row["method"], row["details"]) for row in rows if "details" in row):
        names, labels, predicted, sheet = details["names"], details["labels"], details["predicted"], []
        for k in labels.unique().tolist():
            images, unseen = (labels == k).nonzero().flatten().tolist(), k in details["unseen"]
            accuracy, among_unseen = (predicted[images] == k).double().mean(dim=0).tolist()
            per_class.append({
                "class": names[k], "method": method, "accuracy": accuracy,
                "among_unseen": among_unseen if unseen else "", "images": len(images),
                "split": "unseen" if unseen else "seen"})
            found = [(details["paths"][i], int(predicted[i, 0])) for i in images[:SHOWN]]
            sheet.append((Shown("", names[k]), [Shown(path, names[j], j == k) for path, j in found]))
    write_files(rows, folder, about, per_class, at_most(SHOWN, sheet))


def at_most(count: int, items: Sequence[Any]) -> list[Any]:
    """Every n-th item, so that no more than `count` are left."""
    return list(items[::math.ceil(len(items) / count)])


def write_files(rows: Sequence[Row], folder: Path, about: Row, per_class: Sequence[Row],
                sheet: Sheet) -> None:
    kept = [{key: value for key, value in row.items() if key != "details"} for row in rows]
    write_text_atomic(folder / "results.json", json.dumps({**about, "rows": kept}, indent=2) + "\n")
    header, lines, text = list(per_class[0]), [list(line.values()) for line in per_class], io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *lines])
    write_text_atomic(folder / "per_class.csv", text.getvalue())
    picture = contact_sheet(sheet)
    write_atomic(folder / "queries.png", lambda file: file.write(picture))
    by_class = [header, *sorted(lines, key=itemgetter(0))]
    write_text_atomic(folder / "report.html", PAGE.substitute(
        title=escape(f"{about['config']['method']}: {about['run']}"), table=escape(about["table"]),
        picture=b64encode(picture).decode(), curves="".join(curves(Path(about["run"], "log.jsonl"))),
        bars="\n".join("\n".join(["<tr>", *map(cell, line)]) for line in by_class)))


def cell(value: Any) -> str:
    """Of an HTML table; a number of 0..1 with a bar."""
    if isinstance(value, float):
        return f'<td><i style="width:{60 * value:.0f}px"></i>{100 * value:.1f}'
    return f"<td>{escape(str(value))}"


def curves(log: Path) -> Iterator[str]:
    """A chart of each number that a phase logged more than once; a last line that was cut off is left out."""
    found: dict[str, list[float]] = {}
    with as_value_error(log, "is no training's log", "name another --run"):
        text = log.read_text(encoding="utf-8") if log.exists() else ""
        for line in map(json.loads, text[:text.rfind("\n") + 1].splitlines()):
            for key, value in line.items():
                if key == "score":
                    found.setdefault("score that chooses the epoch, %, by epoch", []).append(100 * value)
                elif key not in ("phase", "epoch", "step") and math.isfinite(value):
                    found.setdefault(f"phase {line['phase']}: {key}, by step", []).append(value)
    for title, values in found.items():
        low, high, last = min(values), max(values), len(values) - 1
        if last:
            points = " ".join(f"{300 * i / last:.1f},{100 * (high - value) / (high - low or 1):.1f}"
                              for i, value in at_most(POINTS, list(enumerate(values))))
            yield (f'<figure>{escape(title)}<svg width="300" height="100"><polyline fill="none" '
                   f'stroke="#0072b2" points="{points}"/></svg>x: 1 to {len(values)}, y: {low:.4g} to '
                   f"{high:.4g}</figure>")


def contact_sheet(rows: Sheet) -> bytes:
    """A PNG with a line for each query: itself, then its images, hits framed green and ticked, misses red.

    An image that cannot be read any more is a grey square.
    """
    side = SIZE + 2 * FRAME
    columns = 1 + max(len(hits) for _, hits in rows)
    sheet = Image.new("RGB", (side * columns, (side + LINE) * len(rows)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for i, (query, hits) in enumerate(rows):
        for j, shown in enumerate([query, *hits]):
            x, y = j * side, i * (side + LINE)
            if shown.path:
                try:
                    image = open_image(shown.path)
                except ValueError:
                    image = Image.new("RGB", (SIZE, SIZE), "grey")
                image = ImageOps.pad(image, (SIZE, SIZE), color="white")
                sheet.paste(ImageOps.expand(image, FRAME, FRAMES[shown.hit]), (x, y))
            if shown.hit:
                pen.line([(x + 84, y + 92), (x + 89, y + 97), (x + 98, y + 86)], FRAMES[True], width=4)
            text = shown.caption.encode("ascii", "replace").decode()  # all that the font is sure to have
            while font.getlength(text) > SIZE:
                text = text[:-1]
            pen.text((x, y + side), text, "black", font)
    mark, png = PngInfo(), io.BytesIO()
    mark.add_text("Software", SOFTWARE)
    sheet.save(png, "PNG", pnginfo=mark)
    return png.getvalue()
