"""Trains a method and evaluates it: `python train.py` alone runs the demonstration."""
from __future__ import annotations

import argparse
import sys

from ucdr_ref.config import PRESETS, add_arguments, resolve
from ucdr_ref.experiments import experiment
from ucdr_ref.experiments.run_folder import default_run
from ucdr_ref.machine.command import command, place


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [flags]")
    parser.add_argument("--run", type=place, metavar="DIR",
                        help="run folder; the same command again resumes it (default: runs/demo; with --fast "
                             "runs/fast; for sre-clip runs/sre-demo, runs/sre-fast)")
    row, own = "row of a published table", "(default: the dataset's own)"
    preset = parser.add_argument("--preset", metavar="NAME", help=f"{row}, as --help-all lists them {own}")
    preset.whole_help = f"{row}: {', '.join(PRESETS)} {own}"  # type: ignore[attr-defined]
    parser.add_argument("--fast", action="store_true",
                        help="the demonstration in under a minute (default: the whole one)")
    parser.add_argument("--dry-run", action="store_true",
                        help="print config, files, classes and trainable parameters, and stop")
    parser.add_argument("--no-verify", action="store_true",
                        help="load weights whose sha256 is not the published one")
    add_arguments(parser)
    return parser.parse_args(argv)


def run(argv: list[str] | None) -> None:
    args = parse(argv)
    config = resolve(vars(args), args.preset, args.fast)
    folder = args.run or default_run(config.method, args.fast or str(args.preset).endswith("fast"))
    experiment.train(config, folder, verify=not args.no_verify, dry_run=args.dry_run)


def main(argv: list[str] | None = None) -> int:
    return command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
