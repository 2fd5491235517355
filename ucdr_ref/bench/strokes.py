"""How often `--invert auto` takes images of each domain for dark strokes on a light ground.

    python -m ucdr_ref.bench.strokes --data data/toy

DIR holds `<domain>/<class>/<image>`.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..cli import folder_path, run_command
from ..data.images import is_strokes, open_image


def taken_for_strokes(root: Path) -> dict[str, tuple[int, float]]:
    """{domain: (images, the share of them that is taken for strokes)}"""
    found = {}
    for domain in sorted(path for path in root.iterdir() if path.is_dir()):
        flags = [is_strokes(open_image(str(path))) for path in sorted(domain.glob("*/*"))]
        if flags:
            found[domain.name] = len(flags), sum(flags) / len(flags)
    return found


def run(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ucdr_ref.bench.strokes", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=folder_path, required=True, metavar="DIR")
    found = taken_for_strokes(parser.parse_args(argv).data)
    print("| | " + " | ".join(found) + " |")
    print("|---" * (len(found) + 1) + "|")
    print("| images | " + " | ".join(f"{images:,}" for images, _ in found.values()) + " |")
    shares = (f"{100 * share:.1f}" for _, share in found.values())
    print("| taken for strokes by their look, % | " + " | ".join(shares) + " |")


def main(argv: list[str] | None = None) -> int:
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
