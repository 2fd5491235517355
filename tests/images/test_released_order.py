"""The released order of training images (D15) against a sampler with a memory, as the rule is written."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from ucdr_ref.config import resolve
from ucdr_ref.experiments.retrieval import feed
from ucdr_ref.images.batches import Files, released_batches

SIZES = {"clipart": 100, "infograph": 130, "painting": 400, "quickdraw": 500, "real": 250}
SOURCE, TARGET = 400, 50


class Sampler:
    """One for the whole run, built for phase 2's batch; both phases' loaders read from it."""

    def __init__(self, domain_ids: list[int], batch: int) -> None:
        self.images: dict[int, list[int]] = {}
        for index, domain in enumerate(domain_ids):
            self.images.setdefault(domain, []).append(index)
        for domain, images in self.images.items():
            shuffled = np.random.RandomState(0).permutation(len(images))
            self.images[domain] = [images[k] for k in shuffled]
        self.position = {domain: 0 for domain in self.images}
        self.share = batch // len(self.images)
        self.rounds = min(map(len, self.images.values())) // self.share

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.rounds):
            for domain in sorted(self.images):
                for _ in range(self.share):
                    yield self.images[domain][self.position[domain]]
                    self.position[domain] += 1
                    if self.position[domain] == len(self.images[domain]):
                        self.position[domain] = 0


def loaded(sampler: Sampler, batch: int) -> list[list[int]]:
    """One pass of a loader that cuts the sampler's stream."""
    batches: list[list[int]] = [[]]
    for index in sampler:
        if len(batches[-1]) == batch:
            batches.append([])
        batches[-1].append(index)
    return batches


def labels(sizes: list[int]) -> list[int]:
    return [domain for domain, size in enumerate(sizes) for _ in range(size)]


@pytest.mark.parametrize("sizes", [list(SIZES.values()), [100, 130, 400, 500], [57, 91, 61]])
def test_the_stream_of_eleven_passes_is_the_samplers(sizes):
    ids = labels(sizes)
    sampler = Sampler(ids, TARGET)
    passes = [SOURCE, *[TARGET] * 10]  # one epoch of phase 1, ten of phase 2
    expected = [loaded(sampler, batch) for batch in passes]
    assert [released_batches(ids, TARGET, batch, turn) for turn, batch in enumerate(passes)] == expected
    assert released_batches(ids, TARGET, TARGET, 7) == expected[7]  # of the pass alone: a resumed run goes on alike


def test_positions_go_on_over_epochs_and_phases():
    ids = labels(list(SIZES.values()))
    for turn, batch in ((1, TARGET), (2, TARGET)):
        before = released_batches(ids, TARGET, SOURCE if turn == 1 else TARGET, turn - 1)
        now = released_batches(ids, TARGET, batch, turn)
        taken = Counter(i for part in now for i in part if ids[i] == 3)
        assert not taken.keys() & {i for part in before for i in part}, "a domain of 500 began anew"
    seen = {i for turn in range(11) for part in released_batches(ids, TARGET, TARGET, turn) for i in part}
    assert len(seen) == len(ids)  # every domain is walked through in full


def test_batches_are_cut_at_the_phases_size_whatever_the_groups():
    ids = labels([120, 200, 200, 200])  # groups of 4 x 12 = 48 drift apart when cut at 50
    batches = released_batches(ids, TARGET, TARGET, 0)
    assert {len(batch) for batch in batches[:-1]} == {50} and sum(map(len, batches)) == 10 * 48
    assert any(len(set(Counter(ids[i] for i in batch).values())) > 1 for batch in batches)
    assert [len(batch) for batch in released_batches(ids, TARGET, SOURCE, 0)] == [400, 80]
    with pytest.raises(ValueError, match="batch of 3 cannot hold the 4 source domains"):
        released_batches(ids, 3, 400, 0)


def test_both_phases_of_a_run_take_their_place_in_the_one_stream():
    import torch

    from ucdr_ref.experiments.protocols import Protocol
    domains = [name for name, size in SIZES.items() for _ in range(size)]
    files = Files([f"{i}.png" for i in range(len(domains))], ["a"] * len(domains), domains)
    protocol = Protocol("", ["a"], sorted(SIZES), files, None, [], "real")
    config = resolve({"variant": "released", "dataset": "domainnet", "source_epochs": 2, "seed": 5})
    sampler = Sampler([sorted(SIZES).index(name) for name in domains], config.target_batch)
    for phase, batch, epochs in (("source", config.source_batch, 2), ("target", config.target_batch, 4)):
        order = feed(phase, protocol, config, 32, torch.device("cpu")).order
        expected = [loaded(sampler, batch) for _ in range(epochs)]
        assert [order(epoch) for epoch in range(epochs)] == expected and order(1) == expected[1]
