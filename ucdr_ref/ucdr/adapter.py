"""UCDR-Adapter: both training phases, and encoding."""
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clip.model import CLIP
from ..clip.zero_shot import class_text_features
from . import losses
from .options import Options
from .prompts import TargetPromptGenerator, TextTemplate, prompt_bank


class Batch(NamedTuple):
    images: Tensor  # [b, 3, H, W], preprocessed
    class_ids: Tensor  # [b]
    domain_ids: Tensor  # [b]


class ClassQueues(nn.Module):
    """First-in-first-out queues of momentum features, one a class (M)."""

    features: Tensor  # [c * size, e], class after class, in each the oldest first; then free rows, zero
    labels: Tensor  # [c * size], the class of each row, c where it is free

    def __init__(self, c: int, size: int, e: int) -> None:
        super().__init__()
        self.c, self.size = c, size
        self.register_buffer("features", torch.zeros(c * size, e))
        self.register_buffer("labels", torch.full((c * size,), c))

    @property
    def counts(self) -> Tensor:
        """Features in each queue [c]"""
        return torch.searchsorted(self.labels, torch.arange(self.c + 1, device=self.labels.device)).diff()

    def push(self, features: Tensor, class_ids: Tensor) -> None:
        """features [b, e] enter their queues in batch order; the oldest leave."""
        features = torch.cat([self.features, features.to(self.features.dtype)])
        labels, order = torch.cat([self.labels, class_ids]).sort(stable=True)  # by class, the oldest first
        ends = torch.searchsorted(labels, labels, right=True)
        age = ends - torch.arange(len(labels), device=labels.device)  # the newest of a class is 1
        kept = (age <= self.size) & (labels < self.c)
        free = len(self.labels) - int(kept.sum())
        self.features = F.pad(features[order[kept]], (0, 0, 0, free))
        self.labels = F.pad(labels[kept], (0, free), value=self.c)

    def draw(self, class_ids: Tensor, r: int, first: int, total: int) -> tuple[Tensor, Tensor, Tensor]:
        """r uniform pairs I_p, I_n [b, r, e] of each image, and which images have one [b].

        The images are those from `first` on of a batch of `total`, shared by processes.
        """
        counts = self.counts
        own, start = counts[class_ids, None], (counts.cumsum(0) - counts)[class_ids, None]
        others = counts.sum() - own
        # Drawn on the CPU for the whole batch: the same on any device, in any number of processes.
        u = torch.rand(2, total, r, dtype=torch.float64)[:, first:first + len(class_ids)].to(own.device)
        positive, negative = start + (u[0] * own).long(), (u[1] * others).long()
        negative = torch.where(negative < start, negative, negative + own)  # skips the own queue
        valid = ((own > 0) & (others > 0)).squeeze(1)
        return self.features[positive], self.features[negative.clamp(max=len(self.features) - 1)], valid


class UCDRAdapter(nn.Module):
    """CLIP, frozen, with text template (T), source prompts (P) and target prompt generator (A).

    class_names [c] and domain_names [s] of the training images; class_features [c, e] in place of text (D13).
    Where processes share a batch, gather: own rows -> those of all; batch_offset: own number of images ->
    (position of the first, number of all). Raises ValueError for too long a class name.
    """

    PHASES: tuple[str, ...] = ("source", "target")
    TRAINED = {"source": ("template.ctx", "domain_prompts", "class_prompts"),
               "target": ("generator.", "class_token", "proj")}  # beginnings of names

    anchors: Tensor  # t_c [c, e]; a template's not before phase 2
    momentum_domain_prompts: Tensor  # [s, p, d]
    momentum_class_prompts: Tensor  # [c, p, d]

    def __init__(self, clip: CLIP, class_names: Sequence[str], domain_names: Sequence[str], options: Options,
                 class_features: Tensor | None = None,
                 gather: Callable[[Tensor], Tensor] = lambda rows: rows,
                 batch_offset: Callable[[int], tuple[int, int]] = lambda count: (0, count)) -> None:
        super().__init__()
        self.gather, self.batch_offset = gather, batch_offset
        self.clip, self.options = clip.requires_grad_(False), options
        c, s, d, p = len(class_names), len(domain_names), clip.vision_width, options.prompt_length
        self.domain_prompts = prompt_bank(s, p, clip.patch, d)  # U
        self.class_prompts = prompt_bank(c, p, clip.patch, d)  # V
        self.generator = TargetPromptGenerator(d, options.temperature)
        self.class_token = nn.Parameter(clip.visual.class_embedding.detach().clone())
        self.proj = nn.Parameter(clip.visual.proj.detach().clone())

        self.template: TextTemplate | None = None
        self.started = False  # phase 2
        if class_features is not None:
            anchors = unit(class_features)  # D13
        elif options.class_features == "plain":
            anchors = class_text_features(clip, class_names)  # D13
        elif options.class_features == "template":
            self.template = TextTemplate(clip, class_names, options.context_vectors)
            anchors = torch.zeros(c, clip.embed_dim)
        else:
            raise ValueError(f"class_features {options.class_features!r} are not given")
        self.register_buffer("anchors", anchors)

        domains, classes = self.domain_prompts, self.class_prompts
        if options.momentum_start == "random":  # D9
            domains, classes = prompt_bank(s, p, clip.patch, d), prompt_bank(c, p, clip.patch, d)
        self.register_buffer("momentum_domain_prompts", domains.detach().clone())
        self.register_buffer("momentum_class_prompts", classes.detach().clone())
        self.queues = ClassQueues(c, options.queue_size, clip.embed_dim)

    def text_features(self) -> Tensor:
        """Class anchors t_c [c, e], L2-normalised."""
        return self.anchors if self.template is None else self.template(self.clip)  # D13

    def encode_tokens(self, patches: Tensor, domain_prompts: Tensor, class_prompts: Tensor) -> Tensor:
        """[class token + pos_0; prompts; patches] -> ln_pre, blocks -> token k -> ln_post, proj: [b, e]"""
        visual = self.clip.visual
        tokens = [visual.class_token(len(patches), self.class_token), domain_prompts, class_prompts, patches]
        x = torch.cat([token.to(patches.dtype) for token in tokens], dim=1)
        return visual.pool(visual.blocks(x, at=self.options.feature_token), self.proj)  # D2

    def source_features(self, patches: Tensor, class_ids: Tensor, domain_ids: Tensor) -> Tensor:
        """Source encoding (E) with true domain and class: patches [b, n, d], ids [b] -> unit f [b, e]"""
        prompts = self.domain_prompts[domain_ids], self.class_prompts[class_ids]
        return unit(self.encode_tokens(patches, *prompts))

    @torch.no_grad()
    def query_feature(self, patches: Tensor) -> Tensor:
        """I_g [b, d]: the frozen tower's feature after ln_post, before projection"""
        visual = self.clip.visual
        if self.options.query_feature == "class":  # D6
            patches = torch.cat([visual.class_token(len(patches)).to(patches.dtype), patches], dim=1)
        return visual.ln_post(visual.blocks(patches, at=0))

    def target_features(self, images: Tensor, class_ids: Tensor | None = None,
                        domain_ids: Tensor | None = None) -> Tensor:
        """Target encoding (G): images [b, 3, H, W] -> [b, e], not normalised; true ids [b] in training."""
        patches = self.clip.visual.embed(images)
        banks, own = (self.domain_prompts, self.class_prompts), (domain_ids, class_ids)
        if self.options.target_epochs == 0:  # phase 1 alone has no generator: the banks' means stand in
            prompts = [bank.mean((0, 1)).expand(len(images), 1, -1) for bank in banks]
        else:
            query, masked = self.query_feature(patches), self.options.mask == "own"  # D1
            prompts = [self.generator(query, bank, ids if masked else None) for bank, ids in zip(banks, own)]
        return self.encode_tokens(patches, *prompts)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images [b, 3, H, W] -> features [b, e] at test time: no labels, no text"""
        features = self.target_features(images).float()
        return unit(features) if self.options.evaluation_features == "normalized" else features  # D3

    def trainable(self, phase: str) -> dict[str, nn.Parameter]:
        """The parameters that the phase trains, by name"""
        names = self.TRAINED[phase]
        return {name: value for name, value in self.named_parameters() if name.startswith(names)}

    def optimizer(self, phase: str) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.trainable(phase).values(), lr=self.learning_rate(phase, epoch=0, step=0))

    def learning_rate(self, phase: str, epoch: int, step: int) -> float:
        """Constant in phase 1; target_lr * 10^(-3 epoch / 20), at least 1e-6, in phase 2."""
        if phase == "source":
            return self.options.source_lr
        first = self.options.target_lr
        return max(first * 10 ** (-3 * epoch / 20), min(first, 1e-6))  # D11

    @torch.no_grad()
    def start(self, phase: str) -> None:
        if phase == "target":
            self.anchors.copy_(self.text_features())  # now constants
            self.started = True

    def step(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        """Loss terms, `loss` to minimise; ValueError where start("target") is missing."""
        if phase == "source":
            return self.source_step(batch)
        if not self.started:
            raise ValueError('call start("target") first')
        return self.target_step(batch)

    def source_step(self, batch: Batch) -> dict[str, Tensor]:
        """Phase 1, source adapter learning: L-align + L-triplet"""
        options, (images, class_ids, domain_ids) = self.options, batch
        patches = self.clip.visual.embed(images)
        f = self.source_features(patches, class_ids, domain_ids)
        align = losses.image_text_contrast(f, self.text_features(), class_ids, options.tau)
        if options.triplet_pairs == 0:
            return {"loss": align, "align": align}

        entering = self.gather(self.momentum_features(patches, batch)), self.gather(class_ids)
        if options.queue_push == "before":  # D12
            self.queues.push(*entering)
        first, total = self.batch_offset(len(images))
        positives, negatives, valid = self.queues.draw(class_ids, options.triplet_pairs, first, total)
        squared = options.triplet_distance == "squared"  # D8
        all_valid = self.gather(valid) if options.triplet_mean == "paired" else None  # D17
        triplet = losses.triplet(f, positives, negatives, valid, options.margin, squared, all_valid)
        if options.queue_push == "after":  # D12
            self.queues.push(*entering)
        return {"loss": align + triplet, "align": align, "triplet": triplet}

    @torch.no_grad()
    def momentum_features(self, patches: Tensor, batch: Batch) -> Tensor:
        """(M) theta_M <- alpha theta_M + (1 - alpha) theta, then unit f_M [b, e]"""
        domains, classes = self.momentum_domain_prompts, self.momentum_class_prompts
        domains.lerp_(self.domain_prompts, 1 - self.options.momentum)
        classes.lerp_(self.class_prompts, 1 - self.options.momentum)
        return unit(self.encode_tokens(patches, domains[batch.domain_ids], classes[batch.class_ids]))

    def target_step(self, batch: Batch) -> dict[str, Tensor]:
        """Phase 2, target prompt generation: L-align with constant text features"""
        f = unit(self.target_features(*batch))
        align = losses.image_text_contrast(f, self.anchors, batch.class_ids, self.options.tau)
        return {"loss": align, "align": align}


def unit(features: Tensor) -> Tensor:
    """features [..., e] in float32, L2-normalised"""
    return F.normalize(features.float(), dim=-1)
