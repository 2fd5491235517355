"""Scores of target images to predictions and accuracies, chunk by chunk: all scores at once may not fit."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..metrics import predicted_accuracy
from ..sre.adapter import SRECLIP
from .class_folders import Features

CHUNK = 4096  # images whose scores are held at once
TEST_BATCH = 512  # the released code's batch of test images, which attend to each other (S2)
Scores = Iterator[tuple[Tensor, Tensor]]  # rows [b] of n images, and their scores [b, c]


def scores_of(logits: Callable[[Tensor], Tensor], target: Features) -> Scores:
    """Rows [b] and scores [b, c] of the target's features, CHUNK images at once."""
    for rows in torch.arange(len(target)).split(CHUNK):
        yield rows, logits(target.take(rows))


def baseline_logits(anchors: Tensor, features: Tensor) -> Tensor:
    """Cosines [b, c] with the anchors [c, e]; a class without an anchor is never predicted."""
    cosines = F.normalize(features, dim=1) @ anchors.T
    return cosines.masked_fill(~anchors.any(dim=1), -torch.inf)


def test_batches(labels: Tensor, unseen: list[int], released: bool, size: int) -> list[Tensor]:
    """Which rows pass at once.

    Released (S2): images of unseen and of seen classes apart, class by class, 512 at once; else `size` in the
    order of the rows, which makes no difference to an image that attends to itself.
    """
    if not released:
        return list(torch.arange(len(labels)).split(size))
    by_class = labels.argsort(stable=True)
    of_unseen = torch.isin(labels[by_class], torch.tensor(unseen))
    parts = by_class[of_unseen].split(TEST_BATCH) + by_class[~of_unseen].split(TEST_BATCH)
    return [part for part in parts if len(part)]


def method_scores(method: SRECLIP, target: Features, device: torch.device) -> Scores:
    """Rows [b] of `test_batches` and their test-time logits [b, c]."""
    training, config, unseen = method.training, method.options, method.unseen_ids.tolist()
    method.eval()
    with torch.no_grad():
        classes = method.class_embeddings().T / config.sre_temperature
        for rows in test_batches(target.labels, unseen, config.test_attention == "batch", config.sre_batch):
            yield rows, method.encode_features(target.take(rows).to(device)) @ classes
    method.train(training)


class Predicted(NamedTuple):
    """What is left of the scores of n images: per image the best class of each kind."""

    everywhere: Tensor  # [n], the best class among all
    classes: Tensor  # [n, 2], the best seen and the best unseen class
    scores: Tensor  # [n, 2], their scores, float64

    @property
    def zsl(self) -> bool:
        """Whether an unseen class can be predicted at all."""
        return not bool(self.scores[:, 1].isinf().all())


def predict(scores: Scores, n: int, c: int, unseen: list[int]) -> Predicted:
    """The predictions of scores over c classes for n images."""
    is_unseen = torch.isin(torch.arange(c), torch.tensor(unseen))
    kinds = (~is_unseen).nonzero().squeeze(1), is_unseen.nonzero().squeeze(1)
    everywhere, classes = torch.zeros(n, dtype=torch.long), torch.zeros(n, 2, dtype=torch.long)
    best = torch.zeros(n, 2, dtype=torch.float64)
    for rows, found in scores:
        found = found.cpu()
        everywhere[rows] = found.argmax(dim=1)
        for i, kind in enumerate(kinds):
            values, places = found[:, kind].max(dim=1)
            best[rows, i], classes[rows, i] = values.double(), kind[places]
    return Predicted(everywhere, classes, best)


def accuracies(predicted: Predicted, labels: Tensor, unseen: list[int],
               c: int) -> dict[str, dict[str, float | None]]:
    """`zero_shot_accuracy` of predictions for labels [n]; None where there is nothing to count or predict."""
    is_unseen = torch.isin(torch.arange(c), torch.tensor(unseen))
    found = predicted_accuracy(predicted.everywhere, predicted.classes[:, 1], labels, is_unseen)
    absent: set[str] = set() if predicted.zsl else {"zsl"}
    return {average: {name: None if math.isnan(value) or name in absent else value
                      for name, value in values.items()} for average, values in found.items()}
