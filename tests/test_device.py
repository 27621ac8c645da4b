"""What has to hold wherever it runs: DLR_DEVICE=cuda python -m pytest tests/test_device.py (without: the CPU)."""
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from test_dlr import FAMILIES, argmax_route, build, labels_of, pad, plain_hook, random_codes, texts
from test_train import killed_and_resumed, log_of
from transformers import AutoModelForCausalLM

import train

DEVICE = os.environ.get("DLR_DEVICE", "cpu")
PRECISIONS = {"float32": (nullcontext, 1e-4), "bfloat16": (lambda: torch.autocast(DEVICE, torch.bfloat16), 0.05)}
precisions = pytest.mark.parametrize("autocast, tolerance", PRECISIONS.values(), ids=PRECISIONS)


def here(family):
    """A model, and texts of unequal length with some of their tokens as labels."""
    ids, mask = pad(texts(), "right")
    labels = labels_of(ids, mask.bool() & (mask.cumsum(1) > 2))
    return (build(family).to(DEVICE), *(t.to(DEVICE) for t in (ids, mask, labels)))


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
@precisions
def test_forked_rollouts_are_worth_what_each_is_alone(family, autocast, tolerance):
    """The search's scores against one plain forward pass a rollout, in float32; and the update's loss."""
    model, ids, mask, labels = here(family)
    given = random_codes(3, 6, 4).to(DEVICE)
    with autocast():
        found = model.search(model.trunk(ids, mask), labels, given)
        loss = model(ids, mask, labels=labels, codes=given[:, 0]).loss
    for r in range(6):
        with torch.no_grad(), plain_hook(family, model, given[:, r].tolist()):
            log_p = model.lm(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        own = log_p.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0] * (labels[:, 1:] >= 0)
        # a sum over tokens; in bfloat16 it has the update's trunk below it
        torch.testing.assert_close(found.log_likelihood[:, r], own.sum(1), atol=10 * tolerance, rtol=tolerance)
        if r == 0:
            expected = -own.sum() / (labels[:, 1:] >= 0).sum()
            torch.testing.assert_close(loss.detach().float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_takes_the_codes_that_training_takes(family):
    model, _, _, _ = here(family)
    ids, mask = (t.to(DEVICE) for t in pad(texts(), "left"))
    new = dict(max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0)
    with plain_hook(family, model, route=argmax_route(model), pads=(1 - mask).sum(1)) as used:
        expected = model.lm.generate(input_ids=ids, attention_mask=mask, use_cache=False, **new)
    assert torch.equal(model.generate(ids, mask, **new), expected)
    assert [[c for c in row if c >= 0] for row in model.last_codes.tolist()] == used


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_run_that_was_killed_goes_on_to_the_same_numbers(folder, tmp_path, monkeypatch, dtype):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "SAVE_EVERY", 3)
    settings = ["--model", str(folder), "--data", "arithmetic", "--n", "64", "--val", "8", "--test", "4", "--codes",
                "4", "--epochs", "2", "--evaluate-every", "2", "--dtype", dtype, "--device", DEVICE, "--max-new-tokens",
                "4"]
    train.main([*settings, "--out", "whole"])
    killed_and_resumed(monkeypatch, 8, [*settings, "--out", "cut"])
    assert log_of("cut") == log_of("whole") and len(log_of("cut")) > 8
    states = [AutoModelForCausalLM.from_pretrained(Path(name, "model")).state_dict() for name in ("whole", "cut")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
