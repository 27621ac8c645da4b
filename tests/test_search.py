"""beam_search and exact_search against brute force and against searches without a cache, one text at a time."""
from functools import cache
from itertools import product
from math import ceil

import pytest
import torch
from test_dlr import FAMILIES, build, pad, texts
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

import dlr
from dlr import DLRModel

C, K, FIRST = 3, 3, 4  # the response begins inside chunk 1
LENGTHS = [11, 5, 7]  # a partial last chunk; one that only begins to count; a last token that predicts nothing
CHUNKS = [ceil(n / K) for n in LENGTHS]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(params=["left", "right"])
def side(request):
    return request.param


def small(family, layer=0):
    return build(family, num_codes=C, chunk_size=K, layer=layer)


def batch(side, first=FIRST, lengths=LENGTHS):
    """-> ids, response mask, attention mask, each (B, 13)."""
    ids, mask = pad(texts(lengths=lengths), side, width=13)
    return ids, mask.bool() & (mask.cumsum(1) > first), mask


@torch.no_grad()
def alone(model, row, codes, first=FIRST, stop=None):
    """log p of a text's tokens from `first` to `stop`, without batch, padding or cache."""
    counted = torch.zeros(1, len(row), dtype=torch.bool)
    counted[:, first:stop] = True
    codes = torch.tensor([list(codes) + [-1] * (ceil(len(row) / K) - len(codes))])
    return model.log_likelihood(row[None], counted, codes).item()


@cache
def brute_force(family):
    """For each text, log p of each of its code sequences."""
    model = small(family)
    return [{codes: alone(model, row, codes) for codes in product(range(C), repeat=chunks)}
            for row, chunks in zip(texts(lengths=LENGTHS), CHUNKS)]


def test_the_exact_search_and_a_full_beam_find_the_optimum(family, side):
    model = small(family)
    ids, response, mask = batch(side)
    exact = model.exact_search(ids, response, mask)
    beam = model.beam_search(ids, response, C ** 4, mask)
    assert exact.codes.shape == (3, 4) and exact.log_likelihood.shape == (3, 1) and exact.rollouts.shape == (3, 1, 4)
    assert beam.log_likelihood.shape == (3, C ** 4) and beam.rollouts.shape == (3, C ** 4, 4)
    assert torch.equal(exact.codes, beam.codes) and torch.equal(exact.codes, exact.rollouts[:, 0])
    torch.testing.assert_close(exact.logits, model.route(ids, mask))
    for b, (every, chunks) in enumerate(zip(brute_force(family), CHUNKS)):
        codes = tuple(exact.codes[b, :chunks].tolist())
        assert (exact.codes[b, chunks:] == -1).all()
        assert every[codes] == pytest.approx(max(every.values()), abs=1e-4)
        assert exact.log_likelihood[b].item() == pytest.approx(every[codes], abs=1e-4)
        scores = beam.log_likelihood[b]
        assert scores.diff()[: len(every) - 1].max() <= 0 and (scores[len(every):] == scores[0]).all()
        assert (beam.rollouts[b, len(every):] == beam.codes[b]).all()  # a short text fills up with its best
        found = {tuple(r[:chunks].tolist()): s.item() for r, s in zip(beam.rollouts[b, : len(every)], scores)}
        assert found == pytest.approx(every, abs=1e-4)  # all sequences, each with its own score
    assert exact.codes[2, 2] == exact.logits[2, 2].argmax()  # nothing is predicted from there: the router decides
    spread = [max(every.values()) - min(every.values()) for every in brute_force(family)]
    assert min(spread) > 0.1  # the codes do something


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("width, side", [(1, "right"), (4, "left")])
def test_beam_scores_are_log_likelihoods(family, layer, width, side):
    model = small(family, layer)
    ids, response, mask = batch(side)
    found = model.beam_search(ids, response, width, mask)
    with torch.no_grad():
        expected = model.log_likelihood(ids, response, found.rollouts, mask)
    assert found.rollouts.shape == (3, width, 4)
    torch.testing.assert_close(found.log_likelihood, expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(found.codes, found.rollouts[:, 0])
    assert found.log_likelihood[:, 0].equal(found.log_likelihood.max(1).values)
    exists = torch.arange(4) < torch.tensor(CHUNKS)[:, None]
    assert torch.equal(found.rollouts >= 0, exists[:, None].expand(-1, width, -1))


@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_beam_equals_one_that_recomputes_everything(family, width):
    model = small(family)
    ids, response, mask = batch("left")
    found = model.beam_search(ids, response, width, mask)
    for b, row in enumerate(texts(lengths=LENGTHS)):
        router = model.route(row[None])[0].log_softmax(-1).tolist()
        beam = [()]
        for m in range(CHUNKS[b]):
            beam = [prefix + (code,) for prefix in beam for code in range(C)]
            # what is predicted from chunks 0 .. m: all up to the first token of chunk m + 1
            key = {p: (alone(model, row, p, stop=(m + 1) * K + 1), sum(router[i][c] for i, c in enumerate(p)))
                   for p in beam}
            beam = sorted(beam, key=lambda p: (round(key[p][0], 5), key[p][1]), reverse=True)[:width]
        assert [tuple(r[: CHUNKS[b]].tolist()) for r in found.rollouts[b, : len(beam)]] == beam
        assert found.log_likelihood[b, : len(beam)].tolist() == pytest.approx([key[p][0] for p in beam], abs=1e-4)


def test_no_search_beats_the_exact_one():
    model = small("qwen3")
    torch.manual_seed(0)
    torch.nn.init.normal_(model.router.weight, std=0.1)
    ids, response, mask = batch("right")
    best = model.exact_search(ids, response, mask).log_likelihood[:, 0]
    drawn = [model.search(ids, response, n, attention_mask=mask).log_likelihood.max(1).values for n in (1, 4, 16)]
    beams = [model.beam_search(ids, response, w, mask).log_likelihood[:, 0] for w in (1, 3, 9, 27)]
    assert all((scores <= best + 1e-4).all() for scores in drawn + beams)
    assert (drawn[0] < best - 0.1).any()
    torch.testing.assert_close(beams[-1], best)  # C ** 3 prefixes before the last chunk: nothing was dropped


def test_where_nothing_counts_the_router_decides():
    model = small("llama")
    ids, response, mask = batch("left", first=6)  # chunks 0 and 1 count nothing, and of text 1 nothing counts at all
    logits = model.route(ids, mask)
    found = model.beam_search(ids, response, 1, mask)
    assert torch.equal(found.codes[:, 0], logits[:, 0].argmax(-1))
    assert found.codes[1].tolist() == [*logits[1, :2].argmax(-1).tolist(), -1, -1]
    assert found.log_likelihood[1].item() == 0
    exact = model.exact_search(ids, response, mask)
    assert torch.equal(exact.codes[1], found.codes[1]) and exact.log_likelihood[1].item() == 0
    nothing = torch.zeros_like(response)
    for found in model.beam_search(ids, nothing, 5, mask), model.exact_search(ids, nothing, mask):
        exists = found.codes >= 0
        assert torch.equal(found.codes[exists], logits.argmax(-1)[exists]) and exists.sum() == sum(CHUNKS)


def test_exact_search_stops_at_its_budget():
    model = small("llama")
    ids, response, _ = batch("right", lengths=[13])
    expanded = model.exact_search(ids, response).expanded
    assert CHUNKS[0] < expanded.item() <= sum(C ** m for m in range(5))
    assert model.exact_search(ids, response, most=expanded.item()).expanded.equal(expanded)
    for most in (0, 2, expanded.item() - 1):
        with pytest.raises(ValueError, match=f"extended {most} prefixes of text 0"):
            model.exact_search(ids, response, most=most)
    with pytest.raises(ValueError, match="width"):
        model.beam_search(ids, response, width=0)


@pytest.mark.parametrize("name", ["neox", "llama"])
def test_exact_search_expands_what_is_likelier_than_the_optimum_and_no_more(name):
    model = small(name)
    with torch.no_grad():
        model.lm.get_output_embeddings().weight.mul_(4)  # differences that matter: otherwise it is nearly everything
    row = texts(lengths=[12])[0]
    found = model.exact_search(row[None], torch.arange(12)[None] >= FIRST)
    prefixes = [p for m in range(4) for p in product(range(C), repeat=m)]
    likelier = [p for p in prefixes if alone(model, row, p, stop=len(p) * K + 1) > found.log_likelihood.item()]
    assert found.expanded.item() == len(likelier) < len(prefixes)


def test_prefixes_share_what_was_computed(family, monkeypatch):
    """Blocks up to the injection layer see each text once, those above the new chunk only, and few rows at a time."""
    model = small(family, layer=1)
    ids, response, mask = batch("right")
    expected = model.beam_search(ids, response, 4, mask)
    monkeypatch.setattr(dlr, "SEARCH_ROWS", 5)
    seen = {i: [] for i in range(4)}  # block: the (rows, tokens) of each of its runs

    def watch(i):
        return lambda block, args, kwargs: seen[i].append((args[0] if args else kwargs["hidden_states"]).shape[:2])

    for i, block in enumerate(model._blocks):
        block.register_forward_pre_hook(watch(i), with_kwargs=True)
    found = model.beam_search(ids, response, 4, mask)
    assert torch.equal(found.codes, expected.codes)
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood)
    assert seen[0] == seen[1] == [(3, 13)] and seen[2] == seen[3]
    # Nothing counts in chunk 0. Chunk 1 is run for all texts under the C prefixes of one code, chunk 2 (the last token
    # of text 2 predicts nothing) and chunk 3 for text 0 under the 4 prefixes kept. Before each, all that was kept runs.
    extensions = [min(5, n - done) for n in (3 * C * C, 4 * C, 4 * C) for done in range(0, n, 5)]
    kept = [3 * C, 3 * 4, 3 * 4]
    assert sorted(rows for rows, _ in seen[2]) == sorted(extensions + kept)
    assert [tokens for _, tokens in seen[2]] == [3] * (len(seen[2]) - 3) + [2] * 3  # text 0 has 2 tokens in chunk 3


def test_dropout_and_checkpointing_are_off_and_the_mode_is_left_alone():
    torch.manual_seed(0)
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=41, n_embd=32, n_layer=3, n_head=4, resid_pdrop=0.5, embd_pdrop=0.5))
    model = DLRModel(lm, num_codes=C, chunk_size=K, layer=1)
    torch.nn.init.normal_(model.codebook, std=4.0)
    ids, response, mask = batch("left")
    expected = model.eval().beam_search(ids, response, 4, mask), model.exact_search(ids, response, mask)
    getattr(model.train().lm, "activation_checkpointing_enable", model.lm.gradient_checkpointing_enable)()
    found = model.beam_search(ids, response, 4, mask), model.exact_search(ids, response, mask)
    for a, b in zip(found, expected):
        assert torch.equal(a.rollouts, b.rollouts) and torch.equal(a.log_likelihood, b.log_likelihood)
        assert not a.log_likelihood.requires_grad
    assert model.training and all(part.training for part in lm.modules())


@pytest.mark.parametrize("name", ["beam_search", "exact_search"])
def test_an_error_leaves_the_lm_as_it_was(name):
    model = small("gpt2")
    before = dict(model.lm.named_modules())
    ids, response, mask = batch("left")
    trunk = model.trunk(ids, mask)
    hook = model._blocks[2].register_forward_pre_hook(lambda *args: 1 / 0)  # while its stand-ins are in place
    with pytest.raises(ZeroDivisionError):
        getattr(model, name)(ids, response, attention_mask=mask, trunk=trunk)
    hook.remove()
    after = dict(model.lm.named_modules())
    assert before.keys() == after.keys() and all(after[name] is part for name, part in before.items())


def test_precision_and_interventions_are_those_of_search():
    model = small("llama")
    ids, response, mask = batch("right")
    expected = model.beam_search(ids, response, 4, mask)
    trunk = model.trunk(ids, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = model.beam_search(ids, response, 4, trunk=trunk)
        rounded = model.beam_search(ids, response, 4, trunk=trunk, dtype=torch.bfloat16)
        torch.testing.assert_close(model.exact_search(ids, response, trunk=trunk).log_likelihood,
                                   model.exact_search(ids, response, mask).log_likelihood, atol=0.5, rtol=0)
    torch.testing.assert_close(kept.log_likelihood, expected.log_likelihood)
    assert (rounded.log_likelihood - expected.log_likelihood).abs().max() > 1e-3
    with model.intervene(lambda codes: (codes + 1) % C), torch.no_grad():
        moved = model.exact_search(ids, response, mask)
        torch.testing.assert_close(moved.log_likelihood[:, 0], model.log_likelihood(ids, response, moved.codes, mask))
    torch.testing.assert_close(moved.log_likelihood, model.exact_search(ids, response, mask).log_likelihood)


def test_the_last_position_and_chunks_longer_than_the_text():
    """A text as long as GPT-2's table of positions: its last chunk must not reach beyond."""
    for chunk_size in (30, 100):
        model = build("gpt2", num_codes=C, chunk_size=chunk_size)
        row = texts(lengths=[64])[0][None]
        found = model.exact_search(row, torch.ones_like(row))
        with torch.no_grad():
            torch.testing.assert_close(model.log_likelihood(row, torch.ones_like(row), found.rollouts),
                                       found.log_likelihood)


def test_recurrent_blocks_are_refused():
    lm = MambaForCausalLM(MambaConfig(vocab_size=41, hidden_size=16, num_hidden_layers=2, state_size=4))
    model, ids = DLRModel(lm, num_codes=C, chunk_size=K), torch.arange(3, 9)[None]
    for search in model.beam_search, model.exact_search:
        with pytest.raises(ValueError, match="recurrent"):
            search(ids, torch.ones_like(ids))
