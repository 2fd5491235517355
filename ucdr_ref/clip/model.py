"""CLIP's two transformer towers (Radford et al. 2021), under the parameter names of OpenAI's released files.

Pre-norm blocks with QuickGELU. The shapes of the weights give the architecture: ViT-B/32, B/16, L/14,
L/14@336px or a small one. Between `embed`, `blocks` and `pool` of the vision tower a method inserts tokens.
"""
from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import Linear, linear

IGNORED_KEYS = ("input_resolution", "context_length", "vocab_size")  # scalars that some files carry
MAX_LAYERS = 1000  # key names alone could otherwise ask for any number of modules
KeysValues = tuple[Tensor, Tensor]


def select(x: Tensor, at: int | None) -> Tensor:
    """x [b, L, w] -> its token `at` alone, [b, 1, w]; x itself when None."""
    return x if at is None else x.select(1, at).unsqueeze(1)


class LayerNorm(nn.LayerNorm):
    """LayerNorm in float32 whatever the input's type, cast back."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return y.to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with OpenAI's stacked `in_proj` (rows: query, key, value)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = Linear(width, width)

    def split(self, x: Tensor) -> Tensor:
        """[b, L, w] -> [b, heads, L, w / heads]"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, x: Tensor) -> KeysValues:
        """x [b, L, w] -> keys and values, each [b, heads, L, w / heads]."""
        width = x.shape[-1]
        keys, values = linear(x, self.in_proj_weight[width:], self.in_proj_bias[width:]).chunk(2, dim=-1)
        return self.split(keys), self.split(values)

    def forward(self, x: Tensor, at: int | None = None, causal: bool = False, past: KeysValues | None = None,
                mask: Tensor | None = None) -> Tensor:
        """x [b, L, w] -> [b, L, w]; with `at`, only that token's output [b, 1, w].

        past: keys and values [b, heads, P, w / heads] of earlier tokens. mask: True where a query may attend.
        """
        width = x.shape[-1]
        queries = self.split(linear(select(x, at), self.in_proj_weight[:width], self.in_proj_bias[:width]))
        keys, values = self.keys_values(x)
        if past is not None:
            keys, values = torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)
        y = queries
        if len(x):  # a process's share may be empty, which PyTorch's flash attention long refused
            y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers with QuickGELU, x * sigmoid(1.702 x), written as silu(1.702 x) / 1.702: fewer tensors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = Linear(width, 4 * width)
        self.c_proj = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.silu(1.702 * self.c_fc(x)).div_(1.702))


class Block(nn.Module):
    """x + attn(ln_1(x)), then x + mlp(ln_2(x)); arguments as of `Attention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = LayerNorm(width)
        self.mlp = MLP(width)
        self.ln_2 = LayerNorm(width)

    def forward(self, x: Tensor, at: int | None = None, causal: bool = False, past: KeysValues | None = None,
                mask: Tensor | None = None) -> Tensor:
        x = select(x, at) + self.attn(self.ln_1(x), at, causal, past, mask)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.resblocks))

    def forward(self, x: Tensor, at: int | None = None, causal: bool = False) -> Tensor:
        """x [b, L, w] -> [b, L, w]; with `at`, the last block computes only that token: [b, 1, w]."""
        *body, last = self.blocks()
        for block in body:
            x = block(x, causal=causal)
        return last(x, at, causal)


class VisionTower(nn.Module):
    def __init__(self, image_size: int, patch: int, width: int, layers: int, heads: int,
                 embed_dim: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + (image_size // patch) ** 2, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, embed_dim))

    def embed(self, images: Tensor) -> Tensor:
        """images [b, 3, H, W] -> patch tokens [b, n, d] with their positions, no class token.

        Raises ValueError for images of another size or kind.
        """
        size = (3, self.image_size, self.image_size)
        if images.shape[1:] != size or not images.is_floating_point():
            raise ValueError(f"images are {images.dtype} {list(images.shape)}, expected floating-point "
                             f"[b, 3, {size[1]}, {size[1]}], as clip.preprocess({size[1]}) gives them")
        images = images.to(self.conv1.weight.dtype)
        return self.conv1(images).flatten(2).transpose(1, 2) + self.positional_embedding[1:]

    def class_token(self, count: int, embedding: Tensor | None = None) -> Tensor:
        """The class token (`embedding` [d], CLIP's own when None) with position 0: [count, 1, d]."""
        token = (self.class_embedding if embedding is None else embedding) + self.positional_embedding[0]
        return token.expand(count, 1, -1)

    def blocks(self, tokens: Tensor, at: int) -> Tensor:
        """tokens [b, L, d] -> ln_pre -> blocks -> token `at` [b, d]; only one token is ever pooled."""
        return self.transformer(self.ln_pre(tokens), at).squeeze(1)

    def pool(self, token: Tensor, proj: Tensor | None = None) -> Tensor:
        """token [b, d] -> ln_post -> projection (`proj` [d, e], CLIP's own when None) -> [b, e]."""
        return self.ln_post(token) @ (self.proj if proj is None else proj)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images)
        tokens = torch.cat([self.class_token(len(images)).to(tokens.dtype), tokens], dim=1)
        return self.pool(self.blocks(tokens, at=0))


class CLIP(nn.Module):
    """Both towers, uninitialised; the image tower alone (`has_text` is False) when `context_length` is 0."""

    def __init__(self, *, image_size: int, patch: int, embed_dim: int,
                 vision_width: int, vision_layers: int, vision_heads: int,
                 context_length: int = 0, vocab_size: int = 0,
                 text_width: int = 0, text_layers: int = 0, text_heads: int = 0) -> None:
        super().__init__()
        self.image_size, self.patch, self.embed_dim = image_size, patch, embed_dim
        self.vision_width, self.text_width, self.context_length = vision_width, text_width, context_length
        self.visual = VisionTower(image_size, patch, vision_width, vision_layers, vision_heads, embed_dim)
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.has_text = context_length > 0
        if self.has_text:
            self.token_embedding = nn.Embedding(vocab_size, text_width)
            self.positional_embedding = nn.Parameter(torch.empty(context_length, text_width))
            self.transformer = Transformer(text_width, text_layers, text_heads)
            self.ln_final = LayerNorm(text_width)
            self.text_projection = nn.Parameter(torch.empty(text_width, embed_dim))

    def encode_image(self, images: Tensor) -> Tensor:
        """images [b, 3, H, W], preprocessed -> features [b, e], not normalised."""
        return self.visual(images)

    def encode_text(self, ids: Tensor) -> Tensor:
        """ids [b, L] of `tokenize` -> features [b, e], not normalised; ValueError without a text tower."""
        self.require_text()
        eot = ids.argmax(dim=-1)  # end-of-text has the largest id in the vocabulary
        ids = ids[:, : int(eot.max()) + 1]  # attention is causal: nothing after end-of-text is read
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        x = self.transformer(x, causal=True)
        return self.pool_text(x[torch.arange(len(x), device=x.device), eot])

    def pool_text(self, token: Tensor) -> Tensor:
        """end-of-text token [b, t] -> ln_final -> projection -> [b, e]"""
        return self.ln_final(token) @ self.text_projection

    def require_text(self) -> None:
        if not self.has_text:
            raise ValueError("these weights hold CLIP's image tower alone, so text cannot be encoded; "
                             "use a full CLIP file (weights/README.md) or, for UCDR-Adapter, "
                             "--class-features prototypes")

    @classmethod
    def from_state_dict(cls, sd: Mapping[str, Tensor], heads: int | tuple[int, int] | None = None,
                        dtype: torch.dtype = torch.float32) -> CLIP:
        """The model that the shapes describe, frozen, with the weights `sd` cast to `dtype`.

        heads: of both towers, or (vision, text); width / 64 when None.
        Raises ValueError for a ResNet CLIP, shapes that fit no ViT, and missing or unexpected keys (listed).
        """
        sd = {key: value for key, value in sd.items() if key not in IGNORED_KEYS}
        with torch.device("meta"):
            model = cls(**infer_architecture(sd, heads))
        if "logit_scale" not in sd and not model.has_text:
            sd["logit_scale"] = torch.tensor(math.log(100.0))  # OpenAI's; an image tower has no use for it
        expected = {key: value.shape for key, value in model.state_dict().items()}
        missing, unexpected = sorted(expected.keys() - sd.keys()), sorted(sd.keys() - expected.keys())
        if missing or unexpected:
            raise ValueError(f"not a complete ViT CLIP: missing keys {shorten(missing)}; unexpected keys "
                             f"{shorten(unexpected)}")
        for key, size in expected.items():
            if sd[key].shape != size:
                found = list(sd[key].shape)
                raise ValueError(f"{key} has shape {found}, expected {list(size)} beside the other weights")
        # One tensor at a time, so that a half-precision source never exists twice in full.
        model.load_state_dict({key: sd[key].to(dtype, copy=True) for key in expected}, assign=True)
        return model.eval().requires_grad_(False)


def shorten(names: list[str], limit: int = 8) -> str:
    more = f", ... {len(names) - limit} more" if len(names) > limit else ""
    return f"[{', '.join(names[:limit])}{more}]"


def infer_architecture(sd: Mapping[str, Tensor],
                       heads: int | tuple[int, int] | None = None) -> dict[str, int]:
    """The arguments of `CLIP` that the shapes of OpenAI's names tell; ValueError if they fit no ViT."""
    if any(key.startswith("visual.layer1.") for key in sd):
        raise ValueError("this is a ResNet CLIP; only the ViT family is supported (ViT-B/32, B/16, L/14)")

    def dims(key: str, rank: int) -> list[int]:
        if key not in sd or sd[key].dim() != rank or 0 in sd[key].shape:
            found = "missing" if key not in sd else f"of shape {list(sd[key].shape)}"
            raise ValueError(f"not a ViT CLIP: {key} is {found}, expected {rank} non-empty dimensions")
        return list(sd[key].shape)

    def layers(prefix: str) -> int:
        pattern = re.compile(prefix + r"transformer\.resblocks\.(\d+)\.")
        count = len({match[1] for key in sd if (match := pattern.match(key))})
        if count > MAX_LAYERS:
            raise ValueError(f"not a ViT CLIP: {count} layers, expected at most {MAX_LAYERS}")
        return max(1, count)

    def head_count(width: int, tower: int) -> int:
        count = heads if heads is None or isinstance(heads, int) else heads[tower]
        if count is None and width % 64 == 0:
            return width // 64
        if count is None or count < 1 or width % count:
            wanted = "heads of 64" if count is None else f"{count} heads"
            raise ValueError(f"width {width} of the {('vision', 'text')[tower]} tower does not divide into "
                             f"{wanted}; give the number of heads")
        return count

    width, _, _, patch = dims("visual.conv1.weight", 4)
    positions = dims("visual.positional_embedding", 2)[0]
    grid = math.isqrt(positions - 1)
    if grid < 1 or grid * grid != positions - 1:
        raise ValueError(f"not a ViT CLIP: {positions} vision positions, expected 1 + a square of patches")
    arch = dict(image_size=grid * patch, patch=patch, vision_width=width, vision_layers=layers(r"visual\."),
                vision_heads=head_count(width, 0), embed_dim=dims("visual.proj", 2)[1])
    text = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
    if any(key.startswith(text) for key in sd):
        text_width = dims("ln_final.weight", 1)[0]
        arch.update(context_length=dims("positional_embedding", 2)[0],
                    vocab_size=dims("token_embedding.weight", 2)[0],
                    text_width=text_width, text_layers=layers(""), text_heads=head_count(text_width, 1))
    return arch
