"""What every command does around its work: errors in one line, Ctrl-C, progress, files written whole.

No PyTorch is imported here, so that `--help` is quick and Ctrl-C is heard from the start.
"""
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_command(run: Callable[[list[str] | None], None], argv: list[str] | None) -> int:
    """Runs an entry point; its exit status. argv None: it is the whole process.

    0 done, 1 done but its output could not be printed; after one line on stderr 2 a mistake, 130 a signal.
    """
    output, status = Output(sys.stdout), 0
    with redirect_stdout(output), redirect_stderr(Output(sys.stderr)), signals_to(interrupt):
        try:
            run(argv)
        except KeyboardInterrupt as stop:
            status = 130
            print(stop, file=sys.stderr)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and not re.search("memory|DataLoader worker", str(error)):
                raise
            status = 2
            print(f"error: {one_line(error)}", file=sys.stderr)
    if argv is None:
        for number in SIGNALS:  # while Python ends
            signal.signal(number, signal.SIG_IGN)
    return status or int(output.failed)


@contextmanager
def signals_to(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """SIGINT and SIGTERM go to `handler` while the block runs."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def interrupt(number: int, frame: Any) -> None:
    """The first signal raises KeyboardInterrupt, so that all is cleaned up; the next kills."""
    signal.signal(number, signal.SIG_DFL)
    text = f"stopped by {signal.Signals(number).name}; the same command goes on"
    if any("importlib" in caller.f_code.co_filename for caller, _ in traceback.walk_stack(frame)):
        os.write(2, f"{text}\n".encode())  # an import prints tracebacks of its own
        os._exit(130)
    raise KeyboardInterrupt(text)


class Output:
    """A stream that may be closed or lose its reader: its text is then dropped, and `failed` is true."""

    def __init__(self, stream: Any) -> None:
        self.failed = stream is None
        self.stream = stream or open(os.devnull, "w")
        if hasattr(self.stream, "reconfigure"):  # a name that this terminal cannot show is no error
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            self.failed = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)


def several_processes() -> bool:
    return os.environ.get("WORLD_SIZE", "") not in ("", "1")


def is_main() -> bool:
    """Whether this process is the one that writes files and prints."""
    return not several_processes() or os.environ.get("RANK", "0") == "0"


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class ProgressLine:
    """How far a pass is, on stderr: on a terminal one changing line, else a line every 15 seconds."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.live = label, total, sys.stderr.isatty()
        self.first: tuple[float, int] | None = None  # time and images of the first update
        self.shown = 0.0  # when a line was

    def update(self, done: int, extra: str = "") -> None:
        """`done` images of the total are finished; `extra` is printed behind the time that is left."""
        now = time.monotonic()
        start, before = self.first = self.first or (now, done)
        seconds, images = now - start, done - before
        pause = 0.5 if self.live else 15
        if not (is_main() and seconds and images) or now - self.shown < pause:
            return
        self.shown, rate = now, images / seconds
        left = timedelta(seconds=int((self.total - done) / rate))
        text, end = f"{self.label} {done}/{self.total} | {rate:.0f} img/s | eta {left} | {extra}", "\n"
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            text, end = f"\r{text[:width].ljust(width)}", ""
        print(text, end=end, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the line; another update starts a new one."""
        if self.live and self.shown:
            print(file=sys.stderr)
        self.shown = 0.0


def write_atomic(path: str | Path, fill: Callable[[BinaryIO], object]) -> None:
    """`path` is the old file or the whole new one that `fill` writes. Only the main process does."""
    if not is_main():
        return
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"could not write {path} ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomic(path: str | Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def save_atomic(obj: Any, path: str | Path) -> None:
    import torch

    content = io.BytesIO()  # PyTorch's writer would hide what a full disk answers
    torch.save(obj, content)
    write_atomic(path, lambda file: file.write(content.getbuffer()))


def load_state(path: str | Path, advice: str = "delete it and train again") -> dict[str, Any]:
    """The dict that `save_atomic` wrote, on the CPU; ValueError, which ends in `advice`, for another file."""
    import torch

    with as_value_error(path, "is no checkpoint of this package", advice):
        return dict(torch.load(path, map_location="cpu", weights_only=True))


def read_json(path: str | Path) -> dict[str, Any]:
    with as_value_error(path, "is not readable as a JSON object", "bring it back, or name another folder"):
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))


@contextmanager
def as_value_error(subject: object, what: str, advice: str) -> Iterator[None]:
    """Whatever the block raises becomes one sentence, a ValueError."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"[:300]
        raise ValueError(f"{subject} {what} ({reason}); {advice}") from error


def digest_of(content: Any) -> str:
    """sha256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
