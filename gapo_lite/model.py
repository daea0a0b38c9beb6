"""The policy: a base model in 4 bits with a LoRA adapter, and its forward pass over pairs.

How models are loaded is known here, in liger_backend.py and in unsloth_backend.py only. The
reference model is this one with its adapter disabled, never a second copy.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from gapo_lite.attention import SHARED_PREFIX, placeholder_mask, why_not_flash
from gapo_lite.batching import pack, pad
from gapo_lite.embedded import EMBEDDED_MODELS, cache_dir, embedded_path
from gapo_lite.errors import ModelError, RunError
from gapo_lite.logps import pair_logps
from gapo_lite.memory import is_out_of_memory
from gapo_lite.offload import HostOffload
from gapo_lite.types import PairBatch, PairLogps, TokenizedPair

Policy = PeftModel | PreTrainedModel

PRECISIONS = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
"""What model.precision takes beside auto."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PACKING_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def forward_logps(model: Policy, batch: PairBatch, *, certainty: bool = False) -> PairLogps:
    """Log-probabilities of a batch's scored tokens; the whole way from token ids to `PairLogps`.

    Args:
        model: the policy; its adapter counts unless it is disabled.
        batch: on the model's device, in either layout.
        certainty: whether `PairLogps.chosen_certainty` is wanted.
    """
    causal = causal_model(model)
    head = causal.get_output_embeddings().weight
    with _autocast(causal):
        return pair_logps(_hidden_states(causal, batch), head, batch, certainty=certainty)


def causal_model(model: Policy) -> PreTrainedModel:
    """The model beneath the adapter (with the adapter's layers in it)."""
    causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return causal


def _hidden_states(causal: PreTrainedModel, batch: PairBatch) -> torch.Tensor:
    packed = batch.segments is not None
    if packed and causal.config._attn_implementation != SHARED_PREFIX:
        raise ModelError(
            "this model's attention does not know the packed layout, and would mix the responses: "
            "ask why_not_packed(model) first, which teaches it, or use the padded layout."
        )
    extra = {"segments": batch.segments} if packed else {}
    return causal.base_model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=placeholder_mask(batch.input_ids.device) if packed else batch.attention_mask,
        use_cache=False,
        **extra,
    ).last_hidden_state


def _autocast(causal: PreTrainedModel) -> torch.autocast:
    """Half precision where the base is in it, so that float32 adapters don't pull activations to
    float32."""
    weight: Any = causal.get_input_embeddings().weight
    is_half = weight.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(
        weight.device.type, weight.dtype if is_half else torch.bfloat16, enabled=is_half
    )


def pick_device() -> torch.device:
    """This process's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def pick_precision(precision: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware computes in it, else float16 on a GPU and float32 on a
    CPU."""
    if precision != "auto":
        return PRECISIONS[precision]
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def resolve_model(name: str) -> str:
    """What transformers can load for a configured name: a folder, or the Hub id itself.

    Raises:
        ModelError: the name is no embedded model, existing folder or Hub id (owner/name).
    """
    if name in EMBEDDED_MODELS or name.startswith("embedded:"):
        return str(_unpacked(name))
    if Path(name).is_dir():
        return str(Path(name).resolve())
    if _HUB_ID.fullmatch(name) and ".." not in name:
        return name
    raise ModelError(
        f"the model {name!r} is neither an existing folder nor a Hub id of the form owner/name. "
        "Known without a "
        f"network: {', '.join(n for n in EMBEDDED_MODELS if 'smollm' in n)}."
    )


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a configured model, without running any code of its repository.

    Raises:
        ModelError: it cannot be loaded (absent, gated, offline, damaged).
    """
    with loading(name):
        return AutoTokenizer.from_pretrained(
            resolve_model(name), revision=revision, trust_remote_code=False
        )


def load_model_config(name: str, revision: str | None = None) -> PretrainedConfig:
    """The shape of a configured model, without its weights.

    Raises:
        ModelError: it cannot be loaded.
    """
    with loading(name):
        return AutoConfig.from_pretrained(
            resolve_model(name), revision=revision, trust_remote_code=False
        )


def load_base(
    name: str,
    *,
    revision: str | None = None,
    quantization: str = "nf4",
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """The base model, frozen, on `device`.

    Args:
        name: embedded name, folder or Hub id. A folder that is already quantised by bitsandbytes
            is taken as it is.
        revision: of the Hub repository.
        quantization: "nf4" (4 bits, double quantisation) or "none".
        dtype: arithmetic, and the type of embedding, head and norms.
        device: where it goes, whole.

    Raises:
        ModelError: it cannot be loaded, or its output head is not a plain linear layer.
    """
    config = load_model_config(name, revision)
    quantize = quantization == "nf4" and not _existing_quantization(name, config)
    with loading(name):
        model = AutoModelForCausalLM.from_pretrained(
            resolve_model(name),
            revision=revision,
            dtype=dtype,
            device_map={"": torch.device(device)},
            trust_remote_code=False,
            **({"quantization_config": _nf4(dtype)} if quantize else {}),
        )
    prepare_base(name, model)
    return model


def prepare_base(name: str, model: PreTrainedModel) -> None:
    """Freezes a loaded base model, keeps its 4-bit layers trainable on a CPU, and checks its
    output head.

    Raises:
        ModelError: the head is not a plain linear layer.
    """
    _keep_trainable_layout(model)
    model.requires_grad_(False)
    _check_head(name, model)


def add_adapter(
    model: PreTrainedModel,
    *,
    rank: int = 16,
    alpha: int = 32,
    dropout: float = 0.0,
    target_modules: str | list[str] = "all-linear",
    seed: int = 42,
) -> PeftModel:
    """A fresh float32 LoRA adapter on `model` (B = 0: it starts as the base model), ready to train.

    Raises:
        ModelError: the named layers are not in the model.
    """
    torch.manual_seed(seed)
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules,
        task_type="CAUSAL_LM",
    )
    with _quiet_renames():
        try:
            policy = get_peft_model(model, settings)
        except ValueError as error:
            raise ModelError(
                f"the adapter does not fit: {error} Use lora.target_modules: all-linear."
            ) from None
    policy.train()
    return policy


def set_recomputation(policy: Policy, share: float, *, offload: bool = False) -> None:
    """Lets a share of the layers, evenly spread, keep only their input in the forward pass and
    compute the rest again in the backward pass (gradient checkpointing). Gradients stay the same.

    Args:
        policy: whose layers.
        share: 0 for none of them, 1 for all.
        offload: whether these inputs wait in the host's memory (GPU only).

    Raises:
        ModelError: the model's layers cannot do that.
    """
    causal = causal_model(policy)
    layers: list[Any] = [m for m in causal.modules() if isinstance(m, GradientCheckpointingLayer)]
    if share:
        if not layers or not causal.supports_gradient_checkpointing:
            raise ModelError(
                "this model cannot compute its activations again: set "
                "training.gradient_checkpointing to 0."
            )
        with _quiet_renames():
            causal.gradient_checkpointing_enable({"use_reentrant": False})
    elif causal.supports_gradient_checkpointing:
        with _quiet_renames():
            causal.gradient_checkpointing_disable()
    host = HostOffload(causal.device) if share and offload else None
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = int((index + 1) * share) > int(index * share)
        if host and layer.gradient_checkpointing:
            plain = layer._gradient_checkpointing_func
            layer._gradient_checkpointing_func = partial(host.checkpoint, plain)


@contextlib.contextmanager
def _quiet_renames() -> Iterator[None]:
    """transformers 5.23 calls it activation checkpointing; 5.17 has only the old name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@torch.no_grad()
def dequantize_base(policy: PeftModel) -> None:
    """Replaces the 4-bit weights by what they stand for, in the arithmetic's type: the same numbers
    without dequantising in each pass. For training only: what is saved of a policy is its adapter.
    """
    causal = causal_model(policy)
    names = [name for name, module in causal.named_modules() if isinstance(module, Linear4bit)]
    for name in names:
        layer: Any = causal.get_submodule(name)
        weight = layer.weight
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(
            dequantize_4bit(weight.data, weight.quant_state).to(layer.compute_dtype),
            requires_grad=False,
        )
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.to(layer.compute_dtype), requires_grad=False)
        causal.set_submodule(name, plain)
        # Parameter and layer know each other: without this both live until the garbage collector
        # comes by, 3 to 4 GiB of an 8B.
        weight.module = None
        layer.quant_state = weight.quant_state = None


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """The adapter of `folder` on `model`, for inference.

    Raises:
        ModelError: the folder holds no adapter, or one made for another base.
        RunError: its files are damaged.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds no adapter (adapter_config.json is missing). Did the run finish a "
            "save?"
        )
    try:
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            saved = set(file.keys())
        with _quiet_renames():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            policy = PeftModel.from_pretrained(model, str(folder), is_trainable=False).eval()
    except (SafetensorError, FileNotFoundError) as error:
        raise damaged_adapter(folder, error) from None
    except (RuntimeError, ValueError, KeyError, UserWarning, json.JSONDecodeError) as error:
        raise _unfit_adapter(model, folder, " ".join(str(error).split())[:200]) from None
    places = {name.replace(".default.", ".") for name, _ in policy.named_parameters()}
    if homeless := sorted(saved - places):  # peft drops them without a word
        reason = f"no place for {len(homeless)} of its {len(saved)} weights, such as {homeless[0]}"
        raise _unfit_adapter(model, folder, reason)
    return policy


def damaged_adapter(folder: Path, error: Exception) -> RunError:
    """The error for an adapter whose files cannot be read."""
    return RunError(
        f"the adapter in {folder} is damaged ({error}). Train the run again; if it has "
        "checkpoints, move this folder away and the newest of them is taken."
    )


def _unfit_adapter(model: PreTrainedModel, folder: Path, reason: str) -> ModelError:
    settings = json.loads((folder / "adapter_config.json").read_text())
    return ModelError(
        f"the adapter in {folder} does not fit here: it was made for "
        f"{settings.get('base_model_name_or_path')}, another base than "
        f"{model.config.name_or_path}. Load that one. ({reason})"
    )


def why_not_packed(model: Policy, *, without_flash: bool = False) -> str:
    """Whether the packed layout gives this model the hidden states that the padded one gives: ""
    if so, else why not.

    Also switches the model's attention to the one that knows both layouts, where that is possible.

    Args:
        model: the policy, or its base.
        without_flash: whether it may be packed where FlashAttention refuses it, two slower calls a
            pair.
    """
    causal = causal_model(model)
    settings = causal.config.get_text_config()
    dtype: Any = causal.get_input_embeddings().weight.dtype
    if not causal._supports_attention_backend:
        return "its attention cannot be replaced"
    if settings.to_dict().get("sliding_window") is not None:
        return "it uses a sliding attention window"
    if causal.device.type == "cuda" and not without_flash:
        head_size = settings.to_dict().get("head_dim") or (
            settings.hidden_size // settings.num_attention_heads
        )
        if refusal := why_not_flash(causal.device, dtype, head_size):
            return f"FlashAttention does not compute with it here ({refusal})"
    causal.set_attn_implementation(SHARED_PREFIX)
    error = _packing_error(causal)
    if error > _PACKING_TOLERANCE[dtype]:
        causal.set_attn_implementation("sdpa")
        return f"its hidden states differ by {error:.0%} between the two layouts"
    return ""


@torch.no_grad()
def _packing_error(causal: PreTrainedModel) -> float:
    """Relative difference of the predicting hidden states, packed against padded, on random
    tokens."""
    draw = np.random.default_rng(0)
    vocabulary = min(causal.config.get_text_config().vocab_size, 1000)
    ids = [draw.integers(0, vocabulary, n).astype(np.int32) for n in (5, 4, 7, 3, 6, 2)]
    pairs = [TokenizedPair(p, w, l, 0.0) for p, w, l in (ids[:3], ids[3:])]
    training = causal.training
    causal.eval()
    rows = []
    with _autocast(causal):
        for batch in (pack(pairs), pad(pairs, pad_id=0)):
            batch = batch.to(causal.device)
            hidden = _hidden_states(causal, batch).flatten(0, 1)
            rows.append(hidden.index_select(0, batch.predict_index).float())
    causal.train(training)
    return float((rows[0] - rows[1]).norm() / rows[1].norm())


def _unpacked(name: str) -> Path:
    """The embedded GGUF as an ordinary model folder in the cache, converted once, atomically."""
    source = embedded_path(name)
    folder = cache_dir() / "models" / name.removeprefix("embedded:")
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    with (
        _quiet_transformers(),
        contextlib.redirect_stderr(io.StringIO()),
    ):  # a progress bar of its own
        tokenizer = AutoTokenizer.from_pretrained(
            source.parent, gguf_file=source.name, trust_remote_code=False
        )
        model: Any = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32, trust_remote_code=False
        )
        # It still calls itself a GGUF model, which cannot be saved, although its weights are plain
        # by now.
        model.hf_quantizer = None
        del model.config.quantization_config
        model.to(torch.bfloat16).save_pretrained(stage)
        tokenizer.save_pretrained(stage)
    stage.chmod(0o755)
    with contextlib.suppress(OSError):  # another process was faster: its folder is as good
        stage.rename(folder)
    return folder


def _nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _existing_quantization(name: str, config: PretrainedConfig) -> bool:
    """Whether the folder is quantised by bitsandbytes already."""
    settings = config.to_dict().get("quantization_config") or {}
    method = settings.get("quant_method")
    if method and not (method == "bitsandbytes" and settings.get("load_in_4bit")):
        raise ModelError(
            f"{name} is quantised by {method} (not to 4 bits by bitsandbytes), which cannot be "
            "trained here. Choose the unquantised model: it is quantised to 4 bits while loading."
        )
    return method is not None


def _keep_trainable_layout(model: PreTrainedModel) -> None:
    """Forbids bitsandbytes to repack CPU weights for AVX-512 in eval mode (seen in 0.50.2).

    A repacked layer stays so after `.train()`, and no gradient flows through it from then on,
    silently.
    """
    module: Any
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def _check_head(name: str, model: PreTrainedModel) -> None:
    """The tiles of logps.py stand for the model's own head: refuse heads that do more than a
    matrix product."""
    head = model.get_output_embeddings()
    settings = model.config.get_text_config().to_dict()
    scales = [
        k for k in ("final_logit_softcapping", "logit_scale", "logits_scaling") if settings.get(k)
    ]
    if type(head) is not nn.Linear or head.bias is not None or scales:
        why = (
            f"it applies {', '.join(scales)}" if scales else "it is not a linear layer without bias"
        )
        raise ModelError(
            f"the output head of {name} cannot be trained here: {why}. Choose another model."
        )


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """Turns what transformers and the Hub raise into one message with a remedy.

    Raises:
        ModelError: `name` cannot be loaded.
    """
    try:
        with _quiet_transformers():
            yield
    except (OSError, ValueError, KeyError) as error:
        text = " ".join(str(error).split())
        if "gated" in text.lower() or "401" in text or "403" in text:
            remedy = (
                "It is gated: accept its licence on the Hub, then log in with `hf auth login` "
                "(or set HF_TOKEN)."
            )
        elif _HUB_ID.fullmatch(name) and not Path(name).exists():
            remedy = (
                "Check the spelling and the network, or give a local folder that holds the model."
            )
        else:
            remedy = (
                "Check that the folder holds a complete transformers model "
                "(config, tokenizer, safetensors)."
            )
        raise ModelError(f"the model {name} could not be loaded: {text[:300]} {remedy}") from None
    except RuntimeError as error:
        # Where memory runs out in a conversion to 4 bits, transformers says only that it failed.
        if not is_out_of_memory(error) and "automatic conversion of the weights" not in str(error):
            raise
        raise ModelError(
            f"the model {name} could not be loaded: {' '.join(str(error).split())[:300]} Most "
            "often too little memory is free: close what else uses it, or take a smaller model. "
            "`gapo-lite plan` says what a model needs."
        ) from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the progress bars and notes of loading; errors are raised all the same."""
    from transformers.utils import logging as transformers_logging

    level, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
