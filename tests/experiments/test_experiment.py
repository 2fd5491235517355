"""Run folders: what they record, who may go on in them, and one sentence for everything that does not fit."""
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evaluate
import train
from tests.helpers import LONGER, flags, logged, refused, results, same_runs, tiny_state_dict
from ucdr_ref.cli import load_state
from ucdr_ref.clip.weights import file_digest
from ucdr_ref.config import from_dict
from ucdr_ref.experiments import retrieval
from ucdr_ref.ucdr.adapter import UCDRAdapter


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main(flags(world, run, *LONGER)) == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def call(run: Path, *more: str) -> list[str]:
    return ["--run", str(run), "--workers", "0", *more]


def test_what_a_run_records(world, finished):
    config, about = (json.loads((finished / name).read_text()) for name in ("config.json", "run.json"))
    assert from_dict(config) == from_dict(load_state(finished / "best.pt")["config"])
    assert about["weights_sha256"] == file_digest(world / "clip.pt") and isinstance(about["command"], list)
    assert {"ucdr_ref", "python", "torch", "torchvision", "pillow", "machine", "gpu"} <= set(about["versions"])
    assert {"train", "validation query", "UCDR query", "UCDR gallery unseen", "UCDR gallery mixed"} <= set(about["files"])
    assert all(count > 0 and len(digest) == 64 for count, digest in about["files"].values())
    steps = [(line["phase"], line["epoch"], line["step"]) for line in logged(finished) if "step" in line]
    assert len(set(steps)) == len(steps) and {phase for phase, *_ in steps} == {"source", "target"}
    found = results(finished)
    assert found["remarks"] == [] and "zero-shot" in found["table"] and from_dict(found["config"]) == from_dict(config)


def test_the_same_command_goes_on_to_the_same_end(world, finished, tmp_path, monkeypatch, capsys):
    """Also after the world has moved to another folder, and once it is finished it only evaluates."""
    before, after, run, count = tmp_path / "before", tmp_path / "after", tmp_path / "run", 0
    shutil.copytree(world, before)
    step = UCDRAdapter.step

    def stopped(*given):
        nonlocal count
        count += 1
        if count == 7:
            signal.raise_signal(signal.SIGTERM)
        return step(*given)

    with monkeypatch.context() as patch:
        patch.setattr(UCDRAdapter, "step", stopped)
        assert train.main(flags(before, run, *LONGER)) == 130
    assert "stopped by SIGTERM in phase" in capsys.readouterr().err
    before.rename(after)
    refused(capsys, train.main(flags(after, run, *LONGER, "--target-lr", "0.5")), "target_lr: 0.01 -> 0.5", "name another --run")
    refused(capsys, evaluate.main(call(tmp_path / "no")), "holds no best.pt; train first")
    assert train.main(flags(after, run, *LONGER)) == 0
    assert "resumed from phase" in capsys.readouterr().out
    same_runs(finished, run, ignored=("data_root", "class_split", "weights"))
    moved = call(run, "--weights", str(after / "clip.pt"), "--data-root", str(after / "data"))
    assert evaluate.main([*moved, "--class-split", str(after / "split.json")]) == 0
    assert results(run)["rows"] == results(finished)["rows"]
    monkeypatch.setattr(UCDRAdapter, "step", None)
    assert train.main(flags(after, run, *LONGER)) == 0
    assert "finished already; evaluating" in capsys.readouterr().out


def test_another_folder_is_refused(world, run, capsys):
    refused(capsys, train.main(flags(world, world / "data")), "is no run folder")


def test_a_checkpoint_of_another_config_is_refused(run, tmp_path, capsys):
    state = load_state(run / "best.pt")
    torch.save({**state, "config": {**state["config"], "target_lr": 0.5}}, tmp_path / "copied.pt")
    shutil.copy(tmp_path / "copied.pt", run / "best.pt")
    refused(capsys, evaluate.main(call(run)), "best.pt", "another config (target_lr: 0.5 -> 0.01)")


def test_other_images_and_weights_never_pass_for_the_run_s_own(world, run, tmp_path, capsys):
    """Moved ones do."""
    data, weights = Path(shutil.copytree(world / "data", tmp_path / "data")), tmp_path / "moved.pt"
    shutil.copy(world / "clip.pt", weights)
    assert evaluate.main(call(run, "--data-root", str(data), "--weights", str(weights))) == 0
    before = (run / "results.json").read_bytes()
    shutil.copy(data / "photo" / "shape_6" / "0.png", data / "photo" / "shape_6" / "new.png")
    images, changed = ["--data-root", str(data)], "other images than the run's (UCDR gallery unseen: 13 now, 12 at the start)"
    refused(capsys, train.main(flags(world, run, *LONGER, *images)), changed)
    refused(capsys, evaluate.main(call(run, *images)), changed, "--force")
    torch.save(tiny_state_dict(1), tmp_path / "other.pt")
    other = ["--weights", str(tmp_path / "other.pt")]
    refused(capsys, train.main(flags(world, run, *LONGER, *other)), "other weights")
    refused(capsys, evaluate.main(call(run, *other)), "its sha256 differs", "--force")
    assert evaluate.main(call(run, *images, *other, "--force")) == 0
    for text in (capsys.readouterr().out, results(run / "forced")["table"]):
        assert changed in text and "other weights than the run's" in text
    assert (run / "results.json").read_bytes() == before
    torch.save(tiny_state_dict(embed_dim=48), tmp_path / "wide.pt")
    refused(capsys, evaluate.main(call(run, "--weights", str(tmp_path / "wide.pt"), "--force")), "32", "48")


def test_an_unfinished_run_says_so(run, capsys):
    (run / "results.json").unlink()
    refused(capsys, evaluate.main(call(run)), "the training has not finished; --force")
    assert evaluate.main(call(run, "--force")) == 0 and not (run / "results.json").exists()
    assert results(run / "forced")["remarks"] == ["the training has not finished"]
    (run / "best.pt").unlink()
    refused(capsys, evaluate.main(call(run)), f"{run} holds no best.pt; run the command in its run.json, which goes on")


def test_the_advice_for_a_lost_model_leads_out(world, finished, run, capsys):
    advice = f"delete results.json and last.pt in {run}, then run the command in its run.json"
    (run / "best.pt").write_bytes((run / "best.pt").read_bytes()[:1000])
    refused(capsys, evaluate.main(call(run)), "is no checkpoint of this package", f"; {advice}")
    (run / "best.pt").unlink()
    refused(capsys, evaluate.main(call(run)), "holds no best.pt", advice)
    (run / "results.json").unlink()
    (run / "last.pt").unlink()
    assert train.main(flags(world, run, *LONGER)) == 0
    same_runs(finished, run)


@pytest.mark.parametrize("name", ["config.json", "run.json", "log.jsonl", "last.pt"])
def test_a_damaged_record_is_one_sentence(world, run, capsys, name):
    if name == "last.pt":
        (run / "results.json").unlink()
    for content in (b"[1]\n", b"\xff\n", b"{}\n")[:3 if name == "run.json" else 2]:
        (run / name).write_bytes(content)
        refused(capsys, train.main(flags(world, run, *LONGER)), str(run / name))


def test_two_trainings_never_share_a_run_folder(world, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    code = "import fcntl, sys; file = open(sys.argv[1], 'ab'); fcntl.lockf(file, fcntl.LOCK_EX); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code, str(run / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"1\n"
        refused(capsys, train.main(flags(world, run)), f"another process is training in {run}")
        holder.kill()


def test_compare_prints_tables_and_what_differs(world, run, tmp_path, capsys):
    assert train.main(flags(world, tmp_path / "zs", "--method", "zero-shot", "--seed", "7")) == 0
    capsys.readouterr()
    assert {row["method"] for row in results(tmp_path / "zs")["rows"]} == {"zero-shot"}
    assert evaluate.main(["--compare", str(run), str(tmp_path / "zs")]) == 0
    printed = capsys.readouterr().out
    for folder in (run, tmp_path / "zs"):
        assert f"{folder}\n{results(folder)['table']}\n" in printed
    assert "method: 'ucdr-adapter' -> 'zero-shot'" in printed and "seed: 0 -> 7" in printed
    for content, says in (("{}", "of no evaluation"), ("[1]", "JSON object")):
        (tmp_path / "results.json").write_text(content)
        refused(capsys, evaluate.main(["--compare", str(run), str(tmp_path)]), "results.json", says)


def test_own_folders_get_a_schedule_that_fits_their_size(world, tmp_path, capsys):
    own = ["--dataset", "folder", "--data-root", str(world / "data"), "--weights", str(world / "clip.pt"), "--gallery", "photo",
           "--class-split", str(world / "split.json"), "--context-vectors", "4", "--run", str(tmp_path / "run"), "--dry-run"]
    assert train.main(own) == 0
    printed = capsys.readouterr().out
    assert "phase source: 50 steps of 20 images" in printed and "phase target: 100 steps of 20 images" in printed
    assert '"source_batch": 20, "source_epochs": 25, "source_lr": 0.001' in printed
    assert train.main([*own, "--target-epochs", "1"]) == 0
    assert "phase target: 2 steps of 20 images (few" in capsys.readouterr().out  # what was given stays


@pytest.mark.parametrize("smallest, domains", [(3, 1), (10, 2), (25, 4), (500, 5), (40_000, 3)])
def test_the_schedule_for_any_size(smallest, domains):
    """At least 50 and 100 steps."""
    names = [f"d{i}" for i in range(domains)]
    train_files = retrieval.Files(*[[name for name in names for _ in range(smallest)]] * 3)
    found = retrieval.fitting_schedule(train_files)
    for phase, wanted, largest in (("source", 50, 400), ("target", 100, 50)):
        ids = [names.index(name) for name in train_files.domains]
        steps = len(retrieval.balanced_batches(ids, found[f"{phase}_batch"], 0, 0)) * found[f"{phase}_epochs"]
        assert steps >= wanted and domains <= found[f"{phase}_batch"] <= largest


@pytest.mark.parametrize("dataset", ["toy", "domainnet"])
def test_forgetting_the_dataset_says_to_add_it(world, tmp_path, capsys, dataset):
    given = ["--dataset", dataset, "--data-root", str(world / "data"), "--weights", str(world / "clip.pt")]
    refused(capsys, train.main([*given, "--run", str(tmp_path / "run")]), "--dataset folder")
    assert not (tmp_path / "run").exists()
