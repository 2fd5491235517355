"""Options that every run has, whatever its method: what to run, on which images, on which machine.

In the three option classes of this package a field's type holds its choices (`Literal`), and `Annotated` adds
the range that a number `x` must lie in, or the name of what a text stands for, and what `--help` prints.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal


@dataclass(frozen=True)
class Shared:
    """The run, its images and its machine."""

    method: Annotated[
        Literal["ucdr-adapter", "zero-shot", "sre-clip", "closed-form"], "what to train"] = "ucdr-adapter"
    dataset: Annotated[
        Literal["toy", "domainnet", "sketchy", "tuberlin", "folder"], "benchmark protocol"] = "toy"
    data_root: Annotated[
        str, "DIR", "<domain>/<class>/* lie here; the drawn data is made there when absent"] = "data/toy"
    weights: Annotated[
        str, "FILE", "CLIP weights: OpenAI's archive, a state dict or safetensors"] = "weights/demo-clip.pt"
    heads: Annotated[
        int, "0 <= x", "attention heads of both towers; 0: width / 64, as in every released CLIP"] = 0
    variant: Annotated[Literal["paper", "released"], "preset of the ledgers D and S"] = "paper"
    seed: Annotated[int, "0 <= x", "seed of initial values, order and augmentation"] = 0

    # protocol
    held_out: Annotated[
        str, "DOMAIN", "query domain that training never sees; none: U^cCDR, from a seen one"] = "sketch"
    seen: Annotated[
        str, "DOMAIN", "source domain of the validation and U^cCDR queries; empty: the protocol's"] = ""
    gallery: Annotated[str, "DOMAIN", "gallery domain; empty: the protocol's"] = ""
    domains: Annotated[
        tuple[str, ...], "DOMAIN", "folder datasets: domain folders to use, gallery and held-out one "
        "included (the smallest decides how long an epoch is); empty: all"] = ()
    class_split: Annotated[
        str, "FILE", "folder datasets: JSON with train, val and test class names; empty: drawn"] = ""
    file_lists: Annotated[
        str, "DIR", "DomainNet: folder of <domain>_{train,test}.txt; only images that these name are used "
        "(the cleaned set); empty: all"] = ""
    split_seed: Annotated[int, "0 <= x", "seed of the data's split: classes, held-back images, samples"] = 0
    sketchy_split: Annotated[
        Literal["eccv", "random"], "Sketchy's test classes: 21 (ECCV 2018) or 25 (random)"] = "eccv"
    holdback: Annotated[
        float, "0 <= x < 1", "share of each gallery-domain training class, at least one image, kept for the "
        "mixed gallery and never trained on"] = 0.08
    stroke_domains: Annotated[
        tuple[str, ...], "DOMAIN", "domains of dark strokes on white, colour-inverted everywhere (D14)"] = (
        "sketch", "quickdraw", "sketches")
    image_reading: Annotated[
        Literal["upright", "as-is"], "D19: images turned as EXIF says and composited over white, or opened "
        "as they are"] = "upright"
    bad_images: Annotated[
        Literal["error", "skip"], "unreadable images: stop at the first, or count and go on"] = "error"
    toy_images: Annotated[int, "1 <= x <= 10000", "images drawn per domain and class for --dataset toy"] = 20
    per_class: Annotated[int, "0 <= x", "use at most this many images per domain and class; 0: all"] = 0

    # machine: none of these changes what is computed beyond rounding
    device: Annotated[str, "DEVICE", "cpu, cuda, cuda:1, ...; auto: a GPU when there is one"] = "auto"
    workers: Annotated[int, "0 <= x <= 256", "processes that read images; 0: the main process does"] = 2
    precision: Annotated[
        Literal["fp32", "tf32", "bf16"],
        "arithmetic of the towers; LayerNorm and, but for tf32, losses: float32"] = "fp32"
    compile: Annotated[
        Literal[0, 1], "1: compile the vision blocks (torch.compile), which takes a while at the start"] = 0
    micro_batch: Annotated[
        int, "0 <= x", "images of a phase-2 batch at once, to save memory; 0: 10 on a CPU, all on a GPU"] = 0
    save_every: Annotated[int, "1 <= x", "steps between checkpoints; each epoch ends with one too"] = 50
    eval_batch: Annotated[int, "1 <= x <= 65536", "images per batch when features are extracted"] = 128


# May differ when a run is resumed: they change nothing that is computed beyond rounding.
MACHINE = ("device", "workers", "precision", "compile", "micro_batch", "save_every", "eval_batch")
