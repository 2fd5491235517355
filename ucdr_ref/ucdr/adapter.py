"""UCDR-Adapter (Jiang et al., WACV 2025): source adapter learning, target prompt generation, encoding."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clip.model import CLIP
from ..clip.zero_shot import check_names, class_text_features
from . import losses
from .options import Options
from .prompts import TargetPromptGenerator, TextTemplate, prompt_bank


class Batch(NamedTuple):
    images: Tensor  # [b, 3, H, W], preprocessed
    class_ids: Tensor  # [b]
    domain_ids: Tensor  # [b]


class ClassQueues(nn.Module):
    """First-in-first-out queues of momentum features, one per class (M), as one ring tensor: no loop."""

    rows: Tensor  # [c + 1, size, e]; the last row takes what a push need not keep, and is never read
    pushed: Tensor  # [c], features ever pushed

    def __init__(self, c: int, size: int, e: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(c + 1, size, e))
        self.register_buffer("pushed", torch.zeros(c, dtype=torch.long))

    @property
    def counts(self) -> Tensor:
        """Features now in each queue [c]."""
        return self.pushed.clamp(max=self.rows.shape[1])

    def push(self, features: Tensor, class_ids: Tensor) -> None:
        """features [b, e] enter their classes' queues in batch order; the oldest leave."""
        size = self.rows.shape[1]
        same = class_ids[:, None] == class_ids
        earlier, later = same.tril(-1).sum(1), same.triu(1).sum(1)
        # `size` later images of this very batch would push it out
        target = torch.where(later < size, class_ids, len(self.pushed))
        self.rows[target, (self.pushed[class_ids] + earlier) % size] = features.to(self.rows.dtype)
        self.pushed.index_add_(0, class_ids, torch.ones_like(class_ids))

    def take(self, class_ids: Tensor, index: Tensor) -> Tensor:
        """Row `index` (oldest first) of the queue of `class_ids`, broadcast against each other: [..., e]."""
        oldest = (self.pushed - self.counts)[class_ids]
        return self.rows[class_ids, (oldest + index) % self.rows.shape[1]]

    def pairs(self, class_ids: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """I_p, I_n [b, r, e] for indices [b, r] into the own queue, oldest first, and into all others."""
        counts, own = self.counts, class_ids[:, None]
        ends = counts.cumsum(0)
        starts = ends - counts
        index = negative + torch.where(negative >= starts[own], counts[own], 0)  # skips the own queue
        other = torch.searchsorted(ends, index, right=True).clamp(max=len(ends) - 1)
        return self.take(own, positive), self.take(other, index - starts[other])

    def draw(self, class_ids: Tensor, r: int,
             place: tuple[int, int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """r uniform positives and negatives per image: I_p, I_n [b, r, e], and which images have both [b].

        place: where these images stand in a batch of several processes: number of the first, count of all.
        """
        own = self.counts[class_ids][:, None]
        others = self.counts.sum() - own
        # Drawn on the CPU, for the whole batch: the same pairs on every device and any number of processes.
        start, total = place or (0, len(class_ids))
        u = torch.rand(2, total, r, dtype=torch.float64)[:, start:start + len(class_ids)]
        u = u.to(own.device, non_blocking=True)
        positive, negative = (u[0] * own).long(), (u[1] * others).long()
        valid = ((own > 0) & (others > 0)).squeeze(1)
        return *self.pairs(class_ids, positive, negative), valid


def all_rows(rows: Tensor) -> Tensor:
    return rows


def all_places(count: int) -> tuple[int, int]:
    return 0, count


class UCDRAdapter(nn.Module):
    """CLIP with source prompts, text template and target prompt generator.

    clip: both towers, frozen here. class_names [c], domain_names [s]: of the training images.
    class_features [c, e]: fixed anchors in place of the text template (D13). join and place: for a batch that
    several processes share, the rows [b, ...] of all of them, and where this one's `count` rows stand:
    (first, count of all). Raises ValueError when a class name is too long, when text is needed and the
    weights have no text tower, and for `config.class_features` of another kind without `class_features`.
    """

    PHASES: tuple[str, ...] = ("source", "target")
    TRAINED = {"source": ("template.ctx", "domain_prompts", "class_prompts"),
               "target": ("generator.", "class_token", "proj")}

    anchors: Tensor  # [c, e]
    momentum_domain_prompts: Tensor  # [s, p, d]
    momentum_class_prompts: Tensor  # [c, p, d]

    def __init__(self, clip: CLIP, class_names: Sequence[str], domain_names: Sequence[str], config: Options,
                 class_features: Tensor | None = None, join: Callable[[Tensor], Tensor] = all_rows,
                 place: Callable[[int], tuple[int, int]] = all_places) -> None:
        super().__init__()
        check_names(class_names)
        check_names(domain_names)
        self.join, self.place = join, place
        self.clip, self.config = clip.requires_grad_(False), config
        c, s, d, p = len(class_names), len(domain_names), clip.vision_width, config.prompt_length
        self.domain_prompts = prompt_bank(s, p, clip.patch, d)  # U
        self.class_prompts = prompt_bank(c, p, clip.patch, d)  # V
        self.generator = TargetPromptGenerator(d, config.temperature)
        self.class_token = nn.Parameter(clip.visual.class_embedding.detach().clone())
        self.proj = nn.Parameter(clip.visual.proj.detach().clone())

        self.template: TextTemplate | None = None
        self.started = False  # phase 2, which computes the anchors of a template
        if class_features is not None:
            anchors = unit(class_features)  # D13
        elif config.class_features == "template":
            self.template = TextTemplate(clip, class_names, config.context_vectors)
            anchors = torch.zeros(c, clip.embed_dim)
        elif config.class_features == "plain":
            anchors = class_text_features(clip, class_names)  # D13
        else:
            raise ValueError(f"class_features {config.class_features!r}: expected template or plain, or the "
                             "features themselves as the argument class_features")
        self.register_buffer("anchors", anchors)

        same = config.momentum_start == "online"  # D9
        for name, online in (("domain_prompts", self.domain_prompts), ("class_prompts", self.class_prompts)):
            start = online if same else prompt_bank(len(online), p, clip.patch, d)
            self.register_buffer(f"momentum_{name}", start.detach().clone())
        self.queues = ClassQueues(c, config.queue_size, clip.embed_dim)

    def text_features(self) -> Tensor:
        """Class anchors t_c [c, e], L2-normalised: the text template's, or fixed ones (D13)."""
        return self.anchors if self.template is None else self.template(self.clip)

    def source_features(self, patches: Tensor, class_ids: Tensor, domain_ids: Tensor) -> Tensor:
        """Source encoding (E) with the true domain and class: patches [b, n, d], ids [b] -> unit f [b, e]."""
        domain_prompts, class_prompts = self.domain_prompts[domain_ids], self.class_prompts[class_ids]
        return unit(self.encode_tokens(patches, domain_prompts, class_prompts))

    def encode_tokens(self, patches: Tensor, domain_prompts: Tensor, class_prompts: Tensor) -> Tensor:
        """[class token + pos_0 ; domain prompts ; class prompts ; patches] -> blocks -> token k -> ln_post
        -> proj: [b, e].
        """
        visual = self.clip.visual
        tokens = [visual.class_token(len(patches), self.class_token), domain_prompts, class_prompts, patches]
        x = torch.cat([token.to(patches.dtype) for token in tokens], dim=1)
        return visual.pool(visual.blocks(x, at=self.config.feature_token), self.proj)  # D2

    @torch.no_grad()
    def query_feature(self, patches: Tensor) -> Tensor:
        """I_g [b, d]: the frozen tower's feature after ln_post, before projection; nothing in it trains."""
        visual = self.clip.visual
        if self.config.query_feature == "class":  # D6
            patches = torch.cat([visual.class_token(len(patches)).to(patches.dtype), patches], dim=1)
        return visual.ln_post(visual.blocks(patches, at=0))

    def target_features(self, images: Tensor, class_ids: Tensor | None = None,
                        domain_ids: Tensor | None = None) -> Tensor:
        """Target encoding (G): images [b, 3, H, W] -> [b, e], not normalised.

        With ids [b] (phase 2) the rows of the image's own class and domain are masked; a test has none.
        """
        patches, banks = self.clip.visual.embed(images), (self.domain_prompts, self.class_prompts)
        if self.config.target_epochs == 0:  # phase 1 alone has no generator: the banks' means stand in
            prompts = [bank.mean((0, 1)).expand(len(images), 1, -1) for bank in banks]
        else:
            query = self.query_feature(patches)
            own = (None, None) if self.config.mask == "none" else (domain_ids, class_ids)  # D1
            prompts = [self.generator(query, bank, ids) for bank, ids in zip(banks, own)]
        return self.encode_tokens(patches, *prompts)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Test-time features [b, e] of images [b, 3, H, W]: no labels, no text."""
        features = self.target_features(images).float()
        return unit(features) if self.config.evaluation_features == "normalized" else features  # D3

    def trainable(self, phase: str) -> dict[str, nn.Parameter]:
        """The parameters that `phase` trains, by name; everything else stays frozen."""
        wanted = self.TRAINED[phase]
        trained = {name: value for name, value in self.named_parameters() if name.startswith(wanted)}
        for prefix in wanted:
            absent = self.template is None and prefix == "template.ctx"  # D13
            found = any(name.startswith(prefix) for name in trained)
            assert found or absent, f"phase {phase}: {prefix!r} matches no parameter of {list(trained)}"
        return trained

    def optimizer(self, phase: str) -> torch.optim.Optimizer:
        rate = self.learning_rate(phase, epoch=0, step=0)
        return torch.optim.Adam(self.trainable(phase).values(), lr=rate, betas=(0.9, 0.999))

    def learning_rate(self, phase: str, epoch: int, step: int) -> float:
        """Constant in phase 1; target_lr * 10^(-3 epoch / 20), not below 1e-6, in phase 2 (epochs from 0)."""
        if phase == "source":
            return self.config.source_lr
        first = self.config.target_lr
        return max(first * 10 ** (-3 * epoch / 20), min(first, 1e-6))  # D11

    def start(self, phase: str) -> None:
        """Prepares a phase: in phase 2 the text features are constants, so they are computed once."""
        if phase == "target":
            with torch.no_grad():
                self.anchors.copy_(self.text_features())
            self.started = True

    def step(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        """Loss terms of one batch; `loss` is the one to minimise.

        Raises ValueError for another phase, and for "target" before `start("target")`.
        """
        if phase == "source":
            return self.source_step(batch)
        if phase != "target" or not self.started:
            raise ValueError(f'step of phase {phase!r}: expected "source", or "target" after start("target")')
        return self.target_step(batch)

    def source_step(self, batch: Batch) -> dict[str, Tensor]:
        """Phase 1, source adapter learning: L-align + L-triplet; the momentum features enter the queues."""
        config, patches = self.config, self.clip.visual.embed(batch.images)
        f = self.source_features(patches, batch.class_ids, batch.domain_ids)
        align = losses.image_text_contrast(f, self.text_features(), batch.class_ids, config.tau)
        if config.triplet_pairs == 0:
            return {"loss": align, "align": align}
        entering = self.join(self.momentum_features(patches, batch)), self.join(batch.class_ids)
        if config.queue_push == "before":  # D12
            self.queues.push(*entering)
        place = self.place(len(batch.images))
        positives, negatives, valid = self.queues.draw(batch.class_ids, config.triplet_pairs, place)
        squared = config.triplet_distance == "squared"
        everyone = self.join(valid) if config.triplet_mean == "paired" else None  # D17
        triplet = losses.triplet(f, positives, negatives, valid, config.margin, squared, everyone)
        if config.queue_push == "after":  # D12
            self.queues.push(*entering)
        return {"loss": align + triplet, "align": align, "triplet": triplet}

    @torch.no_grad()
    def momentum_features(self, patches: Tensor, batch: Batch) -> Tensor:
        """Momentum encoder (M): theta_M <- alpha theta_M + (1 - alpha) theta, then f_M [b, e] by theta_M."""
        domains, classes = self.momentum_domain_prompts, self.momentum_class_prompts
        domains.lerp_(self.domain_prompts, 1 - self.config.momentum)
        classes.lerp_(self.class_prompts, 1 - self.config.momentum)
        return unit(self.encode_tokens(patches, domains[batch.domain_ids], classes[batch.class_ids]))

    def target_step(self, batch: Batch) -> dict[str, Tensor]:
        """Phase 2, target prompt generation: L-align against the constant text features."""
        f = unit(self.target_features(*batch))
        align = losses.image_text_contrast(f, self.anchors, batch.class_ids, self.config.tau)
        return {"loss": align, "align": align}


def unit(features: Tensor) -> Tensor:
    """features [..., e] in float32, L2-normalised"""
    return F.normalize(features.float(), dim=-1)
