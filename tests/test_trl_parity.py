"""The objectives here and in TRL: the same token ids give the same losses, rewards and adapter
gradients, in float32.

SimPO on real pairs with SmolLM; every objective that TRL has with a tiny random model, by TRL's own
trainers.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from forging import randomize_adapter

from gapo_lite.batching import pack, pad, tokenize_pairs
from gapo_lite.model import add_adapter, forward_logps, load_base, load_tokenizer, why_not_packed
from gapo_lite.objectives import OBJECTIVES, loss_function
from gapo_lite.types import PreferencePair, TokenizedPair

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
    randomize_adapter(model, 0.02)
    assert why_not_packed(model) == ""
    return model


@pytest.fixture(scope="module")
def trl_trainer(policy, tmp_path_factory):
    settings = {
        "loss_type": "simpo",
        "cpo_alpha": 0.0,
        "beta": BETA,
        "simpo_gamma": BETA * GAMMA,  # TRL's γ is in reward units
        "max_length": 512,
    }
    return new_trainer(
        "cpo", policy, load_tokenizer(SMOL), tmp_path_factory.mktemp("trl"), settings
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


# Every objective that TRL has, with a tiny random model.

SIZES = {  # (prompt, chosen, rejected) in tokens
    "mixed": ((5, 7, 3), (1, 4, 9), (8, 2, 2), (3, 6, 7)),
    # TRL averages NLL over the batch's tokens, we over each response's: equal where the lengths are
    "same chosen": ((5, 6, 3), (1, 6, 9), (8, 6, 6), (3, 6, 7)),
    # TRL's ORPO counts the prompt's tokens too, but for its first: equal for prompts of one token
    "one-token prompts": ((1, 6, 3), (1, 6, 9), (1, 6, 6), (1, 6, 7)),
}
DELTA, NLL = 3.0, 0.7

# name → our parameters, the pairs, TRL's trainer and its settings, and how many times TRL's loss
# ours is
CASES = {
    "simpo": ({"beta": 10.0, "margin_scale": "beta"}, "mixed", "cpo",
              {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 10.0, "simpo_gamma": 3.0}, 1),
    "cpo": ({"beta": 0.05, "margin_scale": "beta", "nll_weight": NLL}, "same chosen", "cpo",
            {"loss_type": "sigmoid", "cpo_alpha": NLL, "beta": 0.05}, 1),
    "slic": ({"delta": DELTA, "nll_weight": NLL}, "same chosen", "cpo",
             {"loss_type": "hinge", "cpo_alpha": NLL / DELTA, "beta": 1 / DELTA}, DELTA),
    "orpo": ({"odds_weight": 0.3}, "one-token prompts", "orpo", {"beta": 0.3}, 1),
    "dpo": ({"beta": 0.1, "margin_scale": "beta"}, "mixed", "dpo",
            {"loss_type": ["sigmoid"], "beta": 0.1}, 1),
    "ipo": ({"beta": 0.5}, "mixed", "dpo", {"loss_type": ["ipo"], "beta": 0.5}, 1),
    "rso": ({"beta": 1.0, "margin_scale": "beta"}, "mixed", "dpo",
            {"loss_type": ["hinge"], "beta": 1.0}, 1),
    "wpo": ({"beta": 0.1, "margin_scale": "beta"}, "mixed", "dpo",
            {"loss_type": ["sigmoid"], "use_weighting": True, "beta": 0.1}, 1),
    # TRL averages over responses, we over pairs
    "kto": ({"beta": 0.1, "desirable_weight": 1.3, "undesirable_weight": 0.8}, "mixed", "kto",
            {"beta": 0.1, "desirable_weight": 1.3, "undesirable_weight": 0.8}, 2),
}  # fmt: skip


def random_pairs(sizes, seed=0, margin=0.0):
    draw = np.random.default_rng(seed)
    return [
        TokenizedPair(*(draw.integers(3, 49152, n).astype(np.int32) for n in lengths), margin)
        for lengths in sizes
    ]


def mismatched(pairs):
    """Each pair's prompt with the next pair's responses."""
    return [
        replace(pair, chosen_ids=other.chosen_ids, rejected_ids=other.rejected_ids)
        for pair, other in zip(pairs, pairs[1:] + pairs[:1], strict=True)
    ]


@pytest.fixture(params=CASES)
def case(request, tiny_model, tmp_path):
    """An objective's name, TRL's trainer for it, and the policy they share: an adapter that has
    learned something, and a reference without it."""
    name = request.param
    model = add_adapter(
        load_base(str(tiny_model), quantization="none", dtype=torch.float32), rank=4
    )
    _, _, kind, settings, _ = CASES[name]
    trainer = new_trainer(kind, model, load_tokenizer(str(tiny_model)), tmp_path, settings)
    gen = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if "lora_B.default" in key:  # not TRL's copy of the new adapter, which is its reference
            parameter.data.copy_(torch.randn(parameter.shape, generator=gen) * 0.1)
    assert why_not_packed(model) == ""
    return name, trainer, model


def new_trainer(kind, model, tokenizer, folder, settings):
    """TRL's own trainer, whose data set is of no interest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
        from trl.experimental.cpo import CPOConfig, CPOTrainer
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        trainer, config = {
            "cpo": (CPOTrainer, CPOConfig),
            "dpo": (DPOTrainer, DPOConfig),
            "kto": (KTOTrainer, KTOConfig),
            "orpo": (ORPOTrainer, ORPOConfig),
        }[kind]
        args = config(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            report_to=[],
            gradient_checkpointing=False,
            per_device_train_batch_size=2,
            **settings,
        )
        rows = {"prompt": ["x", "x"], "chosen": ["y", "u"], "rejected": ["z", "v"]}
        return trainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict(rows),
            processing_class=tokenizer,
        )


def completion_batch(pairs):
    """(2B, L) rows in the form of the collators of TRL's DPO and KTO."""
    batch = pad(pairs, pad_id=0)
    mask = torch.zeros_like(batch.attention_mask)
    mask.view(-1)[batch.predict_index + 1] = 1
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "completion_mask": mask,
    }


def trl_loss(kind, trainer, model, pairs):
    """TRL's loss, and its metrics."""
    if kind in ("cpo", "orpo"):
        return trainer.get_batch_loss_metrics(model, trl_batch(pairs))
    inputs = completion_batch(pairs)
    if kind == "kto":
        inputs |= {f"KL_{key}": value for key, value in completion_batch(mismatched(pairs)).items()}
        inputs["label"] = torch.tensor([True] * len(pairs) + [False] * len(pairs))
    loss = trainer._compute_loss(model, inputs, return_outputs=False)
    metrics = trainer._metrics["train" if model.training else "eval"]
    return loss, {key: values[-1] for key, values in metrics.items()}


def our_logps(name, model, batch):
    spec = OBJECTIVES[name]
    if spec.uses_reference:
        with torch.no_grad(), model.disable_adapter():
            sums = forward_logps(model, batch)
        batch = replace(batch, reference=torch.cat((sums.chosen, sums.rejected)))
    return forward_logps(model, batch, certainty=spec.uses_certainty)


def our_output(name, model, pairs, layout):
    """Our loss, and the statistic of these pairs where the objective wants one."""
    collate = pack if layout == "packed" else lambda some: pad(some, pad_id=0)
    batch, known = collate(pairs), {}
    if OBJECTIVES[name].statistic:
        others = our_logps(name, model, collate(mismatched(pairs)))
        known = {"kl": torch.cat((others.chosen_ratio, others.rejected_ratio)).mean()}
    function = loss_function(name, CASES[name][0])
    return function(our_logps(name, model, batch), batch.margin, **known), known


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_losses_rewards_and_gradients_equal_those_of_trl(case, layout):
    name, trainer, model = case
    _, sizes, kind, settings, times = CASES[name]
    margin = settings.get("simpo_gamma", 0.0) / settings["beta"]
    gaps, kls = [], []
    for seed in range(3):
        pairs = random_pairs(SIZES[sizes], seed, margin)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss, metrics = trl_loss(kind, trainer, model, pairs)
            (times * loss).backward()
        expected = gradients(model)
        largest = max(grad.abs().max().item() for grad in expected.values())
        output, known = our_output(name, model, pairs, layout)
        output.losses.mean().backward()
        torch.testing.assert_close(output.losses.mean(), times * loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients(model), expected, rtol=1e-5, atol=1e-5 * largest)
        assert largest > 0.01
        for side, ours in (
            ("chosen", output.chosen_rewards),
            ("rejected", output.rejected_rewards),
        ):
            if name != "ipo":  # TRL's are not averaged per token, though its loss is
                theirs = metrics[f"rewards/{side}"] * (DELTA if name == "slic" else 1)
                assert ours.mean().item() == pytest.approx(theirs, rel=1e-5, abs=1e-5)
        gaps += (output.chosen_rewards - output.rejected_rewards).tolist()
        kls += [value.item() for value in known.values()]
        if kls:
            assert max(kls[-1], 0.0) == pytest.approx(metrics["kl"], abs=1e-5)
    # the comparison has seen both sides of every bend
    assert min(gaps) < {"slic": DELTA, "rso": 1.0}.get(name, 0.0) < max(gaps)
    assert not kls or min(kls) < 0 < max(kls)
