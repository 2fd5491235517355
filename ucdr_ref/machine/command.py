"""What every entry point does around its work: one line for a mistake or Ctrl-C, never a traceback."""
from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch

from ..clip.weights import one_line
from .processes import Stopped, processes


def place(text: str) -> Path:
    """A flag's path; an empty one, as of a shell variable that is not set, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return Path(text)


def terminated(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends what it meets as Ctrl-C does, so that nothing half-written stays."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def command(run: Callable[[list[str] | None], None], argv: list[str] | None) -> int:
    """Runs an entry point, in all processes of torchrun; its exit status.

    0 when it is done, 2 after one line about a mistake, 130 after one line about SIGINT or SIGTERM.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminated)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file name that this terminal cannot show is no error
            stream.reconfigure(errors="backslashreplace")
    try:
        with processes():
            run(argv)
        if sys.stdout:
            sys.stdout.flush()
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 130
    except KeyboardInterrupt as stop:
        print(f"stopped by {str(stop) or 'SIGINT'}: run the same command to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `... | head` has seen enough; results are on the disk before they are printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except torch.OutOfMemoryError as error:
        print(f"error: {one_line(error)[:200]}; take smaller batches (--micro-batch, --eval-batch, "
              "--source-batch) or --precision bf16", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0
