"""How often `retrieve.py --invert auto` takes images of each domain for dark strokes on a light ground.

    python -m ucdr_ref.bench.strokes --data data/toy

DIR holds `<domain>/<class>/<image>`. Prints a Markdown table, in per cent of the domain's images.
"""
from __future__ import annotations

import sys
from pathlib import Path

from ..cli import folder_path, run_command
from ..data.images import is_strokes, open_image
from .record import markdown, parser_of


def taken_for_strokes(root: Path) -> dict[str, tuple[int, float]]:
    """{domain: (images, the share of them that is taken for strokes)}"""
    found = {}
    for domain in sorted(path for path in root.iterdir() if path.is_dir()):
        flags = [is_strokes(open_image(str(path))) for path in sorted(domain.glob("*/*"))]
        if flags:
            found[domain.name] = len(flags), sum(flags) / len(flags)
    if not found:
        raise ValueError(f"{root} holds no <domain>/<class>/<image>; name a folder that does")
    return found


def run(argv: list[str] | None) -> None:
    parser = parser_of("ucdr_ref.bench.strokes", __doc__)
    parser.add_argument("--data", type=folder_path, required=True, metavar="DIR")
    found = taken_for_strokes(parser.parse_args(argv).data)
    print(markdown(["", *found], [
        ["images", *(f"{images:,}" for images, _ in found.values())],
        ["taken for strokes, %", *(f"{100 * share:.1f}" for _, share in found.values())]]))


def main(argv: list[str] | None = None) -> int:
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
