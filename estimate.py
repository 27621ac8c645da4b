"""What a step needs, from a model's config alone: operations, seconds, memory. benchmark.py --estimate prints it.

The steps are that of dlr.py (search N rollouts, update on two paths, behind one trunk) and SFT as baselines.py does it.

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
import weakref
from dataclasses import dataclass
from functools import cache

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from dlr import HEAD_ROWS, find_blocks

PEAK = {"float32": 67, "bfloat16": 989}  # TFLOP/s of an H100; float32 without TF32, which torch leaves off
SHAPES = {  # hidden size, blocks, heads, key-value heads, MLP, vocabulary, size of a head, tied embeddings, model type
    "Qwen3-0.6B": (1024, 28, 16, 8, 3072, 151936, 128, True, "qwen3"),
    "Qwen3-1.7B": (2048, 28, 16, 8, 6144, 151936, 128, True, "qwen3"),
    "Qwen3-8B": (4096, 36, 32, 8, 12288, 151936, 128, False, "qwen3"),
    "Qwen3-32B": (5120, 64, 64, 8, 25600, 151936, 128, False, "qwen3"),
    "Llama-70B": (8192, 80, 64, 8, 28672, 128256, 128, False, "llama"),
}


def config_of(hidden, layers, heads, kv_heads, intermediate, vocab, head_dim=None, tied=False, kind="llama"):
    """-> the config of a model of this shape."""
    return AutoConfig.for_model(
        kind, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=intermediate, vocab_size=vocab, tie_word_embeddings=tied,
        head_dim=head_dim or hidden // heads)


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


def seconds(args, search, update):
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
        rows[f"seconds{after}"] = [1e12 * seconds(args, *both) for both in work]
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
        times = [seconds(args, *sft), seconds(args, *dlr), seconds(args, 0, sum(dlr))]
        for gpus in (1, 8, 64):
            held = [memory(size, batch, n, True, checkpointing, gpus)["peak"] / 1e9
                    for checkpointing in (False, True) for n in kinds]
            fits = "yes" if held[1] < room else "with checkpointing" if held[3] < room else "no"
            lines.append(f"| {name}, {gpus} | " + " | ".join(f"{value:.2f}" for value in times) + " | " +
                         " | ".join(f"{value:.0f}" for value in held) + f" | {fits} |")
    return "\n".join(lines)
