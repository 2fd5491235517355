"""UCDR-Adapter computed as its equations read, with nothing saved: what `bench` measures the package against.

An independent transcription (WACV 2025): it shares the package's parameters, never its arithmetic. All 77
tokens of every class go through the text tower in every step of both phases, every block computes every
token, attention is spelled out, a full copy of the image branch is averaged and run in both phases, each
image gets its own masked prompt bank, queues are lists, and metrics rank one query at a time. What is frozen
in the paper has no gradient; only the momentum encoder, by definition without one, runs under `no_grad`.
Ledger: the paper's column.
"""
from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..clip.model import CLIP, Block
from ..clip.tokenizer import encode, tokenize
from ..clip.zero_shot import readable
from .adapter import Batch
from .options import Options
from .prompts import TargetPromptGenerator, prompt_bank


def attention(block: Block, x: Tensor, mask: Tensor | float) -> Tensor:
    """softmax(Q K^T / sqrt(w / heads) + mask) V for all tokens: x [b, L, w] -> [b, L, w]."""
    attn, (b, length, width) = block.attn, x.shape
    stacked = x @ attn.in_proj_weight.T + attn.in_proj_bias
    q, k, v = (part.reshape(b, length, attn.heads, -1).transpose(1, 2) for part in stacked.chunk(3, dim=-1))
    weights = (q @ k.transpose(2, 3) / math.sqrt(width // attn.heads) + mask).softmax(dim=-1)
    y = (weights @ v).transpose(1, 2).reshape(b, length, width)
    return y @ attn.out_proj.weight.T + attn.out_proj.bias


def transformer(blocks: Sequence[Block], x: Tensor, mask: Tensor | float = 0.0) -> Tensor:
    for block in blocks:
        x = x + attention(block, block.ln_1(x), mask)
        first, second = block.mlp.c_fc, block.mlp.c_proj
        hidden = block.ln_2(x) @ first.weight.T + first.bias
        x = x + (hidden * torch.sigmoid(1.702 * hidden)) @ second.weight.T + second.bias
    return x


class ImageBranch(nn.Module):
    """What turns an image into a feature: tower, source prompts U and V, target prompt generator."""

    def __init__(self, clip: CLIP, c: int, s: int, config: Options) -> None:
        super().__init__()
        d, p = clip.vision_width, config.prompt_length
        self.temperature, self.visual = config.temperature, clip.visual
        self.domain_prompts = prompt_bank(s, p, clip.patch, d)
        self.class_prompts = prompt_bank(c, p, clip.patch, d)
        self.generator = TargetPromptGenerator(d, config.temperature)
        self.class_token = nn.Parameter(clip.visual.class_embedding.detach().clone())
        self.proj = nn.Parameter(clip.visual.proj.detach().clone())

    def patches(self, images: Tensor) -> Tensor:
        return self.visual.conv1(images).flatten(2).transpose(1, 2) + self.visual.positional_embedding[1:]

    def tower(self, class_token: Tensor, prompts: list[Tensor], patches: Tensor) -> Tensor:
        """The class token's feature [b, d] after ln_post."""
        first = (class_token + self.visual.positional_embedding[0]).expand(len(patches), 1, -1)
        x = self.visual.ln_pre(torch.cat([first, *prompts, patches], dim=1))
        return self.visual.ln_post(transformer(self.visual.transformer.blocks(), x))[:, 0]

    def source_features(self, batch: Batch) -> Tensor:
        """(E) f [b, e], L2-normalised."""
        prompts = [self.domain_prompts[batch.domain_ids], self.class_prompts[batch.class_ids]]
        features = self.tower(self.class_token, prompts, self.patches(batch.images)) @ self.proj
        return features / features.norm(dim=1, keepdim=True)

    def prompt(self, query: Tensor, bank: Tensor, own: Tensor | None) -> Tensor:
        """(A) with the masked bank B' = B * (1 - delta_own) of every image: [b, 1, d]."""
        banks = bank.expand(len(query), *bank.shape).clone()
        if own is not None:
            banks[torch.arange(len(query), device=own.device), own] = 0
        keys = self.generator.W_p(banks.flatten(1, 2))  # [b, k, d]
        scores = (self.generator.W_i(query)[:, None] * keys).sum(-1) / self.temperature
        prompt = (scores.softmax(dim=1)[:, :, None] * keys).sum(1)
        prompt = prompt + self.generator.norm(self.generator.W_o(prompt))
        return (prompt / 33)[:, None]

    def target_features(self, images: Tensor, class_ids: Tensor | None = None,
                        domain_ids: Tensor | None = None) -> Tensor:
        """(G) [b, e], L2-normalised."""
        query = self.tower(self.visual.class_embedding, [], self.patches(images))
        prompts = [self.prompt(query, self.domain_prompts, domain_ids),
                   self.prompt(query, self.class_prompts, class_ids)]
        features = self.tower(self.class_token, prompts, self.patches(images)) @ self.proj
        return features / features.norm(dim=1, keepdim=True)

    def features(self, batch: Batch, phase: str) -> Tensor:
        return self.source_features(batch) if phase == "source" else self.target_features(*batch)


class PlainAdapter(nn.Module):
    """Both phases with the text template, the momentum encoder and one list of features per class."""

    def __init__(self, clip: CLIP, class_names: Sequence[str], domain_names: Sequence[str],
                 config: Options) -> None:
        super().__init__()
        self.clip, self.config, m = clip.requires_grad_(False), config, config.context_vectors
        self.image = ImageBranch(clip, len(class_names), len(domain_names), config)
        self.momentum = copy.deepcopy(self.image).requires_grad_(False)
        self.ctx = nn.Parameter(torch.empty(m, clip.text_width).normal_(std=0.02))
        texts = [f"a photo of {readable(name)} from {' '.join('X' * m)} domain." for name in class_names]
        self.ids = tokenize(texts, clip.context_length)
        self.starts = [len(encode(readable(name))) - 2 + 5 for name in class_names]  # len(bpe(name)) + 5
        self.queues: list[deque[Tensor]] = [deque(maxlen=config.queue_size) for _ in class_names]

    def trainable(self, phase: str) -> dict[str, nn.Parameter]:
        """The parameters that `phase` trains, under the names they have in `UCDRAdapter`."""
        image = self.image
        if phase == "source":
            return {"template.ctx": self.ctx, "domain_prompts": image.domain_prompts,
                    "class_prompts": image.class_prompts}
        generator = {f"generator.{name}": value for name, value in image.generator.named_parameters()}
        return {**generator, "class_token": image.class_token, "proj": image.proj}

    def text_features(self) -> Tensor:
        """(T) t_c [c, e], L2-normalised."""
        clip, m, ids = self.clip, len(self.ctx), self.ids.to(self.ctx.device)
        rows = [torch.cat([tokens[:start], self.ctx, tokens[start + m:]])
                for tokens, start in zip(clip.token_embedding(ids), self.starts)]
        x = torch.stack(rows) + clip.positional_embedding
        causal = torch.full((x.shape[1], x.shape[1]), -math.inf, device=x.device).triu(1)
        x = clip.ln_final(transformer(clip.transformer.blocks(), x, causal))
        features = x[torch.arange(len(x), device=x.device), ids.argmax(dim=1)] @ clip.text_projection
        return features / features.norm(dim=1, keepdim=True)

    @torch.no_grad()
    def momentum_features(self, batch: Batch, phase: str) -> Tensor:
        """(M) theta_M <- alpha theta_M + (1 - alpha) theta over the whole image branch, then f_M [b, e]."""
        for average, online in zip(self.momentum.parameters(), self.image.parameters()):
            average.copy_(self.config.momentum * average + (1 - self.config.momentum) * online)
        return self.momentum.features(batch, phase)

    def triplet(self, f: Tensor, class_ids: list[int]) -> Tensor:
        """(L-triplet), image by image and pair by pair; the draws are those of `ClassQueues.draw`."""
        r = self.config.triplet_pairs
        u = torch.rand(2, len(f), r, dtype=torch.float64).tolist()
        total = torch.zeros((), device=f.device)
        for i, label in enumerate(class_ids):
            own = list(self.queues[label])
            others = [feature for c, queue in enumerate(self.queues) if c != label for feature in queue]
            if not own or not others:
                continue
            for j in range(r):
                positive, negative = own[int(u[0][i][j] * len(own))], others[int(u[1][i][j] * len(others))]
                nearer, farther = ((f[i] - other).square().sum() for other in (positive, negative))
                total = total + torch.relu(nearer - farther + self.config.margin) / r
        return total / len(f)

    def step(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        f = self.image.features(batch, phase)
        scores = f @ self.text_features().T / self.config.tau
        align = -scores.log_softmax(dim=1).gather(1, batch.class_ids[:, None]).mean()
        f_momentum = self.momentum_features(batch, phase)
        labels = batch.class_ids.tolist()
        triplet = self.triplet(f, labels) if phase == "source" else torch.zeros_like(align)
        for feature, label in zip(f_momentum, labels):
            self.queues[label].append(feature)
        return {"loss": align + triplet, "align": align, "triplet": triplet}

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return self.image.target_features(images)


def retrieval(query: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor,
              k: int = 200) -> dict[str, float]:
    """mAP@k, Prec@k, mAP@all and Prec@100 as published: a sort per query, precisions in a loop over ranks."""
    ap, precision, ap_all, precision_100 = [], [], [], []
    gallery = gallery.double()
    for features, label in zip(query.double(), query_labels.tolist()):
        distances = (features - gallery).square().sum(dim=1).float()
        hits = (gallery_labels[distances.argsort(stable=True)] == label).tolist()
        ap.append(average_precision(hits[:k]))
        ap_all.append(average_precision(hits))
        precision.append(sum(hits[:k]) / len(hits[:k]))
        precision_100.append(sum(hits[:100]) / len(hits[:100]))
    columns = {f"mAP@{k}": ap, f"Prec@{k}": precision, "mAP@all": ap_all, "Prec@100": precision_100}
    return {name: sum(values) / len(values) for name, values in columns.items()}


def average_precision(hits: list[bool]) -> float:
    found, total = 0, 0.0
    for rank, hit in enumerate(hits, start=1):
        if hit:
            found += 1
            total += found / rank
    return total / found if found else 0.0
