"""What every command does: one line for a mistake, output that goes away, Ctrl-C, files that are whole or absent."""
import io
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import evaluate
from ucdr_ref import cli
from ucdr_ref.cli import ProgressLine, load_state, read_json, run_command, write_atomic, write_text_atomic

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SCRIPTS = ("train.py", "evaluate.py", "retrieve.py")


@pytest.mark.parametrize(("error", "status", "line"), [
    (ValueError("--k 0:\n  must be at least 1"), 2, "error: --k 0: must be at least 1\n"),
    (FileNotFoundError(2, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'\n"),
    (MemoryError("no room"), 2, "error: no room\n"),
    (RuntimeError("CUDA out of memory.\nTried"), 2, "error: CUDA out of memory. Tried\n"),
    (KeyboardInterrupt("stopped by SIGTERM in phase x"), 130, "stopped by SIGTERM in phase x\n")])
def test_every_mistake_is_one_line_and_a_status(capsys, error, status, line):
    def run(argv: list[str] | None) -> None:
        raise error

    assert run_command(run, []) == status and capsys.readouterr().err == line


def test_a_mistake_of_ours_keeps_its_traceback_and_handlers_and_streams_are_given_back():
    def state() -> list:
        return [sys.stdout, sys.stderr, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]

    before = state()
    assert run_command(lambda argv: signal.raise_signal(signal.SIGTERM), []) == 130
    with pytest.raises(RuntimeError, match="[Mm]atrix|mat1|size"):
        run_command(lambda argv: torch.ones(2) @ torch.ones(3), [])
    assert before == state()


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
@pytest.mark.parametrize(("redirection", "status"), [
    ("", 0), ("| head -n 1", 1), (">&-", 1), ("2>&-", 0), (">&- 2>&-", 1), ("> /dev/full", 1), ("2> /dev/full", 0)])
def test_output_that_cannot_be_written_stops_nothing(tmp_path, redirection, status):
    script = tmp_path / "script.py"
    script.write_text("import sys\nfrom ucdr_ref.cli import run_command\ndef run(argv):\n"
                      "    for _ in range(5000):\n        print('a line of the output', flush=True)\n        print('progress', file=sys.stderr)\n"
                      "    open('done', 'w').write('all')\nsys.exit(run_command(run, None))")
    line = f"({sys.executable} {script}; echo $? > status) {redirection}"
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert (tmp_path / "done").read_text() == "all" and (tmp_path / "status").read_text() == f"{status}\n", done.stderr
    assert set(done.stderr.split()) <= {"progress"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_quick_and_needs_no_torch(script):
    code = "import runpy, sys; sys.argv = sys.argv[1:]; sys.modules['torch'] = None; runpy.run_path(sys.argv[0], run_name='__main__')"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, script, "--help"], cwd=ROOT, env={**ENV, "COLUMNS": "80"}, capture_output=True, text=True)
    assert done.returncode == 0 and "--workers" in done.stdout, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert time.monotonic() - start < 2  # 0.2 s on an idle core


def test_a_flag_of_a_training_is_no_flag_of_an_evaluation(capsys):
    for flags in (["--held-out", "photo"], ["--held-out=photo"], ["--nonsense", "1"]):
        with pytest.raises(SystemExit):
            evaluate.main(flags)
        assert f"{' '.join(flags)}: no flag here, see --help; a run's options need a training" in capsys.readouterr().err


@pytest.mark.parametrize("delays", [(0.3, 1.5), pytest.param([0.2 + n / 6 for n in range(30)], marks=pytest.mark.slow)], ids=len)
def test_ctrl_c_in_the_first_seconds_is_one_line(delays, tmp_path):
    """SIGINT after each delay: the command ends within ten seconds, with one line and no traceback."""
    command = [sys.executable, str(ROOT / "train.py"), "--fast", "--run", str(tmp_path / "run"), "--data-root", str(tmp_path / "data")]
    for delay in delays:
        process = subprocess.Popen(command, cwd=tmp_path, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, text = process.communicate(timeout=10)
        assert process.returncode in (0, 130) and "Traceback" not in text, (delay, text)
        assert process.returncode == 0 or text.splitlines()[-1].startswith("stopped by SIGINT"), (delay, text)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_second_ctrl_c_ends_what_does_not_end():
    code = """
import time
from ucdr_ref.cli import run_command
def run(argv):
    while True:
        try:
            print("ready", flush=True), time.sleep(60)
        except KeyboardInterrupt:
            print("caught", flush=True)
run_command(run, None)"""
    stuck = subprocess.Popen([sys.executable, "-c", code], env=ENV, text=True, stdout=subprocess.PIPE)
    assert stuck.stdout.readline() == "ready\n"
    stuck.send_signal(signal.SIGINT)
    assert stuck.stdout.readline() == "caught\n"
    stuck.send_signal(signal.SIGINT)
    assert stuck.wait(timeout=5) == -signal.SIGINT


def test_a_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_text_atomic(path, "old")

    def fails(file: object) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="could not write .*a.json .No space left on device"):
        write_atomic(path, fails)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, lambda file: signal.raise_signal(signal.SIGINT))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, text in (("1", "old"), ("0", "new")):
        monkeypatch.setenv("RANK", rank)
        write_text_atomic(path, "new")
        assert path.read_text() == text
    for size in ("", "1"):  # of a shell, not of torchrun
        monkeypatch.setenv("WORLD_SIZE", size)
        assert not cli.several_processes()


class Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


def test_files_of_something_else_are_one_sentence_and_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pt"
    torch.save({"a": Evil()}, path)
    for content in (path.read_bytes(), pickle.dumps(Evil()), b"", b"PK\x03\x04 half", b"[1]", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="x.pt is no checkpoint of this package"):
            load_state(path)
        with pytest.raises(ValueError, match="x.pt is not readable as a JSON object"):
            read_json(path)
    path.write_text('{"a": [1]}')
    assert read_json(path) == {"a": [1]} and not Path("executed").exists()
    torch.save({"a": torch.ones(2)}, path)
    assert load_state(path)["a"].untyped_storage().filename is None  # Windows replaces no file that is mapped
    with pytest.raises(ValueError, match="y.pt is no checkpoint of this package .FileNotFoundError"):
        load_state("y.pt")


@pytest.mark.parametrize("live", [True, False])
def test_the_progress_line_fits_and_says_what_is_left(monkeypatch, live):
    screen, now = io.StringIO(), [100.0]
    screen.isatty = lambda: live
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("COLUMNS", "60")
    line = ProgressLine("target", 1000)
    line.update(0)
    line.update(9)  # within one tick of the clock, on Windows 16 ms
    line.first = None
    for done in range(10, 310, 10):  # 10 images a second; the first ten took the start-up
        line.update(done, "loss 1.234 and much more that does not fit into this terminal")
        now[0] += 1
    line.close()
    shown = screen.getvalue().lstrip("\r").split("\r" if live else "\n")
    assert shown[0].startswith("target 20/1000 | 10 img/s | eta 0:01:38 | loss 1.234")
    if live:
        assert len(shown) == 29 and {len(text.rstrip("\n")) for text in shown} == {59}
    else:
        assert shown[1].startswith("target 170/1000 ") and len(shown) == 3
