"""The learnable parts of UCDR-Adapter: text template (T), prompt banks (P), target prompt generator (A)."""
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clip.model import CLIP
from ..clip.tokenizer import tokenize
from ..clip.zero_shot import class_to_text


class TextTemplate(nn.Module):
    """Learnable Textual Semantic Template (T): `a photo of {name} from X ... X domain.`, m learnable X's.

    `ctx` [m, t] is shared by all classes, N(0, 0.02^2) at the start. Raises ValueError for too long a name.
    """

    ids: Tensor  # [c, L], tokens of the prompts, padded to the longest

    def __init__(self, clip: CLIP, class_names: Sequence[str], m: int) -> None:
        super().__init__()
        clip.require_text()
        self.ctx = nn.Parameter(torch.empty(m, clip.text_width).normal_(std=0.02))
        texts = [f"a photo of {class_to_text(name)} from {' '.join('X' * m)} domain." for name in class_names]
        ids = tokenize(texts, clip.context_length)
        ids = ids[:, :int(ids.argmax(dim=1).max()) + 1]  # end-of-text has the largest id in the vocabulary
        self.register_buffer("ids", ids.to(clip.logit_scale.device), persistent=False)

    def forward(self, clip: CLIP) -> Tensor:
        """L2-normalised class text features t_c [c, e]."""
        m, device = len(self.ctx), self.ids.device
        end = self.ids.argmax(dim=-1)
        start = end - m - 2  # = len(bpe(name)) + 5; behind the X's come `domain`, `.` and end-of-text
        row = torch.arange(len(end), device=device)
        x = clip.token_embedding(self.ids)
        x[row[:, None], start[:, None] + torch.arange(m, device=device)] = self.ctx.to(x.dtype)
        # Attention is causal: end-of-text does not see the padding behind it.
        x = clip.transformer(x + clip.positional_embedding[: x.shape[1]], causal=True)
        return F.normalize((clip.ln_final(x[row, end]) @ clip.text_projection).float(), dim=-1)


def prompt_bank(rows: int, p: int, patch: int, d: int) -> nn.Parameter:
    """Source prompts (P) [rows, p, d], uniform(-v, v) with v = sqrt(6 / (3 patch^2 + d))."""
    bound = math.sqrt(6 / (3 * patch ** 2 + d))
    return nn.Parameter(torch.empty(rows, p, d).uniform_(-bound, bound))


class TargetPromptGenerator(nn.Module):
    """Target Prompt Generator (A): describes an image by attention over a bank B of source prompts.

    K = W_p B, w = softmax(W_i I_g . K / T), P = sum_k w_k K_k, then P <- (P + LayerNorm(W_o P)) / 33.
    """

    def __init__(self, d: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.W_i, self.W_p, self.W_o = (nn.Linear(d, d) for _ in range(3))
        self.norm = nn.LayerNorm(d)

    def forward(self, query: Tensor, bank: Tensor, own: Tensor | None = None) -> Tensor:
        """query I_g [b, d], bank [rows, p, d] -> one prompt token [b, 1, d].

        own [b]: the row masked for each image: zero before W_p, so W_p's bias after it. The keys then take
        b * rows * p * d floats.
        """
        rows, p, _ = bank.shape
        keys = self.W_p(bank.flatten(0, 1)).expand(len(query), -1, -1)
        if own is not None:
            row = torch.arange(rows, device=own.device).repeat_interleave(p)
            masked = (row == own[:, None]).unsqueeze(-1)
            keys = torch.where(masked, self.W_p.bias.to(keys.dtype), keys)  # D1
        scores = torch.einsum("bd,bkd->bk", self.W_i(query), keys)
        weights = (scores / self.temperature).softmax(dim=-1)
        prompt = torch.einsum("bk,bkd->bd", weights, keys)
        prompt = prompt + self.norm(self.W_o(prompt))
        return (prompt / 33).unsqueeze(1)  # 33: of the released code
