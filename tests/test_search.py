"""beam_search and exact_search against brute force and against searches without a cache, one text at a time; and
response_search against the plain one."""
from functools import cache, partial
from itertools import product
from math import ceil

import pytest
import torch
from test_dlr import FAMILIES, build, labels_of, pad, texts, without_dropout
from transformers import GPT2Config, GPT2LMHeadModel, OpenAIGPTConfig, OpenAIGPTLMHeadModel

import dlr
import search
from dlr import DLRModel
from search import beam_search, exact_search, response_search

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
    """-> ids, attention mask, labels, each (B, 13)."""
    ids, mask = pad(texts(lengths=lengths), side, width=13)
    return ids, mask, labels_of(ids, mask.bool() & (mask.cumsum(1) > first))


def trunk_and_labels(model, *args, **kwargs):
    ids, mask, labels = batch(*args, **kwargs)
    return model.trunk(ids, mask), labels


@torch.no_grad()
def alone(model, row, codes, first=FIRST, stop=None):
    """log p of a text's tokens from `first` to `stop`, without batch, padding or cache."""
    counted = torch.zeros(1, len(row), dtype=torch.bool)
    counted[:, first:stop] = True
    codes = torch.tensor([list(codes) + [-1] * (ceil(len(row) / K) - len(codes))])
    return model.log_likelihood(model.trunk(row[None]), labels_of(row[None], counted), codes).item()


@cache
def brute_force(family):
    """For each text, log p of each of its code sequences."""
    model = small(family)
    return [{codes: alone(model, row, codes) for codes in product(range(C), repeat=chunks)}
            for row, chunks in zip(texts(lengths=LENGTHS), CHUNKS)]


def test_the_exact_search_and_a_full_beam_find_the_optimum(family, side):
    model = small(family)
    trunk, labels = trunk_and_labels(model, side)
    exact, beam = exact_search(model, trunk, labels), beam_search(model, trunk, labels, C ** 4)
    assert exact.codes.shape == (3, 4) and exact.log_likelihood.shape == (3, 1) and exact.rollouts.shape == (3, 1, 4)
    assert beam.log_likelihood.shape == (3, C ** 4) and beam.rollouts.shape == (3, C ** 4, 4)
    assert torch.equal(exact.codes, beam.codes) and torch.equal(exact.codes, exact.rollouts[:, 0])
    torch.testing.assert_close(exact.logits, model.route(trunk))
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
    trunk, labels = trunk_and_labels(model, side)
    found = beam_search(model, trunk, labels, width)
    with torch.no_grad():
        expected = model.log_likelihood(trunk, labels, found.rollouts)
    assert found.rollouts.shape == (3, width, 4)
    torch.testing.assert_close(found.log_likelihood, expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(found.codes, found.rollouts[:, 0])
    assert found.log_likelihood[:, 0].equal(found.log_likelihood.max(1).values)
    exists = torch.arange(4) < torch.tensor(CHUNKS)[:, None]
    assert torch.equal(found.rollouts >= 0, exists[:, None].expand(-1, width, -1))


@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_beam_equals_one_that_recomputes_everything(family, width):
    model = small(family)
    found = beam_search(model, *trunk_and_labels(model, "left"), width)
    for b, row in enumerate(texts(lengths=LENGTHS)):
        router = model.route(model.trunk(row[None]))[0].log_softmax(-1).tolist()
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
    trunk, labels = trunk_and_labels(model, "right")
    best = exact_search(model, trunk, labels).log_likelihood[:, 0]
    drawn = [model.search(trunk, labels, n).log_likelihood.max(1).values for n in (1, 4, 16)]
    beams = [beam_search(model, trunk, labels, w).log_likelihood[:, 0] for w in (1, 3, 9, 27)]
    assert all((scores <= best + 1e-4).all() for scores in drawn + beams)
    assert (drawn[0] < best - 0.1).any()
    torch.testing.assert_close(beams[-1], best)  # C ** 3 prefixes before the last chunk: nothing was dropped


def test_where_nothing_counts_the_router_decides():
    model = small("llama")
    # chunks 0 and 1 count nothing, and of text 1 nothing counts at all
    trunk, labels = trunk_and_labels(model, "left", first=6)
    logits = model.route(trunk)
    found = beam_search(model, trunk, labels, 1)
    assert torch.equal(found.codes[:, 0], logits[:, 0].argmax(-1))
    assert found.codes[1].tolist() == [*logits[1, :2].argmax(-1).tolist(), -1, -1]
    assert found.log_likelihood[1].item() == 0
    exact = exact_search(model, trunk, labels)
    assert torch.equal(exact.codes[1], found.codes[1]) and exact.log_likelihood[1].item() == 0
    nothing = torch.full_like(labels, -100)
    for found in beam_search(model, trunk, nothing, 5), exact_search(model, trunk, nothing):
        exists = found.codes >= 0
        assert torch.equal(found.codes[exists], logits.argmax(-1)[exists]) and exists.sum() == sum(CHUNKS)


def test_exact_search_stops_at_its_budget():
    model = small("llama")
    trunk, labels = trunk_and_labels(model, "right", lengths=[13])
    expanded = exact_search(model, trunk, labels).expanded
    assert CHUNKS[0] < expanded.item() <= sum(C ** m for m in range(5))
    assert exact_search(model, trunk, labels, most=expanded.item()).expanded.equal(expanded)
    for most in (0, 2, expanded.item() - 1):
        with pytest.raises(ValueError, match=f"extended {most} prefixes of text 0"):
            exact_search(model, trunk, labels, most=most)
    with pytest.raises(ValueError, match="width"):
        beam_search(model, trunk, labels, width=0)


@pytest.mark.parametrize("name", ["neox", "llama"])
def test_exact_search_expands_what_is_likelier_than_the_optimum_and_no_more(name):
    model = small(name)
    with torch.no_grad():
        model.lm.get_output_embeddings().weight.mul_(4)  # differences that matter: otherwise it is nearly everything
    row = texts(lengths=[12])[0]
    found = exact_search(model, model.trunk(row[None]), labels_of(row[None], torch.arange(12) >= FIRST))
    prefixes = [p for m in range(4) for p in product(range(C), repeat=m)]
    likelier = [p for p in prefixes if alone(model, row, p, stop=len(p) * K + 1) > found.log_likelihood.item()]
    assert found.expanded.item() == len(likelier) < len(prefixes)


def test_prefixes_share_what_was_computed(family, monkeypatch):
    """Blocks up to the injection layer see each text once, those above the new chunk only, and few rows at a time."""
    model = small(family, layer=1)
    ids, mask, labels = batch("right")
    expected = beam_search(model, model.trunk(ids, mask), labels, 4)
    monkeypatch.setattr(search, "SEARCH_ROWS", 5)
    seen = {i: [] for i in range(4)}  # block: the (rows, tokens) of each of its runs

    def watch(i):
        return lambda block, args, kwargs: seen[i].append((args[0] if args else kwargs["hidden_states"]).shape[:2])

    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(watch(i), with_kwargs=True)
    found = beam_search(model, model.trunk(ids, mask), labels, 4)
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
    trunk, labels = trunk_and_labels(model.eval(), "left")
    expected = beam_search(model, trunk, labels, 4), exact_search(model, trunk, labels)
    getattr(model.train().lm, "activation_checkpointing_enable", model.lm.gradient_checkpointing_enable)()
    found = beam_search(model, trunk, labels, 4), exact_search(model, trunk, labels)
    for a, b in zip(found, expected):
        assert torch.equal(a.rollouts, b.rollouts) and torch.equal(a.log_likelihood, b.log_likelihood)
        assert not a.log_likelihood.requires_grad
    assert model.training and all(part.training for part in lm.modules())


@pytest.mark.parametrize("searches", [response_search, beam_search, exact_search])
def test_an_error_leaves_the_lm_as_it_was(searches):
    model = small("gpt2")
    before = dict(model.lm.named_modules())
    trunk, labels = trunk_and_labels(model, "left")
    hook = model.blocks[2].register_forward_pre_hook(lambda *args: 1 / 0)  # while its stand-ins are in place
    with pytest.raises(ZeroDivisionError):
        searches(model, trunk, labels)
    hook.remove()
    after = dict(model.lm.named_modules())
    assert before.keys() == after.keys() and all(after[name] is part for name, part in before.items())


def test_precision_and_interventions_are_those_of_search():
    model = small("llama")
    trunk, labels = trunk_and_labels(model, "right")
    expected = beam_search(model, trunk, labels, 4)
    exact = exact_search(model, trunk, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = beam_search(model, trunk, labels, 4)
        model.settings.search_dtype = "bfloat16"
        rounded = beam_search(model, trunk, labels, 4)
        coarse = exact_search(model, trunk, labels)
        model.settings.search_dtype = "float32"
    torch.testing.assert_close(kept.log_likelihood, expected.log_likelihood)
    torch.testing.assert_close(coarse.log_likelihood, exact.log_likelihood, atol=0.5, rtol=0)
    assert (rounded.log_likelihood - expected.log_likelihood).abs().max() > 1e-3
    with model.intervene(lambda codes: (codes + 1) % C), torch.no_grad():
        moved = exact_search(model, trunk, labels)
        torch.testing.assert_close(moved.log_likelihood[:, 0], model.log_likelihood(trunk, labels, moved.codes))
    torch.testing.assert_close(moved.log_likelihood, exact.log_likelihood)
    assert not torch.equal(moved.codes, exact.codes)


def test_the_last_position_and_chunks_longer_than_the_text():
    """A text as long as GPT-2's table of positions: its last chunk must not reach beyond."""
    for chunk_size in (30, 100):
        model = build("gpt2", num_codes=C, chunk_size=chunk_size)
        row = texts(lengths=[64])[0][None]
        trunk = model.trunk(row)
        found = exact_search(model, trunk, row)
        with torch.no_grad():
            torch.testing.assert_close(model.log_likelihood(trunk, row, found.rollouts), found.log_likelihood)


def test_recurrent_blocks_are_refused():
    model, ids = build("mamba"), torch.arange(3, 9)[None]
    trunk = model.trunk(ids)
    for searches in response_search, beam_search, exact_search:
        with pytest.raises(ValueError, match="MambaForCausalLM has recurrent .* plain search"):
            searches(model, trunk, ids)
    assert model.search(trunk, ids, rollouts=2).log_likelihood.isfinite().all()


def test_an_lm_that_keeps_nothing_of_what_it_read_is_refused():
    """GPT-1 takes no cache and says nothing: resumed, a text would begin anew with every chunk."""
    lm = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=50, n_embd=16, n_layer=4, n_head=2, n_positions=16))
    model, ids = DLRModel(lm, num_codes=C, chunk_size=K), torch.arange(3, 9)[None]
    trunk = model.trunk(ids)
    for searches in response_search, beam_search, exact_search:
        with pytest.raises(ValueError, match="in pieces .* plain search"):
            searches(model, trunk, ids)


# a response that begins inside a chunk, with a chunk (predicted from the prompt), with the text; and none at all
PROMPTS = {11: 4, 5: 3, 7: 6, 9: 0, 10: 10}


def prompted(side, prompts=PROMPTS):
    """-> ids, attention mask, labels of texts {length: tokens of its prompt}."""
    return batch(side, torch.tensor(list(prompts.values()))[:, None], list(prompts))


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_shared_prompts_score_like_whole_texts(family, side, layer):
    model = small(family, layer)
    for prompts in PROMPTS, {11: 3, 9: 4, 10: 5}, {11: 0, 4: 1}, {6: 6, 9: 9}:  # any; heads alike; no head; no tail
        ids, mask, labels = prompted(side, prompts)
        trunk = model.trunk(ids, mask)
        searched = torch.tensor([[first // K <= m < ceil(length / K) and first < length
                                  for m in range(ceil(max(prompts) / K))] for length, first in prompts.items()])
        torch.manual_seed(0)
        found = response_search(model, trunk, labels, 5, 20.0)
        torch.manual_seed(0)
        drawn = model.search(trunk, labels, 5, 20.0).rollouts
        assert torch.equal(found.searched, searched)
        given = torch.where(searched[:, None], drawn, model.route(trunk).argmax(-1)[:, None])
        assert torch.equal(found.rollouts, given.masked_fill(drawn < 0, -1))
        expected = model.search(trunk, labels, found.rollouts)
        torch.testing.assert_close(found.log_likelihood, expected.log_likelihood, atol=2e-5, rtol=1e-6)
        assert found.codes.equal(found.rollouts[range(len(ids)), found.log_likelihood.argmax(1)])
        again = response_search(model, trunk, labels, drawn)
        assert torch.equal(again.rollouts, found.rollouts) and torch.equal(again.log_likelihood, found.log_likelihood)
        assert (found.log_likelihood[~searched.any(1)] == 0).all()
        if searched.any():
            assert (found.log_likelihood.amax(1) - found.log_likelihood.amin(1)).max() > 0.1  # the codes do something
            with model.intervene(lambda codes: (codes + torch.arange(codes.shape[1])) % C):
                moved = response_search(model, trunk, labels, drawn).log_likelihood
                expected = model.search(trunk, labels, found.rollouts).log_likelihood
            torch.testing.assert_close(moved, expected, atol=2e-5, rtol=1e-6)


@pytest.mark.parametrize("prompts", [{13: 6, 11: 7, 12: 8}, {13: 9, 11: 7, 12: 4}, {13: 12, 6: 6}])
def test_a_shared_prompt_runs_once(family, prompts):
    """Where prompts have as many chunks, where not, and beside a text that is all prompt."""
    model, tokens, told = small(family, layer=1), [], []
    ids, mask, labels = prompted("right", prompts)
    search.check_resumable(model)  # tries the LM once: not to be counted
    model.blocks[3].register_forward_hook(lambda block, args, output: tokens.append(tuple(output.shape[:2])))
    model.backbone.register_forward_pre_hook(lambda m, args, kwargs: told.append("attention_mask" in kwargs),
                                             with_kwargs=True)
    response_search(model, model.trunk(ids, mask), labels, 4)
    heads = [first // K * K for first in prompts.values()]
    tail = max(length - head for length, head in zip(prompts, heads))
    assert tokens == [(len(ids), max(heads)), (4 * len(ids), tail)]
    assert told == [False] + 2 * [len(set(heads)) > 1]  # the trunk; then a mask only where the heads are padded


def test_shared_prompts_reach_no_further_than_the_table_of_positions():
    """Side by side, a long prompt and a long response take more columns than GPT-2 has positions."""
    model = build("gpt2", num_codes=C, chunk_size=K)
    ids = torch.stack(texts(lengths=[64, 64]))
    trunk, labels = model.trunk(ids), labels_of(ids, torch.arange(64) >= torch.tensor([[60], [0]]))
    found = response_search(model, trunk, labels, 3, 20.0)
    expected = model.search(trunk, labels, found.rollouts)
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood, atol=1e-4, rtol=1e-6)


def test_shared_prompts_keep_precision_dropout_and_mode():
    model = build("gpt2", num_codes=C)
    ids, mask, labels = prompted("left")
    trunk = model.trunk(ids, mask)
    drawn = model.search(trunk, labels, 4, 20.0).rollouts
    expected = response_search(model, trunk, labels, drawn).log_likelihood
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = response_search(model.train(), trunk, labels, drawn).log_likelihood
        model.settings.search_dtype = "bfloat16"
        rounded = response_search(model, trunk, labels, drawn).log_likelihood
    torch.testing.assert_close(kept, expected)
    assert 1e-3 < (rounded - expected).abs().max() < 1 and model.training and model.lm.transformer.drop.training


@pytest.mark.parametrize("searches", [response_search, beam_search, exact_search])
def test_a_model_trains_with_another_search(searches):
    model = without_dropout(build("gpt2", num_codes=C)).train()
    model.search = partial(searches, model)
    ids, mask, labels = batch("right")
    out = model(ids, mask, labels=labels)
    taught = out.found.codes
    if searches is response_search:
        taught = taught.masked_fill(~out.found.searched, -1)
    log_p = model.route(out.trunk).log_softmax(-1).gather(-1, taught.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(out.policy, -log_p[taught >= 0].mean())  # the router is taught what was searched alone
    steered = -model.log_likelihood(out.trunk, labels, out.found.codes).sum() / (labels >= 0).sum()
    torch.testing.assert_close(out.steered, steered)
    out.loss.backward()
    assert model.codebook.grad.abs().sum() > 0


def test_no_slice_of_the_head_is_a_short_remainder(monkeypatch):
    monkeypatch.setattr(dlr, "HEAD_ROWS", 64)
    model, rows = small("llama"), []
    model.lm.lm_head.register_forward_hook(lambda m, args, output: rows.append(args[0].shape[1]))
    ids = texts(lengths=[8])[0][None]
    trunk = model.trunk(ids)
    for rollouts in (1, 9, 19, 37):  # 7, 63, 133 and 259 rows; the last not as 4 * 64 + 3
        model.search(trunk, ids, rollouts)
    assert rows == [7, 63, 64, 64, 5, 64, 64, 64, 67]
