"""The demonstration is honest: its CLIP saw none of its images, and training sees nothing of the query side."""
from pathlib import Path

import numpy as np
import torch

from ucdr_ref.clip.weights import load_clip
from ucdr_ref.demo import pretrain
from ucdr_ref.demo.drawing import CLASSES, DOMAINS, draw
from ucdr_ref.demo.pretrain import CAPTIONS, SHAPE, random_clip, sample_pair

WEIGHTS = Path(__file__).resolve().parents[2] / "weights" / "demo-clip.pt"


def test_pairs_are_reproducible_and_uneven():
    pairs = [sample_pair(0, i) for i in range(100)]
    again = sample_pair(0, 7)
    assert np.array_equal(pairs[7][0], again[0]) and pairs[7][1] == again[1]
    assert not np.array_equal(sample_pair(1, 7)[0], again[0])
    texts = [caption for _, caption in pairs]
    drawn = sum(any(word in text for word in ("sketch", "drawing", "draw", "doodle", "scribbled")) for text in texts)
    assert drawn < 50 < sum(any(name.replace("_", " ") in text for name in CLASSES) for text in texts)
    assert set(CAPTIONS) == set(DOMAINS)


def test_pretraining_never_draws_a_benchmark_image(monkeypatch):
    """The seed strings differ, and so do the pictures: none of 120 pairs equals a benchmark image of any class and domain."""
    seeds = []

    def noting(name, domain, seed, *size):
        seeds.append(seed)
        return draw(name, domain, seed, *size)

    monkeypatch.setattr(pretrain, "draw", noting)
    seen = {sample_pair(0, i)[0].tobytes() for i in range(120)}
    assert len(seeds) == 120 and all(seed.startswith("web/") for seed in seeds)
    benchmark = {np.asarray(draw(name, domain, "0/0")).tobytes() for name in CLASSES[::6] for domain in DOMAINS}
    assert not seen & benchmark and len(seen) == 120


def test_the_small_clip_starts_and_ships_as_promised():
    torch.manual_seed(0)
    clip = random_clip(**SHAPE)
    assert clip.encode_image(torch.randn(2, 3, 96, 96)).std() > 0.01
    assert WEIGHTS.stat().st_size <= 10_000_000
    shipped = load_clip(WEIGHTS)
    assert shipped.image_size == 96 and shipped.embed_dim == 64 and shipped.context_length == 77
    assert {name: value.shape for name, value in shipped.state_dict().items()} \
        == {name: value.shape for name, value in clip.state_dict().items()}
