"""Hands mutated files to everything that reads files: a sentence or a right answer, never a crash, a hang or foreign code.

    python -m tests.fuzz --images 5000 --files 2000 --seed 0

Images: bit flips, cuts, splices, wrong endings, pixel bombs, empty files, odd names, links and FIFOs among them. Files: run
checkpoints (best.pt, last.pt), weights in every format, run configs, logs and records, feature caches, class graphs, class
splits and class features, as bytes and as values; run folders with links and FIFOs in them; names in tables. What a reader
may raise is a ValueError or an OSError of one line; no case may compute for over LIMIT seconds. Before it is damaged, a file of
each kind has to be read.
"""
from __future__ import annotations

import argparse
import faulthandler
import resource
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tests.fuzz_files import fuzz_files
from tests.fuzz_images import fuzz_images
from tests.fuzzing import Harness

MEMORY = 3 << 30  # bytes that the process may take beyond what it holds when the cases begin


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    faulthandler.enable()
    torch.set_num_threads(1)
    harness = Harness()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with TemporaryDirectory(prefix="fuzz.") as name:
        folder = Path(name)
        for part in ("images", "files", "files/case"):
            (folder / part).mkdir()
        fuzz_images(harness, folder / "images", args.images, args.seed)
        fuzz_files(harness, folder / "files", args.files, args.seed)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    for kind, counts in harness.counts.items():
        print(f"{kind:<20} {counts.total():>6} cases: {', '.join(f'{n} {outcome}' for outcome, n in sorted(counts.items()))}")
    print(f"{sum(counts.total() for counts in harness.counts.values())} cases, seed {args.seed}: no crash, no hang, nothing "
          f"executed; peak memory grew by {grown / 2**20:.0f} MiB")
    assert grown < MEMORY, f"{grown} bytes"
    return 0


if __name__ == "__main__":
    sys.exit(main())
