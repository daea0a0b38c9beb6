"""Attention over packed pairs that share their prompts.

A packed row is [prompt₀ chosen₀ rejected₀ prompt₁ chosen₁ …]. A chosen response sees its prompt
and itself; a rejected response sees the same prompt and itself, never the chosen one. The prompt
is computed once for both.

Naive equivalent (what the tests compare with): two padded sequences a pair, prompt+chosen and
prompt+rejected, through the model's ordinary causal attention.

Where FlashAttention takes it one `varlen_attn` call does all of it: queries lie in the row as they
are, only keys and values are gathered so that each prompt's appear before both responses, and
causal masking is aligned to the end of the keys. Elsewhere two `scaled_dot_product_attention`
calls a pair do the same: on a CPU, in float32, on GPUs before compute capability 8.0, and with
head sizes that FlashAttention refuses.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gapo_lite.memory import is_out_of_memory
from gapo_lite.types import Segments

SHARED_PREFIX = "gapo_shared_prefix"
"""Name of the attention implementation, for `model.set_attn_implementation`."""


_VARLEN_TAKES = inspect.signature(varlen_attn).parameters
"""torch 2.13 has `enable_gqa` and `window_size`; 2.11 may lack the former, 2.10 has `is_causal`."""


def shared_prefix_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a packed row; without `segments` (padded batches, generation) it is the
    ordinary one.

    Args:
        module: the attention layer.
        query: (1, heads, T, D).
        key, value: (1, key-value heads, T, D).
        attention_mask: only for the ordinary one.
        dropout: attention dropout, 0 for a packed row.
        scaling: factor on the scores.
        segments: who sees whom.

    Returns:
        ((1, T, heads, D), None).
    """
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    # With narrower values, as in latent attention, there is no kernel of one call.
    size = query.shape[-1]
    is_square = value.shape[-1] == size
    if is_square and query.is_cuda and not why_not_flash(query.device, query.dtype, size):
        return _one_call(query, key, value, segments, scaling), None
    return _two_calls_a_pair(query, key, value, segments, scaling), None


@lru_cache
def why_not_flash(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """ "" if FlashAttention's varlen kernels compute with such heads on this GPU, forward and
    backward; else what they say. They are tried: what they take depends on card and build."""
    heads = torch.zeros(8, 1, head_size, device=device, dtype=dtype, requires_grad=True)
    ends = torch.tensor([0, 8], dtype=torch.int32, device=device)
    try:
        # Hooks of its own: a layer that is recomputed would count what is kept here as its own.
        with torch.enable_grad(), saved_tensors_hooks(_itself, _itself):
            _varlen(heads, heads, heads, (ends, ends, 8, 8), None).sum().backward()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return str(error).strip().splitlines()[0][:200].rstrip(".")
    return ""


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def placeholder_mask(device: torch.device) -> torch.Tensor:
    """(1, 1, 1, 1): a ready-made 4-D mask is passed on untouched, so that transformers builds none
    from the positions (a packed row would get a dense T × T one)."""
    return torch.zeros(1, 1, 1, 1, device=device)


def _one_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scaling: float | None,
) -> torch.Tensor:
    # squeeze, not [0], whose backward pass fills a tensor with zeros first
    out = _varlen(
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).index_select(1, segments.kv_index).transpose(0, 1),
        value.squeeze(0).index_select(1, segments.kv_index).transpose(0, 1),
        (segments.cu_seq_q, segments.cu_seq_k, segments.max_q, segments.max_k),
        scaling,
    )
    return out.unsqueeze(0)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: tuple[torch.Tensor, torch.Tensor, int, int],
    scaling: float | None,
) -> torch.Tensor:
    """(T, heads, D) by torch's varlen kernels, whose options differ between its versions.

    Args:
        query: (T, heads, D).
        key, value: (Tk, key-value heads, D).
        sequences: cumulative lengths of queries and of keys, and the longest of each.
        scaling: factor on the scores.
    """
    options: dict[str, Any] = {"scale": scaling}
    if "window_size" in _VARLEN_TAKES:
        options["window_size"] = (-1, 0)  # causal, aligned to the last key
    else:
        options["is_causal"] = True
    if "enable_gqa" in _VARLEN_TAKES:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    else:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out: Any = varlen_attn(query, key, value, *sequences, **options)
    return out


def _two_calls_a_pair(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scaling: float | None,
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    # One split for all pairs: its backward is one concatenation; a slice's is a row of zeros.
    queries = iter(query.split([n for p, w, l in segments.lengths for n in (p + w, l)], dim=2))
    sizes = [n for lengths in segments.lengths for n in lengths]
    keys, values = (
        iter(x.repeat_interleave(groups, dim=1).split(sizes, dim=2)) for x in (key, value)
    )
    outputs = []
    for prompt, _, rejected in segments.lengths:
        (k_prompt, k_chosen, k_rejected), (v_prompt, v_chosen, v_rejected) = (
            (next(x), next(x), next(x)) for x in (keys, values)
        )
        k, v = torch.cat((k_prompt, k_chosen), dim=2), torch.cat((v_prompt, v_chosen), dim=2)
        outputs.append(
            F.scaled_dot_product_attention(next(queries), k, v, is_causal=True, scale=scaling)
        )
        k, v = torch.cat((k_prompt, k_rejected), dim=2), torch.cat((v_prompt, v_rejected), dim=2)
        sees = torch.ones(rejected, prompt + rejected, dtype=torch.bool, device=query.device)
        sees = sees.tril(prompt)
        outputs.append(
            F.scaled_dot_product_attention(next(queries), k, v, attn_mask=sees, scale=scaling)
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)
AttentionMaskInterface.register(SHARED_PREFIX, sdpa_mask)
