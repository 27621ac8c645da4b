"""Compare finished runs, from the answers that they hold: paired by test example and by seed, with intervals.

    python compare.py --against runs/sft-s0 runs/dlr-s0 runs/sft-s0                   # two runs
    python compare.py --seeds --against runs/sft-s0 runs/{dlr,sft}-s{0..4}            # seeds joined: one row a method
    python compare.py --seeds --by nll --against runs/sft-s0 runs/{dlr,sft}-s{0..4}   # in NLL instead of accuracy

    # learning rates chosen on validation
    python compare.py --best-of lr code_lr --seeds --against runs/sft-1e-4-s0 runs/{dlr,sft}-{1e-5,1e-4}-s{0..4}

--best-of keeps, of the runs that differ in the named settings only, the one whose validation NLL is best, for each
seed; the test set has no say in it.

A difference, of accuracy or of NLL, is taken example by example, then averaged: a bootstrap over examples gives its
interval and p value, the spread over seeds its standard error. Runs need not have been asked the same: a difference is
over the questions that both were, and a row that lacks some of its data set's, or is not compared on all, says so.

What makes two runs the same is decided here, and so is when train.py may write into a folder: never over a run.
"""
import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from eval import conditions_of, interval, processes, questions, read_config, resampled, saved

LACKING = {"strict": "it holds no answers; give --by nll, or answer its test set with --max-new-tokens.",
           "nll": "it does not hold the NLL of each example; evaluate it anew (eval.py --max-new-tokens 0 will do)."}
LOOKS = {"strict": (100, 5, "5.1f"), "nll": (1, 7, "7.4f")}  # in %, in nats: scale, width, format
# what two runs may differ in and still be the same
APART = {"out", "resume", "device", "conditions", "commit", "python", "torch", "transformers"}


@dataclass
class Result:
    """A run that was evaluated: `predictions` by condition."""

    run: str
    config: dict
    predictions: dict
    validation: float | None = None  # NLL

    data = property(lambda self: Path(self.config["data"]).name)
    main = property(lambda self: conditions_of(self.config["method"])[0])


def prepare_out(args):
    """Make the folder of the run. Raises ValueError where a run would be lost."""
    out = Path(args.out)
    config = out / "config.json"
    if (out / "metrics.json").is_file():
        raise ValueError(f"{out} holds a finished run: delete that folder, or pass another --out.")
    if args.resume:
        if not config.is_file():
            raise ValueError(f"{out} holds no run to resume: start it without --resume.")
        before = json.loads(config.read_text())
        changed = [name for name in set(vars(args)) - APART if before.get(name) != getattr(args, name)]
        if changed:
            differs = ", ".join(f"{name} was {before.get(name)}" for name in sorted(changed))
            raise ValueError(f"--resume needs the settings that {out} began with: {differs}.")
    elif config.is_file():
        raise ValueError(f"{out} holds an unfinished run: pass --resume to go on, or delete that folder.")
    out.mkdir(parents=True, exist_ok=True)


def write_config(args, model):
    """config.json: every setting, versions, the commit. -> number of trained parameters"""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    commit = None
    if shutil.which("git"):
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        commit = found.stdout.strip() or None
    config = {**vars(args), "trained_parameters": trained, "layer_used": model.settings.layer,
              "python": platform.python_version(), "torch": torch.__version__,
              "transformers": transformers.__version__, "commit": commit}
    Path(args.out, "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return trained


def open_log(args, first):
    """log.jsonl, to write the lines of the steps from `first` on; what it holds of those will be redone."""
    path = Path(os.devnull if processes()[0] else f"{args.out}/log.jsonl")
    lines = path.read_text().splitlines(keepends=True)[:first] if path.is_file() else []
    path.write_text("".join(lines))
    return open(path, "a", buffering=1)


def saved_result(run):
    """The answers that a finished run holds -> Result. Raises FileNotFoundError for a folder that is not one."""
    config, (_, predictions) = read_config(run), saved(run)
    metrics = json.loads(Path(run, "metrics.json").read_text())
    return Result(run, config, predictions, metrics.get("validation", {}).get("nll"))


def difference(a, b, weights=None):
    """`eval.interval` of the paired difference a - b of two runs on the same examples (n,) -> (ratio, low, high, p).

    p is two-sided: twice the smaller share of the resamples on either side of zero."""
    ratio, low, high, ratios = resampled(np.asarray(a, dtype=float) - np.asarray(b, dtype=float), weights)
    tail = min((ratios <= 0).sum(), (ratios >= 0).sum())
    return ratio, low, high, float(min(1.0, 2 * (tail + 1) / (len(ratios) + 1)))


def settings_but(result, *others):
    """What a run was trained with, as text; without what does not matter, and `others`."""
    return json.dumps([value for key, value in sorted(result.config.items()) if key not in APART.union(others)])


def best_of(results, names):
    """Of the runs that differ in the settings `names` only, the one with the best validation NLL.

    -> {run: Result that stands for it}, and lines on what was chosen of what; they warn where the best lies at the edge
    of the numbers tried, beyond which a better one may lie. Raises ValueError for a setting that no run varies, and for
    a run without validation NLL."""
    for name in names:
        if len({json.dumps(result.config.get(name)) for result in results}) < 2:
            raise ValueError(f"--best-of {name}: no two of the runs differ in it.")
    for result in results:
        if result.validation is None:
            raise ValueError(f"--best-of: {result.run} has no validation NLL to be chosen by.")
    groups, stands, lines = {}, {}, []
    for result in results:
        groups.setdefault((result.data, settings_but(result, *names)), []).append(result)
    for group in groups.values():
        best, chosen = min(group, key=lambda result: result.validation), []
        for name in names:
            tried, own = sorted({result.config[name] for result in group}), best.config[name]
            edge = len(tried) > 1 and own in (tried[0], tried[-1]) and not isinstance(own, str)
            chosen.append(f"{name} {own} of {' '.join(map(str, tried))}" + " (AT THE EDGE: try beyond)" * edge)
        lines.append(f"{best.run}: {', '.join(chosen)}; validation NLL {best.validation:.4f}")
        stands.update({result.run: best for result in group})
    return stands, lines


def grouped(results, join_seeds, chosen=()):
    """Rows of the comparison -> {(data, name): [(Result, condition)]}; with `join_seeds` one Result a seed.

    A row is a run, or all that differ in their seed alone (and in what was `chosen` for each); `base` is what the runs
    on that data started from."""
    rows, names = {}, {}
    for result in results:
        seed = result.config["seed"]
        base = rows.setdefault((result.data, "base"), [])
        if "base" in result.predictions and seed not in [one.config["seed"] for one, _ in base]:
            base.append((result, "base"))
        settings, name = str(Path(result.run)), Path(result.run).name
        if join_seeds:
            settings = settings_but(result, "seed", *chosen)
            name = name.removesuffix(f"-s{seed}")
        if name in names.values() and names.get(settings) != name:
            name = str(Path(result.run))  # the name of other runs already
        rows.setdefault((result.data, names.setdefault(settings, name)), []).append((result, result.main))
    return {key: row for key, row in sorted(rows.items(), key=lambda item: item[0][0]) if row}


def shared(answers):
    """Predictions of several runs -> the same, of the questions that all of them were asked, in one order."""
    asked = [questions(one) for one in answers]
    if all(one == asked[0] for one in asked):
        return answers
    by_question = [dict(zip(*both)) for both in zip(asked, answers)]
    common = [question for question in by_question[0] if all(question in rows for rows in by_question)]
    return [[rows[question] for question in common] for rows in by_question]


def stacked(answers, by):
    """Predictions of several runs on the same examples -> (values (runs, n), weights (n,)), or None if they are not.

    Values are right or wrong, weighing 1, or the nats of the reference response, weighing as many as it has tokens (an
    example without any is left out); so sum(values) / sum(weights) is accuracy, or NLL per token. Runs whose tokens
    differ, by their tokenizer or where a response was cut, are not comparable."""
    if len({tuple(questions(one)) for one in answers}) != 1 or not answers[0]:
        return None
    pairs = np.array([[row["nll"] if by == "nll" else (row["strict"], 1) for row in one] for one in answers], float)
    weights = pairs[0, :, 1]  # pairs (runs, n, 2)
    if (pairs[..., 1] != weights).any() or not weights.any():
        return None
    return pairs[:, weights > 0, 0], weights[weights > 0]


def paired(row, other, by="strict"):
    """Two rows of `grouped` -> (mean, low, high, p, standard error, n) of the difference in accuracy or NLL on the n
    questions that all were asked, or None.

    Over several seeds, runs of the same seed are paired, and their examples; interval and p are over examples, the
    standard error is over seeds (NaN for one). The NLL's difference is that of all nats over all tokens, and its
    interval resamples examples with their nats and tokens."""
    theirs = {result.config["seed"]: result.predictions[condition] for result, condition in other}
    mine = {result.config["seed"]: result.predictions[condition] for result, condition in row}
    if len(mine) == len(theirs) == 1:
        theirs = dict(zip(mine, theirs.values()))
    seeds = [seed for seed in mine if seed in theirs]
    answers = shared([answers[seed] for answers in (mine, theirs) for seed in seeds]) if seeds else []
    found = stacked(answers, by) if answers else None
    if not found:
        return None
    (ours, others), weights = np.split(found[0], 2), found[1]  # (seeds, n) each, and (n,)
    per_seed = (ours - others).sum(1) / weights.sum()
    error = per_seed.std(ddof=1) / len(seeds) ** 0.5 if len(seeds) > 1 else np.nan
    return *difference(ours.mean(0), others.mean(0), weights), error, len(answers[0])


def reading(method, predictions):
    """What the table says, in a sentence: did training help, and do the codes carry weight? From the NLL of the
    reference responses, whose differences are paired by example, with their 95% intervals."""
    main, said = conditions_of(method)[0], []

    def change(condition, against):
        a, b = (np.array([row["nll"] for row in predictions[name]], float) for name in (condition, against))  # (n, 2)
        counted = (a[:, 1] > 0) & (a[:, 1] == b[:, 1])
        return difference(a[counted, 0], b[counted, 0], a[counted, 1])[:3] if counted.any() else (0, 0, 0)

    shown = lambda found: "{:+.3f} [{:+.3f}, {:+.3f}]".format(*found)
    if "base" in predictions:
        found = change(main, "base")
        verdict = "helped" if found[2] < 0 else "hurt" if found[1] > 0 else "changed nothing beyond chance"
        said.append(f"Training {verdict}: NLL {shown(found)} against the base.")
    if {"off", "random"} <= set(predictions):
        off, other = change("off", main), change("random", main)
        verdict = "carry weight" if other[1] > 0 else "act, but it does not matter which" if off[1] > 0 else "are inert"
        said.append(f"The codes {verdict}: without them NLL {shown(off)}, at random {shown(other)}.")
    return " ".join(said)


def nll_per_token(answers):
    """The NLL of a run's reference responses, in nats per token; NaN where the run does not hold it."""
    nats, tokens = np.sum([row.get("nll", (np.nan, np.nan)) for row in answers], 0)
    return nats / tokens if tokens else np.nan


def with_interval(mean, low, high, form):
    """A number and its interval as text."""
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def own_columns(answers, by):
    """What the seeds of a row scored on the same questions, `answers` (seeds, n), as text."""
    scale, w, form = LOOKS[by]
    mean = lambda value: np.array([np.mean([value(one) for one in run]) for run in answers])  # (seeds,)
    nll = np.array(list(map(nll_per_token, answers)))
    per_seed = scale * (nll if by == "nll" else mean(lambda one: one["strict"]))
    found = stacked(answers, by)
    center = scale * np.array(interval(found[0].mean(0), found[1])) if found else (per_seed.mean(), np.nan, np.nan)
    text = f"{with_interval(*center, form)} {f'{per_seed.std(ddof=1):{form}}' if len(answers) > 1 else ' ' * w}"
    if by == "nll":
        return text
    flexible, cut = (100 * mean(lambda one: one[name]).mean() for name in ("flexible", "cut_off"))
    return f"{text} {flexible:7.1f} {cut:5.1f} {mean(lambda one: len(one['ids'])).mean():6.1f} {nll.mean():6.3f}"


def difference_columns(row, other, by, asked):
    """What `paired` finds of two rows, as text; it says so where that is on fewer questions than the row was asked."""
    scale, w, form = LOOKS[by]
    found = paired(row, other, by)
    if not found:
        return "  not comparable"
    mean, low, high, p, error = np.multiply(found[:5], (scale, scale, scale, 1, scale))
    error = " " * (w - 1) if np.isnan(error) else f"{error:{w - 1}{form[1:]}}"
    text = f"  {with_interval(mean, low, high, '+' + form)} {error} {p:5.3f}"
    return text + (f"  compared on {found[5]} questions" if found[5] < asked else "")


def comparison(rows, against=None, by="strict"):
    """The rows of `grouped` as lines of text; differences are to the row that holds the run `against` (or "base").

    A row is over the questions that all its seeds were asked; it says so where the data set's other rows hold more."""
    _, w, _ = LOOKS[by]
    what, more = ("NLL", "") if by == "nll" else ("strict %", f" {'flex. %':>7} {'cut %':>5} {'tokens':>6} {'NLL':>6}")
    lines = [f"{'data':<16} {'run':<20} {'seeds':>5} {what + '  (95%)':<{3 * w + 5}} {'± sd':>{w}}{more}"
             + (f"  {'difference  (95%)':<{3 * w + 6}} {'± se':>{w - 1}} {'p':>5}" if against else "")]
    whole = {}  # all questions, by data
    for (data_name, _), row in rows.items():
        for result, condition in row:
            whole.setdefault(data_name, set()).update(questions(result.predictions[condition]))
    for (data_name, name), row in rows.items():
        answers = shared([result.predictions[condition] for result, condition in row])
        asked, total = len(answers[0]), len(whole[data_name])
        line = f"{data_name:<16} {name:<20} {len(row):5} "
        line += own_columns(answers, by) if asked else "not comparable: its seeds share no question"
        if against and asked:
            other = [o for (d, n), o in rows.items() if d == data_name
                     and (n == against or any(Path(r.run) == Path(against) and c != "base" for r, c in o))]
            line += difference_columns(row, other[0] if other else [], by, asked)
        lines.append(line + (f"  asked {asked} of {total} questions" if 0 < asked < total else ""))
    return "\n".join(lines)


def parse_args(argv=None):
    """The settings of a comparison. -> argparse.Namespace"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"compare.py: {message}; see --help.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="finished folders written by train.py")
    parser.add_argument("--seeds", action="store_true", help="join runs that differ in their seed only")
    parser.add_argument("--against", metavar="RUN", help="one of the runs, or base: what the others are compared with")
    parser.add_argument("--by", choices=["strict", "nll"],
                        help="what to compare: strict accuracy, or NLL (lower is better; default where answers lack)")
    parser.add_argument("--best-of", nargs="+", metavar="SETTING", default=[],
                        help="keep the run with the best validation NLL of those that differ only in these, as lr")
    args = parser.parse_args(argv)
    if args.against not in (None, "base") and Path(args.against) not in map(Path, args.runs):
        parser.error(f"--against is {args.against}, but it should be one of the runs given, or base")
    return args


def main(argv=None):
    args = parse_args(argv)
    results, left_out = [], []
    for run in args.runs:
        try:
            results.append(saved_result(run))
        except (OSError, ValueError) as error:
            left_out.append(f"compare.py: {run} is left out: {str(error).splitlines()[0]}")
    lacking = lambda result, by: [name for name, rows in result.predictions.items() if by not in rows[0]]
    by = args.by or ("nll" if any(result.main in lacking(result, "strict") for result in results) else "strict")
    for result in results:
        for name in lacking(result, by):  # if it is the base, the run can still be compared with others
            del result.predictions[name]
    left_out += [f"compare.py: {r.run} is left out: {LACKING[by]}" for r in results if r.main not in r.predictions]
    results = [result for result in results if result.main in result.predictions]
    if args.best_of:
        try:
            stands, lines = best_of(results, args.best_of)
        except ValueError as error:
            sys.exit(f"compare.py: {error}")
        results = [result for result in results if stands[result.run] is result]
        args.against = getattr(stands.get(args.against), "run", args.against)
        print("\n".join(lines), end="\n\n")
    if results:
        print(comparison(grouped(results, args.seeds, args.best_of), args.against, by))
    if left_out:
        sys.exit("\n".join(left_out))


if __name__ == "__main__":
    main()
