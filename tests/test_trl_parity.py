"""SimPO here and in TRL: the same token ids give the same losses and adapter gradients, on real
pairs, in float32."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from gapo_lite.batching import pack, pad, tokenize_pairs
from gapo_lite.model import add_adapter, forward_logps, load_base, load_tokenizer, why_not_packed
from gapo_lite.objectives import OBJECTIVES
from gapo_lite.types import PreferencePair

SMOL = "embedded:smollm2-135m-instruct"
BETA, GAMMA = 10.0, 0.3


@pytest.fixture(scope="module")
def real_pairs(real_rows):
    short = sorted(real_rows, key=lambda row: len(row["prompt"] + row["chosen"] + row["rejected"]))
    rows = short[60:63] + short[300:301]
    pairs = [
        PreferencePair([{"role": "user", "content": r["prompt"]}], r["chosen"], r["rejected"])
        for r in rows
    ]
    tokenizer = load_tokenizer(SMOL)
    tokenized = tokenize_pairs(pairs, tokenizer, max_length=512)
    return [replace(pair, margin=GAMMA) for pair in tokenized.pairs]


@pytest.fixture(scope="module")
def policy():
    model = add_adapter(load_base(SMOL, quantization="none", dtype=torch.float32), rank=4)
    gen = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=gen) * 0.02)
    assert why_not_packed(model) == ""
    return model


@pytest.fixture(scope="module")
def trl_trainer(policy, tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        args = CPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            loss_type="simpo",
            cpo_alpha=0.0,
            beta=BETA,
            simpo_gamma=BETA * GAMMA,  # TRL's γ is in reward units
            use_cpu=True,
            bf16=False,
            report_to=[],
            max_length=512,
            gradient_checkpointing=False,
        )
        row = {"prompt": ["x"], "chosen": ["y"], "rejected": ["z"]}
        return CPOTrainer(
            model=policy,
            args=args,
            train_dataset=Dataset.from_dict(row),
            processing_class=load_tokenizer(SMOL),
        )


def trl_batch(pairs):
    """Our token ids in the form that TRL's collator gives its trainer."""
    batch = {}
    for side in ("chosen", "rejected"):
        rows = [(p.prompt_ids, getattr(p, f"{side}_ids")) for p in pairs]
        width = max(len(prompt) + len(response) for prompt, response in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, (prompt, response) in enumerate(rows):
            whole = torch.from_numpy(np.concatenate((prompt, response)).astype(np.int64))
            ids[i, : len(whole)], mask[i, : len(whole)] = whole, 1
            labels[i, len(prompt) : len(whole)] = whole[len(prompt) :]
        batch |= {
            f"{side}_input_ids": ids,
            f"{side}_attention_mask": mask,
            f"{side}_labels": labels,
        }
    return batch


def gradients(policy):
    found = {n: p.grad.clone() for n, p in policy.named_parameters() if p.requires_grad}
    policy.zero_grad()
    return found


@pytest.fixture(scope="module")
def theirs(policy, trl_trainer, real_pairs):
    """TRL's loss, metrics and adapter gradients."""
    policy.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss, metrics = trl_trainer.get_batch_loss_metrics(policy, trl_batch(real_pairs))
        loss.backward()
    return loss.item(), metrics, gradients(policy)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_simpo_equals_trl_in_loss_and_gradients(policy, theirs, real_pairs, layout):
    loss, metrics, expected = theirs
    batch = pack(real_pairs) if layout == "packed" else pad(real_pairs, pad_id=0)
    output = OBJECTIVES["simpo"].fn(
        forward_logps(policy, batch), batch.margin, beta=BETA, margin_scale="beta"
    )
    ours = output.losses.mean()
    ours.backward()
    assert ours.item() == pytest.approx(loss, abs=1e-4)
    assert output.chosen_rewards.mean().item() == pytest.approx(metrics["rewards/chosen"], abs=1e-3)
    assert output.rejected_rewards.mean().item() == pytest.approx(
        metrics["rewards/rejected"], abs=1e-3
    )
    assert max(grad.abs().max() for grad in expected.values()) > 0.01
    torch.testing.assert_close(gradients(policy), expected, rtol=1e-4, atol=1e-4)
