"""Options of SRE-CLIP: the ledger S (paper or a careful reading first, released code second), numbers."""
from dataclasses import dataclass
from math import inf
from typing import Annotated, ClassVar, Literal


@dataclass(frozen=True)
class Options:
    """SRE-CLIP."""

    source: Annotated[tuple[str, ...], "labelled source folders <folder>/<class>/*"] = ()
    target: Annotated[
        str, "unlabelled target folder; evaluation reads its class folders <folder>/<class>/*"] = ""
    graph: Annotated[str, "class graph: awa2, toy or a file of `python -m ucdr_ref.sre.wordnet`"] = ""
    unseen: Annotated[str, "unseen class names, one a line; empty: the shipped graph's own"] = ""

    # ledger S
    structure_pairs: Annotated[
        Literal["pairs", "diagonal"], "S1: L-structure over pairs, or the diagonal (no gradient)"] = "pairs"
    test_attention: Annotated[Literal["alone", "batch"], "S2: attention at test time"] = "alone"
    retention_scale: Annotated[Literal["cosine", "scaled"], "S3: scale of P in L-retain"] = "cosine"
    class_vectors: Annotated[
        str,
        "S4: node vectors: clip (text features), clip-classes (ancestors: means of the classes), or a file "
        "`word v1 v2 ...`"] = "clip"
    sre_kappa: Annotated[float, (0, 1), "S5: kappa of L-bias"] = 0.3
    sre_report: Annotated[
        Literal["last", "best-test"],
        "S6: the last iteration, or each metric's maximum over evaluations on test images"] = "last"
    bank_ring: Annotated[Literal["exact", "released"], "S7: ring of the target bank"] = "exact"
    structure_classes: Annotated[
        int, (0, inf), "S8: classes in the structure loss; 0: all, the released code takes the first 100"] = 0

    # numbers
    sre_iterations: Annotated[int, (1, inf), "iterations"] = 3000
    sre_hidden: Annotated[int, (1, inf), "h, width of adapter and graph head"] = 1024
    sre_structure: Annotated[float, (0, inf), "weight of L-structure"] = 100.0
    sre_retention: Annotated[float, (0, inf), "weight of L-retain"] = 0.01
    sre_entropy: Annotated[float, (0, inf), "weight of L-ent"] = 3.0
    sre_diversity: Annotated[float, (0, inf), "weight of L-div"] = 5.0
    sre_bias: Annotated[float, (0, inf), "weight of L-bias"] = 5.0
    sre_warmup: Annotated[int, (0, inf), "iterations of the source loss alone"] = 600
    sre_dropout: Annotated[float, (0, 0.99), "dropout in the graph head"] = 0.5
    sre_lr: Annotated[float, (0, inf), "learning rate of the adapter; of the graph head, times five"] = 1e-3

    # fixed, as published
    sre_batch: ClassVar[int] = 256  # source and target batch
    sre_bank: ClassVar[int] = 768  # rows of the target bank
    sre_temperature: ClassVar[float] = 0.05  # of the logits
    sre_source: ClassVar[float] = 1.5  # weight of the source loss after the warm-up
