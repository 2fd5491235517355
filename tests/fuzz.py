"""Damaged weights, images, configs and class graphs: a sentence or a result, never a traceback, a hang or foreign code.

    python -m tests.fuzz --cases 2000 --seed 0

A case is a file with some bits flipped, or cut at some place. What a reader may raise is a ValueError or an OSError of one
line; no case may compute for more than LIMIT seconds. Undamaged, every file has to be read.
"""
import argparse
import json
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image

from tests.clip.test_weights import SMALL, WRITERS, Trap
from tests.helpers import tiny_state_dict
from ucdr_ref.clip.weights import load_clip, read_text
from ucdr_ref.config import Config, from_dict
from ucdr_ref.data.images import open_image
from ucdr_ref.sre.graph import load_graph

LIMIT = 20  # seconds of computing for one case
WATCHED = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen")  # audit events
IMAGES = ("png", "jpeg", "gif", "webp", "bmp", "tiff")
GRAPH = {"ids": ["n00000001", "n00000002", "n00000003"], "names": ["cat", "dog", "animal"], "lemmas": [["cat"], ["dog"], ["animal"]],
         "edges": [[0, 2], [1, 2]], "classes": 2, "notice": ""}


class Hang(BaseException):
    pass


class Executed(BaseException):
    pass


class Watch:
    """Runs a reader; AssertionError when it ends otherwise than it may."""

    def __init__(self) -> None:
        self.active = False
        sys.addaudithook(self.audit)
        signal.signal(signal.SIGPROF, self.late)

    def audit(self, event: str, arguments: tuple) -> None:
        if self.active and event in WATCHED:
            self.active = False
            raise Executed(f"{event} {arguments}")

    def late(self, *_: object) -> None:
        raise Hang(f"more than {LIMIT} seconds")

    def outcome(self, case: str, read: Callable[[], object]) -> str:
        signal.setitimer(signal.ITIMER_PROF, LIMIT)
        self.active = True
        try:
            read()
            return "read"
        except (ValueError, OSError) as error:
            message = str(error)
        except BaseException as error:
            raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
        finally:
            self.active = False
            signal.setitimer(signal.ITIMER_PROF, 0)
        assert message.strip() and "\n" not in message and len(message) < 4000, f"{case}: {message[:600]!r}"
        return "refused"


def read_config(path: Path) -> Config:
    values = json.loads(read_text(path))
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    return from_dict(values)


def files(folder: Path) -> dict[str, tuple[bytes, Callable[[Path], object]]]:
    """Content and reader of an undamaged file of each kind."""
    found: dict[str, tuple[bytes, Callable[[Path], object]]] = {}
    for form, write in WRITERS.items():
        write(tiny_state_dict(**SMALL), folder / "a")
        found[form] = (folder / "a").read_bytes(), load_clip
    for form in IMAGES:
        Image.effect_noise((24, 20), 90).convert("P" if form == "gif" else "RGB").save(folder / "a", form)
        found[form] = (folder / "a").read_bytes(), open_image
    found["config.json"] = json.dumps(vars(Config())).encode(), read_config
    found["graph"] = json.dumps(GRAPH).encode(), load_graph
    return found


def damaged(data: bytes, r: random.Random) -> tuple[str, bytes]:
    """What was done, and the bytes."""
    at, changed = r.randrange(len(data)), bytearray(data)
    if r.random() < 0.25:
        return f"cut at {at}", data[:at]
    head = r.random() < 0.5  # where sizes, names and pickles stand
    places = [r.randrange(min(len(data), 3000) if head else len(data)) for _ in range(r.choice((1, 1, 2, 20)))]
    for place in places:
        changed[place] ^= 1 << r.randrange(8)
    return f"bits flipped at {places}", bytes(changed)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    watch, counts = Watch(), Counter[tuple[str, str]]()
    with TemporaryDirectory(prefix="fuzz.") as name:
        folder, path = Path(name), Path(name, "case")
        sound = files(folder)
        for kind, (data, read) in sound.items():
            path.write_bytes(data)
            assert watch.outcome(kind, lambda read=read: read(path)) == "read", f"{kind}: refused without a fault"
        torch.save({**tiny_state_dict(**SMALL), "x": Trap(folder / "executed")}, path)
        sound["trap"] = path.read_bytes(), load_clip
        for i in range(args.cases):
            kind = list(sound)[i % len(sound)]
            data, read = sound[kind]
            what, content = damaged(data, random.Random(f"{args.seed}/{i}"))
            path.write_bytes(content)
            counts[kind, watch.outcome(f"case {i}, {kind}, {what}", lambda read=read: read(path))] += 1
        assert not (folder / "executed").exists(), "code of a file was executed"
    for kind in sound:
        print(f"{kind:<14}{counts[kind, 'read']:>6} read{counts[kind, 'refused']:>6} refused")
    print(f"{args.cases} cases, seed {args.seed}: no traceback, no hang, nothing executed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
