"""The released order of training images (D15) against what the released sampler itself gave."""
import json
from pathlib import Path

import pytest

from tests.helpers import tiny_state_dict
from ucdr_ref.clip.model import CLIP
from ucdr_ref.config import resolve
from ucdr_ref.data.benchmarks import Protocol
from ucdr_ref.data.images import Files, released_batches
from ucdr_ref.experiments.retrieval import phase_data

CASES = json.loads((Path(__file__).parents[1] / "golden" / "released_order.json").read_text())
SIZES = {"clipart": 100, "infograph": 130, "painting": 400, "quickdraw": 500, "real": 250}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_the_passes_are_those_of_the_released_sampler(case):
    ids = case["domain_ids"]
    sampled = case["samples_per_domain"] * len(set(ids))
    for turn, expected in enumerate(case["passes"]):
        for batch in (sampled, 5):  # the stream is the same wherever it is cut
            batches = released_batches(ids, sampled, batch, turn)
            assert [i for part in batches for i in part] == expected
            assert {len(part) for part in batches[:-1]} <= {batch} and 0 < len(batches[-1]) <= batch


def test_both_phases_of_a_run_take_their_place_in_the_one_stream():
    domains = [name for name, size in SIZES.items() for _ in range(size)]
    files = Files([f"{i}.png" for i in range(len(domains))], ["a"] * len(domains), domains)
    protocol = Protocol("", ["a"], sorted(SIZES), files, None, [], "real", None, [])
    config = resolve({"variant": "released", "dataset": "domainnet", "source_epochs": 2, "seed": 5})
    ids = [sorted(SIZES).index(name) for name in domains]
    clip = CLIP.from_state_dict(tiny_state_dict())
    for phase, batch, turns in (("source", config.source_batch, (0, 1)), ("target", config.target_batch, (2, 3, 4, 5))):
        order = phase_data(phase, protocol, config, clip).order
        expected = [released_batches(ids, config.target_batch, batch, turn) for turn in turns]
        assert [order(epoch) for epoch in range(len(turns))] == expected and order(1) == expected[1]
