"""Evaluates a run folder: every protocol's table beside zero-shot CLIP, a report, JSON, CSV tables and a
picture of ranked results.
"""
from __future__ import annotations

import argparse
import sys

from ucdr_ref.config import FIELDS, add_arguments
from ucdr_ref.experiments import experiment
from ucdr_ref.experiments.run_folder import newest_run
from ucdr_ref.machine.command import command, place
from ucdr_ref.machine.options import MACHINE

MAY_DIFFER = (*MACHINE, "data_root", "target", "class_split", "weights", "bad_images")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [flags]",
                                     epilog="A field that is not given is the run's own.")
    parser.add_argument("--run", type=place, metavar="DIR",
                        help="folder of a run (default: the newest demonstration)")
    parser.add_argument("--out", type=place, metavar="DIR", help="where to write (default: the run folder)")
    parser.add_argument("--other-data", action="store_true",
                        help="evaluate although the images are not those of the run")
    parser.add_argument("--other-weights", action="store_true",
                        help="evaluate although the CLIP weights are not the run's")
    parser.add_argument("--with-closed-form", action="store_true",
                        help="a row of the closed form of CLIP's features as well")
    parser.add_argument("--no-verify", action="store_true",
                        help="load weights whose sha256 is not the published one")
    add_arguments(parser, MAY_DIFFER)
    return parser.parse_args(argv)


def run(argv: list[str] | None) -> None:
    args = parse(argv)
    overrides = {name: value for name, value in vars(args).items() if name in FIELDS}
    experiment.evaluate(args.run or newest_run(), overrides, args.out, args.other_data, args.other_weights,
                        not args.no_verify, args.with_closed_form)


def main(argv: list[str] | None = None) -> int:
    return command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
