"""Universal cross-domain retrieval as an experiment: UCDR-Adapter and CLIP, from files to a table."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..clip.model import CLIP
from ..clip.weights import check_file, one_line
from ..clip.zero_shot import ZeroShot, normalize
from ..config import Config
from ..images.batches import (
    STATISTICS,
    Files,
    ImageDataset,
    augment,
    balanced_batches,
    load,
    released_batches,
)
from ..images.features import Extractor, prototypes
from ..machine.processes import fold, gather_rows, main_first, place, share
from ..training.journal import load_own_state
from ..training.loop import Feed, Run
from ..ucdr.adapter import Batch, UCDRAdapter
from ..ucdr.closed_form import ClosedForm, ClosedFormAdapter, Measured, choose_strength, measure
from . import protocols
from .contract import Experiment, Method, Training
from .datasets import some
from .page import retrieval_page as page
from .protocols import Protocol
from .ranking import FeatureTable, Rows, formed, rank, table, validation_score
from .report import plain
from .report import write_retrieval as write_results
from .run_folder import check_sizes
from .trees import Listing

__all__ = ["build", "check", "evaluate", "prepare", "rebuild", "table", "tested", "write_results", "page"]
CPU_PART = 10  # images of phase 2 at once: on a CPU no slower than a batch of 50, in a third of the memory


def prepare(config: Config, before: Listing | None = None) -> tuple[Config, Protocol]:
    """The protocol's file lists, once absent drawn data is drawn. before: `trees.restore` takes it."""
    if config.dataset == "toy":
        from ..demo.drawing import write_dataset
        with main_first():
            write_dataset(config.data_root, per_class=config.toy_images)
    return config, protocols.build(config, before)


def tested(config: Config, state: dict[str, Any], before: Listing | None = None) -> Protocol:
    """What a run is evaluated on."""
    return prepare(config, before)[1]


def initial(config: Config, clip: CLIP, class_names: list[str], domain_names: list[str],
            anchors: Tensor | None) -> Any:
    """The config's method, drawn from torch's global generator where it is trained by steps."""
    if config.method == "closed-form":
        return ClosedFormAdapter(clip, empty_form(clip, domain_names))
    if config.method == "zero-shot":
        return zero_shot(config, clip)
    return UCDRAdapter(clip, class_names, domain_names, config, anchors, gather_rows, place)


def zero_shot(config: Config, clip: CLIP) -> ZeroShot:
    return ZeroShot(clip, normalized=config.evaluation_features == "normalized")  # D18


def empty_form(clip: CLIP, domain_names: list[str]) -> ClosedForm:
    """A closed form of the right shapes, to be filled."""
    e = clip.embed_dim
    return ClosedForm(torch.zeros(e), torch.zeros(e, max(0, len(domain_names) - 1)), torch.zeros(e, e))


def build(config: Config, protocol: Protocol, clip: CLIP, device: torch.device) -> Experiment:
    """The config's method at its initial values, and how it is trained."""
    anchors = None
    if config.method == "ucdr-adapter":
        anchors = class_anchors(config, protocol, Extractor(ZeroShot(clip), config, device))
    method = initial(config, clip, protocol.class_names, protocol.domain_names, anchors).to(device)
    feeds = {phase: feed(phase, protocol, config, clip.image_size, device) for phase in method.PHASES}
    for phase_feed in feeds.values():
        phase_feed.order(0)  # a batch that cannot be balanced is refused before anything is written

    def validate() -> float:
        assert protocol.validation is not None and protocol.selected is not None
        return validation_score(encoded(method, config, device).of, protocol.validation, protocol.selected)

    def start(folder: Path, about: dict[str, Any]) -> Training:
        if config.method == "closed-form":
            method.form = fit_form(config, protocol, encoded(ZeroShot(clip), config, device))
        about |= {"class_names": protocol.class_names, "domain_names": protocol.domain_names}
        run = Run(folder, config, device, about, config.patience)
        return feeds, validate if protocol.selected is not None else None, run

    def finish(folder: Path) -> None:
        pass

    return Experiment(method, summary(protocol), start, finish)


def check(config: Config, state: dict[str, Any], path: Path) -> None:
    """Raises Misfit when the sizes that the config asks for are not those of the checkpoint's tensors."""
    p, (c, s) = config.prompt_length, (len(state[key]) for key in ("class_names", "domain_names"))
    if config.method == "ucdr-adapter":
        sizes = {"domain_prompts": [s, p], "class_prompts": [c, p], "queues.labels": [c * config.queue_size]}
        check_sizes(path, state["method"], sizes)


def rebuild(config: Config, clip: CLIP, state: dict[str, Any], path: Path, device: torch.device) -> Method:
    """The method of a checkpoint, ready to encode."""
    class_names, domain_names = state["class_names"], state["domain_names"]
    anchors = torch.zeros(len(class_names), clip.embed_dim)  # the trained ones are in the checkpoint
    method = initial(config, clip, class_names, domain_names, anchors).to(device).eval()
    own = {name: value for name, value in state["method"].items() if name != "template.ctx"}
    load_own_state(method, own, path)
    return method


def summary(protocol: Protocol) -> str:
    classes, domains = protocol.class_names, protocol.domain_names
    of_domains = f"{len(domains)} domains ({', '.join(domains)})"
    lines = [*protocol.notes,
             f"train    {len(protocol.train)} images, {len(classes)} classes, {of_domains}"]
    for test in protocol.all_tests:
        galleries = ", ".join(f"{name} {len(files)}" for name, files in test.galleries.items())
        asked = f"{len(test.query)} queries ({test.query_domain}, {len(set(test.query.classes))} classes)"
        lines.append(f"{test.protocol:<10} {asked}; gallery {galleries} ({protocol.gallery_domain})")
    return "\n".join(map(plain, lines))


def label_ids(protocol: Protocol, files: Files) -> tuple[Tensor, Tensor]:
    """Class and domain ids [n] of training images."""
    return (torch.tensor([protocol.class_names.index(name) for name in files.classes]),
            torch.tensor([protocol.domain_names.index(name) for name in files.domains]))


def class_anchors(config: Config, protocol: Protocol, zero_shot: Extractor) -> Tensor | None:
    """Class features [c, e] that replace the text template (D13): a file's rows or prototypes; None for text.

    A prototype is the mean of the frozen tower's normalised features of a class's gallery-domain training
    images. Raises ValueError for a file of another shape or with a zero row, or a class without such images.
    """
    names, kind = protocol.class_names, config.class_features
    if kind in ("template", "plain"):
        return None
    if kind == "prototypes":
        train = protocol.train
        files = train.keep([i for i, name in enumerate(train.domains) if name == protocol.gallery_domain])
        features, files = FeatureTable(zero_shot).of(files)
        if missing := sorted(set(names) - set(files.classes)):
            raise ValueError(f"--class-features prototypes: no readable training image in "
                             f"{protocol.gallery_domain} for {some(missing, 5)}")
        class_ids, _ = label_ids(protocol, files)
        return prototypes([(features.cpu(), class_ids)], len(names)).to(zero_shot.device)
    try:  # mapped, so that a header which claims more than the file holds is found out before memory is taken
        with np.errstate(over="ignore"):  # in the product of the sizes that it claims
            rows = torch.from_numpy(np.load(check_file(kind), "c", allow_pickle=False))
    except Exception as error:  # numpy's parser raises whatever comes up, tokenize.TokenError among them
        raise ValueError(f"--class-features {kind}: expected template, plain, prototypes or a .npy file of "
                         f"numbers ({one_line(error)})") from None
    expected = [len(names), zero_shot.method.clip.embed_dim]
    sound = rows.is_floating_point() and list(rows.shape) == expected
    if not sound or not torch.isfinite(rows).all() or not rows.any(dim=1).all():
        raise ValueError(f"--class-features {kind}: holds {rows.dtype} {list(rows.shape)}, expected "
                         f"{expected} finite floating-point numbers, rows in class order, none of them zero")
    return rows.float().to(zero_shot.device)


def feed(phase: str, protocol: Protocol, config: Config, image_size: int, device: torch.device) -> Feed:
    """Domain-balanced, augmented batches of the training files for one phase of UCDR-Adapter."""
    class_ids, domain_ids = label_ids(protocol, protocol.train)
    epochs, size, before = config.source_epochs, config.source_batch, 0
    if phase == "target":
        epochs, size, before = config.target_epochs, config.target_batch, config.source_epochs

    def order(epoch: int) -> list[list[int]]:
        if config.balance == "released":  # D15
            return released_batches(domain_ids.tolist(), config.target_batch, size, before + epoch)
        return balanced_batches(domain_ids.tolist(), size, fold(config.seed, phase), epoch)

    def batches(epoch: int, left: Sequence[list[int]]) -> Iterator[tuple[Batch, list[str]]]:
        dataset = ImageDataset(protocol.train, augment(image_size), config.stroke_domains,
                               fold(config.seed, phase, epoch), as_is=config.image_reading == "as-is")  # D19
        shares = [share(batch) for batch in left]
        for indices, images, _ in load(dataset, shares, config.workers, config.bad_images == "skip", device):
            images = images.view(-1, 3, image_size, image_size)  # a share may be empty
            images, classes, domains = (part.to(device, non_blocking=True)
                                        for part in (images, class_ids[indices], domain_ids[indices]))
            images = normalize(images, *STATISTICS[config.train_normalization])  # D4
            yield Batch(images, classes, domains), [protocol.train.paths[i] for i in indices]

    return Feed(epochs, order, batches, lambda batch: cut(batch, phase, config))


def cut(batch: Batch, phase: str, config: Config) -> list[tuple[Batch, float]]:
    """What passes at once of a batch, each part with its share of the images, which weights its loss.

    Only phase 2 is a mean over images alone; in phase 1 queues and momentum move once a batch.
    """
    b = len(batch.images)
    size = config.micro_batch or (CPU_PART if batch.images.device.type == "cpu" else b)
    if phase == "source" or b <= size:
        return [(batch, 1.0)]
    return [(Batch(*part), len(part[0]) / b) for part in zip(*(rows.split(size) for rows in batch))]


def encoded(method: Any, config: Config, device: torch.device) -> FeatureTable:
    return FeatureTable(Extractor(method, config, device))


def measured_form(protocol: Protocol, table: FeatureTable) -> Measured:
    """The closed form of the features of the training images, before lambda is chosen."""
    features, files = table.of(protocol.train)
    class_ids, domain_ids = (ids.to(features.device) for ids in label_ids(protocol, files))
    return measure(features, class_ids, domain_ids, len(protocol.domain_names))


def fit_form(config: Config, protocol: Protocol, table: FeatureTable) -> ClosedForm:
    """The closed form; lambda is chosen on validation classes, or 3 without such."""
    measured, validation, selected = measured_form(protocol, table), protocol.validation, protocol.selected
    strength = 3.0  # on a plateau that spans 1 to 10
    if config.selection == "validation" and validation and selected:
        strength = choose_strength(
            measured, lambda form: validation_score(formed(table, form), validation, selected))
    return measured.form(strength)


def evaluate(config: Config, protocol: Protocol, method: Any, state: dict[str, Any], folder: Path,
             device: torch.device, with_closed_form: bool = False) -> list[dict[str, Any]]:
    """`ranking.rank`'s rows of zero-shot CLIP and of the method, and of closed forms of their features."""
    clip = encoded(zero_shot(config, method.clip), config, device)
    methods: dict[str, Rows] = {"zero-shot": clip.of}
    if config.method == "closed-form":
        methods["closed-form"] = formed(clip, method.form)
    elif with_closed_form:
        methods["closed-form"] = formed(clip, fit_form(config, protocol, clip))
    if config.method == "ucdr-adapter":
        methods["ucdr-adapter"] = encoded(method, config, device).of
    return rank(methods, protocol.tests)
