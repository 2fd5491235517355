"""Linear layers, on a CPU by oneDNN where they are frozen: PyTorch's default there, MKL, leaves up to half of
the speed of AMD's processors unused.
"""
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# oneDNN is no faster without AVX-512, and slower than MKL on Intel's processors with AMX.
AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
amx = getattr(torch.cpu, "_is_amx_tile_supported", None)  # PyTorch 2.4 cannot tell
AMX = amx is not None and amx()
ONEDNN = AVX512 and not AMX and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDNNLinear(torch.autograd.Function):
    """Has a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return onednn(grad, ctx.saved_tensors[0].t(), None), None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear within rounding: x [..., i], weight [o, i], bias [o] -> [..., o]"""
    frozen = not (weight.requires_grad or bias.requires_grad)
    float32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if ONEDNN and frozen and float32 and x.device.type == "cpu":
        return OneDNNLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
