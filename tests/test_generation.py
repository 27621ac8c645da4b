"""Steered generation against a plain hook that recomputes every token; interventions; what people pass to generate."""
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_dlr import FAMILIES, C, V, argmax_route, build, every_family, hooks_of, naive, pad, plain_hook, texts
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

WAYS = {"greedy": dict(do_sample=False, eos_token_id=None),
        "sampling": dict(do_sample=True, num_return_sequences=2, eos_token_id=None),
        "beams": dict(do_sample=False, num_beams=3, num_return_sequences=2)}


@pytest.mark.parametrize("chunk_size", [1, 4])
@every_family
def test_generation_is_that_of_recomputing_every_token(family, chunk_size):
    """`lm.generate` under a plain hook, which sees the whole text at each step, against cached and uncached steering
    of a batch padded on the left; and the codes that are read back."""
    model = build(family, chunk_size=chunk_size)
    rows = texts()
    ids, mask = pad(rows, "left")
    for way, settings in WAYS.items():
        settings = dict(max_new_tokens=7, pad_token_id=0, **settings)

        def said(generate, **more):
            torch.manual_seed(5)
            return generate(input_ids=ids, attention_mask=mask, **settings, **more)

        with plain_hook(family, model, route=argmax_route(model), pads=(1 - mask).sum(1)) as used:
            expected = said(model.lm.generate, use_cache=False)
        assert not torch.equal(expected, said(model.lm.generate)), way  # the codes do something
        for cached in (True, False):
            assert torch.equal(said(model.generate, use_cache=cached), expected), (way, cached)
            if way == "beams":
                assert model.last_codes is None
            else:
                assert [[c for c in row if c >= 0] for row in model.last_codes.tolist()] == used


def test_a_row_that_has_ended_shortens_no_other():
    model = build("llama", chunk_size=2)
    ids, mask = pad(texts(), "left")
    settings = dict(max_new_tokens=12, pad_token_id=0, do_sample=False)
    free = model.generate(ids, mask, eos_token_id=None, **settings)[:, ids.shape[1]:].tolist()
    end = free[0][3]
    out = model.generate(ids, mask, eos_token_id=end, **settings)[:, ids.shape[1]:].tolist()
    stops = [row.index(end) + 1 if end in row else 12 for row in free]
    assert out == [row[:stop] + (12 - stop) * [0] for row, stop in zip(free, stops)] and min(stops) < max(stops) == 12


def test_static_cache_equals_dynamic():
    model = build("llama")
    ids, mask = pad(texts(), "left")
    settings = dict(max_new_tokens=9, do_sample=False, eos_token_id=None)
    expected = model.generate(ids, mask, **settings)
    codes = model.last_codes
    assert torch.equal(model.generate(ids, mask, cache_implementation="static", **settings), expected)
    assert torch.equal(model.last_codes, codes)


class Listener(BaseStreamer):
    def __init__(self):
        self.heard, self.ended = [], False

    def put(self, value):
        self.heard += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_generate_takes_what_people_pass(caplog):
    """A streamer, arguments or a config, an output with more in it; and transformers has nothing to complain of."""
    model, ids = build("gpt2"), texts()[0][None]
    settings = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    logging.Logger.warning_once.cache_clear()  # what it has said once, it would not say again
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            listener, config = Listener(), GenerationConfig(**settings)
            expected = model.generate(ids, **settings)
            assert torch.equal(model.generate(ids, streamer=listener, **settings), expected)
            assert listener.heard == expected[0].tolist() and listener.ended
            assert torch.equal(model.generate(ids, generation_config=config), expected)
            assert not config.return_dict_in_generate  # the caller's own is left alone
            more = GenerationConfig(**settings, return_dict_in_generate=True, output_scores=True)
            for output in (model.generate(ids, generation_config=more),
                           model.generate(ids, **settings, return_dict_in_generate=True, output_scores=True)):
                assert torch.equal(output.sequences, expected) and len(output.scores) == 6
                steered = model(expected).logits[0, -7:-1]
                torch.testing.assert_close(torch.cat(output.scores), steered, atol=2e-4, rtol=1e-4)
            assert torch.equal(model.generate(ids, generation_config=config, return_dict_in_generate=True).sequences,
                               expected)
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert not caplog.records


def test_generation_goes_on_from_a_steered_cache_and_from_no_other():
    model = build("llama")
    ids, mask = pad(texts(), "left")
    settings = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
    whole = model.generate(ids, mask, max_new_tokens=9, **settings)
    half = model.generate(ids, mask, max_new_tokens=4, return_dict_in_generate=True, **settings)
    name = "cache" if "cache" in half else "past_key_values"
    mask_of_half = F.pad(mask, (0, 4), value=1)
    assert torch.equal(model.generate(half.sequences, mask_of_half, max_new_tokens=5, **{name: half[name]}, **settings),
                       whole)
    half[name].crop(-2)
    for shortened_or_plain in half[name], model.lm(ids, use_cache=True)[name]:
        with pytest.raises(ValueError, match="without steering, or shortened"):
            model.generate(half.sequences, mask_of_half, max_new_tokens=2, **{name: shortened_or_plain}, **settings)
    with pytest.raises(ValueError, match="on the left"):
        model.generate(*pad(texts(), "right"), max_new_tokens=2)
    assert not hooks_of(model)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_interventions_hold_in_forward_and_generation(family):
    model = build(family)
    rows = texts()
    ids, mask = pad(rows, "left")
    settings = dict(max_new_tokens=7, do_sample=False, eos_token_id=None)
    with model.intervene("off"):
        off, off_text = model(ids, mask).logits, model.generate(ids, mask, **settings)
        assert (model.last_codes == -1).all()
    with model.intervene(lambda codes: (codes + 1) % C):
        moved, moved_text = model(ids, mask).logits, model.generate(ids, mask, **settings)
    plain = model.lm.generate(ids, attention_mask=mask, pad_token_id=0, **settings)
    assert torch.equal(off_text, plain)
    route = argmax_route(model)
    for b, row in enumerate(rows):
        torch.testing.assert_close(off[b][mask[b].bool()], model.lm(row[None]).logits[0], atol=2e-4, rtol=1e-4)
        expected, _ = naive(family, model, row, route=lambda h: (route(h) + 1) % C)
        torch.testing.assert_close(moved[b][mask[b].bool()], expected, atol=2e-4, rtol=1e-4)
    with plain_hook(family, model, route=lambda h: (route(h) + 1) % C, pads=(1 - mask).sum(1)):
        expected = model.lm.generate(ids, attention_mask=mask, pad_token_id=0, use_cache=False, **settings)
    assert torch.equal(moved_text, expected)


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


@torch.no_grad()
def test_an_intervention_sees_the_grid_and_is_undone():
    model = build("llama")
    ids = texts(lengths=[8])[0][None]
    grids = []
    with pytest.raises(RuntimeError, match="stop"):
        with model.intervene(lambda codes: grids.append(codes.clone()) or codes):
            model.generate(ids, max_new_tokens=4, eos_token_id=None)
            raise RuntimeError("stop")
    assert [g.shape[1] for g in grids] == [3, 3, 4, 4][: len(grids)] and (grids[0] >= 0).all()
    before, plain = model(ids).logits, model.lm(ids).logits
    with model.intervene("off"):
        with model.intervene("random"):
            pass
        assert torch.allclose(model(ids).logits, plain, atol=1e-4)
        with model.intervene(None):
            assert torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, before)
    with pytest.raises(ValueError, match="off"):
        with model.intervene("of"):
            pass
    with model.intervene(lambda codes: codes * 0):
        assert torch.allclose(model(ids, codes=torch.full((1, 3), -1)).logits, plain, atol=1e-4)
