"""Interpreter of PyTorch's pickles that executes nothing.

A pickle is a program, so none is handed to an unpickler that could import or call what the file names.
`unpickle` interprets the few instructions that PyTorch's writers use and knows tensors, dicts, lists and
inert stand-ins for module classes only.
"""
from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NUMBERS = {"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
           "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8,
           "Byte": torch.uint8, "Bool": torch.bool}
STORAGES = {f"torch.{name}Storage": dtype for name, dtype in NUMBERS.items()}
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "BINSTRING", "SHORT_BINSTRING"}
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
MAX_STEPS = 1_000_000  # instructions; ViT-L/14 needs about 15,000
MAX_NAME, MAX_RANK = 300, 8
MAX_SIZE, MAX_NESTING = 2_000_000, 64  # of what a pickle builds: values, dicts in dicts; see `bounded`
MAX_KEY = 2**53  # of a number as a key: larger ones can be chosen such that thousands have one hash

LoadStorage = Callable[[str, torch.dtype, int], Tensor]


class FormatError(ValueError):
    """The file is broken, hostile or of another kind; the message says which, without the path."""


class Instance:
    """Inert stand-in for an object of a TorchScript class: its attributes and nothing else."""

    def __init__(self) -> None:
        self.attributes: dict[Any, Any] = {}


def unpickle(program: Any, storage: LoadStorage) -> Any:
    """The object that a program (bytes, or a file, read up to the end of the program) builds.

    storage: gives the vector for (key, dtype, elements) of a persistent id; each tensor is a view of one.
    """
    stack: list[Any] = []
    outer: list[list[Any]] = []
    memo: dict[Any, Any] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(program)):
        name = opcode.name
        if count > MAX_STEPS:
            raise FormatError(f"has a pickle of more than {MAX_STEPS} instructions")
        if name == "STOP":
            return bounded(stack.pop())
        if name in LITERALS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name]())
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            outer.append(stack)
            stack = []
        elif name == "TUPLE":
            value, stack = tuple(stack), outer.pop()
            stack.append(value)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            length = int(name[-1])
            stack[-length:] = [tuple(stack[-length:])]
        elif name in ("APPENDS", "SETITEMS"):
            items, stack = stack, outer.pop()
            add(stack[-1], items)
        elif name in ("APPEND", "SETITEM"):
            length = 1 if name == "APPEND" else 2
            items = stack[-length:]
            del stack[-length:]
            add(stack[-1], items)
        elif name == "GLOBAL":
            stack.append(known(str(argument).replace(" ", ".")))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            if not callable(function):  # what `known` gives is all that could be
                raise FormatError("has a pickle that calls something other than a tensor constructor")
            stack.append(function(*arguments))
        elif name == "BUILD":
            state, target = stack.pop(), stack[-1]
            if isinstance(target, Instance) and isinstance(state, dict):
                target.attributes = state
            elif not isinstance(target, dict):  # a state dict carries `_metadata`, which is dropped
                raise FormatError("has a pickle that sets the state of something other than a module")
        elif name == "BINPERSID":
            stack.append(storage(*vector_claim(*stack.pop())))
        elif name != "PROTO":
            raise FormatError(f"has a pickle with the instruction {name}, which no weight file needs")
    raise FormatError("ends inside its pickle")


def known(name: str) -> Callable[..., Any] | torch.dtype:
    """What a global of the file stands for: a constructor of ours, or the numbers of a storage."""
    if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
        return rebuild
    if name.startswith("torch.jit._pickle.") or name in ("torch.Size", "torch._utils._rebuild_parameter"):
        return lambda value, *_: value  # typed lists of TorchScript, shapes, parameters
    if name == "collections.OrderedDict":
        return lambda: {}
    if name.startswith("__torch__."):
        return lambda *_: Instance()
    if name in STORAGES:
        return STORAGES[name]
    raise FormatError(f"has a pickle that asks for {name[:MAX_NAME]}, which no weight file needs; "
                      "nothing was executed")


def vector_claim(kind: Any, dtype: Any, key: Any, place: Any, count: Any,
                 view: Any = None) -> tuple[str, torch.dtype, int]:
    """(key, dtype, elements) of a persistent id, checked."""
    if kind != "storage" or not isinstance(dtype, torch.dtype) or view is not None:
        raise FormatError("has a pickle with an unknown kind of storage")
    if not (isinstance(key, str) and is_size(count)):
        raise FormatError("has a pickle with a malformed storage")
    return key, dtype, count


def rebuild(vector: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """The view of a storage that `_rebuild_tensor_v2` describes, checked against the storage."""
    if not (all(map(is_size, (offset, *size, *stride))) and len(stride) == len(size) <= MAX_RANK):
        raise FormatError("has a tensor with malformed or negative sizes")
    count = math.prod(size)
    if count == 0:
        return vector.new_empty(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if max(count - 1, last) >= len(vector):
        raise FormatError(f"has a tensor of sizes {list(size)} that does not fit its storage of "
                          f"{len(vector)} elements")
    return vector.as_strided(size, stride, offset)


def is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def is_key(value: Any) -> bool:
    """Plain keys only: hashing nested tuples can take forever."""
    return value is None or isinstance(value, str) or (isinstance(value, int) and abs(value) < MAX_KEY)


def add(target: Any, items: list[Any]) -> None:
    """items: of a list; of a dict, keys and values in turn."""
    if isinstance(target, list):
        target.extend(items)
    elif isinstance(target, dict) and all(map(is_key, items[::2])):
        target.update(zip(items[::2], items[1::2], strict=True))
    else:
        raise FormatError("has a pickle that fills something other than a list or a dict with plain keys")


def bounded(root: Any) -> Any:
    """`root`; FormatError when it nests too deeply, or is too large, for the code that walks or prints it.

    What is reached several times counts as often, for so does whoever walks: sixty lists can print as 2^60
    numbers.
    """
    level, size = [root], 1
    for _ in range(MAX_NESTING):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, Instance):
                value = value.attributes
            if isinstance(value, str):
                size += len(value) // 16
            elif isinstance(value, (list, tuple)):
                inner += value
            elif isinstance(value, dict):
                inner += (*value.keys(), *value.values())
            if size + len(inner) > MAX_SIZE:
                raise FormatError(f"has a pickle of more than {MAX_SIZE} values, each counted as often as "
                                  "it is met")
        if not inner:
            return root
        level, size = inner, size + len(inner)
    raise FormatError(f"has a pickle that nests deeper than {MAX_NESTING}")
