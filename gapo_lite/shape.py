"""What a model costs: its parameters, operations and stored activations, counted without weights.

The model is laid out on the meta device, where tensors have shapes and no values, with one layer
and with two; the difference is a layer. What autograd would keep of a layer is counted there too.

How floating point operations are counted (a multiply-add is 2):

    base weights    2 a weight and token forward, 2 backward (they are frozen: no weight gradient)
    adapters        2 a weight and token forward, 4 backward
    attention       4 · width a visible key and layer forward, 8 backward
    recomputation   of the share of layers that recompute, all of the forward pass above once more
    head            2 · hidden · vocabulary a row forward, 2 backward, never recomputed; its rows
                    are the scored tokens
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig

from gapo_lite.attention import placeholder_mask
from gapo_lite.config import LoraConfig as LoraSettings
from gapo_lite.errors import ModelError
from gapo_lite.fused import fuse_layers

_COUNTED = "gapo_counted"
_PROBE_TOKENS = 64
ITEM_BYTES = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 4}
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4: 4 bits, a byte of scale for 64, a float32 of its scale for 64 · 256."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model and its adapter, in numbers.

    Attributes:
        layers: decoder layers.
        hidden, vocabulary: sizes of the output head.
        width: heads × size of a head, what attention multiplies.
        linear: (in, out) of the linear layers of one decoder layer, which are quantised.
        adapted: those of `linear` that have an adapter.
        rank: of the adapter.
        other_params: all parameters that are not in `linear`, of all layers: embedding, norms, and
            the head where it is not the embedding.
        head_size: of attention.
        activation_bytes: what autograd keeps of a layer for one token.
        fused_bytes: the same of a layer with fused passes (fused.py), as on a GPU.
        item_bytes: of a number of the arithmetic.
    """

    layers: int
    hidden: int
    vocabulary: int
    width: int
    linear: tuple[tuple[int, int], ...]
    adapted: tuple[tuple[int, int], ...]
    rank: int
    other_params: int
    head_size: int
    activation_bytes: float
    fused_bytes: float
    item_bytes: int

    @property
    def widest(self) -> int:
        """The most features that go into or come out of a linear layer."""
        return max(max(n, m) for n, m in self.linear)

    @property
    def linear_params(self) -> int:
        """Weights of all linear layers but the head."""
        return self.layers * sum(n * m for n, m in self.linear)

    @property
    def adapter_params(self) -> int:
        """Weights of the adapter, the only ones that train."""
        return self.layers * self.rank * sum(n + m for n, m in self.adapted)

    def flops(self, prompt: Any, chosen: Any, rejected: Any, recomputed: float) -> Any:
        """Operations of a training step on a packed pair of these lengths; see above.

        Args:
            prompt, chosen, rejected: tokens; whole numbers, or arrays of pairs.
            recomputed: share of the layers that compute their activations again.
        """
        forwards = 1 + recomputed
        tokens = prompt + chosen + rejected
        head = 2 * (chosen + rejected) * self.hidden * self.vocabulary
        return (
            2 * tokens * self.linear_params * (forwards + 1)
            + 2 * tokens * self.adapter_params * (forwards + 2)
            + self._attention(prompt, chosen, rejected) * (forwards + 2)
            + head * 2
        )

    def forward_flops(self, prompt: Any, chosen: Any, rejected: Any) -> Any:
        """Operations of a packed pair without gradients, as in evaluation."""
        head = 2 * (chosen + rejected) * self.hidden * self.vocabulary
        weights = self.linear_params + self.adapter_params
        tokens = prompt + chosen + rejected
        return 2 * tokens * weights + self._attention(prompt, chosen, rejected) + head

    def _attention(self, prompt: Any, chosen: Any, rejected: Any) -> Any:
        visible = causal(prompt + chosen) + rejected * prompt + causal(rejected)
        return 4 * visible * self.layers * self.width


def causal(length: Any) -> Any:
    """Keys that `length` queries see in all when each sees itself and those before it."""
    return length * (length + 1) // 2


def shape_of(config: PretrainedConfig, lora: LoraSettings, dtype: torch.dtype) -> ModelShape:
    """Counts a model of this configuration with this adapter.

    Raises:
        ModelError: it cannot be laid out, or the adapter does not fit.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers' of its own renames
            one, two = (_laid_out(config, lora, dtype, layers) for layers in (1, 2))
            plain = [_kept_bytes(policy) / _PROBE_TOKENS for policy in (one, two)]
            linear = _linear_of_a_layer(one, two)
            if not linear:
                raise ValueError("none of its layers is a torch.nn.Linear")
            for policy in (one, two):
                fuse_layers(policy)
            fused = [_kept_bytes(policy) / _PROBE_TOKENS for policy in (one, two)]
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise ModelError(
            f"what {config.name_or_path or config.model_type} costs cannot be counted: "
            f"{' '.join(str(error).split())[:200]}"
        ) from None
    settings = config.get_text_config()
    causal_lm: Any = one.get_base_model()
    layers = settings.num_hidden_layers
    own, more = (_other_params(policy) for policy in (one, two))
    heads = settings.num_attention_heads
    head_size = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    return ModelShape(
        layers=layers,
        hidden=settings.hidden_size,
        vocabulary=causal_lm.get_output_embeddings().weight.shape[0],
        width=heads * head_size,
        linear=tuple(size for size, _ in linear),
        adapted=tuple(size for size, has_adapter in linear if has_adapter),
        rank=lora.rank,
        other_params=own + (layers - 1) * (more - own),
        head_size=head_size,
        activation_bytes=plain[1] - plain[0],
        fused_bytes=fused[1] - fused[0],
        item_bytes=ITEM_BYTES[dtype],
    )


def _laid_out(
    config: PretrainedConfig, lora: LoraSettings, dtype: torch.dtype, layers: int
) -> PeftModel:
    """The model with so many layers and its adapter in the arithmetic's type, as autocast has it;
    without memory."""
    config = copy.deepcopy(config)
    settings = config.get_text_config()
    settings.num_hidden_layers = layers
    if getattr(settings, "layer_types", None):
        settings.layer_types = settings.layer_types[:layers]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=_COUNTED, trust_remote_code=False
        )
        model.requires_grad_(False)
        adapter = LoraConfig(
            r=lora.rank,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            task_type="CAUSAL_LM",
        )
        policy = get_peft_model(model, adapter, autocast_adapter_dtype=False)
    policy.to(dtype).train()
    return policy


def _linear_of_a_layer(one: Any, two: Any) -> list[tuple[tuple[int, int], bool]]:
    """(in, out) of each linear layer of the second decoder layer, and whether it has an adapter."""
    found = []
    first = {name for name, _ in one.named_modules()}
    for name, module in two.named_modules():
        if name in first or not isinstance(module, nn.Linear) or ".lora_" in name:
            continue
        found.append(((module.in_features, module.out_features), name.endswith("base_layer")))
    return found


def _other_params(policy: Any) -> int:
    """Parameters outside the decoder layers' linear layers, and outside the adapter."""
    head = policy.get_base_model().get_output_embeddings()
    quantised = {
        id(module.weight)
        for module in policy.modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    return sum(
        p.numel()
        for name, p in policy.named_parameters()
        if "lora_" not in name and id(p) not in quantised
    )


def _kept_bytes(policy: Any) -> int:
    """Bytes that autograd keeps of a forward pass through the layers, each storage once, without
    the weights."""
    weights = {tensor.untyped_storage()._cdata for tensor in policy.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.long, device="meta")
    positions = torch.arange(_PROBE_TOKENS, device="meta")[None]
    mask = placeholder_mask(torch.device("meta"))
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.get_base_model().base_model(
            input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False
        )
    return sum(storage.nbytes() for storage in kept.values())


class _CountedAttention(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps: its inputs, output and a float32 a query."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        output = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        normalizers = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, normalizers)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise NotImplementedError("only what the forward pass keeps is counted")


def _counted_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    # The packed layout gathers keys and values: those of the prompt lie there twice.
    return _CountedAttention.apply(query, key.clone(), value.clone()), None


AttentionInterface.register(_COUNTED, _counted_attention)
