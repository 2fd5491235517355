"""What an evaluation is compared with, run folders that someone else sent, images that vanish, names with control characters."""
from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import retrieve
import train
from tests.helpers import LONGER, flags, logged, refused, tiny_state_dict
from ucdr_ref.experiments import classification, experiment, run_folder, trees
from ucdr_ref.experiments.page import log_lines
from ucdr_ref.experiments.report import plain
from ucdr_ref.images.batches import open_image
from ucdr_ref.machine.files import load_state
from ucdr_ref.ucdr.adapter import UCDRAdapter

CLIP_ONLY = ("--method", "zero-shot")


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main(flags(world, run)) == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def call(run: Path, *more: str) -> list[str]:
    return ["--run", str(run), "--workers", "0", *more]


# What is evaluated is what was trained on


def test_moved_data_of_the_same_digest_is_no_other_data(world, run, tmp_path, capsys):
    shutil.copytree(world / "data", tmp_path / "moved")
    before = json.loads((run / "results.json").read_text())["rows"]
    assert evaluate.main(call(run, "--data-root", str(tmp_path / "moved"))) == 0
    found = json.loads((run / "results.json").read_text())
    assert found["other"] == [] and found["rows"] == before and "other data" not in capsys.readouterr().out


def test_numbers_of_other_data_never_pass_for_the_run_s_own(world, run, tmp_path, capsys):
    data = Path(shutil.copytree(world / "data", tmp_path / "data"))
    shutil.copy(data / "photo" / "shape_6" / "0.png", data / "photo" / "shape_6" / "new.png")
    before = (run / "results.json").read_bytes()
    assert evaluate.main(call(run, "--data-root", str(data))) == 2
    error = capsys.readouterr().err
    assert "not those that" in error and "--other-data" in error
    assert (run / "results.json").read_bytes() == before and not (run / "other-data").exists()
    assert evaluate.main(call(run, "--data-root", str(data), "--other-data")) == 0
    assert "other data than the run's own" in capsys.readouterr().out
    assert (run / "results.json").read_bytes() == before
    found = json.loads((run / "other-data" / "results.json").read_text())
    assert found["other"] == ["data"] and found["config"]["data_root"] == str(data)
    assert "1 are new, the first is photo/shape_6/new.png" in error


def test_a_run_that_can_go_on_keeps_its_first_results_apart(run, capsys):
    (run / "results.json").unlink()
    assert evaluate.main(call(run)) == 0
    assert "the best epoch so far: the training has not finished" in capsys.readouterr().out
    assert json.loads((run / "unfinished" / "results.json").read_text())["unfinished"] and not (run / "results.json").exists()


def test_results_never_replace_those_of_another_run(run, finished, tmp_path, capsys):
    before = (run / "results.json").read_bytes()
    refused(capsys, evaluate.main(call(finished, "--out", str(run))), "--out", "the folder of another run")
    refused(capsys, evaluate.main(call(finished, "--out", str(run / "best.pt"))), "best.pt: no folder can be made there")
    assert (run / "results.json").read_bytes() == before


def test_a_run_folder_without_a_model_says_what_to_do(run, tmp_path, capsys):
    (run / "best.pt").unlink()
    refused(capsys, evaluate.main(call(run)), "holds no best.pt of a run; go on with the command in its run.json")
    refused(capsys, evaluate.main(call(tmp_path / "no")), "holds no best.pt of a run; train first")


def test_numbers_of_other_weights_never_pass_for_the_run_s_own(run, tmp_path, capsys):
    torch.save(tiny_state_dict(1), tmp_path / "other.pt")
    before, other = (run / "results.json").read_bytes(), ["--weights", str(tmp_path / "other.pt")]
    refused(capsys, evaluate.main(call(run, *other)), "its sha256 differs", "--other-weights")
    assert evaluate.main(call(run, *other, "--other-weights")) == 0
    assert "other weights than the run's own" in capsys.readouterr().out
    assert (run / "results.json").read_bytes() == before
    assert json.loads((run / "other-weights" / "results.json").read_text())["other"] == ["weights"]


def test_moved_weights_are_the_run_s_own(world, run, tmp_path):
    shutil.copy(world / "clip.pt", tmp_path / "moved.pt")
    assert evaluate.main(call(run, "--weights", str(tmp_path / "moved.pt"))) == 0
    assert json.loads((run / "results.json").read_text())["other"] == []


@pytest.mark.parametrize("content", [None, "{}", '{"files": []}', "[]"])
def test_a_run_without_its_record_is_told_so_in_a_sentence(run, capsys, content):
    if content is None:
        (run / "run.json").unlink()
    else:
        (run / "run.json").write_text(content)
    refused(capsys, evaluate.main(call(run)), str(run / "run.json"))


def test_the_evaluation_after_training_uses_the_training_s_device(world, tmp_path, monkeypatch):
    asked = []
    pick = experiment.pick_device
    monkeypatch.setattr(experiment, "pick_device", lambda name: pick((asked.append(name), "cpu")[1]))
    assert train.main(flags(world, tmp_path / "run", *CLIP_ONLY, "--device", "cpu:0")) == 0
    assert asked == ["cpu:0", "cpu:0"], "the evaluation must not fall back to --device auto"


def test_unverified_weights_are_trained_with_and_evaluated(world, tmp_path, capsys):
    shutil.copy(world / "clip.pt", tmp_path / "ViT-B-32.pt")
    given = flags(world, tmp_path / "run", *CLIP_ONLY, "--weights", str(tmp_path / "ViT-B-32.pt"))
    refused(capsys, train.main(given), "is not OpenAI's ViT-B-32.pt", "rename it")


# Class features


def anchors(kind: str, path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(4, 32))
    if kind == "huge":
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (10**9, 32)})
        path.write_bytes(stream.getvalue() + bytes(512))
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "bracket":  # which the header's parser answers with an exception of its own
        np.save(path, rows)
        path.write_bytes(path.read_bytes().replace(b"}", b" ", 1))
    elif kind == "pickled":
        np.save(path, np.array([[{}] * 32] * 4), allow_pickle=True)
    else:
        rows[1] = 0 if kind == "zero" else rows[1]
        np.save(path, rows.astype({"complex": complex, "integer": int, "big-endian": ">f8"}.get(kind, float)))


@pytest.mark.parametrize("kind", ["zero", "complex", "integer", "huge", "fifo", "bracket", "pickled", "big-endian"])
def test_class_features_that_are_none_are_refused_without_a_hang(world, tmp_path, capsys, kind):
    anchors(kind, tmp_path / "a.npy")
    given = flags(world, tmp_path / "run", "--class-features", str(tmp_path / "a.npy"))
    refused(capsys, train.main(given), "--class-features", "a.npy")
    assert not (tmp_path / "run").exists()


# Checkpoints


def test_a_checkpoint_of_nan_is_refused_before_it_ranks_anything(run, capsys):
    state = load_state(run / "best.pt")
    state["method"]["domain_prompts"] = torch.full_like(state["method"]["domain_prompts"], float("nan"))
    torch.save(state, run / "best.pt")
    refused(capsys, evaluate.main(call(run)), "domain_prompts holds values that are not finite")


@pytest.mark.parametrize("content", ["{", "[1]", '{"instance": 7}', "\udcff", "[" * 100_000, "",
                                     '{"instance": {"h": "\x1b"}}', '{"instance": {"h": 1' + "0" * 400 + "}}", None])
def test_test_scores_that_are_none_are_told_in_a_sentence(tmp_path, content):
    path = tmp_path / classification.SCORES
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(ValueError) as caught:
        classification.best_scores(tmp_path)
    assert str(path) in str(caught.value) and plain(caught.value) == str(caught.value)


@pytest.mark.parametrize("line", ["{", "7", '{"step": 1}', '{"phase": "source", "loss": "x"}', '{"phase": ["source"]}',
                                  '{"phase": "source", "loss": 1' + "0" * 400 + "}"])
def test_a_log_that_is_none_is_told_in_a_sentence_and_a_torn_line_left_out(tmp_path, line):
    (tmp_path / "log.jsonl").write_text('{"phase": "source", "loss": 1}\n{"phase": "sou')
    assert log_lines(tmp_path) == [{"phase": "source", "loss": 1}]
    (tmp_path / "log.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"log\.jsonl"):
        log_lines(tmp_path)


# Run folders of others


@pytest.mark.parametrize("name", [".lock", "config.json", "run.json", "log.jsonl", "last.pt", "best.pt", "results.json",
                                  "nonfinite.json", run_folder.LISTING, classification.SCORES, "features", "index",
                                  "other-data"])
@pytest.mark.parametrize("kind", ["link", "dangling", "fifo"])
def test_nothing_outside_a_run_folder_is_written_through_it(world, run, tmp_path, capsys, name, kind):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (run / name).unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(run / name)
    else:
        (run / name).symlink_to(victim if kind == "link" else tmp_path / "nowhere")
    reason = "a special file" if kind == "fifo" else "a link"
    refused(capsys, train.main(flags(world, run)), f"{run / name} is {reason}")
    refused(capsys, evaluate.main(call(run)), f"{run / name} is {reason}")
    refused(capsys, retrieve.main(call(run, "--gallery", str(world / "data"), "--query", "x.png")), f"{run / name} is {reason}")
    assert victim.read_text() == "precious" and not (tmp_path / "nowhere").exists()


def test_a_run_folder_may_itself_be_a_link(world, run, tmp_path):
    (tmp_path / "link").symlink_to(run, target_is_directory=True)
    assert evaluate.main(call(tmp_path / "link")) == 0
    assert train.main(flags(world, tmp_path / "link")) == 0


def test_a_log_with_a_second_name_is_not_cut(world, run, tmp_path, capsys):
    os.link(run / "log.jsonl", tmp_path / "kept")
    before = (tmp_path / "kept").read_bytes()
    refused(capsys, train.main(flags(world, run)), "log.jsonl", "put a copy of it in its place")
    assert (tmp_path / "kept").read_bytes() == before


# Images that vanish


def stopped(world: Path, data: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A training stopped after two steps of phase 1, and its command."""
    command = flags(world, run, *LONGER, "--target-epochs", "1", "--source-batch", "4", "--data-root", str(data))
    calls = []

    def step(self, batch, phase, original=UCDRAdapter.step):
        calls.append(phase)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return original(self, batch, phase)

    with monkeypatch.context() as patch:
        patch.setattr(UCDRAdapter, "step", step)
        assert train.main(command) == 130 and calls == ["source"] * 2
    return command


@pytest.mark.parametrize("how", ["destroyed", "removed"])
def test_a_run_goes_on_after_an_image_is_lost(world, tmp_path, monkeypatch, capsys, how):
    data, run = Path(shutil.copytree(world / "data", tmp_path / "data")), tmp_path / "run"
    command = stopped(world, data, run, monkeypatch)
    lost = [data / "sketch" / "shape_6" / "1.png"]  # a query of the test
    lost += [path for name in ("shape_3", "shape_5") for path in sorted((data / "icon" / name).iterdir())[:4]]  # training images
    for path in lost:
        if how == "removed":
            path.unlink()
        else:
            path.write_bytes(b"destroyed")
    capsys.readouterr()
    refused(capsys, train.main(command), "--bad-images skip", *(
        ["was started with other image files", f"9 are gone, the first is {Path('icon', 'shape_3', '0.png')}", "bring them back"]
        if how == "removed" else ["not a readable image"]))
    assert train.main([*command, "--bad-images", "skip"]) == 0
    captured = capsys.readouterr()
    assert "skipped" in captured.err and "11 x 12" in captured.out and "1 unreadable images left out" in captured.out
    steps = logged(run)
    assert [line["step"] for line in steps if line["phase"] == "source" and "step" in line][:3] == [1, 2, 3]
    if how == "removed":
        refused(capsys, evaluate.main(call(run, "--bad-images", "error")), "9 are gone", "--bad-images skip")
        (data / "sketch" / "shape_6" / "new.png").write_bytes((data / "sketch" / "shape_6" / "0.png").read_bytes())
        refused(capsys, evaluate.main(call(run)), "--other-data")  # something else has changed too
        (data / "sketch" / "shape_6" / "new.png").unlink()
    assert evaluate.main(call(run, "--bad-images", "skip")) == 0


def test_a_listing_of_another_folder_brings_nothing_back():
    assert trees.with_gone(["a/1", "a/3"], ["a/1", "a/2", "a/3"]) == ["a/1", "a/2", "a/3"]
    assert trees.with_gone(["a/1", "a/9"], ["a/1", "a/2"]) == ["a/1", "a/9"], "a/9 is new"
    assert trees.with_gone(["a/1"], ["a/1", "b/1", "../../x"]) == ["a/1"], "b is gone as a whole"
    assert trees.with_gone(["a/1"], []) == ["a/1"]


NO_LISTINGS = [b"", b"{}", *map(gzip.compress, (b"[", b"[1]", b'{"data": [1]}', b"[" * 100_000, bytes(10_000))),
               gzip.compress(b'{"data": []}')[:-9]]


# Named by number: gzip writes the time, and pytest-xdist wants the same names from each worker.
@pytest.mark.parametrize("content", NO_LISTINGS, ids=range(len(NO_LISTINGS)))
def test_a_listing_that_is_none_is_told_in_a_sentence(tmp_path, monkeypatch, content):
    monkeypatch.setattr(run_folder, "MAX_LISTING", 5000 if len(content) < 100 else 1 << 20)
    (tmp_path / run_folder.LISTING).write_bytes(content)
    with pytest.raises(ValueError, match="is not the list of images that a run writes"):
        run_folder.remembered(tmp_path)


def test_no_more_of_a_listing_is_unpacked_than_its_bound(tmp_path, monkeypatch):
    asked = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: (asked.append(size), read(self, size))[1])
    monkeypatch.setattr(run_folder, "MAX_LISTING", 1000)
    (tmp_path / run_folder.LISTING).write_bytes(gzip.compress(b'{"data": []}' + b" " * 10_000_000))
    with pytest.raises(ValueError, match="too large"):
        run_folder.remembered(tmp_path)
    assert asked == [1001]


# Text that others chose


ESC = "\x1b[31mred\nnew line"


def test_names_never_steer_a_terminal(world, tmp_path, capsys):
    """A domain, a class and an image bear escapes and line ends in their names."""
    data = Path(shutil.copytree(world / "data", tmp_path / "data"))
    for domain in ("photo", "sketch", "icon"):
        (data / domain / "shape_6").rename(data / domain / f"six{ESC}")
        (data / domain / "shape_4").rename(data / domain / f"four{ESC}")
    (data / "icon").rename(data / f"icon{ESC}")
    (data / "sketch" / f"six{ESC}" / "0.png").write_bytes(b"broken")
    given = [*CLIP_ONLY, "--data-root", str(data), "--bad-images", "skip", "--class-split", ""]
    assert train.main(flags(world, tmp_path / f"run{ESC}", *given)) == 0
    photo = data / "photo" / f"six{ESC}" / "0.png"
    look = ["--gallery", str(data / "photo"), "--query", str(photo), "--k", "3", "--export", str(tmp_path / f"{ESC}.npy")]
    assert retrieve.main(call(tmp_path / f"run{ESC}", *look)) == 0
    assert retrieve.main(call(tmp_path / "absent\x1b", *look)) == 2
    captured = capsys.readouterr()
    for text in (captured.out, captured.err):
        assert "\x1b" not in text and "new line" in text and not any(line.startswith("new line") for line in text.splitlines())


def test_titles_of_a_checkpoint_never_steer_a_terminal(legacy_sre, capsys):
    state = load_state(legacy_sre / "best.pt")
    state["baseline"] = ESC
    state["class_names"][0] = state["graph"]["names"][0] = state["graph"]["lemmas"][0][0] = ESC
    torch.save(state, legacy_sre / "best.pt")
    evaluate.main(call(legacy_sre, "--other-data", "--out", "out"))
    assert "\x1b" not in "".join(capsys.readouterr())
    accuracies = {average: dict.fromkeys(classification.COLUMNS, 0.5) for average in ("instance", "class")}
    config = run_folder.read_config(legacy_sre / "config.json")
    table = classification.table([{"method": ESC, "images": 1, "classes": 1, **accuracies}], config)
    assert "\x1b" not in table and plain(ESC) in table


def test_what_a_damaged_image_says_never_steers_a_terminal(tmp_path, monkeypatch):
    (tmp_path / "a\x1b[31m.png").write_bytes(b"broken")
    with pytest.raises(ValueError) as caught:
        open_image(str(tmp_path / "a\x1b[31m.png"))
    assert plain(caught.value) == str(caught.value)

    def failing(*_, **__):
        raise OSError("chunk \x1b[31m\nnext")

    monkeypatch.setattr("PIL.Image.open", failing)
    (tmp_path / "a.png").write_bytes(b"broken")
    with pytest.raises(ValueError) as caught:
        open_image(str(tmp_path / "a.png"))
    assert plain(caught.value) == str(caught.value)
