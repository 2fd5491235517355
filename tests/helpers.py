"""What several tests need: small CLIPs, a small world of images, flags of a short run, comparisons of runs and refusals."""
import json
import math
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from ucdr_ref.cli import load_state


def clip_shapes(*, image_size: int = 32, patch: int = 8, vision_width: int = 64, vision_layers: int = 2, embed_dim: int = 32,
                text_width: int = 64, text_layers: int = 2, vocab_size: int = 49408,
                context_length: int = 77) -> dict[str, tuple[int, ...]]:
    """{OpenAI key: shape} of a ViT CLIP."""
    def blocks(prefix: str, w: int, layers: int) -> dict[str, tuple[int, ...]]:
        block = {"attn.in_proj_weight": (3 * w, w), "attn.in_proj_bias": (3 * w,), "attn.out_proj.weight": (w, w),
                 "attn.out_proj.bias": (w,), "ln_1.weight": (w,), "ln_1.bias": (w,), "mlp.c_fc.weight": (4 * w, w),
                 "mlp.c_fc.bias": (4 * w,), "mlp.c_proj.weight": (w, 4 * w), "mlp.c_proj.bias": (w,), "ln_2.weight": (w,),
                 "ln_2.bias": (w,)}
        return {f"{prefix}transformer.resblocks.{i}.{name}": size for i in range(layers) for name, size in block.items()}

    d, t = vision_width, text_width
    return {"visual.class_embedding": (d,), "visual.positional_embedding": (1 + (image_size // patch) ** 2, d),
            "visual.proj": (d, embed_dim), "visual.conv1.weight": (d, 3, patch, patch),
            "visual.ln_pre.weight": (d,), "visual.ln_pre.bias": (d,), "visual.ln_post.weight": (d,), "visual.ln_post.bias": (d,),
            **blocks("visual.", d, vision_layers), **blocks("", t, text_layers),
            "token_embedding.weight": (vocab_size, t), "positional_embedding": (context_length, t),
            "ln_final.weight": (t,), "ln_final.bias": (t,), "text_projection": (t, embed_dim), "logit_scale": ()}


def state_dict(shapes: dict[str, tuple[int, ...]], draw: Callable[..., Tensor], logit_scale: float, gain: float, bias: float,
               conv: float) -> dict[str, Tensor]:
    """What `draw` gives for each key, shape and scale: gain / sqrt(inputs) for a matrix; LayerNorm's weights lie around 1."""
    sd = {}
    for key, shape in shapes.items():
        if key == "logit_scale":
            sd[key] = torch.tensor(logit_scale)
        elif key.endswith(".weight") and any(part.startswith("ln_") for part in key.split(".")):
            sd[key] = 1 + draw(key, shape, 0.1)
        elif key.endswith("bias"):
            sd[key] = draw(key, shape, bias)
        elif key.endswith("embedding") or key == "token_embedding.weight":
            sd[key] = draw(key, shape, 0.5)
        elif key == "visual.conv1.weight":
            sd[key] = draw(key, shape, conv)
        else:
            inputs = shape[0] if key in ("visual.proj", "text_projection") else shape[1]
            sd[key] = draw(key, shape, gain / math.sqrt(inputs))
    return sd


def tiny_state_dict(seed: int = 0, **shape: int) -> dict[str, Tensor]:
    """A random small CLIP in OpenAI's names, float32; `shape` as in `clip_shapes`. Features are of order 1."""
    generator, shapes = torch.Generator().manual_seed(seed), clip_shapes(**shape)
    conv = 1 / math.sqrt(math.prod(shapes["visual.conv1.weight"][1:]))

    def draw(key: str, size: tuple[int, ...], scale: float) -> Tensor:
        noise = torch.randn(size, generator=generator)
        return scale * noise if scale == 0.1 else noise / (1 / scale)  # to the last bit as ever: tests of rounding hang on it

    return state_dict(shapes, draw, math.log(100.0), 1, 0.1, conv)


def fill(name: str, shape: tuple[int, ...] | list[int], scale: float) -> Tensor:
    """The deterministic values from which the golden numbers were made: uniform-looking in [-scale, scale], float32."""
    x = np.sin((np.arange(math.prod(shape), dtype=np.float64) + crc32(name.encode()) % 10007) * 12.9898) * 43758.5453
    return torch.from_numpy(((2 * (x - np.floor(x)) - 1) * scale).astype(np.float32).reshape(tuple(shape)))


def golden_clip_state_dict(config: dict) -> dict[str, Tensor]:
    """The CLIP of a golden file, from its `config`."""
    names = ("image_size", "patch", "vision_layers", "embed_dim", "text_width", "text_layers")
    shapes = clip_shapes(vision_width=768, **{name: config[name] for name in names})
    return state_dict(shapes, fill, 2.6592, 2, 0.05, 0.05)


HUGGING_FACE = {
    "visual.transformer.resblocks": "vision_model.encoder.layers", "transformer.resblocks": "text_model.encoder.layers",
    "attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "visual.class_embedding": "vision_model.embeddings.class_embedding", "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight", "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm", "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight", "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight", "ln_final": "text_model.final_layer_norm"}


def to_hugging_face(sd: dict[str, Tensor]) -> dict[str, Tensor]:
    """An OpenAI-named state dict under the names of Hugging Face's `CLIPModel`."""
    out = {}
    for key, value in sd.items():
        for ours, theirs in HUGGING_FACE.items():
            key = key.replace(ours, theirs)
        if "attn.in_proj_" in key:
            for letter, rows in zip("qkv", value.chunk(3), strict=True):
                out[key.replace("attn.in_proj_", f"self_attn.{letter}_proj.")] = rows.contiguous()
        else:
            out[key] = (value.t() if key in ("visual_projection.weight", "text_projection.weight") else value).contiguous()
    return out


def write_world(root: Path) -> Path:
    """`data/<domain>/<class>/*.png` of drawn shapes, `split.json`, and `clip.pt`, a random CLIP for images of 32 pixels."""
    for domain, paper, ink in (("photo", "steelblue", "gold"), ("sketch", "white", "black"), ("icon", "white", "crimson")):
        for corners in range(3, 11):
            folder = root / "data" / domain / f"shape_{corners}"
            folder.mkdir(parents=True)
            for i in range(6):
                r = Random(f"{domain}/{corners}/{i}")
                image = Image.new("RGB", (40, 36), paper)
                circle = (20 + r.randint(-4, 4), 18 + r.randint(-3, 3), r.randint(9, 14))
                ImageDraw.Draw(image).regular_polygon(circle, corners, rotation=r.randint(0, 90), fill=ink)
                image.save(folder / f"{i}.png")
    names = [f"shape_{corners}" for corners in range(3, 11)]
    (root / "split.json").write_text(json.dumps({"train": names[::2], "val": names[1::4], "test": names[3::4]}))
    torch.save(tiny_state_dict(), root / "clip.pt")
    return root


def flags(world: Path, run: Path, *more: str) -> list[str]:
    """A short training on `write_world`'s folders; later flags win."""
    return ["--dataset", "folder", "--data-root", str(world / "data"), "--weights", str(world / "clip.pt"), "--run", str(run),
            "--class-split", str(world / "split.json"), "--source-batch", "6", "--source-epochs", "1", "--target-batch", "8", "--target-epochs", "1",
            "--context-vectors", "4", "--workers", "0", *more]


LONGER = ("--target-epochs", "3", "--source-lr", "0.01", "--target-lr", "0.01")


def touch_images(root: Path, domains: Iterable[str], classes: Iterable[str], count: int) -> Path:
    """`count` empty image files in each class folder of each domain."""
    for domain in domains:
        for name in classes:
            folder = root / domain / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i:03d}.png").touch()
    return root


def refused(capsys: pytest.CaptureFixture, code: int, *parts: str) -> None:
    """Exit code 2, and the last line of stderr, the only error, says all of this."""
    error = capsys.readouterr().err
    assert code == 2 and "Traceback" not in error, error
    lines = error.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], error
    for part in parts:
        assert part in lines[-1], (part, lines[-1])


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing more than `size` bytes into a file fails, as on a full disk."""
    import resource  # not on Windows
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def logged(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


def equal(a: Any, b: Any) -> bool:
    """To the last bit, tensors and all that holds them."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def same_runs(a: Path, b: Path, ignored: Iterable[str] = ()) -> None:
    """Weights, optimizer, progress, log and metrics of two run folders are equal; config fields in `ignored` may differ."""
    for name in ("last.pt", "best.pt"):
        states = [load_state(run / name) for run in (a, b)]
        for state in states:
            for field in ignored:
                state["config"].pop(field)
        assert equal(*states), name
    assert (a / "log.jsonl").read_bytes() == (b / "log.jsonl").read_bytes()
    assert results(a)["rows"] == results(b)["rows"]


class Width(nn.Module):
    """Stands for CLIP where only its embedding width matters."""

    def __init__(self, e: int) -> None:
        super().__init__()
        self.embed_dim = e
