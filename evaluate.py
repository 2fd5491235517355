"""Evaluates a run folder: every protocol's table beside zero-shot CLIP, JSON, a per-class CSV and a picture of ranked results."""
from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ucdr_ref.clip.tensorfile import tidy
from ucdr_ref.clip.zero_shot import ZeroShot
from ucdr_ref.config import MACHINE
from ucdr_ref.experiments import classification as sre_evaluation
from ucdr_ref.experiments import protocols
from ucdr_ref.experiments import retrieval as evaluation
from ucdr_ref.experiments.run_folder import restore, versions
from ucdr_ref.machine.processes import pick_device, processes, wait, world
from ucdr_ref.sre.adapter import SRECLIP


def report(folder: Path, overrides: dict[str, Any], out: Path | None = None, other_classes: bool = False) -> None:
    """Prints the table of a finished run and writes results.json, per_class.csv and a picture into `out` (the run folder)."""
    wait()  # until the main process has written best.pt
    device = pick_device(overrides.get("device", "auto"))
    config, method, state = restore(folder, overrides, device)
    out = out or folder
    about = {"run": str(folder), "config": state["config"], "versions": versions()}
    if isinstance(method, SRECLIP):
        if world() > 1:
            raise ValueError(f"{folder} is a run of sre-clip, which one process evaluates: start it without torchrun")
        found = sre_evaluation.evaluate(folder, config, method, state, device)
        print(sre_evaluation.table(found, config))
        out.mkdir(parents=True, exist_ok=True)
        sre_evaluation.write_results(found, out, about)
        print(f"{out}: results.json, per_class.csv, confusion.png")
        return
    protocol = protocols.build(config)
    if protocol.class_names != state["class_names"] and not other_classes:
        difference = sorted(set(protocol.class_names) ^ set(state["class_names"]))
        raise ValueError(f"{config.data_root} gives other training classes than {folder} was trained with ("
                         f"{', '.join(difference[:5]) or 'in another order'}); give the run's --data-root, or --other-classes")
    encoders = {"zero-shot": ZeroShot(method.clip, config.evaluation_features == "normalized").encode}
    if config.method != "zero-shot":
        encoders[config.method] = method.encode
    rows = evaluation.evaluate(encoders, protocol, config, method.clip.image_size, device)
    print(evaluation.table(rows, config.dataset))
    out.mkdir(parents=True, exist_ok=True)
    evaluation.write_results(rows, out, about)
    print(f"{out}: results.json, per_class.csv, queries.png")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of a finished run")
    parser.add_argument("--out", type=Path, help="where to write (default: the run folder)")
    parser.add_argument("--data-root", default=argparse.SUPPRESS, help="the data's folder, when it has moved")
    parser.add_argument("--target", default=argparse.SUPPRESS, help="SRE-CLIP: the target folder, when it has moved, or another")
    parser.add_argument("--weights", default=argparse.SUPPRESS, help="the CLIP weights, when they have moved")
    parser.add_argument("--device", default=argparse.SUPPRESS, help="cpu, cuda, ... (default: a GPU when there is one)")
    parser.add_argument("--workers", type=int, default=argparse.SUPPRESS, help="processes that read images")
    parser.add_argument("--other-classes", action="store_true", help="evaluate although the data's training classes differ")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        overrides = {name: value for name, value in vars(args).items() if name in (*MACHINE, "data_root", "target", "weights")}
        with processes():
            report(args.run, overrides, args.out, args.other_classes)
    except (ValueError, OSError) as error:
        print(f"error: {tidy(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
