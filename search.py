"""Other searches than drawing from the router, for a `DLRModel` as `model.search`, and what a search is worth.

    response_search   rollouts of the response alone: the prompt takes the router's argmax and is computed once
    beam_search       from left to right, N prefixes wide
    exact_search      the best of all C^M sequences, by best-first search

    use(model, "beam")                                                      # what `model(...).loss` searches with

The winner is chosen with the answer in view; the router has to choose without it. `look_closer` and `hindsight_gap`
tell how much of what a search finds is left then, and whether its choice is more than rounding.

What is predicted from chunk m depends on the codes a_0 .. a_m alone, so log p(x | a) is a sum over chunks, and what two
sequences have in common has to be computed once. All three *resume* a text from keys and values: the blocks above the
injection run over new tokens only, on a cache that holds what came before. That needs blocks that look back through
attention; an LM with others, recurrent ones, is refused.

Source: "Dynamic Latent Routing", arXiv 2605.14323 (2026), draws from the router; these are this project's own. The
exact search is General Dijkstra Search (gds.py) on a tree: rewards are log-probabilities, never positive, so the
likeliest prefix, once complete, is the optimum.
"""
import copy
import inspect
import json
from functools import partial
from heapq import heappop, heappush
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dlr import DLRModel, SearchResult, select, targets_of, typical_norm

SEARCH_ROWS = 128  # prefixes that are extended at once, each with a copy of its keys and values
ROUNDING = ("Warning, step {step}: the rollouts' log-likelihoods lie {spread:.2g} nats apart, and scoring them again "
            "moves them by {noise:.2g}: winners are drawn by rounding. Raise --scale or --code-lr, or use "
            "search_dtype=float32.")


def use(model, name):
    """Search with `<name>_search` of this file from now on; "rollouts" is the model's own. A beam is N wide."""
    if name != "rollouts":
        settings = {"width": model.settings.rollouts} if name == "beam" else {}
        model.search = partial(globals()[f"{name}_search"], model, **settings)


@torch.no_grad()
def response_search(model, trunk, labels, rollouts=None, temperature=None, generator=None):
    """`DLRModel.search`, but chunks before the first response token take the argmax in all rollouts, also in given
    ones, so that the blocks above run over them only once; the other chunks draw what they would draw without it.

    -> `SearchResult`; `searched` (B, M) tells the two apart. Raises ValueError for an LM with recurrent blocks."""
    check_resumable(model)
    with model.searching():
        logits = model.route(trunk)
        drawn = rollouts if torch.is_tensor(rollouts) else model.draw(logits, rollouts, temperature, generator)
        chunks = torch.arange(logits.shape[1], device=logits.device)
        response = (labels >= 0) & (trunk.chunk >= 0)
        first = trunk.chunk.masked_fill(~response, len(chunks)).amin(1).minimum(trunk.real.sum(1))  # (B,)
        searched = trunk.real & (chunks >= first[:, None])
        drawn = torch.where(searched[:, None], drawn, model.argmax(trunk)[:, None])  # (B, R, M)
        if searched.any() and (first > 0).any():  # otherwise there is no response, or no prompt
            scores = _after_prompts(model, trunk, labels, first, drawn)
        else:
            scores = model.log_likelihood(trunk, labels, drawn)
        return select(drawn, scores, logits, searched)


def _after_prompts(model, trunk, labels, first, drawn):
    """Run the chunks before `first` (B,), alike in all rollouts (B, R, M), once, and the others for each -> (B, R)."""
    aligned = _Aligned(trunk, labels, first * model.settings.chunk_size)
    text, cache, border = torch.arange(len(drawn), device=drawn.device), DynamicCache(), aligned.border
    output = _resume(model, aligned, text, drawn[:, 0], cache, border)
    # a response that begins with a chunk is predicted from the prompt: all rollouts share that token's score
    shared = model.score(output, aligned.targets[:, :border])  # (B,)
    rows = text.repeat_interleave(drawn.shape[1])
    output = _resume(model, aligned, rows, drawn.flatten(0, 1), _forked(cache, rows))
    return shared[:, None] + model.score(output, aligned.targets[rows, border:]).view(drawn.shape[:2])


@torch.no_grad()
def beam_search(model, trunk, labels, width=8):
    """From left to right: each prefix is extended by all C codes, and the `width` likeliest are kept.

    Where prefixes tie, as in a prompt, the router's probability decides. -> `SearchResult`, whose `rollouts` (B, R, M)
    are the final beam, best first, R = min(width, C ** M); a text too short for R sequences fills up with its best.
    Raises ValueError for a width below 1, and for an LM with recurrent blocks."""
    check_resumable(model)
    if width < 1:
        raise ValueError(f"width is {width}, but a beam keeps at least 1 prefix.")
    with model.searching():
        logits = model.route(trunk)
        aligned, real, (batch, chunks, every) = _Aligned(trunk, labels), trunk.real, logits.shape
        text, cache = torch.arange(batch, device=logits.device), DynamicCache()
        codes = text.new_empty(batch, 1, 0)  # (B, W, m) the prefixes kept
        scores = ties = logits.new_zeros(batch, 1)  # (B, W) log p of each, and the router's log p of its codes
        for m in range(chunks):
            kept, ended = codes.shape[1], ~real[:, m, None]  # a text that has ended goes on in one way, not in C
            rewards = _rewards(model, aligned, text.repeat_interleave(kept), codes.flatten(0, 1), cache)
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
    return SearchResult(codes[:, 0], torch.where(none, scores[:, :1], scores), codes, logits)


@torch.no_grad()
def exact_search(model, trunk, labels, most=100_000):
    """The likeliest of all C ** M sequences of a text -> `SearchResult`, R = 1.

    The likeliest prefix is extended until it is complete, and then nothing in the queue can still overtake it. There
    are no duplicates to prune: what follows depends on every code before, so each prefix is a state of its own.
    Prefixes that end in the prompt all tie at 0 and are all extended: a long prompt is out of reach.
    Raises ValueError where a text needs more than `most` extensions, and for an LM with recurrent blocks."""
    check_resumable(model)
    with model.searching():
        logits = model.route(trunk)
        aligned, log_p, lengths = _Aligned(trunk, labels), logits.log_softmax(-1), trunk.real.sum(1).tolist()
        found = [_best_first(model, aligned, b, log_p[b, :m].tolist(), most) for b, m in enumerate(lengths)]
    costs, codes, expanded = zip(*found)
    codes = [prefix + [-1] * (logits.shape[1] - len(prefix)) for prefix in codes]
    codes, expanded = (torch.tensor(rows, device=logits.device) for rows in (codes, expanded))
    return SearchResult(codes, -logits.new_tensor(costs)[:, None], codes[:, None], logits, expanded=expanded)


def _best_first(model, aligned, b, log_p, most):
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
        rewards = _rewards(model, aligned, codes.new_tensor([b]), codes, DynamicCache())[0].tolist()
        for code, reward in enumerate(rewards):
            heappush(queue, (cost - reward, tie - log_p[len(prefix)][code], [*prefix, code]))
    return queue[0][0], queue[0][2], expanded


def check_resumable(model):
    """Raises ValueError for an LM with blocks that look back in another way than through keys and values, or that
    answers otherwise where a text comes in pieces: this is tried once, on six tokens."""
    layers = DynamicCache(config=model.config.get_text_config()).layers
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        raise ValueError(f"{type(model.lm).__name__} has recurrent or indexed blocks, which beam_search, exact_search "
                         f"and response_search cannot resume in the middle of a text: use plain search.")
    if getattr(model, "resumes", False):
        return
    ids, cache = torch.arange(6, device=model.device)[None], DynamicCache()
    with torch.no_grad(), model.searching(torch.float32):
        whole = model.backbone(input_ids=ids, use_cache=False).last_hidden_state
        pieces = [model.backbone(input_ids=piece, use_cache=True, **{_cache_name(model): cache}).last_hidden_state
                  for piece in ids.split(2, 1)]
    tolerance = max(1e-3, torch.finfo(model.dtype).eps ** 0.5)
    if cache.get_seq_length() != 6 or not (torch.cat(pieces, 1) - whole).abs().max() <= tolerance * whole.abs().max():
        raise ValueError(f"{type(model.lm).__name__} does not read a text in pieces as it reads it whole, which "
                         f"beam_search, exact_search and response_search rely on: use plain search.")
    model.resumes = True


def _cache_name(model):
    return "cache" if "cache" in inspect.signature(model.backbone.forward).parameters else "past_key_values"  # 5.24


class _Aligned:
    """The texts of a batch moved to begin in column 0 or, where the sizes (B,) of their `heads` are given, so that all
    heads end before column `border`: `padded` tells whether that takes padding on the left."""

    def __init__(self, trunk, labels, heads=None):
        lengths, last = (trunk.chunk >= 0).sum(1), trunk.chunk.shape[1] - 1
        heads = torch.zeros_like(lengths) if heads is None else heads
        pads = heads.max() - heads  # (B,)
        sizes = torch.stack([heads.max(), pads.max(), (pads + lengths).max()]).tolist()  # one wait for the device
        self.trunk, self.border, self.padded, width = trunk, sizes[0], sizes[1] > 0, sizes[2]
        position = torch.arange(width, device=pads.device) - pads[:, None]
        self.position = position.minimum(lengths[:, None] - 1)  # (B, L) < 0 before the text, at its last token after
        columns = trunk.first[:, :1] + self.position.clamp(min=0)
        self.ids = trunk.input_ids.gather(1, columns)  # (B, L)
        self.hidden = trunk.hidden.gather(1, columns[..., None].expand(-1, -1, trunk.hidden.shape[-1]))  # (B, L, H)
        targets = F.pad(targets_of(trunk, labels), (0, 1), value=-100).gather(1, columns.clamp(max=last))
        self.targets = targets.masked_fill(self.position < 0, -100)  # (B, L) the token after each, where it counts


def _rewards(model, aligned, text, codes, cache):
    """log p of what counts and is predicted from chunk m, after the prefixes `codes` (n, m), by code -> (n, C).

    `text` (n,): whose prefixes; `cache`: their keys and values, which are brought up to date if they are needed."""
    size, every = model.settings.chunk_size, model.settings.num_codes
    chunk = slice(codes.shape[1] * size, (codes.shape[1] + 1) * size)
    targets = aligned.targets[:, chunk]  # (B, q)
    rewards = torch.zeros(len(text) * every, device=codes.device)
    rows = (targets >= 0).any(1)[text].repeat_interleave(every).nonzero()[:, 0]  # in a prompt there are none
    if len(rows) and cache.get_seq_length() < chunk.start:
        _resume(model, aligned, text, codes, cache, chunk.start)
    for part in rows.split(SEARCH_ROWS) if len(rows) else ():
        parents, code = part // every, part % every
        extended = torch.cat([codes[parents], code[:, None]], 1)  # (rows, m + 1)
        output = _resume(model, aligned, text[parents], extended, _forked(cache, parents), chunk.stop)
        rewards[part] = model.score(output, targets[text[parents]])
    return rewards.view(-1, every)


def _resume(model, aligned, text, codes, cache, stop=None):
    """Run the columns up to `stop` that `cache` does not hold yet through the blocks above, steered by `codes` (n, m)
    -> their output."""
    new = slice(cache.get_seq_length(), stop)
    hidden = aligned.hidden[text, new]  # (n, q, H)
    position = aligned.position[text, :stop]
    token_codes = model.intervened(codes).gather(1, position[:, new].clamp(min=0) // model.settings.chunk_size)
    steered = hidden + model.vectors(token_codes, hidden.dtype)
    padding = model.padding((position >= 0).long(), position[:, new]) if aligned.padded else {}

    def inject():
        # An LM takes positions and mask sizes from block 0's keys, and that block does not run: dummies tell.
        dummy = steered[:, None, :, :1]  # (n, 1 head, q, 1)
        cache.update(dummy, dummy, 0)
        return steered

    with model.from_trunk(inject, aligned.trunk):
        ids, keys = aligned.ids[text, new], {_cache_name(model): cache}
        return model.backbone(input_ids=ids, use_cache=True, **keys, **padding)


def _forked(cache, rows):
    """A cache with these rows of `cache` (or several times the same), which stays as it is."""
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    fork.reorder_cache(rows)
    return fork


def step_values(out, labels, tokens):
    """What every step tells the log, as this micro-batch's part of it -> {name: tensor}.

    `best_nll`, `mean_nll`: the loss per response token under the best rollout, and on average over the rollouts."""
    terms = ("loss", "generalist", "steered", "policy", "prior")
    values = {name: out[name] for name in terms if out.get(name) is not None}
    if out.found is not None:
        share, score = (labels[:, 1:] >= 0).sum() / tokens, out.found.log_likelihood
        used = torch.zeros(out.found.logits.shape[-1] + 1, device=labels.device)
        used = used.index_fill(0, out.found.codes.flatten() + 1, 1.0)[1:].mean()
        spread = score.std(1, correction=int(score.shape[1] > 1)).mean()
        values |= {"best_nll": -score.amax(1).sum() / tokens, "mean_nll": -score.mean(1).sum() / tokens,
                   "codes_used": share * used, "spread": share * spread}
    return values


@torch.no_grad()
def look_closer(args, model, out, labels, tokens):
    """What no step needs to know, but the reader of the log does -> {name: tensor}.

    What the text costs under the router's argmax and without codes: best_nll is what a search finds that sees the
    answer, argmax_nll what is left of it without. And is the selection more than rounding (same_winner, noise)?"""
    trunk, found, values = out.trunk, out.found, {}
    share, nll = (labels[:, 1:] >= 0).sum() / tokens, lambda score: -score.sum() / tokens
    if found is None:  # the draws must not change those of the next step
        aside = torch.Generator(labels.device).manual_seed(args.seed)
        found = DLRModel.search(model, trunk, labels, generator=aside)
        score = found.log_likelihood
        values = {"best_nll": nll(score.amax(1)), "mean_nll": nll(score.mean(1))}
    argmax = found.logits.argmax(-1)[:, None]  # (B, 1, M)
    again = torch.cat([found.rollouts.flip(1), argmax, torch.full_like(argmax, -1)], 1)
    with model.searching(torch.float32):
        again = again.masked_fill(~trunk.real[:, None], -1)
        *scores, chosen, off = model.log_likelihood(trunk, labels, again).unbind(1)
    scores = torch.stack(scores, 1).flip(1)  # (B, N), in another order
    p = found.logits.softmax(-1)
    entropy = -(torch.xlogy(p, p).sum(-1) * trunk.real).sum() / trunk.real.sum()
    push = model.vectors(argmax[:, 0][trunk.real], torch.float32).norm(dim=-1).median() / typical_norm(trunk)
    noise = (scores - found.log_likelihood).std(1, correction=0).mean()
    same_winner = (scores.argmax(1) == found.log_likelihood.argmax(1)).float().mean()
    own = dict(entropy=entropy, push=push, noise=noise, same_winner=same_winner)
    return values | {"argmax_nll": nll(chosen), "off_nll": nll(off), **{k: share * v for k, v in own.items()}}


def selects_by_rounding(args, line):
    """Whether what the rollouts differ by is no more than the noise of their scores, at a step that was looked at.

    Scored again, in another order, they may be the same to the bit; float32 still keeps no more than about 1e-6."""
    searched = "noise" in line and "spread" in line and args.num_codes > 1 and args.rollouts > 1
    return searched and line["spread"] < max(2 * line["noise"], 1e-6)


def hindsight_gap(args):
    """From the last fifth of the looks in the log: what of the search's gain the router has without the answer."""
    lines = map(json.loads, Path(args.out, "log.jsonl").read_text().splitlines())
    looks = [line for line in lines if "argmax_nll" in line]
    looks = looks[-max(1, len(looks) // 5):]
    off, mean, best, argmax = (sum(line[f"{name}_nll"] for line in looks) / len(looks)
                               for name in ("off", "mean", "best", "argmax"))
    if args.num_codes == 1 or args.search in ("rollouts", "response") and args.rollouts == 1:
        found = "nothing was searched"
    elif off - best <= 1e-4:
        found = "the search finds nothing yet"
    elif argmax >= off:
        found = "the router's own codes are no better than none"
    else:
        found = f"the router recovers {100 * (off - argmax) / (off - best):.0f}% of what the search finds"
    return (f"Training loss at the end (nats per token): off {off:.4f}, rollouts' mean {mean:.4f}, router's argmax "
            f"{argmax:.4f}, best rollout {best:.4f}: {found}.")
