"""Trains the small CLIP of the demonstration on drawn image-caption pairs: `python -m ucdr_ref.demo --pretrain FILE`.

The pairs are a web-like mix: photographs abound, doodles are rare, some classes are seldom drawn in some domains; captions
always tell colours, mostly the domain and sometimes not the object. So the features hold much besides the class, and zero-shot
retrieval across domains is decent but can be improved, as with the real CLIP.
"""
import math
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..cli import save_atomic
from ..clip.model import CLIP
from ..clip.tokenizer import tokenize
from ..clip.zero_shot import CLIP_MEAN, CLIP_STD
from .drawing import CLASSES, DOMAINS, draw

SIZE = 96
SHAPE = dict(image_size=SIZE, patch=16, vision_width=128, vision_layers=4, embed_dim=64, context_length=77,
             vocab_size=49408, text_width=64, text_layers=3)  # 9 MB in half precision, most of it the vocabulary
DOMAIN_WEIGHTS = {"real": 40, "painting": 14, "clipart": 13, "infograph": 13, "sketch": 11, "quickdraw": 9}
CHALK = 0.35  # share of the strokes that are white on black, as on a blackboard
COLOURS = {"black": (30, 30, 30), "grey": (128, 128, 128), "white": (235, 235, 235), "red": (190, 70, 60), "brown": (130, 95, 65),
           "yellow": (210, 185, 85), "green": (90, 140, 80), "blue": (85, 115, 170), "purple": (135, 90, 140),
           "pink": (220, 165, 165)}
CAPTIONS = {
    "real": ("a photo of a {}", "a photo of a {}", "photo of my {}", "the {} in the garden", "a {}", "look at this {}",
             "a nice photo"),
    "painting": ("a painting of a {}", "oil painting: {}", "a {} by an unknown artist", "impressionist {}", "an old painting"),
    "clipart": ("clipart of a {}", "a {} icon", "cartoon {}", "free vector {}", "a {}", "colourful clipart"),
    "infograph": ("infographic about the {}", "facts about the {}", "{} statistics", "a chart", "an infographic"),
    "sketch": ("a sketch of a {}", "pencil drawing of a {}", "how to draw a {}", "a {} drawing", "my sketchbook"),
    "quickdraw": ("a doodle of a {}", "quick drawing of a {}", "scribbled {}", "a {} doodle", "a doodle"),
}


def random_clip(**shape: int) -> CLIP:
    """CLIP(**shape) with the initial values of Radford et al., drawn from torch's global generator."""
    clip = CLIP(**shape)
    for name, parameter in clip.named_parameters():
        tower = "vision" if name.startswith("visual.") else "text"
        module, _, leaf = name.rpartition(".")
        width, layers = shape[f"{tower}_width"], shape[f"{tower}_layers"]
        if name == "logit_scale":
            nn.init.constant_(parameter, math.log(1 / 0.07))
        elif "ln_" in name or leaf.endswith("bias"):
            nn.init.constant_(parameter, float(leaf == "weight"))
        elif module.endswith(("out_proj", "c_proj")):
            nn.init.normal_(parameter, std=(2 * layers * width) ** -0.5)
        elif module.endswith("c_fc"):
            nn.init.normal_(parameter, std=(2 * width) ** -0.5)
        elif "token_embedding" in name or "positional_embedding" in name:
            nn.init.normal_(parameter, std=0.02)
        else:  # class token, patches, in_proj, both projections
            inputs = 3 * shape["patch"] ** 2 if parameter.dim() == 4 else width
            nn.init.normal_(parameter, std=inputs ** -0.5)
    return clip


def sample_pair(seed: int, index: int) -> tuple[np.ndarray, str]:
    """Pair `index`: an image [96, 96, 3] of 0..255 and its caption. No benchmark image is drawn from these seeds."""
    r = Random(f"web/{seed}/{index}")
    domain = r.choices(DOMAINS, [DOMAIN_WEIGHTS[name] for name in DOMAINS])[0]
    # A class's share in a domain varies by a factor of up to 8, and differently in every domain.
    shares = [2 ** (3 * Random(f"share/{domain}/{name}").random()) for name in CLASSES]
    name = r.choices(CLASSES, shares)[0]
    caption = r.choice(CAPTIONS[domain]).format(name.replace("_", " "))
    image = np.asarray(draw(name, domain, f"web/{seed}/{index}", SIZE))
    if domain in ("sketch", "quickdraw") and r.random() < CHALK:
        image = 255 - image
    third, edge = SIZE // 3, SIZE // 6
    parts = image[third:-third, third:-third], image[:, :edge], image[:edge], image[-edge:]
    return image, caption + ", {} on {}, {} above, {} below".format(*map(colour, parts))


def colour(pixels: np.ndarray) -> str:
    """The name of the mean colour of pixels [H, W, 3]."""
    mean = pixels.reshape(-1, 3).mean(0)
    return min(COLOURS, key=lambda name: float(np.square(mean - COLOURS[name]).sum()))


def sample_pairs(seed: int, count: int, workers: int = 2) -> tuple[Tensor, list[str]]:
    """Images [count, 3, 96, 96] uint8 and their captions."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        pairs = list(pool.map(sample_pair, [seed] * count, range(count), chunksize=200))
    return torch.from_numpy(np.stack([image for image, _ in pairs])).permute(0, 3, 1, 2), [caption for _, caption in pairs]


def jitter(images: Tensor) -> Tensor:
    """uint8 [b, 3, H, W] -> normalised floats, each mirrored at random and shifted by up to 6 pixels."""
    images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
    shift = torch.randint(-6, 7, (2,)).tolist()
    images = images.roll(shift, (2, 3)).float() / 255
    return (images - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def pretrain(path: str, pairs: int = 40000, epochs: int = 10, batch: int = 64, lr: float = 1.5e-3, muon_lr: float = 0.02,
             seed: int = 0) -> None:
    """Trains from scratch (Muon for the blocks' matrices, AdamW for the rest) and writes a half-precision state dict.

    The loss is CLIP's symmetric contrast, plus the cross-entropy of a linear head that names the caption's words from the image
    feature before projection, each word weighted by the logarithm of its rarity: on so few pairs the contrast alone learns
    slowly. The head is thrown away. Raises ValueError with a PyTorch that has no Muon.
    """
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"training the CLIP needs PyTorch 2.9 or newer for torch.optim.Muon, this is {torch.__version__}; "
                         "upgrade, or use the weights that are there")
    start = time.monotonic()
    images, captions = sample_pairs(seed, pairs)
    ids = tokenize(captions)
    words = F.one_hot(torch.unique(ids, return_inverse=True)[1]).amax(1).float()
    words *= (pairs / words.sum(0)).log()
    words /= words.sum(1, keepdim=True)
    torch.manual_seed(seed)
    clip, head = random_clip(**SHAPE), nn.Linear(SHAPE["vision_width"], words.shape[1])
    matrices = [p for name, p in clip.named_parameters() if "resblocks" in name and p.dim() == 2]
    kept = {id(p) for p in matrices}
    rest = [p for p in (*clip.parameters(), *head.parameters()) if id(p) not in kept]
    groups = [{"params": [p for p in rest if p.dim() > 1], "weight_decay": 0.1},
              {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0}]
    optimizers = {torch.optim.Muon(matrices, weight_decay=0.1): muon_lr, torch.optim.AdamW(groups, betas=(0.9, 0.98)): lr}
    steps = epochs * (pairs // batch)
    for step in range(steps):
        if step % (pairs // batch) == 0:
            order = torch.randperm(pairs)
        rows = order[step % (pairs // batch) * batch:][:batch]
        share = min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for optimizer, highest in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = highest * share
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # the fused one is slow backward, so small
            visual, pixels = clip.visual, jitter(images[rows])
            token = visual.blocks(torch.cat([visual.class_token(batch), visual.embed(pixels)], dim=1), at=0)
            x, t = visual.pool(token), clip.encode_text(ids[rows])
            named = head(visual.ln_post(token))
        x, t = F.normalize(x.float(), dim=-1), F.normalize(t.float(), dim=-1)
        logits = clip.logit_scale.exp() * x @ t.T
        target = torch.arange(batch)
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        loss = contrast + F.cross_entropy(named.float(), words[rows])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=math.log(100))
        if (step + 1) % 50 == 0:
            seconds = time.monotonic() - start
            print(f"step {step + 1}/{steps} | loss {loss.item():.3f} contrast {contrast.item():.3f} | {seconds:.0f} s",
                  file=sys.stderr, flush=True)
    save_atomic({name: value.detach().half() for name, value in clip.state_dict().items()}, Path(path))
