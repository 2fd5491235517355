"""Checkpoints whose pickles build little that is endless to walk, to print or to hash."""
from __future__ import annotations


import pytest
import torch

from tests.weight_files import text, with_pickle
from ucdr_ref.clip import unpickle
from ucdr_ref.clip.unpickle import FormatError, bounded
from ucdr_ref.machine.files import load_state

PRIME = 2**61 - 1  # Python hashes whole numbers modulo this


def shared(levels: int = 60) -> bytes:
    """A list in a list twice, and so on: `levels` objects that print as 2^levels."""
    return b"]" + b"".join(b"q" + bytes([i]) + b"](h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(levels))


def program(value: bytes) -> bytes:
    return b"\x80\x02}" + text("x") + value + b"s."


def same_hash(count: int) -> bytes:
    keys = b"".join(b"\x8a\x0b" + (k * PRIME).to_bytes(11, "little") + b"N" for k in range(1, count + 1))
    return b"}(" + keys + b"u"


MODULE = b"c__torch__.a\nB\n)\x81"


def shared_modules(levels: int = 60) -> bytes:
    """A module that holds one module under two names, and so on."""
    inner = b"".join(b"q%c" % i + MODULE + b"}(" + text("x") + b"h%c" % i + text("y") + b"h%c" % i + b"ub" for i in range(levels))
    return b"\x80\x02" + MODULE + inner + b"."


PROGRAMS = {
    "shared modules": (shared_modules(), "each counted as often"),
    "module in itself": (b"\x80\x02" + MODULE + b"q\0}" + text("x") + b"h\0sb.", "nests deeper"),
    "long module path": (b"\x80\x02" + MODULE + b"}" + text("x" * 200) + MODULE + b"}" + text("y" * 200) + MODULE + b"sbsb.",
                         "malformed attribute name"),
    "shared": (program(shared()), "each counted as often"),
    "nested lists": (program(b"]" * 100_000 + b"a" * 99_999), "nests deeper"),
    "nested tuples": (program(b")" + b"\x85" * 100_000), "nests deeper"),
    "shared tuples": (program(b"N" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))), "each counted as often"),
    "one hash": (program(same_hash(90_000)), "plain keys"),
    "tuple key": (program(b"})Ns"), "plain keys"),
    "cycle": (b"\x80\x02]q\0h\0a.", "nests deeper"),
    "text": (program(b"](" + text("a" * 100_000) + b"q\0" + b"h\0" * 1000 + b"e"), "each counted as often"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_checkpoint_that_is_endless_to_walk_is_refused_in_a_sentence(name, tmp_path):
    torch.save({"a": torch.zeros(4)}, tmp_path / "base")
    data, reason = PROGRAMS[name]
    path = with_pickle(data, (tmp_path / "base").read_bytes(), tmp_path / "best.pt")
    with pytest.raises(ValueError) as caught:
        load_state(path)
    message = str(caught.value)
    assert reason in message and str(path) in message and "\n" not in message and len(message) < 2000


def test_values_are_counted_as_often_as_they_are_reached(monkeypatch):
    row = [1, 2, 3]
    monkeypatch.setattr(unpickle, "MAX_SIZE", 17)
    for small in ([row] * 4, {"a": [row, (row,)]}, ["a" * 240]):  # 1 + 4 * 4; 2 + 1 + 4 + 1 + 4; 2 + 15
        assert bounded(small) is small
    for large in ([row] * 4 + [1], {"a": [row] * 4}, ["a" * 256]):
        with pytest.raises(FormatError, match="more than 17 values"):
            bounded(large)


def test_nesting_is_counted_from_the_outermost(monkeypatch):
    monkeypatch.setattr(unpickle, "MAX_NESTING", 4)
    assert bounded([({},)]) == [({},)]
    with pytest.raises(FormatError, match="nests deeper than 4"):
        bounded([[[[1]]]])


def test_keys_that_a_checkpoint_may_have(tmp_path):
    kept = {"a": 1, 3: 2, -7: 3, None: 4, True: 5}
    torch.save({"x": kept}, tmp_path / "a")
    assert load_state(tmp_path / "a")["x"] == kept
    for key in (2**53, -2**60, 0.5, PRIME):
        torch.save({"x": {key: 1}}, tmp_path / "a")
        with pytest.raises(ValueError, match="plain keys"):
            load_state(tmp_path / "a")
