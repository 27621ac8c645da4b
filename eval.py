"""Evaluate runs: generate an answer to every test prompt, with the codes on, off, random, and taken from elsewhere.

    python eval.py runs/tiny-arithmetic-dlr-s0                              # one run: load it, answer, print
    python eval.py --saved --against runs/sft-s0 runs/dlr-s0 runs/sft-s0    # compare the answers that the runs hold
    python eval.py --saved --seeds --against runs/sft-s0 runs/*-s?          # runs that differ in seed only are one row

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
share is high, accuracy measures length. NLL is the mean loss per token of the reference response, in nats. A
comparison is paired: the difference is taken example by example, then averaged, with a bootstrap interval and p value.
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
KEEP, OFF = -1, -2  # in a table of codes: leave the router's choice; steer nothing


def conditions_of(method):
    """The conditions under which a run of this method is evaluated, the one that stands for the run first."""
    return ("steered", "off", "random", "other") if method in ROUTED else (method,)


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


def resample(values):
    """Means of 5000 bootstrap resamples of `values` (n,), seeded -> (5000,)."""
    return bootstrap((values,), np.mean, n_resamples=5000, batch=500, method="percentile", rng=0).bootstrap_distribution


def interval(values):
    """Mean of `values` (n,) with its 95% percentile bootstrap interval -> (mean, low, high)."""
    values = np.asarray(values, dtype=float)
    if np.ptp(values) == 0:  # nothing to resample
        return (float(values[0]),) * 3
    return (float(values.mean()), *map(float, np.quantile(resample(values), [0.025, 0.975])))


def compare(a, b):
    """Paired difference a - b of two runs on the same examples (n,) -> (mean, low, high, p).

    The interval is that of `interval`; p is two-sided: twice the smaller share of resamples on either side of zero."""
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    if np.ptp(difference) == 0:
        return (float(difference[0]),) * 3 + (float(difference[0] == 0),)
    means = resample(difference)
    tail = min((means <= 0).sum(), (means >= 0).sum())
    return *interval(difference), float(min(1.0, 2 * (tail + 1) / (len(means) + 1)))


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
    """Indices of examples in batches of like length (little padding), the longest first (memory is known at once)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


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
    device = model.codebook.device
    prompts, max_new_tokens = encode_to_answer(model, tokenizer, examples, max_new_tokens)
    predictions, rows = [None] * len(examples), [None] * len(examples)
    for batch in tqdm(batches(list(map(len, prompts)), batch_size), f"answering {label}", leave=False):
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
            predictions[i] = {"prompt": examples[i].prompt, "answer": examples[i].answer, "ids": ids, "text": text,
                              "strict": strict, "flexible": flexible, "cut_off": not ended}
            rows[i] = codes[: -(-(len(prompts[i]) + len(ids)) // model.chunk_size)]
    return predictions, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


@torch.no_grad()
def response_nll(model, tokenizer, examples, intervention=None, max_length=512, batch_size=16):
    """Mean NLL of the reference responses in nats per token, under an intervention as in `answer`; None for none."""
    device = model.codebook.device
    rows, _, _ = data.encode(examples, tokenizer, max_length)
    total = tokens = 0.0
    for batch in batches([len(ids) for ids, _ in rows], batch_size):
        input_ids, mask, response = data.collate([rows[i] for i in batch], device=device)
        with model.intervene(intervention):
            total -= model.log_likelihood(input_ids, response, attention_mask=mask).sum().item()
        tokens += response[:, 1:].sum().item()
    return total / tokens if tokens else None


def evaluate(model, tokenizer, examples, conditions, seed=0, max_length=512, **settings):
    """Answer the examples under each of the named conditions -> (metrics, predictions), dicts by condition.

    Any other name than those of the docstring is the model without steering. `settings` go to `answer`."""
    model.eval()
    metrics, predictions, codes = {}, {}, None
    for condition in conditions:
        torch.manual_seed(seed)  # for "random"
        use = {"steered": None, "random": "random", "other": None}.get(condition, "off")
        if condition == "other":
            use = others_codes(codes)
        predictions[condition], used = answer(model, tokenizer, examples, use, label=condition, **settings)
        if condition == "steered":
            codes = used
        for prediction, row in zip(predictions[condition], used):
            prediction["codes"] = row[row >= 0].tolist()
        metrics[condition] = summarise(predictions[condition])
        if condition != "other":  # its codes belong to generated texts, not to the reference responses
            torch.manual_seed(seed)
            metrics[condition]["nll"] = response_nll(model, tokenizer, examples, use, max_length,
                                                     settings.get("batch_size", 16))
    return metrics, predictions


def summarise(predictions):
    """Accuracies with their intervals, and lengths, of a list of predictions -> dict."""
    column = lambda name: [prediction[name] for prediction in predictions]
    return {"strict": interval(column("strict")), "flexible": interval(column("flexible")), "n": len(predictions),
            "cut_off": float(np.mean(column("cut_off"))), "tokens": float(np.mean(list(map(len, column("ids")))))}


def table(metrics):
    """The conditions of a run as lines of text."""
    percent = lambda value: "{:5.1f}  [{:5.1f}, {:5.1f}]".format(*(100 * v for v in value))
    wide = max(9, *map(len, metrics))
    lines = [f"{'':<{wide}} {'strict %  (95%)':<22} {'flexible %  (95%)':<22} "
             f"{'cut off %':>9} {'tokens':>7} {'NLL':>7}"]
    for name, row in metrics.items():
        nll = f"{row['nll']:7.4f}" if "nll" in row else f"{'':7}"
        lines.append(f"{name:<{wide}} {percent(row['strict'])} {percent(row['flexible'])} {100 * row['cut_off']:9.1f} "
                     f"{row['tokens']:7.1f} {nll}")
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
    splits = data.load(config["data"], **{name: config[name] for name in names})
    if config["method"] == "pause":
        splits = {split: baselines.with_pauses(examples, config["pauses"]) for split, examples in splits.items()}
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
    metrics, predictions = evaluate(model, tokenizer, test, conditions_of(config["method"]),
                                    max_length=config["max_length"], max_new_tokens=config["max_new_tokens"],
                                    batch_size=args.batch_size or config["eval_batch_size"])
    write_results(run, metrics, predictions)
    print(f"{run}: {len(test)} test examples of {config['data']}\n{table(metrics)}\n", flush=True)
    base = saved_result(run)  # the LM before is not here any more, but its answers are
    if len(base.predictions.get("base", [])) == len(test):
        metrics, predictions = {**base.metrics, **metrics}, {**base.predictions, **predictions}
    return Result(run, config, metrics, predictions)


def grouped(results, join_seeds):
    """Rows of the comparison -> {(data, name): [(Result, condition)]}; with `join_seeds` one Result a seed.

    A row is a run, or all that differ in their seed alone; `base` is what the runs on that data started from."""
    apart = {"seed", "out", "commit", "device", "save_every", "resume", "overwrite", "python", "torch", "transformers"}
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


def paired(row, other):
    """Two rows of `grouped` -> (mean, low, high, p, standard error) of the difference in strict accuracy, or None.

    Over several seeds, runs of the same seed are paired, and their examples; interval and p are over examples, the
    standard error is over seeds (NaN for one)."""
    theirs = {result.config["seed"]: result.predictions[condition] for result, condition in other}
    mine = {result.config["seed"]: result.predictions[condition] for result, condition in row}
    if len(mine) == len(theirs) == 1:
        theirs = dict(zip(mine, theirs.values()))
    seeds = [seed for seed in mine if seed in theirs and questions(mine[seed]) == questions(theirs[seed])]
    if not seeds or len({tuple(questions(mine[seed])) for seed in seeds}) > 1:
        return None
    ours, others = (np.array([[one["strict"] for one in answers[seed]] for seed in seeds], dtype=float)
                    for answers in (mine, theirs))  # (seeds, examples)
    error = (ours - others).mean(1).std(ddof=1) / len(seeds) ** 0.5 if len(seeds) > 1 else np.nan
    return *compare(ours.mean(0), others.mean(0)), error


def comparison(rows, against=None):
    """The rows of `grouped` as lines of text; differences are to the row that holds the run `against` (or "base")."""
    lines = [f"{'data':<16} {'run':<20} {'seeds':>5} {'strict %  (95%)':<20} {'± sd':>5} {'flex. %':>7} {'cut %':>5} "
             f"{'tokens':>6} {'NLL':>6}" + (f"  {'difference  (95%)':<21} {'± se':>4} {'p':>5}" if against else "")]
    for (data_name, name), row in rows.items():
        metrics = [result.metrics[condition] for result, condition in row]
        average = lambda key: np.mean([one[key][0] if key == "flexible" else one[key] for one in metrics])
        per_seed = np.array([one["strict"][0] for one in metrics])
        spread = f"{100 * per_seed.std(ddof=1):5.1f}" if len(row) > 1 else f"{'':5}"
        same = len({tuple(questions(result.predictions[condition])) for result, condition in row}) == 1
        strict = [[one["strict"] for one in result.predictions[condition]] for result, condition in row]
        center = interval(np.mean(strict, 0)) if same else (per_seed.mean(), np.nan, np.nan)
        center, low, high = 100 * np.array(center)
        line = (f"{data_name:<16} {name:<20} {len(row):5} {center:5.1f} [{low:5.1f}, {high:5.1f}] {spread} "
                f"{100 * average('flexible'):7.1f} {100 * average('cut_off'):5.1f} {average('tokens'):6.1f} "
                f"{average('nll'):6.3f}")
        if against:
            other = [o for (d, n), o in rows.items() if d == data_name
                     and (n == against or any(Path(r.run) == Path(against) and c != "base" for r, c in o))]
            found = paired(row, other[0]) if other else None
            if found:
                mean, low, high, p, error = np.multiply(found, (100, 100, 100, 1, 100))
                error = f"{error:4.1f}" if error == error else f"{'':4}"
            line += f"  {mean:+5.1f} [{low:+5.1f}, {high:+5.1f}] {error} {p:5.3f}" if found else "  not comparable"
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
    parser.add_argument("--test", type=int, help="test examples, 0 = all (default: as in the run)")
    parser.add_argument("--max-new-tokens", type=int, help="length limit of an answer (default: as in the run)")
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
    if len(results) > 1 or args.saved and results:
        print(comparison(grouped(results, args.seeds), args.against))
    if left_out:
        sys.exit("\n".join(left_out))


if __name__ == "__main__":
    main()
