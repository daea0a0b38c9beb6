"""A GPU of any size that computes nothing: what a training step takes of it, counted.

    import fake_cuda  # before torch
    with fake_cuda.fake_gpu(Card("RTX 4090", 24, (8, 9))) as gpu:
        policy = ...  # tensors on "cuda" have a shape and a type, and no values
        with gpu.watch() as step:
            loss.backward()
        print(step.peak_bytes, step.launches, step.flops, step.waits)

Operators run under PyTorch's FakeTensorMode, through autograd and autocast as CUDA tensors do (the
device itself is tests/hostcuda's), so that an 8B fits anywhere. What is counted:

    bytes     of all tensors alive on the device, each a multiple of 512 as in PyTorch's allocator,
              and what two kernels take inside: attention's backward pass (FlashAttention 2 and the
              memory-efficient one), and bitsandbytes' product, which dequantises its weight
    launches  operators that compute something on the device, each as one kernel
    flops     of matrix products, by torch.utils.flop_counter; of attention, by its visible keys
    waits     how often the host reads a value from the device

What it cannot show: time; numbers; the CUDA context and cuBLAS' workspace (0.6 GiB and more);
fragments of the allocator; the workspace of other kernels; operators that launch several kernels; a
kernel that refuses its shapes. A value that is read is 1.0, or True. It relies on the pinned torch.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "hostcuda"))

import hostcuda  # noqa: F401  # isort: skip  # before torch, which asks it for the device
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

GIB = 2**30
aten = torch.ops.aten

# CUDA has a kernel for each of these; without one they would be composed of others here, and
# counted as these.
_kernels = torch.library.Library("aten", "IMPL")
for _name in ("silu_backward", "_fused_rms_norm"):
    _kernels.impl(_name, lambda *args, **kwargs: None, "CUDA")


@dataclass(frozen=True)
class Card:
    """What `torch.cuda.get_device_properties` returns."""

    name: str
    gib: float
    capability: tuple[int, int]
    uuid: str = "fake"
    multi_processor_count: int = 128

    @property
    def total_memory(self) -> int:
        return int(self.gib * GIB)

    @property
    def major(self) -> int:
        return self.capability[0]

    @property
    def minor(self) -> int:
        return self.capability[1]


@dataclass
class Step:
    """What was counted while it was watched.

    Attributes:
        visible: keys that all queries of a layer's attention see; attention is left out of the
            operations where it is None.
        peak_bytes: most that was alive at once.
        peak_operator: whose result made that peak.
    """

    visible: int | None = None
    peak_bytes: int = 0
    peak_operator: str = ""
    launches: int = 0
    flops: float = 0.0
    waits: int = 0


@contextlib.contextmanager
def fake_gpu(card: Card) -> Iterator[Gpu]:
    """While this lasts, "cuda" is a fake card of this kind."""
    gpu = Gpu(card)
    cuda = {
        "is_bf16_supported": lambda including_emulation=True: (
            card.capability >= (8, 0) or including_emulation
        ),
        "get_device_capability": lambda device=None: card.capability,
        "get_device_name": lambda device=None: card.name,
        "get_device_properties": lambda device=None: card,
        "mem_get_info": lambda device=None: (card.total_memory - gpu.bytes, card.total_memory),
        "memory_allocated": lambda device=None: gpu.bytes,
        "memory_reserved": lambda device=None: gpu.bytes,
        "max_memory_allocated": lambda device=None: gpu.step.peak_bytes,
        "max_memory_reserved": lambda device=None: gpu.step.peak_bytes,
    }
    patches = [
        *(mock.patch.object(torch.cuda, name, value) for name, value in cuda.items()),
        # Else it takes is_available() for leave to compute small constants on the device.
        mock.patch.object(FakeTensorMode, "avoid_device_init", True),
        mock.patch.object(_foreach_utils, "_foreach_supported_types", [torch.Tensor, FakeTensor]),
        mock.patch.object(torch.nn.Module, "_apply", _apply),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", gpu.attention),
        torch.autograd.set_multithreading_enabled(False),  # the modes are this thread's
        FakeTensorMode(allow_non_fake_inputs=True),
        gpu,
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield gpu


class Gpu(TorchDispatchMode):
    """The card: sees every operator before FakeTensorMode does, and counts.

    Attributes:
        bytes: alive now.
        step: what is being watched; else one that nobody reads.
    """

    def __init__(self, card: Card):
        super().__init__()
        self.card = card
        self.bytes = 0
        self.step = Step()
        self._alive: dict[int, tuple[Any, int]] = {}

    @contextlib.contextmanager
    def watch(self, visible: int | None = None) -> Iterator[Step]:
        """Counts anew, from what is alive now."""
        before, self.step = self.step, Step(visible, self.bytes)
        try:
            yield self.step
        finally:
            self.step = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks for a tensor's device
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if "varlen_attn" in name and self.card.capability < (8, 0):
            raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")
        if name == "_local_scalar_dense" and _has_no_value(args[0]):
            self.step.waits += args[0].is_cuda
            return _one(args[0].dtype)
        if name == "gemm_4bit":
            with self:
                return _dequantised_product(*args, **kwargs)
        workspace = []
        if name in _WORKSPACES:
            with self:
                workspace = _WORKSPACES[name](*args)
        out = func(*args, **kwargs)
        self._count(func, name, args, kwargs, out)
        del workspace
        return out

    def _count(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        given, made = _tensors((args, kwargs)), _tensors(out)
        for tensor in made:
            self._take(tensor, name)
        if not any(tensor.is_cuda for tensor in (*given, *made)):
            return
        if name == "_to_copy" and made[0].device.type == "cpu":
            self.step.waits += 1
        if name not in _NO_LAUNCH and (func._schema.is_mutable or not _are_views(made, given)):
            self.step.launches += 1
        if "attn" in name or "attention" in name:
            self.step.flops += _attention_flops(name, args, self.step.visible or 0)
        elif func._overloadpacket in flop_registry:
            self.step.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)

    def _take(self, tensor: torch.Tensor, operator: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if not tensor.is_cuda or key in self._alive:
            return
        size = -(-storage.nbytes() // 512) * 512
        self._alive[key] = weakref.ref(storage, lambda _: self._give_back(key)), size
        self.bytes += size
        if self.bytes > self.step.peak_bytes:
            self.step.peak_bytes, self.step.peak_operator = self.bytes, operator

    def _give_back(self, key: int) -> None:
        self.bytes -= self._alive.pop(key)[1]

    def attention(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **more
    ):
        """`scaled_dot_product_attention` by the kernel that CUDA takes: FlashAttention without a
        mask and from Ampere on, else the memory-efficient one."""
        if attn_mask is None and self.card.capability >= (8, 0):
            return aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, scale=scale
            )[0]
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        bias = None if attn_mask is None else _as_bias(attn_mask, query, key)
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, query.requires_grad, dropout_p, is_causal, scale=scale
        )[0]


def _apply(module: torch.nn.Module, convert: Any) -> torch.nn.Module:
    """`nn.Module._apply`, which cannot exchange a fake parameter in place: it gets a new one."""
    for child in module.children():
        child._apply(convert)
    for name, parameter in module.named_parameters(recurse=False):
        with torch.no_grad():
            converted = convert(parameter)
        if converted is not parameter:
            new = torch.nn.Parameter(converted, parameter.requires_grad)
            module.register_parameter(name, new)
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, convert(buffer))
    return module


# -- what operators do on CUDA --

_NO_LAUNCH = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"),
    *("detach", "alias", "lift_fresh", "_unsafe_view", "is_same_size"),
}


def _are_views(made: list[torch.Tensor], given: list[torch.Tensor]) -> bool:
    storages = {tensor.untyped_storage()._cdata for tensor in given}
    return bool(made) and all(tensor.untyped_storage()._cdata in storages for tensor in made)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _has_no_value(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.constant is None


def _one(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _dequantised_product(
    x, weight, shape, scales, block_size, quant_type, bias=None,
    scales_8bit=None, scales_code=None, scales_offset=None,
):  # fmt: skip
    """bitsandbytes' `_dequant_linear_fallback`, which CUDA takes of more than some hundred rows."""
    ops = torch.ops.bitsandbytes
    if scales_8bit is not None:
        coarse = ops.dequantize_blockwise(scales_8bit, scales, scales_code, 256, torch.float32)
        scales = coarse + scales_offset
    plain = ops.dequantize_4bit(weight, scales, block_size, quant_type, shape, x.dtype)
    rows = x.reshape(-1, x.shape[-1])  # mm, not @: what is called here is not taken apart
    out = torch.mm(rows, plain.t()) if bias is None else torch.addmm(bias, rows, plain.t())
    return out.view(*x.shape[:-1], shape[0])


def _attention_flops(name: str, args: Any, visible: int) -> int:
    """QKᵀ and its product with V forward; backward both of their gradients, and QKᵀ once more."""
    is_backward = "backward" in name
    query = args[1] if is_backward else args[0]
    heads = query.shape[-2] if query.dim() == 3 else query.shape[1]
    return (10 if is_backward else 4) * visible * heads * query.shape[-1]


def _as_bias(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A mask (…, q, k) as the memory-efficient kernel wants it: numbers, rows of multiples of 8."""
    bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -torch.inf)
    length = key.shape[2]
    if length % 8:
        bias = torch.nn.functional.pad(bias, (0, 8 - length % 8))[..., :length]
    return bias.expand(query.shape[0], query.shape[1], query.shape[2], length)


def _varlen_workspace(grad, query, key, value, out, normalizers, cu_q, *rest) -> list:
    """flash_api.cpp, mha_varlen_bwd: query (T, heads, D), key (Tk, key-value heads, D)."""
    return _flash_workspace(query, key, len(cu_q) - 1)


def _sdpa_flash_workspace(grad, query, key, *rest) -> list:
    """The same of padded rows, (B, heads, L, D)."""
    rows = (x.transpose(1, 2).flatten(0, 1) for x in (query, key))
    return _flash_workspace(*rows, query.shape[0])


def _flash_workspace(query: torch.Tensor, key: torch.Tensor, sequences: int) -> list:
    tokens, heads, size = query.shape
    rows = tokens + 128 * sequences
    made = [
        query.new_empty(rows, heads, -(-size // 32) * 32, dtype=torch.float32),  # ∂/∂query, summed
        query.new_empty(heads, rows, dtype=torch.float32),
    ]
    if key.shape[1] != heads:  # of each query head, summed over a group afterwards
        made += [key.new_empty(len(key), heads, size) for _ in range(2)]
    return made


def _efficient_workspace(grad, query, *rest) -> list:
    """mem_eff_attention/kernel_backward.h, workspace_elements_gq: query (B, heads, L, D)."""
    return [torch.empty_like(query, dtype=torch.float32)]


_WORKSPACES = {
    "_varlen_attn_backward": _varlen_workspace,
    "_scaled_dot_product_flash_attention_backward": _sdpa_flash_workspace,
    "_scaled_dot_product_efficient_attention_backward": _efficient_workspace,
}
