"""Trains a method and evaluates it: `python train.py` alone runs the demonstration; `python train.py --help` lists every flag."""
from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

import evaluate
from ucdr_ref.clip.load import load_clip
from ucdr_ref.clip.tensorfile import file_digest, tidy
from ucdr_ref.clip.zero_shot import ZeroShot
from ucdr_ref.config import Config, add_arguments, resolve, to_json
from ucdr_ref.experiments import class_folders as sre_data
from ucdr_ref.experiments import classification as sre_evaluation
from ucdr_ref.experiments import protocols
from ucdr_ref.experiments import retrieval as evaluation
from ucdr_ref.experiments.retrieval import class_anchors, feed
from ucdr_ref.experiments.run_folder import describe, open_run
from ucdr_ref.machine.files import save_atomic
from ucdr_ref.machine.processes import fold, main_first, pick_device, processes, world
from ucdr_ref.sre.adapter import SRECLIP
from ucdr_ref.sre.class_vectors import node_vectors
from ucdr_ref.sre.graph import normalised_adjacency
from ucdr_ref.training.loop import Run, Stopped, train
from ucdr_ref.ucdr.adapter import UCDRAdapter


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="run folder; the same command again resumes it")
    parser.add_argument("--preset", help="a row of a published table, such as domainnet/sketch, sketchy/eccv, tuberlin, toy/fast")
    parser.add_argument("--fast", action="store_true", help="the demonstration in under a minute: toy/fast or sre/toy-fast")
    parser.add_argument("--dry-run", action="store_true", help="print config, files, classes and trainable parameters, and stop")
    parser.add_argument("--no-verify", action="store_true", help="load weights whose sha256 is not the published one")
    add_arguments(parser)
    return parser.parse_args(argv)


def summary(config: Config, protocol: protocols.Protocol, method: UCDRAdapter | ZeroShot) -> str:
    lines = [*protocol.notes,
             f"train    {len(protocol.train)} images, {len(protocol.class_names)} classes, "
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
    config = resolve(vars(args), args.preset, args.fast)
    if config.method == "sre-clip":
        run_sre(args, config)
    else:
        run_ucdr(args, config)


def run_ucdr(args: argparse.Namespace, config: Config) -> None:
    print(to_json(config), end="")
    device = pick_device(config.device)
    if config.dataset == "toy":
        from ucdr_ref.demo.drawing import write_dataset
        with main_first():
            write_dataset(config.data_root, per_class=config.toy_images)
    protocol = protocols.build(config)
    clip = load_clip(config.weights, config.heads or None, verify=not args.no_verify).to(device)
    if config.compile:
        clip.visual.transformer.compile()
    torch.manual_seed(fold(config.seed, "initial values"))
    if config.method == "zero-shot":
        method: UCDRAdapter | ZeroShot = ZeroShot(clip, config.evaluation_features == "normalized")
    else:
        anchors = class_anchors(config, clip, protocol, device)
        method = UCDRAdapter(clip, protocol.class_names, protocol.domain_names, config, anchors).to(device)
    print(summary(config, protocol, method))
    feeds = {phase: feed(phase, protocol, config, clip.image_size, device) for phase in getattr(method, "PHASES", ())}
    for phase_feed in feeds.values():
        phase_feed.order(0)  # a batch that cannot be balanced is refused before anything is written
    if args.dry_run:
        return
    weights = file_digest(config.weights)
    with main_first():
        held = open_run(args.run, config, {"weights_sha256": weights, "files": protocol.digests()})
    with held:
        extra = describe(config, protocol.class_names, protocol.domain_names, weights)

        validate = None
        if protocol.validation is not None and protocol.selected is not None:
            validate = partial(evaluation.validation_score, method.encode, protocol.validation, protocol.selected,
                               config, clip.image_size, device)
        if isinstance(method, ZeroShot):
            save_atomic({"method": {}, **extra}, args.run / "best.pt")
        else:
            train(method, feeds, validate, Run(args.run, config, device, extra))
        evaluate.report(args.run, {})


def run_sre(args: argparse.Namespace, config: Config) -> None:
    if world() > 1:
        raise ValueError("--method sre-clip encodes each image once and then trains on features, for which one process is "
                         "enough: start it without torchrun")
    print(to_json(config), end="")
    device = pick_device(config.device)
    if config.dataset == "toy":
        config = sre_data.drawn(config)
    graph, unseen = sre_data.graph_and_unseen(config)
    names, sources = graph.names[:graph.classes], sre_data.scan_sources(config, graph, unseen)
    targets = [sre_data.scan_folder("--target", config.target, graph,
                                                     sre_data.read_folder_ids(config.folder_ids))]
    clip = load_clip(config.weights, config.heads or None, verify=not args.no_verify).to(device)
    vectors = node_vectors(graph, clip, config.class_vectors)
    torch.manual_seed(fold(config.seed, "initial values"))
    method = SRECLIP(clip, names, vectors, normalised_adjacency(graph.edges, len(graph.ids)), unseen, config).to(device)
    print(sre_data.summary(sources, targets, graph, unseen))
    print(f"phase sre: {sum(parameter.numel() for parameter in method.trainable('sre').values()):,} trainable parameters")
    if args.dry_run:
        return
    weights = file_digest(config.weights)
    digests = {part: [folder.files.digest(os.path.realpath(folder.root)) for folder in folders]
               for part, folders in (("source", sources), ("target", targets))}
    files = {**digests, "graph": sre_data.graph_digest(graph, unseen)}
    with open_run(args.run, config, {"weights_sha256": weights, "files": files}):
        source, target = (sre_data.features(folders, graph, clip, config, weights, args.run / "features", device)
                          for folders in (sources, targets))
        name, anchors = sre_evaluation.baseline(clip, graph, source)
        extra = {**describe(config, names, [Path(root).name for root in config.source], weights), "graph": asdict(graph),
                 "unseen_ids": unseen, "baseline": name, "anchors": anchors}
        validate = None
        if config.sre_report == "best-test":  # S6
            validate = partial(sre_evaluation.test_score, method, target, device, args.run)
        # No tower runs in this loop, so its arithmetic stays float32; test evaluations are noted, but none stops it.
        loop = replace(config, precision="fp32", patience=config.sre_iterations)
        train(method, {"sre": sre_data.feed(source, target, config, device)}, validate, Run(args.run, loop, device, extra))
        evaluate.report(args.run, {})


def main(argv: list[str] | None = None) -> int:
    try:
        with processes():
            run(parse(argv))
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("stopped by SIGINT outside the training steps: run the same command to go on", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {tidy(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
