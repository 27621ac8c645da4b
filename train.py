"""Post-train a language model with Dynamic Latent Routing (or what it is compared with), evaluate it, save it.

    python train.py                                                  # embedded default: nothing to download, 1 minute
    python train.py --model gpt2 --data gsm8k --n 256                # a model and a data set from the hub
    python train.py --model gpt2 --data gsm8k --n 256 --method sft   # no codes; also pause, tokenassorted, lora
    python train.py --model ./my-model --data ./my.jsonl             # a local folder or file.gguf; prompts, responses
    torchrun --nproc_per_node=2 -- train.py --model gpt2 --data gsm8k --n 256        # several GPUs

Each step: *search* N code sequences for every text of the batch, *select* the likeliest, *update* LM, codebook and
router together: `model(**batch).loss.backward()` (equations in dlr.py). The other methods (baselines.py) change the
model or the texts, and share all else. Top to bottom: settings, checks, model, loop, end.

The embedded default is a setting in which codes carry weight: a GPT-2 of two blocks is first taught to add three-digit
numbers (and kept), the way a pretrained model arrives; then DLR steers it, frozen, on a little hard addition.

Under --out: config.json (settings, versions), log.jsonl (a line a step), metrics.json, predictions.jsonl, model/ (a
Hugging Face folder; DLRModel.from_pretrained loads it); until the end, state.pt and best.pt, to resume from.
"""
import argparse
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_state_dict,
                                                     set_model_state_dict, set_state_dict)
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import baselines
import data
import search
from baselines import explained, load_model
from compare import open_log, prepare_out, reading, write_config
from dlr import DLRModel, Settings
from eval import (CONDITIONS, ROUTED, choose_device, conditions_of, evaluate, first_process_first, gathered,
                  join_processes, over_gpus, over_processes, processes, table, validation_nll, write_results)

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
SAVE_EVERY = 100  # steps between states to resume from
# the method's settings that have no flag of their own; scale_units=hidden: alpha in units of the LM's typical h
MORE = {"scale_units": "absolute"} | {field.name: field.default for field in fields(Settings) if field.name not in
                                      ("num_codes", "chunk_size", "layer", "scale", "method", "rollouts")}


def flags():
    """-> argparse.ArgumentParser with every flag"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"train.py: {message}; see --help.")  # one sentence, not a page of usage
    spelled = {name: " ".join(f"{flag(key)}{' ='[key in MORE]}{value}" for key, value in own.items())
               for name, own in RECIPES.items()}
    add = parser.add_argument_group("model and method").add_argument
    add("--recipe", default="tuned", choices=list(RECIPES), help=f"tuned (default; tiny has its own): "
        f"{spelled['tuned']}; paper: the paper's numbers, one epoch; ours: {spelled['ours']}")
    add("--model", default="tiny", help="tiny (default), a hub name, a local folder, a .gguf file")
    add("--method", default="dlr", choices=[*ROUTED, "sft", "pause", "tokenassorted", "lora", "reft"],
        help="soft: no search, steered by the router's mixture; sft: no codes; others: baselines.py")
    add("--freeze", action=argparse.BooleanOptionalAction, default=False,
        help="dlr: train codebook and router only (default: train the LM along; tiny: freeze)")
    add("--codes", type=int, dest="num_codes", metavar="C", help="size of the codebook; 1 = one vector")
    add("--chunk", type=int, dest="chunk_size", metavar="K", help="tokens a chunk")
    add("--layer", type=int, help="block whose output is steered, from 0 (default: the middle one)")
    add("--scale", type=float, metavar="ALPHA", help="weight of the added code vectors")
    add("--lora-rank", type=int, metavar="R", help="train the LM through adapters of this rank (lora: 8)")
    add("--lora-layers", type=int, nargs="+", metavar="L", help="their blocks (default: all)")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="arithmetic", help=f"arithmetic, {', '.join(data.TASKS)}, or a file.jsonl")
    add("--data-dir", help="folder with <task>/<split>.jsonl to read instead of the hub")
    add("--n", type=int, default=0, help="training examples, 0 = all")
    add("--val", type=int, default=50, help="validation examples, held out of the training split")
    add("--test", type=int, default=100, help="test examples, 0 = all")
    add("--max-length", type=int, default=512, help="tokens of prompt + answer; what is longer is cut")
    add("--digits", type=int, default=3, help="arithmetic: digits of each number")
    add("--ops", default="+", choices=["+", "-", "+-"], help="arithmetic: sums, differences, or both")
    add("--width", type=int, default=96, help="arithmetic: hidden size of the tiny LM")
    add = parser.add_argument_group("search and loss").add_argument
    add("--search", default="rollouts", choices=["rollouts", "response", "beam", "exact"], help="response: rollouts of "
        "the response, the prompt takes the argmax; beam: left to right, N wide; exact: of all C^M sequences the best")
    add("--rollouts", type=int, metavar="N", help="code sequences drawn; 1 = no search")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help=f"other settings (see dlr.Settings), of {', '.join(f'{k}={v}' for k, v in MORE.items())}")
    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=float, default=1e-5, help="peak learning rate of the LM")
    add("--code-lr", type=float, default=1e-3, help="peak learning rate of codebook and router")
    add("--batch-size", type=int, default=8, help="texts a forward pass (of each process)")
    add("--accumulate", type=int, default=1, help="batches an optimiser step")
    add("--epochs", type=float, default=1, help="passes over the texts; 0.5 is half a pass")
    add("--evaluate-every", type=int, metavar="E", help="steps between looks at the validation NLL")
    add("--patience", type=int, metavar="P", help="stop after P looks without a better one; keep the best state")
    add("--gradient-checkpointing", action="store_true", help="compute the forward pass twice: less memory")
    add("--shard", action="store_true", help="under torchrun: weights, gradients, optimiser state over the processes")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16: autocast in the update")
    add = parser.add_argument_group("run and evaluation").add_argument
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="cuda, mps, cpu or auto")
    add("--out", help="folder of the run (default: runs/<model>-<data>-<method>-s<seed>)")
    add("--resume", action="store_true", help="go on with an interrupted run (same settings)")
    add("--max-new-tokens", type=int, help="length limit of an answer (default: 256; arithmetic: 16); 0: NLL only")
    add("--conditions", nargs="+", choices=CONDITIONS, default=CONDITIONS, metavar="NAME", help=f"what to evaluate at "
        f"the end beside the model as trained, of {', '.join(CONDITIONS)} (default: all)")
    return parser


def parse_args(argv=None):
    """The settings of a run. -> argparse.Namespace"""
    parser = flags()
    parser.set_defaults(**{field.name: field.default for field in fields(Settings)}, scale_units="absolute")
    first_look = parser.parse_known_args(argv)[0]
    if first_look.model == "tiny":
        parser.set_defaults(**EMBEDDED, freeze=first_look.method in ROUTED)
    if not (first_look.model == "tiny" and first_look.recipe == "tuned"):
        parser.set_defaults(**RECIPES[first_look.recipe])
    args = parser.parse_args(argv)
    for given in args.set:
        name, _, value = given.partition("=")
        try:
            kind = type(MORE[name])
            setattr(args, name, {"True": True, "False": False}[value] if kind is bool else kind(value))
        except (KeyError, ValueError):
            parser.error(f"--set {given} is none of {', '.join(f'{k}={v}' for k, v in MORE.items())}")
    del args.set
    args.lora_rank = args.lora_rank or (8 if args.method == "lora" else None)
    if args.max_new_tokens is None:
        args.max_new_tokens = args.digits + 13 if args.data == "arithmetic" else 256
    args.eval_batch_size = getattr(args, "eval_batch_size", 4 * args.batch_size)  # no gradients: more texts fit
    if args.out is None:
        name = lambda text: Path(text).stem if text.endswith((".gguf", ".jsonl")) else Path(text).name
        args.out = f"runs/{name(args.model)}-{name(args.data)}-{args.method}-s{args.seed}"
    return args


def flag(name):
    """The flag of a setting, as one types it."""
    if name in MORE:
        return f"--set {name}"
    return "--" + {"num_codes": "codes", "chunk_size": "chunk"}.get(name, name).replace("_", "-")


def check_settings(args):
    """Raises ValueError for a setting that cannot work, before anything is loaded."""
    for name in ("num_codes", "chunk_size", "rollouts", "batch_size", "accumulate", "max_length", "digits",
                 "lora_rank", "evaluate_every", "patience"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{flag(name)} is {getattr(args, name)}; it must be at least 1.")
    for name in ("lr", "code_lr", "scale", "max_new_tokens", "epochs"):
        if not 0 <= getattr(args, name) < math.inf:
            raise ValueError(f"{flag(name)} is {getattr(args, name)}; it must not be negative.")
    Settings(**settings_of(args))  # raises for the others of the method
    routed, tiny = args.method in ROUTED, args.model == "tiny"
    for wrong, sentence in (
            (args.epochs == 0, "--epochs is 0; training takes more."),
            (args.scale_units not in ("absolute", "hidden"), "scale_units should be one of absolute, hidden."),
            ((args.patience is None) != (args.evaluate_every is None),
             "--patience and --evaluate-every belong together: how many looks, and how often to look."),
            (args.patience and args.val < 1, f"--patience looks at validation examples, and --val is {args.val} "
                                             f"(--recipe paper makes one epoch and does not look)."),
            (args.lora_rank and not routed and args.method != "lora",
             f"--lora-rank is for --method {', '.join(ROUTED)} and lora, not for {args.method}."),
            (args.freeze and not routed, f"--freeze is for --method {' and '.join(ROUTED)}: {args.method} would have "
                                         f"nothing to train (lora freezes by itself)."),
            (args.search in ("beam", "exact") and (args.policy == "rloo" or args.update_on == "sample"),
             f"policy=rloo and update_on=sample want draws; --search {args.search} makes none."),
            (args.shard and (args.lora_rank or args.patience or not routed and args.method != "sft"),
             f"--shard is for --method {', '.join(ROUTED)} and sft, without adapters or --patience: --recipe paper."),
            (args.shard and os.environ.get("WORLD_SIZE", "1") == "1",
             "--shard spreads a model over several processes, and this is one: start it with torchrun."),
            (tiny and (args.data in data.TASKS or args.data.endswith(".jsonl")),
             "--model tiny only reads arithmetic; for other data pass another --model, such as gpt2."),
            (args.width < 4 or args.width % 4,
             f"--width is {args.width}; it must be a multiple of 4, for the tiny LM has four heads."),
            (tiny and args.val + args.test > baselines.TINY_HELD_OUT, f"--val and --test are at most "
             f"{baselines.TINY_HELD_OUT} together: the tiny LM knows the other sums.")):
        if wrong:
            raise ValueError(sentence)
    baselines.check_packages(args.method)


def write(args, name, state):
    """Put a state under --out, by the first process, so that a kill cannot leave half of it."""
    if processes()[0] == 0:
        torch.save(state, Path(args.out, f"{name}.part"))
        os.replace(Path(args.out, f"{name}.part"), Path(args.out, name))


def save_state(args, step, spread, optimizer, schedule, best, device):
    """Everything a resumed run needs to go on to the same numbers. All processes take part: each may hold a shard."""
    model, optimizer = get_state_dict(spread, optimizer, options=WHOLE)
    device_rng = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state()]
    rng = gathered({processes()[0]: [torch.get_rng_state(), *device_rng]})
    write(args, "state.pt", dict(step=step, model=model, optimizer=optimizer, schedule=schedule.state_dict(), best=best,
                                 rng=rng))


def load_state(args, spread, optimizer, schedule, device):
    """Undo `save_state`, if there is a state -> the step to go on with, and the best look at validation before it."""
    if not Path(args.out, "state.pt").is_file():
        return 0, {"step": 0, "nll": None}
    state = torch.load(Path(args.out, "state.pt"), map_location="cpu", weights_only=True)
    model, moments = state["model"], state["optimizer"]
    set_state_dict(spread, optimizer, model_state_dict=model, optim_state_dict=moments, options=WHOLE)
    schedule.load_state_dict(state["schedule"])
    rng, *device_rng = state["rng"][processes()[0]]
    torch.set_rng_state(rng)
    for one in device_rng:
        torch.get_device_module(device).set_rng_state(one)
    return state["step"], state["best"]


def optimise(args, model, steps):
    """-> AdamW over what is trained, its learning rates, how many steps they take to rise."""
    codes = [p for p in (model.codebook, model.router.weight) if p.requires_grad]
    groups = [{"name": "lr", "params": [p for p in model.lm.parameters() if p.requires_grad], "lr": args.lr},
              {"name": "code_lr", "params": codes, "lr": args.code_lr}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.01, fused=True)
    warmup = 10 if args.patience else max(1, steps // 20)
    falling = lambda step: 1 if args.patience else (steps - step) / max(1, steps - warmup)
    return optimizer, LambdaLR(optimizer, lambda step: min((step + 1) / warmup, falling(step), 1)), warmup


def train(args, model, rows, held_out, device):
    """The loop -> {"step", "nll"} of the state that is kept. `held_out`: rows of validation texts, for --patience.

    Ctrl-C and SIGTERM end the step, save the state and raise KeyboardInterrupt."""
    rank, world = processes()
    spread = over_gpus(args, model, device)
    per_step = args.batch_size * args.accumulate * world
    per_epoch = math.ceil(len(rows) / per_step)
    steps = math.ceil(args.epochs * per_epoch)
    look_every = args.evaluate_every or max(1, steps // 100)
    optimizer, schedule, warmup = optimise(args, model, steps)
    if world > 1:
        torch.manual_seed(args.seed + rank)  # every process draws codes of its own
    first, best = load_state(args, spread, optimizer, schedule, device)
    enough = lambda step: args.patience and step - best["step"] >= args.patience * args.evaluate_every
    looks = (f"; every {args.evaluate_every} a look at {len(held_out)} validation texts, and an end after "
             f"{args.patience} looks without a better one") if args.patience else ""
    print(f"{'At most ' * bool(looks)}{steps} steps of {min(per_step, len(rows))} texts{looks}.", flush=True)
    interrupted, log = [], open_log(args, first)
    handlers = {sig: signal.signal(sig, lambda *_: interrupted.append(1)) for sig in (signal.SIGINT, signal.SIGTERM)}
    model.train()
    try:
        with log, tqdm(total=steps, initial=first, desc=args.method, disable=True if rank else None) as bar:
            bar.first, bar.began, bar.said = first, time.time(), time.time()
            for step in range(first, first if enough(first) else steps):
                epoch, place = divmod(step, per_epoch)
                order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed + epoch)).tolist()
                chosen = order[place * per_step : (place + 1) * per_step]
                look = step % look_every == 0 or step + 1 == steps
                line = train_step(args, model, spread, optimizer, rows, chosen, step, look, interrupted, device)
                schedule.step()
                stop = line.pop("interrupted")
                if args.patience and ((step + 1) % args.evaluate_every == 0 or step + 1 == steps):
                    line["validation_nll"] = nll = validation_nll(args, model, held_out)
                    if best["nll"] is None or nll < best["nll"]:
                        best = {"step": step + 1, "nll": nll}
                        write(args, "best.pt", get_model_state_dict(spread, options=WHOLE))
                log.write(json.dumps({"step": step, "epoch": epoch, **line}) + "\n")
                narrate(args, bar, step, line, warm=step >= warmup)
                if stop or step + 1 == steps or enough(step + 1) or (step + 1) % SAVE_EVERY == 0:
                    save_state(args, step + 1, spread, optimizer, schedule, best, device)
                if stop:
                    raise KeyboardInterrupt
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


def narrate(args, bar, step, line, warm):
    """Show a step in the bar or, where there is no terminal, every ten seconds; after four, how long all will take."""
    names = ("loss", "generalist", "steered", "policy", "prior", "spread", "codes_used", "tokens_per_s")
    shown = {name: f"{line[name]:.3g}" for name in names if name in line}
    bar.set_postfix(shown, refresh=False)
    bar.update()
    each, ahead = (time.time() - bar.began) / 4, bar.total - step
    if step == bar.first + 3 and each * ahead > 60:
        most = "at most " * bool(args.patience)
        bar.write(f"{each:.1f} s a step: {most}about {each * ahead / 60:.0f} minutes to go.")
    if bar.disable and time.time() > bar.said + 10:
        bar.said = time.time()
        print(f"step {step + 1} of {bar.total}:", *(f"{name} {value}" for name, value in shown.items()))
    if warm and not hasattr(bar, "warned") and search.selects_by_rounding(args, line):
        bar.warned = True
        bar.write(search.ROUNDING.format(step=step, **line))


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
        model, tokenizer, splits, texts, rows, held_out, where = set_up(args, device)
        kept = train(args, model, rows, held_out, device)
        if args.shard:
            model = in_one_piece(args, model, where, device)
        finish(args, model, tokenizer, splits, texts, held_out, kept, where, device)
    except (OSError, ValueError, FloatingPointError, RuntimeError, KeyboardInterrupt) as error:
        resume = f"Interrupted; the same command with --resume goes on from here (state: {args.out}/state.pt)."
        said = resume if isinstance(error, KeyboardInterrupt) else f"train.py: {explained(error)}"
        sys.exit(said if os.environ.get("RANK", "0") == "0" else 1)  # of several processes the first one speaks
    if args.processes > 1:
        dist.destroy_process_group()


def set_up(args, device):
    """Everything before the first step -> (model, tokenizer, splits, texts of the method, rows of its training texts
    and of its validation texts, where the LM is from). Raises OSError or ValueError for what cannot work."""
    if args.model == "tiny" and device.type == "cpu":
        torch.set_num_threads(1)  # its matrices are too small to share out: a second thread only gets in the way
    rank, args.processes = processes()
    if rank:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    with first_process_first():
        splits = data.load(args.data, args.n, args.val, args.test, args.seed, args.data_dir, args.digits, args.ops)
        if args.patience and not splits["validation"]:
            raise ValueError(f"--patience looks at validation examples, and --n {args.n} leaves none of {args.data}.")
        where = baselines.find_model(args)
        if rank == 0:
            prepare_out(args)
        if args.model == "tiny" and args.freeze:
            print("Embedded default: a tiny LM that can add a little, frozen; only codebook and router are trained, on "
                  "harder sums (--no-freeze trains the LM along).", flush=True)
        lm, tokenizer = load_model(args, where, device)
    lm.requires_grad_(not args.freeze)
    torch.manual_seed(args.seed)
    texts = baselines.dress(args, lm, tokenizer, splits)
    rows, cut, dropped = data.encode(texts["train"], tokenizer, args.max_length)
    held_out, _, _ = data.encode(texts["validation"], tokenizer, args.max_length)
    if not rows or args.patience and not held_out:
        raise ValueError(f"no prompt of the {'validation' if rows else 'training'} texts leaves room for an answer "
                         f"within --max-length {args.max_length}; raise it.")
    model = build(args, lm, rows, device)
    trained = write_config(args, model) if rank == 0 else 0
    print(f"{args.method} on {args.data}: {len(rows)} training texts ({cut} cut at {args.max_length} tokens, {dropped} "
          f"too long), {args.model} on {device}, {'LM frozen, ' * args.freeze}{trained:,} parameters trained")
    return model, tokenizer, splits, texts, rows, held_out, where


def build(args, lm, rows, device):
    """The DLRModel to train, seeded, its units measured on the first training texts."""
    torch.manual_seed(args.seed)
    kind = DLRModel if args.method in ROUTED else baselines.Unsteered
    model = kind(lm, **settings_of(args)).to(device)
    if args.scale_units == "hidden":
        batch = data.collate(rows[:32], device=device)
        model.calibrate(batch["input_ids"], batch["attention_mask"])
    search.use(model, args.search)
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
    if args.lora_rank:
        baselines.merge_lora(model.lm)
    if processes()[0] == 0:
        baselines.save_model(model, tokenizer, Path(args.out, "model"))
    settings = dict(max_length=args.max_length, max_new_tokens=args.max_new_tokens, batch_size=args.eval_batch_size)
    validation = validation_nll(args, model, held_out)
    found = evaluate(model, tokenizer, texts["test"], conditions_of(args.method, args.conditions), **settings)
    base = [{}, {}]
    if args.freeze and not args.lora_rank and "off" in found[0]:  # the LM is the one it was
        base = [{"base": part["off"]} for part in found]
    elif "base" in args.conditions:
        model.to("cpu")  # room for the other one
        lm, tokenizer = load_model(args, where, device)
        base = evaluate(DLRModel(lm).to(device), tokenizer, splits["test"], ["base"], **settings)
    if processes()[0]:
        return
    metrics, predictions = base[0] | found[0], base[1] | found[1]
    write_results(args.out, metrics, predictions, validation={"nll": validation}, kept=kept)
    for name in ("state.pt", "best.pt"):
        Path(args.out, name).unlink(missing_ok=True)
    print(f"\n{len(splits['test'])} test examples of {args.data}, greedy:\n{table(metrics)}\n"
          f"{reading(args.method, predictions)}")
    if args.method in ROUTED:
        print(search.hindsight_gap(args))
    which = f" of the state after step {kept['step']}, the best of those looked at" if args.patience else ""
    print(f"validation NLL{which}: {validation and round(validation, 4)}. Saved in {args.out}: model/, metrics.json, "
          f"predictions.jsonl, log.jsonl.")


if __name__ == "__main__":
    main()
