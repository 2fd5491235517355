"""Draws the demonstration data, or trains its CLIP: `python -m ucdr_ref.demo --help`."""
import argparse
import os
import sys
from collections.abc import Sequence

from PIL import Image

from .drawing import contact_sheet, write_dataset


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: draw a dataset, a contact sheet, or train the CLIP; 0, or 2 after one line about a mistake."""
    parser = argparse.ArgumentParser(prog="python -m ucdr_ref.demo", description="Draw the demonstration data, or train its CLIP.")
    parser.add_argument("--out", metavar="DIR", help="folder to draw the dataset into")
    parser.add_argument("--per-class", type=int, default=20, help="images per class and domain (default 20)")
    parser.add_argument("--size", type=int, default=96, help="side of an image in pixels (default 96)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other pictures (default 0)")
    parser.add_argument("--sheet", metavar="FILE.png", help="write a contact sheet, classes by domains")
    parser.add_argument("--pretrain", metavar="FILE.pt", help="train the small CLIP of the demonstration and write it")
    args = parser.parse_args(argv)
    if not args.out and not args.sheet and not args.pretrain:
        parser.error("nothing to do; give --out DIR, --sheet FILE.png or --pretrain FILE.pt")
    try:
        for file, ending in ((args.sheet, ".png"), (args.pretrain, ".pt")):
            if file and not (file.endswith(ending) and os.path.isdir(os.path.dirname(file) or ".")):
                raise ValueError(f"{file}: expected a name that ends in {ending}, in a folder that exists")
        if args.pretrain:
            from .pretrain import pretrain
            pretrain(args.pretrain, seed=args.seed)
        if args.out:
            print(write_dataset(args.out, per_class=args.per_class, size=args.size, seed=args.seed))
        if args.sheet:
            contact_sheet(seed=args.seed).quantize(128, dither=Image.Dither.NONE).save(args.sheet, optimize=True)
            print(args.sheet)
    except (ValueError, OSError) as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
