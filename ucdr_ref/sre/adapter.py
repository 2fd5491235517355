"""SRE-CLIP adapter (Yu et al., arXiv 2510.21808): image adapter and graph head over frozen CLIP features.

It learns from labelled source images of seen classes and unlabelled target images of seen and unseen classes.
`b` batch, `e` embedding, `h` adapter width, `c` classes, `N` graph nodes (classes first), `w` class-vector
width.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clip.model import CLIP
from . import losses
from .options import Options

EPOCH = 100  # iterations that the loop calls an epoch: after each it saves, and evaluates where S6 asks
DECAY_GAMMA, DECAY_POWER = 0.001, 0.75  # of the learning rate, as published
GRAPH_RATE = 5.0  # the graph head learns this many times faster than the adapter


class Batch(NamedTuple):
    source: Tensor  # [b, e], features of labelled images
    labels: Tensor  # [b]
    target: Tensor  # [b, e], features of unlabelled images
    iteration: int
    permutation: Tensor | None = None  # [c], of the structure loss; drawn when None


class ImageAdapter(nn.Module):
    """f = softmax(q k^T / sqrt(h)) v + v, with q, k, v = Linear(e -> h) and attention across the batch."""

    def __init__(self, e: int, h: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(e, h) for _ in range(3))

    def forward(self, x: Tensor, alone: bool = False) -> Tensor:
        """x [b, e] -> f [b, h]. `alone`: every image attends to itself only, which leaves v + v."""
        v = self.value(x)
        if alone:
            return v + v
        scores = self.query(x) @ self.key(x).T / math.sqrt(v.shape[1])
        return scores.softmax(dim=1) @ v + v


class GCN(nn.Module):
    """H = LeakyReLU_0.2(A (drop(X) W1) + b1); G = A (drop(H) W2) + b2; H is as wide as G."""

    def __init__(self, w: int, h: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.w1, self.b1 = nn.Parameter(torch.empty(w, h)), nn.Parameter(torch.zeros(h))
        self.w2, self.b2 = nn.Parameter(torch.empty(h, h)), nn.Parameter(torch.zeros(h))
        for weight in (self.w1, self.w2):
            nn.init.xavier_uniform_(weight)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """class vectors [N, w], adjacency [N, N] (rows sum to one, sparse or dense) -> G [N, h]"""
        x = adjacency @ (self.dropped(x) @ self.w1) + self.b1
        x = F.leaky_relu(x, 0.2)
        return adjacency @ (self.dropped(x) @ self.w2) + self.b2

    def dropped(self, x: Tensor) -> Tensor:
        """F.dropout, drawn on the CPU: the same on every device."""
        if not self.training:
            return x
        return x * F.dropout(torch.ones(x.shape), self.dropout, True).to(x.device)


class TargetBank(nn.Module):
    """The last `size` target features: appended while there is room, then overwritten in a ring.

    ring "exact": right for any batch. "released" (S7): whole batches of at most `batch`, so it may outgrow
    `size`; the pointer goes back to 0 when another batch like this one would pass `size`, so the rows behind
    it go stale.
    """

    store: Tensor  # [capacity, h]
    count: Tensor  # [], rows in use
    pointer: Tensor  # [], the next row to overwrite

    def __init__(self, size: int, h: int, ring: str = "exact", batch: int = 256) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"the target bank has {size} rows; it needs at least 1")
        self.size, self.ring = size, ring
        self.register_buffer("store", torch.zeros(size if ring == "exact" else size + batch - 1, h))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    @property
    def rows(self) -> Tensor:
        """[at most size, h]; in the released ring up to size + b - 1"""
        return self.store[: int(self.count)]

    @property
    def full(self) -> bool:
        return int(self.count) >= self.size

    @torch.no_grad()
    def push(self, x: Tensor) -> None:
        """x [b, h], detached here."""
        size, was_full, x = self.size, self.full, x.to(self.store.dtype)
        start = int(self.pointer if was_full else self.count)
        end = start + len(x)
        if self.ring == "released":  # S7
            assert end <= len(self.store), f"{len(x)} rows at {start} of a bank of {len(self.store)}"
            self.store[start:end] = x
            if was_full:
                self.pointer.fill_(0 if end + len(x) > size else end)
            else:
                self.count.fill_(end)
        else:
            # Only the last `size` rows: of two writes to one row, a GPU leaves open which wins.
            index = torch.arange(start, end, device=x.device)[-size:] % size
            self.store[index] = x[-size:]
            self.count.fill_(size if was_full else min(size, end))
            self.pointer.fill_(end % size if self.full else 0)


class SRECLIP(nn.Module):
    """Frozen CLIP features -> adapter; class graph -> graph head; cosine / temperature between the two.

    class_names [c]; class_vectors X [N, w], rows L2-normalised; adjacency [N, N], `normalised_adjacency`'s;
    unseen_ids: indices of the classes without labelled images. `clip` is frozen here.
    Raises ValueError when there is no unseen class, or when names, vectors and graph do not belong together.
    """

    PHASES: tuple[str, ...] = ("sre",)

    class_vectors: Tensor  # [N, w]
    adjacency: Tensor  # [N, N]
    unseen_ids: Tensor  # [u]

    def __init__(self, clip: CLIP, class_names: Sequence[str], class_vectors: Tensor, adjacency: Tensor,
                 unseen_ids: Sequence[int] | Tensor, config: Options) -> None:
        super().__init__()
        unseen = torch.as_tensor(unseen_ids, dtype=torch.long)
        check_unseen(unseen, class_names)
        c, nodes, vectors = len(class_names), len(adjacency), len(class_vectors)
        if vectors != nodes or c > nodes:
            raise ValueError(f"{c} classes, {vectors} class vectors, {nodes} graph nodes: there must be one "
                             "vector per node, and the classes come first")
        self.clip, self.config, self.class_names = clip.requires_grad_(False), config, list(class_names)
        h = config.sre_hidden
        self.adapter = ImageAdapter(clip.embed_dim, h)
        self.gcn = GCN(class_vectors.shape[1], h, config.sre_dropout)
        self.bank = TargetBank(config.sre_bank, h, config.bank_ring, config.sre_batch)
        self.register_buffer("class_vectors", class_vectors.float().clone())  # a checkpoint overwrites it
        self.register_buffer("adjacency", adjacency, persistent=False)
        self.register_buffer("unseen_ids", unseen, persistent=False)

    def trainable(self, phase: str) -> dict[str, nn.Parameter]:
        """The parameters that the one phase trains, by name."""
        trained = ("adapter.", "gcn.")
        return {name: value for name, value in self.named_parameters() if name.startswith(trained)}

    def start(self, phase: str) -> None:
        """Nothing to prepare; dropout is on in training."""
        self.train()

    def optimizer(self, phase: str) -> torch.optim.SGD:
        """SGD with Nesterov momentum 0.9 and weight decay 1e-4; two groups, adapter and graph head."""
        groups = [{"params": list(self.adapter.parameters()), "factor": 1.0},
                  {"params": list(self.gcn.parameters()), "factor": GRAPH_RATE}]
        return torch.optim.SGD(groups, lr=self.config.sre_lr, momentum=0.9, weight_decay=1e-4, nesterov=True)

    def learning_rate(self, phase: str, epoch: int, step: int) -> float:
        """The adapter's, at iteration i: eta (1 + gamma max(0, i - warm-up))^-power."""
        i = epoch * EPOCH + step
        return self.config.sre_lr * (1 + DECAY_GAMMA * max(0, i - self.config.sre_warmup)) ** -DECAY_POWER

    def class_embeddings(self) -> Tensor:
        """E [c, h]: L2-normalised first c rows of the graph head's output."""
        return F.normalize(self.gcn(self.class_vectors, self.adjacency)[: len(self.class_names)], dim=1)

    def scaled(self, features: Tensor) -> Tensor:
        """features [b, e] -> f / |f| / temperature [b, h]"""
        return F.normalize(self.adapter(features), dim=1) / self.config.sre_temperature

    def step(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        """Loss terms of one iteration; `loss` is the one to minimise.

        L_s during the warm-up (the target images enter the bank all the same), then L_t + 1.5 L_s; L_t weighs
        `sre_target`, 0 in the ablation without target losses.
        """
        # Each of the two runs the graph head, so their dropout masks differ.
        config, source, target = self.config, self.source_step(batch), self.target_step(batch.target)
        loss = source["source"]
        if batch.iteration >= config.sre_warmup:
            loss = config.sre_target * target["target"] + config.sre_source * loss
        return {"loss": loss, **source, **target}

    def source_step(self, batch: Batch) -> dict[str, Tensor]:
        """L_s = CE(P, y) + 100 L-structure + 0.01 L-retain"""
        config, e = self.config, self.class_embeddings()
        logits = self.scaled(batch.source) @ e.T
        ce = F.cross_entropy(logits, batch.labels)
        similarity = logits * config.sre_temperature if config.retention_scale == "cosine" else logits  # S3
        retention = losses.alignment_retention(similarity, e)
        structure = self.structure(e, batch.permutation)
        total = ce + config.sre_structure * structure + config.sre_retention * retention
        return {"source": total, "ce": ce, "structure": structure, "retention": retention}

    def structure(self, e: Tensor, permutation: Tensor | None) -> Tensor:
        """L-structure of E [c, h] under a permutation of the classes in it (drawn when None)."""
        if self.config.structure_pairs == "diagonal":  # S1: the released index has no gradient
            return e.new_zeros(())
        c = min(self.config.structure_classes or len(e), len(e))  # S8
        if permutation is None:
            permutation = torch.randperm(c).to(e.device)  # drawn on the CPU: the same pairs on every device
        return losses.relation_structure(self.class_vectors[:c], e[:c], permutation)

    def target_step(self, features: Tensor) -> dict[str, Tensor]:
        """L_t = 3 L-ent + 5 L-div + 5 L-bias of features [b, e], the last two for a full bank; fills it."""
        config, e = self.config, self.class_embeddings()
        x = self.scaled(features)
        entropy = losses.entropy(x @ e.detach().T)
        diversity = bias = e.new_zeros(())
        was_full = self.bank.full
        self.bank.push(x)
        if was_full:
            diversity = losses.bank_diversity(self.bank.rows @ e.T)
            bias = losses.seen_bias(x @ e.T, self.unseen_ids, config.sre_kappa)  # S5
        total = config.sre_entropy * entropy + config.sre_diversity * diversity + config.sre_bias * bias
        return {"target": total, "entropy": entropy, "diversity": diversity, "bias": bias}

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Test-time class logits [b, c], cosine / temperature, of CLIP features [b, e], not normalised.

        Call `eval()` first: in training mode the graph head drops out.
        """
        return self.encode_features(features) @ self.class_embeddings().T / self.config.sre_temperature

    @torch.no_grad()
    def encode_features(self, features: Tensor) -> Tensor:
        """CLIP features [b, e], not normalised -> adapted features [b, h], L2-normalised."""
        return F.normalize(self.adapter(features, alone=self.config.test_attention == "alone"), dim=1)  # S2

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images [b, 3, H, W], preprocessed -> adapted features [b, h], L2-normalised."""
        return self.encode_features(self.clip.encode_image(images).float())


def check_unseen(unseen: Tensor, class_names: Sequence[str]) -> None:
    """ValueError unless there are an unseen and a seen class, and every index is a class."""
    c = len(class_names)
    if len(unseen) == 0:
        raise ValueError("no class is unseen; name at least one that has no labelled image")
    if len(set(unseen.tolist()) & set(range(c))) != len(unseen):
        raise ValueError(f"unseen class indices {unseen.tolist()}: expected different numbers, 0 to {c - 1}")
    if len(unseen) == c:
        raise ValueError(f"all {c} classes are unseen; at least one needs labelled images")
