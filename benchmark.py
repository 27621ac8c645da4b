"""What a step of Dynamic Latent Routing costs: in time and memory here, or estimated for any model and device.

    python benchmark.py --model gpt2 --data gsm8k --n 64 --batch-size 4 --rounds 2      # real steps, timed
    python benchmark.py --estimate --model gpt2 --rollouts 8                            # what will my run need?
    python benchmark.py --estimate --hidden 4096 --layers 32 --heads 32 --kv-heads 8 --intermediate 14336 --vocab 128256
    python benchmark.py --estimate --table                                              # 0.6B to 70B on 1 to 64 GPUs

Timed are steps of the whole LM, optimiser included: SFT; DLR as one would first write it (naive: every rollout and both
paths through the whole model, all logits built); and the step of dlr.py, where the blocks up to the injection layer run
once for all of them. Beside them stand the operations that no implementation does without (the *floor*) and the memory
that is estimated. On a CPU, memory is the process's. To compare it with the estimate, set MALLOC_MMAP_THRESHOLD_=262144
in the environment: the C library then gives back at once what is freed. The estimate needs a model's config alone:

Operations, for n tokens in texts of T, r of them of responses: a token costs two a weight, and in each block 4 T A for
attention, A = heads * their size. So let b = n (2 weights + 4 T A), over the blocks `below` (up to the injection) or
`above` it, and v = 2 r V H, the head. A backward pass counts as two forward ones:
    SFT       3 (b_below + b_above + v)
    search    N (b_above + v)
    update    3 b_below + 2 * 3 (b_above + v) + 3 * 2 (n / K) C H       two paths, unsteered and steered; the router
Checkpointing adds (at most) a forward of the blocks to each backward. No implementation does with fewer, so the sum
over that of SFT is the *floor*. (Attention counts in full though half is masked, as does every expert of a mixture.)

Memory of P parameters: 4 P bytes of weights, 4 P of gradients, 8 P of Adam. What a block keeps for its backward pass,
k, and what it needs while it runs, w, have no short formula; they are read off one and two blocks that run in
FakeTensorMode, with shapes and without numbers (grouped keys and values count as repeated there, a little too much).
With L blocks, h = 4 B T H, and u = 4 r V, the log-probabilities:
    SFT  L k + u        search  L_below k + 2 N h + w(N B texts)        update  (L_below + 2 L_above) k + 2 u
Checkpointing keeps h a block instead, and k of one. As gradients come, activations go: the largest sum is the peak.
Under autocast to bfloat16 a copy of the blocks' weights, 2 P, stays as long as its graph; the search is in float32.
Several processes divide weights, gradients and Adam, as fully_shard does; but embeddings, head, blocks on their way and
those copies are whole in each. Time is operations over what the device is assumed to do, without communication.
"""
import argparse
import ctypes
import math
import sys
import time
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

import baselines
import data
import train
from dlr import HEAD_ROWS, DLRModel, find_blocks
from eval import choose_device
from search import response_search

PEAK = {"float32": 67, "bfloat16": 989}  # TFLOP/s of an H100; float32 without TF32, which torch leaves off
SHAPES = {  # hidden size, blocks, heads, key-value heads, MLP, vocabulary, size of a head, tied embeddings, model type
    "Qwen3-0.6B": (1024, 28, 16, 8, 3072, 151936, 128, True, "qwen3"),
    "Qwen3-1.7B": (2048, 28, 16, 8, 6144, 151936, 128, True, "qwen3"),
    "Qwen3-8B": (4096, 36, 32, 8, 12288, 151936, 128, False, "qwen3"),
    "Qwen3-32B": (5120, 64, 64, 8, 25600, 151936, 128, False, "qwen3"),
    "Llama-70B": (8192, 80, 64, 8, 28672, 128256, 128, False, "llama"),
}
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
    group.add_argument("--dtype", default="float32", choices=list(PEAK), help="bfloat16: autocast")
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
        group.add_argument(f"--{name.replace('_', '-')}", type=int, help="of a Llama of random weights, not --model")
    group.add_argument("--rollouts", type=int, default=8, metavar="N", help="code sequences drawn")
    group.add_argument("--response-share", type=float, default=0.5, help="of the tokens")
    group.add_argument("--processes", type=int, default=1, help="that train.py --shard spreads the model over")
    group.add_argument("--peak", type=float, help="TFLOP/s of the device in --dtype (default: an H100's)")
    group.add_argument("--search-peak", type=float, default=PEAK["float32"],
                       help="the same of the search, which is in float32")
    group.add_argument("--utilisation", type=float, default=0.4, help="share of the peak that is reached")
    args = parser.parse_args(argv)
    args.peak = args.peak or PEAK["bfloat16" if args.table else args.dtype]
    # what train.py's helpers read besides, to find or teach a model
    return argparse.Namespace(**{**vars(train.parse_args(["--model", args.model, "--recipe", "paper"])), **vars(args),
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
    if args.table and not args.estimate:
        raise ValueError("--table is for --estimate: a GPU's steps are timed one shape at a time.")
    if given and len(given) < len(SHAPE):
        raise ValueError(f"A shape by hand wants --{' --'.join(SHAPE).replace('_', '-')}, all of them.")
    if given and (args.hidden % args.heads or args.heads % args.kv_heads):
        raise ValueError(f"--heads is {args.heads}; it must divide --hidden and be a multiple of --kv-heads.")
    if args.estimate and args.model == "tiny" and not (given or args.table):
        raise ValueError("--estimate wants a --model with a config, such as gpt2, or a shape by hand (--hidden ...).")


def sft_step(model, batch):
    """The loss of an SFT step, with the logits of response tokens only -> scalar."""
    trunk = model.trunk(batch["input_ids"], batch["attention_mask"])
    log_p = model.log_likelihood(trunk, batch["labels"], torch.full_like(trunk.first, -1))
    return -log_p.sum() / (batch["labels"][:, 1:] >= 0).sum()


def dlr_step(model, batch, rollouts, search=DLRModel.search):
    """Search, select, and the loss of a DLR step, in training mode -> scalar."""
    model.settings.rollouts, model.search = rollouts, partial(search, model)
    return model(**batch).loss


def naive_dlr_step(model, batch, rollouts):
    """The DLR loss as one would first write it: every rollout and both paths through the whole model, all logits built.

    The search is in float32 whatever surrounds it, as in dlr.py. -> scalar"""
    targets = batch["labels"][:, 1:]
    text = dict(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    def nll(logits):  # (B, T, V) -> (B,)
        per_token = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="none")
        return per_token.view(targets.shape).sum(1)

    logits = model.route(model.trunk(**text))  # (B, M, C)
    with torch.no_grad(), torch.autocast(targets.device.type, enabled=False):
        drawn = torch.distributions.Categorical(logits=logits).sample((rollouts,))  # (N, B, M)
        scores = torch.stack([nll(model(**text, codes=codes).logits) for codes in drawn])  # (N, B)
    best = drawn[scores.argmin(0), range(len(targets))]  # (B, M)
    both = nll(model(**text, codes=best).logits) + nll(model.lm(**text).logits)
    return both.sum() / (targets >= 0).sum() + F.cross_entropy(logits.flatten(0, 1), best.flatten())


def config_of(hidden, layers, heads, kv_heads, intermediate, vocab, head_dim=None, tied=False, kind="llama"):
    """-> the config of a model of this shape."""
    return AutoConfig.for_model(
        kind, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=intermediate, vocab_size=vocab, tie_word_embeddings=tied,
        head_dim=head_dim or hidden // heads)


def given_shape(args):
    """-> the config of the shape that was given by hand."""
    return config_of(**{name: getattr(args, name) for name in (*SHAPE, "head_dim")})


@dataclass
class Batch:
    """`texts` of `length` tokens each, padding included; `answered`: how many of all are of responses."""

    texts: int
    length: int
    answered: float


class Size:
    """The numbers of an LM that the estimate needs, counted on the meta device: weights have shapes and no memory.

    Raises ValueError for a layer that the LM does not have, or an LM of a single block."""

    def __init__(self, config, layer=None):
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config)
        blocks, text = lm.get_submodule(find_blocks(lm)), config.get_text_config()
        self.config, self.width, self.vocab = config, text.hidden_size, text.vocab_size
        self.layer = len(blocks) // 2 if layer is None else layer
        if len(blocks) < 2:
            raise ValueError("This model has one block; the estimate wants two.")
        if not 0 <= self.layer < len(blocks):
            raise ValueError(f"--layer is {self.layer}, but this model has blocks 0 to {len(blocks) - 1}.")
        self.total = sum(p.numel() for p in lm.parameters())  # tied ones once
        self.blocks = [sum(p.numel() for p in block.parameters()) for block in blocks]
        self.matrices = [sum(p.numel() for p in block.parameters() if p.dim() > 1) for block in blocks]
        self.tied = lm.get_input_embeddings().weight is lm.get_output_embeddings().weight
        self.attention = text.num_attention_heads * (
            getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)  # A


def operations(size, batch, rollouts=None, codes=32, chunk=4, checkpointing=False):
    """Of a step -> (search, update). `rollouts` None: of SFT, which searches nothing."""
    tokens, times = batch.texts * batch.length, 3 + checkpointing
    blocks = [tokens * (2 * weights + 4 * batch.length * size.attention) for weights in size.matrices]
    below, above = sum(blocks[: size.layer + 1]), sum(blocks[size.layer + 1 :])
    head = 2 * batch.answered * size.vocab * size.width
    if rollouts is None:
        return 0, times * (below + above) + 3 * head
    router = 3 * 2 * tokens / chunk * codes * size.width
    return rollouts * (above + head), times * (below + 2 * above) + 6 * head + router


class Bytes(TorchDispatchMode):
    """Inside, counts the bytes of tensors that come into being, until they are freed: `live` now, `peak` at most."""

    def __init__(self, module):
        super().__init__()
        self.live = self.peak = 0
        self.before = [t.untyped_storage() for t in (*module.parameters(), *module.buffers())]
        self.known = {storage._cdata for storage in self.before}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:  # no view of what is counted already
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _freed(self, key, size):
        self.known.discard(key)
        self.live -= size


@cache
def run_blocks(size, number, texts, length, grad, autocast=False):
    """The first blocks of an LM, run without numbers -> bytes (kept for a backward pass, needed at the peak)."""
    with FakeTensorMode():
        lm = AutoModelForCausalLM.from_config(size.config).train(grad)
        blocks = find_blocks(lm)
        del lm.get_submodule(blocks)[number:]
        backbone, ids = lm.get_submodule(blocks.rpartition(".")[0]), torch.zeros(texts, length, dtype=torch.long)
        with (Bytes(lm) as count, torch.set_grad_enabled(grad),
              torch.autocast("cpu", torch.bfloat16, enabled=autocast)):
            output = backbone(input_ids=ids, use_cache=False)
            live = count.live
        del output
    return live, count.peak


def memory(size, batch, rollouts=None, bfloat16=False, checkpointing=False, processes=1):
    """Bytes in each process -> {what: bytes}. `rollouts` None: of SFT. `batch` is what one process runs at once.

    "search" and "update" are the most that either needs beside weights, gradients and Adam. "peak" is of all together,
    and less than their sum, for gradients come as activations go."""
    one, two = (run_blocks(size, n, batch.texts, batch.length, True, bfloat16)[0] for n in (1, 2))
    copies = [2 * weights * bfloat16 for weights in size.matrices]
    kept = two - one - copies[1]  # k of the docstring
    hidden = 4 * batch.texts * batch.length * size.width  # h
    begin, again, stay = one - kept - copies[0], 0, sum(copies)  # begin: embeddings, positions, masks
    if checkpointing:
        kept, again, stay = hidden, kept + copies[0], 0
    below, few = size.layer + 1, 4 * min(HEAD_ROWS, batch.answered) * size.vocab  # few: logits that are built at once
    trunk = begin + below * kept
    path = hidden + (len(size.blocks) - below) * kept + 4 * batch.answered * size.vocab
    update, search = trunk + (1 if rollouts is None else 2) * path + few, 0
    if rollouts is not None:
        work = run_blocks(size, 2, rollouts * batch.texts, batch.length, False)[1]  # w
        search = trunk + sum(copies[:below]) + 2 * rollouts * hidden + max(work, 2 * few)
    # gradients: of the head, of embeddings and head, of the blocks above the injection, of all blocks
    head, outer = 4 * size.vocab * size.width, 4 * (size.total - sum(size.blocks))
    above, every = (4 * sum(part) / processes for part in (size.blocks[below:], size.blocks))
    moments = [search,
               update + sum(copies),  # the forward pass ends
               update + stay + 2 * head,  # the backward pass has begun: the head's gradient, and a slice's part of it
               update - path + stay + again + head + above,  # it is through one path
               head + again + every,  # it is at the first block
               outer + every + head * size.tied]  # it ends; embeddings that are also the head have two gradients
    # sharded, what is whole for a while: embeddings and head; of two blocks weights and gradients
    whole = (outer + 4 * 4 * max(size.blocks)) * (processes > 1)
    weights, adam = 4 * size.total / processes + whole, 8 * size.total / processes
    return {"weights": weights, "gradients": outer + every, "Adam": adam, "search": search,
            "update": update + sum(copies), "peak": weights + adam + max(moments)}


def time_of(args, search, update):
    """Operations of one process -> the time that its device takes."""
    return (search / args.search_peak + update / args.peak) / args.utilisation / 1e12


def report(args, config):
    """What SFT and DLR need at the settings of benchmark.py -> a table, as text."""
    size, bfloat16 = Size(config, args.layer), args.dtype == "bfloat16"
    batch = Batch(args.batch_size, args.length, args.response_share * args.batch_size * args.length)
    kinds, rows = {"SFT": None, f"DLR, N = {args.rollouts}": args.rollouts}, {}
    for checkpointing in (False, True):
        after = ", checkpointing" * checkpointing
        work = [operations(size, batch, n, args.codes, args.chunk, checkpointing) for n in kinds.values()]
        held = [memory(size, batch, n, bfloat16, checkpointing, args.processes) for n in kinds.values()]
        if not checkpointing:
            rows["TFLOP, search"] = [search for search, _ in work]
        rows[f"TFLOP, update{after}"] = [update for _, update in work]
        rows[f"seconds{after}"] = [1e12 * time_of(args, *both) for both in work]
        for name in ("search", "update", "peak") if checkpointing else held[0]:
            rows[f"GB, {name}{after}"] = [1e3 * one[name] for one in held]
    lines = [f"{size.total / 1e6:,.1f} M parameters in {len(size.blocks)} blocks, injection after block {size.layer}; "
             f"{batch.texts} texts of {batch.length} tokens a process, {100 * args.response_share:.0f}% of them of "
             f"responses; processes: {args.processes}; K = {args.chunk}, C = {args.codes}; update in {args.dtype} at "
             f"{args.peak:g} TFLOP/s, search in float32 at {args.search_peak:g}, {100 * args.utilisation:.0f}% of it "
             f"reached", f"{'':<30}" + "".join(f"{name:>12}" for name in kinds)]
    lines += [f"{name:<30}" + "".join(f"{value / 1e12:12.3f}" for value in values) for name, values in rows.items()]
    return "\n".join(lines)


def known_shapes(args, texts=8, room=80):
    """SHAPES on 1, 8 and 64 GPUs of `room` GB, with `texts` texts and autocast to bfloat16 on each -> Markdown."""
    batch = Batch(texts, args.length, texts * args.length * args.response_share)
    lines = [f"| model, GPUs | SFT, s | DLR, N = {args.rollouts}, s | search in bfloat16, s | SFT, GB | DLR, GB "
             f"| SFT, checkpointing, GB | DLR, checkpointing, GB | DLR in {room} GB |", "|---|" + 7 * "---:|" + "---|"]
    for name, shape in SHAPES.items():
        size, kinds = Size(config_of(*shape)), (None, args.rollouts)
        sft, dlr = (operations(size, batch, n, args.codes, args.chunk) for n in kinds)
        times = [time_of(args, *sft), time_of(args, *dlr), time_of(args, 0, sum(dlr))]
        for gpus in (1, 8, 64):
            held = [memory(size, batch, n, True, checkpointing, gpus)["peak"] / 1e9
                    for checkpointing in (False, True) for n in kinds]
            fits = "yes" if held[1] < room else "with checkpointing" if held[3] < room else "no"
            lines.append(f"| {name}, {gpus} | " + " | ".join(f"{value:.2f}" for value in times) + " | " +
                         " | ".join(f"{value:.0f}" for value in held) + f" | {fits} |")
    return "\n".join(lines)


class Meter:
    """Seconds and peak memory of what is called. On CUDA the peak is the allocator's, on Linux the process's."""

    def __init__(self, device):
        self.gpu = torch.get_device_module(device) if device.type != "cpu" else None
        self.counts = (hasattr(self.gpu, "max_memory_allocated") if self.gpu else
                       Path("/proc/self/clear_refs").exists())

    def memory(self, peak=False):
        """Bytes in use now, or at most since the peak was reset."""
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
    """-> (DLRModel, rows of the batch), as train.py finds them; of a shape by hand random weights and random texts."""
    if args.hidden:
        lm = AutoModelForCausalLM.from_config(given_shape(args)).to(device)
        start = max(1, round(args.length * (1 - args.response_share)))
        rows = [(torch.randint(args.vocab, (args.length,)).tolist(), start) for _ in range(args.batch_size)]
    else:
        examples = data.load(args.data, args.n, 50, 100, data_dir=args.data_dir)["train"]
        lm, tokenizer = baselines.load_model(args, baselines.find_model(args), device)
        rows, _, _ = data.encode(examples, tokenizer, args.max_length)
    if not rows:
        raise ValueError(f"no prompt leaves room for an answer within --length {args.length}; raise it.")
    if args.gradient_checkpointing:
        getattr(lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable)()  # its newer name first
    model = DLRModel(lm, num_codes=args.codes, chunk_size=args.chunk, layer=args.layer)
    return model, rows[: args.batch_size]


def measure(args, model, rows, losses):
    """Time a step on each loss {name: function -> scalar}, and generation -> ({name: seconds}, {name: bytes}).

    All take turns: one round to warm up, then `--rounds`, of which the medians count. The weights stay as they are."""
    device = model.device
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
    for _ in tqdm(range(1 + args.rounds), "timing (the first round warms up)", disable=None):
        for name, task in tasks.items():
            model.train(name in losses)
            measured[name].append(meter(task))
    return ({name: float(np.median([one[i] for one in both[1:]])) for name, both in measured.items()} for i in (0, 1))


def compare_steps(args, model, rows):
    """Steps of several kinds on one batch, and steered against plain generation -> a table, as text."""
    batch = data.collate(rows, device=model.device)
    losses = {"SFT, as the LM does it": lambda: model.lm(**batch).loss,
              "SFT, logits of responses only": lambda: sft_step(model, batch),
              "naive DLR, N = 8": lambda: naive_dlr_step(model, batch, 8),
              **{f"DLR, N = {n}": lambda n=n: dlr_step(model, batch, n) for n in (1, 4, 8, 16)},
              "DLR, N = 8, search of responses": lambda: dlr_step(model, batch, 8, response_search)}
    seconds, peaks = measure(args, model, rows, losses)
    size = Size(model.lm.config, model.settings.layer)
    shape = Batch(*batch["input_ids"].shape, int((batch["labels"][:, 1:] >= 0).sum()))
    rollouts = {"SFT, logits of responses only": None, **{f"DLR, N = {n}": n for n in (1, 4, 8, 16)}}
    work = {name: sum(operations(size, shape, n, args.codes, args.chunk)) for name, n in rollouts.items()}
    least, count = "SFT, logits of responses only", int(batch["attention_mask"].sum())
    lines = [f"{len(rows)} texts, {count} tokens, {shape.answered} of them of responses; K = {args.chunk}, injection "
             f"after block {model.settings.layer}, {args.dtype}, {model.device}, torch {torch.__version__}, "
             f"{torch.get_num_threads()} threads; medians of {args.rounds}",
             f"{'':<31} {'seconds':>8} {'x SFT':>6} {'tokens/s':>9} {'extra GB':>9} {'estimate':>9} {'floor':>6} "
             f"{'x floor':>8} {'% peak':>7}"]
    for name in losses:
        after = ""
        if name in rollouts:
            held = memory(size, shape, rollouts[name], args.dtype == "bfloat16", args.gradient_checkpointing)
            most, reached = work[name] / work[least], work[name] / seconds[name] / args.peak / 1e12
            after = (f" {(held['peak'] - held['weights'] - held['Adam']) / 1e9:9.2f} {most:6.2f} "
                     f"{seconds[name] / seconds[least] / most:8.2f} {100 * reached:7.1f}")
        lines.append(f"{name:<31} {seconds[name]:8.3f} {seconds[name] / seconds['SFT, as the LM does it']:6.2f} "
                     f"{count / seconds[name]:9.0f} {peaks[name] / 1e9:9.2f}{after}")
    slower = 100 * (seconds["steered"] / seconds["plain"] - 1)
    return "\n".join(lines) + (
        f"\nextra GB: at the peak, beside weights and Adam. floor: operations, in those of SFT with the logits of "
        f"responses only; % peak: those of the floor a second, of {args.peak:g} TFLOP/s. Steered generation takes "
        f"{slower:+.1f}% more time than plain.")


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
            print(known_shapes(args))
        else:
            where = None if args.hidden else baselines.find_model(args)
            config = AutoConfig.from_pretrained(**where) if where else given_shape(args)
            args.length = min(args.length, args.max_length)  # which a look at the config may have lowered
            print(report(args, config))
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"benchmark.py: {baselines.explained(error)}")


if __name__ == "__main__":
    main()
