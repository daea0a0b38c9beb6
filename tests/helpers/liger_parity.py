"""How far a policy with Liger's kernels is from the plain one, as JSON.

A process of its own, started by `measure`: Triton decides while it is imported whether it compiles
for a GPU or interprets, which it does on a CPU.

    TRITON_INTERPRET=1 PYTHONPATH=. python tests/liger_parity.py MODEL_FOLDER cpu
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from forging import randomize_adapter
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gapo_lite.batching import pack, pad, tokenize_pairs
from gapo_lite.embedded import EMBEDDED_DATA
from gapo_lite.liger_backend import ARCHITECTURES, load_liger_base
from gapo_lite.model import (
    add_adapter,
    forward_logps,
    load_base,
    set_recomputation,
    why_not_packed,
)
from gapo_lite.types import PreferencePair

CASES = {
    **{f"{name} float32": (name, torch.float32, "none", pack, False) for name in ARCHITECTURES},
    "llama float32 padded": ("llama", torch.float32, "none", pad, False),
    "llama float32 4 bits recomputed": ("llama", torch.float32, "nf4", pack, True),
    "llama bfloat16": ("llama", torch.bfloat16, "none", pack, False),
    "llama bfloat16 4 bits recomputed": ("llama", torch.bfloat16, "nf4", pack, True),
}


def measure(folder: Path, device: str) -> dict[str, dict]:
    """What `main` prints, from a process of its own; skips the test where it cannot run.

    Args:
        folder: of the tiny model, for its tokenizer and shape.
        device: "cpu" interprets the kernels, "cuda" compiles them.
    """
    missing = [name for name in ("liger_kernel", "triton") if find_spec(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: see requirements-liger.txt")
    here = Path(__file__)
    path = os.pathsep.join([str(here.parents[2]), *filter(None, sys.path)])
    process = subprocess.run(
        [sys.executable, here, folder, device],
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": str(int(device == "cpu"))},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


def main(folder: Path, device: str) -> None:
    """Prints, for each case, the largest difference of a log-probability a token and of a gradient,
    relative to the largest gradient, and 1 − cosine of all gradients."""
    if device == "cpu":
        complete_the_interpreter()
    pairs = short_pairs(folder)
    found = {}
    with tempfile.TemporaryDirectory() as models:
        for name, (architecture, *case) in CASES.items():
            model = Path(models) / architecture
            if not model.exists():
                save_tiny_model(folder, architecture, model)
            found[name] = compared(model, pairs, *case, device=device)
    print(json.dumps(found))


def complete_the_interpreter() -> None:
    """What Triton's interpreter (3.9.0) lacks for Liger's kernels (0.8.5), whose own arithmetic
    stays: float arguments as float32 scalars, as on a GPU; CUDA's rsqrt; and bfloat16, whose bits
    it computes with as if they were integers, and which it cuts off instead of rounding."""
    import liger_kernel.ops.rms_norm
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt
    builder = interpreter.InterpreterBuilder
    cast, operate = builder.cast_impl, builder.binary_op

    def convert_floats_too(arg):
        if isinstance(arg, float):
            value = interpreter.TensorHandle(np.array([arg], np.float32), tl.float32)
            return tl.tensor(value, tl.float32)
        return convert(arg)

    def cast_as_torch_does(self, value, to):
        types = (value.dtype.scalar, to.scalar)
        if types == (tl.float32, tl.bfloat16):
            bits = torch.tensor(value.data).bfloat16().view(torch.uint16)
        elif types == (tl.bfloat16, tl.float32):
            bits = torch.tensor(value.data).view(torch.bfloat16).float()
        else:
            return cast(self, value, to)
        return interpreter.TensorHandle(bits.numpy(), to.scalar)

    def operate_in_float32(self, left, right, op):
        if left.dtype.scalar != tl.bfloat16:
            return operate(self, left, right, op)
        wide = operate(self, *(self.cast_impl(side, tl.float32) for side in (left, right)), op)
        return self.cast_impl(wide, tl.bfloat16)

    def rsqrt(x):
        return tl.rsqrt(x)  # looked up in each call: the interpreter puts its own there meanwhile

    interpreter._implicit_cvt = convert_floats_too
    builder.cast_impl, builder.binary_op = cast_as_torch_does, operate_in_float32
    liger_kernel.ops.rms_norm.rsqrt = rsqrt


def short_pairs(folder):
    """Cut at 48 tokens; with a prompt and a response of one token, and with equal responses."""
    lines = EMBEDDED_DATA["embedded:everyday"].read_text(encoding="utf-8").splitlines()[:3]
    rows = [json.loads(line) for line in lines]
    pairs = [
        PreferencePair([{"role": "user", "content": row["prompt"]}], row["chosen"], row["rejected"])
        for row in rows
    ]
    limits = {"max_length": 48, "max_prompt_length": 24}
    first, second, third = tokenize_pairs(
        pairs, AutoTokenizer.from_pretrained(folder), **limits
    ).pairs
    return [
        first,
        replace(second, prompt_ids=second.prompt_ids[-1:], rejected_ids=second.rejected_ids[:1]),
        replace(third, rejected_ids=third.chosen_ids),
    ]


def save_tiny_model(folder, architecture, target):
    """The tiny model's shape in another architecture."""
    shape = AutoConfig.from_pretrained(folder).to_dict()
    keys = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "vocab_size", "initializer_range", "bos_token_id",
        "eos_token_id", "pad_token_id", "tie_word_embeddings",
    )  # fmt: skip
    config = AutoConfig.for_model(architecture, **{key: shape[key] for key in keys})
    if "sliding_window" in config.to_dict():
        config.sliding_window = None
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(target)


def compared(model, pairs, dtype, quantization, layout, recompute, *, device):
    """Plain against Liger's, both with the same adapter; what was patched where; and answers."""
    batch = (pack(pairs) if layout is pack else pad(pairs, pad_id=0)).to(device)
    policies = []
    for load in (load_base, load_liger_base, load_base):
        base = load(str(model), quantization=quantization, dtype=dtype, device=device)
        policy = add_adapter(base, rank=4, alpha=8)
        set_recomputation(policy, float(recompute))
        randomize_adapter(policy, 0.05)
        if layout is pack:
            assert why_not_packed(policy) == ""
        policies.append(policy)
    plain, liger, after = (logps_and_gradients(policy, batch) for policy in policies)
    return {
        "logps": (plain[0] - liger[0]).abs().max().item(),
        "gradients": ((plain[1] - liger[1]).abs().max() / plain[1].abs().max()).item(),
        "cosine": 1 - torch.nn.functional.cosine_similarity(plain[1], liger[1], dim=0).item(),
        "patched": patched(policies[1]),
        "plain is left alone": torch.equal(plain[0], after[0]) and not patched(policies[2]),
        "answers": [answer(policy, batch) for policy in policies[:2]],
    }


def logps_and_gradients(policy, batch):
    logps = forward_logps(policy, batch)
    (logps.chosen_avg - 2 * logps.rejected_avg).sum().backward()
    grads = [p.grad.flatten() for p in policy.parameters() if p.requires_grad]
    return torch.cat((logps.chosen_avg, logps.rejected_avg)).detach(), torch.cat(grads).double()


def patched(policy):
    """How many layers of each class have a forward pass of their own."""
    return Counter(type(m).__name__ for m in policy.modules() if "forward" in vars(m))


def answer(policy, batch):
    policy.eval()
    ids = policy.generate(input_ids=batch.input_ids[:1, :12], max_new_tokens=6, do_sample=False)
    return ids[0, 12:].tolist()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
