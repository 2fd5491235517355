"""UCDR-Adapter (WACV 2025) computed as its equations read, with nothing saved: an oracle for tests and `bench`.

It shares the package's parameters, never its arithmetic: all 77 tokens of every class go through the text tower in
every step of both phases, every block computes every token, a full copy of the image branch is averaged and run in
both phases, each image gets its own masked prompt bank, queues are lists. Ledger: the paper's column.
"""
import copy
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ucdr_ref.clip.model import CLIP, Block
from ucdr_ref.clip.tokenizer import encode, tokenize
from ucdr_ref.ucdr.adapter import Batch, UCDRAdapter
from ucdr_ref.ucdr.options import Options


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def attention(block: Block, x: Tensor, mask: Tensor | float) -> Tensor:
    """softmax(Q K^T / sqrt(64) + mask) V for all tokens, heads of width 64: x [b, L, w] -> [b, L, w]."""
    attn, (b, length, width) = block.attn, x.shape
    stacked = x @ attn.in_proj_weight.T + attn.in_proj_bias
    q, k, v = (part.reshape(b, length, -1, 64).transpose(1, 2) for part in stacked.chunk(3, dim=-1))
    weights = (q @ k.transpose(2, 3) / math.sqrt(64) + mask).softmax(dim=-1)
    y = (weights @ v).transpose(1, 2).reshape(b, length, width)
    return y @ attn.out_proj.weight.T + attn.out_proj.bias


def transformer(blocks: Any, x: Tensor, mask: Tensor | float = 0.0) -> Tensor:
    for block in blocks:
        x = x + attention(block, block.ln_1(x), mask)
        first, second = block.mlp.c_fc, block.mlp.c_proj
        hidden = block.ln_2(x) @ first.weight.T + first.bias
        x = x + (hidden * torch.sigmoid(1.702 * hidden)) @ second.weight.T + second.bias
    return x


class ImageBranch(nn.Module):
    """What turns an image into a feature: tower, source prompts U and V, target prompt generator."""

    def __init__(self, model: UCDRAdapter) -> None:
        super().__init__()
        self.visual, self.class_token, self.proj = model.clip.visual, model.class_token, model.proj
        self.domain_prompts, self.class_prompts, self.generator = model.domain_prompts, model.class_prompts, model.generator

    def patches(self, images: Tensor) -> Tensor:
        return self.visual.conv1(images).flatten(2).transpose(1, 2) + self.visual.positional_embedding[1:]

    def tower(self, class_token: Tensor, prompts: list[Tensor], patches: Tensor) -> Tensor:
        """The class token's feature [b, d] after ln_post."""
        first = (class_token + self.visual.positional_embedding[0]).expand(len(patches), 1, -1)
        x = self.visual.ln_pre(torch.cat([first, *prompts, patches], dim=1))
        return self.visual.ln_post(transformer(self.visual.transformer.resblocks, x))[:, 0]

    def source_features(self, batch: Batch) -> Tensor:
        """(E) f [b, e], L2-normalised."""
        prompts = [self.domain_prompts[batch.domain_ids], self.class_prompts[batch.class_ids]]
        return unit(self.tower(self.class_token, prompts, self.patches(batch.images)) @ self.proj)

    def prompt(self, query: Tensor, bank: Tensor, own: Tensor | None) -> Tensor:
        """(A) with the masked bank B' = B * (1 - delta_own) of every image: [b, 1, d]."""
        banks = bank.expand(len(query), *bank.shape).clone()
        if own is not None:
            banks[torch.arange(len(query), device=own.device), own] = 0
        keys = self.generator.W_p(banks.flatten(1, 2))  # [b, k, d]
        scores = (self.generator.W_i(query)[:, None] * keys).sum(-1) / 0.75
        prompt = (scores.softmax(dim=1)[:, :, None] * keys).sum(1)
        prompt = prompt + self.generator.norm(self.generator.W_o(prompt))
        return (prompt / 33)[:, None]

    def target_features(self, images: Tensor, class_ids: Tensor | None = None, domain_ids: Tensor | None = None) -> Tensor:
        """(G) [b, e], L2-normalised."""
        query = self.tower(self.visual.class_embedding, [], self.patches(images))
        prompts = [self.prompt(query, self.domain_prompts, domain_ids), self.prompt(query, self.class_prompts, class_ids)]
        return unit(self.tower(self.class_token, prompts, self.patches(images)) @ self.proj)

    def features(self, batch: Batch, phase: str) -> Tensor:
        return self.source_features(batch) if phase == "source" else self.target_features(*batch)


class PlainAdapter(nn.Module):
    """Both phases with the text template, the momentum encoder and one list of features per class."""

    def __init__(self, clip: CLIP, class_names: Sequence[str], domain_names: Sequence[str], options: Options) -> None:
        super().__init__()
        self.model, self.options, m = UCDRAdapter(clip, class_names, domain_names, options), options, options.context_vectors
        self.image = ImageBranch(self.model)
        self.momentum = copy.deepcopy(self.image).requires_grad_(False)
        words = [name.replace("_", " ") for name in class_names]
        self.ids = tokenize([f"a photo of {w} from {' '.join('X' * m)} domain." for w in words], clip.context_length)
        self.starts = [len(encode(w)) - 2 + 5 for w in words]  # len(bpe(w)) + 5
        self.queues: list[deque[Tensor]] = [deque(maxlen=options.queue_size) for _ in class_names]

    def trainable(self, phase: str) -> dict[str, nn.Parameter]:
        return self.model.trainable(phase)

    def text_features(self) -> Tensor:
        """(T) t_c [c, e], L2-normalised."""
        clip, ctx = self.model.clip, self.trainable("source")["template.ctx"]
        ids = self.ids.to(ctx.device)
        rows = [torch.cat([tokens[:start], ctx, tokens[start + len(ctx):]])
                for tokens, start in zip(clip.token_embedding(ids), self.starts)]
        x = torch.stack(rows) + clip.positional_embedding
        causal = torch.full((x.shape[1], x.shape[1]), -math.inf, device=x.device).triu(1)
        x = clip.ln_final(transformer(clip.transformer.resblocks, x, causal))
        return unit(x[torch.arange(len(x), device=x.device), ids.argmax(dim=1)] @ clip.text_projection)

    @torch.no_grad()
    def momentum_features(self, batch: Batch, phase: str) -> Tensor:
        """(M) theta_M <- alpha theta_M + (1 - alpha) theta over the whole image branch, then f_M [b, e]."""
        for average, online in zip(self.momentum.parameters(), self.image.parameters()):
            average.copy_(self.options.momentum * average + (1 - self.options.momentum) * online)
        return self.momentum.features(batch, phase)

    def triplet(self, f: Tensor, class_ids: list[int]) -> Tensor:
        """(L-triplet), image by image and pair by pair; the draws are those of `ClassQueues.draw`."""
        r = self.options.triplet_pairs
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
                total = total + torch.relu(nearer - farther + self.options.margin) / r
        return total / len(f)

    def step(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        f = self.image.features(batch, phase)
        scores = f @ self.text_features().T / self.options.tau
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


def retrieval(query: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor, k: int = 200) -> dict[str, float]:
    """mAP@k, Prec@k, mAP@all and Prec@100 as published: a sort per query, precisions in a loop over ranks."""
    rows, gallery = [], gallery.double()
    for features, label in zip(query.double(), query_labels.tolist()):
        distances = (features - gallery).square().sum(dim=1).float()
        hits = (gallery_labels[distances.argsort(stable=True)] == label).tolist()
        precisions = [sum(hits[:cut]) / len(hits[:cut]) for cut in (k, 100)]
        rows.append((average_precision(hits[:k]), precisions[0], average_precision(hits), precisions[1]))
    names = (f"mAP@{k}", f"Prec@{k}", "mAP@all", "Prec@100")
    return {name: sum(values) / len(values) for name, values in zip(names, zip(*rows))}


def average_precision(hits: list[bool]) -> float:
    found, total = 0, 0.0
    for rank, hit in enumerate(hits, start=1):
        if hit:
            found += 1
            total += found / rank
    return total / found if found else 0.0
