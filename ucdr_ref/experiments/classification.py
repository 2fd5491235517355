"""Domain-adaptive zero-shot classification to tables: SRE-CLIP beside CLIP as it is, on the same target images."""
from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..clip.model import CLIP
from ..clip.tensorfile import file_digest
from ..clip.zero_shot import class_text_features
from ..config import Config
from ..machine.files import write_atomic, write_text_atomic
from ..metrics import predicted_accuracy
from ..sre.adapter import SRECLIP
from ..sre.graph import Graph, parse_graph
from .class_folders import Features, features, read_folder_ids, scan_folder

COLUMNS = {"zsl": "ZSL", "unseen": "unseen", "seen": "seen", "h": "H"}
TEXT, PROTOTYPES = "zero-shot", "prototypes"  # baselines
SCORES = "test_scores.jsonl"
PUBLISHED = {"awa2": "published (I2AwA, instance): unseen 69.7, seen 88.0, H 77.7, an ablation line in the released code"}


def baseline(clip: CLIP, graph: Graph, source: Features) -> tuple[str, Tensor]:
    """Class anchors [c, e] of CLIP without training: text features of "a photo of a {name}".

    Weights without a text tower: the mean direction of each class's source images, zero where it has none.
    """
    names = graph.names[: graph.classes]
    if clip.has_text:
        return TEXT, class_text_features(clip, names).cpu()
    sums = torch.zeros(len(names), clip.embed_dim)
    for part in torch.arange(len(source)).split(4096):
        sums.index_add_(0, source.labels[part], F.normalize(source.take(part), dim=1))
    return PROTOTYPES, F.normalize(sums, dim=1)


def baseline_scores(target: Features, anchors: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows [b], and cosines [b, c] with the anchors [c, e]; a class without an anchor is never predicted."""
    for rows in torch.arange(len(target)).split(CHUNK):
        cosines = F.normalize(target.take(rows), dim=1) @ anchors.T
        yield rows, cosines.masked_fill(~anchors.any(dim=1), -torch.inf)


CHUNK = 4096  # images whose scores are held at once
TEST_BATCH = 512  # the released code's batch of test images, which attend to each other (S2)


def test_batches(labels: Tensor, unseen: list[int], released: bool, size: int) -> list[Tensor]:
    """Which rows pass at once.

    Released (S2): images of unseen and of seen classes apart, class by class, 512 at once; else `size` at once in
    the order of the rows, which makes no difference to an image that attends to itself.
    """
    if not released:
        return list(torch.arange(len(labels)).split(size))
    of_unseen = torch.isin(labels, torch.tensor(unseen))
    by_class = labels.argsort(stable=True)
    kinds = [by_class[of_unseen[by_class] == wanted] for wanted in (True, False)]
    return [part for kind in kinds for part in kind.split(TEST_BATCH) if len(part)]


def method_scores(method: SRECLIP, target: Features, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows [b] of `test_batches` and their test-time logits [b, c]."""
    training = method.training
    method.eval()
    config, unseen = method.config, method.unseen_ids.tolist()
    with torch.no_grad():
        classes = method.class_embeddings().T / config.sre_temperature
        for rows in test_batches(target.labels, unseen, config.test_attention == "batch", config.sre_batch):
            yield rows, method.encode_features(target.take(rows).to(device)) @ classes
    method.train(training)


class Predicted(NamedTuple):
    """Of n images: what is left of their scores, of which there may be more than fit into memory."""

    everywhere: Tensor  # [n], class among all
    among_unseen: Tensor  # [n], class among the unseen ones
    zsl: bool  # whether an unseen class can be predicted at all


def predict(scores: Iterable[tuple[Tensor, Tensor]], n: int, unseen: list[int]) -> Predicted:
    """The predictions of scores that come as rows [b] and scores [b, c]."""
    everywhere, among_unseen, zsl = torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long), False
    for rows, found in scores:
        of_unseen = found[:, unseen]
        everywhere[rows] = found.argmax(dim=1).cpu()
        among_unseen[rows] = torch.tensor(unseen)[of_unseen.argmax(dim=1).cpu()]
        zsl = zsl or not bool(of_unseen.isinf().all())
    return Predicted(everywhere, among_unseen, zsl)


def accuracies(predicted: Predicted, labels: Tensor, unseen: list[int],
               c: int) -> dict[str, dict[str, float | None]]:
    """`zero_shot_accuracy` of predictions for labels [n]; None where there is nothing to count or predict."""
    is_unseen = torch.isin(torch.arange(c), torch.tensor(unseen))
    result = predicted_accuracy(predicted.everywhere, predicted.among_unseen, labels, is_unseen)

    def known(name: str, value: float) -> float | None:
        return None if math.isnan(value) or (name == "zsl" and not predicted.zsl) else value

    return {average: {name: known(name, value) for name, value in values.items()} for average, values in result.items()}


def test_score(method: SRECLIP, target: Features, device: torch.device, folder: Path) -> float:
    """H (instance) on the test images, noted in the run folder: the released code's choice of what to report (S6)."""
    unseen = method.unseen_ids.tolist()
    predicted = predict(method_scores(method, target, device), len(target), unseen)
    found = accuracies(predicted, target.labels, unseen, len(method.class_names))
    path = folder / SCORES
    # The log knows how many evaluations came before; later lines are of a run that was killed and has gone back.
    count = (folder / "log.jsonl").read_bytes().count(b'"validation_mAP"')
    lines = path.read_text(encoding="utf-8").splitlines()[:count] if path.exists() else []
    write_text_atomic(path, "".join(line + "\n" for line in [*lines, json.dumps(found)]))
    return found["instance"]["h"] or 0.0


def best_scores(folder: Path) -> tuple[int, dict[str, dict[str, float | None]]]:
    """Number of test evaluations, and each metric's own maximum over them (S6)."""
    lines = [json.loads(line) for line in (folder / SCORES).read_text(encoding="utf-8").splitlines()]

    def maximum(average: str, name: str) -> float | None:
        return max((line[average][name] for line in lines if line[average][name] is not None), default=None)

    return len(lines), {average: {name: maximum(average, name) for name in COLUMNS} for average in ("instance", "class")}


def evaluate(folder: Path, config: Config, method: SRECLIP, state: dict[str, Any],
             device: torch.device) -> list[dict[str, Any]]:
    """Rows of baseline and method: accuracies in 0..1 under `instance` and `class`, and `details` for the files."""
    graph, unseen = parse_graph(state["graph"]), list(state["unseen_ids"])
    ids = read_folder_ids(config.folder_ids)
    target = features([scan_folder("--target", config.target, graph, ids)], graph, method.clip, config,
                      file_digest(config.weights), folder / "features", device)
    about = {"images": len(target), "classes": len(target.labels.unique())}
    rows: list[dict[str, Any]] = []
    scores = {state["baseline"]: baseline_scores(target, state["anchors"]),
              "sre-clip": method_scores(method, target, device)}
    for name, parts in scores.items():
        predicted = predict(parts, len(target), unseen)
        details = {"predicted": predicted, "labels": target.labels, "names": graph.names[: graph.classes],
                   "unseen": unseen}
        found = accuracies(predicted, target.labels, unseen, graph.classes)
        rows.append({"method": name, **about, **found, "details": details})
    if config.sre_report == "best-test":  # S6
        count, best = best_scores(folder)
        rows.append({"method": "best-test", "evaluations": count, **about, **best})
    return rows


def table(rows: list[dict[str, Any]], config: Config) -> str:
    """The rows as text, in per cent."""
    lines = [f"{'method':<13} {'average':<9}" + "".join(f"{title:>9}" for title in COLUMNS.values()) + "  images, classes"]
    for row in rows:
        for average in ("instance", "class"):
            found = [row[average][name] for name in COLUMNS]
            values = "".join("        -" if value is None else f"{100 * value:9.2f}" for value in found)
            lines.append(f"{row['method']:<13} {average:<9}{values}  {row['images']}, {row['classes']}")
        if row["method"] == PROTOTYPES:
            lines.append("              (no text tower: nearest mean of source images, which knows no unseen class)")
        if "evaluations" in row:
            lines.append(f"              (each metric's maximum over {row['evaluations']} evaluations on the test images, S6)")
    if config.graph in PUBLISHED:
        lines.append(PUBLISHED[config.graph])
    return "\n".join(lines)


def write_results(rows: list[dict[str, Any]], folder: Path, about: dict[str, Any]) -> None:
    """results.json, per_class.csv and confusion.png in `folder`."""
    plain = [{key: value for key, value in row.items() if key != "details"} for row in rows]
    write_text_atomic(folder / "results.json", json.dumps({**about, "rows": plain}, indent=2) + "\n")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "class", "split", "images", "accuracy", "accuracy_among_unseen"])
    pictures = []
    for row in (row for row in rows if "details" in row):
        (predicted, among, _), labels, names, unseen = row["details"].values()
        for k, name in enumerate(names):
            mine = labels == k
            if mine.any():
                values = [float((found[mine] == k).double().mean()) for found in (predicted, among)]
                writer.writerow([row["method"], name, "unseen" if k in unseen else "seen", int(mine.sum()), f"{values[0]:.6f}",
                                 f"{values[1]:.6f}" if k in unseen else ""])
        counts = torch.bincount(labels * len(names) + predicted, minlength=len(names) ** 2).view(len(names), -1)
        pictures.append((row["method"], counts.double() / counts.sum(dim=1, keepdim=True).clamp(min=1)))
    write_text_atomic(folder / "per_class.csv", text.getvalue())
    confusion_picture(pictures, rows[0]["details"]["names"], rows[0]["details"]["unseen"], folder / "confusion.png")


def confusion_picture(pictures: list[tuple[str, Tensor]], names: list[str], unseen: list[int], path: Path) -> None:
    """Side by side, true classes down, predicted ones across, unseen ones last; the darker, the larger a row's share."""
    order = sorted(range(len(names)), key=lambda k: (k in unseen, names[k]))
    cell, c = max(1, 720 // len(names)), len(names)
    legible = cell >= 9
    margin, top = 110 if legible else 8, 18
    page = Image.new("RGB", (margin + len(pictures) * (c * cell + 8), top + c * cell + 8), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=min(cell, 12)) if legible else ImageFont.load_default()
    border = (c - len(unseen)) * cell
    for row, k in enumerate(order if legible else []):
        pen.text((2, top + row * cell), names[k][:18], (190, 30, 30) if k in unseen else "black", font)
    for number, (title, shares) in enumerate(pictures):
        x = margin + number * (c * cell + 8)
        grey = (255 - 255 * shares[order][:, order]).round().to(torch.uint8).numpy()
        page.paste(Image.fromarray(grey).resize((c * cell, c * cell), Image.Resampling.NEAREST), (x, top))
        pen.rectangle((x, top, x + c * cell, top + c * cell), outline=(150, 150, 150))
        pen.line([(x + border, top), (x + border, top + c * cell)], (190, 30, 30))
        pen.line([(x, top + border), (x + c * cell, top + border)], (190, 30, 30))
        pen.text((x, 2), f"{title}: true class down, predicted across", "black", ImageFont.load_default())

    def save(file: BinaryIO) -> None:
        page.save(file, format="png")

    write_atomic(path, save)
