"""A small world for the tests of the whole: three domains, eight classes, a random CLIP."""
import signal
from pathlib import Path

import pytest
import torch

from tests.helpers import write_world

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts the suite in the background ignores it
torch.set_num_threads(1)  # the tests' models are small: more threads only fight for the cores


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `helpers.write_world` makes it."""
    return write_world(tmp_path_factory.mktemp("world"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, for one of several workers: started last, they alone would run to the end."""
    items.sort(key=lambda item: "tests/whole/" not in item.nodeid)
