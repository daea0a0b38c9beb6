"""Llama-3-8B's shape with random weights in NF4, and random pairs with UltraFeedback's lengths.

Nothing has to be downloaded: speed and memory do not depend on the values.

How floating point operations are counted (a multiply-add is 2; `executed_flops`):

    base weights    2 a weight and token forward, 2 backward (they are frozen: no weight gradient)
    adapters        2 a weight and token forward, 4 backward
    attention       4 · hidden a visible key and layer forward, 8 backward
    recomputation   of the layers that recompute, all of the forward pass above once more
    head            2 · hidden · vocabulary a row forward, 2 backward, never recomputed; GaPO-Lite's
                    rows are the scored tokens, the others' all tokens with padding
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import stub_tokenizer  # isort: skip  # first: it sets the environment
import bitsandbytes as bnb
import numpy as np
import torch
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gapo_lite.model import _keep_trainable_layout
from gapo_lite.published import draw_lengths
from gapo_lite.shape import causal
from gapo_lite.types import TokenizedPair

RANK, BETA, GAMMA, LEARNING_RATE = 16, 10.0, 0.3, 1e-5


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is.

    Attributes:
        shape: of the model, as LlamaConfig takes it.
        prompt_tokens, response_tokens: mean lengths of the pairs.
        max_length: tokens of prompt and response together, at most.
        matrix: rows and columns of the matrix product that measures the rate.
    """

    shape: dict[str, int]
    prompt_tokens: int
    response_tokens: int
    max_length: int
    matrix: int


LLAMA_3_8B = Scale(
    shape={
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    },
    prompt_tokens=170,
    response_tokens=400,
    max_length=2048,
    matrix=8192,
)
TINY = Scale(
    shape={
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 512,
    },
    prompt_tokens=8,
    response_tokens=16,
    max_length=64,
    matrix=256,
)


def llama_config(scale: Scale) -> LlamaConfig:
    """Llama 3's configuration with the sizes of a scale."""
    return LlamaConfig(
        **scale.shape,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        attn_implementation="sdpa",
    )


def random_base(
    scale: Scale, device: torch.device, dtype: torch.dtype, seed: int
) -> LlamaForCausalLM:
    """A Llama of this shape with random weights, quantised as `gapo_lite.model.load_base` does.

    It is laid out without memory; then one matrix after the other is drawn on the device in
    `dtype` and quantised there, so that at most one of them is ever held unquantised.
    """
    torch.manual_seed(seed)
    config = llama_config(scale)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(block, name, _random_linear_4bit(child, device, dtype))
    for module in model.modules():
        if isinstance(module, nn.Embedding) or module is model.lm_head:
            module.weight = nn.Parameter(_random(module.weight.shape, device, dtype))
        elif "RMSNorm" in type(module).__name__:
            module.weight = nn.Parameter(torch.ones_like(module.weight, device=device, dtype=dtype))
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    model.is_loaded_in_4bit = True  # what PEFT and TRL ask a quantised model
    model.requires_grad_(False)
    _keep_trainable_layout(model)
    return model


def save_base(model: LlamaForCausalLM, folder: Path, dtype: torch.dtype) -> None:
    """The 4-bit model as `from_pretrained` reads it, with a tokenizer of three words beside it."""
    model.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    ).to_dict()
    model.config.dtype = dtype
    model.save_pretrained(folder)
    stub_tokenizer().save_pretrained(folder)


def _random_linear_4bit(
    linear: nn.Linear, device: torch.device, dtype: torch.dtype
) -> bnb.nn.Linear4bit:
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=dtype,
        quant_type="nf4",
        device="meta",
    )
    weight = _random(linear.weight.shape, device, dtype)
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
    )
    return layer.to(device)  # quantises


def _random(shape: torch.Size, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=dtype) * 0.02


def synthetic_pairs(scale: Scale, number: int, seed: int) -> list[TokenizedPair]:
    """Random tokens with lengths like UltraFeedback's.

    They are `published.draw_lengths` around the scale's means, cut to its longest; that chosen and
    rejected resemble each other in length spares TRL padding.
    """
    draw = np.random.default_rng(seed)
    lengths = draw_lengths(draw, number, scale.prompt_tokens, scale.response_tokens)
    prompts = np.minimum(lengths[:, :1], scale.max_length // 2)
    responses = np.minimum(lengths[:, 1:], scale.max_length - prompts)
    tokens = scale.shape["vocab_size"]
    return [
        TokenizedPair(*(draw.integers(0, tokens, n).astype(np.int32) for n in row), GAMMA)
        for row in np.hstack((prompts, responses)).tolist()
    ]


# -- what is counted --


def processed(batch: Sequence[TokenizedPair], layout: str) -> tuple[int, int, int]:
    """(tokens through the model, rows through the head, visible keys summed over the queries).

    Args:
        batch: pairs of a forward pass.
        layout: "packed": no padding, each prompt once. "padded": two rows a pair, padded to the
            longest; the keys that a causal mask lets through. Of both, the head's rows are the
            scored tokens; "full logits" is padded with all tokens through the head.
    """
    sides = [pair.lengths for pair in batch]
    scored = sum(w + r for _, w, r in sides)
    if layout == "packed":
        visible = sum(causal(p + w) + r * p + causal(r) for p, w, r in sides)
        return sum(map(sum, sides)), scored, visible
    rows, width = 2 * len(sides), max(p + max(w, r) for p, w, r in sides)
    return rows * width, rows * width if layout == "full logits" else scored, rows * causal(width)


def executed_flops(
    config: LlamaConfig, batch: Sequence[TokenizedPair], layout: str, recomputed: float
) -> int:
    """Floating point operations of the matrix products of one forward and backward pass."""
    tokens, head_rows, _ = processed(batch, layout)
    shapes = _linear_shapes(config) * config.num_hidden_layers
    base = 2 * tokens * sum(n * m for n, m in shapes)
    adapters = 2 * tokens * RANK * sum(n + m for n, m in shapes)
    head = 2 * head_rows * config.hidden_size * config.vocab_size
    forwards = 1 + recomputed
    return round(
        base * (forwards + 1)
        + adapters * (forwards + 2)
        + attention_flops(config, batch, layout, recomputed)
        + head * 2
    )


def attention_flops(
    config: LlamaConfig, batch: Sequence[TokenizedPair], layout: str, recomputed: float
) -> int:
    """The part of the attention scores and of the values that they weigh."""
    visible = processed(batch, layout)[2]
    forward = 4 * visible * config.num_hidden_layers * config.hidden_size
    return round(forward * (1 + recomputed + 2))


def _linear_shapes(config: LlamaConfig) -> list[tuple[int, int]]:
    """(in, out) of the seven linear layers of a block."""
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = hidden // config.num_attention_heads * config.num_key_value_heads
    attention = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden)]
    return [*attention, (hidden, inner), (hidden, inner), (inner, hidden)]
