"""Universal cross-domain retrieval: UCDR-Adapter, zero-shot CLIP, the closed form, from images to a table."""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cli import as_value_error
from ..clip.model import CLIP
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
from ..ucdr.closed_form import STRENGTHS, ClosedForm, ClosedFormAdapter, center, measure
from .report import CENTER_CLASSES

CPU_PART = 10  # images of phase 2 at once: on a CPU no slower than a batch of 50, in a third of the memory
SOURCE_LR, TARGET_LR = 1e-3, 3e-3  # of a training on an own folder
STRENGTH = 3.0  # lambda of the closed form where no validation classes choose it
Encode = Callable[[Files], Tensor]  # n files -> features [n, e] on the device


def load_data(config: Config, given: Collection[str] = tuple(FIELDS)) -> tuple[Config, Protocol]:
    """The protocol's file lists; drawn data is drawn first where it is absent.

    given: the fields that the user chose; UCDR-Adapter's others follow from the size of an own folder.
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
        fitting = fitting_schedule(protocol.train)
        config = replace(config, **{name: fitting[name] for name in fitting.keys() - set(given)})
    return config, protocol


def fitting_schedule(train: Files) -> dict[str, Any]:
    """Batches, epochs and rates that learn from a few images; the paper's are for 200,000."""
    counts = Counter(train.domains)
    smallest, domains = min(counts.values()), len(counts)
    fitting: dict[str, Any] = {"source_lr": SOURCE_LR, "target_lr": TARGET_LR}
    for phase, steps in (("source", 50), ("target", 100)):  # at least so many
        most, usual = FIELDS[f"{phase}_batch"].default, FIELDS[f"{phase}_epochs"].default
        batch = max(domains, min(most, max(20, domains * smallest // steps)))
        steps_per_epoch = smallest // min(batch // domains, smallest)  # as in `balanced_batches`
        fitting[f"{phase}_batch"] = batch
        fitting[f"{phase}_epochs"] = max(usual, math.ceil(steps / steps_per_epoch))
    return fitting


def features_of(method: Any, config: Config) -> FeatureCache:
    device = next(method.clip.parameters()).device
    return FeatureCache(Extractor(method, device, config.precision, config.workers, config.stroke_domains))


def zero_shot(config: Config, clip: CLIP) -> ZeroShot:
    return ZeroShot(clip, normalized=config.evaluation_features == "normalized")  # D18


def new_method(config: Config, clip: CLIP, protocol: Protocol, device: torch.device) -> Any:
    """The method before training, drawn from torch's global generator where it is trained by steps."""
    if config.method != "ucdr-adapter":
        return zero_shot(config, clip)  # `training` fits the closed form
    anchors = class_anchors(config, protocol, features_of(ZeroShot(clip), config))
    return UCDRAdapter(clip, protocol.class_names, protocol.domain_names, config, anchors, gather_rows,
                       batch_offset).to(device)


def restore_method(config: Config, clip: CLIP, state: dict[str, Any], path: Path) -> Any:
    """The method of a checkpoint, ready to encode."""
    method: Any = zero_shot(config, clip)
    classes, domains, e = state["class_names"], state["domain_names"], clip.embed_dim
    if config.method == "closed-form":
        form = ClosedForm(torch.zeros(e), torch.zeros(e, len(domains) - 1), torch.zeros(e, e))
        method = ClosedFormAdapter(clip, form)
    elif config.method == "ucdr-adapter":
        anchors = torch.zeros(len(classes), e)  # the trained ones are in the checkpoint
        method = UCDRAdapter(clip, classes, domains, config, anchors, gather_rows, batch_offset)
    own = {name: value for name, value in state["method"].items() if name != "template.ctx"}
    load_own_state(method, own, path)
    return method.to(next(clip.parameters()).device).eval()


def label_ids(protocol: Protocol, files: Files) -> tuple[Tensor, Tensor]:
    """Class and domain ids [n] of training images."""
    classes, domains = ({name: i for i, name in enumerate(names)}
                        for names in (protocol.class_names, protocol.domain_names))
    return (torch.tensor([classes[name] for name in files.classes]),
            torch.tensor([domains[name] for name in files.domains]))


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
            raise ValueError(f"--class-features prototypes: no training image in {protocol.gallery_domain} "
                             f"for {abbreviate(missing)}")
        class_ids, _ = label_ids(protocol, files)
        return torch.zeros(shape).index_add_(0, class_ids, features.encode(files).cpu()).to(device)
    expected = "expected template, plain, prototypes or a .npy file of class features in class order"
    with as_value_error(f"--class-features {kind}", "is not usable", expected):
        rows = torch.from_numpy(np.load(kind, allow_pickle=False)).float()
        if rows.shape != shape or not rows.isfinite().all() or not rows.any(dim=1).all():
            raise ValueError(f"{list(rows.shape)} numbers, not {list(shape)}, finite, no row zero")
    return rows.to(device)


def phase_data(phase: str, protocol: Protocol, config: Config, clip: CLIP) -> PhaseData:
    """Domain-balanced, augmented batches of the training images for one phase of UCDR-Adapter."""
    image_size, device = clip.image_size, next(clip.parameters()).device
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


def training(config: Config, protocol: Protocol,
             method: Any) -> tuple[Any, dict[str, PhaseData], Callable[[], float] | None, dict[str, Any]]:
    """The method, its phases, what chooses the epoch, and what checkpoints hold beside the weights."""
    learned = {"class_names": protocol.class_names, "domain_names": protocol.domain_names}
    if config.method == "closed-form":
        form, strength = fit_closed_form(config, protocol, features_of(method, config))
        return ClosedFormAdapter(method.clip, form), {}, None, {**learned, "strength": strength}
    phases = {phase: phase_data(phase, protocol, config, method.clip) for phase in method.PHASES}
    if protocol.validation is None or protocol.selected is None:
        return method, phases, None, learned
    return method, phases, lambda: validation_score(features_of(method, config).encode, protocol), learned


def fit_closed_form(config: Config, protocol: Protocol, features: FeatureCache) -> tuple[ClosedForm, float]:
    """The closed form of the training images, and its lambda, chosen on validation classes if there are."""
    z = features.encode(protocol.train)
    class_ids, domain_ids = (ids.to(z.device) for ids in label_ids(protocol, protocol.train))
    measured, strength = measure(z, class_ids, domain_ids, len(protocol.domain_names)), STRENGTH
    if config.selection == "validation" and protocol.validation and protocol.selected:
        strength = max(STRENGTHS, key=lambda strength: validation_score(
            behind_form(features, measured.form(strength)), protocol))
    return measured.form(strength), strength


def behind_form(features: FeatureCache, form: ClosedForm) -> Encode:
    """Features behind a closed form: no image is encoded again."""
    def encode(files: Files) -> Tensor:
        with torch.inference_mode():
            return form(features.encode(files))

    return encode


def describe(config: Config, protocol: Protocol, method: Any) -> list[str]:
    """What training and tests consist of, a line each."""
    classes, domains = protocol.class_names, protocol.domain_names
    lines = [*protocol.notes, f"train    {len(protocol.train)} images, {len(classes)} classes, "
                              f"{len(domains)} domains ({', '.join(domains)})"]
    for test in protocol.all_tests:
        galleries = ", ".join(f"{name} {len(files)}" for name, files in test.galleries.items())
        c = len(set(test.query.classes))
        lines.append(f"{test.protocol:<10} {len(test.query)} queries ({test.query_domain}, {c} classes); "
                     f"gallery {galleries} ({protocol.gallery_domain})")
    for phase in method.PHASES:
        count = sum(parameter.numel() for parameter in method.trainable(phase).values())
        plan = phase_data(phase, protocol, config, method.clip).plan()
        lines.append(f"phase {phase}: {plan}; {count:,} trainable parameters")
    return lines


# Evaluation


def evaluate(config: Config, protocol: Protocol, method: Any) -> list[dict[str, Any]]:
    """`rank`'s rows of zero-shot CLIP and of the run's method."""
    clip = features_of(zero_shot(config, method.clip), config)
    methods: dict[str, Encode] = {"zero-shot": clip.encode}
    if config.method == "closed-form":
        methods["closed-form"] = behind_form(clip, method.form)
    elif config.method == "ucdr-adapter":
        methods["ucdr-adapter"] = features_of(method, config).encode
    return rank(methods, protocol.tests)


def score(query: Tensor, gallery: Tensor, queries: Files, files: Files) -> tuple[dict[str, Any], list[str]]:
    """`metrics.retrieval` of features [q, e] and [g, e] by the files' classes, and its labels' names."""
    names = sorted({*queries.classes, *files.classes})
    number = {name: i for i, name in enumerate(names)}
    labels = [torch.tensor([number[name] for name in part.classes], device=query.device)
              for part in (queries, files)]
    return retrieval(query, labels[0], gallery, labels[1]), names


def validation_score(encode: Encode, protocol: Protocol) -> float:
    """The metric, in the gallery, by which phase 2 keeps its best epoch: `Protocol.selected` (D5)."""
    assert protocol.validation is not None and protocol.selected is not None
    gallery, metric = protocol.selected
    queries, files = protocol.validation.query, protocol.validation.galleries[gallery]
    return score(encode(queries), encode(files), queries, files)[0][metric]


def rank(methods: Mapping[str, Encode], tests: Sequence[Test]) -> list[dict[str, Any]]:
    """A row per test, gallery and method: numbers, and `details` for report and picture.

    A second row is centred: queries and gallery have each lost their own mean (transductive). There is none
    for queries of few classes, whose mean is that of the classes, or that are all equal.
    """
    rows: list[dict[str, Any]] = []
    for test in tests:
        queries, classes = test.query, len(set(test.query.classes))
        for (where, files), (name, encode) in product(test.galleries.items(), methods.items()):
            query, gallery = encode(queries), encode(files)
            versions = [(name, query, gallery)]
            if classes >= CENTER_CLASSES and (query - query[0]).abs().max() > 1e-6:
                versions.append((f"{name}, centred", center(query), center(gallery)))
            for title, q, g in versions:
                metrics, names = score(q, g, queries, files)
                numbers = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
                rows.append({
                    "protocol": test.protocol, "query_domain": test.query_domain, "gallery_name": where,
                    "method": title, "transductive": title != name, **numbers, "query_classes": classes,
                    "details": {"metrics": metrics, "names": names, "queries": queries, "gallery": files,
                                "query_features": q.cpu(), "gallery_features": g.cpu()}})
    return rows
