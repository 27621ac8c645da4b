"""Dynamic Latent Routing: teach a language model to steer itself with a few discrete codes.

A text is cut into M chunks of K tokens; m(t) is the chunk of token t. A router looks at the hidden state h of each
chunk's *first* token, at the output of one block (the injection layer), and picks one of C codes for that chunk. The
code's vector is added to the residual stream at all tokens of the chunk, and the blocks above see the steered state:

    (1) steer    h_t  <-  h_t + alpha * e[a_m(t)]                               e: codebook (C, H), zero at first
    (2) route    z_m  =   W sg(h_mK+1)                                          W: router (C, H), sg: stop-gradient
    (3) search   a^1 .. a^N  ~  softmax(z / tau) in every chunk,   a* = argmax_i log p(x | a^i)
    (4) update   L = - log p(x)                          (4a) generalist: the unsteered LM, with its own gradient
                     - log [p(x | a*) / sg(p(x))]        (4b) steered: the denominator is a constant
                     - alpha_policy * log p(a* | x)      (4c) policy: the router imitates the winner
                     + alpha_reg * KL(bigram || prior)   (4d) prior: codes are used like words, a few often, none twice
    (5) at inference every chunk takes the argmax of its z, in the prompt and in what is generated.

Source: "Dynamic Latent Routing", F. Yu, X. Su, A. Abdullah, arXiv 2605.14323 (2026); the numbers are this file's own.
Where the paper leaves room, this file chooses:
  1. Chunks count real tokens, so left padding does not move the grid; the last, partial chunk is steered as well.
  2. Log-likelihoods run over response tokens; (4a, 4b) are means over them, (4c) is a mean over all chunks.
  3. (4d) has a closed-form prior, Zipfian by the rank of each code's running usage, instead of a Sinkhorn scaling.
  4. Steering needs h only at the injection layer, which no code has touched yet. So the blocks up to it (the trunk)
     run once for the router, for all N rollouts and for both terms of (4); only the blocks above run once per rollout.

Beyond the paper, and off unless asked for: the router can learn from all rollouts (`rloo_term`), or without a search,
through a mixture of codes (method "soft"); alpha can count in units of h (`calibrate`), and the router read h / rms(h).

Needs torch and transformers >= 5 alone: copy this file where you like.

    model = DLRModel(AutoModelForCausalLM.from_pretrained("gpt2"), num_codes=32, chunk_size=4)
    model.train()(input_ids, attention_mask, labels).loss.backward()        # (3) and (4); -100 in labels: not counted
    model.eval()(input_ids, attention_mask, labels).loss                    # NLL under the router's codes
    model.generate(input_ids, max_new_tokens=20)                            # (5)

What it needs of transformers beyond its documented interface (`verify` holds every LM to it, once, when it is wrapped):

    the blocks are the shallowest ModuleList with one entry a layer; what owns it is the backbone          find_blocks
    a block's first argument is h, and so is what it returns, alone or first in a tuple                    _with
    nothing passes from block to block but h, so that blocks can be left out of a forward                  standing_in
    a module asks the blocks it runs for no more than attributes, in whose place another may stand         StandIn
    the LM is its backbone and a head on `last_hidden_state`, token by token                               _head
    `generate` hands one Cache from forward to forward, and calls its reorder_cache where beams change     _carry
"""
import copy
import inspect
import json
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Cache, GenerationConfig
from transformers.utils import ModelOutput, cached_file

HEAD_ROWS = 256  # tokens whose logits are built at once: (256, V) instead of (B * R, T, V)


@dataclass
class Settings:
    """The settings of the method, saved with the model. Raises ValueError for one that is out of range."""

    num_codes: int = 32  # C; 1 = one static vector
    chunk_size: int = 4  # K, tokens
    layer: int | None = None  # the block, from 0, whose output is steered; None = the middle one
    scale: float = 0.1  # alpha
    router_norm: str = "none"  # what the router reads: h itself, or "rms", h / rms(h)
    method: str = "dlr"  # or "soft": no search, (4b) under the mixture of codes that the router makes
    rollouts: int = 8  # N; 1 = no search
    temperature: float = 1.0  # tau; 0 draws the argmax
    search_dtype: str = "float32"  # early rollouts differ by hundredths of a nat, which bfloat16 rounds away
    policy: str = "imitate"  # what teaches the router: the winner, or "rloo", all rollouts by their scores
    update_on: str = "best"  # the codes of (4b): the winner, the router's "argmax", or its first draw, "sample"
    generalist: bool = True  # False leaves (4a) out
    alpha_policy: float = 0.5
    alpha_reg: float = 0.1

    def __post_init__(self):
        choices = dict(router_norm=("none", "rms"), method=("dlr", "soft"), policy=("imitate", "rloo"),
                       update_on=("best", "argmax", "sample"), search_dtype=("float32", "bfloat16"))
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it should be one of {', '.join(known)}.")
        for name, least in dict(num_codes=1, chunk_size=1, rollouts=1, temperature=0, scale=0, alpha_policy=0,
                                alpha_reg=0).items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")


@dataclass
class SearchResult(ModelOutput):
    """What a search found: `codes` (B, M) of the winner, `log_likelihood` (B, R) of every rollout in nats,
    `rollouts` (B, R, M) the code sequences tried, `logits` (B, M, C) of the router that drew them, `searched` (B, M)
    whose codes there was a choice of (None: all); of `exact_search` also `expanded` (B,), the prefixes it extended."""

    codes: torch.Tensor | None = None
    log_likelihood: torch.Tensor | None = None
    rollouts: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    searched: torch.Tensor | None = None
    expanded: torch.Tensor | None = None


@dataclass
class Trunk:
    """The output of the blocks up to the injection layer, and the chunk grid of the batch it was computed for."""

    input_ids: torch.Tensor  # (B, T)
    padding: dict  # what the LM has to be told about padding: nothing, or its mask and position ids
    hidden: torch.Tensor  # (B, T, H), unsteered
    form: tuple | None  # what a block returns: a tuple of as many things, h in front; None: h alone
    chunk: torch.Tensor  # (B, T) chunk of each token, -1 at padding
    first: torch.Tensor  # (B, M) index of each chunk's first token
    real: torch.Tensor  # (B, M) False where a short text has no such chunk


@dataclass
class Output(ModelOutput):
    """`loss`, a scalar: in training equation (4), and then its terms, unweighted, what the search found and the trunk;
    else the NLL per response token, and `logits`, (B, T, V) or (B, R, T, V). (The constant sg(log p(x)) of (4b) is left
    out: it moves the value, not the gradient.)"""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    generalist: torch.Tensor | None = None
    steered: torch.Tensor | None = None
    policy: torch.Tensor | None = None
    prior: torch.Tensor | None = None
    found: SearchResult | None = None
    trunk: Trunk | None = None


def policy_term(logits, codes, real):
    """(4c): cross-entropy of the router's logits (B, M, C) with codes (B, M), a mean over the real chunks (B, M).

    Codes of -1 are not taught."""
    real = real & (codes >= 0)
    nll = F.cross_entropy(logits.flatten(0, 1), codes.clamp(min=0).flatten(), reduction="none")  # (B * M,)
    return (nll * real.flatten()).sum() / real.sum().clamp(min=1)


def rloo_term(logits, rollouts, log_likelihood, real, tokens):
    """In place of (4c): the router learns from all rollouts, each in proportion to how it did against the others.

        - 1/tokens sum_b 1/N sum_i (l_bi - mean_j!=i l_bj) log p(a^bi | x_b),      l = log p(x | a), a constant

    The gradient is an unbiased estimate of that of the loss per token which the router's own draws (tau = 1) would
    meet, so nothing is learned that only a look at the answer could tell. "RLOO", leave-one-out REINFORCE: W. Kool et
    al., "Buy 4 REINFORCE Samples, Get a Baseline for Free!", 2019. logits (B, M, C), rollouts (B, N, M), log_likelihood
    (B, N), real (B, M), tokens: the response tokens of the batch -> scalar; zero for a single rollout."""
    number = rollouts.shape[1]
    if number == 1:
        return logits.sum() * 0
    advantage = (log_likelihood - log_likelihood.mean(1, keepdim=True)) * number / (number - 1)  # (B, N)
    log_p = logits.log_softmax(-1)[:, None].expand(-1, number, -1, -1).gather(-1, rollouts.clamp(min=0)[..., None])
    log_p = (log_p[..., 0] * real[:, None]).sum(-1)  # (B, N)
    return -(advantage.detach() * log_p).sum() / number / tokens.clamp(min=1)


def bigram_average(before, logits, real):
    """(4d): 0.8 `before` + 0.2 times the mean of p_m(i) p_m+1(j) over consecutive real chunks of a text -> (C, C).

    before (C, C), logits (B, M, C), real (B, M); where no text has two chunks, the average stays what it was."""
    p, pairs = logits.softmax(-1), real[:, 1:].sum()
    left, right = p[:, :-1] * real[:, 1:, None], p[:, 1:]  # a real chunk's left neighbour is real
    mean = torch.einsum("bmi,bmj->ij", left, right) / pairs.clamp(min=1)
    return torch.where(pairs > 0, 0.8 * before + 0.2 * mean, before)


def zipf_prior(usage, epsilon=1e-3):
    """(4d): the prior over code bigrams (C, C): z_i z_j off the diagonal, `epsilon` of all mass on the diagonal.

    z is Zipfian (1 / rank) with codes ranked by `usage` (C,), so that no code is favoured for its index."""
    rank = usage.argsort(descending=True).argsort()
    z = 1 / (rank + 1).to(usage.dtype)
    z = z / z.sum()
    diagonal = torch.eye(len(z), dtype=z.dtype, device=z.device)
    off = torch.outer(z, z) * (1 - diagonal)
    prior = (1 - epsilon) * off / off.sum().clamp(min=1e-12) + epsilon * diagonal / len(z)
    return prior / prior.sum()  # one code alone has nothing off the diagonal


def prior_term(average, prior):
    """(4d): KL(average || prior) in nats, both (C, C); zero exactly where the bigrams are the prior."""
    return (torch.xlogy(average, average) - average * prior.log()).sum()


class DLRModel(nn.Module):
    """A Hugging Face decoder-only LM, a codebook (C, H) and a router Linear(H, C).

    `lm`: any `AutoModelForCausalLM`; `settings`: the fields of `Settings`. Everywhere `attention_mask` (B, T) tells
    padding, left or right (None = no padding); `labels` (B, T) are the token ids to score, -100 = not counted (nor is a
    text's first token: nothing predicts it); `codes` is a LongTensor with -1 for a chunk that is not steered: (B, M),
    one sequence for each text, or (B, R, M), R for each. M = ceil(tokens of the longest text / K).

    Raises ValueError where a setting is out of range, or for an LM that cannot be steered exactly (see `verify`)."""

    loss_type = "ForCausalLM"  # tells transformers' Trainer that labels are shifted here

    def __init__(self, lm, **settings):
        super().__init__()
        settings = Settings(**settings)
        self._blocks_name = find_blocks(lm)
        self._backbone_name = self._blocks_name.rpartition(".")[0]
        blocks = lm.get_submodule(self._blocks_name)
        layer = len(blocks) // 2 if settings.layer is None else settings.layer
        if not 0 <= layer < len(blocks):
            raise ValueError(f"layer is {layer}, but this LM has blocks 0 to {len(blocks) - 1}.")
        self.lm, self.settings = lm, replace(settings, layer=layer)
        if "input_ids" not in inspect.signature(self.backbone.forward).parameters:
            raise ValueError(f"{self._named} has its blocks in {type(self.backbone).__name__}, which takes no token "
                             f"ids: DLR steers decoder-only language models.")
        self.last_codes = None  # (B, M) what the last generate() was steered with
        self._intervention = None
        width, device = lm.config.get_text_config().hidden_size, next(blocks[layer].parameters()).device
        self.codebook = nn.Parameter(torch.zeros(settings.num_codes, width, device=device))
        self.router = nn.Linear(width, settings.num_codes, bias=False, device=device)
        nn.init.normal_(self.router.weight, std=0.01)
        # running average of the bigrams of (4d), from "every bigram alike"
        self.register_buffer("bigram", torch.full((settings.num_codes,) * 2, settings.num_codes**-2.0, device=device))
        self.register_buffer("unit", torch.ones((), device=device))  # of alpha
        self.register_state_dict_post_hook(_leave_out_tied)
        self.register_load_state_dict_pre_hook(_put_in_tied)
        if device.type != "meta":
            self.verify()

    blocks = property(lambda self: self.lm.get_submodule(self._blocks_name))
    backbone = property(lambda self: self.lm.get_submodule(self._backbone_name))
    # what Trainer, the lm-evaluation-harness and others ask a model for
    config = property(lambda self: self.lm.config)
    device = property(lambda self: self.codebook.device)
    dtype = property(lambda self: self.lm.dtype)
    _named = property(lambda self: f"{type(self.lm).__name__} (transformers {transformers.__version__})")
    tie_weights = property(lambda self: self.lm.tie_weights)
    _keys_to_ignore_on_save = property(lambda self: _tied(self))

    def forward(self, input_ids, attention_mask=None, labels=None, codes=None, num_items_in_batch=None, **kwargs):
        """-> `Output`. In training mode, given labels and no codes, its loss is the method: search, select, update.

        Else: logits under `codes` (None = the router's argmax (5); all -1 = unsteered), and their NLL given labels.
        `num_items_in_batch`: the response tokens of the whole batch, where these texts are a part of it: the losses of
        the parts add up to that of the whole (for (4c, 4d), means over chunks, each part's own weighs as its tokens).
        Raises TypeError for arguments that a forward of the whole LM would heed, and this one cannot."""
        unknown = [name for name, value in kwargs.items() if value is not None]
        if set(unknown) - {"use_cache", "return_dict"}:
            raise TypeError(f"DLRModel.forward does not take {', '.join(unknown)}.")
        trunk = self.trunk(input_ids, attention_mask)
        if self.training and labels is not None and codes is None:
            found = None if self.settings.method == "soft" else self.search(trunk, labels)
            return self.loss(trunk, labels, found, num_items_in_batch)
        codes = self.argmax(trunk) if codes is None else codes
        logits, loss = self._above(self.lm, trunk, codes).logits, None  # (B * R, T, V)
        if labels is not None:
            repeats = len(logits) // len(labels)
            targets = targets_of(trunk, labels).repeat_interleave(repeats, 0)
            tokens = (targets >= 0).sum() if num_items_in_batch is None else repeats * num_items_in_batch
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="sum") / tokens
        return Output(loss=loss, logits=logits.view(*codes.shape[:-1], *logits.shape[1:]))

    def trunk(self, input_ids, attention_mask=None):
        """Run the blocks up to the injection layer -> `Trunk`, from which `route`, `search` and `loss` go on."""
        grid, captured = self._grid(input_ids, attention_mask), []
        hook = self.blocks[self.settings.layer].register_forward_hook(lambda block, args, out: captured.append(out))
        above = {str(i): lambda hidden_states, *args, **kwargs: with_hidden(hidden_states, captured[0])
                 for i in range(self.settings.layer + 1, len(self.blocks))}
        try:
            with standing_in(self.blocks, above):
                self.backbone(input_ids=input_ids, use_cache=False, **grid["padding"])
        finally:
            hook.remove()
        shape = (*input_ids.shape, self.codebook.shape[1])
        if [tuple(hidden_of(out).shape) for out in captured] != [shape]:
            raise RuntimeError(f"Block {self.settings.layer} should run once and return one state for each token, not "
                               f"{' and '.join(str(tuple(hidden_of(out).shape)) for out in captured) or 'nothing'}.")
        form = (None,) * len(captured[0]) if isinstance(captured[0], (tuple, list)) else None
        return Trunk(input_ids=input_ids, hidden=hidden_of(captured[0]), form=form, **grid)

    def route(self, trunk):
        """(2) -> router logits (B, M, C); the gradient reaches the router alone."""
        width = trunk.hidden.shape[-1]
        return self._logits(trunk.hidden.detach().gather(1, trunk.first[..., None].expand(-1, -1, width)))

    def argmax(self, trunk):
        """(5): the router's own codes (B, M), -1 where a short text has no chunk."""
        return self.route(trunk).argmax(-1).masked_fill(~trunk.real, -1)

    @torch.no_grad()
    def calibrate(self, input_ids, attention_mask=None):
        """Measure, once, how large h is in this LM; kept in `unit` and saved.

        Afterwards alpha counts in units of h: at alpha = 1, a code vector of entries +-1 is as long as the median h.
        Each text's first token is left out: in many LMs it is an attention sink, a hundred times longer."""
        with _eval_mode(self.lm):
            trunk = self.trunk(input_ids, attention_mask)
        self.unit.copy_(typical_norm(trunk) / trunk.hidden.shape[-1] ** 0.5)

    def log_likelihood(self, trunk, labels, codes=None):
        """log p of the labels -> (B,), or (B, R) for codes (B, R, M), in nats.

        `codes=None` takes the router's argmax (5); codes of floats (B, M, C) are weights: every chunk is steered by a
        mixture of all code vectors."""
        codes = self.argmax(trunk) if codes is None else codes
        output, targets = self._above(self.backbone, trunk, codes), targets_of(trunk, labels)
        scores = self.score(output, targets.repeat_interleave(len(output.last_hidden_state) // len(targets), 0))
        return scores.view(len(targets) if codes.is_floating_point() else codes.shape[:-1])

    @torch.no_grad()
    def search(self, trunk, labels, rollouts=None, temperature=None, generator=None):
        """(3): draw `rollouts` code sequences for each text, score them -> `SearchResult`.

        `rollouts`: how many (None = as in the settings), or the sequences themselves (B, R, M), which are then scored
        as they are. `temperature`: one number, or one for each rollout. Dropout is off. To train with another search,
        assign a function of (trunk, labels) to `model.search` (see search.py)."""
        with self.searching():
            logits = self.route(trunk)
            if not torch.is_tensor(rollouts):
                rollouts = self.draw(logits, rollouts, temperature, generator)
            rollouts = rollouts.masked_fill(~trunk.real[:, None], -1)  # (B, R, M)
            return select(rollouts, self.log_likelihood(trunk, labels, rollouts), logits)

    @contextmanager
    def searching(self, dtype=None):
        """Inside: dropout off, and the precision `dtype` (None: `search_dtype`) whatever autocast there is around."""
        dtype = dtype or getattr(torch, self.settings.search_dtype)
        low = None if dtype == torch.float32 else dtype
        with _eval_mode(self.lm), torch.autocast(self.device.type, low, enabled=low is not None):
            yield

    def loss(self, trunk, labels, found=None, num_items_in_batch=None):
        """(4) for what a search found (None: for the router's mixture) -> `Output`, as `forward` in training mode.

        In training mode the running average of (4d) moves on."""
        settings, logits, targets = self.settings, self.route(trunk), targets_of(trunk, labels)
        own = (targets >= 0).sum()
        tokens = (own if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)).clamp(min=1)
        if found is None:  # the router learns through the mixture that it makes of the code vectors
            codes, policy = logits.softmax(-1), logits.new_zeros(())  # (B, M, C)
        else:
            codes = {"best": found.codes, "argmax": logits.argmax(-1), "sample": found.rollouts[:, 0]}
            codes = codes[settings.update_on].masked_fill(~trunk.real, -1)
            if settings.policy == "rloo":
                policy = rloo_term(logits, found.rollouts, found.log_likelihood, trunk.real, tokens)
            else:  # where the router alone chose, there is nothing to imitate
                taught = found.codes if found.searched is None else found.codes.masked_fill(~found.searched, -1)
                policy = own / tokens * policy_term(logits, taught, trunk.real)
        steered = -self.log_likelihood(trunk, labels, codes).sum() / tokens
        generalist = torch.zeros_like(steered)
        if settings.generalist:
            # with a frozen LM it is a number to look at, and needs no graph
            learning = torch.is_grad_enabled() and any(p.requires_grad for p in self.lm.parameters())
            with torch.set_grad_enabled(learning):
                unsteered = torch.full_like(trunk.first, -1)
                generalist = -self.log_likelihood(trunk, labels, unsteered).sum() / tokens
        average = bigram_average(self.bigram, logits, trunk.real)
        prior = own / tokens * prior_term(average, zipf_prior(average.detach().sum(1)))
        if self.training:
            self.bigram.copy_(average.detach())
        total = generalist + steered + settings.alpha_policy * policy + settings.alpha_reg * prior
        return Output(loss=total, generalist=generalist, steered=steered, policy=policy, prior=prior, found=found,
                      trunk=trunk)

    def generate(self, input_ids, attention_mask=None, **kwargs):
        """(5): `lm.generate` (greedy, sampling, beams; same arguments, same result) with steering and KV cache.

        Batches are padded on the left; every row keeps its own chunk grid across the border from prompt to answer.
        The codes it was steered with are in `last_codes` (rows of the result, M) afterwards (None after beam search);
        text that a finished row was padded with is routed like any other. Raises ValueError for padding on the right,
        and for ways to decode that go back in the text (assisted decoding)."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if not attention_mask[:, -1].all():
            raise ValueError("generate() continues each row at its end: pad prompts on the left.")
        pads = (1 - attention_mask.long()).sum(1)  # (B,)
        given = kwargs.get("generation_config")
        asked_for_dict = kwargs.pop("return_dict_in_generate", getattr(given, "return_dict_in_generate", False))
        if given is None:
            kwargs["return_dict_in_generate"] = True
        else:  # transformers takes a config or arguments, not both
            kwargs["generation_config"] = copy.copy(given)
            kwargs["generation_config"].return_dict_in_generate = True
        with self._steered_decoding(pads) as state:
            output = self.lm.generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        self.last_codes = state["grid"] if getattr(output, "beam_indices", None) is None else None
        return output if asked_for_dict else output.sequences

    @contextmanager
    def intervene(self, intervention):
        """Inside this `with`, every code is replaced before it steers: in forward and generate, prompt and answer.

        "off" steers nothing; "random" draws codes uniformly; a function gets the codes (rows, M) and returns as many;
        None lets them be. While generating, the function sees the grid so far (-1 where nothing is yet), and its answer
        holds for the chunks that begin now. A chunk that is not steered (-1) stays so."""
        known = {"off": lambda codes: torch.full_like(codes, -1), None: None,
                 "random": lambda codes: torch.randint_like(codes, self.settings.num_codes)}
        if not callable(intervention) and intervention not in known:
            raise ValueError(f'intervene() takes "off", "random" or a function of codes, not {intervention!r}.')
        before, self._intervention = self._intervention, known.get(intervention, intervention)
        try:
            yield self
        finally:
            self._intervention = before

    @torch.no_grad()
    def verify(self):
        """Hold this LM to what this file needs of transformers, on twelve random tokens -> self. Leaves no trace.

        Two texts, one of them padded on the left, against a plain hook on the whole LM, each text alone, no padding, no
        cache: logits without and with codes, scores, four generated tokens. Three digits have to agree, in bfloat16
        one. Raises ValueError, one sentence, where something differs."""
        probe, rng = copy.copy(self), torch.Generator().manual_seed(0)  # the same LM, with codes as long as its h
        probe._parameters, probe._buffers = dict(self._parameters), dict(self._buffers)
        probe.settings, probe._intervention = replace(self.settings, chunk_size=2, scale=1.0), None
        probe.codebook = nn.Parameter(torch.randn(self.codebook.shape, generator=rng).to(self.codebook))
        ids = torch.randint(self.config.get_text_config().vocab_size, (2, 6), generator=rng).to(self.device)
        mask = (torch.arange(6) >= torch.tensor([[0], [2]])).long().to(self.device)
        codes = torch.randint(-1, self.settings.num_codes, (2, 2, 3), generator=rng).to(self.device)
        codes = torch.cat([torch.full_like(codes[:, :1], -1), codes], 1)  # (2, 3, 3), the first sequence unsteered
        try:
            with _eval_mode(self):
                trunk = probe.trunk(ids, mask)
                probe.unit = trunk.hidden.abs().median().float()
                checks = probe._restated(trunk, mask, codes)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"{self._named} cannot be steered: {reason.rstrip('.')}.") from error
        tolerance = max(1e-3, torch.finfo(self.dtype).eps ** 0.5)
        for what, got, expected in checks:
            off, near = (got - expected).abs().max(), tolerance * expected.abs().max()
            if not off <= near:
                raise ValueError(f"{self._named} would be steered wrongly: the {what} differ from those of a plain "
                                 f"hook by {off:.2g}, more than rounding ({near:.1g}).")
        return self

    def _restated(self, trunk, mask, codes):
        """What `verify` compares -> [(its name, what this file computes, what a plain hook says)]."""
        def alone(row, codes):  # (T,), (R, M) -> logits (R, T, V), router's logits in each chunk (M, C)
            vectors, states = self.unit * self.codebook[codes] * (codes >= 0)[..., None], []

            def hook(block, args, output):
                h = output[0] if isinstance(output, (tuple, list)) else output
                states.append(h[0])
                h = h + vectors.repeat_interleave(2, 1)[:, : len(row)].to(h)
                return (h, *output[1:]) if isinstance(output, (tuple, list)) else h

            handle = self.blocks[self.settings.layer].register_forward_hook(hook)
            try:
                rows = row.expand(len(codes), -1)
                return self.lm(input_ids=rows, use_cache=False).logits.float(), self._logits(states[0][::2])
            finally:
                handle.remove()

        ids = trunk.input_ids
        logits = self._above(self.lm, trunk, codes).logits.view(2, 3, 6, -1)
        scores = self.log_likelihood(trunk, ids, codes)  # (2, 3)
        greedy = GenerationConfig(max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=1, pad_token_id=0,
                                  output_logits=True, return_dict_in_generate=True)
        said, checks = self.generate(ids, mask, generation_config=greedy), []
        for b, start in enumerate((0, 2)):
            row, used = ids[b, start:], self.last_codes[b]
            expected, _ = alone(row, codes[b])  # (3, T, V)
            log_p = expected[:, :-1].log_softmax(-1).gather(2, row[1:].expand(3, -1)[..., None])
            (generated,), routed = alone(said.sequences[b, start:-1], used[None])
            chosen = routed.gather(1, used[: len(routed), None])[:, 0]  # ties do not matter
            checks += [("logits without codes", logits[b, 0, start:].float(), expected[0]),
                       ("logits under codes", logits[b, 1:, start:].float(), expected[1:]),
                       ("scores of rollouts", scores[b], log_p.sum((1, 2))),
                       ("logits of generated tokens", torch.stack(said.logits)[:, b].float(), generated[-4:]),
                       ("router's choices in generated text", chosen, routed.amax(1))]
        return checks

    def save_pretrained(self, directory):
        """Write an ordinary Hugging Face folder (the LM) plus `dlr.safetensors` and `dlr_config.json`."""
        self.lm.save_pretrained(directory)
        own = {name: t for name, t in self.state_dict().items() if not name.startswith("lm.")}
        save_file({name: t.contiguous().cpu() for name, t in own.items()}, Path(directory, "dlr.safetensors"))
        Path(directory, "dlr_config.json").write_text(json.dumps(asdict(self.settings), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, name, **kwargs):
        """Load what `save_pretrained` wrote, from a folder or the hub; `kwargs` as for `AutoModelForCausalLM`.

        Raises OSError where there is no codebook, ValueError for settings that this version does not know."""
        where = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
        settings, weights = (cached_file(name, file, **where) for file in ("dlr_config.json", "dlr.safetensors"))
        settings = json.loads(Path(settings).read_text())
        if unknown := set(settings) - {field.name for field in fields(Settings)}:
            raise ValueError(f"{name} was saved by another version: it has the settings {', '.join(sorted(unknown))}.")
        model = cls(AutoModelForCausalLM.from_pretrained(name, **kwargs), **settings)
        model.load_state_dict(load_file(weights), strict=False)
        return model.eval()

    def _grid(self, input_ids, attention_mask):
        """The chunk grid of a batch, and what the LM has to be told of its padding."""
        batch, length = input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        lengths, start = mask.sum(1), mask.argmax(1)  # (B,) real tokens, and where they begin
        longest, left_padded = length, False
        if attention_mask is not None:
            longest, left_padded = torch.stack([lengths.max(), start.max()]).tolist()  # one wait for the device
        position = torch.arange(length, device=input_ids.device) - start[:, None]  # (B, T), < 0 before the text
        outside, size = (position < 0) | (position >= lengths[:, None]), self.settings.chunk_size
        begins = torch.arange(-(-longest // size), device=input_ids.device) * size  # (M,)
        return {  # a causal LM never looks at padding on its right: without a mask it runs the faster attention
            "padding": self.padding(mask, position) if left_padded else {},
            "chunk": (position // size).masked_fill(outside, -1),
            "first": (start[:, None] + begins).clamp(max=length - 1),
            "real": begins < lengths[:, None],
        }

    def padding(self, mask, position):
        """What the LM has to be told of padding on the left: mask (n, S) of all tokens, position ids (n, q) of new."""
        takes = "position_ids" in inspect.signature(self.backbone.forward).parameters  # ALiBi models do not
        return {"attention_mask": mask, **({"position_ids": position.clamp(min=0)} if takes else {})}

    def _logits(self, hidden):
        """(2) for states (..., H), in float32 -> (..., C)."""
        hidden = hidden.to(self.router.weight.dtype)
        if self.settings.router_norm == "rms":
            hidden = F.rms_norm(hidden, hidden.shape[-1:])
        return self.router(hidden).float()

    def draw(self, logits, rollouts, temperature, generator):
        """`rollouts` code sequences from router logits (B, M, C) -> (B, R, M)."""
        if rollouts is None:  # one code leaves nothing to search
            rollouts = self.settings.rollouts if self.settings.num_codes > 1 else 1
        tau = self.settings.temperature if temperature is None else temperature
        tau = torch.as_tensor(tau, dtype=torch.float32, device="cpu")
        if rollouts < 1 or tau.min() < 0 or tau.numel() not in (1, rollouts):
            raise ValueError(f"rollouts is {rollouts}, which must be at least 1, and temperature {temperature}, which "
                             f"must be one number >= 0, or one for each rollout.")
        # argmax of z + tau * Gumbel noise is a draw from softmax(z / tau), and the argmax itself at tau = 0
        noise = torch.empty(len(logits), rollouts, *logits.shape[1:], device=logits.device)  # (B, R, M, C)
        noise = -noise.exponential_(generator=generator).log()
        return (logits[:, None] + tau.view(-1, 1, 1).to(noise) * noise).argmax(-1)

    def _above(self, module, trunk, codes):
        """Run `module` (the LM or its backbone) from the steered trunk on; rows of the output: texts times rollouts."""
        mixed = codes.is_floating_point()
        grid = codes if codes.dim() == 3 and not mixed else codes[:, None]  # (B, R, M), or weights (B, 1, M, C)
        chunks = trunk.real.shape[1]
        if grid.shape[0] != len(trunk.hidden) or grid.shape[2] < chunks:
            raise ValueError(f"codes {tuple(codes.shape)} must be (B, M) or (B, R, M) with B = {len(trunk.hidden)} "
                             f"texts and M = {chunks} chunks of {self.settings.chunk_size} tokens.")
        repeats, chunk = grid.shape[1], trunk.chunk[:, None].expand(-1, grid.shape[1], -1)  # (B, R, T)
        if mixed:
            of_chunk = self.settings.scale * self.unit * (codes @ self.codebook)  # (B, M, H)
            place = trunk.chunk.clamp(min=0)[..., None].expand(-1, -1, of_chunk.shape[-1])
            vectors = (of_chunk.gather(1, place) * (trunk.chunk >= 0)[..., None]).to(trunk.hidden.dtype)[:, None]
        else:
            grid = self.intervened(grid.flatten(0, 1)).view(grid.shape)
            vectors = self.vectors(grid.gather(-1, chunk.clamp(min=0)).masked_fill(chunk < 0, -1), trunk.hidden.dtype)
        steered = (trunk.hidden[:, None] + vectors).flatten(0, 1)
        padding = {name: t.repeat_interleave(repeats, 0) for name, t in trunk.padding.items()}
        with self.from_trunk(lambda: steered, trunk):
            # The real ids go in for what the LM derives from them besides embeddings; the trunk's blocks do nothing.
            return module(input_ids=trunk.input_ids.repeat_interleave(repeats, 0), use_cache=False, **padding)

    def from_trunk(self, steered, trunk):
        """A context in which the blocks below the injection do nothing, and the one at it returns `steered()`."""
        below = {str(i): lambda hidden_states, *args, **kwargs: with_hidden(hidden_states, trunk.form)
                 for i in range(self.settings.layer)}
        at = {str(self.settings.layer): lambda *args, **kwargs: with_hidden(steered(), trunk.form)}
        return standing_in(self.blocks, {**below, **at})

    def vectors(self, token_codes, dtype):
        """(1): alpha * e for codes of any shape (...), zero where the code is -1 -> (..., H)."""
        vectors = F.embedding(token_codes.clamp(min=0), self.codebook) * (token_codes >= 0)[..., None]
        return (self.settings.scale * self.unit * vectors).to(dtype)

    def intervened(self, codes):
        """Codes (rows, M) as the intervention changes them, if there is one."""
        if self._intervention is None:
            return codes
        return torch.where(codes >= 0, self._intervention(codes).to(codes), codes)

    def score(self, output, targets):
        """log p of the targets (n, q), -100 = not counted, predicted from the states of `output` -> (n,), in nats."""
        counted = targets >= 0
        states = output.last_hidden_state[:, : counted.shape[1]][counted]  # (tokens that count, H)
        # A product of a few rows is rounded in another way than one of many: a short remainder joins the slice before.
        whole = max(0, -(-(len(states) - HEAD_ROWS // 16) // HEAD_ROWS) - 1)
        sizes = whole * [HEAD_ROWS] + [len(states) - whole * HEAD_ROWS]
        slices = zip(states.split(sizes), targets[counted].split(sizes))
        log_p = [-F.cross_entropy(self._head(rows, output).float(), y, reduction="none") for rows, y in slices]
        return torch.zeros(counted.shape, device=states.device).masked_scatter(counted, torch.cat(log_p)).sum(-1)

    def _head(self, states, output):
        """Final hidden states (n, H) -> logits (n, V): the LM itself, whose backbone just returns `output` with these
        states in it, so that a soft-cap or a logit scale is applied without knowing of it."""
        output = replace(output, last_hidden_state=states[None])
        parent, _, name = self._backbone_name.rpartition(".")
        with standing_in(self.lm.get_submodule(parent), {name: lambda *args, **kwargs: output}):
            return self.lm(input_ids=states.new_zeros(1, len(states), dtype=torch.long), use_cache=False).logits[0]

    @contextmanager
    def _steered_decoding(self, pads):
        """Steer every forward of the LM inside; yields a dict: `grid` holds the codes (B', M) of the texts so far."""
        call, named = {"end": 0, "cached": False}, self._named

        def before(backbone, args, kwargs):
            cache = _cache(args, kwargs)
            call.update(start=getattr(cache, "dlr_end", 0), grid=getattr(cache, "dlr_grid", None), steered=False)
            if cache is not None and _length(cache) != call["start"]:
                raise ValueError("This cache was filled without steering, or shortened since: generate from the text.")

        def steer(block, args, output):
            hidden, start, end = hidden_of(output), call["start"], call["start"] + hidden_of(output).shape[1]
            if start != call["end"] if call["cached"] else end <= call["end"]:
                raise RuntimeError(f"{named} decodes {hidden.shape[1]} tokens without the cache of those before.")
            token_codes, call["grid"] = self._extend(call["grid"], hidden, start, pads)
            call.update(end=end, steered=True)
            return with_hidden(hidden + self.vectors(token_codes, hidden.dtype), output)

        def after(backbone, args, output):
            if not call["steered"]:
                raise RuntimeError(f"{named} left out block {self.settings.layer}, which is to be steered.")
            cache = _cache(output.values(), {})
            call["cached"] = cache is not None
            if call["cached"]:
                _carry(cache, call["grid"], call["end"])

        hooks = [
            self.backbone.register_forward_pre_hook(before, with_kwargs=True),
            self.blocks[self.settings.layer].register_forward_hook(steer),
            self.backbone.register_forward_hook(after),
        ]
        try:
            yield call
        finally:
            for hook in hooks:
                hook.remove()
        if not call["end"]:
            raise RuntimeError(f"{named} generated without its backbone, {type(self.backbone).__name__}.")

    def _extend(self, grid, hidden, start, pads):
        """Route the chunks that begin among q new tokens -> their codes (B', q), and the grid of codes (B', M) so far.

        A chunk begun earlier keeps its code: `grid` is what this returned for the tokens before, or None."""
        rows, new = hidden.shape[:2]
        pads = pads.repeat_interleave(rows // len(pads))  # beams and several samples of a prompt are neighbours
        position = torch.arange(start, start + new, device=hidden.device) - pads[:, None]  # (B', q), < 0 at padding
        chunk = position // self.settings.chunk_size
        width = (start + new - 1) // self.settings.chunk_size + 1
        before = hidden.new_full((rows, width + 1), -1, dtype=torch.long)  # its last column takes what is not kept
        if grid is not None:
            before[:, : grid.shape[1]] = grid
        target = torch.where((position >= 0) & (position % self.settings.chunk_size == 0), chunk, width)
        grid = before.scatter(1, target, self._logits(hidden).argmax(-1))[:, :width]
        begins = torch.zeros_like(before, dtype=torch.bool).scatter(1, target, True)[:, :width]
        grid = torch.where(begins, self.intervened(grid), grid)
        return grid.gather(1, chunk.clamp(min=0)).masked_fill(chunk < 0, -1), grid


def select(rollouts, log_likelihood, logits, searched=None):
    """(3): the likeliest of the rollouts (B, R, M) by their log-likelihoods (B, R) -> `SearchResult`."""
    winner = log_likelihood.argmax(1)[:, None, None].expand(-1, 1, rollouts.shape[-1])
    return SearchResult(rollouts.gather(1, winner)[:, 0], log_likelihood, rollouts, logits, searched)


def typical_norm(trunk):
    """The median |h| over real tokens, without each text's first one, which is often an attention sink. -> scalar"""
    position = torch.arange(trunk.chunk.shape[1], device=trunk.chunk.device)
    later = (trunk.chunk >= 0) & (position > trunk.first[:, :1])
    return trunk.hidden[later].float().norm(dim=-1).median()


def find_blocks(lm):
    """-> the name of the LM's blocks: of its shallowest ModuleList with one entry a layer. Its owner is the backbone.

    Raises ValueError for an encoder-decoder, or where there is no such list."""
    if getattr(lm.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(lm).__name__} is an encoder-decoder; DLR steers decoder-only language models.")
    layers = getattr(lm.config.get_text_config(), "num_hidden_layers", None)
    names = [name for name, part in lm.named_modules() if isinstance(part, nn.ModuleList) and len(part) == layers]
    if not names:
        raise ValueError(f"{type(lm).__name__} has no list of as many blocks as its config has layers ({layers}).")
    return min(names, key=lambda name: name.count("."))


def targets_of(trunk, labels):
    """The label that each position predicts (B, T - 1): -100 where there is none, or no real token before it."""
    real = trunk.chunk >= 0
    return labels[:, 1:].masked_fill(~(real[:, 1:] & real[:, :-1]), -100)


def _tied(model):
    """The names of parameters that are others under a second name, such as an LM's head that is its embedding."""
    once = dict(model.named_parameters())
    return [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in once]


def _leave_out_tied(model, state, prefix, local_metadata):
    """What is one tensor in the model is saved once, as safetensors wants it."""
    for name in _tied(model):
        state.pop(prefix + name, None)


def _put_in_tied(model, state, prefix, *args):
    """... and loaded once: under its second name it is what it is."""
    for name in _tied(model):
        state.setdefault(prefix + name, model.get_parameter(name))


def hidden_of(output):
    """The states (B, T, H) in what a block returns: they alone, or a tuple with them in front."""
    return output[0] if isinstance(output, (tuple, list)) else output


def with_hidden(hidden, output):
    """An output of a block, or one of its form, with these states in it."""
    return (hidden, *output[1:]) if isinstance(output, (tuple, list)) else hidden


class StandIn(nn.Module):
    """Takes the place of a module: runs `function` instead, and has the other attributes of what it stands in for."""

    def __init__(self, module, function):
        super().__init__()
        self.__dict__.update(stood_in_for=module, function=function, ran=False)

    def forward(self, *args, **kwargs):
        """`function`, on whatever the module would get."""
        self.__dict__["ran"] = True
        return self.function(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.__dict__["stood_in_for"], name)


@contextmanager
def standing_in(parent, functions):
    """{name: function}: inside, these children of `parent` are stand-ins, so that neither they nor their hooks run.

    Raises RuntimeError where one was never called: then something else was computed than was meant."""
    before = {name: parent._modules[name] for name in functions}
    stand_ins = {name: StandIn(before[name], function) for name, function in functions.items()}
    try:
        parent._modules.update(stand_ins)
        yield
    finally:
        parent._modules.update(before)
    idle = [name for name, stand_in in stand_ins.items() if not stand_in.ran]
    if idle:
        raise RuntimeError(f"A forward of the LM never called {type(parent).__name__} {', '.join(idle)}.")


@contextmanager
def _eval_mode(module):
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _cache(args, kwargs):
    """The cache among arguments or outputs, by what it is: its name has changed, and will again."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


def _length(cache):
    """How many tokens a cache holds."""
    try:
        return int(cache.get_seq_length())
    except ValueError:  # recurrent states alone do not tell: what was steered has been counted
        return getattr(cache, "dlr_end", 0)


def _carry(cache, grid, end):
    """Keep the code grid with the cache it belongs to: beam search reorders the cache, and so the grid with it."""
    if not hasattr(cache, "dlr_grid"):
        reorder = cache.reorder_cache

        def reorder_both(rows):
            reorder(rows)
            cache.dlr_grid = cache.dlr_grid.index_select(0, rows.to(cache.dlr_grid.device))

        cache.reorder_cache = reorder_both
    cache.dlr_grid, cache.dlr_end = grid, end
