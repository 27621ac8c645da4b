"""dlr.py against independent computations: one text at a time, plain hooks, no cache, equations written out again."""
import copy
import math
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config,
                          GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM,
                          LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, Qwen3Config, Qwen3ForCausalLM)

import dlr
from dlr import DLRModel
from search import beam_search, exact_search, response_search

V, H, C, K = 41, 32, 5, 3
SHARED = dict(vocab_size=V, hidden_size=H, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
              max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=None)
FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=H, n_layer=4, n_head=4, n_positions=64,
                                               bos_token_id=1, eos_token_id=2)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHARED, num_key_value_heads=2)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHARED, num_key_value_heads=2, head_dim=8)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHARED)),
    # every second block attends to the last 4 tokens only; logits are soft-capped
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(
        **SHARED, num_key_value_heads=2, head_dim=8, sliding_window=4, final_logit_softcapping=2.0,
        layer_types=["sliding_attention", "full_attention"] * 2)),
}
OTHERS = {  # its blocks return tuples, and every second one attends to the last 4 tokens only; a recurrent cache
    "gpt_neo": lambda: GPTNeoForCausalLM(GPTNeoConfig(
        vocab_size=V, hidden_size=H, num_layers=4, num_heads=4, max_position_embeddings=64, window_size=4,
        attention_types=[[["global", "local"], 2]], bos_token_id=1, eos_token_id=2)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=V, hidden_size=H, num_hidden_layers=4, state_size=4,
                                                  bos_token_id=1, eos_token_id=2)),
}
BLOCKS = {"gpt2": lambda lm: lm.transformer.h, "gpt_neo": lambda lm: lm.transformer.h,
          "neox": lambda lm: lm.gpt_neox.layers, "mamba": lambda lm: lm.backbone.layers}
LENGTHS = [11, 4, 7]  # no multiple of K beside one, and one shorter than two chunks
REAL = torch.arange(4) < torch.tensor([4, 2, 3])[:, None]  # (B, M) which chunks of K they have


def build(family, **settings):
    """A model whose codes and attention matter: random weights are scaled up until the logits really differ."""
    return copy.deepcopy(built(family, **settings))


@cache
def built(family, **settings):
    torch.manual_seed(0)
    lm = {**FAMILIES, **OTHERS}[family]().eval()
    with torch.no_grad():
        for p in lm.parameters():
            if p.dim() > 1:
                p.mul_(4)
    scale = 20.0 if family == "mamba" else 0.5  # its residual stream is large
    model = DLRModel(lm, **{"num_codes": C, "chunk_size": K, "scale": scale, **settings}).eval()
    torch.nn.init.normal_(model.codebook, std=4.0)
    torch.nn.init.normal_(model.router.weight, std=1.0)
    return model


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return build(family)


every_family = pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])


def texts(seed=1, lengths=LENGTHS):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, V, (n,), generator=g) for n in lengths]


def pad(rows, side, width=None):
    """-> ids (B, T), mask (B, T); padding is id 7, a token that also occurs in the texts."""
    width = width or max(map(len, rows))
    ids, mask = torch.full((len(rows), width), 7), torch.zeros(len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[b, where], mask[b, where] = row, 1
    return ids, mask


def blocks_of(family, lm):
    return BLOCKS.get(family, lambda lm: lm.model.layers)(lm)


def labels_of(ids, counted):
    """The token ids where they count, -100 elsewhere."""
    return ids.masked_fill(~counted.bool(), -100)


@contextmanager
def plain_hook(family, model, codes=None, route=None, pads=(0,)):
    """The LM steered by a plain hook on its whole forward, one token after the other: by `codes` of each row, or by
    those that `route(h) -> code` chooses; row by row behind its padding. Yields the codes of the last forward."""
    used = []

    def hook(block, args, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        used[:] = [[] for _ in hidden]
        for b in range(len(hidden)):
            pad = int(pads[b * len(pads) // len(hidden)])  # beams and samples of a prompt are neighbours
            for t in range(pad, hidden.shape[1]):
                m, begins = divmod(t - pad, model.settings.chunk_size)
                if begins == 0:
                    used[b].append(int(codes[b][m]) if codes is not None else route(hidden[b, t]))
                if used[b][-1] >= 0:
                    hidden[b, t] += model.settings.scale * model.codebook[used[b][-1]]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = blocks_of(family, model.lm)[model.settings.layer].register_forward_hook(hook)
    try:
        yield used
    finally:
        handle.remove()


def naive(family, model, row, codes=None, route=None):
    """Logits (T, V) of one text under a plain hook, and the codes used."""
    with plain_hook(family, model, codes if codes is None else [codes], route) as used:
        return model.lm(row[None], use_cache=False).logits[0], used[0]


def argmax_route(model):
    return lambda h: int((model.router.weight @ h).argmax())


def random_codes(*shape, seed=2, low=0):
    return torch.randint(low, C, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layer", [0, 2, 3])
@every_family
def test_steered_logits_equal_a_naive_loop(family, side, layer):
    # in float64: in this mamba rounding grows, on some processors to 2e-3 of a logit in float32
    model = build(family, layer=layer).double()
    rows = texts()
    ids, mask = pad(rows, side, width=13)  # wider than any text
    given = random_codes(3, 4, low=-1)
    steered, routed = model(ids, mask, codes=given).logits, model(ids, mask).logits
    for b, row in enumerate(rows):
        real = mask[b].bool()
        expected, _ = naive(family, model, row, codes=given[b])
        torch.testing.assert_close(steered[b][real], expected, atol=1e-6, rtol=1e-6)
        expected, _ = naive(family, model, row, route=argmax_route(model))
        torch.testing.assert_close(routed[b][real], expected, atol=1e-6, rtol=1e-6)
        assert (expected - model.lm(row[None]).logits[0]).abs().max() > 0.01  # the codes do something


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_forked_rollouts_equal_single_ones(model, side):
    ids, mask = pad(texts(), side)
    codes = random_codes(3, 6, 4, low=-1)
    forked = model(ids, mask, codes=codes).logits  # (B, R, T, V)
    assert forked.shape == (3, 6, ids.shape[1], V)
    for r in range(6):
        alone = model(ids, mask, codes=codes[:, r]).logits
        torch.testing.assert_close(forked[:, r][mask.bool()], alone[mask.bool()], atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_the_trunk_runs_once_for_all_rollouts(family, model):
    rows_seen = [0, 0, 0, 0]

    def count(i):
        def hook(block, args, kwargs):
            rows_seen[i] += len(args[0] if args else kwargs["hidden_states"])
        return hook

    for i, block in enumerate(blocks_of(family, model.lm)):
        block.register_forward_pre_hook(count(i), with_kwargs=True)
    ids, mask = pad(texts(), "right")
    model(ids, mask, codes=random_codes(3, 6, 4))
    assert rows_seen == [3, 3, 3, 18]  # injection after block 2 of 0 to 3: up to it once, block 3 for six rollouts


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_log_likelihood_sums_the_labels(family, model, side):
    rows = texts()
    ids, mask = pad(rows, side)
    counted = mask.bool() & (torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.5)
    counted[0] = mask[0].bool()  # a whole text: its first token has no prediction and is not counted
    labels, codes = labels_of(ids, counted), random_codes(3, 2, 4, low=-1)
    trunk = model.trunk(ids, mask)
    got = model.log_likelihood(trunk, labels, codes)
    for b, row in enumerate(rows):
        own = counted[b][mask[b].bool()]
        for r in range(2):
            logits, _ = naive(family, model, row, codes=codes[b, r])
            expected = sum(float(F.log_softmax(logits[t - 1], -1)[row[t]]) for t in range(1, len(row)) if own[t])
            assert got[b, r].item() == pytest.approx(expected, abs=2e-3)
    torch.testing.assert_close(model.log_likelihood(trunk, labels, codes[:, 1]), got[:, 1], atol=1e-3, rtol=1e-4)
    routed = model.log_likelihood(trunk, labels)
    torch.testing.assert_close(routed, model.log_likelihood(trunk, labels, model.argmax(trunk)))
    assert model.log_likelihood(trunk, torch.full_like(ids, -100), codes).abs().max() == 0


def test_logits_are_built_for_response_tokens_in_slices(monkeypatch):
    model = build("llama")
    monkeypatch.setattr(dlr, "HEAD_ROWS", 4)
    sizes = []
    model.lm.lm_head.register_forward_hook(lambda module, args, out: sizes.append(out.shape[:-1].numel()))
    ids, mask = pad(texts(), "right")
    counted = torch.zeros_like(mask)
    counted[0, 9:11] = counted[1, 3] = 1
    trunk, labels = model.trunk(ids, mask), labels_of(ids, counted)
    whole = model.log_likelihood(trunk, labels, random_codes(3, 3, 4))
    assert sum(sizes) == 9 and max(sizes) <= 4
    monkeypatch.setattr(dlr, "HEAD_ROWS", 256)
    torch.testing.assert_close(model.log_likelihood(trunk, labels, random_codes(3, 3, 4)), whole)


@torch.no_grad()
def test_routed_output_is_causal(model):
    row = texts(lengths=[14])[0]
    logits = model(row[None]).logits
    for t in range(14):
        changed = row.clone()
        changed[t] = (changed[t] - 3 + 5) % (V - 3) + 3
        other = model(changed[None]).logits
        torch.testing.assert_close(other[0, :t], logits[0, :t], atol=1e-4, rtol=1e-4)
        assert (other[0, t] - logits[0, t]).abs().max() > 1e-3


@torch.no_grad()
def test_a_zero_codebook_is_the_plain_lm(family):
    lm = build(family).lm
    model = DLRModel(lm, num_codes=C, chunk_size=K)
    row = texts()[0][None]
    torch.testing.assert_close(model(row).logits, lm(row).logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.generate(row, max_new_tokens=8), lm.generate(row, max_new_tokens=8))


def test_the_middle_block_is_the_default():
    assert build("llama").settings.layer == 2


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_route_sees_each_chunks_first_token_unsteered(family, model, side):
    rows = texts()
    trunk = model.trunk(*pad(rows, side, width=13))
    logits, codes = model.route(trunk), model.argmax(trunk)
    assert logits.shape == (3, 4, C)  # 11 real tokens in chunks of 3
    for b, row in enumerate(rows):
        h = []
        handle = blocks_of(family, model.lm)[2].register_forward_hook(lambda m, a, out: h.append(out[0]))
        model.lm(row[None])
        handle.remove()
        chunks = math.ceil(len(row) / K)
        for m in range(chunks):
            torch.testing.assert_close(logits[b, m], model.router.weight @ h[0][m * K], atol=1e-3, rtol=1e-4)
        assert codes[b].tolist() == logits[b, :chunks].argmax(-1).tolist() + (4 - chunks) * [-1]


def test_the_routing_gradient_reaches_the_router_alone(model):
    model.route(model.trunk(*pad(texts(), "left"))).sum().backward()
    assert model.router.weight.grad.abs().sum() > 0
    assert all(p.grad is None for name, p in model.named_parameters() if name != "router.weight")


def without_dropout(model):
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    return model


def hooks_of(model):
    """Whatever of a call is still there: hooks, replaced modules, replaced methods."""
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__]


@pytest.mark.parametrize("position", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["llama", "gpt_neo"])
def test_an_exception_leaves_the_lm_as_it_was(name, position):
    model, ids = build(name), texts()[0][None]
    plain, steered = model.lm(ids).logits, model(ids).logits
    block = blocks_of(name, model.lm)[position]
    handle = block.register_forward_pre_hook(lambda module, args: (_ for _ in ()).throw(KeyboardInterrupt()))
    for call in (lambda: model(ids), lambda: model.generate(ids, max_new_tokens=3), lambda: model(ids, labels=ids),
                 lambda: model.search(model.trunk(ids), ids, rollouts=2)):
        with pytest.raises(KeyboardInterrupt):
            call()
    handle.remove()
    assert not hooks_of(model)
    assert torch.equal(model.lm(ids).logits, plain) and torch.equal(model(ids).logits, steered)


@torch.no_grad()
def test_two_models_around_one_lm_do_not_disturb_each_other():
    one = build("llama")
    two = DLRModel(one.lm, num_codes=3, chunk_size=2, layer=1, scale=1.0)
    torch.nn.init.normal_(two.codebook, std=4.0)
    ids = texts()[0][None]
    a, b = one(ids).logits, two(ids).logits
    text = one.generate(ids, max_new_tokens=5, eos_token_id=None)
    with one.intervene("off"):
        assert torch.equal(two(ids).logits, b)
    two.generate(ids, max_new_tokens=5)
    assert torch.equal(one(ids).logits, a)
    assert torch.equal(one.generate(ids, max_new_tokens=5, eos_token_id=None), text)


def test_search_returns_the_likeliest_of_what_it_drew(model):
    ids, mask = pad(texts(), "right")
    labels = labels_of(ids, mask)
    torch.manual_seed(0)
    found = model.search(model.trunk(ids, mask), labels, rollouts=7)
    assert found.codes.shape == (3, 4) and found.log_likelihood.shape == (3, 7) and found.rollouts.shape == (3, 7, 4)
    assert ((found.rollouts >= 0) == REAL[:, None]).all()
    for b in range(3):
        trunk = model.trunk(ids[b:b + 1], mask[b:b + 1])
        alone = [model.log_likelihood(trunk, labels[b:b + 1], codes[None]).item() for codes in found.rollouts[b]]
        assert alone == pytest.approx(found.log_likelihood[b].tolist(), abs=2e-3)
        assert found.codes[b].tolist() == found.rollouts[b, alone.index(max(alone))].tolist()


def test_search_draws_from_the_tempered_router():
    model = build("llama")
    labels = texts(lengths=[5])[0][None]
    torch.nn.init.normal_(model.router.weight, std=0.02)
    trunk = model.trunk(labels)
    logits = model.route(trunk)[0]
    for tau in (0.5, 1.0, 2.0):
        torch.manual_seed(0)
        drawn = model.search(trunk, labels, rollouts=4000, temperature=tau).rollouts[0]  # (R, M)
        for m in range(2):
            share = torch.bincount(drawn[:, m], minlength=C) / 4000
            assert (share - (logits[m] / tau).softmax(-1)).abs().max() < 0.03
    mixed = model.search(trunk, labels, rollouts=800, temperature=[0.0] * 400 + [2.0] * 400).rollouts[0]
    assert (mixed[:400] == logits.argmax(-1)).all() and (mixed[400:] != logits.argmax(-1)).any()
    for wrong in dict(rollouts=3, temperature=[1.0, 2.0]), dict(rollouts=0), dict(temperature=-1.0):
        with pytest.raises(ValueError, match="one for each rollout"):
            model.search(trunk, labels, **wrong)
    greedy = model.search(trunk, labels, rollouts=3, temperature=0)
    assert (greedy.rollouts[0] == logits.argmax(-1)).all()


def test_search_takes_its_settings_from_the_model_and_its_draws_from_the_generator():
    model, labels = build("llama", rollouts=5, temperature=0.0), texts()[0][None]
    trunk = model.trunk(labels)
    assert torch.equal(model.search(trunk, labels).rollouts, model.argmax(trunk)[:, None].expand(-1, 5, -1))
    one, two, other = (model.search(trunk, labels, temperature=9.0, generator=torch.Generator().manual_seed(seed))
                       for seed in (1, 1, 2))
    assert torch.equal(one.rollouts, two.rollouts) and not torch.equal(one.rollouts, other.rollouts)
    static = build("llama", num_codes=1, rollouts=5)  # one code leaves nothing to search
    assert static.search(static.trunk(labels), labels).rollouts.shape == (1, 1, 4)


def test_search_ignores_dropout_and_leaves_the_mode_alone():
    torch.manual_seed(0)
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=H, n_layer=2, n_head=4, resid_pdrop=0.5, embd_pdrop=0.5))
    model = DLRModel(lm, num_codes=C, chunk_size=K, layer=0).train()  # block 1, with its dropout, runs per rollout
    lm.transformer.h[0].eval()  # a caller's own choice
    labels = texts()[0][None]
    scores = model.search(model.trunk(labels), labels, rollouts=4).log_likelihood
    assert (scores - scores[:, :1]).abs().max() < 1e-4  # zero codebook: all rollouts are alike
    assert model.training and lm.transformer.h[1].training and not lm.transformer.h[0].training


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_a_forward_is_the_cross_entropy_of_its_own_logits(side):
    """In eval mode and with codes given; without steering it is the LM's own loss."""
    model = build("gpt2")
    ids, mask = pad(texts(), side)
    labels = labels_of(ids, mask.bool() & (mask.cumsum(1) > 2))
    unsteered = torch.full((3, 4), -1)
    for codes in None, random_codes(3, 4, low=-1), random_codes(3, 2, 4, low=-1), unsteered:
        for training in (False, True)[: 1 if codes is None else 2]:
            out = without_dropout(model).train(training)(ids, mask, labels=labels, codes=codes)
            targets = labels[:, 1:] if out.logits.dim() == 3 else labels[:, None, 1:].expand(-1, 2, -1)
            expected = F.cross_entropy(out.logits[..., :-1, :].flatten(0, -2), targets.flatten())
            torch.testing.assert_close(out.loss, expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(out.logits, model(ids, mask, codes=codes).logits)
            assert out.found is None and out.policy is None
            part = model(ids, mask, labels=labels, codes=codes, num_items_in_batch=4 * (labels >= 0).sum())
            torch.testing.assert_close(part.loss, out.loss / 4)  # of four parts, equally large
    position = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model.lm(ids, attention_mask=mask, position_ids=position, labels=labels).loss
    torch.testing.assert_close(out.loss, expected, atol=1e-5, rtol=1e-5)
    assert model(ids, mask).loss is None and model.eval()(ids, mask).loss is None


def test_a_forward_takes_nothing_that_it_would_ignore():
    model, ids = build("llama"), texts()[0][None]
    for name in "position_ids", "inputs_embeds", "past_key_values":
        with pytest.raises(TypeError, match=name):
            model(ids, **{name: ids})
    assert torch.equal(model(ids, use_cache=True, return_dict=True, position_ids=None).logits, model(ids).logits)


def written_out_again(model, ids, labels, codes, mask, bigram, alpha_policy, alpha_reg):
    """Equation (4) in plain Python over plain forwards: no forking, no head slices."""
    logits = {"generalist": model.lm(ids, attention_mask=mask).logits, "steered": model(ids, mask, codes=codes).logits}
    terms, tokens = {}, 0
    for name, value in logits.items():
        terms[name], tokens = 0, 0
        for b in range(len(ids)):
            for t in range(1, ids.shape[1]):
                if labels[b, t] >= 0:
                    terms[name] = terms[name] - value[b, t - 1].log_softmax(-1)[ids[b, t]]
                    tokens += 1
        terms[name] = terms[name] / tokens
    z = model.route(model.trunk(ids, mask))
    real = [math.ceil(int(n) / K) for n in mask.sum(1)]
    p = z.softmax(-1)
    picked = [-p[b, m, codes[b, m]].log() for b in range(len(ids)) for m in range(real[b])]
    terms["policy"] = sum(picked) / len(picked)
    pairs = [torch.outer(p[b, m], p[b, m + 1]) for b in range(len(ids)) for m in range(real[b] - 1)]
    average = 0.8 * bigram + 0.2 * sum(pairs) / len(pairs)
    order = sorted(range(C), key=lambda i: -average[i].sum().item())
    zipf = [1 / (order.index(i) + 1) for i in range(C)]
    prior = torch.tensor([[zipf[i] * zipf[j] if i != j else 0.0 for j in range(C)] for i in range(C)])
    prior = 0.999 * prior / prior.sum() + 0.001 / C * torch.eye(C)
    terms["prior"] = (average * (average / prior).log()).sum()
    terms["loss"] = terms["generalist"] + terms["steered"]
    terms["loss"] = terms["loss"] + alpha_policy * terms["policy"] + alpha_reg * terms["prior"]
    return terms, average


def gradients(model, total):
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients(got, wanted, rtol=2e-3):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, atol=2e-5 * value.abs().max().item() + 1e-6, rtol=rtol, msg=name)


def training(family, **settings):
    """-> a model in training mode, without dropout, whose router and bigrams have gone some way from the start; and a
    batch: ids, mask, labels."""
    model = without_dropout(build(family, alpha_policy=0.7, alpha_reg=0.3, **settings)).train()
    torch.nn.init.normal_(model.router.weight, std=0.05)
    model.bigram.copy_(torch.rand(C, C, generator=torch.Generator().manual_seed(4)).softmax(-1) / C)
    ids, mask = pad(texts(), "right")
    return model, ids, mask, labels_of(ids, mask.bool() & (torch.arange(ids.shape[1]) >= 2))


@pytest.mark.parametrize("checkpointing", [False, True])
@every_family
def test_a_training_forward_is_the_equation_and_its_gradient(family, checkpointing):
    """Search, select, update; the winner is checked above. Afterwards the running average of (4d) has moved."""
    model, ids, mask, labels = training(family, rollouts=4)
    bigram = model.bigram.clone()
    if checkpointing:
        getattr(model.lm, "activation_checkpointing_enable", model.lm.gradient_checkpointing_enable)()
    torch.manual_seed(0)
    out = model(ids, mask, labels=labels)
    grads = gradients(model, out.loss)
    average = model.bigram.clone()
    torch.manual_seed(0)
    found = model.search(model.trunk(ids, mask), labels)
    assert torch.equal(out.found.rollouts, found.rollouts) and found.rollouts.shape == (3, 4, 4)
    torch.testing.assert_close(out.found.log_likelihood, found.log_likelihood)
    winners = found.rollouts[range(3), found.log_likelihood.argmax(1)]
    assert torch.equal(out.found.codes, winners) and out.logits is None
    expected, moved = written_out_again(model.eval(), ids, labels, winners, mask, bigram, 0.7, 0.3)
    for name, value in expected.items():
        assert out[name].item() == pytest.approx(value.item(), rel=1e-4), name
    torch.testing.assert_close(average, moved)
    assert_gradients(grads, gradients(model, expected["loss"]))
    assert grads.keys() == {name for name, _ in model.named_parameters()}
    model.loss(out.trunk, labels, found)
    assert torch.equal(model.bigram, average)  # it moves in training only


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("settings", [dict(update_on="argmax"), dict(update_on="sample", generalist=False)])
def test_the_ablations_of_the_loss_equal_the_equation(settings, frozen):
    """Other codes for the steered term, no generalist term, and both with the LM frozen."""
    model, ids, mask, labels = training("llama", rollouts=4, **settings)
    model.lm.requires_grad_(not frozen)
    bigram, trunk = model.bigram.clone(), model.trunk(ids, mask)
    found = model.search(trunk, labels)
    got = model.loss(trunk, labels, found)
    grads = gradients(model, got.loss)
    steer = model.argmax(trunk) if settings["update_on"] == "argmax" else found.rollouts[:, 0]
    assert not torch.equal(steer, found.codes)
    taught, _ = written_out_again(model.eval(), ids, labels, found.codes, mask, bigram, 0.7, 0.3)
    expected, _ = written_out_again(model, ids, labels, steer, mask, bigram, 0.7, 0.3)
    total = expected["steered"] + 0.7 * taught["policy"] + 0.3 * taught["prior"]
    if settings.get("generalist", True):
        total = total + taught["generalist"]
        torch.testing.assert_close(got.generalist, taught["generalist"])
    else:
        assert got.generalist == 0
    torch.testing.assert_close(got.loss, total)
    assert_gradients(grads, gradients(model, total))
    assert not frozen or grads.keys() == {"codebook", "router.weight"}


def test_the_rloo_term_equals_its_equation_and_points_down_the_expected_loss():
    """Against a loop; and, over all sequences of a tiny space, against the gradient of the expectation itself."""
    torch.manual_seed(0)
    logits, real = torch.randn(2, 3, C, requires_grad=True), torch.tensor([[True] * 3, [True, True, False]])
    rollouts = random_codes(2, 4, 3).masked_fill(~real[:, None], -1)
    scores, total = torch.randn(2, 4), 0
    for b in range(2):
        for i in range(4):
            others = sum(scores[b, j] for j in range(4) if j != i) / 3
            log_p = sum(logits[b, m].log_softmax(-1)[rollouts[b, i, m]] for m in range(3) if real[b, m])
            total = total - (scores[b, i] - others) * log_p / 4 / 7
    got = dlr.rloo_term(logits, rollouts, scores, real, torch.tensor(7))
    torch.testing.assert_close(got, total)
    torch.testing.assert_close(torch.autograd.grad(got, logits)[0], torch.autograd.grad(total, logits)[0])
    assert dlr.rloo_term(logits, rollouts[:, :1], scores[:, :1], real, torch.tensor(7)) == 0

    z, value = torch.randn(1, 1, C, requires_grad=True), torch.randn(C)  # one chunk: log p(x | a) for each code
    expected = torch.autograd.grad(-(z.softmax(-1)[0, 0] * value).sum(), z)[0]
    draws = torch.distributions.Categorical(logits=z[0, 0]).sample((1, 20_000, 1))
    average = dlr.rloo_term(z, draws, value[draws[..., 0]], torch.ones(1, 1, dtype=torch.bool), torch.tensor(1))
    torch.testing.assert_close(torch.autograd.grad(average, z)[0], expected, atol=0.02, rtol=0)


def test_reinforce_takes_the_place_of_imitation():
    model, ids, mask, labels = training("llama", policy="rloo", rollouts=4)
    out = model(ids, mask, labels=labels)
    logits, tokens = model.route(out.trunk), (labels >= 0).sum()
    term = dlr.rloo_term(logits, out.found.rollouts, out.found.log_likelihood, REAL, tokens)
    torch.testing.assert_close(out.policy, term)
    torch.testing.assert_close(out.loss, out.generalist + out.steered + 0.7 * term + 0.3 * out.prior)
    assert term.abs() > 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mixture_steers_with_the_weighted_vectors(family, model, side):
    """Against a hook on each text alone; one-hot weights are codes."""
    rows = texts()
    ids, mask = pad(rows, side)
    trunk, labels = model.trunk(ids, mask), labels_of(ids, mask)
    torch.manual_seed(3)
    weights = torch.randn(3, 4, C).softmax(-1)
    got = model.log_likelihood(trunk, labels, weights)
    for b, row in enumerate(rows):
        def hook(block, args, hidden):
            chunk = torch.arange(hidden.shape[1]) // K
            return hidden + model.settings.scale * weights[b, chunk] @ model.codebook
        handle = blocks_of(family, model.lm)[2].register_forward_hook(hook)
        log_p = model.lm(row[None]).logits[0].log_softmax(-1)
        handle.remove()
        expected = log_p[:-1].gather(1, row[1:, None]).sum()
        torch.testing.assert_close(got[b], expected, atol=2e-3, rtol=2e-3)
    codes = random_codes(3, 4)
    torch.testing.assert_close(model.log_likelihood(trunk, labels, F.one_hot(codes, C).float()),
                               model.log_likelihood(trunk, labels, codes))


def test_the_soft_method_teaches_the_router_through_its_mixture():
    model, ids, mask, labels = training("llama", method="soft", generalist=False)
    model.settings.alpha_reg = 0.0
    out = model(ids, mask, labels=labels)
    mixture = model.route(out.trunk).softmax(-1)
    expected = -model.log_likelihood(out.trunk, labels, mixture).sum() / (labels >= 0).sum()
    assert out.found is None and out.policy == 0
    torch.testing.assert_close(out.loss, expected)
    grads = gradients(model, out.loss)
    assert grads["router.weight"].abs().max() > 0 and grads["codebook"].abs().max() > 0


@pytest.mark.parametrize("norm", ["none", "rms"])
def test_calibrated_units_and_norms_hold_in_training_generation_and_on_disk(norm, tmp_path):
    model, rows = build("llama", router_norm=norm), texts()
    units = []
    for side in ("left", "right"):
        model.calibrate(*pad(rows, side))
        units.append(model.unit.item())
    hidden = []
    handle = model.lm.model.layers[2].register_forward_hook(lambda block, args, h: hidden.append(h[0, 1:]))
    for row in rows:
        model.lm(row[None])
    handle.remove()
    median = torch.cat(hidden).norm(dim=1).median().item()  # without the first tokens
    assert units == pytest.approx([median / H**0.5] * 2, rel=1e-4)

    def route(h):
        h = h / h.pow(2).mean().sqrt() if norm != "none" else h
        return int((model.router.weight @ h).argmax())

    plain = build("llama")  # the naive loop knows no units
    plain.codebook.data *= model.unit
    for row in rows:
        logits, used = naive("llama", plain, row, route=route)
        torch.testing.assert_close(model(row[None]).logits[0], logits, atol=1e-3, rtol=1e-3)
    new = model.generate(rows[0][None], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(model(new).logits.argmax(-1)[0, 10:-1], new[0, 11:])
    model.save_pretrained(tmp_path)
    loaded = DLRModel.from_pretrained(tmp_path)
    assert loaded.settings.router_norm == norm and torch.equal(loaded.unit, model.unit)
    torch.testing.assert_close(loaded(rows[0][None]).logits, model(rows[0][None]).logits)


def test_given_sequences_are_scored_as_they_are(model):
    ids, mask = pad(texts(), "left")
    given, trunk, labels = random_codes(3, 5, 4, low=-1), model.trunk(ids, mask), labels_of(ids, mask)
    found = model.search(trunk, labels, given)
    expected = model.log_likelihood(trunk, labels, given)
    torch.testing.assert_close(found.log_likelihood, expected)
    assert torch.equal(found.codes, given[range(3), expected.argmax(1)].masked_fill(~REAL, -1))


@pytest.mark.parametrize("policy", ["imitate", "rloo"])
def test_the_parts_of_a_batch_add_up_to_the_whole(policy):
    """One text, then two (padded to another width): sums over tokens exactly; (4c, 4d) are each part's own, weighted
    by its share of the tokens. And so the NLL in eval mode."""
    model, ids, mask, labels = training("llama", policy=policy)
    bigram = model.bigram.clone()
    found = model.search(model.trunk(ids, mask), labels, 3)
    tokens, policies, likelihood, nll = (labels >= 0).sum(), 0, 0, 0
    for rows in (slice(1, 2), slice(0, 3, 2)):
        longest = mask[rows].sum(1).max()
        part, own = (ids[rows, :longest], mask[rows, :longest]), labels[rows, :longest]
        trunk, share = model.trunk(*part), (own >= 0).sum() / tokens
        own_found = dlr.select(found.rollouts[rows, :, : trunk.real.shape[1]], found.log_likelihood[rows], None)
        model.bigram.copy_(bigram)
        alone = model.loss(trunk, own, own_found)
        model.bigram.copy_(bigram)
        out = model.loss(trunk, own, own_found, tokens)
        for name in "generalist", "steered", "policy", "prior", "loss":
            torch.testing.assert_close(out[name], share * alone[name])
        likelihood = likelihood + out.generalist + out.steered
        policies = policies + out.policy
        nll = nll + model.eval()(*part, labels=own, num_items_in_batch=int(tokens)).loss.item()
        model.train()
    model.bigram.copy_(bigram)
    whole = model.loss(model.trunk(ids, mask), labels, found)
    assert_gradients(gradients(model, likelihood), gradients(model, whole.generalist + whole.steered), rtol=1e-4)
    if policy == "rloo":  # a sum over tokens as well
        torch.testing.assert_close(policies, whole.policy)
    assert nll == pytest.approx(model.eval()(ids, mask, labels=labels).loss.item(), rel=1e-5)


def test_bigrams_stay_within_a_text():
    """Texts of one chunk have no pairs; beside a longer text only that text's pairs count."""
    logits, real = torch.randn(3, 4, C), torch.zeros(3, 4, dtype=torch.bool)
    before = torch.rand(C, C).flatten().softmax(0).view(C, C)
    real[:, 0] = True
    assert torch.equal(dlr.bigram_average(before, logits, real), before)  # without a pair it stays what it was
    real[1, :3] = True
    p = logits[1].softmax(-1)
    mean = (torch.outer(p[0], p[1]) + torch.outer(p[1], p[2])) / 2
    torch.testing.assert_close(dlr.bigram_average(before, logits, real), 0.8 * before + 0.2 * mean)


def test_the_prior_is_zipfian_by_usage_and_its_own_minimum():
    usage = torch.tensor([0.1, 0.5, 0.05, 0.3, 0.05])
    prior = dlr.zipf_prior(usage)
    assert prior.sum().item() == pytest.approx(1) and prior.diagonal().sum().item() == pytest.approx(1e-3)
    assert prior.sum(1).argsort(descending=True)[:3].tolist() == [1, 3, 0]
    assert prior[1, 3].item() / prior[1, 0].item() == pytest.approx(3 / 2)  # ranks 2 and 3
    swapped = dlr.zipf_prior(usage[[1, 0, 2, 3, 4]])
    torch.testing.assert_close(swapped[0, 3], prior[1, 3])  # no code is favoured for its index
    assert dlr.prior_term(prior, prior).item() == pytest.approx(0, abs=1e-6)
    other = torch.randn(C * C, generator=torch.Generator().manual_seed(0)).softmax(-1)
    flat = [torch.distributions.Categorical(probs=p) for p in (other, prior.flatten())]
    expected = torch.distributions.kl_divergence(*flat).item()
    assert dlr.prior_term(other.view(C, C), prior).item() == pytest.approx(expected, rel=1e-5) and expected > 0.1
    assert dlr.zipf_prior(torch.ones(1)).tolist() == [[1.0]]


def test_one_step_makes_the_winner_likelier():
    model, labels = build("llama", rollouts=4).train(), texts()[0][None]
    model.codebook.data.zero_()
    optimiser = torch.optim.SGD([model.codebook, model.router.weight], 1e-3)
    out = model(labels, labels=labels)
    out.loss.backward()
    optimiser.step()
    trunk = model.trunk(labels)
    assert model.log_likelihood(trunk, labels, out.found.codes) > out.found.log_likelihood.max()
    after = F.cross_entropy(model.route(trunk)[0], out.found.codes[0])
    assert after < F.cross_entropy(out.found.logits[0], out.found.codes[0])


def test_saved_equals_loaded(family, model, tmp_path):
    ids, mask = pad(texts(), "left")
    model.save_pretrained(tmp_path)
    loaded = DLRModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids, mask).logits, model(ids, mask).logits)
    assert torch.equal(loaded.bigram, model.bigram) and not loaded.training
    with model.intervene("off"):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(plain(ids[:1]).logits, model(ids[:1]).logits, atol=1e-5, rtol=1e-5)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"dlr.safetensors", "dlr_config.json", "model.safetensors"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)


def test_a_hub_name_loads_like_a_folder(tmp_path):
    """With every setting, the embeddings still tied, and the precision that is asked for."""
    model = build("gpt2", rollouts=3, policy="rloo", scale=0.25, layer=1, search_dtype="bfloat16")
    ids = texts()[0][None]
    repo = tmp_path / "models--someone--steered"
    snapshot = repo / "snapshots" / ("0" * 40)
    model.save_pretrained(snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    loaded = DLRModel.from_pretrained("someone/steered", cache_dir=tmp_path)
    assert asdict(loaded.settings) == asdict(model.settings)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.lm.lm_head.weight is loaded.lm.transformer.wte.weight
    assert DLRModel.from_pretrained(snapshot, dtype=torch.bfloat16).dtype == torch.bfloat16
    build("gpt2").lm.save_pretrained(tmp_path / "plain")
    with pytest.raises(OSError, match="dlr_config.json"):
        DLRModel.from_pretrained(tmp_path / "plain")
    with pytest.raises(OSError):
        DLRModel.from_pretrained("someone/else", cache_dir=tmp_path)


def test_tied_weights_are_one_tensor_in_the_state():
    model, other = build("gpt2"), build("gpt2", scale=0.25)
    torch.nn.init.normal_(model.lm.transformer.wte.weight)
    state = model.state_dict()
    assert len({t.data_ptr() for t in state.values()}) == len(state)
    other.load_state_dict(state)  # strictly: a second name is not missed
    assert torch.equal(other.lm.lm_head.weight, model.lm.transformer.wte.weight)


@pytest.mark.parametrize("name, value, match", [
    ("layer", 4, "0 to 3"), ("layer", -1, "0 to 3"), ("num_codes", 0, "at least 1"), ("chunk_size", 0, "at least 1"),
    ("rollouts", 0, "at least 1"), ("temperature", -0.1, "at least 0"), ("scale", float("nan"), "at least 0"),
    ("alpha_policy", -1, "at least 0"), ("alpha_reg", -1, "at least 0"), ("method", "sft", "dlr, soft"),
    ("router_norm", "centred", "none, rms"), ("policy", "reinforce", "imitate, rloo"),
    ("update_on", "worst", "best, argmax, sample"), ("search_dtype", "float16", "float32, bfloat16")])
def test_a_setting_out_of_range_gets_one_sentence(name, value, match):
    with pytest.raises(ValueError, match=match) as error:
        DLRModel(build("llama").lm, **{name: value})
    sentence = str(error.value)
    assert sentence.startswith(f"{name} is {value!r}") and sentence.endswith(".") and "\n" not in sentence


def test_settings_of_another_version_are_named(tmp_path):
    build("llama").save_pretrained(tmp_path)
    path = tmp_path / "dlr_config.json"
    path.write_text(path.read_text().replace('"scale"', '"loudness"'))
    with pytest.raises(ValueError, match="another version: it has the settings loudness"):
        DLRModel.from_pretrained(tmp_path)


def test_bad_calls_are_named():
    model, ids = build("llama", chunk_size=2), torch.arange(3, 9)[None]
    for codes in torch.zeros(1, 2, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long):
        with pytest.raises(ValueError, match="M = 3"):
            model(ids, codes=codes)
    from transformers import T5Config, T5ForConditionalGeneration
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=V, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8))
    with pytest.raises(ValueError, match="encoder-decoder"):
        DLRModel(t5)


def test_bfloat16_update_with_float32_search():
    model = build("llama").train()
    ids, mask = pad(texts(), "right")
    labels, given, plain = labels_of(ids, mask), random_codes(3, 4, 4), model.trunk(ids, mask)
    expected = model.search(plain, labels, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = model.search(plain, labels, given)
        model.settings.search_dtype = "bfloat16"
        rounded = model.search(plain, labels, given)
        model(ids, mask, labels=labels).loss.backward()
    torch.testing.assert_close(kept.log_likelihood, expected.log_likelihood)
    assert 1e-3 < (rounded.log_likelihood - expected.log_likelihood).abs().max() < 1
    assert model.codebook.grad.abs().sum() > 0


class NoDouble(TorchDispatchMode):
    """Apple's GPUs have no float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            assert not torch.is_tensor(tensor) or tensor.dtype != torch.float64, function
        return output


@pytest.mark.parametrize("name, side", [("gpt2", "left"), ("llama", "left"), ("llama", "right"), ("gemma3", "right")])
def test_no_tensor_is_made_on_another_device_than_the_models(name, side):
    """Whatever is made without saying where lands on `meta` here, and meets no tensor of the CPU without an error."""
    model = build(name, num_codes=3).train()
    ids, mask = pad(texts(lengths=[8, 3]), side)
    labels = labels_of(ids, mask.bool() & (mask.cumsum(1) > 2))
    with pytest.raises(RuntimeError), torch.device("meta"):
        ids + torch.ones(1)  # so this would be seen
    with torch.device("meta"), NoDouble():
        model.calibrate(ids, mask)
        for policy in "imitate", "rloo":
            model.settings.policy = policy
            model(ids, mask, labels=labels).loss.backward()
        trunk = model.trunk(ids, mask)
        for search in response_search, beam_search, exact_search:
            search(model, trunk, labels)
        if side == "left":  # transformers' sliding cache counts on the default device
            with model.intervene("random"):
                model.generate(ids, mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
        model.eval()(ids, mask, labels=labels)
