"""Post-train a language model with Dynamic Latent Routing (or what it is compared with), evaluate it, save it.

    python train.py                                                  # embedded default: nothing to download, 1 minute
    python train.py --model gpt2 --data gsm8k --n 256                # a model and a data set from the hub
    python train.py --model gpt2 --data gsm8k --n 256 --method sft   # no codes; also pause, tokenassorted, lora
    python train.py --model ./my-model --data ./my.jsonl             # a local folder or file.gguf; prompts, responses
    torchrun --nproc_per_node=2 -- train.py --model gpt2 --data gsm8k --n 256        # several GPUs

Each step: *search* N code sequences for every text of the batch, *select* the likeliest, *update* LM, codebook and
router together: `model(**batch).loss.backward()` (equations in dlr.py). The other methods (baselines.py) change the
model or the texts, and share all else: data, steps, optimiser, log, checkpoint, evaluation. Top to bottom: settings,
checks, model, loop, end.

The embedded default is a setting in which codes carry weight: a GPT-2 of two blocks is first taught to add three-digit
numbers (and kept), the way a pretrained model arrives; then DLR, with that LM frozen, steers it on a little hard
addition with long carry chains. --no-freeze trains the LM along.

Under --out: config.json (settings, versions), log.jsonl (a line a step), metrics.json, predictions.jsonl, model/ (a
Hugging Face folder; DLRModel.from_pretrained loads it) and, until the run has finished, state.pt to resume from and,
with --patience, best.pt, the best state so far.
"""
import argparse
import copy
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_state_dict,
                                                     set_model_state_dict, set_state_dict)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import baselines
import data
import search
from compare import difference
from dlr import DLRModel, Settings
from eval import (CONDITIONS, ROUTED, choose_device, conditions_of, evaluate, gathered, processes, response_nll, table,
                  write_results)

# What --model tiny means unless a flag says otherwise. Found on validation sums; a real LM wants the other defaults.
EMBEDDED = dict(n=7680, val=500, test=1000, num_codes=8, chunk_size=1, layer=0, scale=1.0, rollouts=4, code_lr=1e-1,
                lr=1e-4, batch_size=64, eval_batch_size=500)
# What --recipe means unless a flag says otherwise: "paper" are the defaults of dlr.py and of the flags below.
RECIPES = {
    # The paper's method, with alpha in units of h, rates found on validation (RESULTS.md), and an end that it finds.
    "tuned": dict(scale_units="hidden", router_norm="rms", scale=1.0, lr=1e-4, code_lr=3e-3, epochs=20,
                  evaluate_every=8, patience=4),
    "paper": {},
    "ours": dict(policy="rloo", alpha_policy=2.0, update_on="argmax", router_norm="rms", scale_units="hidden")}
# States are kept whole, whoever holds which part of them, and without what is not trained.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)
# what the progress bar shows of a step
SHOWN = ("loss", "generalist", "steered", "policy", "prior", "spread", "codes_used", "tokens_per_s")


def parse_args(argv=None):
    """The settings of a run. -> argparse.Namespace"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"train.py: {message}; see --help.")  # one sentence, not a page of usage
    group = parser.add_argument_group("model and method")
    spelled = {name: " ".join(f"{flag(key)} {value}" for key, value in own.items()) for name, own in RECIPES.items()}
    group.add_argument("--recipe", default="tuned", choices=list(RECIPES), help=f"tuned (default; tiny has its own): "
                       f"{spelled['tuned']}; paper: the paper's numbers, one epoch; ours: {spelled['ours']}")
    group.add_argument("--model", default="tiny", help="tiny (default), a hub name, a local folder, a .gguf file")
    group.add_argument("--method", default="dlr", choices=[*ROUTED, "sft", "pause", "tokenassorted", "lora", "reft"],
                       help="soft: no search, steered by the router's mixture; sft: no codes; others: baselines.py")
    group.add_argument("--freeze", action=argparse.BooleanOptionalAction, default=False,
                       help="dlr: train codebook and router only (default: train the LM along; tiny: freeze)")
    group.add_argument("--codes", type=int, dest="num_codes", metavar="C", help="size of the codebook; 1 = one vector")
    group.add_argument("--chunk", type=int, dest="chunk_size", metavar="K", help="tokens a chunk")
    group.add_argument("--layer", type=int, help="block whose output is steered, from 0 (default: the middle one)")
    group.add_argument("--scale", type=float, metavar="ALPHA", help="weight of the added code vectors")
    group.add_argument("--scale-units", default="absolute", choices=["absolute", "hidden"],
                       help="hidden: ALPHA counts in units of the LM's typical hidden state")
    group.add_argument("--router-norm", choices=["none", "rms"], help="what the router reads: h, or h / rms(h)")
    group.add_argument("--lora-rank", type=int, metavar="R", help="train the LM through adapters of this rank, and "
                       "nothing else of it (dlr, soft: beside the codes; lora: default 8)")
    group.add_argument("--lora-layers", type=int, nargs="+", metavar="L", help="their blocks (default: all)")
    group = parser.add_argument_group("data")
    group.add_argument("--data", default="arithmetic", help=f"arithmetic, {', '.join(data.TASKS)}, or a file.jsonl")
    group.add_argument("--data-dir", help="folder with <task>/<split>.jsonl to read instead of the hub")
    group.add_argument("--n", type=int, default=0, help="training examples, 0 = all")
    group.add_argument("--val", type=int, default=50, help="validation examples, held out of the training split")
    group.add_argument("--test", type=int, default=100, help="test examples, 0 = all")
    group.add_argument("--max-length", type=int, default=512, help="tokens of prompt + answer; what is longer is cut")
    group.add_argument("--digits", type=int, default=3, help="arithmetic: digits of each number")
    group.add_argument("--ops", default="+", choices=["+", "-", "+-"], help="arithmetic: sums, differences, or both")
    group.add_argument("--width", type=int, default=96, help="arithmetic: hidden size of the tiny LM")
    group = parser.add_argument_group("search and loss")
    group.add_argument("--search", default="rollouts", choices=["rollouts", "response", "beam", "exact"],
                       help="response: rollouts of response chunks only; the prompt takes the argmax, computed once; "
                            "beam: left to right, N wide; exact: the best of all C^M sequences, for a few codes only")
    group.add_argument("--rollouts", type=int, metavar="N", help="code sequences drawn; 1 = no search")
    group.add_argument("--temperature", type=float, metavar="TAU", help="of the draws; 0 = argmax")
    group.add_argument("--alpha-policy", type=float, help="weight of the router's imitation term")
    group.add_argument("--alpha-reg", type=float, help="weight of the bigram prior")
    group.add_argument("--generalist", action=argparse.BooleanOptionalAction,
                       help="--no-generalist: without the unsteered loss, so that only the steered model is taught")
    group.add_argument("--policy", choices=["imitate", "rloo"],
                       help="what teaches the router: the search's winner, or all rollouts by their scores")
    group.add_argument("--update-on", choices=["best", "argmax", "sample"],
                       help="codes of the steered term: the search's winner, the router's argmax, or its first draw")
    group.add_argument("--search-dtype", choices=["float32", "bfloat16"],
                       help="precision of the search; bfloat16 rounds away what early rollouts differ by")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--lr", type=float, default=1e-5, help="peak learning rate of the LM")
    group.add_argument("--code-lr", type=float, default=1e-3, help="peak learning rate of codebook and router")
    group.add_argument("--weight-decay", type=float, default=0.01, help="of AdamW")
    group.add_argument("--dropout", type=float, metavar="P", help="in the LM while it is trained (default: its own)")
    group.add_argument("--batch-size", type=int, default=8, help="texts a forward pass (of each process)")
    group.add_argument("--accumulate", type=int, default=1, help="batches an optimiser step")
    group.add_argument("--epochs", type=int, default=1)
    group.add_argument("--max-steps", type=int, metavar="S", help="optimiser steps, in place of --epochs")
    group.add_argument("--evaluate-every", type=int, metavar="E", help="steps between looks at the validation NLL")
    group.add_argument("--patience", type=int, metavar="P", help="stop after P looks without a better one and keep the "
                       "best state; after ten steps the rate is constant")
    group.add_argument("--gradient-checkpointing", action="store_true",
                       help="keep less of the forward pass for the backward pass, and compute it again: less memory")
    group.add_argument("--shard", action="store_true",
                       help="under torchrun: spread weights, gradients and optimiser state over the processes")
    group.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"],
                       help="bfloat16: autocast in the update (weights and search stay float32)")
    group = parser.add_argument_group("run and evaluation")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--device", default="auto", help="cuda, mps, cpu or auto")
    group.add_argument("--out", help="folder of the run (default: runs/<model>-<data>-<method>-s<seed>)")
    group.add_argument("--look-every", type=int, metavar="STEPS",
                       help="steps between closer looks at the search, for the log (default: a hundredth of the run)")
    group.add_argument("--save-every", type=int, default=100, help="steps between states to resume from")
    group.add_argument("--resume", action="store_true", help="go on with an interrupted run (same settings)")
    group.add_argument("--overwrite", action="store_true", help="replace the run that is in --out")
    group.add_argument("--max-new-tokens", type=int,
                       help="length limit of an answer (default: 256; arithmetic: 16); 0: no answers, NLL only")
    group.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=CONDITIONS, metavar="NAME",
                       help=f"what to evaluate at the end, to save time: of {', '.join(CONDITIONS)} (default: all; the "
                            f"model as trained is always evaluated)")
    parser.set_defaults(**{field.name: field.default for field in fields(Settings)}, eval_batch_size=None)
    first_look = parser.parse_known_args(argv)[0]
    if first_look.model == "tiny":
        parser.set_defaults(**EMBEDDED, freeze=first_look.method in ROUTED)
    if not (first_look.model == "tiny" and first_look.recipe == "tuned"):
        parser.set_defaults(**RECIPES[first_look.recipe])
    args = parser.parse_args(argv)
    if args.method == "lora":
        args.lora_rank = args.lora_rank or 8
    if args.max_new_tokens is None:
        args.max_new_tokens = args.digits + 13 if args.data == "arithmetic" else 256
    args.eval_batch_size = args.eval_batch_size or 4 * args.batch_size  # no gradients: more texts fit
    if args.out is None:
        name = lambda text: Path(text).stem if text.endswith((".gguf", ".jsonl")) else Path(text).name
        args.out = f"runs/{name(args.model)}-{name(args.data)}-{args.method}-s{args.seed}"
    return args


def flag(name):
    """The flag of a setting, as one types it."""
    return "--" + {"num_codes": "codes", "chunk_size": "chunk"}.get(name, name).replace("_", "-")


def check_settings(args):
    """Raises ValueError for a setting that cannot work, before anything is loaded."""
    for name in ("num_codes", "chunk_size", "rollouts", "batch_size", "accumulate", "epochs", "save_every",
                 "max_length", "digits", "lora_rank", "look_every", "max_steps", "evaluate_every", "patience"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{flag(name)} is {getattr(args, name)}; it must be at least 1.")
    for name in ("temperature", "alpha_policy", "alpha_reg", "lr", "code_lr", "weight_decay", "scale",
                 "max_new_tokens"):
        if not 0 <= getattr(args, name) < math.inf:
            raise ValueError(f"{flag(name)} is {getattr(args, name)}; it must not be negative.")
    if args.dropout is not None and not 0 <= args.dropout < 1:
        raise ValueError(f"--dropout is {args.dropout}; it is a probability, from 0 to below 1.")
    if (args.patience is None) != (args.evaluate_every is None):
        raise ValueError("--patience and --evaluate-every belong together: how many looks, and how often to look.")
    if args.patience and args.val < 1:
        raise ValueError(f"--patience looks at validation examples, and --val is {args.val} (--recipe paper makes one "
                         f"epoch and does not look).")
    if args.lora_rank and args.method not in (*ROUTED, "lora"):
        raise ValueError(f"--lora-rank is for --method {', '.join(ROUTED)} and lora, not for {args.method}.")
    if args.freeze and args.method not in ROUTED:
        raise ValueError(f"--freeze is for --method {' and '.join(ROUTED)}: {args.method} would have nothing to train "
                         f"(lora freezes by itself).")
    if args.search in ("beam", "exact") and (args.policy == "rloo" or args.update_on == "sample"):
        raise ValueError(f"--policy rloo and --update-on sample want draws; --search {args.search} makes none.")
    if args.shard and os.environ.get("WORLD_SIZE", "1") == "1":
        raise ValueError("--shard spreads a model over several processes, and this is one: start it with torchrun.")
    if args.shard and (args.lora_rank or args.method not in (*ROUTED, "sft")):
        raise ValueError(f"--shard is for --method {', '.join(ROUTED)} and sft, without adapters.")
    baselines.check_packages(args.method)
    if args.model == "tiny" and (args.data in data.TASKS or args.data.endswith(".jsonl")):
        raise ValueError("--model tiny only reads arithmetic; for other data pass another --model, such as gpt2.")
    if args.width < 4 or args.width % 4:
        raise ValueError(f"--width is {args.width}; it must be a multiple of 4, for the tiny LM has four heads.")
    if args.model == "tiny" and args.val + args.test > baselines.TINY_HELD_OUT:
        raise ValueError(f"--val and --test are at most {baselines.TINY_HELD_OUT} together: the tiny LM knows the "
                         f"other sums.")


def find_model(args):
    """-> arguments of `from_pretrained` for args.model, after a look at its config alone (None for the tiny one).

    Raises OSError where there is no such model, ValueError for a block that it does not have."""
    path, where, layers = Path(args.model), None, 2
    if path.suffix == ".gguf":
        where = dict(pretrained_model_name_or_path=str(path.parent), gguf_file=path.name)
        if not path.is_file():
            raise FileNotFoundError(f"--model {path} does not exist; it should be a .gguf file.")
    elif args.model != "tiny":
        where = dict(pretrained_model_name_or_path=args.model)
        if path.is_dir() and not (path / "config.json").is_file():
            raise FileNotFoundError(f"--model {path} is a folder without a model: it has no config.json.")
    if where:
        try:
            config = AutoConfig.from_pretrained(**where).get_text_config()
        except (OSError, ValueError) as error:
            raise OSError(f"--model {args.model} was found neither as a local folder or .gguf file nor on the hub "
                          f"({first_line(error)}): pass a model folder, or run without --model for the built-in one.")
        args.max_length = min(args.max_length, getattr(config, "max_position_embeddings", None) or args.max_length)
        layers = config.num_hidden_layers
    for flag, blocks in (("--layer", [args.layer or 0]), ("--lora-layers", args.lora_layers or [0])):
        if not 0 <= min(blocks) <= max(blocks) < layers:
            raise ValueError(f"{flag} is {' '.join(map(str, blocks))}, but {args.model} has blocks 0 to {layers - 1}.")
    return where


def first_line(error):
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_model(args, where, device):
    """-> (lm, tokenizer); the tiny LM is taught first unless it lies in its folder already."""
    if args.model == "tiny":
        where = dict(pretrained_model_name_or_path=str(baselines.teach_tiny(args, device)))
    tokenizer = AutoTokenizer.from_pretrained(**where)
    lm = AutoModelForCausalLM.from_pretrained(**where, **baselines.dropouts(where, args.dropout), dtype=torch.float32)
    if "gguf_file" in where:  # transformers refuses to save such an LM: put its weights into an ordinary one
        config = copy.deepcopy(lm.config)
        del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config, dtype=lm.dtype)
        plain.load_state_dict(lm.state_dict())
        plain.generation_config, lm = lm.generation_config, plain
    return lm.to(device), tokenizer


def dress(args, lm, tokenizer, splits):
    """Change model, tokenizer and texts as the method asks (baselines.py). -> the splits to train and evaluate on"""
    texts = dict(splits)
    if args.lora_rank:
        baselines.add_lora(lm, args.lora_rank, args.lora_layers)
    if args.method == "pause":
        baselines.add_tokens(lm, tokenizer, [baselines.PAUSE])
        texts = {split: baselines.with_pauses(examples) for split, examples in splits.items()}
    elif args.method == "reft":
        baselines.add_reft(lm, args.layer, args.num_codes)
    elif args.method == "tokenassorted":
        texts["train"], said = baselines.assort(splits["train"], lm, tokenizer, args.chunk_size, args.num_codes,
                                                 args.seed)
        print(f"tokenassorted: {said}.")
    return texts


def prepare_out(args):
    """Make the folder of the run. Raises ValueError where a run would be lost."""
    out = Path(args.out)
    config = out / "config.json"
    if args.overwrite:
        for name in ("state.pt", "best.pt", "config.json", "log.jsonl", "metrics.json", "predictions.jsonl"):
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / "model", ignore_errors=True)
    elif (out / "metrics.json").is_file():
        raise ValueError(f"{out} holds a finished run: pass --overwrite to replace it, or another --out.")
    elif args.resume:
        if not config.is_file():
            raise ValueError(f"{out} holds no run to resume: start it without --resume.")
        before = json.loads(config.read_text())
        free = {"resume", "overwrite", "device", "save_every", "out", "conditions"}
        changed = [name for name in set(vars(args)) - free if before.get(name) != getattr(args, name)]
        if changed:
            differs = ", ".join(f"{flag(name)} was {before.get(name)}" for name in sorted(changed))
            raise ValueError(f"--resume needs the settings that {out} began with: {differs}.")
    elif config.is_file():
        raise ValueError(f"{out} holds an unfinished run: pass --resume to go on, or --overwrite to start anew.")
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


def rng_state(device):
    """The states of the random generators that a step draws from, the CPU's and the device's -> [tensor]"""
    device_state = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state()]
    return [torch.get_rng_state(), *device_state]


def write(args, name, state):
    """Put a state under --out, by the first process, so that a kill cannot leave half of it."""
    if processes()[0] == 0:
        torch.save(state, Path(args.out, f"{name}.part"))
        os.replace(Path(args.out, f"{name}.part"), Path(args.out, name))


def save_state(args, step, spread, optimizer, schedule, best, device):
    """Everything a resumed run needs to go on to the same numbers. All processes take part: each may hold a shard."""
    model, optimizer = get_state_dict(spread, optimizer, options=WHOLE)
    rng = gathered({processes()[0]: rng_state(device)})
    write(args, "state.pt", {"step": step, "model": model, "optimizer": optimizer, "schedule": schedule.state_dict(),
                             "best": best, "rng": rng})


def load_state(state, spread, optimizer, schedule, device):
    """Undo `save_state` -> the step to go on with, and the best look at validation before it."""
    set_state_dict(spread, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
                   options=WHOLE)
    schedule.load_state_dict(state["schedule"])
    own = state["rng"][processes()[0]]
    torch.set_rng_state(own[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(own[1])
    return state["step"], state["best"]


def validation_nll(args, model, rows):
    """NLL per response token of the validation texts, under the router's codes for what has codes; None without any."""
    training = model.training
    nll, tokens = response_nll(model.eval(), rows, None if args.method in ROUTED else "off", args.eval_batch_size)
    model.train(training)
    return float(nll.sum() / tokens.sum()) if rows else None


def optimise(args, model, steps):
    """-> AdamW over what is trained, its learning rates, how many steps they take to rise."""
    codes = [p for p in (model.codebook, model.router.weight) if p.requires_grad]
    groups = [{"name": "lr", "params": [p for p in model.lm.parameters() if p.requires_grad], "lr": args.lr},
              {"name": "code_lr", "params": codes, "lr": args.code_lr}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=args.weight_decay,
                                  fused=True)
    warmup = 10 if args.patience else max(1, steps // 20)
    falling = lambda step: 1 if args.patience else (steps - step) / max(1, steps - warmup)
    return optimizer, LambdaLR(optimizer, lambda step: min((step + 1) / warmup, falling(step), 1)), warmup


def train(args, model, rows, held_out, state, device):
    """The loop -> {"step", "nll"} of the state that is kept, None where Ctrl-C (or SIGTERM) ended it early; then the
    state is saved. `held_out`: rows of validation texts, for --patience."""
    rank, world = processes()
    spread = over_gpus(args, model, device)
    per_step = args.batch_size * args.accumulate * world
    per_epoch = math.ceil(len(rows) / per_step)
    steps = args.max_steps or args.epochs * per_epoch
    look_every = args.look_every or max(1, steps // 100)
    optimizer, schedule, warmup = optimise(args, model, steps)
    if world > 1:
        torch.manual_seed(args.seed + rank)  # every process draws codes of its own
    first, best = load_state(state, spread, optimizer, schedule, device) if state else (0, {"step": 0, "nll": None})
    enough = lambda step: args.patience and step - best["step"] >= args.patience * args.evaluate_every
    log_path = Path(args.out, "log.jsonl") if rank == 0 else Path(os.devnull)
    lines = log_path.read_text().splitlines()[:first] if log_path.is_file() else []  # steps after the state are redone
    log_path.write_text("".join(line + "\n" for line in lines))
    looks = (f"; every {args.evaluate_every} a look at {len(held_out)} validation texts, and an end after "
             f"{args.patience} looks without a better one") if args.patience else ""
    print(f"{'At most ' * bool(looks)}{steps} steps of {min(per_step, len(rows))} texts{looks}.", flush=True)
    interrupted, warned, said, began = [], False, time.time(), None
    handlers = {sig: signal.signal(sig, lambda *_: interrupted.append(1)) for sig in (signal.SIGINT, signal.SIGTERM)}
    model.train()
    try:
        with open(log_path, "a", buffering=1) as log, tqdm(total=steps, initial=first, desc=args.method,
                                                           disable=True if rank else None) as bar:
            for step in range(first, first if enough(first) else steps):
                epoch, place = divmod(step, per_epoch)
                order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed + epoch)).tolist()
                chosen = order[place * per_step : (place + 1) * per_step]
                look = step % look_every == 0 or step + 1 == steps
                line = train_step(args, model, spread, optimizer, rows, chosen, step, look, interrupted, device)
                schedule.step()
                stop = line.pop("interrupted")
                if args.patience and (step + 1) % args.evaluate_every == 0:
                    line["validation_nll"] = nll = validation_nll(args, model, held_out)
                    if best["nll"] is None or nll < best["nll"]:
                        best = {"step": step + 1, "nll": nll}
                        write(args, "best.pt", get_model_state_dict(spread, options=WHOLE))
                log.write(json.dumps({"step": step, "epoch": epoch, **line}) + "\n")
                shown = {name: f"{line[name]:.3g}" for name in SHOWN if name in line}
                bar.set_postfix(shown, refresh=False)
                bar.update()
                if step == first:
                    began = time.time()  # the first step also warms up
                if step == first + 3 and (time.time() - began) / 3 * (steps - step) > 60:
                    bar.write(f"{(time.time() - began) / 3:.1f} s a step: {'at most ' * bool(looks)}about "
                              f"{(time.time() - began) / 180 * (steps - step):.0f} minutes to go.")
                if bar.disable and time.time() > said + 10:  # not a terminal
                    said = time.time()
                    print(f"step {step + 1} of {steps}:", *(f"{name} {value}" for name, value in shown.items()))
                if step >= warmup and not warned and search.selects_by_rounding(args, line):
                    warned = True
                    bar.write(search.ROUNDING.format(step=step, **line))
                if stop or step + 1 == steps or enough(step + 1) or (step + 1) % args.save_every == 0:
                    save_state(args, step + 1, spread, optimizer, schedule, best, device)
                if stop:
                    return None
                if enough(step + 1):
                    break
    finally:
        for sig, handler in handlers.items():
            signal.signal(sig, handler)
    if best["nll"] is None:
        return {"step": steps, "nll": None}
    kept = torch.load(Path(args.out, "best.pt"), map_location="cpu", weights_only=True)
    set_model_state_dict(spread, kept, options=WHOLE)
    return best


def own_batch(rows, whole, device):
    """This process's texts of a micro-batch (indices into rows), as `data.collate` makes them.

    A process that is left without a text takes any, with no label: it counts nowhere, but the others wait for it."""
    rank, world = processes()
    own = whole[rank::world]
    batch = data.collate([rows[i] for i in own or whole[:1]], device=device)
    return batch if own else {**batch, "labels": torch.full_like(batch["labels"], -100)}


def train_step(args, model, spread, optimizer, rows, chosen, step, look, interrupted, device):
    """One optimiser step on the chosen rows -> what to log. Raises FloatingPointError where the loss is not finite."""
    began, world, logged = time.time(), processes()[1], {}
    tokens = torch.tensor(sum(len(rows[i][0]) - max(1, rows[i][1]) for i in chosen), device=device)  # of responses
    size = args.batch_size * world
    for start in range(0, len(chosen), size):
        batch, last = own_batch(rows, chosen[start : start + size], device), start + size >= len(chosen)
        use = torch.autocast(device.type, torch.bfloat16) if args.dtype == "bfloat16" else nullcontext()
        meet = last or not hasattr(spread, "no_sync")  # gradients of several processes meet once a step
        with nullcontext() if meet else spread.no_sync():
            with use:
                out = spread(**batch, num_items_in_batch=tokens)  # search, select, and equation (4)
                values = search.step_values(out, batch["labels"], tokens)
                if look and out.trunk is not None:
                    values |= search.look_closer(args, model, out, batch["labels"], tokens)
            (world * out.loss).backward()  # the engine takes the mean over processes, but these are parts of a sum
        for name, value in values.items():
            logged[name] = logged.get(name, 0) + value.detach()
    norm = torch.nn.utils.clip_grad_norm_([p for p in spread.parameters() if p.grad is not None], 1.0)
    logged["grad_norm"] = getattr(norm, "full_tensor", lambda: norm)() / world
    logged["interrupted"] = logged["grad_norm"].new_tensor(float(bool(interrupted)))  # all stop if one is to
    line = dict(zip(logged, over_processes(torch.stack(list(logged.values()))).tolist()))  # the one wait for the device
    if not all(map(math.isfinite, line.values())):
        raise FloatingPointError(f"Step {step}: {line} is not finite (training examples {chosen}), so nothing was "
                                 f"updated; lower --lr, --code-lr or --scale, or use --dtype float32.")
    line.update({group["name"]: group["lr"] for group in optimizer.param_groups})
    optimizer.step()
    optimizer.zero_grad()
    line["tokens_per_s"] = sum(len(rows[i][0]) for i in chosen) / (time.time() - began)
    return line


def main(argv=None):
    args = parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        check_settings(args)
        device = join_processes(choose_device(args.device))
        model, tokenizer, splits, texts, where, state = set_up(args, device)
        rows, cut, dropped = data.encode(texts["train"], tokenizer, args.max_length)
        trained = write_config(args, model) if processes()[0] == 0 else 0
        print(f"{args.method} on {args.data}: {len(rows)} training texts ({cut} cut at {args.max_length} tokens, "
              f"{dropped} too long), {args.model} on {device}, {'LM frozen, ' if args.freeze else ''}{trained:,} "
              f"parameters trained")
        held_out, _, _ = data.encode(texts["validation"], tokenizer, args.max_length)
        if args.patience and not held_out:
            raise ValueError(f"no validation prompt leaves room for an answer within --max-length {args.max_length}.")
        kept = train(args, model, rows, held_out, state, device)
        if not kept:
            raise KeyboardInterrupt
        if args.shard:
            model = in_one_piece(args, model, where, device)
        finish(args, model, tokenizer, splits, texts, held_out, kept, where, device)
    except (OSError, ValueError, FloatingPointError) as error:
        give_up(f"train.py: {first_line(error)}")
    except KeyboardInterrupt:
        give_up(f"Interrupted; the same command with --resume goes on from here (state: {args.out}/state.pt).")
    if args.processes > 1:
        dist.destroy_process_group()


def give_up(message):
    """End with a message, said once: of several processes the first one speaks."""
    sys.exit(message if os.environ.get("RANK", "0") == "0" else 1)


def set_up(args, device):
    """Everything before the first step -> (model, tokenizer, splits, texts of the method, where the LM is from, state).

    Raises OSError or ValueError for what cannot work."""
    if args.model == "tiny" and device.type == "cpu":
        torch.set_num_threads(1)  # its matrices are too small to share out: a second thread only gets in the way
    rank, args.processes = processes()
    if rank:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    with first_process_first():
        splits = data.load(args.data, args.n, args.val, args.test, args.seed, args.data_dir, args.digits, args.ops)
        if args.patience and not splits["validation"]:
            raise ValueError(f"--patience looks at validation examples, and --n {args.n} leaves none of {args.data}.")
        where = find_model(args)
        if rank == 0:
            prepare_out(args)
        if args.model == "tiny" and args.freeze:
            print("Embedded default: a tiny LM that can add a little, frozen; only codebook and router are trained, on "
                  "harder sums (--no-freeze trains the LM along).", flush=True)
        lm, tokenizer = load_model(args, where, device)
    state = Path(args.out, "state.pt")
    state = torch.load(state, map_location="cpu", weights_only=True) if state.is_file() else None
    lm.requires_grad_(not args.freeze)
    torch.manual_seed(args.seed)
    texts = dress(args, lm, tokenizer, splits)
    some, _, _ = data.encode(texts["train"][:32], tokenizer, args.max_length)
    if not some:
        raise ValueError(f"no prompt leaves room for an answer within --max-length {args.max_length}; raise it.")
    return build(args, lm, some, device), tokenizer, splits, texts, where, state


def build(args, lm, rows, device):
    """The DLRModel to train, seeded, its units measured on the first training texts."""
    torch.manual_seed(args.seed)
    kind = DLRModel if args.method in ROUTED else baselines.Unsteered
    model = kind(lm, **settings_of(args)).to(device)
    if args.scale_units == "hidden":
        batch = data.collate(rows[:32], device=device)
        model.calibrate(batch["input_ids"], batch["attention_mask"])
    if args.search == "response":
        model.search = partial(search.response_search, model)
    elif args.search != "rollouts":
        width = {"width": args.rollouts} if args.search == "beam" else {}
        model.search = partial(getattr(search, f"{args.search}_search"), model, **width)
    for parameter in (model.codebook, model.router.weight):
        parameter.requires_grad_(args.method in ROUTED)
    if args.gradient_checkpointing:
        getattr(lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable)()  # its newer name first
    return model


def settings_of(args):
    """The settings of the method among those of the run -> dict"""
    own = {field.name: getattr(args, field.name) for field in fields(Settings)}
    return {**own, "method": "soft" if args.method == "soft" else "dlr"}


def in_one_piece(args, model, where, device):
    """A model whose parameters are spread over processes (`fully_shard`) -> the same in one piece, in each of them."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    whole = DLRModel(load_model(args, where, "cpu")[0], **settings_of(args))
    whole.load_state_dict(state, strict=False)
    return whole.to(device)


def finish(args, model, tokenizer, splits, texts, held_out, kept, where, device):
    """Save the model, answer the test set under every condition, print the table."""
    rank, _ = processes()
    if args.lora_rank:
        baselines.merge_lora(model.lm)
    if rank == 0:
        folder = Path(args.out, "model")
        if args.method == "reft":
            baselines.save_reft(model.lm, folder)
        else:
            (model if args.method in ROUTED else model.lm).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    settings = dict(max_length=args.max_length, max_new_tokens=args.max_new_tokens, batch_size=args.eval_batch_size)
    model.eval()
    validation = validation_nll(args, model, held_out)
    conditions = conditions_of(args.method, args.conditions)
    metrics, predictions = evaluate(model, tokenizer, texts["test"], conditions, **settings)
    base = base_predictions = {}
    if args.freeze and not args.lora_rank and "off" in metrics:  # the LM is the one it was
        base, base_predictions = {"base": metrics["off"]}, {"base": predictions["off"]}
    elif "base" in args.conditions:
        model.to("cpu")  # room for the other one
        lm, tokenizer = load_model(args, where, device)
        base, base_predictions = evaluate(DLRModel(lm).to(device), tokenizer, splits["test"], ["base"], **settings)
    metrics, predictions = {**base, **metrics}, {**base_predictions, **predictions}
    if rank:
        return
    write_results(args.out, metrics, predictions, validation={"nll": validation}, kept=kept)
    for name in ("state.pt", "best.pt"):
        Path(args.out, name).unlink(missing_ok=True)
    print(f"\n{len(splits['test'])} test examples of {args.data}, greedy:\n{table(metrics)}")
    print(reading(args.method, predictions))
    if args.method in ROUTED:
        print(search.hindsight_gap(args))
    which = f" of the state after step {kept['step']}, the best of those looked at" if args.patience else ""
    print(f"validation NLL{which}: {validation and round(validation, 4)}. Saved in {args.out}: model/, metrics.json, "
          f"predictions.jsonl, log.jsonl.")


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


if __name__ == "__main__":
    main()
