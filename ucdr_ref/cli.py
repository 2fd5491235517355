"""What every command does around its work: errors in one line, Ctrl-C, progress, files written whole.

No PyTorch is imported here, so that `--help` is quick and Ctrl-C is heard from the start.
"""
from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO


class WriteError(OSError, ValueError):
    """A file could not be written; what stood there before is intact."""


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived; the step was finished and saved."""


def run_command(run: Callable[[list[str] | None], None], argv: list[str] | None) -> int:
    """Runs an entry point; its exit status. argv None: it is the whole process.

    0 when it is done, 1 when its output could not be printed; after one line on stderr 2 for a mistake, 130
    for SIGINT or SIGTERM.
    """
    streams, output = (sys.stdout, sys.stderr), Output(sys.stdout)
    sys.stdout, sys.stderr = output, Output(sys.stderr)  # type: ignore[assignment]
    handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    status, text = 0, ""
    try:
        run(argv)
    except Stopped as stopped:
        status, text = 130, str(stopped)
    except KeyboardInterrupt as stop:
        status, text = 130, f"stopped by {str(stop) or 'SIGINT'}: run the same command to go on"
    except RuntimeError as error:
        if "memory" not in str(error) and "DataLoader worker" not in str(error):  # most often killed for it
            raise
        status, text = 2, (f"error: {one_line(error)[:200]}; take smaller batches (--micro-batch, "
                           "--source-batch) or --workers 0")
    except (ValueError, OSError) as error:
        status, text = 2, f"error: {one_line(error)}"
    finally:
        if text:
            print(text, file=sys.stderr)
        output.flush()
        sys.stdout, sys.stderr = streams
        for number, handler in handlers.items():
            signal.signal(number, handler if argv is not None else signal.SIG_IGN)
    return status or int(output.failed)


def interrupt(number: int, frame: FrameType | None) -> None:
    """The first SIGINT or SIGTERM raises KeyboardInterrupt, so that all is cleaned up; the next kills."""
    signal.signal(number, signal.SIG_DFL)
    name = signal.Signals(number).name
    if any("importlib" in caller.f_code.co_filename for caller, _ in traceback.walk_stack(frame)):
        os.write(2, f"stopped by {name}\n".encode())  # an import prints tracebacks of its own
        os._exit(130)
    raise KeyboardInterrupt(name)


class Output:
    """A text stream whose reader may go away: from then on its text is dropped, and `failed` is true."""

    def __init__(self, stream: Any) -> None:
        self.failed = stream is None
        self.stream = stream or open(os.devnull, "w")
        if hasattr(self.stream, "reconfigure"):  # a name that this terminal cannot show is no error
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str = "") -> int:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            self.failed = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)

    flush = write


def several_processes() -> bool:
    """Whether torchrun started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "") not in ("", "1")


def is_main() -> bool:
    """Whether this process is the one that writes files and prints."""
    return not several_processes() or os.environ.get("RANK", "0") == "0"


def folder_path(text: str) -> Path:
    """A flag's path; an empty one would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return Path(text)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class ProgressLine:
    """How far a pass is, on stderr: on a terminal one line twice a second, else a line every 15 seconds.

    `target 6000/24000 | 812 img/s | eta 3m12s | epoch 2/10 | loss 1.234 align 0.980`
    """

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.live = label, total, sys.stderr.isatty()
        self.first: tuple[float, int] | None = None  # time and count of the first update, which pays start-up
        self.shown = 0.0  # when a line was printed

    def update(self, done: int, extra: str = "") -> None:
        """`done` images of the total are finished; `extra` is printed behind the time that is left."""
        now = time.monotonic()
        start, count = self.first = self.first or (now, done)
        if not is_main() or done == count or now - self.shown < (0.5 if self.live else 15):
            return
        self.shown, rate = now, (done - count) / (now - start)
        minutes, seconds = divmod(int((self.total - done) / rate), 60)
        text = (f"{self.label} {done}/{self.total} | {rate:.0f} img/s | eta {minutes}m{seconds:02d}s | "
                f"{extra}\n")
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            text = "\r" + text[:-1][:width].ljust(width)
        print(text, end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the line; another update starts a new one."""
        if self.live and self.shown:
            print(file=sys.stderr)
        self.shown = 0.0


@contextmanager
def writing(what: object, advice: str) -> Iterator[None]:
    """Around writes: makes of a full disk, a read-only folder, ... a WriteError that names `what`."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"could not write {what} ({error.strerror or error}); {advice}") from error


def write_atomic(path: str | Path, fill: Callable[[BinaryIO], object]) -> None:
    """`path` is the old file or the whole new one, whatever happens. Only the main process writes.

    `fill` writes into a temporary file beside it, which is then renamed. Raises WriteError.
    """
    if not is_main():
        return
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    with writing(path, "what stood there before is untouched: free space or choose another folder"):
        try:
            with open(temporary, "wb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text_atomic(path: str | Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def save_atomic(obj: Any, path: str | Path) -> None:
    """torch.save, as `write_atomic` does."""
    import torch

    content = io.BytesIO()  # PyTorch's writer would hide what a full disk answers
    torch.save(obj, content)
    write_atomic(path, lambda file: file.write(content.getbuffer()))


def load_state(path: str | Path) -> dict[str, Any]:
    """The dict that `save_atomic` wrote, on the CPU; FileNotFoundError, or ValueError for another file."""
    import torch

    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist")
    with as_value_error(path, "is no checkpoint of this package", "use another one, or train again"):
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError where there is none."""
    with as_value_error(path, "is not readable as a JSON object", "bring it back, or name another folder"):
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))


@contextmanager
def as_value_error(path: object, what: str, advice: str) -> Iterator[None]:
    """Around reading a file: whatever a broken one raises becomes one sentence."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"[:300]
        raise ValueError(f"{path} {what} ({reason}); {advice}") from error


def make_folder(path: Path) -> None:
    with writing(path, "name another folder"):
        path.mkdir(parents=True, exist_ok=True)


def digest_of(content: Any) -> str:
    """sha256 of what JSON can hold, in hexadecimal."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
