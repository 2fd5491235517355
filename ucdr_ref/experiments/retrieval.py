"""Universal cross-domain retrieval as an experiment: UCDR-Adapter (and CLIP as it is) from a protocol to a table."""
from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..clip.model import CLIP
from ..clip.zero_shot import ZeroShot
from ..config import Config
from ..images.batches import Files, ImageDataset, augment, balanced_batches, load
from ..images.features import Extractor, prototypes
from ..machine.files import write_text_atomic
from ..machine.processes import fold, gather_rows, main_first, place, share
from ..metrics import retrieval, search
from ..training.journal import load_own_state
from ..training.loop import Feed
from ..ucdr.adapter import Batch, UCDRAdapter
from . import protocols
from .contract import Experiment, Method, Training
from .protocols import Protocol, Test
from .report import sheet
from .run_folder import check_sizes

COLUMNS = ("mAP@200", "Prec@200", "mAP@all", "Prec@100")
# As published (ViT-B/32), by dataset, protocol and gallery.
PUBLISHED = {
    ("domainnet", "UCDR", "unseen"): "mean of 5 query domains: CLIP mAP@200 0.4435 Prec@200 0.3840, ProS 0.6052 0.5626, "
                                     "UCDR-Adapter 0.6071 0.5655; query sketch: UCDR-Adapter mAP@200 0.6591",
    ("domainnet", "UCDR", "mixed"): "mean of 5 query domains: ProS mAP@200 0.5546 Prec@200 0.5195, UCDR-Adapter 0.5660 0.5311",
    ("domainnet", "UdCDR", "seen"): "mean of 5 query domains: ProS mAP@200 0.6332, UCDR-Adapter 0.6370",
    ("sketchy", "UcCDR", "unseen"): "ProS mAP@200 0.6991, UCDR-Adapter 0.7285",
    ("tuberlin", "UcCDR", "unseen"): "ProS mAP@all 0.6675, UCDR-Adapter 0.6581",
}


def prepare(config: Config) -> tuple[Config, Protocol]:
    """The protocol's file lists; the drawn data is drawn first where it is absent."""
    if config.dataset == "toy":
        from ..demo.drawing import write_dataset
        with main_first():
            write_dataset(config.data_root, per_class=config.toy_images)
    return config, protocols.build(config)


def build(config: Config, protocol: Protocol, clip: CLIP, device: torch.device) -> Experiment:
    """A method that starts from its initial values, drawn from torch's global generator."""
    method: UCDRAdapter | ZeroShot = zero_shot(config, clip)
    if config.method == "ucdr-adapter":
        anchors = class_anchors(config, protocol, Extractor(ZeroShot(clip), config, device))
        method = adapter(config, clip, protocol.class_names, protocol.domain_names, anchors).to(device)
    feeds = {phase: feed(phase, protocol, config, clip.image_size, device) for phase in method.PHASES}
    for phase_feed in feeds.values():
        phase_feed.order(0)  # a batch that cannot be balanced is refused before anything is written

    def validate() -> float:
        assert protocol.validation is not None
        return validation_score(FeatureTable(Extractor(method, config, device)), protocol.validation)

    def start(folder: Path) -> Training:
        return Training(feeds, validate if protocol.validation is not None else None, config, config.patience)

    return Experiment(method, protocol.class_names, protocol.domain_names, summary(protocol, method), protocol.digests(), start)


def check(config: Config, state: dict[str, Any], path: Path) -> None:
    """Raises Misfit when the sizes that the config asks for are not those of the checkpoint's tensors."""
    p, (c, s) = config.prompt_length, (len(state[key]) for key in ("class_names", "domain_names"))
    if config.method == "ucdr-adapter":
        check_sizes(path, state["method"], {"domain_prompts": [s, p], "class_prompts": [c, p],
                                            "queues.rows": [c + 1, config.queue_size]})


def rebuild(config: Config, clip: CLIP, state: dict[str, Any], path: Path, device: torch.device) -> Method:
    """The method of a checkpoint, ready to encode."""
    if config.method == "zero-shot":
        return zero_shot(config, clip)
    anchors = torch.zeros(len(state["class_names"]), clip.embed_dim, device=device)
    method = adapter(config, clip, state["class_names"], state["domain_names"], anchors).to(device)
    load_own_state(method, {name: value for name, value in state["method"].items() if name != "template.ctx"}, path)
    return method.eval()


def zero_shot(config: Config, clip: CLIP) -> ZeroShot:
    return ZeroShot(clip, normalized=config.evaluation_features == "normalized")  # D18


def adapter(config: Config, clip: CLIP, class_names: list[str], domain_names: list[str],
            anchors: Tensor | None) -> UCDRAdapter:
    """UCDR-Adapter whose batches may be shared by several processes."""
    return UCDRAdapter(clip, class_names, domain_names, config, anchors, gather_rows, place)


def summary(protocol: Protocol, method: UCDRAdapter | ZeroShot) -> str:
    lines = [f"train    {len(protocol.train)} images, {len(protocol.class_names)} classes, "
             f"{len(protocol.domain_names)} domains ({', '.join(protocol.domain_names)})"]
    for test in ([protocol.validation] if protocol.validation else []) + protocol.tests:
        galleries = ", ".join(f"{name} {len(files)}" for name, files in test.galleries.items())
        lines.append(f"{test.protocol:<10} {len(test.query)} queries ({test.query_domain}, "
                     f"{len(set(test.query.classes))} classes); gallery {galleries} ({protocol.gallery_domain})")
    if isinstance(method, UCDRAdapter):
        for phase in method.PHASES:
            count = sum(parameter.numel() for parameter in method.trainable(phase).values())
            lines.append(f"phase {phase}: {count:,} trainable parameters")
    return "\n".join(lines)


def class_anchors(config: Config, protocol: Protocol, zero_shot: Extractor) -> Tensor | None:
    """Class features [c, e] that replace the text template (D13): the file's rows, or prototypes; None for text.

    A prototype is the mean of the frozen tower's normalised features of a class's gallery-domain training images.
    Raises ValueError for a file of another shape or with a zero row, or a class without such images.
    """
    names, kind, e = protocol.class_names, config.class_features, zero_shot.method.clip.embed_dim
    if kind in ("template", "plain"):
        return None
    if kind == "prototypes":
        train = protocol.train
        files = train.keep([i for i, name in enumerate(train.domains) if name == protocol.gallery_domain])
        if missing := sorted(set(names) - set(files.classes)):
            raise ValueError(f"--class-features prototypes: no training image in {protocol.gallery_domain} for "
                             f"{', '.join(missing[:5])}")
        features, kept = zero_shot.features(files)
        labels = torch.tensor([names.index(name) for name in files.keep(kept).classes])
        return prototypes([(features, labels)], len(names)).to(zero_shot.device)
    try:
        rows = torch.from_numpy(np.load(config.class_features, allow_pickle=False))
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise ValueError(f"--class-features {kind}: expected template, plain, prototypes or a .npy file of numbers "
                         f"({str(error).splitlines()[0]})") from None
    sound = rows.is_floating_point() and rows.shape == (len(names), e)
    if not sound or not torch.isfinite(rows).all() or not rows.any(dim=1).all():
        raise ValueError(f"--class-features {kind}: holds {rows.dtype} {list(rows.shape)}, expected {[len(names), e]} finite "
                         "floating-point numbers, rows in class order, none of them zero")
    return rows.float().to(zero_shot.device)


CPU_PART = 10  # images of phase 2 at once: on a CPU no slower than a batch of 50, in a third of the memory


def feed(phase: str, protocol: Protocol, config: Config, image_size: int, device: torch.device) -> Feed:
    """Domain-balanced, augmented batches of the training files for one phase of UCDR-Adapter."""
    class_ids = torch.tensor([protocol.class_names.index(name) for name in protocol.train.classes])
    domain_ids = torch.tensor([protocol.domain_names.index(name) for name in protocol.train.domains])
    size = config.source_batch if phase == "source" else config.target_batch

    def order(epoch: int) -> list[list[int]]:
        return balanced_batches(domain_ids.tolist(), size, fold(config.seed, phase), epoch, config.balance == "exact")

    def batches(epoch: int, left: Sequence[list[int]]) -> Iterator[tuple[Batch, list[str]]]:
        shares = [share(batch) for batch in left]
        transform = augment(image_size, config.train_normalization)
        dataset = ImageDataset(protocol.train, transform, config.stroke_domains, fold(config.seed, phase, epoch))
        for indices, images in load(dataset, shares, config.workers, config.bad_images == "skip", device):
            images = images.view(-1, 3, image_size, image_size)  # a share may be empty
            parts = (images, class_ids[indices], domain_ids[indices])
            batch = Batch(*(part.to(device, non_blocking=True) for part in parts))
            yield batch, [protocol.train.paths[i] for i in indices]

    epochs = config.source_epochs if phase == "source" else config.target_epochs
    return Feed(epochs, order, batches, lambda batch: cut(batch, phase, config))


def cut(batch: Batch, phase: str, config: Config) -> list[tuple[Batch, float]]:
    """What passes at once of a batch, each part with its share of the images: the losses' weighted sum is the batch's.

    Only phase 2 is a mean over images alone; in phase 1 queues and momentum move once a batch, so it stays whole.
    """
    b = len(batch.images)
    size = config.micro_batch or (CPU_PART if batch.images.device.type == "cpu" else b)
    if phase == "source" or b <= size:
        return [(batch, 1.0)]
    return [(Batch(*part), len(part[0]) / b) for part in zip(*(rows.split(size) for rows in batch))]


class FeatureTable:
    """Features of one encoder, each file encoded once: the galleries of tests overlap."""

    def __init__(self, extractor: Extractor) -> None:
        self.extractor = extractor
        self.rows: dict[str, Tensor | None] = {}  # None: not readable

    def of(self, files: Files) -> tuple[Tensor, Files]:
        """Features [n, e] on the device of the n readable files, and these files."""
        new = files.keep([i for i, path in enumerate(files.paths) if path not in self.rows])
        if len(new):
            rows, kept = self.extractor.features(new)
            self.rows |= dict.fromkeys(new.paths)
            self.rows |= dict(zip(new.keep(kept).paths, rows))
        found = files.keep([i for i, path in enumerate(files.paths) if self.rows[path] is not None])
        if not len(found):
            raise ValueError(f"none of the {len(files)} images could be read; the first is {files.paths[0]}")
        return torch.stack([self.rows[path] for path in found.paths]).to(self.extractor.device), found  # type: ignore[misc]


def score(table: FeatureTable, test: Test) -> dict[str, dict[str, Any]]:
    """For each gallery of a test: the metrics of `metrics.retrieval`, with the files and the first ten results per query."""
    query, queries = table.of(test.query)
    results = {}
    for name, files in test.galleries.items():
        gallery, found = table.of(files)
        names = sorted(set(queries.classes) | set(found.classes))
        number = {label: i for i, label in enumerate(names)}
        query_ids, gallery_ids = (torch.tensor([number[label] for label in part.classes], device=query.device)
                                  for part in (queries, found))
        metrics = retrieval(query, query_ids, gallery, gallery_ids)
        shown = shown_queries(queries)
        nearest = search(query[shown], gallery, min(10, len(found)))[1].tolist()
        left_out = len(test.query) - len(queries) + len(files) - len(found)
        results[name] = {"metrics": metrics, "names": names, "queries": queries, "gallery": found, "unreadable": left_out,
                         "shown": list(zip(shown, nearest))}
    return results


def validation_score(table: FeatureTable, test: Test) -> float:
    """mAP@200 of the validation queries, by which phase 2 keeps its best epoch (D5)."""
    return next(iter(score(table, test).values()))["metrics"]["mAP@200"]


def shown_queries(queries: Files, count: int = 8) -> list[int]:
    """Indices of queries of as many different classes as `count` allows, for the picture."""
    first: dict[str, int] = {}
    for i, label in enumerate(queries.classes):
        first.setdefault(label, i)
    indices = list(first.values())
    return indices[:: max(1, -(-len(indices) // count))][:count]


def tested(config: Config, state: dict[str, Any]) -> Protocol:
    """What a run is evaluated on."""
    return prepare(config)[1]


def evaluate(config: Config, protocol: Protocol, method: Method, state: dict[str, Any], folder: Path,
             device: torch.device) -> list[dict[str, Any]]:
    """One row per test, gallery and method, zero-shot CLIP first: its numbers, and under `details` what the files need."""
    methods: dict[str, Method] = {"zero-shot": zero_shot(config, method.clip)}
    if config.method != "zero-shot":
        methods[config.method] = method
    tables = {name: FeatureTable(Extractor(one, config, device)) for name, one in methods.items()}
    rows = []
    for test in protocol.tests:
        scored = {name: score(table, test) for name, table in tables.items()}
        for gallery in test.galleries:
            for name in methods:
                details = scored[name][gallery]
                numbers = {key: value for key, value in details["metrics"].items() if isinstance(value, (int, float))}
                rows.append({"protocol": test.protocol, "query_domain": test.query_domain, "gallery_name": gallery,
                             "method": name, **numbers, "unreadable": details["unreadable"], "details": details})
    return rows


def table(rows: list[dict[str, Any]], config: Config) -> str:
    """The rows as text, percentages, with the paper's numbers under the row they belong to."""
    lines = [f"{'protocol':<9} {'query':<11} {'gallery':<8} {'method':<13} " + " ".join(f"{name:>9}" for name in COLUMNS)
             + "  queries x gallery"]
    for i, row in enumerate(rows):
        key = (row["protocol"], row["query_domain"], row["gallery_name"])
        lines.append(f"{key[0]:<9} {key[1]:<11} {key[2]:<8} {row['method']:<13} "
                     + " ".join(f"{100 * row[name]:9.2f}" for name in COLUMNS) + f"  {row['queries']} x {row['gallery']}"
                     + (f"; k cut to {row['k_used']}" if row["k_used"] < row["k"] else "")
                     + (f"; {row['no_relevant']} queries without a relevant image" if row["no_relevant"] else ""))
        last = i + 1 == len(rows) or key != tuple(rows[i + 1][part] for part in ("protocol", "query_domain", "gallery_name"))
        if last and (config.dataset, key[0], key[2]) in PUBLISHED:
            lines.append(f"          published: {PUBLISHED[config.dataset, key[0], key[2]]}")
    return "\n".join(lines)


def write_results(rows: list[dict[str, Any]], folder: Path, about: dict[str, Any]) -> str:
    """results.json, per_class.csv and queries.png (each query's first ten: hits green, misses red) in `folder`."""
    plain = [{key: value for key, value in row.items() if key != "details"} for row in rows]
    write_text_atomic(folder / "results.json", json.dumps({**about, "rows": plain}, indent=2) + "\n")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["protocol", "query_domain", "gallery", "method", "class", "queries", "mAP@200", "mAP@all"])
    for row in rows:
        details = row["details"]
        for label, value in sorted(details["metrics"]["per_class"].items()):
            name = details["names"][label]
            writer.writerow([row["protocol"], row["query_domain"], row["gallery_name"], row["method"], name,
                             details["queries"].classes.count(name), f"{value:.6f}",
                             f"{details['metrics']['per_class@all'][label]:.6f}"])
    write_text_atomic(folder / "per_class.csv", text.getvalue())
    picture = []
    first = (rows[0]["protocol"], rows[0]["gallery_name"])
    for i in range(len(rows[0]["details"]["shown"])):
        for row in rows:
            if (row["protocol"], row["gallery_name"]) == first:
                queries, gallery = row["details"]["queries"], row["details"]["gallery"]
                index, nearest = row["details"]["shown"][i]
                picture.append((queries.paths[index], f"{row['method']}: {queries.classes[index]}",
                                [(gallery.paths[j], gallery.classes[j] == queries.classes[index]) for j in nearest]))
    sheet(picture, folder / "queries.png")
    return "results.json, per_class.csv, queries.png"
