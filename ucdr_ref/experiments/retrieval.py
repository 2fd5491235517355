"""Universal cross-domain retrieval: UCDR-Adapter, zero-shot CLIP, the closed form, from images to a table."""
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..clip.model import CLIP
from ..clip.zero_shot import ZeroShot, normalize
from ..config import FIELDS, Config
from ..data.benchmarks import Protocol, Test, build_protocol
from ..data.features import FeatureCache
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
from ..distributed import barrier, batch_offset, derive_seed, gather_rows, is_main, local_shard
from ..metrics import retrieval
from ..training import PhaseData
from ..ucdr.adapter import Batch, UCDRAdapter
from ..ucdr.closed_form import STRENGTHS, ClosedForm, ClosedFormAdapter, center, measure
from .report import CENTER_CLASSES

CPU_PART = 10  # images of phase 2 at once: on a CPU no slower than a batch of 50, in a third of the memory
Encode = Callable[[Files], Tensor]  # n files -> features [n, e] on the device


def load_data(config: Config, given: Collection[str] = ()) -> tuple[Config, Protocol]:
    """The protocol's file lists; drawn data is drawn first where it is absent. given: as in `experiment`."""
    if config.dataset == "toy":
        from ..demo.drawing import write_dataset
        if is_main():
            write_dataset(config.data_root, per_class=config.toy_images)
        barrier()
    protocol = build_protocol(config)
    if (config.dataset, config.method, config.variant) == ("folder", "ucdr-adapter", "paper"):
        fitting = fitting_schedule(protocol.train)
        config = replace(config, **{name: fitting[name] for name in fitting.keys() - set(given)})
    return config, protocol


def fitting_schedule(train: Files) -> dict[str, Any]:
    """Batches, epochs and rates that learn from a few images; the paper's are for 200,000."""
    counts = Counter(train.domains)
    smallest, s = min(counts.values()), len(counts)
    fitting: dict[str, Any] = {"source_lr": 1e-3, "target_lr": 3e-3}
    for phase, steps in (("source", 50), ("target", 100)):  # at least so many
        most, epochs = FIELDS[f"{phase}_batch"].default, FIELDS[f"{phase}_epochs"].default
        batch = max(s, min(most, max(20, s * smallest // steps)))
        steps_per_epoch = smallest // min(batch // s, smallest)  # as in `balanced_batches`
        fitting[f"{phase}_batch"] = batch
        fitting[f"{phase}_epochs"] = max(epochs, math.ceil(steps / steps_per_epoch))
    return fitting


def new_method(config: Config, clip: CLIP, protocol: Protocol) -> Any:
    """The method before training, drawn from torch's global generator."""
    own = {"anchors": prototypes(config, protocol, clip)} if config.class_features == "prototypes" else {}
    names = {"class_names": protocol.class_names, "domain_names": protocol.domain_names}
    return build_method(config, clip, {**names, "method": own})


def build_method(config: Config, clip: CLIP, state: Mapping[str, Any]) -> Any:
    """The method of a checkpoint, without its weights."""
    classes, domains, e = state["class_names"], state["domain_names"], clip.embed_dim
    method: Any = ZeroShot(clip, config.evaluation_features == "normalized")  # D18
    if config.method == "ucdr-adapter":
        anchors = state["method"].get("anchors")
        method = UCDRAdapter(clip, classes, domains, config, anchors, gather_rows, batch_offset)
    elif config.method == "closed-form":
        form = ClosedForm(torch.zeros(e), torch.zeros(e, len(domains) - 1), torch.zeros(e, e))
        method = ClosedFormAdapter(clip, form)
    return method.to(clip.visual.proj.device)


def numbers_of(values: Sequence[str], names: Sequence[str]) -> Tensor:
    """The index [n] in `names` of each value."""
    number = {name: i for i, name in enumerate(names)}
    return torch.tensor([number[value] for value in values])


def prototypes(config: Config, protocol: Protocol, clip: CLIP) -> Tensor:
    """Class features [c, e] in place of text (D13): zero-shot CLIP's mean direction over a class's training
    images in the gallery domain. ValueError for a class without any.
    """
    names, gallery, train = protocol.class_names, protocol.gallery_domain, protocol.train
    files = train.keep([i for i, name in enumerate(train.domains) if name == gallery])
    if missing := sorted(set(names) - set(files.classes)):
        raise ValueError(f"--class-features prototypes: no image in {gallery} for {abbreviate(missing)}")
    features = FeatureCache(ZeroShot(clip), config).encode(files)
    class_ids = numbers_of(files.classes, names).to(features.device)
    return features.new_zeros(len(names), clip.embed_dim).index_add_(0, class_ids, features)


def phase_data(phase: str, protocol: Protocol, config: Config, clip: CLIP) -> PhaseData:
    """Domain-balanced, augmented batches of the training images."""
    train, image_size, device = protocol.train, clip.image_size, clip.visual.proj.device
    class_ids = numbers_of(train.classes, protocol.class_names)
    domain_ids = numbers_of(train.domains, protocol.domain_names)
    epochs, size = getattr(config, f"{phase}_epochs"), getattr(config, f"{phase}_batch")

    def order(epoch: int) -> list[list[int]]:
        if config.balance == "released":  # D15
            turn = epoch + (config.source_epochs if phase == "target" else 0)
            return released_batches(domain_ids.tolist(), config.target_batch, size, turn)
        return balanced_batches(domain_ids.tolist(), size, derive_seed(config.seed, phase), epoch)

    def load(epoch: int, left: Sequence[list[int]]) -> Iterator[tuple[Batch, int]]:
        seed = derive_seed(config.seed, phase, epoch)
        dataset = ImageDataset(train, augment(image_size), config.stroke_domains, seed)
        for indices, images, _ in load_batches(dataset, list(map(local_shard, left)), config.workers):
            images = images.view(-1, 3, image_size, image_size).to(device)  # a shard may be empty
            images = normalize(images, *STATISTICS[config.train_normalization])  # D4
            yield Batch(images, class_ids[indices].to(device), domain_ids[indices].to(device)), len(images)

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
             ) -> tuple[dict[str, PhaseData], Callable[[], float] | None, dict[str, Any]]:
    """The phases, what chooses the epoch, and what checkpoints hold beside the weights."""
    learned: dict[str, Any] = {"class_names": protocol.class_names, "domain_names": protocol.domain_names}
    if config.method == "closed-form":
        features = FeatureCache(ZeroShot(method.clip), config)
        method.form, learned["strength"] = fit_closed_form(config, protocol, features)
    phases = {phase: phase_data(phase, protocol, config, method.clip) for phase in method.PHASES}
    if not phases or protocol.metric is None:
        return phases, None, learned
    return phases, lambda: validation_score(FeatureCache(method, config).encode, protocol), learned


def fit_closed_form(config: Config, protocol: Protocol, features: FeatureCache) -> tuple[ClosedForm, float]:
    """The closed form of the training images, and its lambda: chosen on validation classes, or 3."""
    train, z, strength = protocol.train, features.encode(protocol.train), STRENGTHS[0]
    class_ids = numbers_of(train.classes, protocol.class_names).to(z.device)
    domain_ids = numbers_of(train.domains, protocol.domain_names).to(z.device)
    measured = measure(z, class_ids, domain_ids, len(protocol.domain_names))
    if config.selection == "validation" and protocol.metric:
        strength = max(STRENGTHS, key=lambda trial: validation_score(
            behind_form(features, measured.form(trial)), protocol))
    return measured.form(strength), strength


def behind_form(features: FeatureCache, form: ClosedForm) -> Encode:
    """Features behind a closed form: no image is encoded again."""
    return lambda files: form(features.encode(files))


def describe(config: Config, protocol: Protocol, method: Any) -> list[str]:
    """What training and tests consist of, a line each."""
    domains, queries = ", ".join(protocol.domain_names), protocol.tests[0].query_domain
    lines = [*protocol.notes, f"train    {len(protocol.class_names)} classes of {domains}",
             f"test     queries of {queries}, gallery {protocol.gallery_domain}",
             *(f"images   {name}: {count:,}" for name, (count, _) in protocol.digests().items())]
    for phase in method.PHASES:
        count = sum(parameter.numel() for parameter in method.trainable(phase).values())
        plan = phase_data(phase, protocol, config, method.clip).plan()
        lines.append(f"phase {phase}: {plan}; {count:,} trainable parameters")
    return lines


# Evaluation


def evaluate(config: Config, protocol: Protocol, method: Any) -> list[dict[str, Any]]:
    """`rank`'s rows of zero-shot CLIP and of the run's method."""
    zero_shot = ZeroShot(method.clip, config.evaluation_features == "normalized")  # D18
    features = FeatureCache(zero_shot, config)
    methods: dict[str, Encode] = {"zero-shot": features.encode}
    if config.method == "closed-form":
        methods["closed-form"] = behind_form(features, method.form)
    elif config.method == "ucdr-adapter":
        methods["ucdr-adapter"] = FeatureCache(method, config).encode
    return rank(methods, protocol.tests)


def score(query: Tensor, gallery: Tensor, queries: Files, files: Files) -> dict[str, Any]:
    """`metrics.retrieval` of features [q, e] and [g, e] by the files' classes, per class by name."""
    names = sorted({*queries.classes, *files.classes})
    found = retrieval(query, numbers_of(queries.classes, names), gallery, numbers_of(files.classes, names))
    for key in ("per_class", "per_class@all"):
        found[key] = {names[k]: value for k, value in found[key].items()}
    return found


def validation_score(encode: Encode, protocol: Protocol) -> float:
    """The metric by which phase 2 keeps its best epoch (D5)."""
    assert protocol.validation and protocol.metric
    queries, [files] = protocol.validation.query, protocol.validation.galleries.values()
    return float(score(encode(queries), encode(files), queries, files)[protocol.metric])


def rank(methods: Mapping[str, Encode], tests: Sequence[Test]) -> list[dict[str, Any]]:
    """A row per test, gallery and method: numbers, and `details` for report and picture.

    A second row is centred, but for queries of few classes, whose mean is the classes', or all equal ones.
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
                metrics = score(q, g, queries, files)
                rows.append({
                    "protocol": test.protocol, "query_domain": test.query_domain, "gallery_name": where,
                    "method": title, "transductive": title != name, "query_classes": classes,
                    **{key: value for key, value in metrics.items() if isinstance(value, (int, float))},
                    "details": {"metrics": metrics, "queries": queries, "gallery": files,
                                "query_features": q.cpu(), "gallery_features": g.cpu()}})
    return rows
