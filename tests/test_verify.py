"""DLRModel.verify and the guards in each step: LMs that dlr.py cannot steer exactly are refused, and never answer."""
import functools
import inspect
import random

import pytest
import torch
import transformers
from test_dlr import FAMILIES, OTHERS, build, every_family, hooks_of, pad, texts
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from dlr import DLRModel

BACKBONE, WHOLE = LlamaModel.forward, LlamaForCausalLM.forward
CACHE = "cache" if "cache" in inspect.signature(BACKBONE).parameters else "past_key_values"


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_is_steered_exactly(family, dtype):
    torch.manual_seed(0)
    model = DLRModel({**FAMILIES, **OTHERS}[family]().to(dtype))  # wrapping verifies
    assert model.verify() is model and model.dtype == dtype


@pytest.mark.parametrize("family, settings", [("gpt2", dict(layer=0)), ("gemma3", dict(layer=3, router_norm="rms")),
                                              ("llama", dict(num_codes=1, chunk_size=1)), ("mamba", dict(layer=0))])
def test_every_setting_is_steered_exactly(family, settings):
    assert build(family, **settings).verify()


def everything(model):
    """Whatever a check could leave behind, as one comparable value."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return ([(name, t.tolist(), t.requires_grad, t.grad) for name, t in tensors.items()],
            [(name, id(part), part.training) for name, part in model.named_modules()], hooks_of(model),
            vars(model.settings).copy(), model.last_codes, model._intervention, model.lm.generation_config.to_dict(),
            torch.get_rng_state().tolist(), random.getstate(), torch.is_grad_enabled(), model.lm.config.to_dict())


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "mamba"])
def test_a_check_leaves_no_trace(family):
    """Not even where the LM's own settings say to sample, or dropout is on, or a code is exchanged for another."""
    model = build(family).train()
    model.lm.generation_config.do_sample, model.lm.generation_config.num_beams = True, 3
    blocks = model.blocks
    blocks[1].eval()
    blocks[0].requires_grad_(False)
    model.last_codes = 5
    with model.intervene(lambda codes: codes * 0):
        before = everything(model)
        model.verify()
        assert everything(model) == before


def doctored(forward):
    """A wrapper of the LM's backbone, with the signature of what it wraps."""
    return functools.wraps(BACKBONE)(forward)


@doctored
def skipping(self, *args, **kwargs):
    """The last block sees the output of block 0 again."""
    first = []
    hooks = [self.layers[0].register_forward_hook(lambda block, args, output: first.append(output)),
             self.layers[-1].register_forward_pre_hook(lambda block, args: (args[0] + first[0], *args[1:]))]
    try:
        return BACKBONE(self, *args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()


@doctored
def looping(self, input_ids=None, **kwargs):
    """All blocks run a second time, over their own output."""
    once = BACKBONE(self, input_ids, use_cache=False).last_hidden_state
    return BACKBONE(self, inputs_embeds=once, use_cache=False)


@doctored
def unmasked(self, input_ids=None, **kwargs):
    """What is told of padding has no effect."""
    return BACKBONE(self, input_ids, **{**kwargs, "attention_mask": None, "position_ids": None})


@doctored
def rotary_first(self, input_ids=None, **kwargs):
    """The blocks' first argument is not h."""
    hidden = self.embed_tokens(input_ids)
    rotary = self.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
    for layer in self.layers:
        hidden = layer(rotary, hidden)
    return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


class Reordered(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, position_embeddings, hidden_states):
        return self.block(hidden_states, position_embeddings=position_embeddings)


class Box:
    """Holds a cache, and is none."""

    def __init__(self, cache):
        self.cache = cache


@functools.wraps(WHOLE)
def boxing(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, **kwargs):
    """The LM hands its backbone the cache under another name, and in a box; nor does the backbone return it."""
    output = self.model(input_ids, attention_mask, position_ids, memory=Box(kwargs.get(CACHE)))
    return CausalLMOutputWithPast(logits=self.lm_head(output.last_hidden_state), **{CACHE: kwargs.get(CACHE)})


def unboxing(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, memory=Box(None)):
    """The backbone of such an LM."""
    more = {CACHE: memory.cache, "use_cache": memory.cache is not None}
    output = BACKBONE(self, input_ids, attention_mask=attention_mask, position_ids=position_ids, **more)
    return BaseModelOutputWithPast(last_hidden_state=output.last_hidden_state)


def lose_the_cache(monkeypatch):
    monkeypatch.setattr(LlamaModel, "forward", unboxing)
    monkeypatch.setattr(LlamaForCausalLM, "forward", boxing)


def put(forward):
    return lambda monkeypatch: monkeypatch.setattr(LlamaModel, "forward", forward)


DOCTORED = {"a cache in a box": (lose_the_cache, "without the cache"),
            "a skip connection": (put(skipping), "logits without codes differ"),
            "a loop": (put(looping), "should run once"),
            "no padding": (put(unmasked), "differ from those of a plain hook"),
            "another first argument": (put(rotary_first), "cannot be steered: AttributeError: ")}


@pytest.mark.parametrize("what", DOCTORED)
def test_a_doctored_lm_is_refused_when_it_is_wrapped_and_found_out_later(what, monkeypatch):
    doctor, reason = DOCTORED[what]
    lm, model = FAMILIES["llama"](), build("llama", layer=2)
    plain = FAMILIES["llama"]()
    doctor(monkeypatch)
    for one in (lm, model.lm, plain):
        if what == "another first argument":
            one.model.layers = nn.ModuleList(map(Reordered, one.model.layers))
    assert lm(torch.arange(3, 9)[None], use_cache=False).logits.isfinite().all()  # it works, but not as we need it
    for check in (lambda: DLRModel(lm, num_codes=5), model.verify):
        with pytest.raises(ValueError, match=reason) as error:
            check()
        sentence = str(error.value)
        assert sentence.startswith(f"LlamaForCausalLM (transformers {transformers.__version__}) ")
        assert "\n" not in sentence
    assert not hooks_of(model) and isinstance(lm.model.layers[0], type(plain.model.layers[0]))


@pytest.mark.parametrize("settings", [dict(do_sample=False), dict(do_sample=True), dict(num_beams=2)])
def test_generation_without_the_cache_of_what_came_before_does_not_answer(settings, monkeypatch):
    model, (ids, mask) = build("llama"), pad(texts(), "left")
    lose_the_cache(monkeypatch)
    assert model.lm.generate(ids, attention_mask=mask, max_new_tokens=4, pad_token_id=0, **settings).shape[1] > 11
    for new in (2, 4):
        with pytest.raises(RuntimeError, match="LlamaForCausalLM .* decodes 1 tokens without the cache"):
            model.generate(ids, mask, max_new_tokens=new, pad_token_id=0, **settings)
    assert not hooks_of(model) and model.last_codes is None


def test_a_block_that_nobody_calls_raises():
    model, ids = build("llama"), texts()[0][None]
    model.lm.config.num_hidden_layers = 3  # the last block is left out
    with pytest.raises(RuntimeError, match="never called .* 3"):
        model(ids)
    model.lm.config.num_hidden_layers = 2  # and the one that is to be steered
    with pytest.raises(RuntimeError, match="never called"):
        model(ids)
    for cached in True, False:
        with pytest.raises(RuntimeError, match="LlamaForCausalLM .* left out block 2"):
            model.generate(ids, max_new_tokens=2, use_cache=cached)
    with pytest.raises(ValueError, match="LlamaForCausalLM .* cannot be steered: RuntimeError"):
        model.verify()
    assert not hooks_of(model)
