"""dlr.py against independent computations: one text at a time, plain hooks, no cache, equations written out again."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel,
                          GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config,
                          Qwen3ForCausalLM)

import dlr
from dlr import DLRModel

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
BLOCKS = {"gpt2": lambda lm: lm.transformer.h, "neox": lambda lm: lm.gpt_neox.layers}
LENGTHS = [11, 4, 7]  # no multiple of K beside one, and one shorter than two chunks


def build(family, **settings):
    """A model whose codes and attention matter: random weights are scaled up until the logits really differ."""
    torch.manual_seed(0)
    lm = FAMILIES[family]().eval()
    with torch.no_grad():
        for p in lm.parameters():
            if p.dim() > 1:
                p.mul_(4)
    model = DLRModel(lm, **{"num_codes": C, "chunk_size": K, "scale": 0.5, **settings}).eval()
    torch.nn.init.normal_(model.codebook, std=4.0)
    torch.nn.init.normal_(model.router.weight, std=1.0)
    return model


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return build(family)


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


def naive(family, model, row, codes=None, route=None):
    """Logits (T, V) of one text with a plain hook; codes chosen one token after the other by `route(h) -> code`."""
    used = []

    def hook(block, args, hidden):
        hidden = hidden.clone()
        for t in range(hidden.shape[1]):
            if t % model.chunk_size == 0:
                used.append(int(codes[t // model.chunk_size]) if codes is not None else route(hidden[0, t]))
            if used[-1] >= 0:
                hidden[0, t] += model.scale * model.codebook[used[-1]]
        return hidden

    handle = blocks_of(family, model.lm)[model.layer].register_forward_hook(hook)
    try:
        return model.lm(row[None], use_cache=False).logits[0], used
    finally:
        handle.remove()


def argmax_route(model):
    return lambda h: int((model.router.weight @ h).argmax())


def random_codes(*shape, seed=2, low=0):
    return torch.randint(low, C, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_steered_logits_equal_a_naive_loop(family, side, layer):
    model = build(family, layer=layer)
    rows = texts()
    ids, mask = pad(rows, side, width=13)  # wider than any text
    given = random_codes(3, 4, low=-1)
    steered, routed = model(ids, mask, codes=given), model(ids, mask)
    for b, row in enumerate(rows):
        real = mask[b].bool()
        expected, _ = naive(family, model, row, codes=given[b])
        torch.testing.assert_close(steered[b][real], expected, atol=2e-4, rtol=1e-4)
        expected, _ = naive(family, model, row, route=argmax_route(model))
        torch.testing.assert_close(routed[b][real], expected, atol=2e-4, rtol=1e-4)
        assert (expected - model.lm(row[None]).logits[0]).abs().max() > 0.01  # the codes do something


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_forked_rollouts_equal_single_ones(model, side):
    ids, mask = pad(texts(), side)
    codes = random_codes(3, 6, 4, low=-1)
    forked = model(ids, mask, codes=codes)  # (B, R, T, V)
    assert forked.shape == (3, 6, ids.shape[1], V)
    for r in range(6):
        torch.testing.assert_close(forked[:, r][mask.bool()], model(ids, mask, codes=codes[:, r])[mask.bool()],
                                   atol=2e-4, rtol=1e-4)


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
def test_log_likelihood_sums_the_response_tokens(family, model, side):
    rows = texts()
    ids, mask = pad(rows, side)
    response = mask.bool() & (torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.5)
    response[0] = mask[0].bool()  # a whole text: its first token has no prediction and is not counted
    codes = random_codes(3, 2, 4, low=-1)
    got = model.log_likelihood(ids, response, codes, mask)
    for b, row in enumerate(rows):
        counted = response[b][mask[b].bool()]
        for r in range(2):
            logits, _ = naive(family, model, row, codes=codes[b, r])
            expected = sum(float(F.log_softmax(logits[t - 1], -1)[row[t]]) for t in range(1, len(row)) if counted[t])
            assert got[b, r].item() == pytest.approx(expected, abs=2e-3)
    torch.testing.assert_close(model.log_likelihood(ids, response, codes[:, 1], mask), got[:, 1], atol=1e-3, rtol=1e-4)
    assert model.log_likelihood(ids, torch.zeros_like(response), codes, mask).abs().max() == 0


def test_logits_are_built_for_response_tokens_in_slices(monkeypatch):
    model = build("llama")
    monkeypatch.setattr(dlr, "HEAD_ROWS", 4)
    sizes = []
    model.lm.lm_head.register_forward_hook(lambda module, args, out: sizes.append(out.shape[:-1].numel()))
    ids, mask = pad(texts(), "right")
    response = torch.zeros_like(mask, dtype=torch.bool)
    response[0, 9:11] = response[1, 3] = True
    whole = model.log_likelihood(ids, response, random_codes(3, 3, 4), mask)
    assert sum(sizes) == 9 and max(sizes) <= 4
    monkeypatch.setattr(dlr, "HEAD_ROWS", 256)
    torch.testing.assert_close(model.log_likelihood(ids, response, random_codes(3, 3, 4), mask), whole)


@torch.no_grad()
def test_routed_output_is_causal(model):
    row = texts(lengths=[14])[0]
    logits = model(row[None])
    for t in range(14):
        changed = row.clone()
        changed[t] = (changed[t] - 3 + 5) % (V - 3) + 3
        other = model(changed[None])
        torch.testing.assert_close(other[0, :t], logits[0, :t], atol=1e-4, rtol=1e-4)
        assert (other[0, t] - logits[0, t]).abs().max() > 1e-3


@torch.no_grad()
def test_a_zero_codebook_is_the_plain_lm(family):
    lm = build(family).lm
    model = DLRModel(lm, num_codes=C, chunk_size=K)
    row = texts()[0][None]
    torch.testing.assert_close(model(row), lm(row).logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.generate(row, max_new_tokens=8), lm.generate(row, max_new_tokens=8))


@torch.no_grad()
def test_the_middle_block_is_the_default():
    assert build("llama").layer == 2


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_route_sees_each_chunks_first_token_unsteered(family, model, side):
    rows = texts()
    ids, mask = pad(rows, side, width=13)
    logits = model.route(ids, mask)
    assert logits.shape == (3, 4, C)  # 11 real tokens in chunks of 3
    for b, row in enumerate(rows):
        h = []
        handle = blocks_of(family, model.lm)[model.layer].register_forward_hook(lambda m, a, out: h.append(out[0]))
        model.lm(row[None])
        handle.remove()
        for m in range(math.ceil(len(row) / K)):
            torch.testing.assert_close(logits[b, m], model.router.weight @ h[0][m * K], atol=1e-3, rtol=1e-4)


def test_the_routing_gradient_reaches_the_router_alone(model):
    model.route(*pad(texts(), "left")).sum().backward()
    assert model.router.weight.grad.abs().sum() > 0
    assert all(p.grad is None for name, p in model.named_parameters() if name != "router.weight")


@torch.no_grad()
def greedy_alone(family, model, row, new, route):
    """Greedy decoding of one text, recomputed from scratch for each token -> ids, codes."""
    for _ in range(new):
        logits, used = naive(family, model, row, route=route)
        row = torch.cat([row, logits[-1].argmax()[None]])
    return row, used


@pytest.mark.parametrize("cached", [True, False])
def test_batched_generation_equals_each_text_alone(family, model, cached):
    rows = texts()
    ids, mask = pad(rows, "left")
    out = model.generate(ids, mask, max_new_tokens=9, do_sample=False, use_cache=cached, eos_token_id=None)
    for b, row in enumerate(rows):
        expected, codes = greedy_alone(family, model, row, 9, argmax_route(model))
        assert out[b, ids.shape[1]:].tolist() == expected[len(row):].tolist()
        assert model.last_codes[b, : len(codes)].tolist() == codes
        assert (model.last_codes[b, len(codes):] == -1).all()
    assert not torch.equal(out, model.lm.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False,
                                                  eos_token_id=None, pad_token_id=0))


def test_static_cache_equals_dynamic():
    model = build("llama")
    ids, mask = pad(texts(), "left")
    settings = dict(max_new_tokens=9, do_sample=False, eos_token_id=None)
    expected = model.generate(ids, mask, **settings)
    codes = model.last_codes
    assert torch.equal(model.generate(ids, mask, cache_implementation="static", **settings), expected)
    assert torch.equal(model.last_codes, codes)


@pytest.mark.parametrize("num_return_sequences", [1, 2])
def test_beams_carry_their_codes_along(family, model, num_return_sequences):
    """With and without a cache agree, and the codes that are read back are those of the returned texts."""
    rows = texts()
    ids, mask = pad(rows, "left")
    settings = dict(max_new_tokens=8, num_beams=4, do_sample=False, num_return_sequences=num_return_sequences)
    out = model.generate(ids, mask, **settings)
    codes = model.last_codes
    again = model.generate(ids, mask, use_cache=False, **settings)
    assert torch.equal(out, again) and torch.equal(codes, model.last_codes)
    for i, text in enumerate(out):
        b = i // num_return_sequences
        text = text[ids.shape[1] - len(rows[b]):]
        _, expected = naive(family, model, text, route=argmax_route(model))
        fed = [c for c in codes[i].tolist() if c >= 0]
        assert fed and fed == expected[: len(fed)]


def test_sampling_follows_the_seed_and_the_codes_are_read_back(family, model):
    ids, mask = pad(texts(), "left")
    settings = dict(max_new_tokens=7, do_sample=True, num_return_sequences=2, eos_token_id=None)
    torch.manual_seed(5)
    out = model.generate(ids, mask, **settings)
    torch.manual_seed(5)
    assert torch.equal(model.generate(ids, mask, use_cache=False, **settings), out)
    mask = mask.repeat_interleave(2, 0)
    full = torch.cat([mask, torch.ones(6, 6, dtype=torch.long)], 1)  # the last token is never fed back
    expected = model.route(out[:, :-1], full).argmax(-1)
    kept = model.last_codes >= 0
    assert torch.equal(model.last_codes[kept], expected[kept])
    assert kept.sum() == sum(math.ceil((n + 6) / K) for n in LENGTHS for _ in range(2))


def test_generation_refuses_what_it_would_get_wrong():
    model = build("llama")
    ids, mask = pad(texts(), "right")
    with pytest.raises(ValueError, match="left"):
        model.generate(ids, mask, max_new_tokens=2)
    output = model.lm(ids, use_cache=True)
    name = "cache" if "cache" in output else "past_key_values"  # as before transformers 5.24
    with pytest.raises(ValueError, match="without steering"):
        model.generate(torch.cat([ids, ids], 1), max_new_tokens=2, **{name: output[name]})
    assert not hooks_of(model)


@torch.no_grad()
def test_interventions_hold_in_forward_and_generation(family, model):
    rows = texts()
    ids, mask = pad(rows, "left")
    settings = dict(max_new_tokens=7, do_sample=False, eos_token_id=None)
    with model.intervene("off"):
        off, off_text = model(ids, mask), model.generate(ids, mask, **settings)
        assert (model.last_codes == -1).all()
    with model.intervene(lambda codes: (codes + 1) % C):
        moved, moved_text = model(ids, mask), model.generate(ids, mask, **settings)
    plain = model.lm.generate(ids, attention_mask=mask, pad_token_id=0, **settings)
    assert torch.equal(off_text, plain)
    route = argmax_route(model)
    for b, row in enumerate(rows):
        torch.testing.assert_close(off[b][mask[b].bool()], model.lm(row[None]).logits[0], atol=2e-4, rtol=1e-4)
        expected, _ = naive(family, model, row, route=lambda h: (route(h) + 1) % C)
        torch.testing.assert_close(moved[b][mask[b].bool()], expected, atol=2e-4, rtol=1e-4)
        expected, _ = greedy_alone(family, model, row, 7, lambda h: (route(h) + 1) % C)
        assert moved_text[b, ids.shape[1]:].tolist() == expected[len(row):].tolist()


def test_random_codes_are_uniform_and_seeded():
    model = build("llama")
    ids = torch.randint(3, V, (40, 24))
    with model.intervene("random"):
        torch.manual_seed(0)
        first = model.generate(ids, max_new_tokens=12, eos_token_id=None)
        codes = model.last_codes
        torch.manual_seed(0)
        assert torch.equal(model.generate(ids, max_new_tokens=12, eos_token_id=None), first)
    counts = torch.bincount(codes.flatten(), minlength=C) / codes.numel()
    assert (counts - 1 / C).abs().max() < 0.08
    assert (codes[:, 0] != codes[0, 0]).any()


def test_an_intervention_sees_the_grid_and_is_undone():
    model = build("llama")
    ids = texts(lengths=[8])[0][None]
    grids = []
    with pytest.raises(RuntimeError, match="stop"):
        with model.intervene(lambda codes: grids.append(codes.clone()) or codes):
            model.generate(ids, max_new_tokens=4, eos_token_id=None)
            raise RuntimeError("stop")
    assert [g.shape[1] for g in grids] == [3, 3, 4, 4][: len(grids)] and (grids[0] >= 0).all()
    before = model(ids)
    with model.intervene("off"):
        with model.intervene("random"):
            pass
        assert torch.allclose(model(ids), model.lm(ids).logits, atol=1e-4)
    assert torch.equal(model(ids), before)
    with pytest.raises(ValueError, match="off"):
        with model.intervene("of"):
            pass
    unsteered = torch.full((1, 3), -1)
    with model.intervene(lambda codes: codes * 0):
        assert torch.allclose(model(ids, codes=unsteered), model.lm(ids).logits, atol=1e-4)


def hooks_of(model):
    """Whatever of a call is still there: hooks, replaced modules, replaced methods."""
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__]


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_an_exception_leaves_the_lm_as_it_was(family, model, position):
    ids = texts()[0][None]
    plain, steered = model.lm(ids).logits, model(ids)
    block = blocks_of(family, model.lm)[position]
    handle = block.register_forward_pre_hook(lambda module, args: (_ for _ in ()).throw(KeyboardInterrupt()))
    for call in (lambda: model(ids), lambda: model.generate(ids, max_new_tokens=3),
                 lambda: model.search(ids, torch.ones_like(ids), rollouts=2)):
        with pytest.raises(KeyboardInterrupt):
            call()
    handle.remove()
    assert not hooks_of(model)
    assert torch.equal(model.lm(ids).logits, plain) and torch.equal(model(ids), steered)


@torch.no_grad()
def test_two_models_around_one_lm_do_not_disturb_each_other():
    one = build("llama")
    two = DLRModel(one.lm, num_codes=3, chunk_size=2, layer=1, scale=1.0)
    torch.nn.init.normal_(two.codebook, std=4.0)
    ids = texts()[0][None]
    a, b = one(ids), two(ids)
    text = one.generate(ids, max_new_tokens=5, eos_token_id=None)
    with one.intervene("off"):
        assert torch.equal(two(ids), b)
    two.generate(ids, max_new_tokens=5)
    assert torch.equal(one(ids), a) and torch.equal(one.generate(ids, max_new_tokens=5, eos_token_id=None), text)


def test_search_returns_the_likeliest_of_what_it_drew(model):
    ids, mask = pad(texts(), "right")
    response = mask.bool()
    torch.manual_seed(0)
    found = model.search(ids, response, rollouts=7, attention_mask=mask)
    assert found.codes.shape == (3, 4) and found.log_likelihood.shape == (3, 7) and found.rollouts.shape == (3, 7, 4)
    real = torch.tensor([[m < math.ceil(n / K) for m in range(4)] for n in LENGTHS])
    assert ((found.rollouts >= 0) == real[:, None]).all()
    for b in range(3):
        alone = [model.log_likelihood(ids[b:b + 1], response[b:b + 1], codes[None], mask[b:b + 1]).item()
                 for codes in found.rollouts[b]]
        assert alone == pytest.approx(found.log_likelihood[b].tolist(), abs=2e-3)
        assert found.codes[b].tolist() == found.rollouts[b, alone.index(max(alone))].tolist()


def test_search_draws_from_the_tempered_router():
    model = build("llama")
    ids = texts(lengths=[5])[0][None]
    response = torch.ones_like(ids, dtype=torch.bool)
    torch.nn.init.normal_(model.router.weight, std=0.02)
    logits = model.route(ids)[0]
    for tau in (0.5, 1.0, 2.0):
        torch.manual_seed(0)
        drawn = model.search(ids, response, rollouts=4000, temperature=tau).rollouts[0]  # (R, M)
        for m in range(2):
            share = torch.bincount(drawn[:, m], minlength=C) / 4000
            assert (share - (logits[m] / tau).softmax(-1)).abs().max() < 0.03
    mixed = model.search(ids, response, rollouts=800, temperature=[0.0] * 400 + [2.0] * 400).rollouts[0]
    assert (mixed[:400] == logits.argmax(-1)).all() and (mixed[400:] != logits.argmax(-1)).any()
    with pytest.raises(ValueError, match="one for each rollout"):
        model.search(ids, response, rollouts=3, temperature=[1.0, 2.0])
    greedy = model.search(ids, response, rollouts=3, temperature=0)
    assert (greedy.rollouts[0] == logits.argmax(-1)).all()


def test_search_ignores_dropout_and_leaves_the_mode_alone():
    torch.manual_seed(0)
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=H, n_layer=2, n_head=4, resid_pdrop=0.5, embd_pdrop=0.5))
    model = DLRModel(lm, num_codes=C, chunk_size=K, layer=0).train()  # block 1, with its dropout, runs per rollout
    lm.transformer.h[0].eval()  # a caller's own choice
    ids = texts()[0][None]
    scores = model.search(ids, torch.ones_like(ids), rollouts=4).log_likelihood
    assert (scores - scores[:, :1]).abs().max() < 1e-4  # zero codebook: all rollouts are alike
    assert model.training and lm.transformer.h[1].training and not lm.transformer.h[0].training


def written_out_again(model, ids, response, codes, mask, bigram, alpha_policy, alpha_reg):
    """Equation (4) in plain Python over plain forwards: no forking, no head slices."""
    logits = {"generalist": model.lm(ids, attention_mask=mask).logits, "steered": model(ids, mask, codes=codes)}
    terms, tokens = {}, 0
    for name, value in logits.items():
        terms[name], tokens = 0, 0
        for b in range(len(ids)):
            for t in range(1, ids.shape[1]):
                if response[b, t]:
                    terms[name] = terms[name] - value[b, t - 1].log_softmax(-1)[ids[b, t]]
                    tokens += 1
        terms[name] = terms[name] / tokens
    z = model.route(ids, mask)
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
    terms["total"] = terms["generalist"] + terms["steered"]
    terms["total"] = terms["total"] + alpha_policy * terms["policy"] + alpha_reg * terms["prior"]
    return terms


def gradients(model, total):
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_and_its_gradient_equal_the_equation(family, checkpointing):
    model = build(family)
    torch.nn.init.normal_(model.router.weight, std=0.05)
    model.bigram.copy_(torch.rand(C, C).softmax(-1) / C)
    ids, mask = pad(texts(), "right")
    response = mask.bool() & (torch.arange(ids.shape[1]) >= 2)
    codes = random_codes(3, 4)
    expected = written_out_again(model, ids, response, codes, mask, model.bigram.clone(), 0.7, 0.3)
    wanted = gradients(model, expected["total"])
    if checkpointing:
        model.train()  # GPT-2 has dropout; it goes off again below
        for m in model.modules():
            if isinstance(m, torch.nn.Dropout):
                m.p = 0.0
        getattr(model.lm, "activation_checkpointing_enable", model.lm.gradient_checkpointing_enable)()
    got = model.loss(ids, response, codes, attention_mask=mask, alpha_policy=0.7, alpha_reg=0.3)
    for name, value in expected.items():
        assert got[name].item() == pytest.approx(value.item(), rel=1e-4), name
    grads = gradients(model, got.total)
    assert grads.keys() == wanted.keys() == {name for name, _ in model.named_parameters()}
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name], atol=2e-5 * wanted[name].abs().max().item() + 1e-6, rtol=2e-3)


def test_the_ablations_of_the_loss_equal_the_equation():
    """Other codes for the steered term, no generalist term, and both with the LM frozen."""
    model = build("llama")
    torch.nn.init.normal_(model.router.weight, std=0.05)
    ids, mask = pad(texts(), "right")
    response, bigram = mask.bool() & (torch.arange(ids.shape[1]) >= 2), model.bigram.clone()
    codes, steer = random_codes(3, 4), random_codes(3, 4, seed=5)
    taught = written_out_again(model, ids, response, codes, mask, bigram, 0.7, 0.3)
    steered = written_out_again(model, ids, response, steer, mask, bigram, 0.7, 0.3)["steered"]
    total = steered + 0.7 * taught["policy"] + 0.3 * taught["prior"]
    wanted = gradients(model, total)
    for frozen in (False, True):
        model.lm.requires_grad_(not frozen)
        for generalist in (False, True):
            got = model.loss(ids, response, codes, attention_mask=mask, alpha_policy=0.7, alpha_reg=0.3, steer=steer,
                             generalist=generalist)
            assert got.steered.item() == pytest.approx(steered.item(), rel=1e-4)
            assert got.generalist.item() == pytest.approx(generalist * taught["generalist"].item(), rel=1e-4)
            assert got.total.item() == pytest.approx(total.item() + got.generalist.item(), rel=1e-4)
            if frozen or not generalist:  # the unsteered loss teaches the LM alone
                grads = gradients(model, got.total)
                assert len(grads) == 2 if frozen else grads.keys() == wanted.keys()
                for name, grad in grads.items():
                    torch.testing.assert_close(grad, wanted[name], atol=2e-5 * wanted[name].abs().max().item() + 1e-6,
                                               rtol=2e-3)


def test_sharing_the_trunk_changes_nothing():
    model = build("qwen3").train()
    ids, mask = pad(texts(), "left")
    response = mask.bool()
    trunk = model.trunk(ids, mask)
    torch.manual_seed(0)
    shared = model.search(ids, response, rollouts=4, trunk=trunk)
    torch.manual_seed(0)
    alone = model.search(ids, response, rollouts=4, attention_mask=mask)
    assert torch.equal(shared.rollouts, alone.rollouts)
    torch.testing.assert_close(shared.log_likelihood, alone.log_likelihood)
    bigram = model.bigram.clone()
    one = gradients(model, model.loss(ids, response, alone.codes, trunk=trunk).total)
    model.bigram = bigram
    two = gradients(model, model.loss(ids, response, alone.codes, attention_mask=mask).total)
    for name in two:
        torch.testing.assert_close(one[name], two[name])


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
    model = build("llama")
    torch.nn.init.normal_(model.router.weight, std=0.05)
    ids, mask = pad(texts(), "left")
    response = mask.bool()
    found = model.search(ids, response, rollouts=4, attention_mask=mask)
    loss = model.loss(ids, response, found.codes, attention_mask=mask, reinforce=found, alpha_policy=3.0, alpha_reg=0.0)
    real = torch.tensor([[4 * [True]][0], [True, True, False, False], [True, True, True, False]])
    term = dlr.rloo_term(model.route(ids, mask), found.rollouts, found.log_likelihood, real, mask[:, 1:].sum() - 2)
    torch.testing.assert_close(loss.policy, term)
    torch.testing.assert_close(loss.total, loss.generalist + loss.steered + 3 * term)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mixture_steers_with_the_weighted_vectors(family, model, side):
    """Against a hook on each text alone; one-hot weights are codes; the router learns through the mixture alone."""
    rows = texts()
    ids, mask = pad(rows, side)
    response = mask.bool()
    torch.manual_seed(3)
    weights = torch.randn(3, 4, C).softmax(-1)
    got = model.log_likelihood(ids, response, weights, attention_mask=mask)
    for b, row in enumerate(rows):
        def hook(block, args, hidden):
            chunk = torch.arange(hidden.shape[1]) // K
            return hidden + model.scale * weights[b, chunk] @ model.codebook
        handle = blocks_of(family, model.lm)[model.layer].register_forward_hook(hook)
        log_p = model.lm(row[None]).logits[0].log_softmax(-1)
        handle.remove()
        expected = log_p[:-1].gather(1, row[1:, None]).sum()
        torch.testing.assert_close(got[b], expected, atol=2e-3, rtol=2e-3)
    codes = random_codes(3, 4)
    one_hot = F.one_hot(codes, C).float()
    torch.testing.assert_close(model.log_likelihood(ids, response, one_hot, attention_mask=mask),
                               model.log_likelihood(ids, response, codes, attention_mask=mask))
    trunk = model.trunk(ids, mask)
    loss = model.loss(ids, response, None, trunk=trunk, steer=model.route(ids, trunk=trunk).softmax(-1), alpha_reg=0.0,
                      generalist=False)
    assert loss.policy == 0 and torch.equal(loss.total, loss.steered)
    assert gradients(model, loss.total)["router.weight"].abs().max() > 0


@pytest.mark.parametrize("norm", ["none", "rms", "centred"])
def test_calibrated_units_and_norms_hold_in_training_generation_and_on_disk(norm, tmp_path):
    model, rows = build("llama", router_norm=norm), texts()
    states = {}
    for side in ("left", "right"):
        model.calibrate(*pad(rows, side))
        states[side] = model.unit.clone(), model.center.clone()
    for one, two in zip(*states.values()):
        torch.testing.assert_close(one, two)
    hidden = []
    handle = model.lm.model.layers[model.layer].register_forward_hook(lambda block, args, h: hidden.append(h[0, 1:]))
    for row in rows:
        model.lm(row[None])
    handle.remove()
    hidden = torch.cat(hidden)  # without the first tokens
    assert model.unit.item() == pytest.approx(hidden.norm(dim=1).median().item() / H**0.5, rel=1e-4)
    torch.testing.assert_close(model.center, hidden.mean(0), atol=1e-4, rtol=1e-4)

    def route(h):
        h = h - model.center if norm == "centred" else h
        h = h / h.pow(2).mean().sqrt() if norm != "none" else h
        return int((model.router.weight @ h).argmax())

    plain = build("llama")  # the naive loop knows no units
    plain.codebook.data *= model.unit
    for row in rows:
        logits, used = naive("llama", plain, row, route=route)
        torch.testing.assert_close(model(row[None])[0], logits, atol=1e-3, rtol=1e-3)
    new = model.generate(rows[0][None], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(model(new).argmax(-1)[0, 10:-1], new[0, 11:])
    model.save_pretrained(tmp_path)
    loaded = DLRModel.from_pretrained(tmp_path)
    assert loaded.router_norm == norm and torch.equal(loaded.unit, model.unit)
    torch.testing.assert_close(loaded(rows[0][None]), model(rows[0][None]))


def test_given_sequences_are_scored_as_they_are(model):
    ids, mask = pad(texts(), "left")
    given = random_codes(3, 5, 4, low=-1)
    found = model.search(ids, mask, given, attention_mask=mask)
    expected = model.log_likelihood(ids, mask, given, attention_mask=mask)
    torch.testing.assert_close(found.log_likelihood, expected)
    best = expected.argmax(1)
    real = torch.tensor([[True] * 4, [True, True, False, False], [True, True, True, False]])
    assert torch.equal(found.codes, given[range(3), best].masked_fill(~real, -1))


@pytest.mark.parametrize("policy", ["imitate", "rloo"])
def test_the_parts_of_a_batch_make_the_gradient_of_the_whole(policy):
    """One text, then two (padded to another width): all four terms, though policy and prior are no sums over texts."""
    model = build("llama")
    torch.nn.init.normal_(model.router.weight, std=0.05)
    ids, mask = pad(texts(), "right")
    response = mask.bool() & (torch.arange(ids.shape[1]) >= 2)
    found = model.search(ids, response, 3, attention_mask=mask)
    settings = dict(alpha_policy=0.7, alpha_reg=0.3, reinforce=found if policy == "rloo" else None)
    whole = model.loss(ids, response, found.codes, attention_mask=mask, **settings)
    wanted = gradients(model, whole.total)
    tokens, parts, total = response[:, 1:].sum(), [], 0
    for rows in (slice(1, 2), slice(0, 3, 2)):
        longest = mask[rows].sum(1).max()
        part, counted = ids[rows, :longest], response[rows, :longest]
        trunk = model.trunk(part, mask[rows, :longest])
        rollouts = found.rollouts[rows, :, : trunk.real.shape[1]]
        own = dlr.SearchResult(found.codes[rows], found.log_likelihood[rows], rollouts)
        total = total + sum(model.text_terms(part, counted, own.codes, trunk, tokens))
        parts.append((model.route(part, trunk=trunk), trunk.real, own if policy == "rloo" else own.codes))
    one, other = model.router_terms(parts, tokens)
    torch.testing.assert_close(torch.stack([one, other]), torch.stack([whole.policy, whole.prior]))
    grads = gradients(model, total + 0.7 * one + 0.3 * other)
    assert grads.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(grads[name], value, atol=1e-5 * value.abs().max().item(), rtol=1e-4, msg=name)


def test_bigrams_stay_within_a_text():
    """Texts of one chunk have no pairs; beside a longer text only that text's pairs count."""
    logits, real = torch.randn(3, 4, C), torch.zeros(3, 4, dtype=torch.bool)
    real[:, 0] = True
    sums, pairs = dlr.bigrams(logits, real)
    assert pairs == 0 and not sums.any()
    model = build("llama").train()
    _, prior = model.router_terms([(logits, real, None)], torch.tensor(1))
    uniform = torch.full((C, C), C**-2.0)  # without a pair the average stays what it was
    torch.testing.assert_close(model.bigram, uniform)
    torch.testing.assert_close(prior, dlr.prior_term(uniform, dlr.zipf_prior(uniform.sum(1))))
    real[1, :3] = True
    p = logits[1].softmax(-1)
    sums, pairs = dlr.bigrams(logits, real)
    assert pairs == 2
    torch.testing.assert_close(sums, torch.outer(p[0], p[1]) + torch.outer(p[1], p[2]))


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


def test_the_running_average_moves_in_training_only():
    model = build("llama")
    ids, mask = pad(texts(), "right")
    before = model.bigram.clone()
    model.loss(ids, mask, random_codes(3, 4), attention_mask=mask)
    assert torch.equal(model.bigram, before)
    model.train().loss(ids, mask, random_codes(3, 4), attention_mask=mask)
    real = torch.tensor([[m < math.ceil(n / K) for m in range(4)] for n in LENGTHS])
    sums, pairs = dlr.bigrams(model.route(ids, mask), real)
    expected = 0.8 * before + 0.2 * sums / pairs
    torch.testing.assert_close(model.bigram, expected)


def test_one_step_makes_the_winner_likelier():
    model = build("llama").train()
    model.codebook.data.zero_()
    ids = texts()[0][None]
    response = torch.ones_like(ids, dtype=torch.bool)
    found = model.search(ids, response, rollouts=4)
    before = model.log_likelihood(ids, response, found.codes).item()
    optimiser = torch.optim.SGD([model.codebook, model.router.weight], 1e-3)
    model.loss(ids, response, found.codes).total.backward()
    optimiser.step()
    assert model.log_likelihood(ids, response, found.codes).item() > before
    after = F.cross_entropy(model.route(ids)[0], found.codes[0])
    assert after < F.cross_entropy(found.logits[0], found.codes[0])


def test_saved_equals_loaded(family, model, tmp_path):
    ids, mask = pad(texts(), "left")
    model.save_pretrained(tmp_path)
    loaded = DLRModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids, mask), model(ids, mask))
    assert torch.equal(loaded.bigram, model.bigram) and not loaded.training
    with model.intervene("off"):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(plain(ids[:1]).logits, model(ids[:1]), atol=1e-5, rtol=1e-5)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"dlr.safetensors", "dlr_config.json", "model.safetensors"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)


def test_bad_settings_are_named(tmp_path):
    lm = FAMILIES["llama"]()
    with pytest.raises(ValueError, match="0 to 3"):
        DLRModel(lm, layer=4)
    with pytest.raises(ValueError, match="0 to 3"):
        DLRModel(lm, layer=-1)
    with pytest.raises(ValueError, match="chunk_size"):
        DLRModel(lm, chunk_size=0)
    with pytest.raises(FileNotFoundError, match="dlr_config.json"):
        DLRModel.from_pretrained(tmp_path)
    model, ids = DLRModel(lm, chunk_size=2), torch.arange(3, 9)[None]
    with pytest.raises(ValueError, match="M = 3"):
        model(ids, codes=torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="rollouts"):
        model.search(ids, torch.ones_like(ids), rollouts=0)
    from transformers import T5Config, T5ForConditionalGeneration
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=V, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8))
    with pytest.raises(ValueError, match="encoder-decoder"):
        DLRModel(t5)


def test_bfloat16_update_with_float32_search():
    model = build("llama").train()
    ids, mask = pad(texts(), "right")
    torch.manual_seed(0)
    expected = model.search(ids, mask, rollouts=4, attention_mask=mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(0)
        trunk = model.eval().trunk(ids, mask)
    plain = model.trunk(ids, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(0)
        kept = model.search(ids, mask, rollouts=4, trunk=plain)
        torch.manual_seed(0)
        rounded = model.search(ids, mask, rollouts=4, trunk=plain, dtype=torch.bfloat16)
        model.loss(ids, mask, kept.codes, trunk=trunk).total.backward()
    torch.testing.assert_close(kept.log_likelihood, expected.log_likelihood)
    assert (rounded.log_likelihood - expected.log_likelihood).abs().max() > 1e-3
    assert model.codebook.grad.abs().sum() > 0


class NoDouble(TorchDispatchMode):
    """Apple's GPUs have no float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            assert not torch.is_tensor(tensor) or tensor.dtype != torch.float64, function
        return output


@pytest.mark.parametrize("side", ["left", "right"])
def test_no_tensor_is_made_on_another_device_than_the_models(family, side):
    """Whatever is made without saying where lands on `meta` here, and meets no tensor of the CPU without an error."""
    model = build(family)
    ids, mask = pad(texts(), side)
    response = mask.bool() & (torch.arange(ids.shape[1]) >= 5)
    with pytest.raises(RuntimeError), torch.device("meta"):
        ids + torch.ones(1)  # so this would be seen
    with torch.device("meta"), NoDouble():
        model.calibrate(ids, mask)
        trunk = model.trunk(ids, mask)
        found = model.search(ids, response, 3, temperature=0.5, trunk=trunk)
        model.beam_search(ids, response, 2, trunk=trunk)
        model.exact_search(ids, response, trunk=trunk)
        model.loss(ids, response, found.codes, trunk=trunk).total.backward()
        model.loss(ids, response, found.codes, attention_mask=mask, reinforce=found).total.backward()
        if side == "left" and family != "gemma3":  # transformers' sliding cache counts on the default device
            with model.intervene("random"):
                model.generate(ids, mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
        model(ids, mask)
