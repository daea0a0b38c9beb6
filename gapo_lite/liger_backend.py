"""Liger's fused kernels (RMSNorm, RoPE, SwiGLU) in the layers of a base model, on an NVIDIA GPU.

The numbers are the plain layers' up to rounding (tests/test_liger.py), and everything else stays as
it is: 4 bits, adapter, packed layout. Liger's cross entropy is not used: logps.py never holds the
logits either. Nothing imports this module unless a configuration says `model.backend: liger`.
"""

from __future__ import annotations

import os
import sys
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from gapo_lite.errors import ModelError
from gapo_lite.model import load_base

# Of those that Liger knows, the ones whose gradients were compared with the plain layers'.
ARCHITECTURES = ("llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")


def load_liger_base(name: str, *, device: torch.device | str, **source: Any) -> PreTrainedModel:
    """The base model of `load_base`, whose arguments these are, with Liger's kernels in its layers.

    Raises:
        ModelError: there is no GPU, Liger is not installed, it does not fit this model, or the
            model cannot be loaded.
    """
    _check_machine(torch.device(device))
    base = load_base(name, device=device, **source)
    put_kernels_into(base, name)
    return base


def put_kernels_into(base: PreTrainedModel, name: str) -> None:
    """Liger's kernels into the layers of a model that is there already.

    Raises:
        ModelError: there is no GPU, Liger is not installed, or it does not fit this model.
    """
    _check_machine(base.device)
    if why := _why_not(base.config):
        raise ModelError(
            f"model.backend: liger cannot be used with {name}: {why}. Use backend: transformers."
        )
    _patch(base)


def _check_machine(device: torch.device) -> None:
    # Triton's interpreter runs kernels on a CPU, very slowly: for tests only.
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ModelError(
            "model.backend: liger cannot be used here: its kernels need an NVIDIA GPU, and there "
            "is none. Use backend: transformers."
        )
    try:
        import liger_kernel.transformers  # noqa: F401
    except ImportError as error:  # Triton may be what is missing
        raise ModelError(
            f"model.backend: liger cannot be used here ({error}). It needs `pip install -r "
            "requirements-liger.txt`; or use backend: transformers."
        ) from None


def _why_not(config: PretrainedConfig) -> str:
    """Why Liger's layers would not be the model's own; "" if they are."""
    if config.model_type not in ARCHITECTURES:
        return f"it is a {config.model_type} model, and only {', '.join(ARCHITECTURES)} are checked"
    if config.hidden_act not in ("silu", "swish"):  # Liger computes SiLU without asking
        return f"its activation is {config.hidden_act}, not silu"
    return ""


def _patch(base: PreTrainedModel) -> None:
    """Puts the kernels into this model alone.

    Liger (0.8.5) also replaces norm, MLP and RoPE in the architecture's module, for all models of
    this process, those on a CPU included. That is undone; RoPE, which is a function there and not a
    layer, then comes by each attention layer's own copy of `forward`.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    modeling = vars(sys.modules[type(base).__module__])
    plain = dict(modeling)
    _apply_liger_kernel_to_instance(base, cross_entropy=False, fused_linear_cross_entropy=False)
    patched = dict(modeling)
    modeling.update(plain)
    for module in base.modules():
        forward: Any = type(module).forward
        if "apply_rotary_pos_emb" in forward.__code__.co_names:
            _bind(module, forward, patched)


def _bind(module: nn.Module, forward: FunctionType, names: dict[str, Any]) -> None:
    """Gives the module `forward` as if it had been written where `names` are the globals."""
    copy = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    module.forward = MethodType(copy, module)
