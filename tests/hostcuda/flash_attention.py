"""FlashAttention's varlen kernels in plain PyTorch, with the checks of PyTorch's flash_api.cpp.

A kernel refuses what the real one refuses: compute capability, dtype, head size, strides, int32
lengths. Causal masks are aligned to the last key. What the real kernel would not check, and read or
write beyond, is an error here.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

Window = tuple[int | None, int | None]


def register(
    library: torch.library.Library,
    capability: Callable[[], tuple[int, int]],
    own_reads: Callable[[int], Any],
) -> None:
    """Puts the kernels where CUDA's would be.

    Args:
        library: of the namespace "aten".
        capability: says that of the device.
        own_reads: called with 1 before and -1 after a kernel: what it reads is no wait of the host.
    """

    def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            own_reads(1)
            try:
                return function(capability(), *args, **kwargs)
            finally:
                own_reads(-1)

        return run

    library.impl("_flash_attention_forward", kernel(_forward), "CUDA")
    library.impl("_flash_attention_backward", kernel(_backward), "CUDA")


def _forward(
    capability, query, key, value, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, debug_mask,
    *, scale=None, window_size_left=None, window_size_right=None, **more,
):  # fmt: skip
    if cu_q is None:
        raise NotImplementedError("only the varlen form")
    _check(capability, query, key, value, cu_q, cu_k, max_q, max_k)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    window = (window_size_left, 0 if is_causal else window_size_right)
    out = torch.empty_like(query)
    normalizers = torch.empty(query.shape[1], query.shape[0], dtype=torch.float32, device="cuda")
    for q, k in zip(_sequences(cu_q), _sequences(cu_k), strict=True):
        scores = _scores(query[q], key[k], window, scale)
        normalizers[:, q] = scores.logsumexp(-1)
        # The kernel multiplies in half precision, too; a query that sees nothing gets zeros.
        weights = scores.softmax(-1).nan_to_num(0.0).to(query.dtype).float()
        out[q] = torch.einsum("hqk,khd->qhd", weights, _grouped(value[k], query)).to(query.dtype)
    seed = torch.empty(2, dtype=torch.uint64, device="cuda")
    offset = torch.empty((), dtype=torch.uint64, device="cuda")
    return out, normalizers, seed, offset, torch.empty(0, device="cuda")


def _backward(
    capability, grad_out, query, key, value, out, normalizers, cu_q, cu_k, max_q, max_k, dropout_p,
    is_causal, rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    _check(capability, query, key, value, cu_q, cu_k, max_q, max_k)
    if grad_out.dtype != query.dtype or out.dtype != query.dtype:
        raise RuntimeError("query and dout must have the same dtype")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    window = (window_size_left, 0 if is_causal else window_size_right)
    grads = [torch.zeros_like(x) for x in (query, key, value)]
    for q, k in zip(_sequences(cu_q), _sequences(cu_k), strict=True):
        weights = (_scores(query[q], key[k], window, scale) - normalizers[:, q, None]).exp()
        d_out = grad_out[q].float()
        delta = (d_out * out[q].float()).sum(-1).t()[:, :, None]
        d_weights = torch.einsum("qhd,khd->hqk", d_out, _grouped(value[k], query))
        d_scores = weights * (d_weights - delta) * scale
        d_query = torch.einsum("hqk,khd->qhd", d_scores, _grouped(key[k], query))
        grads[0][q] = d_query.to(query.dtype)
        grads[1][k] = _ungrouped(torch.einsum("hqk,qhd->khd", d_scores, query[q].float()), key)
        grads[2][k] = _ungrouped(torch.einsum("hqk,qhd->khd", weights, d_out), value)
    return tuple(grads)


def _scores(query, key, window: Window, scale: float):
    """(heads, q, k) float32, -inf where a query does not see a key."""
    scores = torch.einsum("qhd,khd->hqk", query.float(), _grouped(key, query)) * scale
    num_q, num_k = scores.shape[1:]
    left, right = window
    rows = torch.arange(num_q)[:, None] + num_k - num_q  # aligned to the last key
    columns = torch.arange(num_k)[None]
    hidden = torch.zeros(num_q, num_k, dtype=torch.bool)
    if right is not None and right >= 0:
        hidden |= columns > rows + right
    if left is not None and left >= 0:
        hidden |= columns < rows - left
    return scores.masked_fill(hidden.to(scores.device), -math.inf)


def _sequences(cumulative) -> list[slice]:
    edges = cumulative.tolist()
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def _grouped(tensor, query):
    """Keys or values, float32, one head for each of the query's."""
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1).float()


def _ungrouped(grad, tensor):
    """The gradient of `_grouped`: heads of a group are summed."""
    length, heads, size = len(grad), tensor.shape[1], grad.shape[-1]
    return grad.view(length, heads, grad.shape[1] // heads, size).sum(2).to(tensor.dtype)


def _check(capability, query, key, value, cu_q, cu_k, max_q, max_k) -> None:
    def check(holds: bool, message: str) -> None:
        if not holds:
            raise RuntimeError(message)

    check(capability >= (8, 0), "FlashAttention only supports Ampere GPUs or newer.")
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    check(is_half, "FlashAttention only support fp16 and bf16 data type")
    check(key.dtype == query.dtype == value.dtype, "query and key must have the same dtype")
    for tensor in (query, key, value, cu_q, cu_k):
        check(tensor.is_cuda, "all inputs must be on CUDA")
    for tensor in (query, key, value):
        check(tensor.stride(-1) == 1, "Input tensor must have contiguous last dimension")
    for tensor in (cu_q, cu_k):
        is_good = tensor.dtype == torch.int32 and tensor.is_contiguous()
        check(is_good, "cu_seqlens must be contiguous int32")
    heads, head_size = query.shape[1:]
    check(head_size <= 256, "FlashAttention forward only supports head dimension at most 256")
    check(head_size % 8 == 0, "head_size must be a multiple of 8, this is ensured by padding!")
    check(heads % key.shape[1] == 0, "Number of heads in key/value must divide those in query")
    # From here on what the kernel does not check:
    for tensor in (query, key, value):
        aligned = tensor.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in tensor.stride()[:-1])
        check(aligned, "misaligned address")
    check(type(max_q) is int and type(max_k) is int, "max_q and max_k must be int")
    fits = int(cu_q.diff().max()) <= max_q and int(cu_k.diff().max()) <= max_k
    check(fits, "a sequence is longer than max_q or max_k")
    covered = int(cu_q[-1]) == len(query) and int(cu_k[-1]) == len(key)
    check(covered, "cu_seqlens do not cover the tokens")
