"""Trains a method and evaluates it: `python train.py` alone runs the demonstration; `python train.py --help` lists every flag."""
from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

import evaluate
from ucdr_ref import evaluation, protocols
from ucdr_ref.checkpoint import file_digest, load_clip, save_atomic
from ucdr_ref.config import Config, add_arguments, resolve, to_json
from ucdr_ref.data import fold
from ucdr_ref.engine import Run, Stopped, feed, pick_device, train
from ucdr_ref.runs import describe, open_run
from ucdr_ref.ucdr_adapter import UCDRAdapter, ZeroShot


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="run folder; the same command again resumes it")
    parser.add_argument("--preset", help="a row of a published table, such as domainnet/sketch, sketchy/eccv, tuberlin, toy/fast")
    parser.add_argument("--fast", action="store_true", help="the demonstration in under a minute: preset toy/fast")
    parser.add_argument("--dry-run", action="store_true", help="print config, files, classes and trainable parameters, and stop")
    parser.add_argument("--no-verify", action="store_true", help="load weights whose sha256 is not the published one")
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.fast:
        args.preset = args.preset or "toy/fast"
    return args


def summary(config: Config, protocol: protocols.Protocol, method: UCDRAdapter | ZeroShot) -> str:
    lines = [f"train    {len(protocol.train)} images, {len(protocol.class_names)} classes, "
             f"{len(protocol.domain_names)} domains ({', '.join(protocol.domain_names)})"]
    for test in ([protocol.validation] if protocol.validation else []) + protocol.tests:
        galleries = ", ".join(f"{name} {len(files)}" for name, files in test.galleries.items())
        lines.append(f"{test.protocol:<10} {len(test.query)} queries ({test.query_domain}, "
                     f"{len(set(test.query.classes))} classes); gallery {galleries} ({protocol.gallery_domain})")
    if isinstance(method, UCDRAdapter):
        for phase in method.PHASES:
            count = sum(parameter.numel() for parameter in method.trainable(phase).values())
            lines.append(f"phase {phase}: {count:,} trainable parameters")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    config = resolve(vars(args), args.preset)
    print(to_json(config), end="")
    device = pick_device(config.device)
    if config.dataset == "toy":
        from ucdr_ref.toy import write_dataset
        write_dataset(config.data_root, per_class=config.toy_images)
    protocol = protocols.build(config)
    clip = load_clip(config.weights, config.heads or None, verify=not args.no_verify).to(device)
    torch.manual_seed(fold(config.seed, "initial values"))
    if config.method == "zero-shot":
        method: UCDRAdapter | ZeroShot = ZeroShot(clip)
    else:
        method = UCDRAdapter(clip, protocol.class_names, protocol.domain_names, config).to(device)
    print(summary(config, protocol, method))
    feeds = {phase: feed(phase, protocol, config, clip.image_size, device) for phase in getattr(method, "PHASES", ())}
    for phase_feed in feeds.values():
        phase_feed.order(0)  # a batch that cannot be balanced is refused before anything is written
    if args.dry_run:
        return
    weights = file_digest(config.weights)
    open_run(args.run, config, {"weights_sha256": weights, "files": protocol.digests()})
    extra = describe(config, protocol.class_names, protocol.domain_names, weights)

    validate = None
    if protocol.validation is not None:
        validate = partial(evaluation.validation_score, method.encode, protocol.validation, config, clip.image_size, device)
    if isinstance(method, ZeroShot):
        save_atomic({"method": {}, **extra}, args.run / "best.pt")
    else:
        train(method, feeds, validate, Run(args.run, config, device, extra))
    evaluate.report(args.run, {})


def main(argv: list[str] | None = None) -> int:
    try:
        run(parse(argv))
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
