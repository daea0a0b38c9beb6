"""Training layers that start fewer kernels and keep less for the backward pass, on a GPU.

    fuse_layers(policy)     # after add_adapter; once a policy

Three layers make most of what a step of a QLoRA model launches and keeps beside its products:

    LoRA linear   out = x Wᵀ + b + s · (x Aᵀ) Bᵀ, as one autograd function: the sums go into the
                  products (addmm), A and B are rounded to half precision once a pass and not once
                  a layer and pass, and of the activations only x and x Aᵀ are kept
    RMSNorm       PyTorch's own kernel instead of seven, which keeps x and a number a row
    SwiGLU        silu(gate) · up keeps gate and up alone, and computes silu(gate) again

Naive equivalents (what the tests compare with): PEFT's LoRA layer under autocast, and the model's
own norm and MLP. A layer that is not exactly one of these (dropout, DoRA, several adapters, a norm
that does more) stays as it is; and where no gradient is wanted PEFT's layers run, since
bitsandbytes has kernels of its own for a few rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm


def fuse_layers(policy: PeftModel) -> int:
    """Gives the layers their fused forward passes, where they have one, and says how many have."""
    causal: Any = policy.get_base_model()
    dtype = causal.get_input_embeddings().weight.dtype
    layers = [module for module in causal.modules() if _is_plain_lora(module)]
    if layers:
        adapters = _RoundedAdapters(layers, dtype)
        for layer, rounded in zip(layers, adapters.triples, strict=True):
            layer.forward = partial(_lora_forward, weakref.ref(layer), rounded)
        causal.base_model.register_forward_pre_hook(adapters.round)
    norms = [m for m in causal.modules() if _is_written_as(m, LlamaRMSNorm)]
    norms = [norm for norm in norms if norm.weight.dtype == dtype]  # some are kept in float32
    for norm in norms:
        norm.forward = partial(_norm_forward, weakref.ref(norm))
    mlps = [m for m in causal.modules() if _is_written_as(m, LlamaMLP) and _is_silu(m.act_fn)]
    for mlp in mlps:
        mlp.forward = partial(_mlp_forward, weakref.ref(mlp))
    return len(layers) + len(norms) + len(mlps)


def _is_written_as(module: nn.Module, model: type[nn.Module]) -> bool:
    """Whether the module's forward pass is word for word that of `model`, of which most
    architectures of transformers have a copy, and has not been replaced already."""
    code, own = model.forward.__code__, getattr(type(module).forward, "__code__", None)
    return (
        own is not None
        and own.co_code == code.co_code
        and own.co_names == code.co_names
        and own.co_consts[1:] == code.co_consts[1:]  # the first is the docstring
        and "forward" not in vars(module)
    )


def _is_silu(function: nn.Module) -> bool:
    return isinstance(function, nn.SiLU | SiLUActivation)


# -- LoRA linear --


def _is_plain_lora(module: nn.Module) -> bool:
    if not isinstance(module, LoraLayer) or type(module.base_layer) not in (nn.Linear, Linear4bit):
        return False
    names: Any = module.active_adapters
    if len(names) != 1 or set(module.lora_A) != set(names):
        return False
    lora: Any = module
    (name,) = names
    return (
        name not in lora.lora_variant
        and not lora.lora_bias[name]
        and isinstance(lora.lora_dropout[name], nn.Identity)
    )


class _RoundedAdapters:
    """The adapters in the arithmetic's type, B with its factor s in it.

    Attributes:
        triples: A (r, in), s · B (out, r) and s, (1,) float32, of each layer.
    """

    def __init__(self, layers: list[Any], dtype: torch.dtype):
        names = [layer.active_adapters[0] for layer in layers]
        named = list(zip(layers, names, strict=True))
        self._a = [layer.lora_A[name].weight for layer, name in named]
        self._b = [layer.lora_B[name].weight for layer, name in named]
        self._factors = [float(layer.scaling[name]) for layer, name in named]
        self._rounded_a = [torch.empty_like(a, dtype=dtype) for a in self._a]
        self._rounded_b = [torch.empty_like(b, dtype=dtype) for b in self._b]
        factors = [b.new_full((1,), s) for b, s in zip(self._b, self._factors, strict=True)]
        self.triples = list(zip(self._rounded_a, self._rounded_b, factors, strict=True))

    def round(self, *_: Any) -> None:
        """Before each forward pass with gradients: the optimizer may have stepped, or a file been
        read."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                torch._foreach_copy_(self._rounded_a, self._a)
                torch._foreach_copy_(self._rounded_b, torch._foreach_mul(self._b, self._factors))


def _lora_forward(
    reference: Callable[[], Any],
    rounded: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    x: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    layer = reference()
    if not torch.is_grad_enabled() or layer.disable_adapters or layer.merged or args or kwargs:
        return type(layer).forward(layer, x, *args, **kwargs)
    (name,) = layer.active_adapters
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return _LoraLinear.apply(x, a, b, layer.base_layer, *rounded)


class _LoraLinear(torch.autograd.Function):
    """See the module's docstring; x is (…, in), the result (…, out) in the arithmetic's type."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        base: nn.Linear,
        rounded_a: torch.Tensor,
        rounded_b: torch.Tensor,
        factor: torch.Tensor,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(rounded_a.dtype)
        low = rows @ rounded_a.T
        out = rows @ _weight(base, rows.dtype).T
        out.addmm_(low, rounded_b.T)
        if base.bias is not None:
            out += base.bias
        ctx.save_for_backward(rows, low)
        ctx.base, ctx.rounded, ctx.factor = base, (rounded_a, rounded_b), factor
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        rows, low = ctx.saved_tensors
        rounded_a, rounded_b = ctx.rounded
        grad = grads[0].reshape(-1, grads[0].shape[-1]).to(rows.dtype)
        grad_low = grad @ rounded_b  # with s in it, as ∂/∂x and ∂/∂A want it
        grad_a = (grad_low.T @ rows).float()
        # The factor is a float32 tensor, so that one kernel multiplies and casts.
        grad_b = (grad.T @ low) * ctx.factor
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _weight(ctx.base, rows.dtype)
            grad_x.addmm_(grad_low, rounded_a)
            grad_x = grad_x.view(ctx.x_shape).to(ctx.x_dtype)
        return grad_x, grad_a, grad_b, None, None, None, None


def _weight(base: nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """(out, in) the frozen weight; a 4-bit one for as long as it is needed."""
    weight: Any = base.weight
    if isinstance(base, Linear4bit):
        return dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    return weight.detach().to(dtype)


# -- RMSNorm --


def _norm_forward(reference: Callable[[], Any], x: torch.Tensor) -> torch.Tensor:
    module = reference()
    return _RmsNorm.apply(x, module.weight.to(x.dtype), module.variance_epsilon)


class _RmsNorm(torch.autograd.Function):
    """x (…, H) → the same shape and type; the weight (H,) gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        x = x.contiguous()
        out, inverse_rms = torch._fused_rms_norm(x, [len(weight)], weight, epsilon)
        ctx.save_for_backward(x, inverse_rms)
        ctx.weight = weight.detach()
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, inverse_rms = ctx.saved_tensors
        if x.is_cuda:
            grad, _ = torch.ops.aten._fused_rms_norm_backward(
                # contiguous: a kernel that takes no strides would not say so (norms of heads)
                grads[0].contiguous(),
                x,
                [x.shape[-1]],
                inverse_rms,
                ctx.weight,
                [True, False],
            )
            return grad, None, None
        # ∂/∂x of x̂ = x / rms: (ĝ − x̂ · mean(ĝ x̂)) / rms, with ĝ = g · w
        normed = x.float() * inverse_rms.float()
        scaled = grads[0].float() * ctx.weight.float()
        inner = (scaled * normed).mean(-1, keepdim=True)
        return ((scaled - normed * inner) * inverse_rms).to(x.dtype), None, None


# -- SwiGLU --


def _mlp_forward(reference: Callable[[], Any], x: torch.Tensor) -> torch.Tensor:
    module = reference()
    return module.down_proj(_SwiGlu.apply(module.gate_proj(x), module.up_proj(x)))


class _SwiGlu(torch.autograd.Function):
    """silu(gate) · up, all of one shape."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grads[0] * up, gate)
        return grad_gate, F.silu(gate).mul_(grads[0])
