"""Evaluate runs: generate an answer to every test prompt, with the codes on, off, random, and taken from elsewhere.

    python eval.py runs/tiny-arithmetic-dlr-s0                              # one run: load it, answer, print
    python eval.py --saved --against runs/sft-s0 runs/dlr-s0 runs/sft-s0    # compare the answers that the runs hold
    python eval.py --saved --seeds --against runs/sft-s0 runs/*-s?          # runs that differ in seed only are one row
    python eval.py --saved --seeds --by nll --against runs/sft-s0 runs/*-s?     # the same in NLL instead of accuracy

"Off costs accuracy" alone says little: any constant vector that the model got used to would do the same. So a model
with codes is looked at under five conditions, all on the same weights (but for `base`):

    base      the LM before post-training (only in train.py, which has it)
    steered   every chunk takes the router's argmax
    off       no chunk is steered, neither in the prompt nor in the answer
    random    every chunk takes a code at random: does it matter *which* codes steer?
    other     every chunk takes the code that another test example had at that position: does the *text* matter?

A run without codes has one condition, named after its method. analyze.py has more interventions.

Accuracy is strict (the answer after `####`) and flexible (else the last number, letter or yes/no), each as a mean over
test examples with a 95% bootstrap interval. Cut off are answers that did not end within --max-new-tokens: where that
share is high, accuracy measures length. NLL is the mean loss per token of the reference responses, in nats ("other"
takes its codes from another reference text); --max-new-tokens 0 measures only that, and saves the time that answers
take. A comparison, of accuracy or of NLL, is paired: the difference is taken example by example, then averaged, with a
bootstrap interval and p value.
"""
import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from scipy.stats import bootstrap
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import baselines
import data
from dlr import DLRModel

ROUTED = ("dlr", "soft")  # the methods that have codes
CONDITIONS = ("base", "steered", "off", "random", "other")
LACKING = {"strict": "it holds no answers; give --by nll, or answer its test set with --max-new-tokens.",
           "nll": "it does not hold the NLL of each example; evaluate it anew (eval.py --max-new-tokens 0 will do)."}
KEEP, OFF = -1, -2  # in a table of codes: leave the router's choice; steer nothing


def conditions_of(method, wanted=CONDITIONS):
    """The conditions under which a run of this method is evaluated: first the one that stands for the run, which is
    always among them, then what is `wanted` of the others (but for `base`, which is another model)."""
    if method not in ROUTED:
        return (method,)
    return ("steered", *(name for name in CONDITIONS[2:] if name in wanted))


def processes():
    """-> (which process this is, of how many): (0, 1) unless torchrun has started several."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def choose_device(name="auto"):
    """"auto" -> CUDA, else Apple MPS, else the CPU. -> torch.device; raises ValueError for one that is not here."""
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:  # an unknown name; a backend that this torch was built without
            raise ValueError(f"--device {name} cannot be used here ({str(error).splitlines()[0]}): cuda, mps or cpu?")
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def interval(values, weights=None):
    """sum(values) / sum(weights), both (n,), with its 95% percentile bootstrap interval -> (ratio, low, high).

    Without weights, that is the mean of the values; of nats, with tokens for weights, nats per token."""
    return compare(values, 0, weights)[:3]


def compare(a, b, weights=None):
    """`interval` of the paired difference a - b of two runs on the same examples (n,) -> (ratio, low, high, p).

    5000 resamples of the examples, seeded; p is two-sided: twice the smaller share of them on either side of zero."""
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    weights = np.ones(len(difference)) if weights is None else weights
    if np.ptp(difference / weights) == 0:  # nothing to resample
        return (float(difference[0] / weights[0]),) * 3 + (float(difference[0] == 0),)
    ratio = lambda above, below, axis=-1: above.sum(axis) / below.sum(axis)
    ratios = bootstrap((difference, weights), ratio, paired=True, n_resamples=5000, batch=500, method="percentile",
                       rng=0).bootstrap_distribution
    tail = min((ratios <= 0).sum(), (ratios >= 0).sum())
    return (float(ratio(difference, weights)), *map(float, np.quantile(ratios, [0.025, 0.975])),
            float(min(1.0, 2 * (tail + 1) / (len(ratios) + 1))))


def others_codes(codes):
    """For every example and chunk, the code that another example used at that position: codes (N, M) -> (N, M).

    Each column is rotated by one among the examples that have a code there; KEEP where there is no other."""
    others = torch.full_like(codes, KEEP)
    for m in range(codes.shape[1]):
        rows = (codes[:, m] >= 0).nonzero()[:, 0]
        if len(rows) > 1:
            others[rows, m] = codes[rows.roll(1), m]
    return others


def table_intervention(table):
    """An intervention that steers with codes from a table (rows, M): KEEP and beyond it the router's, OFF with none."""
    def intervention(codes):
        given = torch.full_like(codes, KEEP)
        width = min(codes.shape[1], table.shape[1])
        given[:, :width] = table[:, :width]
        return torch.where(given == KEEP, codes, given.clamp(min=-1))
    return intervention


def batches(lengths, batch_size):
    """Indices of examples in batches of like length (little padding), the longest first (memory is known at once).

    Of several processes each gets its share of the batches; `gathered` brings together what comes of them."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    rank, world = processes()
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)][rank::world]


def gathered(results):
    """Results by index, of this process's examples -> the list of all, in order: processes bring theirs together."""
    world = processes()[1]
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, results)
        results = {i: result for part in parts for i, result in part.items()}
    return [results[i] for i in sorted(results)]


def encode_to_answer(model, tokenizer, examples, max_new_tokens):
    """Prompts that leave the model room -> (lists of token ids, new tokens that all of them leave room for).

    The answers get what the prompts leave; a prompt of more than half the context loses its beginning."""
    prompts = data.encode_prompts([example.prompt for example in examples], tokenizer)
    limit = getattr(model.lm.config.get_text_config(), "max_position_embeddings", None)
    if limit:
        prompts = [ids[-max(limit - max_new_tokens, limit // 2):] for ids in prompts]
        max_new_tokens = min(max_new_tokens, limit - max(map(len, prompts)))
    return prompts, max_new_tokens


@torch.no_grad()
def answer(model, tokenizer, examples, intervention=None, max_new_tokens=256, batch_size=16, label=""):
    """Greedy answers to the prompts -> (predictions, codes).

    `intervention`: None, "off", "random", or a table of codes (N, M) for the N examples. predictions: one dict an
    example (prompt, answer, ids, text, strict, flexible, cut_off); codes (N, M) steered it, -1 after its end."""
    device = model.device
    prompts, max_new_tokens = encode_to_answer(model, tokenizer, examples, max_new_tokens)
    found = {}
    for batch in tqdm(batches(list(map(len, prompts)), batch_size), f"answering {label}", leave=False,
                      disable=processes()[0] > 0):
        input_ids, mask = data.collate_prompts([prompts[i] for i in batch], device=device)
        use = table_intervention(intervention[batch].to(device)) if torch.is_tensor(intervention) else intervention
        with model.intervene(use):
            # the sampling settings that some models bring along are switched off: every model answers alike
            output = model.generate(input_ids, mask, max_new_tokens=max_new_tokens, do_sample=False, temperature=None,
                                    top_p=None, top_k=None, repetition_penalty=None,
                                    eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id)
        for i, ids, codes in zip(batch, output[:, input_ids.shape[1]:].tolist(), model.last_codes.cpu()):
            ended = tokenizer.eos_token_id in ids
            ids = ids[: ids.index(tokenizer.eos_token_id)] if ended else ids
            text = tokenizer.decode(ids, skip_special_tokens=True)
            strict, flexible = data.score(text, examples[i].answer)
            prediction = {"prompt": examples[i].prompt, "answer": examples[i].answer, "ids": ids, "text": text,
                          "strict": strict, "flexible": flexible, "cut_off": not ended}
            found[i] = prediction, codes[: -(-(len(prompts[i]) + len(ids)) // model.settings.chunk_size)].clone()
    predictions, rows = map(list, zip(*gathered(found)))
    return predictions, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def reference_rows(examples, tokenizer, max_length):
    """Reference texts -> (indices of examples whose prompt leaves room for a response, their rows of `data.encode`)."""
    lengths = map(len, data.encode_prompts([example.prompt for example in examples], tokenizer))
    kept = [i for i, length in enumerate(lengths) if length < max_length]
    return kept, data.encode([examples[i] for i in kept], tokenizer, max_length)[0]


@torch.no_grad()
def router_codes(model, rows, batch_size):
    """The router's argmax in the chunks of `rows` (see `data.encode`) -> codes (n, M) on the CPU, -1 for no chunk.

    Nothing is predicted from a row's last token, so a chunk that begins there is none."""
    chunks = [-(-(len(ids) - 1) // model.settings.chunk_size) for ids, _ in rows]
    found = {}
    for batch in batches([len(ids) for ids, _ in rows], batch_size):
        texts = data.collate([rows[i] for i in batch], device=model.device)
        trunk = model.trunk(texts["input_ids"], texts["attention_mask"])
        for i, chosen in zip(batch, model.route(trunk).argmax(-1).cpu()):
            found[i] = chosen[: chunks[i]].clone()
    return torch.nn.utils.rnn.pad_sequence(gathered(found), batch_first=True, padding_value=-1)


@torch.no_grad()
def response_nll(model, rows, intervention=None, batch_size=16):
    """Summed NLL in nats, and number, of the response tokens of each row -> (nll (n,), tokens (n,)), NumPy arrays.

    `intervention` as in `answer`; a table (n, M) belongs to the reference texts."""
    found = {}
    for batch in batches([len(ids) for ids, _ in rows], batch_size):
        texts = data.collate([rows[i] for i in batch], device=model.device)
        use = table_intervention(intervention[batch].to(model.device)) if torch.is_tensor(intervention) else intervention
        with model.intervene(use):
            nll = -model.log_likelihood(model.trunk(texts["input_ids"], texts["attention_mask"]), texts["labels"])
        found.update(zip(batch, zip(nll.tolist(), (texts["labels"][:, 1:] >= 0).sum(1).tolist())))
    return np.array(gathered(found), dtype=float).reshape(-1, 2).T


def evaluate(model, tokenizer, examples, conditions, seed=0, max_length=512, max_new_tokens=256, batch_size=16):
    """Answer the examples under each of the named conditions -> (metrics, predictions), dicts by condition.

    Any other name than those of the docstring is the model without steering. max_new_tokens=0 answers nothing. The
    "nll" of a prediction: nats and tokens of the reference response, (0, 0) where the prompt leaves no room for one."""
    model.eval()
    kept, rows = reference_rows(examples, tokenizer, max_length)
    metrics, predictions, codes = {}, {}, None
    for condition in conditions:
        other = others_codes(router_codes(model, rows, batch_size)) if condition == "other" and rows else None
        use = {"steered": None, "random": "random", "other": other}.get(condition, "off")
        torch.manual_seed(seed)  # for "random"
        nll, tokens = response_nll(model, rows, use, batch_size)
        found = [{"prompt": example.prompt, "answer": example.answer} for example in examples]
        if max_new_tokens:
            use = others_codes(codes) if condition == "other" else use  # of answers, not of reference responses
            torch.manual_seed(seed)
            found, used = answer(model, tokenizer, examples, use, max_new_tokens, batch_size, condition)
            codes = used if condition == "steered" else codes
            found = [{**prediction, "codes": row[row >= 0].tolist()} for prediction, row in zip(found, used)]
        scored = dict(zip(kept, zip(nll.tolist(), tokens.tolist())))
        predictions[condition] = [{**prediction, "nll": scored.get(i, (0, 0))} for i, prediction in enumerate(found)]
        metrics[condition] = {**summarise(found), "nll": float(nll.sum() / tokens.sum()) if rows else None}
    return metrics, predictions


def summarise(predictions):
    """Accuracies with their intervals, and lengths, of a list of predictions -> dict; just "n" without answers."""
    if "ids" not in predictions[0]:
        return {"n": len(predictions)}
    column = lambda name: [prediction[name] for prediction in predictions]
    return {"strict": interval(column("strict")), "flexible": interval(column("flexible")), "n": len(predictions),
            "cut_off": float(np.mean(column("cut_off"))), "tokens": float(np.mean(list(map(len, column("ids")))))}


def table(metrics):
    """The conditions of a run as lines of text; - for what was not measured."""
    percent = lambda value: "{:5.1f}  [{:5.1f}, {:5.1f}]".format(*(100 * v for v in value))
    wide = max(9, *map(len, metrics))
    lines = [f"{'':<{wide}} {'strict %  (95%)':<22} {'flexible %  (95%)':<22} "
             f"{'cut off %':>9} {'tokens':>7} {'NLL':>7}"]
    for name, row in metrics.items():
        found, nll = f"{'-':>5} {'-':>21} {'-':>25} {'-':>7}", row.get("nll")
        if "strict" in row:
            accuracy = f"{percent(row['strict'])} {percent(row['flexible'])}"
            found = f"{accuracy} {100 * row['cut_off']:9.1f} {row['tokens']:7.1f}"
        lines.append(f"{name:<{wide}} {found} {'-' if nll is None else format(nll, '.4f'):>7}")
    return "\n".join(lines)


def write_results(run, metrics, predictions, **more):
    """`metrics.json` (what is there of other conditions stays) and `predictions.jsonl` (a line an answer) of a run."""
    path = Path(run, "metrics.json")
    before = json.loads(path.read_text()) if path.is_file() else {}
    before = {**before, **more, "test": {**before.get("test", {}), **metrics}}
    lines_path = Path(run, "predictions.jsonl")
    kept = map(json.loads, lines_path.read_text().splitlines()) if lines_path.is_file() else []
    lines = [line for line in kept if line["condition"] not in predictions]
    lines += [{"condition": name, **row} for name, rows in predictions.items() for row in rows]
    lines_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path.write_text(json.dumps(before, indent=2) + "\n")


def read_config(run):
    """The settings of a finished run. Raises FileNotFoundError for a folder that is not one."""
    if not all(Path(run, name).exists() for name in ("config.json", "metrics.json", "predictions.jsonl", "model")):
        raise FileNotFoundError(f"{run} is not a finished run: it should hold config.json, metrics.json and model/.")
    return json.loads(Path(run, "config.json").read_text())


def load_run(run, device="cpu"):
    """A finished run folder -> (model, tokenizer, config). A run without codes comes as a DLRModel that never steers.

    Raises FileNotFoundError for a folder that is not a finished run."""
    run = Path(run)
    config = read_config(run)
    if (run / "model" / "dlr_config.json").is_file():
        model = DLRModel.from_pretrained(run / "model", dtype=torch.float32)
    else:
        model = DLRModel(AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32))
    return model.to(device).eval(), AutoTokenizer.from_pretrained(run / "model"), config


def load_data(config):
    """The splits of a run as its model reads them, from its settings. -> dict as `data.load` gives it"""
    names = ("n", "val", "test", "seed", "data_dir", "digits", "ops", "nines")
    splits = data.load(config["data"], **{name: config[name] for name in names if name in config})
    if config["method"] == "pause":
        splits = {split: baselines.with_pauses(examples, config.get("pauses", 10)) for split, examples in splits.items()}
    return splits


@dataclass
class Result:
    """A run that was evaluated: `metrics` and `predictions` by condition."""

    run: str
    config: dict
    metrics: dict
    predictions: dict

    data = property(lambda self: Path(self.config["data"]).name)
    main = property(lambda self: conditions_of(self.config["method"])[0])


def saved_result(run):
    """The answers that a finished run holds -> Result. Raises FileNotFoundError for a folder that is not one."""
    config, metrics, predictions = read_config(run), json.loads(Path(run, "metrics.json").read_text()), {}
    for line in Path(run, "predictions.jsonl").read_text().splitlines():
        row = json.loads(line)
        predictions.setdefault(row["condition"], []).append(row)
    return Result(run, config, metrics["test"], predictions)


def fresh_result(run, args):
    """Load a run, answer its test set, and write and print what comes out -> Result."""
    model, tokenizer, config = load_run(run, choose_device(args.device))
    config.update({k: v for k, v in vars(args).items() if k in config and k != "device" and v is not None})
    test = load_data(config)["test"]
    conditions = conditions_of(config["method"], args.conditions or config.get("conditions", CONDITIONS))
    metrics, predictions = evaluate(model, tokenizer, test, conditions, max_length=config["max_length"],
                                    max_new_tokens=config["max_new_tokens"],
                                    batch_size=args.batch_size or config["eval_batch_size"])
    before = saved_result(run)
    for name in [] if config["max_new_tokens"] else metrics:  # nothing was answered: the answers that are there stay
        if questions(before.predictions.get(name, [])) == questions(predictions[name]):
            metrics[name] = {**before.metrics[name], **metrics[name]}
            predictions[name] = [{**old, **new} for old, new in zip(before.predictions[name], predictions[name])]
    write_results(run, metrics, predictions)
    print(f"{run}: {len(test)} test examples of {config['data']}\n{table(metrics)}\n", flush=True)
    if len(before.predictions.get("base", [])) == len(test):  # the LM before is not here any more, but its answers are
        metrics, predictions = {**before.metrics, **metrics}, {**before.predictions, **predictions}
    return Result(run, config, metrics, predictions)


def grouped(results, join_seeds):
    """Rows of the comparison -> {(data, name): [(Result, condition)]}; with `join_seeds` one Result a seed.

    A row is a run, or all that differ in their seed alone; `base` is what the runs on that data started from."""
    apart = {"seed", "out", "commit", "device", "save_every", "resume", "overwrite", "conditions",
             "python", "torch", "transformers"}
    rows, names = {}, {}
    for result in results:
        seed = result.config["seed"]
        base = rows.setdefault((result.data, "base"), [])
        if "base" in result.predictions and seed not in [one.config["seed"] for one, _ in base]:
            base.append((result, "base"))
        settings, name = str(Path(result.run)), Path(result.run).name
        if join_seeds:
            settings = json.dumps([value for key, value in sorted(result.config.items()) if key not in apart])
            name = name.removesuffix(f"-s{seed}")
        if name in names.values() and names.get(settings) != name:
            name = str(Path(result.run))  # the name of other runs already
        rows.setdefault((result.data, names.setdefault(settings, name)), []).append((result, result.main))
    return {key: row for key, row in sorted(rows.items(), key=lambda item: item[0][0]) if row}


def questions(predictions):
    """What was asked, without what a method adds to it: runs with the same are compared."""
    return [row["prompt"].replace(baselines.PAUSE, "") for row in predictions]


def stacked(answers, by):
    """Predictions of several runs on the same examples -> (values (runs, n), weights (n,)), or None if they are not.

    Values are right or wrong, weighing 1, or the nats of the reference response, weighing as many as it has tokens (an
    example without any is left out); so sum(values) / sum(weights) is accuracy, or NLL per token. Runs whose tokens
    differ, by their tokenizer or where a response was cut, are not comparable."""
    if len({tuple(questions(one)) for one in answers}) != 1:
        return None
    pairs = np.array([[row["nll"] if by == "nll" else (row["strict"], 1) for row in one] for one in answers], float)
    weights = pairs[0, :, 1]  # pairs (runs, n, 2)
    if (pairs[..., 1] != weights).any() or not weights.any():
        return None
    return pairs[:, weights > 0, 0], weights[weights > 0]


def paired(row, other, by="strict"):
    """Two rows of `grouped` -> (mean, low, high, p, standard error) of the difference in accuracy or NLL, or None.

    Over several seeds, runs of the same seed are paired, and their examples; interval and p are over examples, the
    standard error is over seeds (NaN for one). The NLL's difference is that of all nats over all tokens, and its
    interval resamples examples with their nats and tokens."""
    theirs = {result.config["seed"]: result.predictions[condition] for result, condition in other}
    mine = {result.config["seed"]: result.predictions[condition] for result, condition in row}
    if len(mine) == len(theirs) == 1:
        theirs = dict(zip(mine, theirs.values()))
    seeds = [seed for seed in mine if seed in theirs and questions(mine[seed]) == questions(theirs[seed])]
    found = stacked([answers[seed] for answers in (mine, theirs) for seed in seeds], by)
    if not found:
        return None
    (ours, others), weights = np.split(found[0], 2), found[1]  # (seeds, n) each, and (n,)
    per_seed = (ours - others).sum(1) / weights.sum()
    error = per_seed.std(ddof=1) / len(seeds) ** 0.5 if len(seeds) > 1 else np.nan
    return *compare(ours.mean(0), others.mean(0), weights), error


def comparison(rows, against=None, by="strict"):
    """The rows of `grouped` as lines of text; differences are to the row that holds the run `against` (or "base")."""
    nll = by == "nll"
    scale, w, number = (1, 7, "7.4f") if nll else (100, 5, "5.1f")
    shown = lambda mean, low, high, form: f"{mean:{form}} [{low:{form}}, {high:{form}}]"
    what, more = ("NLL", "") if nll else ("strict %", f" {'flex. %':>7} {'cut %':>5} {'tokens':>6} {'NLL':>6}")
    lines = [f"{'data':<16} {'run':<20} {'seeds':>5} {what + '  (95%)':<{3 * w + 5}} {'± sd':>{w}}{more}"
             + (f"  {'difference  (95%)':<{3 * w + 6}} {'± se':>{w - 1}} {'p':>5}" if against else "")]
    for (data_name, name), row in rows.items():
        metrics = [result.metrics[condition] for result, condition in row]
        column = lambda key: np.array([np.ravel(one[key])[0] for one in metrics], dtype=float)  # (mean, low, high)?
        per_seed = scale * column(by)
        spread = f"{per_seed.std(ddof=1):{number}}" if len(row) > 1 else " " * w
        found = stacked([result.predictions[condition] for result, condition in row], by)
        center = (per_seed.mean(), np.nan, np.nan)
        if found:
            center = scale * np.array(interval(found[0].mean(0), found[1]))
        line = f"{data_name:<16} {name:<20} {len(row):5} {shown(*center, number)} {spread}"
        if not nll:
            line += (f" {100 * column('flexible').mean():7.1f} {100 * column('cut_off').mean():5.1f} "
                     f"{column('tokens').mean():6.1f} {column('nll').mean():6.3f}")
        if against:
            other = [o for (d, n), o in rows.items() if d == data_name
                     and (n == against or any(Path(r.run) == Path(against) and c != "base" for r, c in o))]
            found = paired(row, other[0], by) if other else None
            if found:
                mean, low, high, p, error = np.multiply(found, (scale, scale, scale, 1, scale))
                error = " " * (w - 1) if np.isnan(error) else f"{error:{w - 1}{number[1:]}}"
            line += f"  {shown(mean, low, high, '+' + number)} {error} {p:5.3f}" if found else "  not comparable"
        lines.append(line)
    return "\n".join(lines)


def parse_args(argv=None):
    """The settings of an evaluation. -> argparse.Namespace"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"eval.py: {message}; see --help.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder(s) written by train.py")
    parser.add_argument("--saved", action="store_true", help="take the answers that the runs hold; load no model")
    parser.add_argument("--seeds", action="store_true", help="join runs that differ in their seed only")
    parser.add_argument("--against", metavar="RUN", help="one of the runs, or base: what the others are compared with")
    parser.add_argument("--by", choices=["strict", "nll"],
                        help="what to compare: strict accuracy, or NLL (lower is better; default where answers lack)")
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS[1:], metavar="NAME",
                        help="answer under these only, of steered off random other (default: as in the run)")
    parser.add_argument("--test", type=int, help="test examples, 0 = all (default: as in the run)")
    parser.add_argument("--max-new-tokens", type=int, help="length limit of an answer (default: as in the run), or 0")
    parser.add_argument("--batch-size", type=int, help="prompts at once (default: as in the run)")
    parser.add_argument("--data-dir", help="folder with <task>/<split>.jsonl (default: as in the run)")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu or auto")
    args = parser.parse_args(argv)
    if args.against not in (None, "base") and Path(args.against) not in map(Path, args.runs):
        parser.error(f"--against is {args.against}, but it should be one of the runs given, or base")
    return args


def main(argv=None):
    args = parse_args(argv)
    results, left_out = [], []
    for run in args.runs:
        try:
            results.append(saved_result(run) if args.saved else fresh_result(run, args))
        except (OSError, ValueError) as error:
            left_out.append(f"eval.py: {run} is left out: {str(error).splitlines()[0]}")
    lacking = lambda result, by: [name for name, rows in result.predictions.items() if by not in rows[0]]
    by = args.by or ("nll" if any(result.main in lacking(result, "strict") for result in results) else "strict")
    for result in results:
        for name in lacking(result, by):  # if it is the base, the run can still be compared with others
            del result.predictions[name]
    left_out += [f"eval.py: {r.run} is left out: {LACKING[by]}" for r in results if r.main not in r.predictions]
    results = [result for result in results if result.main in result.predictions]
    if len(results) > 1 or args.saved and results:
        print(comparison(grouped(results, args.seeds), args.against, by))
    if left_out:
        sys.exit("\n".join(left_out))


if __name__ == "__main__":
    main()
