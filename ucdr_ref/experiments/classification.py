"""Domain-adaptive zero-shot classification to tables: SRE-CLIP beside CLIP as it is, on the same target images."""
from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..clip.model import CLIP
from ..clip.tensorfile import file_digest
from ..clip.zero_shot import class_text_features
from ..config import Config
from ..machine.files import write_atomic, write_text_atomic
from ..metrics import zero_shot_accuracy
from ..sre.adapter import SRECLIP
from ..sre.graph import Graph, parse_graph
from .class_folders import Features, features, scan_folder

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


def baseline_logits(target: Features, anchors: Tensor) -> Tensor:
    """Cosines [n, c] with the anchors [c, e]; a class without an anchor is never predicted."""
    cosines = F.normalize(target.take(torch.arange(len(target))), dim=1) @ anchors.T
    return cosines.masked_fill(~anchors.any(dim=1), -torch.inf)


TEST_BATCH = 512  # the released code's batch of test images, which attend to each other (S2)


def test_batches(labels: Tensor, unseen: list[int], released: bool, size: int) -> list[Tensor]:
    """Which rows pass at once. Released (S2): images of unseen and of seen classes apart, class by class, 512 at
    once; else `size` at once in the order of the rows, which makes no difference to an image that attends to itself.
    """
    if not released:
        return list(torch.arange(len(labels)).split(size))
    of_unseen = torch.isin(labels, torch.tensor(unseen))
    by_class = labels.argsort(stable=True)
    return [part for wanted in (True, False) for part in by_class[of_unseen[by_class] == wanted].split(TEST_BATCH)]


def logits(method: SRECLIP, target: Features, device: torch.device) -> Tensor:
    """Test-time logits [n, c] of the rows, in batches of `test_batches`."""
    training = method.training
    method.eval()
    config, found = method.config, torch.empty(len(target), len(method.class_names))
    for rows in test_batches(target.labels, method.unseen_ids.tolist(), config.test_attention == "batch", config.sre_batch):
        found[rows] = method.logits(target.take(rows).to(device)).float().cpu()
    method.train(training)
    return found


def accuracies(scores: Tensor, target: Features, unseen: list[int]) -> dict[str, dict[str, float | None]]:
    """`zero_shot_accuracy` of logits [n, c], None where there is nothing to count or to predict."""
    result = zero_shot_accuracy(scores, target.labels, unseen)
    no_zsl = bool(scores[:, unseen].isinf().all())

    def known(name: str, value: float) -> float | None:
        return None if math.isnan(value) or (name == "zsl" and no_zsl) else value

    return {average: {name: known(name, value) for name, value in values.items()} for average, values in result.items()}


def test_score(method: SRECLIP, target: Features, device: torch.device, folder: Path) -> float:
    """H (instance) on the test images, noted in the run folder: the released code's choice of what to report (S6)."""
    found = accuracies(logits(method, target, device), target, method.unseen_ids.tolist())
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
    target = features([scan_folder("--target", config.target, graph)], graph, method.clip, config,
                      file_digest(config.weights), folder / "features", device)
    about = {"images": len(target), "classes": len(target.labels.unique())}
    rows: list[dict[str, Any]] = []
    predicted = {state["baseline"]: baseline_logits(target, state["anchors"]), "sre-clip": logits(method, target, device)}
    for name, scores in predicted.items():
        details = {"logits": scores, "labels": target.labels, "names": graph.names[: graph.classes], "unseen": unseen}
        rows.append({"method": name, **about, **accuracies(scores, target, unseen), "details": details})
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
        scores, labels, names, unseen = row["details"].values()
        predicted, among = scores.argmax(dim=1), torch.tensor(unseen)[scores[:, unseen].argmax(dim=1)]
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
