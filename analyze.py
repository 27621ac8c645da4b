"""What the codes do in a trained model, in numbers: switch them off, exchange them, count them.

    python analyze.py runs/tiny-arithmetic-dlr-s0                                     # --interventions and --codes
    python analyze.py runs/tiny-arithmetic-dlr-s0 --swap --search

--interventions answers the test set, and scores its reference responses, under seven conditions, paired by example:

    on             every chunk takes the router's argmax
    off            no chunk is steered: neither in the prompt nor in the answer
    off-answer     no chunk that begins in the answer is steered, but the prompt still is
    off-prompt     no chunk that begins in the prompt is steered, but the answer still is
    random         every chunk takes a code at random
    other          every chunk takes the code that another example has at that position
    frequent       every chunk takes the most frequent code of its position: what a fixed prompt of codes would do

--swap: wherever the router picks code k, one of the others steers instead. What does the model lose with this code?

--codes reads the router's choices on the reference texts, g for a code n-gram, t for a topic, m for a position:

    usage          entropy H of the codes, in bits, and 2^H, how many codes used equally have as much
    purity         max_t p(t | g), a mean over the n-grams seen often, weighted by how often. Two dull reasons lift it
                   above the topic prior max_t p(t): a code that marks the first chunk is as pure as first chunks are
                   (position-matched: mean of p(t_g | m) over the occurrences of g, t_g its topic), and a maximum over
                   few counts is high by chance (null: topics exchanged among texts of like length)
    information    I(code; label | m), in bits, for the code that steers the prediction of each answer digit, against
                   untrained routers (a linear map of h to an argmax knows something of any text) and shuffled labels

--search asks how near n rollouts, and a beam n wide, come to the best code sequence of a text, and what the router's
argmax, who does not see the text's answer, makes of it.

Sources: code n-grams, swaps and interventions after "Dynamic Latent Routing", arXiv 2605.14323 (2026); p = (1 + null as
pure) / (1 + all) after Phipson and Smyth (2010); the labels of digits after Quirke et al. (see data.py). All that is
printed goes to "analysis" in the run's metrics.json; figures.py draws it.
"""
import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import entropy

import data
from eval import (KEEP, OFF, answer, batches, choose_device, encode_to_answer, interval, load_data, load_run,
                  others_codes, reference_rows, response_nll, router_codes)
from search import beam_search

PASSES_ON, CARRIED = ("US", "SS", "UD", "ME"), ("US", "UC", "UD", "UB")  # labels of data.subtasks


def conditions(codes, prompt_lengths, chunk_size):
    """The seven conditions -> {name: intervention as `answer` takes it}.

    codes (N, M): the router's, -1 for none; prompt_lengths: N, in tokens."""
    begins = torch.arange(codes.shape[1]) * chunk_size
    in_prompt = begins < torch.tensor(prompt_lengths)[:, None]  # (N, M)
    frequent = [column[column >= 0].mode().values if (column >= 0).any() else torch.tensor(KEEP) for column in codes.T]
    return {"on": None, "off": "off", "off-answer": torch.where(in_prompt, KEEP, OFF),
            "off-prompt": torch.where(in_prompt, OFF, KEEP), "random": "random", "other": others_codes(codes),
            "frequent": torch.stack(frequent).expand_as(codes)}


def by_topic(topics, statistic):
    """{topic: statistic(indices of its examples)}, the most frequent topic first; examples without one are left out."""
    names, counts = np.unique([topic for topic in topics if topic is not None], return_counts=True)
    return {str(name): statistic([i for i, topic in enumerate(topics) if topic == name])
            for name in names[np.argsort(-counts, kind="stable")]}


def interventions(model, tokenizer, examples, on, rows, seed=0, **settings):
    """Accuracy and NLL under the seven conditions -> {condition: {strict, change, cut_off, nll, nll_change, topics}}.

    on: (predictions, codes) of `answer` without intervention; rows: the reference texts; `settings` go to `answer`.
    Intervals are (mean, low, high); changes are differences to "on", paired by example."""
    prompts, room = encode_to_answer(model, tokenizer, examples, settings["max_new_tokens"])
    size = model.settings.chunk_size
    width = -(-(max(map(len, prompts)) + room) // size)  # an answer may get longer than it is with "on"
    codes = F.pad(on[1], (0, max(0, width - on[1].shape[1])), value=KEEP)
    answered = conditions(codes, list(map(len, prompts)), size)
    scored = conditions(router_codes(model, rows, settings["batch_size"]), [n for _, n in rows], size)
    topics, result, before = [example.topic for example in examples], {}, None
    for name, use in answered.items():
        torch.manual_seed(seed)
        predictions = on[0] if name == "on" else answer(model, tokenizer, examples, use, label=name, **settings)[0]
        strict = np.array([prediction["strict"] for prediction in predictions], dtype=float)
        torch.manual_seed(seed)
        nll, tokens = response_nll(model, rows, scored[name], settings["batch_size"])
        before = before or (strict, nll)
        result[name] = {
            "strict": interval(strict), "change": interval(strict - before[0]),
            "cut_off": float(np.mean([prediction["cut_off"] for prediction in predictions])),
            "nll": interval(nll, tokens), "nll_change": interval(nll - before[1], tokens),
            "topics": by_topic(topics, lambda chosen: interval(strict[chosen])),
        }
    return result


def swap(model, tokenizer, examples, on, seed=0, **settings):
    """Swap every used code for random others -> {"codes": {code: {share, change, topics}}, "mean": mean change}.

    share: of all steered chunks, prompt and answer; changes in strict accuracy are paired (mean, low, high)."""
    before = np.array([prediction["strict"] for prediction in on[0]], dtype=float)
    codes, topics, result, every = on[1], [example.topic for example in examples], {}, model.settings.num_codes
    for k in codes[codes >= 0].unique().tolist():
        touched = (codes == k).any(1).nonzero()[:, 0].tolist()  # where k never steers, the answer stays
        other = lambda codes: (codes + torch.randint_like(codes, 1, every)) % every
        torch.manual_seed(seed)
        predictions, _ = answer(model, tokenizer, [examples[i] for i in touched], label=f"without code {k}", **settings,
                                intervention=lambda codes, k=k: torch.where(codes == k, other(codes), codes))
        after = before.copy()
        after[touched] = [prediction["strict"] for prediction in predictions]
        result[str(k)] = {"share": (codes == k).sum().item() / (codes >= 0).sum().item(),
                          "change": interval(after - before),
                          "topics": by_topic(topics, lambda chosen: interval((after - before)[chosen]))}
    return {"codes": result, "mean": float(np.mean([row["change"][0] for row in result.values()]))}


@torch.no_grad()
def activity(model, codes, rows, batch_size):
    """How the codebook is used on the reference texts, and how hard it pushes -> dict.

    codes (n, M). Norms are set against the median |h| where steering is added, without each text's first token, which
    is often a hundred times as long as the others (an attention sink)."""
    norms = []
    for batch in batches([len(ids) for ids, _ in rows], batch_size):
        texts = data.collate([rows[i] for i in batch], device=model.device)
        trunk, later = model.trunk(texts["input_ids"], texts["attention_mask"]), texts["attention_mask"][:, 1:].bool()
        norms.append(trunk.hidden.float().norm(dim=-1)[:, 1:][later].cpu())
    typical = torch.cat(norms).median().item()
    taken = codes[codes >= 0].numpy()  # (steered chunks,)
    uses = np.bincount(taken, minlength=model.settings.num_codes)  # (C,)
    vectors = model.codebook.detach().double().cpu().numpy()  # (C, H)
    length = np.linalg.norm(vectors, axis=1)
    unit = vectors[(uses > 0) & (length > 0)] / length[(uses > 0) & (length > 0), None]
    cosines = (unit @ unit.T)[~np.eye(len(unit), dtype=bool)]
    push = model.settings.scale * model.unit.item() * length / typical
    bits = float(entropy(uses, base=2))
    return {"uses": uses.tolist(), "used": float((uses > 0).mean()), "entropy": bits, "effective": 2**bits,
            "cosine": float(cosines.mean()) if len(cosines) else None, "state_norm": typical,
            "push_median": float(np.median(push[taken])), "push_max": float(push[uses > 0].max())}


def pair_counts(a, b):
    """How often each pair of values occurs in the integer arrays a, b (n,), from 0 on -> (a.max() + 1, b.max() + 1)."""
    width = b.max() + 1
    return np.bincount(a * width + b, minlength=(a.max() + 1) * width).reshape(-1, width)


def purity(codes, topics, n, min_count=30, permutations=200, seed=0):
    """Topic purity of the code n-grams that occur `min_count` times -> dict; None where there is no such n-gram.

    codes (N, M) NumPy, -1 behind a text's end; topics: N names. `null` holds mean and 95% quantile of the purity with
    topics exchanged among texts of like length (the tenth of the texts they belong to), `p` its one-sided test."""
    if codes.shape[1] < n:
        return None
    _, topic = np.unique(topics, return_inverse=True)
    windows = np.lib.stride_tricks.sliding_window_view(codes, n, axis=1)  # (N, M - n + 1, n)
    text, position = np.nonzero((windows >= 0).all(-1))  # (W,)
    key = windows[text, position] @ (int(codes.max()) + 1) ** np.arange(n)
    _, gram, seen = np.unique(key, return_inverse=True, return_counts=True)
    often = seen[gram] >= min_count
    if not often.any():
        return None
    share = pair_counts(position, topic[text])
    share = share / share.sum(1, keepdims=True)  # (M - n + 1, topics): p(t | m)
    prior = np.bincount(topic[text]).max() / len(text)
    text, position, (_, gram) = text[often], position[often], np.unique(gram[often], return_inverse=True)
    counts = pair_counts(gram, topic[text])  # (n-grams, topics)
    seen_purity = counts.max(1).sum() / len(gram)
    length = (codes >= 0).sum(1)
    alike = np.digitize(length, np.quantile(length, np.arange(0.1, 1, 0.1)))  # texts of one length stay together
    place, rng, null = np.argsort(alike, kind="stable"), np.random.default_rng(seed), []
    for _ in range(permutations):
        exchanged = np.empty_like(topic)
        exchanged[place] = topic[np.lexsort((rng.random(len(topic)), alike))]
        null.append(pair_counts(gram, exchanged[text]).max(1).sum() / len(gram))
    return {"ngrams": len(counts), "purity": float(seen_purity), "prior": float(prior),
            "position_matched": float(share[position, counts.argmax(1)[gram]].mean()),
            "null": [float(np.mean(null)), float(np.quantile(null, 0.95))],
            "p": (1 + int(np.sum(np.array(null) >= seen_purity))) / (1 + permutations)}


def mutual_information(x, y):
    """I(x; y | position) and H(y | position) in bits, plug-in estimates: means over the columns where y varies.

    x, y: integer arrays (n, positions), from 0 on."""
    found = []
    for a, b in zip(x.T, y.T):
        counts = pair_counts(a, b)
        possible = entropy(counts.sum(0), base=2)
        if possible > 0:
            found.append((entropy(counts.sum(1), base=2) + possible - entropy(counts.ravel(), base=2), possible))
    return tuple(np.mean(found, axis=0).tolist()) if found else (0.0, 0.0)


def digit_chunks(tokenizer, examples, rows, chunk_size):
    """The chunk that each answer digit is predicted from: that of the token before it. -> (n, digits) NumPy.

    None where a digit is not a token of its own, or lies behind the end of a row that was cut."""
    chunks = []
    for example, (ids, prompt_length) in zip(examples, rows):
        if not tokenizer.is_fast:
            return None
        spans = tokenizer(example.response, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        start = example.response.rindex(example.answer)
        wanted = [(at, at + 1) for at in range(start, start + len(example.answer))]
        if not set(wanted) <= set(spans) or prompt_length + spans.index(wanted[-1]) >= len(ids):
            return None
        chunks.append([(prompt_length + spans.index(span) - 1) // chunk_size for span in wanted])
    return np.array(chunks)


def digit_information(model, tokenizer, examples, rows, codes, batch_size, seed=0, routers=5, shuffles=20):
    """What codes tell of the answer digits of sums -> {label: {bits, possible, random_router, null}}; None as above."""
    chunks = digit_chunks(tokenizer, examples, rows, model.settings.chunk_size)
    if chunks is None:
        return None
    of_digits = lambda codes: np.take_along_axis(codes.numpy(), chunks, axis=1)  # (n, digits)
    trained, untrained, rng = model.router.weight.data, [], np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    try:
        for _ in range(routers):
            model.router.weight.data = (0.01 * torch.randn(trained.shape, generator=generator)).to(trained)
            untrained.append(of_digits(router_codes(model, rows, batch_size)))
    finally:
        model.router.weight.data = trained
    names = np.array([example.labels for example in examples])  # (n, digits)
    labels = {"sub-task": names, "sums to 9": np.isin(names, PASSES_ON), "carry in": np.isin(names, CARRIED),
              "digit": np.array([list(example.answer) for example in examples])}
    result = {}
    for name, label in labels.items():
        label = np.unique(label, return_inverse=True)[1].reshape(chunks.shape)
        bits, possible = mutual_information(of_digits(codes), label)
        null = [mutual_information(of_digits(codes), rng.permuted(label, axis=0))[0] for _ in range(shuffles)]
        result[name] = {"bits": bits, "possible": possible, "null": float(np.mean(null)),
                        "random_router": float(np.mean([mutual_information(x, label)[0] for x in untrained]))}
    return result


@torch.no_grad()
def search_gap(model, rows, batch_size, seed=0, most=64):
    """What searches of several sizes find -> {"n": [...], "rollouts": NLLs, "beam": NLLs, "argmax", "off", "optimum"}.

    NLL in nats per response token of the reference texts, under the best of n rollouts and the best of a beam n wide;
    "optimum" (None where the codes have more than 4096 sequences) drops no prefix but at the last chunk."""
    numbers, total, tokens = [2**i for i in range(most.bit_length())], Counter(), 0  # total: log p by what found it
    for batch in batches([len(ids) for ids, _ in rows], batch_size):
        texts = data.collate([rows[i] for i in batch], device=model.device)
        trunk, labels = model.trunk(texts["input_ids"], texts["attention_mask"]), texts["labels"]
        found = model.search(trunk, labels, most, generator=torch.Generator(model.device).manual_seed(seed))
        beam = lambda n: beam_search(model, trunk, labels, n).log_likelihood[:, 0].sum().item()
        for name, codes in (("argmax", None), ("off", torch.full_like(found.codes, -1))):
            total[name] += model.log_likelihood(trunk, labels, codes).sum().item()
        total.update({("rollouts", n): found.log_likelihood[:, :n].amax(1).sum().item() for n in numbers})
        total.update({("beam", n): beam(n) for n in numbers})
        wide = model.settings.num_codes ** (trunk.real.shape[1] - 1)
        total["optimum"] += np.nan if wide * model.settings.num_codes > 4096 else beam(wide)
        tokens += (labels[:, 1:] >= 0).sum().item()
    nll = {name: -value / tokens for name, value in total.items()}
    return {"n": numbers, **{name: [nll[name, n] for n in numbers] for name in ("rollouts", "beam")},
            "argmax": nll["argmax"], "off": nll["off"], "optimum": None if np.isnan(nll["optimum"]) else nll["optimum"]}


def search_text(found):
    """The table of `search_gap` as lines of text."""
    optimum = "too many sequences" if found["optimum"] is None else f"{found['optimum']:.4f}"
    rows = [f"{name:<10}" + "".join(f"{value:8.4f}" for value in found[name]) for name in ("rollouts", "beam")]
    return "\n".join([f"NLL: off {found['off']:.4f}, router's argmax {found['argmax']:.4f}, optimum {optimum}",
                      "n         " + "".join(f"{n:8}" for n in found["n"]), *rows])


def triple(values, form, factor=1):
    """(mean, low, high) as text."""
    return f"{form} [{form}, {form}]".format(*(factor * value for value in values))


def interventions_text(found):
    """The seven conditions as lines of text."""
    lines = [f"{'':<10} {'strict %  (95%)':<20} {'change to on, points':<22} {'cut off %':>9}   "
             f"{'NLL, nats a token':<24} change to on"]
    for name, row in found.items():
        change = "" if name == "on" else triple(row["change"], "{:+5.1f}", 100)
        nll_change = "" if name == "on" else triple(row["nll_change"], "{:+.4f}")
        lines.append(f"{name:<10} {triple(row['strict'], '{:5.1f}', 100)} {change:<22} {100 * row['cut_off']:9.1f}   "
                     f"{triple(row['nll'], '{:.4f}'):<24} {nll_change}".rstrip())
    return "\n".join(lines)


def swap_text(found):
    """What each code is worth as lines of text, with the change in each of the six most frequent topics."""
    topics = list(next(iter(found["codes"].values()))["topics"])[:6]
    lines = [f"code  chunks %  {'change when swapped, points':<28}" + "".join(f" {topic[:12]:>12}" for topic in topics)]
    for k, row in sorted(found["codes"].items(), key=lambda item: item[1]["change"][0]):
        lines.append(f"{k:>4} {100 * row['share']:9.1f}  {triple(row['change'], '{:+5.1f}', 100):<28}"
                     + "".join(f" {100 * row['topics'][topic][0]:+12.1f}" for topic in topics))
    return "\n".join([*lines, f"mean over the codes: {100 * found['mean']:+.1f} points"])


def codes_text(found, min_count):
    """Codebook activity, topic purity and what codes tell of digits as lines of text."""
    cosine = "none" if found["cosine"] is None else f"{found['cosine']:.3f}"
    lines = [f"{100 * found['used']:.0f}% of {len(found['uses'])} codes used; entropy {found['entropy']:.2f} bits, "
             f"like {found['effective']:.1f} codes used equally; mean cosine between code vectors {cosine}",
             f"|alpha e| is {100 * found['push_median']:.1f}% of the median |h|, which is {found['state_norm']:.1f} "
             f"(median over chunks; the longest code used: {100 * found['push_max']:.1f}%)"]
    if "purity" in found:
        lines.append("n  n-grams  purity  topic prior  position-matched  null (95%)       p")
        for n, row in found["purity"].items():
            lines.append(f"{n} {0:8} seen {min_count} times" if row is None else
                         "{n} {ngrams:8} {purity:7.3f} {prior:12.3f} {position_matched:17.3f}  {null[0]:.3f} "
                         "({null[1]:.3f}) {p:7.3f}".format(n=n, **row))
    else:
        lines.append("The data has no topics, so there is no topic purity.")
    if found.get("digits"):
        lines.append(f"{'bits about':<11} code  of at most  random router  shuffled labels")
        lines += ["{name:<10} {bits:5.3f} {possible:11.3f} {random_router:14.3f} {null:16.3f}".format(name=name, **row)
                  for name, row in found["digits"].items()]
    elif "digits" in found:
        lines.append("What codes tell of answer digits is not computed: it needs one token a digit.")
    return "\n".join(lines)


def parse_args(argv=None):
    """The settings of an analysis. -> argparse.Namespace"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"analyze.py: {message}; see --help.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder(s) written by train.py, with codes")
    parser.add_argument("--interventions", action="store_true", help="accuracy and NLL with codes on, off, exchanged")
    parser.add_argument("--swap", action="store_true", help="swap each code for random others: change in accuracy")
    parser.add_argument("--codes", action="store_true", help="usage, topic purity, what codes tell of answer digits")
    parser.add_argument("--search", action="store_true", help="what n rollouts and a beam of n find, on 128 texts")
    parser.add_argument("--min-count", type=int, default=30, help="how often an n-gram must occur to count")
    parser.add_argument("--test", type=int, help="test examples, 0 = all (default: as in the run)")
    parser.add_argument("--max-new-tokens", type=int, help="length limit of an answer (default: as in the run)")
    parser.add_argument("--batch-size", type=int, help="prompts at once (default: as in the run)")
    parser.add_argument("--data-dir", help="folder with <task>/<split>.jsonl (default: as in the run)")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu or auto")
    parser.add_argument("--seed", type=int, default=0, help="of random codes, swaps, permutations, untrained routers")
    args = parser.parse_args(argv)
    for name in ("min_count", "max_new_tokens", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, it must be at least 1")
    if not (args.interventions or args.swap or args.codes or args.search):
        args.interventions = args.codes = True
    return args


def load(run, args, device):
    """-> (model, tokenizer, config, what metrics.json holds so far); flags go before the run's own settings.
    Raises OSError or ValueError where the run is not finished, has no codes, or needs --max-new-tokens."""
    if Path(run, "config.json").is_file() and not Path(run, "model", "dlr.safetensors").is_file():
        raise FileNotFoundError("it has no codes (no model/dlr.safetensors), so there is nothing to analyse.")
    model, tokenizer, config = load_run(run, device)
    config["batch_size"] = config["eval_batch_size"]
    for name in ("test", "max_new_tokens", "data_dir", "batch_size"):
        config[name] = config[name] if getattr(args, name) is None else getattr(args, name)
    if not config["max_new_tokens"] and (args.interventions or args.swap):
        raise ValueError("it was evaluated without answers; say how long they may get with --max-new-tokens.")
    return model, tokenizer, config, json.loads(Path(run, "metrics.json").read_text())


def analyse_codes(model, tokenizer, kept, rows, batch_size, min_count, seed):
    """--codes: activity, topic purity for n = 1 to 4, and what codes tell of answer digits -> dict."""
    codes = router_codes(model, rows, batch_size)
    found = activity(model, codes, rows, batch_size)
    topics = [(i, example.topic) for i, example in enumerate(kept) if example.topic is not None]
    if topics:
        texts, names = map(list, zip(*topics))
        found["purity"] = {n: purity(codes[texts].numpy(), names, n, min_count, seed=seed) for n in range(1, 5)}
    if all(example.labels for example in kept):
        found["digits"] = digit_information(model, tokenizer, kept, rows, codes, batch_size, seed)
    return found


def analyse(args, model, tokenizer, examples, kept, rows, **settings):
    """Run and print the analyses that were asked for -> {name: what was found}, for metrics.json."""
    found, answered = {}, args.interventions or args.swap
    on = answer(model, tokenizer, examples, label="on", **settings) if answered else None
    if args.interventions:
        found["interventions"] = interventions(model, tokenizer, examples, on, rows, args.seed, **settings)
        print(interventions_text(found["interventions"]), end="\n\n")
    if args.swap and model.settings.num_codes == 1:
        print("One code alone cannot be swapped for another.\n")
    elif args.swap:
        found["swap"] = swap(model, tokenizer, examples, on, args.seed, **settings)
        print(swap_text(found["swap"]), end="\n\n")
    if args.search:
        found["search"] = search_gap(model, rows[:128], settings["batch_size"], args.seed)
        print(search_text(found["search"]), end="\n\n")
    if args.codes:
        found["codes"] = analyse_codes(model, tokenizer, kept, rows, settings["batch_size"], args.min_count, args.seed)
        print(codes_text(found["codes"], args.min_count), end="\n\n")
    return found


def write_analysis(run, metrics, found, settings):
    """Put what was found, and the settings it was found with, into the run's metrics.json, beside what is there."""
    before = metrics.get("analysis", {})
    settings = {**before.get("settings", {}), **{name: settings for name in found}}
    part = Path(run, "metrics.part")  # a kill cannot leave half of the file
    part.write_text(json.dumps({**metrics, "analysis": {**before, **found, "settings": settings}}, indent=2) + "\n")
    os.replace(part, Path(run, "metrics.json"))


def main(argv=None):
    args, left_out = parse_args(argv), []
    for run in args.runs:
        try:
            model, tokenizer, config, metrics = load(run, args, choose_device(args.device))
            examples = load_data(config)["test"]
            kept, rows = reference_rows(examples, tokenizer, config["max_length"])
            if not rows:
                raise ValueError(f"no test prompt leaves room for a response within {config['max_length']} tokens.")
            kept = [examples[i] for i in kept]
        except (OSError, ValueError) as error:
            left_out.append(f"analyze.py: {run} is left out: {error}".splitlines()[0])
            continue
        print(f"{run}: {len(examples)} test examples of {config['data']}, {model.settings.num_codes} codes\n")
        settings = dict(max_new_tokens=config["max_new_tokens"], batch_size=config["batch_size"])
        found = analyse(args, model, tokenizer, examples, kept, rows, **settings)
        given = {"test": len(examples), "seed": args.seed, "min_count": args.min_count, **settings}
        write_analysis(run, metrics, found, given)
    if left_out:
        sys.exit("\n".join(left_out))


if __name__ == "__main__":
    main()
