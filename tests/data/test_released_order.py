"""The released order of training images (D15) against what the released sampler itself gave."""
from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucdr_ref.data.images import released_batches

CASES = json.loads((Path(__file__).parents[1] / "golden" / "released_order.json").read_text())
SIZES = {"clipart": 100, "infograph": 130, "painting": 400, "quickdraw": 500, "real": 250}
SOURCE, TARGET = 400, 50


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_the_passes_are_those_of_the_released_sampler(case):
    ids = case["domain_ids"]
    sampled = case["samples_per_domain"] * len(set(ids))
    for turn, expected in enumerate(case["passes"]):
        for batch in (sampled, 5):  # the stream is the same wherever it is cut
            batches = released_batches(ids, sampled, batch, turn)
            assert [i for part in batches for i in part] == expected
            assert {len(part) for part in batches[:-1]} <= {batch} and 0 < len(batches[-1]) <= batch


class Sampler:
    """One for the whole run, built for phase 2's batch; both phases' loaders read from it."""

    def __init__(self, domain_ids: list[int], batch: int) -> None:
        self.images: dict[int, list[int]] = {}
        for index, domain in enumerate(domain_ids):
            self.images.setdefault(domain, []).append(index)
        generator = random.Random(0)
        for domain in sorted(self.images):
            generator.shuffle(self.images[domain])
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
    stream = list(sampler)
    return [stream[start:start + batch] for start in range(0, len(stream), batch)]


@pytest.mark.parametrize("sizes", [[*SIZES.values()], [100, 130, 400, 500], [57, 91, 61]])
def test_the_stream_of_eleven_passes_is_the_samplers(sizes):
    ids = [domain for domain, size in enumerate(sizes) for _ in range(size)]
    sampler = Sampler(ids, TARGET)
    passes = [SOURCE, *[TARGET] * 10]  # one epoch of phase 1, ten of phase 2
    expected = [loaded(sampler, batch) for batch in passes]
    assert [released_batches(ids, TARGET, batch, turn) for turn, batch in enumerate(passes)] == expected
    seen = {i for part in expected for batch in part for i in batch}
    assert len(seen) == len(ids) or len(sizes) == 4  # every domain is walked through in full
    with pytest.raises(ValueError, match=f"batch of 2 cannot hold the {len(sizes)} source domains"):
        released_batches(ids, 2, 400, 0)


def test_domains_of_equal_size_have_orders_of_their_own():
    stream = [i for part in released_batches([0] * 20 + [1] * 20, 40, 40, 0) for i in part]
    assert sorted(stream) == list(range(40))
    assert [i for i in stream if i < 20] != [i - 20 for i in stream if i >= 20]


def test_both_phases_of_a_run_take_their_place_in_the_one_stream():
    import torch

    from ucdr_ref.config import resolve
    from ucdr_ref.data.benchmarks import Protocol
    from ucdr_ref.data.images import Files
    from ucdr_ref.experiments.retrieval import phase_data
    domains = [name for name, size in SIZES.items() for _ in range(size)]
    files = Files([f"{i}.png" for i in range(len(domains))], ["a"] * len(domains), domains)
    protocol = Protocol("", ["a"], sorted(SIZES), files, None, [], "real")
    config = resolve({"variant": "released", "dataset": "domainnet", "source_epochs": 2, "seed": 5})
    sampler = Sampler([sorted(SIZES).index(name) for name in domains], config.target_batch)
    for phase, batch, epochs in (("source", config.source_batch, 2), ("target", config.target_batch, 4)):
        order = phase_data(phase, protocol, config, 32, torch.device("cpu")).order
        expected = [loaded(sampler, batch) for _ in range(epochs)]
        assert [order(epoch) for epoch in range(epochs)] == expected and order(1) == expected[1]
