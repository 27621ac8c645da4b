"""Evaluate runs: generate an answer to every test prompt, with the codes on, off, random, and taken from elsewhere.

    python eval.py runs/tiny-arithmetic-dlr-s0                     # load it, answer, print, write into the run
    python eval.py runs/*-s0 --max-new-tokens 0                    # score the reference responses only: quicker

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
take. Several runs are compared by compare.py, from what they hold.
"""
import argparse
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from scipy.stats import bootstrap
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import baselines
import data
from dlr import DLRModel

ROUTED = ("dlr", "soft")  # the methods that have codes
CONDITIONS = ("base", "steered", "off", "random", "other")
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


def over_processes(tensor):
    """The sum of a tensor over all processes, in place."""
    if processes()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def join_processes(device):
    """Where torchrun has started this process: meet the others. -> this one's device"""
    if "RANK" not in os.environ or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


@contextmanager
def first_process_first():
    """Inside, the first process runs alone, then the others: what it downloads or makes, they find."""
    rank, world = processes()
    if world > 1 and rank > 0:
        dist.barrier()
    yield
    if world > 1 and rank == 0:
        dist.barrier()


def over_gpus(args, model, device):
    """The model for several processes: each has a copy of it or, with --shard, a part of it."""
    if processes()[1] == 1:
        return model
    if args.shard:
        for block in model.blocks:
            fully_shard(block)
        return fully_shard(model)
    return DistributedDataParallel(model, [device] if device.type == "cuda" else None)


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


def resampled(values, weights=None):
    """sum(values) / sum(weights), both (n,), with its 95% percentile bootstrap interval -> (ratio, low, high, ratios).

    Without weights, that is the mean of the values; of nats, with tokens for weights, nats per token. ratios (5000,):
    the same of seeded resamples of the n examples."""
    values = np.asarray(values, dtype=float)
    weights = np.ones(len(values)) if weights is None else weights
    if np.ptp(values / weights) == 0:  # nothing to resample
        ratio = float(values[0] / weights[0])
        return ratio, ratio, ratio, np.full(5000, ratio)
    ratio = lambda above, below, axis=-1: above.sum(axis) / below.sum(axis)
    ratios = bootstrap((values, weights), ratio, paired=True, n_resamples=5000, batch=500, method="percentile",
                       rng=0).bootstrap_distribution
    return float(ratio(values, weights)), *map(float, np.quantile(ratios, [0.025, 0.975])), ratios


def interval(values, weights=None):
    """The first three of `resampled` -> (ratio, low, high)."""
    return resampled(values, weights)[:3]


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
        given[:, :width] = table[:, :width].to(codes.device)
        return torch.where(given == KEEP, codes, given.clamp(min=-1))
    return intervention


def for_batch(intervention, batch):
    """What `answer` takes as an intervention, for some of its examples: of a table of codes, their rows."""
    return table_intervention(intervention[batch]) if torch.is_tensor(intervention) else intervention


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
                      disable=True if processes()[0] else None):  # None: off where there is no terminal
        input_ids, mask = data.collate_prompts([prompts[i] for i in batch], device=device)
        with model.intervene(for_batch(intervention, batch)):
            # the settings that some models bring along are switched off: every model answers alike
            output = model.generate(input_ids, mask, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1,
                                    temperature=None, top_p=None, top_k=None, repetition_penalty=None,
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
        with model.intervene(for_batch(intervention, batch)):
            nll = -model.log_likelihood(model.trunk(texts["input_ids"], texts["attention_mask"]), texts["labels"])
        found.update(zip(batch, zip(nll.tolist(), (texts["labels"][:, 1:] >= 0).sum(1).tolist())))
    return np.array(gathered(found), dtype=float).reshape(-1, 2).T


def validation_nll(args, model, rows):
    """NLL per response token of the validation texts, under the router's codes for what has codes; None without any."""
    training = model.training
    nll, tokens = response_nll(model.eval(), rows, None if args.method in ROUTED else "off", args.eval_batch_size)
    model.train(training)
    return float(nll.sum() / tokens.sum()) if rows else None


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
    run, config = Path(run), read_config(run)
    transformers.logging.disable_progress_bar()
    if (run / "model" / "dlr_config.json").is_file():
        model = DLRModel.from_pretrained(run / "model", dtype=torch.float32)
    else:
        lm = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
        baselines.load_reft(lm, run / "model")
        model = DLRModel(lm)
    model = model.to(device).eval()
    if model.device.type != "cpu":  # where it was checked when it was loaded
        model.verify()
    return model, AutoTokenizer.from_pretrained(run / "model"), config


def saved(run):
    """What a finished run holds -> (metrics, predictions), by condition. Raises FileNotFoundError if it is none."""
    read_config(run)
    predictions = {}
    for line in Path(run, "predictions.jsonl").read_text().splitlines():
        row = json.loads(line)
        predictions.setdefault(row["condition"], []).append(row)
    return json.loads(Path(run, "metrics.json").read_text())["test"], predictions


def questions(predictions):
    """What was asked, without what a method adds to it: runs with the same are compared."""
    return [row["prompt"].replace(baselines.PAUSE, "") for row in predictions]


def load_data(config):
    """The splits of a run as its model reads them, from its settings. -> dict as `data.load` gives it"""
    names = ("n", "val", "test", "seed", "data_dir", "digits", "ops", "nines")
    splits = data.load(config["data"], **{name: config[name] for name in names if name in config})
    if config["method"] == "pause":
        count = config.get("pauses", 10)
        splits = {split: baselines.with_pauses(examples, count) for split, examples in splits.items()}
    return splits


def parse_args(argv=None):
    """The settings of an evaluation. -> argparse.Namespace"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"eval.py: {message}; see --help.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder(s) written by train.py")
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS[1:], metavar="NAME",
                        help="answer under these only, of steered off random other (default: as in the run)")
    parser.add_argument("--test", type=int, help="test examples, 0 = all (default: as in the run)")
    parser.add_argument("--max-new-tokens", type=int, help="length limit of an answer (default: as in the run), or 0")
    parser.add_argument("--batch-size", type=int, help="prompts at once (default: as in the run)")
    parser.add_argument("--data-dir", help="folder with <task>/<split>.jsonl (default: as in the run)")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu or auto")
    return parser.parse_args(argv)


def evaluate_run(run, args):
    """Load a run, answer its test set, write and print what comes out. Raises OSError or ValueError where it cannot."""
    model, tokenizer, config = load_run(run, choose_device(args.device))
    config.update({k: v for k, v in vars(args).items() if k in config and k != "device" and v is not None})
    test = load_data(config)["test"]
    conditions = conditions_of(config["method"], args.conditions or config.get("conditions", CONDITIONS))
    metrics, predictions = evaluate(model, tokenizer, test, conditions, max_length=config["max_length"],
                                    max_new_tokens=config["max_new_tokens"],
                                    batch_size=args.batch_size or config["eval_batch_size"])
    before, answers = saved(run)
    for name in [] if config["max_new_tokens"] else metrics:  # nothing was answered: the answers that are there stay
        if questions(answers.get(name, [])) == questions(predictions[name]):
            metrics[name] = {**before[name], **metrics[name]}
            predictions[name] = [{**old, **new} for old, new in zip(answers[name], predictions[name])]
    write_results(run, metrics, predictions)
    print(f"{run}: {len(test)} test examples of {config['data']}\n{table(metrics)}\n", flush=True)


def main(argv=None):
    args, left_out = parse_args(argv), []
    for run in args.runs:
        try:
            evaluate_run(run, args)
        except (OSError, ValueError) as error:
            left_out.append(f"eval.py: {run} is left out: {str(error).splitlines()[0]}")
    if left_out:
        sys.exit("\n".join(left_out))


if __name__ == "__main__":
    main()
