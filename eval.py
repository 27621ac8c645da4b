"""Evaluate runs: generate an answer to every test prompt, with the codes on, off, random, and taken from elsewhere.

    python eval.py runs/tiny-arithmetic-dlr-s0                      # one run
    python eval.py runs/gpt2-gsm8k-dlr-s0 runs/gpt2-gsm8k-sft-s0    # two runs on one test set, compared in pairs

"Off costs accuracy" alone says little: any constant vector that the model got used to would do the same. So a model
with codes is looked at under five conditions, all on the same weights (but for `base`):

    base      the LM before post-training (only in train.py, which has it)
    steered   every chunk takes the router's argmax
    off       no chunk is steered, neither in the prompt nor in the answer
    random    every chunk takes a code at random: does it matter *which* codes steer?
    other     every chunk takes the code that another test example had at that position: does the *text* matter?

Accuracy is strict (the answer after `####`) and flexible (else the last number, letter or yes/no), each as a mean over
test examples with a 95% bootstrap interval. Cut off are answers that did not end within --max-new-tokens: where that
share is high, accuracy measures length. NLL is the mean loss per token of the reference response, in nats.
"""
import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.stats import bootstrap
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
from dlr import DLRModel

CONDITIONS = {"dlr": ("steered", "off", "random", "other"), "sft": ("sft",)}


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


def interval(values):
    """Mean of `values` (n,) with its 95% percentile bootstrap interval -> (mean, low, high)."""
    values = np.asarray(values, dtype=float)
    if values.std() == 0:  # nothing to resample
        return (values[0],) * 3
    found = bootstrap((values,), np.mean, n_resamples=5000, batch=500, method="percentile", rng=0).confidence_interval
    return values.mean(), float(found.low), float(found.high)


def compare(a, b):
    """Paired difference a - b of two runs on the same examples (n,) -> (mean, low, high), as in `interval`."""
    return interval(np.asarray(a, dtype=float) - np.asarray(b, dtype=float))


def others_codes(codes):
    """For every example and chunk, the code that another example used at that position: codes (N, M) -> (N, M).

    Each column is rotated by one among the examples that have a code there; -1 where there is no other."""
    others = torch.full_like(codes, -1)
    for m in range(codes.shape[1]):
        rows = (codes[:, m] >= 0).nonzero()[:, 0]
        if len(rows) > 1:
            others[rows, m] = codes[rows.roll(1), m]
    return others


def table_intervention(table):
    """An intervention that steers with codes from a table (rows, M); where that has none (-1), the router's stay."""
    def intervention(codes):
        given = torch.full_like(codes, -1)
        width = min(codes.shape[1], table.shape[1])
        given[:, :width] = table[:, :width]
        return torch.where(given >= 0, given, codes)
    return intervention


def batches(lengths, batch_size):
    """Indices of examples in batches of like length (little padding), the longest first (memory is known at once)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


@torch.no_grad()
def answer(model, tokenizer, examples, intervention=None, max_new_tokens=256, batch_size=16, label=""):
    """Greedy answers to the prompts -> (predictions, codes).

    `intervention`: None, "off", "random", or a table of codes (N, M) for the N examples. predictions: one dict an
    example (prompt, answer, text, strict, flexible, cut_off, tokens); codes (N, M) steered it, -1 after its end."""
    device = model.codebook.device
    prompts = data.encode_prompts([example.prompt for example in examples], tokenizer)
    limit = getattr(model.lm.config.get_text_config(), "max_position_embeddings", None)
    if limit:  # the answer gets what the prompts leave; a prompt of more than half the context loses its beginning
        prompts = [ids[-max(limit - max_new_tokens, limit // 2):] for ids in prompts]
        max_new_tokens = min(max_new_tokens, limit - max(map(len, prompts)))
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
            predictions[i] = {"prompt": examples[i].prompt, "answer": examples[i].answer, "text": text,
                              "strict": strict, "flexible": flexible, "cut_off": not ended, "tokens": len(ids)}
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

    "base" and "sft" are the model without steering. `settings` go to `answer`."""
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
            "cut_off": float(np.mean(column("cut_off"))), "tokens": float(np.mean(column("tokens")))}


def table(metrics):
    """The conditions of a run as lines of text."""
    percent = lambda value: "{:5.1f}  [{:5.1f}, {:5.1f}]".format(*(100 * v for v in value))
    lines = [f"{'':<9} {'strict %  (95%)':<22} {'flexible %  (95%)':<22} {'cut off %':>9} {'tokens':>7} {'NLL':>7}"]
    for name, row in metrics.items():
        nll = f"{row['nll']:7.4f}" if "nll" in row else f"{'':7}"
        lines.append(f"{name:<9} {percent(row['strict'])} {percent(row['flexible'])} {100 * row['cut_off']:9.1f} "
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


def load_run(run, device="cpu"):
    """A finished run folder -> (model, tokenizer, config). An SFT run comes as a DLRModel that never steers.

    Raises FileNotFoundError for a folder that is not a finished run."""
    run = Path(run)
    if not (run / "config.json").is_file() or not (run / "model").is_dir():
        raise FileNotFoundError(f"{run} is not a finished run: it should hold config.json and model/.")
    config = json.loads((run / "config.json").read_text())
    if config["method"] == "dlr":
        model = DLRModel.from_pretrained(run / "model", dtype=torch.float32)
    else:
        model = DLRModel(AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32))
    return model.to(device).eval(), AutoTokenizer.from_pretrained(run / "model"), config


def load_data(config):
    """The splits of a run, from its settings. -> dict as `data.load` gives it"""
    names = ("n", "val", "test", "seed", "data_dir", "digits", "ops", "nines")
    return data.load(config["data"], **{name: config[name] for name in names})


def parse_args(argv=None):
    """The settings of an evaluation. -> argparse.Namespace"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"eval.py: {message}; see --help.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder(s) written by train.py")
    parser.add_argument("--test", type=int, help="test examples, 0 = all (default: as in the run)")
    parser.add_argument("--max-new-tokens", type=int, help="length limit of an answer (default: as in the run)")
    parser.add_argument("--batch-size", type=int, help="prompts at once (default: as in the run)")
    parser.add_argument("--data-dir", help="folder with <task>/<split>.jsonl (default: as in the run)")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu or auto")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    answers = {}  # run -> its answers with the codes on
    for run in args.runs:
        try:
            model, tokenizer, config = load_run(run, choose_device(args.device))
            config.update({k: v for k, v in vars(args).items() if k in config and k != "device" and v is not None})
            test = load_data(config)["test"]
        except (OSError, ValueError) as error:
            sys.exit(f"eval.py: {error}".splitlines()[0])
        batch_size = args.batch_size or config["eval_batch_size"]
        metrics, predictions = evaluate(
            model, tokenizer, test, CONDITIONS[config["method"]], max_length=config["max_length"],
            max_new_tokens=config["max_new_tokens"], batch_size=batch_size,
        )
        write_results(run, metrics, predictions)
        print(f"{run}: {len(test)} test examples of {config['data']}\n{table(metrics)}\n")
        answers[run] = predictions[CONDITIONS[config["method"]][0]]
    for one, two in itertools.combinations(answers, 2):
        if [row["prompt"] for row in answers[one]] != [row["prompt"] for row in answers[two]]:
            print(f"{one} and {two} were tested on different examples: not compared.")
            continue
        strict = [[row["strict"] for row in answers[run]] for run in (one, two)]
        mean, low, high = (100 * value for value in compare(*strict))
        print(f"{one} - {two}: {mean:+.1f} points strict, 95% paired bootstrap [{low:+.1f}, {high:+.1f}]")


if __name__ == "__main__":
    main()
