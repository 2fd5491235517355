"""The closed forms as experiments: trained in one pass, evaluated beside CLIP, resumed, and on top of a trained adapter."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import evaluate
import train
from tests.helpers import flags, refused
from ucdr_ref.config import Config
from ucdr_ref.experiments import ranking
from ucdr_ref.experiments.experiment import restore
from ucdr_ref.experiments.ranking import FeatureTable
from ucdr_ref.experiments.retrieval import prepare
from ucdr_ref.images.batches import Files
from ucdr_ref.images.features import Extractor
from ucdr_ref.machine.files import load_state
from ucdr_ref.metrics import retrieval
from ucdr_ref.ucdr import closed_form

CPU = torch.device("cpu")


def rows(folder: Path) -> dict[tuple[str, str], dict]:
    found = json.loads((folder / "results.json").read_text())["rows"]
    return {(row["method"], row.get("gallery_name", "")): row for row in found}


@pytest.fixture(scope="module")
def form_run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "form"
    assert train.main(flags(world, folder, "--method", "closed-form", "--selection", "last")) == 0
    return folder


def features(config: Config, encode_of: Path, files: Files) -> torch.Tensor:
    _, method, _ = restore(encode_of, {}, CPU)
    return FeatureTable(Extractor(method, config, CPU)).of(files)[0]


def test_a_closed_form_run_is_the_form_of_its_training_images(form_run, world, tmp_path):
    assert train.main(flags(world, tmp_path / "zs", "--method", "zero-shot")) == 0
    config, method, _ = restore(form_run, {}, CPU)
    protocol = prepare(config)[1]
    z = features(config, tmp_path / "zs", protocol.train)
    class_ids = torch.tensor([protocol.class_names.index(name) for name in protocol.train.classes])
    domain_ids = torch.tensor([protocol.domain_names.index(name) for name in protocol.train.domains])
    form = closed_form.measure(z, class_ids, domain_ids, 2).form(3.0)
    torch.testing.assert_close(method.form.whitening, form.whitening)
    test = protocol.tests[0]
    query, gallery = (form(features(config, tmp_path / "zs", files)) for files in (test.query, test.galleries["unseen"]))
    names = sorted(set(test.query.classes))
    labels = [torch.tensor([names.index(name) for name in files.classes]) for files in (test.query, test.galleries["unseen"])]
    found = rows(form_run)
    expected = retrieval(query, labels[0], gallery, labels[1])["mAP@all"]
    assert found["closed-form", "unseen"]["mAP@all"] == pytest.approx(expected, abs=1e-6)
    moved = [F.normalize(part - part.mean(dim=0), dim=1) for part in (query, gallery)]
    expected = retrieval(moved[0], labels[0], moved[1], labels[1])["mAP@all"]
    row = found["closed-form, centred", "unseen"]
    assert row["mAP@all"] == pytest.approx(expected, abs=1e-6) and row["transductive"]
    assert not found["closed-form", "unseen"]["transductive"] and ("zero-shot, centred", "mixed") in found


def test_the_same_command_again_and_an_evaluation_give_the_same(form_run, world, tmp_path):
    before = load_state(form_run / "best.pt")["method"]
    first = rows(form_run)
    assert train.main(flags(world, form_run, "--method", "closed-form", "--selection", "last")) == 0
    again = load_state(form_run / "best.pt")["method"]
    assert before.keys() == again.keys() == {"form.mean", "form.subspace", "form.whitening"}
    assert all(torch.equal(before[name], again[name]) for name in before)
    assert evaluate.main(["--run", str(form_run), "--out", str(tmp_path), "--workers", "0"]) == 0
    assert rows(tmp_path) == first == rows(form_run)


def test_lambda_is_chosen_without_the_test_classes(world, tmp_path, monkeypatch):
    seen, scored = [], []
    choose, score = closed_form.choose_strength, ranking.validation_score

    def noting(measured, score):
        strength = choose(measured, score)
        seen.append(strength)
        return strength

    def scoring(rows, test, selected):
        scored.append((test, selected[0]))
        return score(rows, test, selected)

    monkeypatch.setattr("ucdr_ref.experiments.retrieval.choose_strength", noting)
    monkeypatch.setattr("ucdr_ref.experiments.retrieval.validation_score", scoring)
    assert train.main(flags(world, tmp_path / "chosen", "--method", "closed-form")) == 0
    assert len(seen) == 1 and seen[0] in closed_form.STRENGTHS
    assert len(scored) == len(closed_form.STRENGTHS)
    held_out, validated = "sketch", set(json.loads((world / "split.json").read_text())["val"])
    for test, gallery in scored:
        assert set(test.query.classes) == set(test.galleries[gallery].classes) == validated
        assert held_out not in {test.query_domain, *test.query.domains, *test.galleries[gallery].domains}
    assert train.main(flags(world, tmp_path / "last", "--method", "closed-form", "--selection", "last")) == 0
    assert len(seen) == 1  # no validation classes: nothing is chosen


def test_with_closed_form_adds_a_row_to_any_run(world, tmp_path, form_run):
    assert train.main(flags(world, tmp_path / "zs", "--method", "zero-shot", "--selection", "last")) == 0
    call = ["--run", str(tmp_path / "zs"), "--out", str(tmp_path / "out"), "--workers", "0"]
    assert evaluate.main([*call, "--with-closed-form"]) == 0
    key = ("closed-form", "mixed")
    assert rows(tmp_path / "out")[key]["mAP@all"] == pytest.approx(rows(form_run)[key]["mAP@all"], abs=1e-6)


def test_one_source_domain_leaves_no_subspace(world, tmp_path):
    run = tmp_path / "one"
    assert train.main(flags(world, run, "--method", "closed-form", "--domains", "photo", "sketch", "--gallery", "photo")) == 0
    assert load_state(run / "best.pt")["method"]["form.subspace"].shape == (32, 0)


def test_a_closed_form_of_another_width_is_refused(form_run, tmp_path, capsys):
    state = load_state(form_run / "best.pt")
    state["method"]["form.whitening"] = torch.eye(7)
    broken = tmp_path / "broken"
    broken.mkdir()
    torch.save(state, broken / "best.pt")
    refused(capsys, evaluate.main(["--run", str(broken)]), "form.whitening", "7")
