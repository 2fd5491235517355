"""A small world for the tests of the whole: three domains, eight classes, a random CLIP."""
from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import torch
from helpers import tiny_state_dict
from PIL import Image, ImageDraw

torch.set_num_threads(1)  # the tests' models are small: more threads only fight for the cores


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data/<domain>/<class>/*.png` of drawn shapes and `split.json`, and `clip.pt`, a random CLIP for
    images of 32 pixels."""
    root = tmp_path_factory.mktemp("world")
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
