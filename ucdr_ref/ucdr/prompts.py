"""The learnable parts of UCDR-Adapter: text template, prompt banks, target prompt generator."""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clip.model import CLIP
from ..clip.tokenizer import encode, tokenize
from ..clip.zero_shot import readable


class TextTemplate(nn.Module):
    """Learnable Textual Semantic Template (T): `a photo of {name} from X ... X domain.`, m learnable X's.

    `ctx` [m, t] is shared by all classes, N(0, 0.02^2) at the start; all other token embeddings are frozen.
    Attention is causal, so the tokens before the context do not depend on it: their keys and values are
    computed once, here, and only the m + 3 tokens from the context to end-of-text take part in a step.

    Raises ValueError for a class name that does not fit into the text tower's context, naming it.
    """

    ctx: nn.Parameter
    prefix: Tensor  # [layers, 2, c, heads, P, t / heads], keys and values of the constant tokens
    mask: Tensor  # [c, 1, m + 3, P + m + 3], True where a token may attend
    tail: Tensor  # [3, t], embeddings of `domain`, `.` and end-of-text
    positions: Tensor  # [c, m + 3, t]

    def __init__(self, clip: CLIP, class_names: Sequence[str], m: int) -> None:
        super().__init__()
        clip.require_text()
        self.ctx = nn.Parameter(torch.empty(m, clip.text_width).normal_(std=0.02))
        device, room = clip.logit_scale.device, clip.context_length
        texts = [f"a photo of {readable(name)} from {' '.join('X' * m)} domain." for name in class_names]
        prompts = [encode(text) for text in texts]
        for name, prompt in zip(class_names, prompts):
            if len(prompt) > room:
                raise ValueError(f"class name {name!r} makes a prompt of {len(prompt)} tokens, and the tower "
                                 f"takes {room}: shorten the name or lower --context-vectors (now {m})")
        suffix = torch.arange(m + 3, device=device)
        lengths = [len(prompt) - m - 3 for prompt in prompts]  # len(bpe(name)) + 5
        starts = torch.tensor(lengths, device=device)
        P = int(starts.max())
        key = torch.arange(P + m + 3, device=device)
        constant, causal = key < starts[:, None, None], (key >= P) & (key <= P + suffix[:, None])
        with torch.no_grad():
            buffers = {"tail": clip.token_embedding(torch.tensor(prompts[0][-3:], device=device)),
                       "positions": clip.positional_embedding[starts[:, None] + suffix],
                       "prefix": constant_prefix(clip, tokenize(texts, room)[:, :P].to(device)),
                       "mask": (constant | causal).unsqueeze(1)}
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, clip: CLIP) -> Tensor:
        """L2-normalised class text features t_c [c, e]."""
        x = torch.cat([self.ctx, self.tail]) + self.positions
        *body, last = clip.transformer.blocks()
        for block, (keys, values) in zip(body, self.prefix):
            x = block(x, past=(keys, values), mask=self.mask)
        x = last(x, at=-1, past=(self.prefix[-1, 0], self.prefix[-1, 1]), mask=self.mask[:, :, -1:])
        return F.normalize(clip.pool_text(x.squeeze(1)).float(), dim=-1)


def constant_prefix(clip: CLIP, ids: Tensor) -> Tensor:
    """Every layer's keys and values of the tokens ids [c, P]: [layers, 2, c, heads, P, t / heads]."""
    x = clip.token_embedding(ids) + clip.positional_embedding[: ids.shape[1]]
    layers = []
    for block in clip.transformer.blocks():
        layers.append(torch.stack(block.attn.keys_values(block.ln_1(x))))
        x = block(x, causal=True)
    return torch.stack(layers)


def prompt_bank(rows: int, p: int, patch: int, d: int) -> nn.Parameter:
    """Source prompts (P) [rows, p, d], uniform(-v, v) with v = sqrt(6 / (3 patch^2 + d))."""
    bound = math.sqrt(6 / (3 * patch ** 2 + d))
    return nn.Parameter(torch.empty(rows, p, d).uniform_(-bound, bound))


class TargetPromptGenerator(nn.Module):
    """Target Prompt Generator (A): describes an image by attention over a bank B of source prompts.

    K = W_p B, w = softmax(W_i I_g . K / T), P = sum_k w_k K_k, then P <- (P + LayerNorm(W_o P)) / 33. One set
    of projections serves the domain and the class bank; keys and values are the same projected rows.
    """

    DIVISOR = 33.0  # of the released code

    def __init__(self, d: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.W_i, self.W_p, self.W_o = (nn.Linear(d, d) for _ in range(3))
        self.norm = nn.LayerNorm(d)

    def forward(self, query: Tensor, bank: Tensor, own: Tensor | None = None) -> Tensor:
        """query I_g [b, d], bank [rows, p, d] -> one prompt token [b, 1, d].

        own [b]: the bank row that image b must do without (phase 2). It is set to zero before W_p (D1), so
        its p keys become the bias of W_p. Putting that bias in place of the keys gives the same result
        without a masked bank per image.
        """
        keys, q = self.W_p(bank.flatten(0, 1)), self.W_i(query)
        scores = q @ keys.T
        if own is None:
            prompt = (scores / self.temperature).softmax(dim=-1) @ keys
        else:
            row = torch.arange(len(bank), device=own.device).repeat_interleave(bank.shape[1])
            masked = row == own[:, None]  # D1
            scores = torch.where(masked, (q @ self.W_p.bias)[:, None].to(scores.dtype), scores)
            weights = (scores / self.temperature).softmax(dim=-1)
            on_bias = (weights * masked).sum(-1, keepdim=True)
            prompt = weights.masked_fill(masked, 0) @ keys + on_bias * self.W_p.bias
        prompt = prompt + self.norm(self.W_o(prompt))
        return (prompt / self.DIVISOR).unsqueeze(1)
