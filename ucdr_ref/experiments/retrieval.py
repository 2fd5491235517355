"""Universal cross-domain retrieval as an experiment: UCDR-Adapter (and CLIP as it is) from a protocol to a
table.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..clip.model import CLIP
from ..clip.tensorfile import regular_file, tidy
from ..clip.zero_shot import ZeroShot, normalised
from ..config import Config
from ..images.batches import STATISTICS, ImageDataset, augment, balanced_batches, load, released_batches
from ..images.features import Extractor, prototypes
from ..machine.files import load_state, save_atomic
from ..machine.processes import fold, gather_rows, main_first, place, share
from ..training.journal import load_own_state
from ..training.loop import Feed
from ..ucdr.adapter import Batch, UCDRAdapter
from ..ucdr.closed_form import ClosedForm, ClosedFormAdapter, Measured, choose_strength, measure
from . import protocols
from .contract import Experiment, Method, Training
from .page import retrieval_page as page
from .protocols import Protocol
from .ranking import FeatureTable, Rows, formed, rank, table, validation_score
from .report import plain
from .report import write_retrieval as write_results
from .run_folder import check_sizes
from .trees import Listing

__all__ = ["build", "check", "evaluate", "prepare", "rebuild", "table", "tested", "write_results", "page"]


class Base(NamedTuple):
    """An encoder without what is built upon it."""

    clip: CLIP
    encode: Callable[[Tensor], Tensor]


def prepare(config: Config, before: Listing | None = None) -> tuple[Config, Protocol]:
    """The protocol's file lists; the drawn data is drawn first where it is absent. before: `trees.restored`
    takes it.
    """
    if config.dataset == "toy":
        from ..demo.drawing import write_dataset
        with main_first():
            write_dataset(config.data_root, per_class=config.toy_images)
    return config, protocols.build(config, before)


def build(config: Config, protocol: Protocol, clip: CLIP, device: torch.device) -> Experiment:
    """A method that starts from its initial values, drawn from torch's global generator."""
    method: UCDRAdapter | ZeroShot | ClosedFormAdapter = zero_shot(config, clip)
    if config.method == "closed-form":
        method = ClosedFormAdapter(clip, ZeroShot(clip).encode,
                                   nothing_removed(clip.embed_dim, len(protocol.domain_names)))
    elif config.method == "ucdr-adapter":
        anchors = class_anchors(config, protocol, Extractor(ZeroShot(clip), config, device))
        method = adapter(config, clip, protocol.class_names, protocol.domain_names, anchors).to(device)
    feeds = {phase: feed(phase, protocol, config, clip.image_size, device) for phase in method.PHASES}
    for phase_feed in feeds.values():
        phase_feed.order(0)  # a batch that cannot be balanced is refused before anything is written
    table = FeatureTable(Extractor(method, config, device))

    def validate() -> float:
        assert protocol.validation is not None and protocol.selected is not None
        table.rows.clear()  # the method has learnt
        return validation_score(table.of, protocol.validation, protocol.selected)

    def start(folder: Path) -> Training:
        if isinstance(method, ClosedFormAdapter):
            method.form = fit_form(config, protocol, FeatureTable(Extractor(ZeroShot(clip), config, device)))
        return Training(feeds, validate if protocol.selected is not None else None, config, config.patience)

    def finish(folder: Path) -> None:
        """--closed-form 1: the form of the trained adapter's own features goes into best.pt."""
        state = load_state(folder / "best.pt") if config.closed_form else {"form": None}
        if "form" not in state:
            trained = rebuild(config, clip, state, folder / "best.pt", device)
            form = fit_form(config, protocol, FeatureTable(Extractor(trained, config, device)))
            save_atomic({**state, "form": form.state_dict()}, folder / "best.pt")

    return Experiment(method, protocol.class_names, protocol.domain_names, summary(protocol, method),
                      protocol.digests(),
                      start, finish)


def nothing_removed(e: int, s: int) -> ClosedForm:
    """A closed form of the shapes of e-dimensional features and s source domains, to be filled."""
    return ClosedForm(torch.zeros(e), torch.zeros(e, max(0, s - 1)), torch.zeros(e, e))


def measured_form(protocol: Protocol, table: FeatureTable) -> Measured:
    """The closed form of the features of the training images, before lambda is chosen."""
    features, files = table.of(protocol.train)
    class_ids, domain_ids = (torch.tensor([names.index(name) for name in labels], device=features.device)
                             for names, labels in ((protocol.class_names, files.classes),
                                                   (protocol.domain_names, files.domains)))
    return measure(features, class_ids, domain_ids, len(protocol.domain_names))


def fit_form(config: Config, protocol: Protocol, table: FeatureTable) -> ClosedForm:
    """The closed form of the features of the training images; lambda as --whitening says, or chosen on
    validation classes.
    """
    measured = measured_form(protocol, table)
    strength, validation, selected = config.whitening, protocol.validation, protocol.selected
    if not strength:
        strength = 3.0  # on a plateau that spans 1 to 10
        if config.selection == "validation" and validation is not None and selected is not None:
            strength = choose_strength(measured,
                                       lambda form: validation_score(formed(table, form), validation, selected))
    return measured.form(strength)


def check(config: Config, state: dict[str, Any], path: Path) -> None:
    """Raises Misfit when the sizes that the config asks for are not those of the checkpoint's tensors."""
    p, (c, s) = config.prompt_length, (len(state[key]) for key in ("class_names", "domain_names"))
    if config.method == "ucdr-adapter":
        check_sizes(path, state["method"], {"domain_prompts": [s, p], "class_prompts": [c, p],
                                            "queues.rows": [c + 1, config.queue_size]})
    form = state.get("form", {})
    if not all(isinstance(value, Tensor) and torch.isfinite(value).all() for value in form.values()):
        raise ValueError("its closed form is something else")


def rebuild(config: Config, clip: CLIP, state: dict[str, Any], path: Path, device: torch.device) -> Method:
    """The method of a checkpoint, ready to encode."""
    if config.method == "zero-shot":
        return zero_shot(config, clip)
    form = nothing_removed(clip.embed_dim, len(state["domain_names"]))
    if config.method == "closed-form":
        method = ClosedFormAdapter(clip, ZeroShot(clip).encode, form)
        load_own_state(method, state["method"], path)
        return method.to(device).eval()
    anchors = torch.zeros(len(state["class_names"]), clip.embed_dim, device=device)
    trained = adapter(config, clip, state["class_names"], state["domain_names"], anchors).to(device).eval()
    load_own_state(trained,
                   {name: value for name, value in state["method"].items() if name != "template.ctx"}, path)
    if "form" not in state:
        return trained
    load_own_state(form, state["form"], path)
    return ClosedFormAdapter(clip, trained.encode, form).to(device)


def zero_shot(config: Config, clip: CLIP) -> ZeroShot:
    return ZeroShot(clip, normalized=config.evaluation_features == "normalized")  # D18


def adapter(config: Config, clip: CLIP, class_names: list[str], domain_names: list[str],
            anchors: Tensor | None) -> UCDRAdapter:
    """UCDR-Adapter whose batches may be shared by several processes."""
    return UCDRAdapter(clip, class_names, domain_names, config, anchors, gather_rows, place)


def summary(protocol: Protocol, method: Any) -> str:
    lines = [*protocol.notes,
             f"train    {len(protocol.train)} images, {len(protocol.class_names)} classes, "
             f"{len(protocol.domain_names)} domains ({', '.join(protocol.domain_names)})"]
    for test in ([protocol.validation] if protocol.validation else []) + protocol.tests:
        galleries = ", ".join(f"{name} {len(files)}" for name, files in test.galleries.items())
        lines.append(f"{test.protocol:<10} {len(test.query)} queries ({test.query_domain}, "
                     f"{len(set(test.query.classes))} classes); gallery {galleries} "
                     f"({protocol.gallery_domain})")
    if isinstance(method, UCDRAdapter):
        for phase in method.PHASES:
            count = sum(parameter.numel() for parameter in method.trainable(phase).values())
            lines.append(f"phase {phase}: {count:,} trainable parameters")
    return "\n".join(map(plain, lines))


def class_anchors(config: Config, protocol: Protocol, zero_shot: Extractor) -> Tensor | None:
    """Class features [c, e] that replace the text template (D13): the file's rows, or prototypes; None for
    text.

    A prototype is the mean of the frozen tower's normalised features of a class's gallery-domain training
    images. Raises ValueError for a file of another shape or with a zero row, or a class without such images.
    """
    names, kind, e = protocol.class_names, config.class_features, zero_shot.method.clip.embed_dim
    if kind in ("template", "plain"):
        return None
    if kind == "prototypes":
        train = protocol.train
        files = train.keep([i for i, name in enumerate(train.domains) if name == protocol.gallery_domain])
        if missing := sorted(set(names) - set(files.classes)):
            raise ValueError(f"--class-features prototypes: no training image in {protocol.gallery_domain} "
                             f"for "
                             f"{', '.join(missing[:5])}")
        features, kept = zero_shot.features(files)
        labels = torch.tensor([names.index(name) for name in files.keep(kept).classes])
        return prototypes([(features, labels)], len(names)).to(zero_shot.device)
    try:  # mapped, so that a header which claims more than the file holds is found out before memory is taken
        with np.errstate(over="ignore"):  # in the product of the sizes that it claims
            rows = torch.from_numpy(np.load(regular_file(config.class_features), "c", allow_pickle=False))
    except Exception as error:  # numpy's parser raises whatever comes up, tokenize.TokenError among them
        raise ValueError(f"--class-features {kind}: expected template, plain, prototypes or a .npy file of "
                         f"numbers "
                         f"({tidy(error)})") from None
    sound = rows.is_floating_point() and rows.shape == (len(names), e)
    if not sound or not torch.isfinite(rows).all() or not rows.any(dim=1).all():
        raise ValueError(f"--class-features {kind}: holds {rows.dtype} {list(rows.shape)}, expected "
                         f"{[len(names), e]} finite "
                         "floating-point numbers, rows in class order, none of them zero")
    return rows.float().to(zero_shot.device)


CPU_PART = 10  # images of phase 2 at once: on a CPU no slower than a batch of 50, in a third of the memory


def feed(phase: str, protocol: Protocol, config: Config, image_size: int, device: torch.device) -> Feed:
    """Domain-balanced, augmented batches of the training files for one phase of UCDR-Adapter."""
    class_ids = torch.tensor([protocol.class_names.index(name) for name in protocol.train.classes])
    domain_ids = torch.tensor([protocol.domain_names.index(name) for name in protocol.train.domains])
    size = config.source_batch if phase == "source" else config.target_batch

    def order(epoch: int) -> list[list[int]]:
        if config.balance == "released":  # D15
            turn = epoch if phase == "source" else config.source_epochs + epoch
            return released_batches(domain_ids.tolist(), config.target_batch, size, turn)
        return balanced_batches(domain_ids.tolist(), size, fold(config.seed, phase), epoch)

    def batches(epoch: int, left: Sequence[list[int]]) -> Iterator[tuple[Batch, list[str]]]:
        shares = [share(batch) for batch in left]
        seed = fold(config.seed, phase, epoch)
        as_is = config.image_reading == "as-is"  # D19
        dataset = ImageDataset(protocol.train, augment(image_size), config.stroke_domains, seed, as_is=as_is)
        for indices, images, _ in load(dataset, shares, config.workers, config.bad_images == "skip", device):
            images = images.view(-1, 3, image_size, image_size)  # a share may be empty
            images, classes, domains = (part.to(device, non_blocking=True)
                                        for part in (images, class_ids[indices], domain_ids[indices]))
            images = normalised(images, *STATISTICS[config.train_normalization])  # D4
            yield Batch(images, classes, domains), [protocol.train.paths[i] for i in indices]

    epochs = config.source_epochs if phase == "source" else config.target_epochs
    return Feed(epochs, order, batches, lambda batch: cut(batch, phase, config))


def cut(batch: Batch, phase: str, config: Config) -> list[tuple[Batch, float]]:
    """What passes at once of a batch, each part with its share of the images: the losses' weighted sum is the
    batch's.

    Only phase 2 is a mean over images alone; in phase 1 queues and momentum move once a batch, so it stays
    whole.
    """
    b = len(batch.images)
    size = config.micro_batch or (CPU_PART if batch.images.device.type == "cpu" else b)
    if phase == "source" or b <= size:
        return [(batch, 1.0)]
    return [(Batch(*part), len(part[0]) / b) for part in zip(*(rows.split(size) for rows in batch))]


def tested(config: Config, state: dict[str, Any], before: Listing | None = None) -> Protocol:
    """What a run is evaluated on."""
    return prepare(config, before)[1]


def evaluate(config: Config, protocol: Protocol, method: Any, state: dict[str, Any], folder: Path,
             device: torch.device,
             with_closed_form: bool = False) -> list[dict[str, Any]]:
    """`ranking.rank`'s rows of zero-shot CLIP, the closed form where asked for, the method, and the method's
    closed form.
    """
    clip_table = FeatureTable(Extractor(zero_shot(config, method.clip), config, device))
    methods: dict[str, Rows] = {"zero-shot": clip_table.of}
    own_form = isinstance(method, ClosedFormAdapter)
    if config.method == "closed-form":
        methods["closed-form"] = formed(clip_table, method.form)
    elif with_closed_form:
        methods["closed-form"] = formed(clip_table, fit_form(config, protocol, clip_table).to(device))
    if config.method == "ucdr-adapter":
        base: Any = Base(method.clip, method.base) if own_form else method
        table = FeatureTable(Extractor(base, config, device))
        methods["ucdr-adapter"] = table.of
        if own_form:
            methods["ucdr-adapter, closed form"] = formed(table, method.form)
    return rank(methods, protocol.tests)
