"""SRE-CLIP: image adapter and graph head over frozen CLIP features."""
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clip.model import CLIP
from . import losses
from .options import Options

EPOCH = 100  # iterations that the training loop calls an epoch


class Batch(NamedTuple):
    source: Tensor  # [b, e], labelled
    labels: Tensor  # [b]
    target: Tensor  # [b, e], unlabelled
    iteration: int


class ImageAdapter(nn.Module):
    """f = softmax(q k^T / sqrt(h)) v + v, with q, k, v = Linear(e -> h) and attention across the batch."""

    def __init__(self, e: int, h: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(e, h) for _ in range(3))

    def forward(self, x: Tensor, self_only: bool = False) -> Tensor:
        """x [b, e] -> f [b, h]; self_only: every image attends to itself alone"""
        v = self.value(x)
        if self_only:
            return v + v
        scores = self.query(x) @ self.key(x).T / math.sqrt(v.shape[1])
        return scores.softmax(dim=1) @ v + v


class GCN(nn.Module):
    """H = LeakyReLU_0.2(Â (drop(X) W1) + b1), G = Â (drop(H) W2) + b2"""

    def __init__(self, w: int, h: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.w1, self.b1 = nn.Parameter(torch.empty(w, h)), nn.Parameter(torch.zeros(h))
        self.w2, self.b2 = nn.Parameter(torch.empty(h, h)), nn.Parameter(torch.zeros(h))
        nn.init.xavier_uniform_(self.w1)
        nn.init.xavier_uniform_(self.w2)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """class vectors X [N, w], adjacency Â [N, N] -> G [N, h]"""
        hidden = F.leaky_relu(adjacency @ (self.drop(x) @ self.w1) + self.b1, 0.2)
        return adjacency @ (self.drop(hidden) @ self.w2) + self.b2

    def drop(self, x: Tensor) -> Tensor:
        """F.dropout, drawn on the CPU: the same on every device."""
        return x * F.dropout(torch.ones(x.shape), self.dropout, self.training).to(x.device)


class TargetBank(nn.Module):
    """The last `size` target features, in a ring.

    ring "released" (S7): only whole batches, of at most `batch` rows. The first round may end beyond `size`;
    later the pointer returns to 0 where a batch would, and the rows behind it go stale.
    """

    store: Tensor  # [capacity, h]
    count: Tensor  # [], rows in use
    pointer: Tensor  # [], the next row to overwrite

    def __init__(self, size: int, h: int, ring: str = "exact", batch: int = 256) -> None:
        super().__init__()
        self.size, self.ring = size, ring
        capacity = size if ring == "exact" else size + batch - 1  # S7
        self.register_buffer("store", torch.zeros(capacity, h))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("pointer", torch.tensor(0))

    @property
    def rows(self) -> Tensor:
        return self.store[:int(self.count)]

    @property
    def full(self) -> bool:
        return int(self.count) >= self.size

    @torch.no_grad()
    def push(self, x: Tensor) -> None:
        """x [b, h]"""
        size, start = self.size, int(self.pointer)
        end = start + len(x)
        if self.ring == "exact":
            # Only the last `size` rows: of two writes to one row, a GPU leaves open which wins.
            index = torch.arange(start, end, device=x.device)[-size:] % size
            self.store[index] = x[-size:].to(self.store.dtype)
            pointer = end % size
        else:  # S7
            self.store[start:end] = x
            latest = size - len(x) if self.full else size - 1  # where the next batch may start
            pointer = end if end <= latest else 0
        self.count.fill_(max(int(self.count), min(end, len(self.store))))
        self.pointer.fill_(pointer)


class SRECLIP(nn.Module):
    """Frozen CLIP features x -> adapter -> x^; class graph -> graph head -> E; logits P = x^ E^T.

    class_names [c]; class_vectors X [N, w], classes first, rows L2-normalised; adjacency Â [N, N];
    unseen_ids: classes without labelled images. Raises ValueError unless some are unseen, and not all.
    """

    PHASES: tuple[str, ...] = ("sre",)

    class_vectors: Tensor  # [N, w]
    adjacency: Tensor  # [N, N]
    unseen_ids: Tensor  # [u]

    def __init__(self, clip: CLIP, class_names: Sequence[str], class_vectors: Tensor, adjacency: Tensor,
                 unseen_ids: Sequence[int] | Tensor, options: Options) -> None:
        super().__init__()
        self.clip, self.options, self.class_names = clip.requires_grad_(False), options, list(class_names)
        c, unseen = len(class_names), torch.as_tensor(unseen_ids, dtype=torch.long)
        if not (0 < len(unseen) < c and 0 <= unseen.min() <= unseen.max() < c):
            raise ValueError(f"unseen_ids: expected indices of one or more of the {c} classes, not of all")
        h = options.sre_hidden
        self.adapter = ImageAdapter(clip.embed_dim, h)
        self.gcn = GCN(class_vectors.shape[1], h, options.sre_dropout)
        self.bank = TargetBank(options.sre_bank, h, options.bank_ring, options.sre_batch)
        self.register_buffer("class_vectors", class_vectors.float().clone())  # a checkpoint overwrites it
        self.register_buffer("adjacency", adjacency, persistent=False)
        self.register_buffer("unseen_ids", unseen, persistent=False)

    def trainable(self, phase: str) -> dict[str, nn.Parameter]:
        """Parameters by name: all but CLIP's"""
        return {name: value for name, value in self.named_parameters() if not name.startswith("clip.")}

    def start(self, phase: str) -> None:
        self.train()  # dropout

    def optimizer(self, phase: str) -> torch.optim.SGD:
        """A group's rate is `learning_rate` times its `factor`."""
        groups = [{"params": list(self.adapter.parameters()), "factor": 1.0},
                  {"params": list(self.gcn.parameters()), "factor": 5.0}]
        return torch.optim.SGD(groups, lr=self.options.sre_lr, momentum=0.9, weight_decay=1e-4, nesterov=True)

    def learning_rate(self, phase: str, epoch: int, step: int) -> float:
        """At iteration i: eta (1 + 0.001 max(0, i - warm-up))^-0.75."""
        after_warmup = max(0, epoch * EPOCH + step - self.options.sre_warmup)
        return self.options.sre_lr * (1 + 0.001 * after_warmup) ** -0.75

    def class_embeddings(self) -> Tensor:
        """E [c, h]: first c rows of G, L2-normalised"""
        return F.normalize(self.gcn(self.class_vectors, self.adjacency)[:len(self.class_names)], dim=1)

    def scaled(self, features: Tensor) -> Tensor:
        """x [b, e] -> x^ = f / |f| / temperature [b, h]"""
        return F.normalize(self.adapter(features), dim=1) / self.options.sre_temperature

    def step(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        """Loss terms, `loss` to minimise: L_s in the warm-up, then L_t + 1.5 L_s."""
        source, target = self.source_step(batch), self.target_step(batch.target)
        loss = source["source"]
        if batch.iteration >= self.options.sre_warmup:
            loss = target["target"] + self.options.sre_source * loss
        return {"loss": loss, **source, **target}

    def source_step(self, batch: Batch) -> dict[str, Tensor]:
        """L_s = CE(P, y) + 100 L-structure + 0.01 L-retain"""
        options, e = self.options, self.class_embeddings()
        logits = self.scaled(batch.source) @ e.T
        ce = F.cross_entropy(logits, batch.labels)
        similarity = logits * options.sre_temperature if options.retention_scale == "cosine" else logits  # S3
        retention = losses.alignment_retention(similarity, e)
        structure = e.new_zeros(())
        if options.structure_pairs == "pairs":  # S1: the released index has no gradient
            c = min(options.structure_classes or len(e), len(e))  # S8
            permutation = torch.randperm(c).to(e.device)  # drawn on the CPU: the same on every device
            structure = losses.relation_structure(self.class_vectors[:c], e[:c], permutation)
        total = ce + options.sre_structure * structure + options.sre_retention * retention
        return {"source": total, "ce": ce, "structure": structure, "retention": retention}

    def target_step(self, features: Tensor) -> dict[str, Tensor]:
        """L_t = 3 L-ent + 5 L-div + 5 L-bias of features [b, e], the last two once the bank is full."""
        options, e = self.options, self.class_embeddings()  # under another dropout mask than the source's
        x = self.scaled(features)
        entropy = losses.entropy(x @ e.detach().T)
        diversity = bias = e.new_zeros(())
        was_full = self.bank.full
        self.bank.push(x)  # in the warm-up too
        if was_full:
            diversity = losses.bank_diversity(self.bank.rows @ e.T)
            bias = losses.seen_bias(x @ e.T, self.unseen_ids, options.sre_kappa)  # S5
        total = options.sre_entropy * entropy + options.sre_diversity * diversity + options.sre_bias * bias
        return {"target": total, "entropy": entropy, "diversity": diversity, "bias": bias}

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """CLIP features [b, e] -> class logits P [b, c], after `eval()` (dropout)"""
        return self.encode_features(features) @ self.class_embeddings().T / self.options.sre_temperature

    @torch.no_grad()
    def encode_features(self, features: Tensor) -> Tensor:
        """CLIP features [b, e], not normalised -> adapted ones [b, h], L2-normalised"""
        return F.normalize(self.adapter(features, self.options.test_attention == "alone"), dim=1)  # S2

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images [b, 3, H, W] -> the same"""
        return self.encode_features(self.clip.encode_image(images).float())


def test_batches(labels: Tensor, unseen: Sequence[int], released: bool, size: int) -> Sequence[Tensor]:
    """Rows that pass at once: `size` in order, or released: 512 in order of class, unseen classes first"""
    if not released:
        return torch.arange(len(labels)).split(size)
    by_class = labels.argsort(stable=True)  # S2
    of_unseen = torch.isin(labels[by_class], torch.tensor(unseen))
    return by_class[of_unseen].split(512) + by_class[~of_unseen].split(512)
