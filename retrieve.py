"""Searches a folder of images by image or text: prints the nearest, draws them, exports the vectors."""

def run(argv: list[str] | None) -> None:
    import argparse
    import json
    from pathlib import Path

    from ucdr_ref.config import add_arguments, parse

    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [flags]",
                                     epilog="A field that is not given is the run's own. --weights without "
                                            "--run: zero-shot CLIP.")
    parser.add_argument("--run", type=Path, metavar="DIR",
                        help="run folder (default: runs/demo)")
    parser.add_argument("--gallery", type=Path, metavar="DIR",
                        help="folder of images to search, with all below it (default: the run's gallery)")
    parser.add_argument("--query", type=Path, nargs="+", default=[], metavar="IMG",
                        help="query images")
    parser.add_argument("--text", nargs="+", default=[], metavar="TEXT",
                        help="query texts as CLIP reads them, such as \"a red bus\"")
    parser.add_argument("--k", type=int, default=10, metavar="N", help="results per query (default: 10)")
    parser.add_argument("--center", type=Path, metavar="DIR",
                        help="images of the queries' kind and of many classes: queries lose their mean and "
                             "the gallery its own. Helps where the two differ in style, zero-shot CLIP most; "
                             "harms where DIR holds few classes, whose mean is then what is searched for")
    parser.add_argument("--invert", default="auto", choices=("auto", "none"),
                        help="auto: colours are inverted in folders named like a stroke domain and of what "
                             "looks like dark strokes on white, some clip art and icons too (default: auto)")
    parser.add_argument("--out", type=Path, metavar="SHEET.png", help="write a picture of the results")
    parser.add_argument("--export", type=Path, metavar="FILE.npy",
                        help="write the gallery's vectors, and their paths beside it")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--force", action="store_true", help="search with other CLIP weights than the run's")
    parser.add_argument("--cache", type=Path, metavar="DIR", default="runs/cache",
                        help="where features of images are kept, for all runs (default: %(default)s)")
    fields = ("weights", "device", "workers", "precision")
    add_arguments(parser, fields)
    args = parse(parser, argv)
    if not (args.query or args.text or args.export and not args.out):
        raise ValueError("nothing to do: give --query IMG ... or --text TEXT ..., or --export FILE.npy alone")
    if not all(text.strip() for text in args.text):
        raise ValueError("--text: an empty text finds nothing; say what to look for")
    if args.center and args.text:
        raise ValueError("--center: the mean of images is none of --text; leave out one of the two")
    if args.export and args.export.suffix != ".npy":
        raise ValueError(f"--export {args.export}: must end in .npy")
    if args.k < 1:
        raise ValueError(f"--k {args.k}: must be at least 1")

    from ucdr_ref.experiments import search  # PyTorch: seconds

    overrides = {name: value for name, value in vars(args).items() if name in fields}
    folder = args.run or (None if "weights" in overrides else Path("runs/demo"))
    index, found = search.search(
        folder, args.gallery, list(map(str, args.query)), args.text, args.k, args.center, args.invert,
        [path for path in (args.out, args.export) if path], args.cache, args.force, overrides)
    print(json.dumps(found) if args.json else search.as_text(found))  # whatever becomes of the files
    if args.export:
        search.export(index, args.export)
    if args.out:
        search.draw(found, args.out)


def main(argv: list[str] | None = None) -> int:
    from ucdr_ref.cli import run_command

    return run_command(run, argv)


if __name__ == "__main__":
    import sys

    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before `run_command` listens
        print("stopped by SIGINT", file=sys.stderr)
        sys.exit(130)
