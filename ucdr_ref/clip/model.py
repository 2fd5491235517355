"""CLIP's two transformer towers (Radford et al. 2021), under the parameter names of OpenAI's files.

A method inserts tokens between `embed` and `blocks` of the vision tower. A head is 64 wide in every model.
"""
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALL = slice(None)  # tokens
HEAD_WIDTH = 64


class LayerNorm(nn.LayerNorm):
    """In float32 whatever the input's type."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return y.to(x.dtype)


class Attention(nn.Module):
    """Multi-head; the rows of `in_proj` are query, key, value."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, at: slice = ALL, causal: bool = False) -> Tensor:
        """x [b, L, w] -> the outputs of its tokens `at`"""
        w = x.shape[-1]
        q = F.linear(x[:, at], self.in_proj_weight[:w], self.in_proj_bias[:w])
        k, v = F.linear(x, self.in_proj_weight[w:], self.in_proj_bias[w:]).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2) for part in (q, k, v))
        # Flash attention refuses an empty batch, and a process may hold no image.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal) if len(x) else q
        return self.out_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """QuickGELU, x * sigmoid(1.702 x), is written as silu(1.702 x) / 1.702: fewer tensors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.silu(1.702 * self.c_fc(x)).div_(1.702))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn, self.ln_1 = Attention(width), LayerNorm(width)
        self.mlp, self.ln_2 = MLP(width), LayerNorm(width)

    def forward(self, x: Tensor, at: slice = ALL, causal: bool = False) -> Tensor:
        x = x[:, at] + self.attn(self.ln_1(x), at, causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        if width % HEAD_WIDTH:
            raise ValueError(f"a width of {width} is no multiple of {HEAD_WIDTH}")
        self.resblocks = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x: Tensor, at: slice = ALL, causal: bool = False) -> Tensor:
        """x [b, L, w] -> its tokens `at`: the last block computes no others"""
        *body, last = self.resblocks
        for block in body:
            x = block(x, causal=causal)
        return last(x, at, causal)


class VisionTower(nn.Module):
    def __init__(self, image_size: int, patch: int, width: int, layers: int, e: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + (image_size // patch) ** 2, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, layers)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, e))

    def embed(self, images: Tensor) -> Tensor:
        """images [b, 3, H, W] -> patch tokens [b, n, d] with positions; ValueError for another size."""
        size = self.image_size
        if images.shape[1:] != (3, size, size) or not images.is_floating_point():
            raise ValueError(f"images are {images.dtype} {list(images.shape)}, expected float "
                             f"[b, 3, {size}, {size}] as of clip.preprocess({size})")
        patches = self.conv1(images.to(self.conv1.weight.dtype))
        return patches.flatten(2).transpose(1, 2) + self.positional_embedding[1:]

    def class_token(self, count: int, embedding: Tensor | None = None) -> Tensor:
        """`embedding` [d] (CLIP's own when None) with position 0 -> [count, 1, d]"""
        token = (self.class_embedding if embedding is None else embedding) + self.positional_embedding[0]
        return token.expand(count, 1, -1)

    def blocks(self, tokens: Tensor, at: int) -> Tensor:
        """tokens [b, L, d] -> ln_pre -> blocks -> token `at` [b, d]"""
        return self.transformer(self.ln_pre(tokens), slice(at, at + 1)).squeeze(1)

    def pool(self, token: Tensor, proj: Tensor | None = None) -> Tensor:
        """token [b, d] -> ln_post -> `proj` [d, e] (CLIP's own when None) -> [b, e]"""
        return self.ln_post(token) @ (self.proj if proj is None else proj)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(images)
        tokens = torch.cat([self.class_token(len(images)).to(patches.dtype), patches], dim=1)
        return self.pool(self.blocks(tokens, at=0))


class CLIP(nn.Module):
    """Both towers, uninitialised; the image tower alone when `context_length` is 0."""

    def __init__(self, *, image_size: int, patch: int, embed_dim: int, vision_width: int, vision_layers: int,
                 context_length: int = 0, vocab_size: int = 0, text_width: int = 0,
                 text_layers: int = 0) -> None:
        super().__init__()
        self.image_size, self.patch, self.embed_dim = image_size, patch, embed_dim
        self.vision_width, self.text_width, self.context_length = vision_width, text_width, context_length
        self.visual = VisionTower(image_size, patch, vision_width, vision_layers, embed_dim)
        self.has_text = context_length > 0
        if self.has_text:
            self.logit_scale = nn.Parameter(torch.empty(()))
            self.token_embedding = nn.Embedding(vocab_size, text_width)
            self.positional_embedding = nn.Parameter(torch.empty(context_length, text_width))
            self.transformer = Transformer(text_width, text_layers)
            self.ln_final = LayerNorm(text_width)
            self.text_projection = nn.Parameter(torch.empty(text_width, embed_dim))

    def encode_image(self, images: Tensor) -> Tensor:
        """images [b, 3, H, W], preprocessed -> features [b, e], not normalised"""
        return self.visual(images)

    def encode_text(self, ids: Tensor) -> Tensor:
        """ids [b, L] -> features [b, e], not normalised; ValueError for an image tower alone."""
        self.require_text()
        eot = ids.argmax(dim=-1)  # end-of-text has the largest id
        ids = ids[:, : int(eot.max()) + 1]  # attention is causal: what follows is not read
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        x = self.transformer(x, causal=True)
        return self.ln_final(x[torch.arange(len(x), device=x.device), eot]) @ self.text_projection

    def require_text(self) -> None:
        if not self.has_text:
            raise ValueError("these weights are an image tower alone: use a full CLIP file or, for "
                             "UCDR-Adapter, --class-features prototypes")

    @classmethod
    def from_state_dict(cls, sd: Mapping[str, Tensor]) -> "CLIP":
        """The model that the shapes describe, frozen, in float32.

        Raises ValueError for another family than ViT, RuntimeError that lists missing and unexpected keys.
        """
        with torch.device("meta"):
            model = cls(**infer_architecture(sd))
        own = {key: value.to(torch.float32, copy=True) for key, value in sd.items()
               if model.has_text or key != "logit_scale"}  # an image tower does not use it
        model.load_state_dict(own, assign=True)
        return model.eval().requires_grad_(False)


def infer_architecture(sd: Mapping[str, Tensor]) -> dict[str, int]:
    """The arguments of `CLIP`"""
    if "visual.proj" not in sd:
        raise ValueError("no ViT CLIP (ViT-B/32, B/16, L/14; a ResNet?): visual.proj is missing")
    layers = [key.split(".")[0] for key in sd if key.endswith(".ln_1.weight")]  # "visual" or "transformer"
    width, _, _, patch = sd["visual.conv1.weight"].shape
    if width > 1024:  # such models' heads are wider than 64
        raise ValueError(f"vision width {width}: larger than ViT-L")
    grid = math.isqrt(len(sd["visual.positional_embedding"]) - 1)
    arch = dict(image_size=grid * patch, patch=patch, embed_dim=sd["visual.proj"].shape[1],
                vision_width=width, vision_layers=layers.count("visual"))
    if "token_embedding.weight" in sd:
        vocabulary, width = sd["token_embedding.weight"].shape
        arch.update(context_length=len(sd["positional_embedding"]), vocab_size=vocabulary, text_width=width,
                    text_layers=layers.count("transformer"))
    return arch
