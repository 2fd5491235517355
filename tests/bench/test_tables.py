"""The commands that measure training and retrieval: what they would run, what they read back, the tables they print."""
import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.helpers import tiny_state_dict
from ucdr_ref import metrics
from ucdr_ref.bench import drawn, frozen, real, record, speed
from ucdr_ref.config import FIELDS, Config, add_arguments, resolve

DOCS = Path(__file__).parents[2] / "docs"
CLASSES = {"seen": ["cat", "dog", "cow"], "val_unseen": ["pig", "hen"], "unseen": ["bat", "bee", "elk", "fox", "owl"]}


def parse(flags: list[str]) -> Config:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return resolve(vars(parser.parse_args(flags)))


def config(job: real.Job) -> Config:
    return parse([*real.shared_flags(job.held_out, Path("data"), Path("w.pt")), *real.SETTINGS["cpu"], *real.VARIANTS[job.variant]])


def test_a_variant_changes_what_its_name_says():
    assert [job.name for job in real.PLAN[:7]] == ["sketch-paper-0", "quickdraw-paper-0", "clipart-paper-0", "icon-paper-0",
                                                   "sketch-paper-1", "sketch-paper-2", "sketch-no-inversion-0"]
    paper = config(real.Job("sketch", "paper", 0))
    assert (paper.held_out, paper.seen, paper.gallery, paper.selection) == ("sketch", "quickdraw", "photo", "last")
    assert set(paper.domains) == {"photo", *real.DOMAINS} and (paper.target_batch, paper.target_epochs) == (16, 1)
    for variant, expected in {"no mask": {"mask": "none"}, "feature token 1": {"feature_token": 1},
                              "phase 1 only": {"target_epochs": 0}, "no inversion": {"stroke_domains": ("none",)}}.items():
        found = config(real.Job("sketch", variant, 0))
        assert {name: getattr(found, name) for name in FIELDS if getattr(found, name) != getattr(paper, name)} == expected
    assert config(real.Job("sketch", "released", 0)).selection == "test"


@pytest.mark.parametrize("part", drawn.PARTS)
def test_flags_of_the_drawn_benchmark_are_flags(part):
    """Each entry of a ledger differs from the paper's column in fields that its flags name."""
    for name, flags in drawn.PARTS[part].items():
        found = parse(flags.split())
        if "ledger" in part and name not in ("paper", "all"):
            paper = parse(drawn.PARTS[part]["paper"].split())
            changed = {name for name in FIELDS if getattr(found, name) != getattr(paper, name)}
            assert 1 <= len(changed) <= 2 and all(f"--{field.replace('_', '-')}" in flags for field in changed), name


def test_table_of_real_images_holds_means_over_seeds_and_domains():
    def row(domain, method, value, seed=0, transductive=False):
        return {"held_out": domain, "method": method, "transductive": transductive, "seed": seed,
                "unseen": {"mAP@all": value}, "mixed": {"mAP@all": value / 2}}

    rows = [row(domain, "zero-shot", 10.0 * k) for k, domain in enumerate(real.DOMAINS, 1)]
    rows += [row("sketch", "ucdr-adapter", value, seed) for seed, value in enumerate((35.0, 41.0))]
    rows += [row("icon", "zero-shot", 5.0, transductive=True)]
    lines = real.table(rows, "unseen").splitlines()
    assert "unseen" in lines[0] and "(n seeds)" in lines[0]
    assert lines[2:] == ["| zero-shot | 10.0 | 20.0 | 30.0 | 40.0 | 25.0 |", "| UCDR-Adapter | 38.0 ± 4.2 (2) | - | - | - | - |",
                         "| zero-shot, centred (transductive) | - | - | - | 5.0 | - |"]
    assert real.both(rows).splitlines()[3] == "| UCDR-Adapter | 38.0 ± 4.2 / 19.0 ± 2.1 (2) | - | - | - | - |"


def test_committed_times_are_read():
    for path in DOCS.glob("speed-*.json"):
        assert "| phase 1, a step |" in speed.table(json.loads(path.read_text())["parts"])


def test_rows_without_training(tmp_path, capsys, monkeypatch):
    """Images are encoded once; `centred by the sources` by hand; every row in both galleries."""
    data, rng = tmp_path / "images", np.random.default_rng(0)
    for domain in ("photo", "render", *real.DOMAINS):
        for name in sum(CLASSES.values(), []):
            (data / domain / name).mkdir(parents=True)
            for i in range(3):
                coarse = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
                coarse.resize((40, 36), Image.Resampling.BICUBIC).save(data / domain / name / f"{i}.png")
    (data / "splits.json").write_text(json.dumps(CLASSES))
    tower = tmp_path / "tower.pt"
    torch.save({key: value for key, value in tiny_state_dict().items() if key.startswith("visual.")}, tower)
    flags = ["--data", str(data), "--weights", str(tower), "--out", str(tmp_path / "out"), "--trainings", "0", "--workers", "0"]
    caches, encode_all = [], real.encode_all
    monkeypatch.setattr(real, "encode_all", lambda *given: caches.append(encode_all(*given)) or caches[-1])
    assert real.main([*flags, "--machine", "x"]) == 0
    found = json.loads((tmp_path / "out" / "real-x.json").read_text())
    features = caches[0]["strokes"]
    assert len(features.rows) == 5 * 10 * 3 and not any("render" in path for path in features.rows)
    sketches = [path for path in features.rows if "/sketch/" in path]
    assert all(not torch.equal(features.rows[path], caches[0]["none"].rows[path]) for path in sketches)
    rows = [row for row in found["frozen"] if row["inversion"] == "strokes" and row["held_out"] == "icon"]
    assert [(row["method"], row["transductive"]) for row in rows] == [
        ("zero-shot", False), ("zero-shot", True), ("zero-shot, closed form", False), ("zero-shot, closed form", True),
        (frozen.BY_SOURCES, False)]
    assert [row["lambda"] is None for row in rows] == [True, True, False, False, True]

    config = parse([*real.shared_flags("icon", data, tower), *real.SETTINGS["cpu"], "--selection", "validation"])
    protocol = frozen.build_protocol(config)
    test = protocol.tests[0]
    moved = []
    for files, domain in ((test.query, "sketch"), (test.galleries["unseen"], "photo")):
        others = [features.rows[path] for path, of in zip(protocol.train.paths, protocol.train.domains) if of == domain]
        mean = F.normalize(torch.stack(others), dim=1).mean(0)
        moved += [F.normalize(F.normalize(features.encode(files), dim=1) - mean),
                  torch.tensor([CLASSES["unseen"].index(name) for name in files.classes])]
    assert rows[-1]["unseen"]["mAP@all"] == pytest.approx(100 * metrics.retrieval(*moved)["mAP@all"], abs=2e-3)
    monkeypatch.setattr("ucdr_ref.data.features.stream_features", lambda *_: pytest.fail("encoded a second time"))
    assert real.main([*flags, "--machine", "y"]) == 0
    assert json.loads((tmp_path / "out" / "real-y.json").read_text())["frozen"] == found["frozen"]
    assert str(tmp_path) not in json.dumps(found)


def test_a_training_that_fails_ends_all_and_a_finished_one_is_not_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(record, "ROOT", tmp_path)  # without a train.py
    assert drawn.main(["--jobs", "1", "--runs", str(tmp_path)]) == 2
    assert "ended with 2; the same command goes on" in capfd.readouterr().err
    row = {"protocol": "UCDR", "gallery_name": "unseen", "method": "zero-shot", "mAP@200": 0.5}
    (tmp_path / "default-7").mkdir()
    (tmp_path / "default-7" / "results.json").write_text(json.dumps({"rows": [row]}))
    assert drawn.measured("query sketch", 7, [], tmp_path)["numbers"] == {"UCDR unseen zero-shot": 50.0}
