"""Searches a folder of images by image or text, with an index, vectors and a contact sheet."""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ucdr_ref.config import add_arguments
from ucdr_ref.experiments import search
from ucdr_ref.experiments.report import plain
from ucdr_ref.experiments.run_folder import newest_run
from ucdr_ref.machine.command import command, place
from ucdr_ref.machine.options import MACHINE

MAY_DIFFER = (*MACHINE, "weights", "bad_images")
INVERT = ("auto", "yes", "no")
SEEN = "images of dark strokes on white are inverted; auto: those that look like it (default: auto)"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, usage="%(prog)s [flags]",
        epilog="--weights without --run: CLIP as it is. Another field that is not given is the run's.")
    parser.add_argument("--run", type=place, metavar="DIR",
                        help="folder of a finished run (default: the newest demonstration)")
    parser.add_argument("--gallery", type=place, metavar="DIR",
                        help="folder of images to search, with all below it (default: the run's gallery)")
    parser.add_argument("--query", nargs="+", default=[], metavar="IMG", help="query images (default: none)")
    parser.add_argument("--text", nargs="+", default=[], metavar="TEXT",
                        help="query texts as CLIP reads them, such as \"a red bus\" (default: none)")
    parser.add_argument("--k", type=int, default=10, metavar="N", help="results per query (default: 10)")
    parser.add_argument("--center", action="store_true",
                        help="remove the mean of the gallery, and that of the queries' kind")
    parser.add_argument("--queries-like", type=place, metavar="DIR",
                        help="for --center: images of the queries' kind (default: five queries or more)")
    parser.add_argument("--out", type=place, metavar="SHEET.png",
                        help="write a contact sheet of the results (default: none)")
    parser.add_argument("--export", type=place, metavar="FILE.npy",
                        help="write the gallery's vectors, and their paths beside it (default: none)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--invert-query", default="auto", choices=INVERT, help=f"query {SEEN}")
    parser.add_argument("--invert-gallery", default="auto", choices=INVERT, help=f"gallery {SEEN}")
    parser.add_argument("--cache", type=place, metavar="DIR",
                        help="where indexes are kept (default: RUN/index; without a run, runs/index)")
    parser.add_argument("--other-weights", action="store_true",
                        help="search although the CLIP weights are not the run's")
    parser.add_argument("--no-verify", action="store_true",
                        help="load weights whose sha256 is not the published one")
    add_arguments(parser, MAY_DIFFER)
    return parser.parse_args(argv)


def run(argv: list[str] | None) -> None:
    args = parse(argv)
    if not (args.query or args.text or args.export):
        raise ValueError("nothing to do: give --query IMG ..., --text TEXT ... or --export FILE.npy")
    if args.k < 1:
        raise ValueError(f"--k {args.k}: expected at least 1")
    for file in (args.out, args.export):  # before anything is encoded
        if file and not (file.suffix and file.parent.is_dir()):
            raise ValueError(f"{plain(file)}: expected a name with an ending in a folder that exists")
    overrides = {name: getattr(args, name) for name in MAY_DIFFER if hasattr(args, name)}
    if args.run is None and "weights" in overrides:
        if args.gallery is None:
            raise ValueError("which images should be searched? give their folder as --gallery DIR")
        model = search.clip_model(overrides, not args.no_verify)
        cache = Path("runs", "index")
    else:
        folder = args.run or newest_run()
        model = search.run_model(folder, overrides, not args.no_verify, args.other_weights)
        cache = folder / "index"
    gallery = args.gallery or search.own_gallery(model.config)
    index, found = search.search(model, gallery, args.query, args.text, args.k, args.cache or cache,
                                 args.invert_query, args.invert_gallery, args.center, args.queries_like)
    if args.export:  # files before text: the reader of the text may go away
        names = index.export(args.export)
        rows, width = index.features.shape
        print(f"{plain(args.export)}: {rows} x {width} float32; paths in {plain(names)}", file=sys.stderr)
    if args.out and found["queries"]:
        search.draw(found, args.out)
    print(json.dumps(found) if args.json else search.as_text(found))


def main(argv: list[str] | None = None) -> int:
    return command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
