"""How far centring depends on the queries: zero-shot CLIP on the drawn data of `--fast`, trained nothing."""
import random
from pathlib import Path
from typing import Any

import torch

from ..clip.weights import load_clip
from ..clip.zero_shot import ZeroShot
from ..config import resolve
from ..data.features import FeatureCache
from ..data.images import Files
from ..experiments.retrieval import load_data, score
from ..ucdr.closed_form import center, feature_mean

QUERY_CLASSES = (1, 3, 6, 12)


def centred(seeds: list[int]) -> list[dict[str, Any]]:
    """mAP@200 in the unseen gallery, in %, as rows of `drawn.table`.

    Under a number: the query classes are dealt, by the seed, into groups of so many, whose queries lose the
    group's mean; the gallery loses its own. Under "other classes": both lose the mean of training classes'
    images in their own domain; "of quickdraw": the queries lose that of the source domain most like theirs.
    """
    config, protocol = load_data(resolve({}, fast=True))
    features = FeatureCache(ZeroShot(load_clip(config.weights)), config)
    test = protocol.tests[0]
    queries, files = test.query, test.galleries["unseen"]
    query, gallery = features.encode(queries), features.encode(files)

    def other_classes(domain: str) -> torch.Tensor:
        folders = [Path(config.data_root, domain, name) for name in protocol.class_names]
        paths = [str(path) for folder in folders for path in sorted(folder.iterdir())]
        return feature_mean(features.encode(Files(paths, [""] * len(paths), [domain] * len(paths))))

    def mean_ap(q: torch.Tensor, g: torch.Tensor) -> float:
        return 100 * score(q, g, queries, files)["mAP@200"]

    moved = center(gallery, other_classes(protocol.gallery_domain))
    fixed = {"as it is": mean_ap(query, gallery)}
    for title, domain in (("other classes", test.query_domain), ("other classes, of quickdraw", "quickdraw")):
        fixed[title] = mean_ap(center(query, other_classes(domain)), moved)
    results = []
    for seed in seeds:
        names, numbers = sorted(set(queries.classes)), dict(fixed)
        random.Random(seed).shuffle(names)
        for size in QUERY_CLASSES:
            q = query.clone()
            for start in range(0, len(names), size):
                group = names[start:start + size]
                rows = torch.tensor([name in group for name in queries.classes])
                q[rows] = center(query[rows])
            numbers[str(size)] = mean_ap(q, center(gallery))
        results.append({"name": "zero-shot, centred", "seed": seed, "flags": [], "numbers": numbers})
    return results
