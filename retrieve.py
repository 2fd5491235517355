"""Searches a folder of images by image: indexes it once with a run's model, prints the nearest paths, draws a contact sheet."""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from ucdr_ref.clip.tensorfile import file_digest
from ucdr_ref.config import add_arguments
from ucdr_ref.experiments.experiment import restore
from ucdr_ref.experiments.report import Shown, plain, sheet
from ucdr_ref.images.cache import build_index
from ucdr_ref.images.features import Extractor
from ucdr_ref.machine.command import command
from ucdr_ref.machine.options import MACHINE
from ucdr_ref.machine.processes import pick_device

MAY_DIFFER = (*MACHINE, "weights", "bad_images")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of a finished run")
    parser.add_argument("--gallery", type=Path, required=True, help="folder of images to search, with all below it")
    parser.add_argument("--query", nargs="*", default=[], metavar="IMG", help="query images")
    parser.add_argument("--k", type=int, default=10, help="results per query")
    parser.add_argument("--out", type=Path, metavar="SHEET.png", help="write a contact sheet of queries and results")
    parser.add_argument("--export", type=Path, metavar="FILE.npy", help="write the gallery's vectors, and their paths beside it")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--invert-query", default="auto", choices=("auto", "yes", "no"),
                        help="queries are dark strokes on white; auto: those that look like it")
    parser.add_argument("--invert-gallery", default="auto", choices=("auto", "yes", "no"), help="the same for the gallery")
    parser.add_argument("--cache", type=Path, help="where feature indexes are kept (default: RUN/index)")
    parser.add_argument("--other-weights", action="store_true", help="search although the CLIP weights are not the run's")
    parser.add_argument("--no-verify", action="store_true", help="load weights whose sha256 is not the published one")
    add_arguments(parser, MAY_DIFFER)
    return parser.parse_args(argv)


def run(argv: list[str] | None) -> None:
    args = parse(argv)
    if not args.query and not args.export:
        raise ValueError("nothing to do: give --query IMG ..., --export FILE.npy, or both")
    if args.k < 1:
        raise ValueError(f"--k {args.k}: expected at least 1")
    device = pick_device(getattr(args, "device", "auto"))
    overrides = {name: getattr(args, name) for name in MAY_DIFFER if hasattr(args, name)}
    config, method, _ = restore(args.run, overrides, device, not args.no_verify, args.other_weights)
    model = [file_digest(args.run / "best.pt"), file_digest(config.weights), config.precision, args.invert_gallery]
    key = hashlib.sha256(json.dumps(model).encode()).hexdigest()
    encoder = Extractor(method, config, device).of_paths
    index = build_index(args.gallery, encoder(args.invert_gallery), key, args.cache or args.run / "index", config.bad_images)
    results = []
    if args.query:
        found = list(encoder(args.invert_query)(args.query))
        indices = torch.cat([part for part, _ in found]).tolist() if found else []
        missing = sorted(set(range(len(args.query))) - set(indices))
        if missing:
            raise ValueError(f"{os.fsencode(args.query[missing[0]])!r}: not a readable query image")
        distances, rows = index.search(torch.cat([part for _, part in found]).cpu(), args.k)
        for i, query in enumerate(args.query):
            hits = zip(rows[i].tolist(), distances[i].tolist())
            results.append({"query": query, "results": [{"path": index.path(row), "distance": d} for row, d in hits]})
    if args.json:
        print(json.dumps({"gallery": str(args.gallery), "images": len(index.paths), "skipped": index.skipped,
                          "cached": index.cached, "queries": results}))
    else:
        print(f"{len(index.paths)} images in {plain(args.gallery)}{' (from the cache)' if index.cached else ''}"
              + (f", {len(index.skipped)} unreadable" if index.skipped else ""))
        for result in results:
            print(f"\n{plain(result['query'])}")
            for rank, hit in enumerate(result["results"], 1):
                print(f"{rank:4d}  {hit['distance']:.4f}  {plain(hit['path'])}")
    if args.export:
        names = index.export(args.export)
        size = " x ".join(map(str, index.features.shape))
        print(f"{plain(args.export)}: {size} float32; paths in {plain(names)}", file=sys.stderr)
    if args.out and results:
        sheet([(Shown(result["query"], "query"), [Shown(hit["path"], f"{hit['distance']:.3f}") for hit in result["results"]])
               for result in results], args.out)


def main(argv: list[str] | None = None) -> int:
    return command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
