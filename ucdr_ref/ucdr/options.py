"""Options of UCDR-Adapter: the ledger D (paper or a careful reading first, released code second), numbers."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal


@dataclass(frozen=True)
class Options:
    """UCDR-Adapter. Defaults are the paper's for DomainNet."""

    # ledger D
    mask: Annotated[Literal["own", "none"], "D1: rows masked in phase 2"] = "own"
    feature_token: Annotated[
        Literal[0, 1], "D2: token that is pooled; 0 the class token, 1 the first domain prompt"] = 0
    evaluation_features: Annotated[
        Literal["normalized", "raw"], "D3, D18: features at test time"] = "normalized"
    train_normalization: Annotated[Literal["clip", "imagenet"], "D4: pixel mean and std in training"] = "clip"
    selection: Annotated[
        Literal["validation", "test", "test-ud", "last"],
        "D5: classes and queries that choose the best epoch; test, test-ud: those of UCDR, of U^dCDR; "
        "last: no choice"] = "validation"
    query_feature: Annotated[
        Literal["class", "patch"],
        "D6: the generator's query: class token, or first patch of a sequence without one"] = "class"
    ud_gallery: Annotated[
        Literal["held-back", "trained"],
        "D7: U^dCDR gallery: images kept from training, or a draw of those trained on"] = "held-back"
    triplet_distance: Annotated[Literal["squared", "plain"], "D8: squared or plain Euclidean"] = "squared"
    triplet_mean: Annotated[
        Literal["batch", "paired"],
        "D17: L-triplet's mean over the batch, or over the images that have a pair"] = "batch"
    momentum_start: Annotated[
        Literal["online", "random"], "D9: the momentum prompts start as a copy, or at random"] = "online"
    train_classes: Annotated[
        Literal["train", "train+val"],
        "D10: training classes, with the validation classes (as ProS) or without"] = "train"
    queue_push: Annotated[
        Literal["after", "before"],
        "D12: momentum features enter the queues after or before the loss"] = "after"
    class_features: Annotated[
        str, "KIND",
        "D13: class anchors: template, plain (a photo of a NAME), prototypes, or a .npy file [c, e] in class "
        "order"] = "template"
    balance: Annotated[
        Literal["exact", "released"],
        "D15: every batch holds the same number per domain, or the released grouping"] = "exact"

    # baseline
    closed_form: Annotated[
        Literal[0, 1], "1: a closed form of the trained adapter's own features as well, an own row"] = 0
    whitening: Annotated[
        float, "0 <= x",
        "lambda of the closed form; 0: the best of 0.3, 1, 3, 10 on validation classes (3 where there are "
        "none)"] = 0.0

    # numbers
    prompt_length: Annotated[int, "1 <= x <= 1024", "p, tokens of a source prompt (D16)"] = 1
    context_vectors: Annotated[int, "1 <= x <= 1024", "m, learnable vectors of the text template"] = 16
    tau: Annotated[float, "0 < x", "temperature of L-align"] = 0.07
    margin: Annotated[float, "0 <= x", "margin of L-triplet"] = 0.2
    triplet_pairs: Annotated[int, "0 <= x <= 65536", "r, pairs per image; 0 leaves L-triplet out"] = 2
    queue_size: Annotated[int, "1 <= x <= 65536", "momentum features kept per class"] = 20
    momentum: Annotated[float, "0 <= x <= 1", "alpha of the momentum average"] = 0.999
    temperature: Annotated[float, "0 < x", "T of the target prompt generator"] = 0.75
    source_batch: Annotated[int, "1 <= x", "batch of phase 1"] = 400
    source_epochs: Annotated[int, "0 <= x", "epochs of phase 1"] = 1
    source_lr: Annotated[float, "0 <= x", "Adam's learning rate in phase 1"] = 1e-4
    target_batch: Annotated[int, "1 <= x", "batch of phase 2"] = 50
    target_epochs: Annotated[
        int, "0 <= x",
        "most epochs of phase 2; 0: phase 1 alone, encoding with the banks' mean prompts"] = 10
    target_lr: Annotated[
        float, "0 <= x", "Adam's learning rate at the start of phase 2 (schedule: D11)"] = 1e-4
    patience: Annotated[int, "1 <= x", "epochs without a better validation mAP before phase 2 stops"] = 2
