"""Options of UCDR-Adapter: the ledger D (paper or a careful reading first, released code second), numbers."""
from dataclasses import dataclass
from math import inf
from typing import Annotated, ClassVar, Literal


@dataclass(frozen=True)
class Options:
    """UCDR-Adapter. Defaults are the paper's for DomainNet."""

    # Fixed in the paper; for other values make a subclass.
    tau: ClassVar[float] = 0.07  # temperature of L-align
    margin: ClassVar[float] = 0.2  # of L-triplet
    queue_size: ClassVar[int] = 20  # momentum features kept per class
    momentum: ClassVar[float] = 0.999  # alpha of the momentum average
    temperature: ClassVar[float] = 0.75  # T of the target prompt generator
    patience: ClassVar[int] = 2  # epochs without a better validation score before phase 2 stops

    # ledger D
    mask: Annotated[Literal["own", "none"], "D1: rows masked in phase 2"] = "own"
    feature_token: Annotated[Literal[0, 1], "D2: pooled token: class token, or first domain prompt"] = 0
    evaluation_features: Annotated[
        Literal["normalized", "raw"], "D3, D18: features at test time"] = "normalized"
    train_normalization: Annotated[Literal["clip", "imagenet"], "D4: pixel mean and std in training"] = "clip"
    selection: Annotated[
        Literal["validation", "test", "last"],
        "D5: classes and queries that choose the best epoch; last: no choice"] = "validation"
    query_feature: Annotated[
        Literal["class", "patch"],
        "D6: the generator's query: class token, or first patch of a sequence without one"] = "class"
    ud_gallery: Annotated[
        Literal["held-back", "trained"], "D7: U^dCDR gallery: images kept from training, or trained on"
    ] = "held-back"
    triplet_distance: Annotated[Literal["squared", "plain"], "D8: squared or plain Euclidean"] = "squared"
    momentum_start: Annotated[
        Literal["online", "random"], "D9: the momentum prompts start as a copy, or at random"] = "online"
    train_classes: Annotated[
        Literal["train", "train+val"], "D10: training classes; with the validation classes as ProS"] = "train"
    queue_push: Annotated[
        Literal["after", "before"], "D12: momentum features are queued after or before the loss"] = "after"
    class_features: Annotated[
        Literal["template", "plain", "prototypes"],
        "D13: class anchors: the text template, a photo of a NAME, or means of gallery-domain images"
    ] = "template"
    balance: Annotated[
        Literal["exact", "released"], "D15: as many of each domain in every batch, or the released order"
    ] = "exact"
    prompt_length: Annotated[int, (1, 1024), "D16: p, tokens of a source prompt"] = 1
    triplet_mean: Annotated[
        Literal["batch", "paired"], "D17: L-triplet's mean over the batch, or the images that have a pair"
    ] = "batch"

    # numbers
    context_vectors: Annotated[int, (1, 1024), "m, learnable vectors of the text template"] = 16
    triplet_pairs: Annotated[int, (0, 65536), "r, pairs per image; 0 leaves L-triplet out"] = 2
    source_batch: Annotated[int, (1, inf), "batch of phase 1"] = 400
    source_epochs: Annotated[int, (0, inf), "epochs of phase 1"] = 1
    source_lr: Annotated[float, (0, inf), "Adam's learning rate in phase 1"] = 1e-4
    target_batch: Annotated[int, (1, inf), "batch of phase 2"] = 50
    target_epochs: Annotated[
        int, (0, inf), "most epochs of phase 2; 0: phase 1 alone, encoding with the banks' mean prompts"] = 10
    target_lr: Annotated[float, (0, inf), "D11: Adam's learning rate when phase 2 starts"] = 1e-4
