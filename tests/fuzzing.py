"""What the fuzz tests share: the harness that watches a case, and mutations of bytes."""
from __future__ import annotations

import os
import random
import signal
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Callable

from ucdr_ref.clip.tensorfile import tidy

LIMIT, PATIENCE = 20, 300  # seconds for one case: of computing, and in all, for this machine may have other work
WATCHED = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen")  # audit events


class Hang(BaseException):
    pass


class Executed(BaseException):
    pass


class Harness:
    """Runs cases and counts what became of them."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self.watching = False
        for number in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, self.late)
        sys.addaudithook(self.audit)

    def late(self, *_: object) -> None:
        raise Hang(f"a case computes for more than {LIMIT} s, or takes {PATIENCE}")

    def audit(self, event: str, arguments: tuple) -> None:
        if self.watching and event in WATCHED:
            self.watching = False
            raise Executed(f"{event} {arguments}")

    def run(self, kind: str, case: str, read: Callable[[], object], names: str = "") -> str:
        """One case; AssertionError when it ends otherwise than it may. `names`: what a refusal has to mention.

        Returns the refusal, which is empty when the case is read.
        """
        text = ""
        signal.setitimer(signal.ITIMER_PROF, LIMIT)
        signal.alarm(PATIENCE)
        self.watching = True
        try:
            read()
            outcome = "read"
        except (ValueError, OSError) as error:
            outcome, text = "refused", str(error)
            assert text.strip() and "\n" not in text and len(text) < 4000, f"{kind}, {case}: {text[:600]!r}"
            assert names in text, f"{kind}, {case}: {names!r} is not mentioned in {text[:600]!r}"
        except BaseException as error:
            raise AssertionError(f"{kind}, {case}: {type(error).__name__}: {error}") from error
        finally:
            self.watching = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
        self.counts.setdefault(kind, Counter())[outcome] += 1
        return text

    def sound(self, kind: str, case: str, read: Callable[[], object]) -> None:
        """A case without a fault, which has to be read: readers that refuse everything would pass all the others."""
        refusal = self.run(kind, case, read)
        assert not refusal, f"{kind}, {case}: refused without a fault: {refusal}"


class Trap:
    """Pickles as a call."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.marker,)


def mutated(data: bytes, r: random.Random) -> tuple[str, bytes]:
    """What was done, and the bytes."""
    what = r.choice(("flip", "flip", "flips", "cut", "head", "splice", "zeros", "double", "empty", "noise"))
    if not data or what == "empty":
        return "empty", b""
    changed, at = bytearray(data), r.randrange(len(data))
    if what == "flip":
        changed[at] ^= 1 << r.randrange(8)
    elif what == "flips":
        for _ in range(r.randint(2, 40)):
            changed[r.randrange(len(changed))] = r.randrange(256)
    elif what == "cut":
        del changed[at:]
    elif what == "head":  # where sizes stand
        changed[r.randrange(min(64, len(changed)))] = r.choice((0, 1, 127, 128, 255))
    elif what == "splice":
        start = r.randrange(len(data))
        changed[at:at] = data[start:start + r.randint(1, 200)]
    elif what == "zeros":
        changed[at:at + r.randint(1, 64)] = bytes(r.randint(0, 64))
    elif what == "double":
        changed += data
    else:
        changed = bytearray(r.randbytes(r.randint(1, 300)))
    return what, bytes(changed)


def png(width: int, height: int, depth: int = 8, colour: int = 2, data: bytes = b"") -> bytes:
    """A PNG that claims these sizes, whatever its data."""
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def tidied(call: Callable[[], object]) -> object:
    """As the entry points do: names of files may hold anything, a sentence is one line."""
    try:
        return call()
    except (ValueError, OSError) as error:
        raise ValueError(tidy(error)) from error
