"""What a step of Dynamic Latent Routing costs: in time and memory here, or estimated for any model and device.

    python benchmark.py --model gpt2 --data gsm8k --n 64 --batch-size 4 --rounds 2      # real steps, timed
    python benchmark.py                                                                 # a quick check on the tiny LM
    python benchmark.py --estimate --model gpt2 --rollouts 8                            # what will my run need?
    python benchmark.py --estimate --hidden 4096 --layers 32 --heads 32 --kv-heads 8 --intermediate 14336 --vocab 128256
    python benchmark.py --estimate --table                                              # 0.6B to 70B on 1 to 64 GPUs

Timed are steps of the whole LM, optimiser included: SFT; DLR as one would first write it (naive: every rollout and both
paths through the whole model, all logits built); and the step of dlr.py, where the blocks up to the injection layer run
once for all of them. Beside them stand the operations that no implementation does without (the *floor*) and the memory
that estimate.py foretells; the formulas are there. On a CPU, memory is the process's. To compare it with the estimate,
set MALLOC_MMAP_THRESHOLD_=262144 in the environment: the C library then gives back at once what is freed.
"""
import argparse
import ctypes
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import AutoConfig

import data
import estimate
import train
from baselines import sft_loss
from dlr import DLRModel
from eval import choose_device

SHAPE = ("hidden", "layers", "heads", "kv_heads", "intermediate", "vocab")


def parse_args(argv=None):
    """The settings of a benchmark. -> argparse.Namespace"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"benchmark.py: {message}; see --help.")
    group = parser.add_argument_group("model and step")
    group.add_argument("--model", default="tiny", help="tiny (default), a hub name, a local folder, a .gguf file")
    group.add_argument("--codes", type=int, default=32, metavar="C", help="size of the codebook")
    group.add_argument("--chunk", type=int, default=4, metavar="K", help="tokens a chunk")
    group.add_argument("--layer", type=int, help="block whose output is steered, from 0 (default: the middle one)")
    group.add_argument("--batch-size", type=int, default=4, help="texts a step (of each process)")
    group.add_argument("--length", type=int, default=512, help="tokens a text; what is longer is cut")
    group.add_argument("--dtype", default="float32", choices=list(estimate.PEAK), help="bfloat16: autocast")
    group = parser.add_argument_group("timing")
    group.add_argument("--data", default="arithmetic", help=f"arithmetic, {', '.join(data.TASKS)}, or a file.jsonl")
    group.add_argument("--data-dir", help="folder with <task>/<split>.jsonl to read instead of the hub")
    group.add_argument("--n", type=int, default=64, help="examples, of which the first --batch-size are run")
    group.add_argument("--rounds", type=int, default=3, help="times each kind of step; medians are shown")
    group.add_argument("--gradient-checkpointing", action="store_true", help="(the estimate is with and without)")
    group.add_argument("--device", default="auto", help="cuda, mps, cpu or auto")
    group = parser.add_argument_group("estimate")
    group.add_argument("--estimate", action="store_true", help="run nothing: operations, seconds and memory")
    group.add_argument("--table", action="store_true", help="for known shapes on several numbers of H100")
    for name in (*SHAPE, "head_dim"):
        group.add_argument(f"--{name.replace('_', '-')}", type=int, help="of a Llama, in place of --model")
    group.add_argument("--rollouts", type=int, default=8, metavar="N", help="code sequences drawn")
    group.add_argument("--response-share", type=float, default=0.5, help="of the tokens")
    group.add_argument("--processes", type=int, default=1, help="that train.py --shard spreads the model over")
    group.add_argument("--peak", type=float, help="TFLOP/s of the device in --dtype (default: an H100's)")
    group.add_argument("--search-peak", type=float, default=estimate.PEAK["float32"],
                       help="the same of the search, which is in float32")
    group.add_argument("--utilisation", type=float, default=0.4, help="share of the peak that is reached")
    args = parser.parse_args(argv)
    args.peak = args.peak or estimate.PEAK["bfloat16" if args.table else args.dtype]
    # what train.py's helpers read besides, to find or teach a model
    return argparse.Namespace(**{**vars(train.parse_args(["--model", args.model])), **vars(args),
                                 "max_length": args.length, "out": "runs/benchmark"})


def check_settings(args):
    """Raises ValueError for a setting that cannot work, before anything is loaded."""
    given = [name for name in SHAPE if getattr(args, name) is not None]
    for name in ("codes", "chunk", "batch_size", "length", "n", "rounds", "rollouts", "processes", *given):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1.")
    for name, most in (("response_share", 1), ("utilisation", 1), ("peak", math.inf), ("search_peak", math.inf)):
        if not 0 < getattr(args, name) <= most:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be above 0"
                             f"{' and at most 1' * (most == 1)}.")
    if (given or args.table) and not args.estimate:
        raise ValueError(f"--{'table' if args.table else given[0]} is for --estimate: real steps need a real model.")
    if given and len(given) < len(SHAPE):
        raise ValueError(f"A shape by hand wants --{' --'.join(SHAPE).replace('_', '-')}, all of them.")
    if given and (args.hidden % args.heads or args.heads % args.kv_heads):
        raise ValueError(f"--heads is {args.heads}; it must divide --hidden and be a multiple of --kv-heads.")
    if args.estimate and args.model == "tiny" and not (given or args.table):
        raise ValueError("--estimate wants a --model with a config, such as gpt2, or a shape by hand (--hidden ...).")


def dlr_step(model, batch, rollouts, response_only=False):
    """Search, select, and the loss of a DLR step -> scalar."""
    input_ids, mask, response = batch
    trunk = model.trunk(input_ids, mask)
    found = model.search(input_ids, response, rollouts, trunk=trunk, response_only=response_only)
    return model.loss(input_ids, response, found.codes, trunk=trunk).total


def naive_dlr_loss(model, input_ids, mask, response, rollouts):
    """The DLR loss as one would first write it: every rollout and both paths through the whole model, all logits built.

    The search is in float32 whatever surrounds it, as in dlr.py. -> scalar"""
    counted = (response & mask.bool())[:, 1:]

    def nll(logits):  # (B, T, V) -> (B,)
        per_token = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="none")
        return (per_token.view(counted.shape) * counted).sum(1)

    logits = model.route(input_ids, mask)  # (B, M, C)
    with torch.no_grad(), torch.autocast(input_ids.device.type, enabled=False):
        drawn = torch.distributions.Categorical(logits=logits).sample((rollouts,))  # (N, B, M)
        scores = torch.stack([nll(model(input_ids, mask, codes=codes)) for codes in drawn])  # (N, B)
    best = drawn[scores.argmin(0), range(len(input_ids))]  # (B, M)
    both = nll(model(input_ids, mask, codes=best)) + nll(model.lm(input_ids=input_ids, attention_mask=mask).logits)
    return both.sum() / counted.sum() + F.cross_entropy(logits.flatten(0, 1), best.flatten())


class Meter:
    """Seconds and peak memory of what is called. On CUDA the peak is the allocator's, on Linux the process's."""

    def __init__(self, device):
        self.gpu = torch.get_device_module(device) if device.type != "cpu" else None
        self.counts = (hasattr(self.gpu, "max_memory_allocated") if self.gpu else
                       Path("/proc/self/clear_refs").exists())

    def memory(self, peak=False):
        if self.gpu is not None:
            return self.gpu.max_memory_allocated() if peak else self.gpu.memory_allocated()
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(lines["VmHWM" if peak else "VmRSS"].split()[0])

    def __call__(self, function):
        """-> (seconds, bytes more than before, at the peak; NaN where the device does not tell)."""
        if self.counts:
            if self.gpu is None and hasattr(ctypes.CDLL(None), "malloc_trim"):
                ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not to hide what is taken now
            before = self.memory()
            self.gpu.reset_peak_memory_stats() if self.gpu else Path("/proc/self/clear_refs").write_text("5")
        began = time.perf_counter()
        function()
        if self.gpu is not None:
            self.gpu.synchronize()
        return time.perf_counter() - began, self.memory(peak=True) - before if self.counts else math.nan


def load(args, device):
    """-> (DLRModel, rows of the batch), as train.py finds them."""
    examples = data.load(args.data, args.n, 50, 100, data_dir=args.data_dir)["train"]
    lm, tokenizer = train.load_model(args, train.find_model(args), device)
    rows, _, _ = data.encode(examples, tokenizer, args.max_length)
    if not rows:
        raise ValueError(f"no prompt leaves room for an answer within --length {args.length}; raise it.")
    if args.gradient_checkpointing:
        getattr(lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable)()  # its newer name first
    return DLRModel(lm, args.codes, args.chunk, args.layer).to(device), rows[: args.batch_size]


def measure(args, model, rows, losses):
    """Time a step on each loss {name: function -> scalar}, and generation -> ({name: seconds}, {name: bytes}).

    All take turns: one round to warm up, then `--rounds`, of which the medians count. The weights stay as they are."""
    device = model.codebook.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step(loss):
        with torch.autocast(device.type, torch.bfloat16) if args.dtype == "bfloat16" else nullcontext():
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    prompts = data.collate_prompts([ids[:start] for ids, start in rows], device=device)
    room = getattr(model.lm.config.get_text_config(), "max_position_embeddings", None) or math.inf
    new = max(1, min(64, room - prompts[0].shape[1]))
    new = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False)
    tasks = {name: lambda loss=loss: step(loss) for name, loss in losses.items()}
    tasks["plain"] = lambda: model.lm.generate(prompts[0], attention_mask=prompts[1], **new)
    tasks["steered"] = lambda: model.generate(*prompts, **new)
    meter, measured = Meter(device), {name: [] for name in tasks}
    for _ in tqdm(range(1 + args.rounds), "timing (the first round warms up)"):
        for name, task in tasks.items():
            model.train(name in losses)
            measured[name].append(meter(task))
    return ({name: float(np.median([one[i] for one in both[1:]])) for name, both in measured.items()} for i in (0, 1))


def compare_steps(args, model, rows):
    """Steps of several kinds on one batch, and steered against plain generation -> a table, as text."""
    batch = input_ids, mask, response = data.collate(rows, device=model.codebook.device)
    labels = input_ids.masked_fill(~response, -100)
    losses = {"SFT, as the LM does it": lambda: model.lm(input_ids=input_ids, attention_mask=mask, labels=labels).loss,
              "SFT, logits of responses only": lambda: sft_loss(model, *batch),
              "naive DLR, N = 8": lambda: naive_dlr_loss(model, *batch, 8),
              **{f"DLR, N = {n}": lambda n=n: dlr_step(model, batch, n) for n in (1, 4, 8, 16)},
              "DLR, N = 8, search of responses": lambda: dlr_step(model, batch, 8, response_only=True)}
    seconds, peaks = measure(args, model, rows, losses)
    size = estimate.Size(model.lm.config, model.layer)
    shape = estimate.Batch(*input_ids.shape, int(response[:, 1:].sum()))
    rollouts = {"SFT, logits of responses only": None, **{f"DLR, N = {n}": n for n in (1, 4, 8, 16)}}
    work = {name: sum(estimate.operations(size, shape, n, args.codes, args.chunk)) for name, n in rollouts.items()}
    least, count = "SFT, logits of responses only", int(mask.sum())
    lines = [f"{len(rows)} texts, {count} tokens, {shape.answered} of them of responses; K = {args.chunk}, injection "
             f"after block {model.layer}, {args.dtype}, {model.codebook.device}, torch {torch.__version__}, "
             f"{torch.get_num_threads()} threads; medians of {args.rounds}",
             f"{'':<31} {'seconds':>8} {'x SFT':>6} {'tokens/s':>9} {'extra GB':>9} {'estimate':>9} {'floor':>6} "
             f"{'x floor':>8}"]
    for name in losses:
        after = ""
        if name in rollouts:
            held = estimate.memory(size, shape, rollouts[name], args.dtype == "bfloat16", args.gradient_checkpointing)
            most = work[name] / work[least]
            after = (f" {(held['peak'] - held['weights'] - held['Adam']) / 1e9:9.2f} {most:6.2f} "
                     f"{seconds[name] / seconds[least] / most:8.2f}")
        lines.append(f"{name:<31} {seconds[name]:8.3f} {seconds[name] / seconds['SFT, as the LM does it']:6.2f} "
                     f"{count / seconds[name]:9.0f} {peaks[name] / 1e9:9.2f}{after}")
    slower = 100 * (seconds["steered"] / seconds["plain"] - 1)
    lines.append(f"extra GB: at the peak, beside weights and Adam. floor: operations, in those of SFT with the logits "
                 f"of responses only. Steered generation takes {slower:+.1f}% more time than plain.")
    return "\n".join(lines)


def main(argv=None):
    args = parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        check_settings(args)
        if not args.estimate:
            torch.manual_seed(0)
            print(compare_steps(args, *load(args, choose_device(args.device))))
        elif args.table:
            print(estimate.known_shapes(args))
        else:
            given = {name: getattr(args, name) for name in (*SHAPE, "head_dim")}
            where = None if args.hidden else train.find_model(args)
            config = AutoConfig.from_pretrained(**where) if where else estimate.config_of(**given)
            args.length = min(args.length, args.max_length)  # which a look at the config may have lowered
            print(estimate.report(args, config))
    except (OSError, ValueError) as error:
        sys.exit(f"benchmark.py: {train.first_line(error)}")


if __name__ == "__main__":
    main()
