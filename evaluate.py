"""Evaluates a run folder: a table beside zero-shot CLIP, and a report, JSON, CSV and a picture of results."""

def run(argv: list[str] | None) -> None:
    import argparse
    from pathlib import Path

    from ucdr_ref.cli import as_value_error, read_json
    from ucdr_ref.config import FIELDS, add_arguments, differences, from_dict, parse

    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [flags]",
                                     epilog="A field that is not given is the run's own.")
    parser.add_argument("--run", type=Path, metavar="DIR", default="runs/demo",
                        help="run folder (default: %(default)s)")
    parser.add_argument("--force", action="store_true",
                        help="evaluate with other images or weights, or before the end, into the run's "
                             "folder `forced`; the table says so")
    parser.add_argument("--cache", type=Path, metavar="DIR", default="runs/cache",
                        help="where features of images are kept for all runs (default: %(default)s)")
    parser.add_argument("--compare", nargs=2, type=Path, metavar="RUN",
                        help="print the tables of two runs and the config fields that differ, and stop")
    add_arguments(parser, ("device", "workers", "precision", "data_root", "target", "class_split", "weights"))
    args = parse(parser, argv)

    if args.compare:
        configs = []
        for folder in args.compare:
            results = read_json(folder / "results.json")
            with as_value_error(f"{folder}/results.json", "is of no evaluation", "evaluate the run again"):
                print(f"{folder}\n{results['table']}\n")
                configs.append(from_dict(results["config"]))
        first, second = configs
        print("{} -> {}:".format(*args.compare), "; ".join(differences(second, first)) or "the same fields")
        return

    from ucdr_ref.distributed import processes  # PyTorch: seconds
    from ucdr_ref.experiments import experiment

    overrides = {name: value for name, value in vars(args).items() if name in FIELDS}
    with processes():
        experiment.evaluate(args.run, overrides, args.cache, args.force)


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
