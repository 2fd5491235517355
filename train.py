"""Trains a method and evaluates it: `python train.py` alone runs the demonstration."""

def run(argv: list[str] | None) -> None:
    import argparse
    from pathlib import Path

    from ucdr_ref.config import FIELDS, PRESETS, add_arguments, parse, resolve

    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [flags]")
    parser.add_argument("--run", type=Path, metavar="DIR",
                        help="run folder; the same command again resumes it (default: runs/demo; with --fast "
                             "runs/fast; for sre-clip runs/sre-demo, runs/sre-fast)")
    parser.add_argument("--preset", metavar="NAME",
                        help=f"row of a published table (default: the dataset's own): {', '.join(PRESETS)}")
    parser.add_argument("--fast", action="store_true", help="the demonstration in under a minute")
    parser.add_argument("--dry-run", action="store_true",
                        help="print config, files, classes and trainable parameters, and stop")
    parser.add_argument("--cache", type=Path, metavar="DIR", default="runs/cache",
                        help="where features of images are kept for all runs (default: %(default)s)")
    add_arguments(parser)
    args = parse(parser, argv)
    config = resolve(vars(args), args.preset, args.fast)

    from ucdr_ref.distributed import processes  # PyTorch: seconds
    from ucdr_ref.experiments import experiment

    fast = args.fast or str(args.preset).endswith("fast")
    name = ("sre-" if config.method == "sre-clip" else "") + ("fast" if fast else "demo")
    folder = args.run or Path("runs", name)
    with processes():
        experiment.train(config, folder, args.cache, args.dry_run, given=FIELDS.keys() & vars(args).keys())


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
