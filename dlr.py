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
through a mixture of codes (weights for codes); searches can run left to right (`beam_search`, `exact_search`), or spare
the prompt (`response_only`); alpha can count in units of h, and the router read a normalised h (`calibrate`,
`router_norm`).

Needs torch and transformers >= 5 alone: copy this file where you like.

    model = DLRModel(AutoModelForCausalLM.from_pretrained("gpt2"))
    found = model.search(input_ids, response_mask, rollouts=8)              # (3)
    model.loss(input_ids, response_mask, found.codes).total.backward()      # (4)
    model.generate(input_ids)                                               # (5)
"""
import copy
import inspect
import json
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from heapq import heappop, heappush
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Cache, DynamicCache
from transformers.utils import ModelOutput

HEAD_ROWS = 256  # tokens whose logits are built at once: (256, V) instead of (B * R, T, V)
SEARCH_ROWS = 128  # prefixes that beam_search and exact_search extend at once, each with a copy of its keys and values


@dataclass
class SearchResult(ModelOutput):
    """What a search found: `codes` (B, M) of the winner, `log_likelihood` (B, R) of every rollout in nats,
    `rollouts` (B, R, M) the code sequences tried, `logits` (B, M, C) of the router that drew them, `searched` (B, M)
    whose codes there was a choice of. `exact_search` adds `expanded` (B,), how many prefixes it extended."""

    codes: torch.Tensor | None = None
    log_likelihood: torch.Tensor | None = None
    rollouts: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    searched: torch.Tensor | None = None
    expanded: torch.Tensor | None = None


@dataclass
class Loss(ModelOutput):
    """The terms of equation (4), unweighted, and `total` = generalist + steered + alpha_policy * policy
    + alpha_reg * prior. (The constant sg(log p(x)) of (4b) is left out: it moves the value, not the gradient.)"""

    total: torch.Tensor | None = None
    generalist: torch.Tensor | None = None
    steered: torch.Tensor | None = None
    policy: torch.Tensor | None = None
    prior: torch.Tensor | None = None


@dataclass
class Trunk:
    """The output of the blocks up to the injection layer, and the chunk grid of the batch it was computed for."""

    input_ids: torch.Tensor  # (B, T)
    padding: dict  # what the LM has to be told about padding: nothing, or its mask and position ids
    hidden: torch.Tensor  # (B, T, H), unsteered
    chunk: torch.Tensor  # (B, T) chunk of each token, -1 at padding
    first: torch.Tensor  # (B, M) index of each chunk's first token
    real: torch.Tensor  # (B, M) False where a short text has no such chunk


def mean_nll(log_likelihood, tokens):
    """(4a) and (4b): summed log-likelihoods (B,) -> nats per response token of the batch, a scalar."""
    return -log_likelihood.sum() / tokens.clamp(min=1)


def policy_term(logits, codes, real, chunks=None):
    """(4c): cross-entropy of the router's logits (B, M, C) with codes (B, M), a mean over the real chunks (B, M), or
    over `chunks`, the number of those in the larger batch that this one is a part of. Codes of -1 are not taught."""
    nll = F.cross_entropy(logits.flatten(0, 1), codes.clamp(min=0).flatten(), reduction="none")  # (B * M,)
    real = (real & (codes >= 0)).flatten()
    return (nll * real).sum() / (real.sum() if chunks is None else chunks).clamp(min=1)


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


def bigrams(logits, real):
    """(4d): p_m(i) p_m+1(j), summed over the pairs of consecutive real chunks of the same text -> (C, C), their number.

    logits (B, M, C), real (B, M). The sum over the number is the distribution of bigrams."""
    p = logits.softmax(-1)
    left, right = p[:, :-1] * real[:, 1:, None], p[:, 1:]  # a real chunk's left neighbour is real
    return torch.einsum("bmi,bmj->ij", left, right), real[:, 1:].sum()


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

    `lm`: any `AutoModelForCausalLM`; `num_codes` C; `chunk_size` K, tokens; `layer`: the block (0-based) whose output
    is steered, None = the middle one; `scale` alpha; `router_norm`: what the router reads, "none" = h itself, "rms" =
    h / rms(h), "centred" = the same after the mean h is taken away (see `calibrate`). Everywhere `attention_mask`
    (B, T) tells padding, left or right (None = no padding), and `codes` is a LongTensor with -1 for a chunk that is not
    steered: (B, M), one sequence for each text, or (B, R, M), R sequences for each. M = ceil(tokens of the longest text
    / K).

    Raises ValueError where a setting is out of range or `lm` is not a decoder-only LM."""

    def __init__(self, lm, num_codes=32, chunk_size=4, layer=None, scale=0.1, router_norm="none"):
        super().__init__()
        self._blocks_name = find_blocks(lm)
        blocks = lm.get_submodule(self._blocks_name)
        layer = len(blocks) // 2 if layer is None else layer
        if not 0 <= layer < len(blocks):
            raise ValueError(f"layer is {layer}, but this LM has blocks 0 to {len(blocks) - 1}.")
        if num_codes < 1 or chunk_size < 1:
            raise ValueError(f"num_codes ({num_codes}) and chunk_size ({chunk_size}) must be at least 1.")
        if router_norm not in ("none", "rms", "centred"):
            raise ValueError(f'router_norm is {router_norm!r}; it should be "none", "rms" or "centred".')
        self.lm, self.router_norm = lm, router_norm
        self.num_codes, self.chunk_size, self.layer, self.scale = num_codes, chunk_size, layer, scale
        self.last_codes = None  # (B, M) what the last generate() was steered with
        self._intervention = None
        width, device = lm.config.get_text_config().hidden_size, next(blocks[layer].parameters()).device
        self.codebook = nn.Parameter(torch.zeros(num_codes, width, device=device))
        self.router = nn.Linear(width, num_codes, bias=False, device=device)
        nn.init.normal_(self.router.weight, std=0.01)
        # running average of the bigrams of (4d), from "every bigram alike"
        self.register_buffer("bigram", torch.full((num_codes, num_codes), num_codes**-2.0, device=device))
        self.register_buffer("unit", torch.ones((), device=device))  # of alpha
        self.register_buffer("center", torch.zeros(width, device=device))  # of what the router reads

    def forward(self, input_ids, attention_mask=None, codes=None):
        """-> logits (B, T, V), or (B, R, T, V) for codes (B, R, M); `codes=None` takes the router's argmax (5)."""
        trunk = self.trunk(input_ids, attention_mask)
        if codes is None:
            codes = self._argmax(trunk)
        return self._above(self.lm, trunk, codes).logits.view(*codes.shape[:-1], input_ids.shape[1], -1)

    def trunk(self, input_ids, attention_mask=None):
        """Run the blocks up to the injection layer -> `Trunk`. Pass it to `search` and `loss` and it runs only once."""
        grid = self._grid(input_ids, attention_mask)
        captured = []
        hook = self._blocks[self.layer].register_forward_hook(lambda block, args, output: captured.append(output))
        above = range(self.layer + 1, len(self._blocks))
        try:
            with _standing_in(self._blocks, {str(i): _identity for i in above}):
                self._backbone(input_ids=input_ids, use_cache=False, **grid["padding"])
        finally:
            hook.remove()
        if not torch.is_tensor(captured[0]):
            raise TypeError("The blocks of this LM return tuples; DLRModel needs transformers >= 5.")
        return Trunk(input_ids=input_ids, hidden=captured[0], **grid)

    def route(self, input_ids, attention_mask=None, trunk=None):
        """(2) -> router logits (B, M, C); the gradient reaches the router alone."""
        with torch.no_grad():
            trunk = trunk or self.trunk(input_ids, attention_mask)
        return self._route(trunk)

    @torch.no_grad()
    def calibrate(self, input_ids, attention_mask=None):
        """Measure, once, what h is like in this LM: `unit` = its typical size, `center` = its mean. Both are saved.

        Afterwards alpha counts in units of h: at alpha = 1, a code vector of entries +-1 is as long as the median h.
        Each text's first token is left out: in many LMs it is an attention sink, a hundred times longer."""
        with _eval_mode(self.lm):
            trunk = self.trunk(input_ids, attention_mask)
        later = (trunk.chunk >= 0) & (torch.arange(input_ids.shape[1], device=input_ids.device) > trunk.first[:, :1])
        hidden = trunk.hidden[later].float()  # (n, H)
        self.unit.copy_(hidden.norm(dim=-1).median() / hidden.shape[-1] ** 0.5)
        self.center.copy_(hidden.mean(0))

    def log_likelihood(self, input_ids, response_mask, codes=None, attention_mask=None, trunk=None):
        """log p of the tokens where `response_mask` (B, T) is true -> (B,), or (B, R) for codes (B, R, M), in nats.

        The text's first token is never counted: nothing predicts it. `codes=None` takes the router's argmax (5); codes
        of floats (B, M, C) are weights: every chunk is steered by a mixture of all code vectors."""
        trunk = trunk or self.trunk(input_ids, attention_mask)
        if codes is None:
            codes = self._argmax(trunk)
        output = self._above(self._backbone, trunk, codes)
        repeats = len(output.last_hidden_state) // len(input_ids)
        counted = _counted(trunk, response_mask).repeat_interleave(repeats, 0)  # (B * R, T - 1)
        targets = input_ids[:, 1:].repeat_interleave(repeats, 0)
        scores = self._score(output, targets, counted)
        return scores.view(len(input_ids) if codes.is_floating_point() else codes.shape[:-1])

    @torch.no_grad()
    def search(self, input_ids, response_mask, rollouts=8, temperature=1.0, attention_mask=None, trunk=None,
               generator=None, dtype=torch.float32, response_only=False, rollout_batch=None, noise=None):
        """(3): draw `rollouts` code sequences for each text, score them -> `SearchResult`.

        `rollouts`: how many, or the sequences themselves (B, R, M), which are then scored as they are. `temperature`:
        tau, one number or one for each rollout; 0 draws the argmax. `noise` (B, R, M, C): Gumbel noise to draw with, in
        place of fresh one. `dtype` is the precision of the scores: rollouts differ by hundredths of a nat at first,
        less than what bfloat16 rounds away, so float32 holds even inside autocast. Dropout is off.
        `rollout_batch`: how many rollouts of each text are scored at once (None = all). `response_only`: chunks before
        the first response token take the argmax in all rollouts, also in given ones, so that the blocks above run over
        them only once; the other chunks draw what they would draw without it.
        Raises ValueError for less than one rollout, or a negative temperature; with `response_only`, for an LM with
        recurrent blocks."""
        if rollout_batch is not None and rollout_batch < 1:
            raise ValueError(f"rollout_batch is {rollout_batch}; it must be at least 1, or None for all at once.")
        with self._searching(input_ids, attention_mask, trunk, dtype, resume=response_only) as (trunk, logits):
            drawn = rollouts
            if not torch.is_tensor(rollouts):
                drawn = self._draw(logits, rollouts, temperature, generator, noise)
            drawn, searched = drawn.masked_fill(~trunk.real[:, None], -1), trunk.real  # (B, R, M), (B, M)
            score = partial(self.log_likelihood, input_ids, response_mask, trunk=trunk)
            if response_only:
                chunks = torch.arange(logits.shape[1], device=logits.device)
                response = response_mask.bool() & (trunk.chunk >= 0)
                first = trunk.chunk.masked_fill(~response, len(chunks)).amin(1).minimum(trunk.real.sum(1))  # (B,)
                searched = trunk.real & (chunks >= first[:, None])
                drawn = torch.where(searched[:, None], drawn, self._argmax(trunk)[:, None])
                if searched.any() and (first > 0).any():  # otherwise there is no response, or no prompt
                    score = self._after_prompts(trunk, response_mask, first, drawn[:, 0])
            scores = torch.cat([score(part) for part in drawn.split(rollout_batch or drawn.shape[1], 1)], 1)  # (B, R)
        winner = scores.argmax(1)[:, None, None].expand(-1, 1, drawn.shape[-1])
        return SearchResult(drawn.gather(1, winner)[:, 0], scores, drawn, logits, searched)

    def _after_prompts(self, trunk, response_mask, first, codes):
        """Run the chunks before `first` (B,) under `codes` (B, M) through the blocks above, once -> a function that
        scores sequences (B, R, M) which begin like these: `log_likelihood`, but it runs the other chunks only."""
        aligned = _Aligned(trunk, response_mask, first * self.chunk_size)
        text, cache, border = torch.arange(len(codes), device=codes.device), DynamicCache(), aligned.border
        output = self._resume(aligned, text, codes, cache, border)
        # a response that begins with a chunk is predicted from the prompt: all rollouts share that token's score
        shared = self._score(output, aligned.targets[:, :border], aligned.counted[:, :border])  # (B,)

        def score(codes):
            rows = text.repeat_interleave(codes.shape[1])
            output = self._resume(aligned, rows, codes.flatten(0, 1), _forked(cache, rows))
            own = self._score(output, aligned.targets[rows, border:], aligned.counted[rows, border:])
            return shared[:, None] + own.view(codes.shape[:2])

        return score

    @torch.no_grad()
    def beam_search(self, input_ids, response_mask, width=8, attention_mask=None, trunk=None, dtype=torch.float32):
        """(3) from left to right: what is predicted from chunk m depends on a_0 .. a_m alone, so log p(x | a) is a sum
        over chunks. Each prefix is extended by all C codes, and the `width` likeliest are kept -> `SearchResult`.

        Where prefixes tie, as in a prompt, the router's probability decides. `rollouts` (B, R, M) is the final beam,
        best first, R = min(width, C ** M); a text too short for R sequences fills up with its best.
        `dtype`, dropout: as in `search`. Raises ValueError for a width below 1, and for an
        LM with recurrent blocks."""
        if width < 1:
            raise ValueError(f"width is {width}, but a beam keeps at least 1 prefix.")
        with self._searching(input_ids, attention_mask, trunk, dtype, resume=True) as (trunk, logits):
            aligned, real, (batch, chunks, every) = _Aligned(trunk, response_mask), trunk.real, logits.shape
            text, cache = torch.arange(batch, device=logits.device), DynamicCache()
            codes = text.new_empty(batch, 1, 0)  # (B, W, m) the prefixes kept
            scores = ties = logits.new_zeros(batch, 1)  # (B, W) log p of each, and the router's log p of its codes
            for m in range(chunks):
                kept, ended = codes.shape[1], ~real[:, m, None]  # a text that has ended goes on in one way, not in C
                rewards = self._rewards(aligned, text.repeat_interleave(kept), codes.flatten(0, 1), cache)
                scores = scores[..., None] + rewards.view(batch, kept, every)  # (B, W, C)
                scores[..., 1:].masked_fill_(ended[..., None], -torch.inf)
                scores, ties = scores.flatten(1), (ties[..., None] + logits[:, m, None].log_softmax(-1)).flatten(1)
                best = ties.argsort(dim=1, descending=True)
                best = best.gather(1, scores.gather(1, best).argsort(dim=1, descending=True, stable=True))[:, :width]
                scores, ties, parents = scores.gather(1, best), ties.gather(1, best), best // every  # (B, W')
                code = (best % every).masked_fill(ended, -1)
                codes = torch.cat([codes.gather(1, parents[..., None].expand(-1, -1, m)), code[..., None]], -1)
                cache.reorder_cache((text[:, None] * kept + parents).flatten())
        none = scores == -torch.inf  # (B, R)
        codes = torch.where(none[..., None], codes[:, :1], codes)
        return SearchResult(codes[:, 0], torch.where(none, scores[:, :1], scores), codes, logits, real)

    @torch.no_grad()
    def exact_search(self, input_ids, response_mask, attention_mask=None, trunk=None, most=100_000,
                     dtype=torch.float32):
        """(3) solved: the likeliest of all C ** M sequences of a text, by best-first search -> `SearchResult`, R = 1.

        The likeliest prefix is extended until it is complete, and then it is the optimum, as in General Dijkstra
        Search: rewards are log-probabilities, never positive, so nothing in the queue can still overtake it. There
        are no duplicates to prune: what follows depends on every code before, so each prefix is a state of its own.
        Prefixes that end in the prompt all tie at 0 and are all extended: a long prompt is out of reach.
        Raises ValueError where a text needs more than `most` extensions, and for an LM with recurrent blocks."""
        with self._searching(input_ids, attention_mask, trunk, dtype, resume=True) as (trunk, logits):
            aligned, real = _Aligned(trunk, response_mask), trunk.real
            log_p, lengths = logits.log_softmax(-1), real.sum(1).tolist()
            found = [self._best_first(aligned, b, log_p[b, :chunks].tolist(), most) for b, chunks in enumerate(lengths)]
        costs, codes, expanded = zip(*found)
        codes = [prefix + [-1] * (real.shape[1] - len(prefix)) for prefix in codes]
        codes, expanded = (torch.tensor(rows, device=logits.device) for rows in (codes, expanded))
        return SearchResult(codes, -logits.new_tensor(costs)[:, None], codes[:, None], logits, real, expanded)

    def _best_first(self, aligned, b, log_p, most):
        """Text b, the router's log p (M, C) of its codes -> -log p of the optimum, its codes, prefixes expanded."""
        queue, expanded = [(0.0, 0.0, [])], 0  # -log p of the text, the router's of the codes to break ties, the codes
        while len(queue[0][2]) < len(log_p):
            if expanded >= most:
                raise ValueError(f"exact_search extended {most} prefixes of text {b} and has not found its optimum: "
                                 f"shorten the text (its prompt first), take fewer codes or a beam, or raise `most`.")
            cost, tie, prefix = heappop(queue)
            expanded += 1
            # Keys and values are not queued: it takes less to run m chunks again than to store C texts per extension.
            codes = aligned.ids.new_tensor([prefix])  # (1, m)
            rewards = self._rewards(aligned, codes.new_tensor([b]), codes, DynamicCache())[0].tolist()
            for code, reward in enumerate(rewards):
                heappush(queue, (cost - reward, tie - log_p[len(prefix)][code], [*prefix, code]))
        return queue[0][0], queue[0][2], expanded

    @contextmanager
    def _searching(self, input_ids, attention_mask, trunk, dtype, resume):
        """Dropout off, precision `dtype`: yields the trunk and the router's logits. `resume`: from keys and values."""
        layers = DynamicCache(config=self.lm.config).layers
        if resume and any(hasattr(layer, "update_recurrent_state") for layer in layers):
            raise ValueError(f"{type(self.lm).__name__} has recurrent blocks, which beam_search, exact_search and "
                             f"response_only cannot resume in the middle of a text: use plain search.")
        with _eval_mode(self.lm):
            trunk = trunk or self.trunk(input_ids, attention_mask)
            logits = self._route(trunk)
            low = None if dtype == torch.float32 else dtype
            with torch.autocast(input_ids.device.type, dtype=low, enabled=low is not None):
                yield trunk, logits

    def _rewards(self, aligned, text, codes, cache):
        """log p of what counts and is predicted from chunk m, after the prefixes `codes` (n, m), by code -> (n, C).

        `text` (n,): whose prefixes; `cache`: their keys and values, which are brought up to date if they are needed."""
        chunk = slice(codes.shape[1] * self.chunk_size, (codes.shape[1] + 1) * self.chunk_size)
        targets, counted = aligned.targets[:, chunk], aligned.counted[:, chunk]  # (B, q)
        rewards = torch.zeros(len(text) * self.num_codes, device=codes.device)
        rows = counted.any(1)[text].repeat_interleave(self.num_codes).nonzero()[:, 0]  # in a prompt there are none
        if len(rows) and cache.get_seq_length() < chunk.start:
            self._resume(aligned, text, codes, cache, chunk.start)
        for part in rows.split(SEARCH_ROWS) if len(rows) else ():
            parents, code = part // self.num_codes, part % self.num_codes
            extended = torch.cat([codes[parents], code[:, None]], 1)  # (rows, m + 1)
            output = self._resume(aligned, text[parents], extended, _forked(cache, parents), chunk.stop)
            rewards[part] = self._score(output, targets[text[parents]], counted[text[parents]])
        return rewards.view(-1, self.num_codes)

    def _resume(self, aligned, text, codes, cache, stop=None):
        """Run the columns up to `stop` that `cache` does not hold yet through the blocks above, steered by `codes`
        (n, m) -> their output."""
        new = slice(cache.get_seq_length(), stop)
        hidden = aligned.hidden[text, new]  # (n, q, H)
        position = aligned.position[text, :stop]
        token_codes = self._intervened(codes).gather(1, position[:, new].clamp(min=0) // self.chunk_size)
        steered = hidden + self._vectors(token_codes, hidden.dtype)
        padding = self._padding((position >= 0).long(), position[:, new]) if aligned.padded else {}

        def inject(*args, **kwargs):
            # An LM takes positions and mask sizes from block 0's keys, and that block does not run: dummies tell.
            dummy = steered[:, None, :, :1]  # (n, 1 head, q, 1)
            cache.update(dummy, dummy, 0)
            return steered

        below = {str(i): _identity for i in range(self.layer)}
        with _standing_in(self._blocks, {**below, str(self.layer): inject}):
            return self._backbone(input_ids=aligned.ids[text, new], past_key_values=cache, use_cache=True, **padding)

    def _score(self, output, targets, counted):
        """log p of the targets (n, q) that count, predicted from the states of `output` -> (n,), in nats."""
        states = output.last_hidden_state[:, : counted.shape[1]][counted]  # (tokens that count, H)
        # A product of a few rows is rounded in another way than one of many: a short remainder joins the slice before.
        whole = max(0, -(-(len(states) - HEAD_ROWS // 16) // HEAD_ROWS) - 1)
        sizes = whole * [HEAD_ROWS] + [len(states) - whole * HEAD_ROWS]
        slices = zip(states.split(sizes), targets[counted].split(sizes))
        log_p = [-F.cross_entropy(self._head(rows, output).float(), y, reduction="none") for rows, y in slices]
        return torch.zeros(counted.shape, device=states.device).masked_scatter(counted, torch.cat(log_p)).sum(-1)

    def loss(self, input_ids, response_mask, codes, attention_mask=None, trunk=None, alpha_policy=0.5, alpha_reg=0.1,
             steer=None, generalist=True, reinforce=None):
        """(4) for the selected codes (B, M) -> `Loss`. In training mode the running average of (4d) moves on.

        Beyond the paper: `steer` are other codes (B, M), or weights (B, M, C), for (4b) to be computed under;
        `generalist=False` leaves (4a) out, of the value as of the gradient; `reinforce`, a `SearchResult`, puts
        `rloo_term` in the place of (4c). With `codes=None` (then `steer` is needed) there is no (4c)."""
        trunk = trunk or self.trunk(input_ids, attention_mask)
        tokens = _counted(trunk, response_mask).sum()
        unsteered, steered = self.text_terms(input_ids, response_mask, codes if steer is None else steer, trunk,
                                             tokens, generalist)
        taught = codes if reinforce is None else reinforce
        policy, prior = self.router_terms([(self._route(trunk), trunk.real, taught)], tokens)
        total = unsteered + steered + alpha_policy * policy + alpha_reg * prior
        return Loss(total=total, generalist=unsteered, steered=steered, policy=policy, prior=prior)

    def text_terms(self, input_ids, response_mask, codes, trunk, tokens, generalist=True):
        """(4a) and (4b), steered by codes (B, M) or weights (B, M, C) -> two scalars.

        `tokens`: the response tokens of the batch; of the larger one, where these texts are a part of it."""
        codes = codes[:, : trunk.real.shape[1]]
        steered = mean_nll(self.log_likelihood(input_ids, response_mask, codes, trunk=trunk), tokens)
        if not generalist:
            return torch.zeros_like(steered), steered
        # with a frozen LM it is a number to look at, and needs no graph
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in self.lm.parameters())
        with torch.set_grad_enabled(learning):
            off = trunk.real.new_full(trunk.real.shape, -1, dtype=torch.long)
            return mean_nll(self.log_likelihood(input_ids, response_mask, off, trunk=trunk), tokens), steered

    def router_terms(self, parts, tokens, over_ranks=lambda tensor: tensor):
        """(4c) and (4d) of a batch that was routed in parts -> two scalars. In training mode (4d)'s average moves on.

        Neither is a sum over texts, so a batch's parts (micro-batches, several GPUs) have to meet here; that is cheap,
        for h is a constant to the router. `parts`: (logits (B, M, C), real (B, M), what teaches it: codes (B, M), a
        `SearchResult` for `rloo_term`, or None) each. `over_ranks` sums a tensor over all processes: (4d) is then that
        of all, with the gradient of this one's part, and (4c) this one's part of the sum."""
        policy, sums = self.bigram.new_zeros(()), [bigrams(logits, real) for logits, real, _ in parts]
        imitated = [(real, taught) for _, real, taught in parts if torch.is_tensor(taught)]
        chunks = [(real & (codes[:, : real.shape[1]] >= 0)).sum() for real, codes in imitated]
        chunks, pairs = over_ranks(torch.stack([sum(chunks, policy), sum(pairs for _, pairs in sums) + policy]))
        for logits, real, taught in parts:
            if isinstance(taught, SearchResult):
                policy = policy + rloo_term(logits, taught.rollouts, taught.log_likelihood, real, tokens)
            elif taught is not None:
                policy = policy + policy_term(logits, taught[:, : logits.shape[1]], real, chunks)
        own = sum(part for part, _ in sums)
        of_all = over_ranks(own.detach().clone()) + own - own.detach()
        average = 0.8 * self.bigram + 0.2 * torch.where(pairs > 0, of_all / pairs.clamp(min=1), self.bigram)
        if self.training:
            self.bigram = average.detach()
        return policy, prior_term(average, zipf_prior(average.detach().sum(1)))

    def generate(self, input_ids, attention_mask=None, **kwargs):
        """(5): `lm.generate` (greedy, sampling, beams; same arguments, same result) with steering and KV cache.

        Batches are padded on the left; every row keeps its own chunk grid across the border from prompt to answer.
        The codes it was steered with are in `last_codes` (rows of the result, M) afterwards; text that a finished row
        was padded with is routed like any other. Raises ValueError for padding on the right."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if not attention_mask[:, -1].all():
            raise ValueError("generate() continues each row at its end: pad prompts on the left.")
        pads = (1 - attention_mask.long()).sum(1)  # (B,)
        asked_for_dict = kwargs.pop("return_dict_in_generate", False)
        with self._steered_decoding(pads) as steps:
            output = self.lm.generate(
                input_ids=input_ids, attention_mask=attention_mask, return_dict_in_generate=True, **kwargs
            )
        self.last_codes = _codes_of_rows(steps, output, pads, self.chunk_size)
        return output if asked_for_dict else output.sequences

    @contextmanager
    def intervene(self, intervention):
        """Inside this `with`, every code is replaced before it steers: in forward and generate, prompt and answer.

        "off" steers nothing; "random" draws codes uniformly; a function gets the codes (rows, M) and returns as many;
        None lets them be.
        While generating, the function sees the grid so far (-1 where nothing is yet), and its answer holds for the
        chunks that begin now. A chunk that is not steered (-1) stays so. Raises ValueError for another word."""
        known = {
            "off": lambda codes: torch.full_like(codes, -1),
            "random": lambda codes: torch.randint_like(codes, self.num_codes),
            None: None,
        }
        if not callable(intervention) and intervention not in known:
            raise ValueError(f'intervene() takes "off", "random" or a function of codes, not {intervention!r}.')
        before, self._intervention = self._intervention, known.get(intervention, intervention)
        try:
            yield self
        finally:
            self._intervention = before

    def save_pretrained(self, directory):
        """Write an ordinary Hugging Face folder (the LM) plus `dlr.safetensors` and `dlr_config.json`."""
        save_lm(self.lm, directory)
        own = {name: t for name, t in self.state_dict().items() if not name.startswith("lm.")}
        save_file({name: t.contiguous().cpu() for name, t in own.items()}, Path(directory, "dlr.safetensors"))
        config = {name: getattr(self, name) for name in ("num_codes", "chunk_size", "layer", "scale", "router_norm")}
        Path(directory, "dlr_config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, directory, **kwargs):
        """Load what `save_pretrained` wrote; `kwargs` go to `AutoModelForCausalLM.from_pretrained`.

        Raises FileNotFoundError where the folder holds no codebook."""
        config = Path(directory, "dlr_config.json")
        if not config.is_file():
            raise FileNotFoundError(f"{directory} has no dlr_config.json: it was not written by save_pretrained.")
        lm = AutoModelForCausalLM.from_pretrained(directory, **kwargs)
        model = cls(lm, **json.loads(config.read_text()))
        model.load_state_dict(load_file(Path(directory, "dlr.safetensors")), strict=False)
        return model.eval()

    _blocks = property(lambda self: self.lm.get_submodule(self._blocks_name))
    _backbone_name = property(lambda self: self._blocks_name.rpartition(".")[0])
    _backbone = property(lambda self: self.lm.get_submodule(self._backbone_name))

    def _grid(self, input_ids, attention_mask):
        """The chunk grid of a batch, and what the LM has to be told of its padding."""
        batch, length = input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        lengths, start = mask.sum(1), mask.argmax(1)  # (B,) real tokens, and where they begin
        longest, left_padded = length, False
        if attention_mask is not None:
            longest, left_padded = torch.stack([lengths.max(), start.max()]).tolist()  # one wait for the device
        position = torch.arange(length, device=input_ids.device) - start[:, None]  # (B, T), < 0 before the text
        outside = (position < 0) | (position >= lengths[:, None])
        begins = torch.arange(-(-longest // self.chunk_size), device=input_ids.device) * self.chunk_size  # (M,)
        return {  # a causal LM never looks at padding on its right: without a mask it runs the faster attention
            "padding": self._padding(mask, position) if left_padded else {},
            "chunk": (position // self.chunk_size).masked_fill(outside, -1),
            "first": (start[:, None] + begins).clamp(max=length - 1),
            "real": begins < lengths[:, None],
        }

    def _padding(self, mask, position):
        """What the LM has to be told of padding on the left: mask (n, S) of all tokens, position ids (n, q) of new."""
        takes = "position_ids" in inspect.signature(self._backbone.forward).parameters  # ALiBi models do not
        return {"attention_mask": mask, **({"position_ids": position.clamp(min=0)} if takes else {})}

    def _route(self, trunk):
        width = trunk.hidden.shape[-1]
        return self._logits(trunk.hidden.detach().gather(1, trunk.first[..., None].expand(-1, -1, width)))  # (B, M, C)

    def _logits(self, hidden):
        """(2) for states (..., H), in float32 -> (..., C)."""
        hidden = hidden.to(self.router.weight.dtype)
        if self.router_norm != "none":
            hidden = hidden - self.center if self.router_norm == "centred" else hidden
            hidden = F.rms_norm(hidden, hidden.shape[-1:])
        return self.router(hidden).float()

    def _draw(self, logits, rollouts, temperature, generator, noise):
        """`rollouts` code sequences from router logits (B, M, C) -> (B, R, M)."""
        tau = torch.as_tensor(temperature, dtype=torch.float32, device="cpu")
        if rollouts < 1 or tau.min() < 0 or tau.numel() not in (1, rollouts):
            raise ValueError(f"rollouts is {rollouts}, which must be at least 1, and temperature {temperature}, which "
                             f"must be one number >= 0, or one for each rollout.")
        # argmax of z + tau * Gumbel noise is a draw from softmax(z / tau), and the argmax itself at tau = 0
        if noise is None:
            noise = torch.empty(len(logits), rollouts, *logits.shape[1:], device=logits.device)  # (B, R, M, C)
            noise = -noise.exponential_(generator=generator).log()
        return (logits[:, None] + tau.view(-1, 1, 1).to(noise) * noise).argmax(-1)

    def _argmax(self, trunk):
        return self._route(trunk).argmax(-1).masked_fill(~trunk.real, -1)

    def _above(self, module, trunk, codes):
        """Run `module` (the LM or its backbone) from the steered trunk on; rows of the output: texts times rollouts."""
        mixed = codes.is_floating_point()
        grid = codes if codes.dim() == 3 and not mixed else codes[:, None]  # (B, R, M), or weights (B, 1, M, C)
        chunks = trunk.real.shape[1]
        if grid.shape[0] != len(trunk.hidden) or grid.shape[2] < chunks:
            raise ValueError(f"codes {tuple(codes.shape)} must be (B, M) or (B, R, M) with B = {len(trunk.hidden)} "
                             f"texts and M = {chunks} chunks of {self.chunk_size} tokens.")
        repeats = grid.shape[1]
        chunk = trunk.chunk[:, None].expand(-1, repeats, -1)  # (B, R, T)
        if mixed:
            of_chunk = self.scale * self.unit * (codes @ self.codebook)  # (B, M, H)
            place = trunk.chunk.clamp(min=0)[..., None].expand(-1, -1, of_chunk.shape[-1])
            vectors = (of_chunk.gather(1, place) * (trunk.chunk >= 0)[..., None]).to(trunk.hidden.dtype)[:, None]
        else:
            grid = self._intervened(grid.flatten(0, 1)).view(grid.shape)
            token_codes = grid.gather(-1, chunk.clamp(min=0)).masked_fill(chunk < 0, -1)
            vectors = self._vectors(token_codes, trunk.hidden.dtype)
        steered = (trunk.hidden[:, None] + vectors).flatten(0, 1)
        padding = {name: t.repeat_interleave(repeats, 0) for name, t in trunk.padding.items()}
        below = {str(i): _identity for i in range(self.layer)}
        with _standing_in(self._blocks, {**below, str(self.layer): lambda *args, **kwargs: steered}):
            # The real ids go in for what the LM derives from them besides embeddings; the trunk's blocks do nothing.
            return module(input_ids=trunk.input_ids.repeat_interleave(repeats, 0), use_cache=False, **padding)

    def _vectors(self, token_codes, dtype):
        """(1): alpha * e for codes of any shape (...), zero where the code is -1 -> (..., H)."""
        vectors = F.embedding(token_codes.clamp(min=0), self.codebook) * (token_codes >= 0)[..., None]
        return (self.scale * self.unit * vectors).to(dtype)

    def _intervened(self, codes):
        if self._intervention is None:
            return codes
        return torch.where(codes >= 0, self._intervention(codes).to(codes), codes)

    def _head(self, states, output):
        """Final hidden states (n, H) -> logits (n, V): the LM itself, whose backbone just returns `output` with these
        states in it, so that a soft-cap or a logit scale is applied without knowing of it."""
        output = replace(output, last_hidden_state=states[None])
        parent, _, name = self._backbone_name.rpartition(".")
        with _standing_in(self.lm.get_submodule(parent), {name: lambda *args, **kwargs: output}):
            return self.lm(input_ids=states.new_zeros(1, len(states), dtype=torch.long), use_cache=False).logits[0]

    @contextmanager
    def _steered_decoding(self, pads):
        """Steer every forward of the LM inside; yields a list that grows by the token codes (B', q) of each forward."""
        steps, call = [], {}

        def before(backbone, args, kwargs):
            # How far the cache reaches is known only before the blocks run: the first of them extends it.
            cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
            start = 0 if cache is None else int(cache.get_seq_length())
            if start and not hasattr(cache, "dlr_grid"):
                raise ValueError("This cache was filled without steering: generate from the text instead.")
            call.update(cache=cache, start=start)

        def steer(block, args, hidden):
            grid = None if call["start"] == 0 else call["cache"].dlr_grid
            token_codes, grid = self._extend(grid, hidden, call["start"], pads)
            if call["cache"] is not None:
                _carry(call["cache"], grid)
            steps.append(token_codes)
            return hidden + self._vectors(token_codes, hidden.dtype)

        hooks = [
            self._backbone.register_forward_pre_hook(before, with_kwargs=True),
            self._blocks[self.layer].register_forward_hook(steer),
        ]
        try:
            yield steps
        finally:
            for hook in hooks:
                hook.remove()

    def _extend(self, grid, hidden, start, pads):
        """Route the chunks that begin among q new tokens -> their codes (B', q), and the grid of codes (B', M) so far.

        A chunk begun earlier keeps its code: `grid` is what this returned for the tokens before, or None."""
        rows, new = hidden.shape[:2]
        pads = pads.repeat_interleave(rows // len(pads))  # beams and several samples of a prompt are neighbours
        position = torch.arange(start, start + new, device=hidden.device) - pads[:, None]  # (B', q), < 0 at padding
        chunk = position // self.chunk_size
        width = (start + new - 1) // self.chunk_size + 1
        before = hidden.new_full((rows, width + 1), -1, dtype=torch.long)  # its last column takes what is not kept
        if grid is not None:
            before[:, : grid.shape[1]] = grid
        target = torch.where((position >= 0) & (position % self.chunk_size == 0), chunk, width)
        grid = before.scatter(1, target, self._logits(hidden).argmax(-1))[:, :width]
        begins = torch.zeros_like(before, dtype=torch.bool).scatter(1, target, True)[:, :width]
        grid = torch.where(begins, self._intervened(grid), grid)
        return grid.gather(1, chunk.clamp(min=0)).masked_fill(chunk < 0, -1), grid


def find_blocks(lm):
    """-> the name of the LM's blocks: of its shallowest ModuleList with one entry a layer. Its owner is the backbone.

    Raises ValueError for an encoder-decoder, or where there is no such list."""
    if getattr(lm.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(lm).__name__} is an encoder-decoder; DLR steers decoder-only language models.")
    layers = lm.config.get_text_config().num_hidden_layers
    names = [name for name, part in lm.named_modules() if isinstance(part, nn.ModuleList) and len(part) == layers]
    if not names:
        raise ValueError(f"{type(lm).__name__} has no list of {layers} blocks to steer.")
    return min(names, key=lambda name: name.count("."))


def save_lm(lm, directory):
    """`lm.save_pretrained`, also for an LM that was loaded from a GGUF file (transformers refuses to save those)."""
    if getattr(lm.config, "quantization_config", None) is not None:
        config = copy.deepcopy(lm.config)
        del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config, dtype=lm.dtype)
        plain.load_state_dict(lm.state_dict())
        plain.generation_config = lm.generation_config
        lm = plain
    lm.save_pretrained(directory)


def _counted(trunk, response_mask):
    """Which tokens t >= 1 the losses count (B, T - 1): response tokens that a real token precedes."""
    real = trunk.chunk >= 0
    return response_mask[:, 1:].bool() & real[:, 1:] & real[:, :-1]


class _Aligned:
    """The texts of a batch moved to begin in column 0 or, where the sizes (B,) of their `heads` are given, so that all
    heads end before column `border`: `padded` tells whether that takes padding on the left."""

    def __init__(self, trunk, response_mask, heads=None):
        lengths, last = (trunk.chunk >= 0).sum(1), trunk.chunk.shape[1] - 1
        heads = torch.zeros_like(lengths) if heads is None else heads
        pads = heads.max() - heads  # (B,)
        sizes = torch.stack([heads.max(), pads.max(), (pads + lengths).max()]).tolist()  # one wait for the device
        self.border, self.padded, width = sizes[0], sizes[1] > 0, sizes[2]
        position = torch.arange(width, device=pads.device) - pads[:, None]
        self.position = position.minimum(lengths[:, None] - 1)  # (B, L) < 0 before the text, at its last token after
        columns = trunk.first[:, :1] + self.position.clamp(min=0)
        self.ids = trunk.input_ids.gather(1, columns)  # (B, L)
        self.hidden = trunk.hidden.gather(1, columns[..., None].expand(-1, -1, trunk.hidden.shape[-1]))  # (B, L, H)
        self.targets = trunk.input_ids.gather(1, (columns + 1).clamp(max=last))  # (B, L) the token after each
        self.counted = F.pad(_counted(trunk, response_mask), (0, 1)).gather(1, columns) & (self.position >= 0)  # (B, L)


def _forked(cache, rows):
    """A cache with these rows of `cache` (or several times the same), which stays as it is."""
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    fork.reorder_cache(rows)
    return fork


def _identity(hidden, *args, **kwargs):
    return hidden


class _StandIn(nn.Module):
    """Takes the place of a module: runs `function` instead, and has the other attributes of what it stands in for."""

    def __init__(self, module, function):
        super().__init__()
        self.__dict__.update(stood_in_for=module, forward=function)

    def __getattr__(self, name):
        return getattr(self.__dict__["stood_in_for"], name)


@contextmanager
def _standing_in(parent, functions):
    """{name: function}: inside, these children of `parent` are stand-ins, so that neither they nor their hooks run."""
    before = {name: parent._modules[name] for name in functions}
    try:
        for name, function in functions.items():
            parent._modules[name] = _StandIn(before[name], function)
        yield
    finally:
        parent._modules.update(before)


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


def _carry(cache, grid):
    """Keep the code grid with the cache it belongs to: beam search reorders the cache, and so the grid with it."""
    if not hasattr(cache, "dlr_grid"):
        reorder = cache.reorder_cache

        def reorder_both(rows):
            reorder(rows)
            cache.dlr_grid = cache.dlr_grid.index_select(0, rows.to(cache.dlr_grid.device))

        cache.reorder_cache = reorder_both
    cache.dlr_grid = grid


def _codes_of_rows(steps, output, pads, chunk_size):
    """The codes (rows, M) that steered the rows of a `generate` output, from the token codes (B', q) of each step."""
    rows = len(output.sequences)
    parents = getattr(output, "beam_indices", None)  # (rows, steps): the beam that each token was predicted from
    if parents is None:
        parents = torch.arange(rows, device=pads.device)[:, None].expand(-1, len(steps))
    tokens = []
    for t in range(min(len(steps), parents.shape[1])):
        codes = steps[t] if t == 0 else steps[t][:, -1:]  # without a cache every step holds the whole text
        ended = parents[:, t, None] < 0
        tokens.append(codes[parents[:, t].clamp(min=0).long()].masked_fill(ended, -1))
    tokens = torch.cat(tokens, 1)
    pads = pads.repeat_interleave(rows // len(pads))
    position = torch.arange(tokens.shape[1], device=tokens.device) - pads[:, None]
    width = (tokens.shape[1] - 1) // chunk_size + 1
    begins = (position >= 0) & (position % chunk_size == 0)
    target = torch.where(begins, position // chunk_size, width)  # the last column takes what is not kept
    return tokens.new_full((rows, width + 1), -1).scatter(1, target, tokens)[:, :width]
