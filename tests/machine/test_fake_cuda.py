"""Both methods on tensors that claim to be on a GPU and hold nothing: what mixes devices raises. Forward passes only."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import tiny_state_dict
from ucdr_ref import metrics
from ucdr_ref.clip.model import CLIP
from ucdr_ref.clip.zero_shot import ZeroShot, normalize
from ucdr_ref.config import Config
from ucdr_ref.machine.processes import autocast
from ucdr_ref.sre import adapter as sre
from ucdr_ref.sre.graph import normalized_adjacency
from ucdr_ref.ucdr import adapter as ucdr
from ucdr_ref.ucdr.closed_form import ClosedForm, ClosedFormAdapter, center

try:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
except ImportError:
    pytest.skip("this PyTorch has no fake tensors", allow_module_level=True)

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
with FakeTensorMode():
    probe = torch.empty(2, device=CUDA)
try:
    probe[1:]
except RuntimeError:
    pytest.skip("this PyTorch's fake tensors ask for a GPU's driver, as those of 2.4 do", allow_module_level=True)


class Pretended(FakeTensorMode):
    """Gives an answer where a value would decide: 1 for a number, two places for `nonzero`, all rows for `unique`."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[int, int] = {}  # {id of a tensor: another answer than 1}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            return {torch.bool: True}.get(args[0].dtype, self.numbers.get(id(args[0]), 1.0 if args[0].is_floating_point() else 1))
        if func in (aten.nonzero.default, aten._unique2.default):
            with self:
                if func is aten.nonzero.default:
                    return torch.empty(2, args[0].dim(), dtype=torch.long, device=args[0].device)
                number = torch.empty(len(args[0]), dtype=torch.long, device=args[0].device)
                return torch.empty_like(args[0]), number, number.clone()
        return super().__torch_dispatch__(func, types, args, kwargs)


def values(x: Tensor) -> Any:
    return [values(row) for row in x] if x.dim() else x.item()


@contextlib.contextmanager
def pretended(*modules: nn.Module) -> Iterator[Pretended]:
    """Within it, all parameters and buffers of the modules are on a GPU, and so is nothing else."""
    def moved(x: Tensor) -> Tensor:
        with mode:
            return torch.empty(x.shape, dtype=x.dtype, device=CUDA)

    with pytest.MonkeyPatch.context() as patch:
        mode = Pretended()
        patch.setattr(Tensor, "tolist", values)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)  # else no autocast without a GPU
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        for part in {id(part): part for module in modules for part in module.modules()}.values():
            for held in (part._parameters, part._buffers):
                for name, value in held.items():
                    if value is not None:
                        held[name] = nn.Parameter(moved(value)) if held is part._parameters else moved(value)
        with mode, torch.no_grad():
            yield mode


def on_gpu(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*size, dtype=dtype, device=CUDA)


def ids(count: int) -> Tensor:
    return on_gpu(count, dtype=torch.long)


def stays(x: Any, *size: int) -> None:
    assert isinstance(x, FakeTensor) and x.device == CUDA and tuple(x.shape) == size, (x, size)


@pytest.fixture
def clip() -> CLIP:
    return CLIP.from_state_dict(tiny_state_dict(vision_layers=1, text_layers=1))


def test_a_mix_of_devices_is_noticed():
    """Otherwise none of the tests below could fail."""
    linear = nn.Linear(3, 2)
    with pretended(linear):
        stays(linear(on_gpu(4, 3)), 4, 2)
        with pytest.raises(RuntimeError, match="device"):
            linear(torch.empty(4, 3))
        with pytest.raises(RuntimeError, match="device"):
            on_gpu(4) + torch.arange(4)
        with pytest.raises(RuntimeError, match="device"):
            on_gpu(4).index_add_(0, torch.zeros(4, dtype=torch.long), on_gpu(4))


D = [{}, {"mask": "none"}, {"feature_token": 1}, {"evaluation_features": "raw"}, {"query_feature": "patch"},
     {"triplet_distance": "plain"}, {"triplet_mean": "paired"}, {"momentum_start": "random"}, {"queue_push": "before"},
     {"class_features": "plain"}, {"class_features": "prototypes"}, {"triplet_pairs": 0}, {"target_epochs": 0}]
S = [{}, {"structure_pairs": "diagonal"}, {"test_attention": "batch"}, {"retention_scale": "scaled"}, {"bank_ring": "released"},
     {"structure_classes": 3}, {"sre_entropy": 0.0, "sre_diversity": 0.0, "sre_bias": 0.0}]


def name(change: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in change.items()) or "paper"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("p", [1, 4])
@pytest.mark.parametrize("change", D, ids=name)
def test_ucdr_adapter_mixes_no_devices(clip, change, p, precision):
    config = replace(Config(context_vectors=4), prompt_length=p, **change)
    features = torch.randn(5, clip.embed_dim) if config.class_features == "prototypes" else None
    method = ucdr.UCDRAdapter(clip, list("abcde"), ["photo", "sketch"], config, features)
    with pretended(method), autocast(precision, CUDA):
        images = normalize(on_gpu(6, 3, 32, 32, dtype=torch.uint8))
        stays(images, 6, 3, 32, 32)
        for phase in method.PHASES:
            method.start(phase)
            for term in method.step(ucdr.Batch(images, ids(6), ids(6)), phase).values():
                stays(term)
        stays(method.encode(images), 6, clip.embed_dim)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("change", S, ids=name)
def test_sre_clip_mixes_no_devices(clip, change, precision):
    small = type("Small", (Config,), {"sre_bank": 8, "sre_batch": 4})
    config = replace(small(sre_hidden=16, sre_warmup=0), **change)
    edges = [(0, 5), (1, 5), (2, 5), (3, 6), (4, 6)]
    method = sre.SRECLIP(clip, list("abcde"), torch.randn(7, 12), normalized_adjacency(edges, 7).to_dense(), [1], config)
    with pretended(method) as mode, autocast(precision, CUDA):
        method.start("sre")
        for rows in (2, 8):  # in the bank: it has room, it is full
            mode.numbers |= {id(method.bank.count): rows, id(method.bank.pointer): 0}
            assert method.bank.full == (rows == 8)
            source, target = on_gpu(4, clip.embed_dim), on_gpu(4, clip.embed_dim)
            for term in method.step(sre.Batch(source, ids(4), target, 1), "sre").values():
                stays(term)
        stays(method.eval().logits(on_gpu(9, clip.embed_dim)), 9, 5)
        stays(method.encode(on_gpu(2, 3, 32, 32)), 2, 16)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_baselines_and_closed_forms_mix_no_devices(clip, precision):
    e = clip.embed_dim
    plain = ZeroShot(clip)
    form = ClosedForm(torch.zeros(e), torch.zeros(e, 1), torch.zeros(e, e))
    method = ClosedFormAdapter(clip, form)
    with pretended(method), autocast(precision, CUDA):
        assert (on_gpu(2, 2) @ on_gpu(2, 2)).dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        stays(plain.encode(on_gpu(2, 3, 32, 32)), 2, e)
        stays(method.encode(on_gpu(2, 3, 32, 32)), 2, e)
        stays(center(on_gpu(3, e)), 3, e)


def test_ranking_mixes_no_devices():
    with pretended(), pytest.MonkeyPatch.context() as patch:
        norms = lambda rows, *_: rows.norm(dim=1)  # noqa: E731  # the real one raises when anything is found: here, always
        patch.setattr(metrics, "squared_norms", norms)
        found = metrics.retrieval(on_gpu(9, 8), ids(9), on_gpu(30, 8), ids(30), k=5)
        assert found["k_used"] == 5 and found["AP"].device.type == "cpu"
        metrics.retrieval(on_gpu(9, 8), torch.empty(9, dtype=torch.long), torch.empty(30, 8), torch.empty(30, dtype=torch.long))
