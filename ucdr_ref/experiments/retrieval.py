"""Universal cross-domain retrieval: UCDR-Adapter, zero-shot CLIP and the closed form, from images to a table."""
from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cli import one_line
from ..clip.model import CLIP
from ..clip.weights import OPENAI_SHA256, file_digest
from ..clip.zero_shot import ZeroShot, normalize
from ..config import FIELDS, Config
from ..data.benchmarks import Protocol, Test, build_protocol
from ..data.features import Extractor, FeatureCache
from ..data.folders import abbreviate
from ..data.images import (
    STATISTICS,
    Files,
    ImageDataset,
    augment,
    balanced_batches,
    load_batches,
    released_batches,
)
from ..distributed import batch_offset, derive_seed, gather_rows, local_shard, main_first
from ..metrics import retrieval
from ..training import PhaseData, load_own_state
from ..ucdr.adapter import Batch, UCDRAdapter
from ..ucdr.closed_form import ClosedForm, ClosedFormAdapter, center, choose_strength, measure

CPU_PART = 10  # images of phase 2 at once: on a CPU no slower than a batch of 50, in a third of the memory
SOURCE_STEPS, TARGET_STEPS = 50, 100  # at least so many in a training on an own folder
STRENGTH = 3.0  # lambda of the closed form where no validation classes choose it
CENTER_CLASSES = 5  # of queries, for a centred row: the mean of one class is that class
COLUMNS = ("mAP@200", "Prec@200", "mAP@all", "Prec@100")
# As published (ViT-B/32), by dataset, protocol and gallery.
PUBLISHED = {
    ("domainnet", "UCDR", "unseen"):
        "mean of 5 query domains: CLIP mAP@200 0.4435 Prec@200 0.3840, ProS 0.6052 0.5626, "
        "UCDR-Adapter 0.6071 0.5655; query sketch: UCDR-Adapter mAP@200 0.6591",
    ("domainnet", "UCDR", "mixed"):
        "mean of 5 query domains: ProS mAP@200 0.5546 Prec@200 0.5195, UCDR-Adapter 0.5660 0.5311",
    ("domainnet", "UdCDR", "seen"):
        "mean of 5 query domains: ProS mAP@200 0.6332, UCDR-Adapter 0.6370",
    ("sketchy", "UcCDR", "unseen"): "ProS mAP@200 0.6991, UCDR-Adapter 0.7285",
    ("tuberlin", "UcCDR", "unseen"): "ProS mAP@all 0.6675, UCDR-Adapter 0.6581",
}
Encode = Callable[[Files], Tensor]  # n files -> features [n, e] on the device


def load_data(config: Config, given: Collection[str] = tuple(FIELDS)) -> tuple[Config, Protocol]:
    """The protocol's file lists; drawn data is drawn first where it is absent.

    Of an own folder's training, what is not among the `given` fields follows from its size: batches, epochs
    and rates of UCDR-Adapter.
    """
    if config.dataset == "toy":
        from ..demo.drawing import write_dataset
        root = Path(config.data_root)
        if root.is_dir() and any(root.iterdir()) and not (root / "toy.json").is_file():
            raise ValueError(f"--data-root {root} holds no drawn data; for images of your own add "
                             "--dataset folder")
        with main_first():
            write_dataset(root, per_class=config.toy_images)
    protocol = build_protocol(config)
    if (config.dataset, config.method, config.variant) == ("folder", "ucdr-adapter", "paper"):
        free = {name: value for name, value in fitting_schedule(protocol.train).items() if name not in given}
        config = replace(config, **free)
    return config, protocol


def fitting_schedule(train: Files) -> dict[str, Any]:
    """Batches, epochs and rates with which a small set of images is learned from: the paper's are for 200,000."""
    counts = Counter(train.domains)
    smallest, domains = min(counts.values()), len(counts)

    def batch_and_epochs(steps: int, largest: int) -> tuple[int, int]:
        batch = max(domains, min(largest, max(20, domains * smallest // steps)))
        of_domain = min(batch // domains, smallest)  # as in `balanced_batches`
        return batch, math.ceil(steps / (smallest // of_domain))

    source_batch, source_epochs = batch_and_epochs(SOURCE_STEPS, FIELDS["source_batch"].default)
    target_batch, target_epochs = batch_and_epochs(TARGET_STEPS, FIELDS["target_batch"].default)
    return dict(source_batch=source_batch, source_epochs=source_epochs, source_lr=1e-3, target_batch=target_batch,
                target_epochs=max(target_epochs, FIELDS["target_epochs"].default), target_lr=3e-3)


def features_of(method: Any, config: Config, device: torch.device) -> FeatureCache:
    return FeatureCache(Extractor(method, device, config.precision, config.workers, config.stroke_domains))


def zero_shot(config: Config, clip: CLIP) -> ZeroShot:
    return ZeroShot(clip, normalized=config.evaluation_features == "normalized")  # D18


def build_method(config: Config, clip: CLIP, class_names: Sequence[str], domain_names: Sequence[str],
                 anchors: Tensor | None) -> Any:
    """The config's method, drawn from torch's global generator where it is trained by steps."""
    if config.method == "closed-form":
        e = clip.embed_dim
        empty = ClosedForm(torch.zeros(e), torch.zeros(e, len(domain_names) - 1), torch.zeros(e, e))
        return ClosedFormAdapter(clip, empty)
    if config.method == "zero-shot":
        return zero_shot(config, clip)
    return UCDRAdapter(clip, class_names, domain_names, config, anchors, gather_rows, batch_offset)


def new_method(config: Config, clip: CLIP, protocol: Protocol, device: torch.device) -> Any:
    """The method before training."""
    anchors = None
    if config.method == "ucdr-adapter":
        anchors = class_anchors(config, protocol, features_of(ZeroShot(clip), config, device))
    return build_method(config, clip, protocol.class_names, protocol.domain_names, anchors).to(device)


def restore_method(config: Config, clip: CLIP, state: dict[str, Any], path: Path) -> Any:
    """The method of a checkpoint, ready to encode."""
    class_names, domain_names = state["class_names"], state["domain_names"]
    anchors = torch.zeros(len(class_names), clip.embed_dim)  # the trained ones are in the checkpoint
    method = build_method(config, clip, class_names, domain_names, anchors)
    own = {name: value for name, value in state["method"].items() if name != "template.ctx"}
    load_own_state(method, own, path)
    return method.to(next(clip.parameters()).device).eval()


def label_ids(protocol: Protocol, files: Files) -> tuple[Tensor, Tensor]:
    """Class and domain ids [n] of training images."""
    return (torch.tensor([protocol.class_names.index(name) for name in files.classes]),
            torch.tensor([protocol.domain_names.index(name) for name in files.domains]))


def class_anchors(config: Config, protocol: Protocol, features: FeatureCache) -> Tensor | None:
    """Class features [c, e] that replace the text template (D13): a file's rows or prototypes; None for text.

    A prototype is the mean direction of zero-shot CLIP's features of a class's training images in the gallery
    domain. Raises ValueError for a class without such images, and for a file of anything else.
    """
    names, kind, train = protocol.class_names, config.class_features, protocol.train
    if kind in ("template", "plain"):
        return None
    shape, device = (len(names), features.extractor.method.clip.embed_dim), features.extractor.device
    if kind == "prototypes":
        files = train.keep([i for i, name in enumerate(train.domains) if name == protocol.gallery_domain])
        if missing := sorted(set(names) - set(files.classes)):
            raise ValueError(f"--class-features prototypes: no training image in {protocol.gallery_domain} for "
                             f"{abbreviate(missing)}")
        class_ids, _ = label_ids(protocol, files)
        return torch.zeros(shape).index_add_(0, class_ids, features.encode(files).cpu()).to(device)
    try:
        rows = torch.from_numpy(np.load(kind, allow_pickle=False)).float()
    except Exception as error:  # numpy's parser raises whatever comes up
        raise ValueError(f"--class-features {kind}: expected template, plain, prototypes or a .npy file of "
                         f"numbers ({one_line(error)})") from None
    if rows.shape != shape or not rows.isfinite().all() or not rows.any(dim=1).all():
        raise ValueError(f"--class-features {kind}: holds {list(rows.shape)} numbers, expected {list(shape)}, "
                         "finite, rows in class order, none of them zero")
    return rows.to(device)


def phase_data(phase: str, protocol: Protocol, config: Config, image_size: int,
               device: torch.device) -> PhaseData:
    """Domain-balanced, augmented batches of the training images for one phase of UCDR-Adapter."""
    class_ids, domain_ids = label_ids(protocol, protocol.train)
    epochs, size, epochs_before = config.source_epochs, config.source_batch, 0
    if phase == "target":
        epochs, size, epochs_before = config.target_epochs, config.target_batch, config.source_epochs

    def order(epoch: int) -> list[list[int]]:
        if config.balance == "released":  # D15
            return released_batches(domain_ids.tolist(), config.target_batch, size, epochs_before + epoch)
        return balanced_batches(domain_ids.tolist(), size, derive_seed(config.seed, phase), epoch)

    def load(epoch: int, left: Sequence[list[int]]) -> Iterator[tuple[Batch, list[str]]]:
        dataset = ImageDataset(protocol.train, augment(image_size), config.stroke_domains,
                               derive_seed(config.seed, phase, epoch))
        shards = [local_shard(batch) for batch in left]
        for indices, images, _ in load_batches(dataset, shards, config.workers, device):
            images = images.view(-1, 3, image_size, image_size)  # a shard may be empty
            images, classes, domains = (part.to(device, non_blocking=True)
                                        for part in (images, class_ids[indices], domain_ids[indices]))
            images = normalize(images, *STATISTICS[config.train_normalization])  # D4
            yield Batch(images, classes, domains), [protocol.train.paths[i] for i in indices]

    return PhaseData(epochs, order, load, partial(microbatches, phase=phase, config=config),
                     batch_size=len(order(0)[0]))


def microbatches(batch: Batch, phase: str, config: Config) -> list[tuple[Batch, float]]:
    """What passes at once of a batch, each part with its share of the images, which weights its loss.

    Only phase 2 is a mean over images alone; in phase 1 queues and momentum move once a batch.
    """
    b = len(batch.images)
    size = config.micro_batch or (CPU_PART if batch.images.device.type == "cpu" else b)
    if phase == "source" or b <= size:
        return [(batch, 1.0)]
    return [(Batch(*part), len(part[0]) / b) for part in zip(*(rows.split(size) for rows in batch))]


def training(config: Config, protocol: Protocol, method: Any,
             device: torch.device) -> tuple[Callable[[], float] | None, dict[str, Any]]:
    """What chooses the epoch, if anything does, and what goes into the checkpoint; fits the closed form."""
    learned = {"class_names": protocol.class_names, "domain_names": protocol.domain_names}
    if config.method == "closed-form":
        features = features_of(ZeroShot(method.clip), config, device)
        method.form, strength = fit_closed_form(config, protocol, features)
        return None, {**learned, "strength": strength}
    if protocol.validation is None or protocol.selected is None:
        return None, learned

    def validate() -> float:
        return validation_score(features_of(method, config, device).encode, protocol)

    return validate, learned


def fit_closed_form(config: Config, protocol: Protocol, features: FeatureCache) -> tuple[ClosedForm, float]:
    """The closed form of the training images, and its lambda: chosen on validation classes where there are."""
    z = features.encode(protocol.train)
    class_ids, domain_ids = (ids.to(z.device) for ids in label_ids(protocol, protocol.train))
    measured, strength = measure(z, class_ids, domain_ids, len(protocol.domain_names)), STRENGTH
    if config.selection == "validation" and protocol.validation and protocol.selected:
        strength = choose_strength(
            measured, lambda form: validation_score(behind_form(features, form), protocol))
    return measured.form(strength), strength


def behind_form(features: FeatureCache, form: ClosedForm) -> Encode:
    """Features behind a closed form: no image is encoded again."""
    def encode(files: Files) -> Tensor:
        with torch.inference_mode():
            return form(features.encode(files))

    return encode


def describe(protocol: Protocol) -> list[str]:
    """What training and tests consist of, a line each."""
    classes, domains = protocol.class_names, protocol.domain_names
    lines = [*protocol.notes, f"train    {len(protocol.train)} images, {len(classes)} classes, "
                              f"{len(domains)} domains ({', '.join(domains)})"]
    for test in protocol.all_tests:
        galleries = ", ".join(f"{name} {len(files)}" for name, files in test.galleries.items())
        lines.append(f"{test.protocol:<10} {len(test.query)} queries ({test.query_domain}, "
                     f"{len(set(test.query.classes))} classes); gallery {galleries} ({protocol.gallery_domain})")
    return lines


# Evaluation


def evaluate(config: Config, protocol: Protocol, method: Any, device: torch.device) -> list[dict[str, Any]]:
    """`rank`'s rows of zero-shot CLIP and of the run's method."""
    clip = features_of(zero_shot(config, method.clip), config, device)
    methods: dict[str, Encode] = {"zero-shot": clip.encode}
    if config.method == "closed-form":
        methods["closed-form"] = behind_form(clip, method.form)
    elif config.method == "ucdr-adapter":
        methods["ucdr-adapter"] = features_of(method, config, device).encode
    return rank(methods, protocol.tests)


def score(encode: Encode, test: Test, center_sets: bool = False) -> dict[str, dict[str, Any]]:
    """For each gallery of a test: the numbers of `metrics.retrieval`, and what report and picture need.

    center_sets: queries and gallery each lose their own mean first (transductive).
    """
    results, query = {}, encode(test.query)
    query = center(query) if center_sets else query
    for name, files in test.galleries.items():
        gallery = encode(files)
        gallery = center(gallery) if center_sets else gallery
        names = sorted({*test.query.classes, *files.classes})
        number = {label: i for i, label in enumerate(names)}
        query_ids, gallery_ids = (torch.tensor([number[label] for label in part.classes], device=query.device)
                                  for part in (test.query, files))
        results[name] = {"metrics": retrieval(query, query_ids, gallery, gallery_ids), "names": names,
                         "queries": test.query, "gallery": files,
                         "query_features": query.cpu(), "gallery_features": gallery.cpu()}
    return results


def validation_score(encode: Encode, protocol: Protocol) -> float:
    """The metric, in the gallery, by which phase 2 keeps its best epoch: `Protocol.selected` (D5)."""
    assert protocol.validation is not None and protocol.selected is not None
    gallery, metric = protocol.selected
    return score(encode, protocol.validation)[gallery]["metrics"][metric]


def can_center(encode: Encode, test: Test) -> bool:
    """Whether the queries' mean says something of their domain: they are of several classes, and not all equal."""
    query = encode(test.query)
    return len(set(test.query.classes)) >= CENTER_CLASSES and bool((query - query[0]).abs().max() > 1e-6)


def rank(methods: Mapping[str, Encode], tests: Sequence[Test]) -> list[dict[str, Any]]:
    """Two rows per test, gallery and method, the second centred where `can_center`: numbers, and `details`."""
    rows = []
    for test in tests:
        scored = {(name, centered): score(encode, test, centered) for name, encode in methods.items()
                  for centered in (False, True) if not centered or can_center(encode, test)}
        for gallery in test.galleries:
            for (name, centered), found in scored.items():
                details = found[gallery]
                numbers = {key: value for key, value in details["metrics"].items()
                           if isinstance(value, (int, float))}
                rows.append({
                    "protocol": test.protocol, "query_domain": test.query_domain, "gallery_name": gallery,
                    "method": f"{name}, centred" if centered else name, "transductive": centered, **numbers,
                    "query_classes": len(set(test.query.classes)), "details": details})
    return rows


def published(config: Config, protocol: str, gallery: str) -> str:
    """The published numbers of a row, empty unless it is what they describe.

    That is the whole dataset with its split and galleries, and OpenAI's ViT-B/32, known by its digest.
    """
    text = PUBLISHED.get((config.dataset, protocol, gallery), "")
    usual = config.gallery in ("", "real", "extended_photo", "images")  # each dataset has one of them
    same = usual and (protocol != "UdCDR" or config.ud_gallery == "trained")  # D7
    return text if text and same and file_digest(config.weights) == OPENAI_SHA256["ViT-B-32.pt"] else ""


def table(rows: Sequence[dict[str, Any]], config: Config) -> list[str]:
    """The rows as lines of at most 80 columns, in %, the paper's numbers under those they belong to."""
    lines = [f"{'in %':<28}" + "".join(f"{name:>10}" for name in COLUMNS)]
    tests = itemgetter("protocol", "query_domain", "gallery_name", "queries", "gallery", "no_relevant")
    for (protocol, domain, gallery, q, g, alone), group in groupby(rows, tests):
        lines.append(f"{protocol}: {q} queries ({domain}), {g} images in the {gallery} gallery")
        for row in group:
            lines.append(f"  {row['method']:<26}" + "".join(f"{100 * row[name]:10.2f}" for name in COLUMNS))
        if alone:
            lines.append(f"  {alone} queries have no relevant image here, and count as 0")
        if text := published(config, protocol, gallery):
            lines += textwrap.wrap(f"published (ViT-B/32): {text}", 80, initial_indent="  ",
                                   subsequent_indent="  ")
    if any(row["k_used"] < row["k"] for row in rows):
        lines.append("@200 of a smaller gallery: all of it")
    if any(row["transductive"] for row in rows):
        lines += ["centred: queries and gallery have each lost their own mean (transductive;",
                  "supposes a query set that is balanced over many classes)"]
    if any(row["query_classes"] < CENTER_CLASSES for row in rows):
        lines.append(f"no centred row for queries of fewer than {CENTER_CLASSES} classes")
    return lines
