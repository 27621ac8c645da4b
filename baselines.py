"""What Dynamic Latent Routing is compared with, and the tiny LM that it is compared on.

    sft             supervised fine-tuning: the loss of the unsteered LM, no codes (`Unsteered`). The other methods
                    change the model or the texts, and then they are SFT as well:
    pause           ten learned <pause> tokens follow every prompt, in training as at inference. They give the model
                    more positions to compute in before it answers; nothing is predicted at them, and no loss counts
                    them. S. Goyal et al., "Think before you speak: Training Language Models With Pause Tokens", ICLR
                    2024.
    tokenassorted   A VQ-VAE learns to say a chunk of K tokens in one of C codes. In the training texts a prefix of the
                    reasoning, of random length, is replaced by its codes:
                        <codes> c_1 .. c_m </codes> rest of the reasoning #### answer,    m ~ uniform on 0 .. M
                    and the LM, its vocabulary larger by the codes, is trained on the mixture. At inference it writes
                    codes and text as it likes; codes are dropped, the text is scored. The answer is never encoded.
                    D. Su et al., "Token Assorted: Mixing Latent and Text Tokens for Improved Language Model
                    Reasoning", ICML 2025 (there chunks have 16 tokens; here they have --chunk, as in DLR).
    lora            W + B A with B A of low rank, on all linear layers of the chosen blocks, with the LM itself frozen:
                    what a few trained numbers can do without any code. E. Hu et al., "LoRA", ICLR 2022.
    reft            h + U (V h + b) in place of h + alpha e, at the same block, for every token, with the LM frozen: the
                    intervention without codes, continuous; U and V of rank C have as many numbers as codebook and
                    router. Z. Wu et al., "ReFT: Representation Finetuning for Language Models", NeurIPS 2024 (there V
                    has orthonormal rows, and U = V' once V h is subtracted: here both are free).

All changes of text are made in text, with special tokens of the tokenizer: whoever encodes or decodes it needs to know
nothing of them (`skip_special_tokens=True` drops them). Needs peft for lora, vector-quantize-pytorch for tokenassorted.
"""
import copy
import importlib.util
import random
import re
import tempfile
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import data
from dlr import DLRModel, Output, find_blocks, hidden_of, targets_of, with_hidden

TINY_HELD_OUT = 5000  # sums that the tiny LM is never taught
PAUSE = "<|pause|>"
CODES_BEGIN, CODES_END = "<|codes|>", "<|/codes|>"
PACKAGES = {"lora": "peft", "tokenassorted": "vector-quantize-pytorch"}


def check_packages(method):
    """Raises ValueError, with the command that helps, where the library of a method is not installed."""
    package = PACKAGES.get(method)
    if package and importlib.util.find_spec(package.replace("-", "_")) is None:
        raise ValueError(f"--method {method} needs the package {package}: pip install {package}")


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


def explained(error):
    """An error as a sentence for the user; a RuntimeError other than a full memory is a fault, and raised again."""
    if not isinstance(error, RuntimeError):
        return first_line(error)
    if not re.search("out of memory|can't allocate memory", str(error)):  # CUDA and MPS; the CPU
        raise error
    return ("out of memory: a smaller --batch-size (with --accumulate for it), --gradient-checkpointing, a shorter "
            "--max-length or fewer --rollouts will help; benchmark.py --estimate tells beforehand.")


def load_tokenizer(args, where):
    """Raises ValueError for a model that comes without one; transformers may make up one that knows no text."""
    reason = "it knows no text"
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        if len(tokenizer) > len(set(tokenizer.all_special_ids)):
            return tokenizer
    except (OSError, ValueError) as error:
        reason = first_line(error)
    raise ValueError(f"--model {args.model} has no tokenizer ({reason}): its tokenizer.json should lie beside it.")


def load_model(args, where, device):
    """-> (lm, tokenizer); the tiny LM is taught first unless it lies in its folder already."""
    if args.model == "tiny":
        where = dict(pretrained_model_name_or_path=str(teach_tiny(args, device)))
    tokenizer = load_tokenizer(args, where)
    lm = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    if "gguf_file" in where:  # transformers refuses to save such an LM: put its weights into an ordinary one
        config = copy.deepcopy(lm.config)
        del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config, dtype=lm.dtype)
        plain.load_state_dict(lm.state_dict())
        plain.generation_config, lm = lm.generation_config, plain
    return lm.to(device), tokenizer


def dress(args, lm, tokenizer, splits):
    """Change model, tokenizer and texts as the method asks. -> the splits to train and evaluate on"""
    texts = dict(splits)
    if args.lora_rank:
        add_lora(lm, args.lora_rank, args.lora_layers)
    if args.method == "pause":
        add_tokens(lm, tokenizer, [PAUSE])
        texts = {split: with_pauses(examples) for split, examples in splits.items()}
    elif args.method == "reft":
        add_reft(lm, args.layer, args.num_codes)
    elif args.method == "tokenassorted":
        texts["train"], said = assort(splits["train"], lm, tokenizer, args.chunk_size, args.num_codes, args.seed)
        print(f"tokenassorted: {said}.")
    return texts


def teach_tiny(args, device, batch_size=64, most_steps=2000, last_steps=60):
    """Teach a GPT-2 of two blocks uniform (mostly easy) sums, as a stand-in for a pretrained LM. -> its folder

    Some seeds see the trick late. So that every base arrives equally able, teaching ends a fixed number of steps, with
    a falling learning rate, after the loss per token first averages less than 0.25 nats."""
    ops = {"+": "sums", "-": "differences", "+-": "both"}[args.ops]
    wide = "" if args.width == 96 else f"-width{args.width}"
    folder = Path(args.out).parent / f"tiny-{args.digits}digit-{ops}-nines0.5{wide}-seed{args.seed}"
    if (folder / "config.json").is_file():
        return folder
    narrow = 96 / args.width  # what works at 96 works at other widths in these proportions
    torch.manual_seed(args.seed)
    tokenizer = data.arithmetic_tokenizer()
    lm = GPT2LMHeadModel(GPT2Config(
        vocab_size=len(tokenizer), n_layer=2, n_embd=args.width, n_head=4, n_positions=32 + 4 * args.digits,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, activation_function="gelu_pytorch_tanh",
        initializer_range=0.05 * narrow**0.5, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)).to(device)
    model = Unsteered(lm).train()
    all_sums = 10 ** (2 * args.digits)
    held_out = data.arithmetic(min(TINY_HELD_OUT, all_sums // 4), args.digits, args.ops, seed=data.HELD_OUT_SEED)
    held_out = {example.prompt for example in held_out}  # the validation and test sums of any run come first in these
    count = min(1000 * batch_size, all_sums // 4)
    rows, _, _ = data.encode(data.arithmetic(count, args.digits, args.ops, 0.0, args.seed, held_out), tokenizer)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=2e-3 * narrow, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    bar = tqdm(range(most_steps), "teaching the tiny LM easy sums (kept for later runs)", disable=None)
    average, left = 2.5, last_steps
    for step in bar:
        optimizer.param_groups[0]["lr"] = 2e-3 * narrow * min((step + 1) / 20, left / last_steps)
        batch = [rows[i % len(rows)] for i in range(step * batch_size, (step + 1) * batch_size)]
        loss = model(**data.collate(batch, device=device)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        average = 0.9 * average + 0.1 * loss.item()
        left -= average < 0.25 or left < last_steps or most_steps - step <= last_steps
        if left == 0:
            break
        bar.set_postfix(loss=f"{average:.3f}", refresh=False)
    bar.close()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as own:  # others may teach it too
        half_written = Path(own, "model")
        lm.save_pretrained(half_written)
        tokenizer.save_pretrained(half_written)
        with suppress(OSError):  # another one was quicker
            half_written.rename(folder)
    return folder


class Unsteered(DLRModel):
    """An LM without codes, in the place of a `DLRModel`: the loss is the NLL that it has by itself."""

    def forward(self, input_ids, attention_mask=None, labels=None, codes=None, num_items_in_batch=None, **kwargs):
        """-> `Output`, as `DLRModel.forward` with codes of -1; in training without logits."""
        unsteered = torch.full_like(input_ids, -1)  # as many codes as there can be chunks
        if labels is None or not self.training:
            return super().forward(input_ids, attention_mask, labels, unsteered, num_items_in_batch, **kwargs)
        trunk = self.trunk(input_ids, attention_mask)
        tokens = (targets_of(trunk, labels) >= 0).sum() if num_items_in_batch is None else num_items_in_batch
        return Output(loss=-self.log_likelihood(trunk, labels, unsteered).sum() / tokens)


def add_tokens(lm, tokenizer, tokens):
    """New special tokens for tokenizer and LM (both in place); their embeddings start around the mean of the others."""
    tokenizer.add_tokens(tokens, special_tokens=True)
    if len(tokenizer) > lm.get_input_embeddings().num_embeddings:  # some models have spare rows
        lm.resize_token_embeddings(len(tokenizer))


def with_pauses(examples, count=10):
    """[Example] with `count` pause tokens after each prompt: as context, they are never counted in a loss."""
    return [replace(example, prompt=example.prompt + count * PAUSE) for example in examples]


def add_lora(lm, rank, layers=None):
    """Adapters of a rank on all linear layers of the given blocks (None = all), in place; everything else is frozen."""
    from peft import LoraConfig, get_peft_model

    blocks_name = find_blocks(lm)
    blocks = lm.get_submodule(blocks_name)
    layers = range(len(blocks)) if layers is None else layers
    linear = [(f"{blocks_name}.{i}.{name}", part) for i in layers for name, part in blocks[i].named_modules()
              if isinstance(part, (nn.Linear, Conv1D))]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[name for name, _ in linear],
                        fan_in_fan_out=any(isinstance(part, Conv1D) for _, part in linear))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")  # peft asks transformers by the old name
        get_peft_model(lm, config)


def merge_lora(lm):
    """W <- W + B A, in place: afterwards the LM is an ordinary one again."""
    from peft.tuners.lora import LoraLayer

    for name, part in list(lm.named_modules()):
        if isinstance(part, LoraLayer):
            part.merge()
            lm.set_submodule(name, part.get_base_layer())


def add_reft(lm, layer, rank):
    """h + U (V h + b) at a block's output (None: the middle one's), in place; everything else is frozen.

    U (H, rank) starts at zero, so that at first nothing is changed."""
    blocks, size = lm.get_submodule(find_blocks(lm)), lm.config.get_text_config().hidden_size
    block = blocks[len(blocks) // 2 if layer is None else layer]
    lm.requires_grad_(False)
    down, up = nn.Linear(size, rank), nn.Linear(rank, size, bias=False)  # V and b, U
    nn.init.zeros_(up.weight)
    block.reft = nn.Sequential(down, up).to(lm.device)
    block.register_forward_hook(lambda block, args, out: with_hidden(hidden_of(out) + block.reft(hidden_of(out)), out))


def save_reft(lm, folder):
    """Save the LM as it was before `add_reft`, and its intervention beside it: from_pretrained could not place it."""
    lm.save_pretrained(folder, state_dict={name: t for name, t in lm.state_dict().items() if ".reft." not in name})
    (name, block), = [(name, part) for name, part in lm.named_modules() if hasattr(part, "reft")]
    torch.save({"layer": int(name.rpartition(".")[2]), "state": block.reft.state_dict()}, Path(folder, "reft.pt"))


def load_reft(lm, folder):
    """Put the intervention that lies in the folder, if there is one, into the LM that was loaded from it, in place."""
    if Path(folder, "reft.pt").is_file():
        saved = torch.load(Path(folder, "reft.pt"), map_location=lm.device, weights_only=True)
        add_reft(lm, saved["layer"], len(saved["state"]["0.bias"]))
        lm.get_submodule(find_blocks(lm))[saved["layer"]].reft.load_state_dict(saved["state"])


def save_model(model, tokenizer, folder):
    """A trained model and its tokenizer, so that `from_pretrained` loads them (reft: `load_reft` besides)."""
    if any(hasattr(part, "reft") for part in model.lm.modules()):
        save_reft(model.lm, folder)
    else:
        (model.lm if isinstance(model, Unsteered) else model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class ChunkVQ(nn.Module):
    """A VQ-VAE for chunks of K tokens: embeddings -> encoder -> one of C codes -> decoder -> logits of the K tokens.

    embedding (V, H): the LM's own, kept as it is, both to read the tokens and to score them."""

    def __init__(self, embedding, chunk_size, num_codes, width=128):
        from vector_quantize_pytorch import VectorQuantize

        super().__init__()
        size = embedding.shape[1]
        self.register_buffer("embedding", F.layer_norm(embedding.detach().float(), (size,)))
        self.encoder = nn.Sequential(nn.Linear(chunk_size * size, width), nn.GELU(), nn.Linear(width, width))
        # codes that nothing is assigned to any more start anew at some chunk of the batch
        self.quantizer = VectorQuantize(width, num_codes, kmeans_init=True, threshold_ema_dead_code=1)
        self.decoder = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, chunk_size * size))

    def forward(self, chunks):
        """Token ids (B, K) -> logits (B, K, V), codes (B,), the loss that ties encoder and codebook together."""
        encoded = self.encoder(self.embedding[chunks].flatten(1))  # (B, width)
        quantized, codes, commitment = self.quantizer(encoded)
        decoded = self.decoder(quantized).view(*chunks.shape, -1)  # (B, K, H)
        return decoded @ self.embedding.T / self.embedding.shape[1] ** 0.5, codes, commitment


def train_vq(chunks, embedding, num_codes, steps=500, batch_size=256, seed=0):
    """A `ChunkVQ` taught to rebuild the chunks (n, K) -> (codes (n,), share of tokens rebuilt).

    Only tokens that occur are told apart: a vocabulary of 50,000 costs no more than the few hundred in use."""
    known, chunks = chunks.unique(return_inverse=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vq = ChunkVQ(embedding[known.to(embedding.device)].cpu(), chunks.shape[1], num_codes)
        optimizer = torch.optim.AdamW(vq.parameters(), lr=1e-3, weight_decay=0.01)
        for _ in range(steps):
            batch = chunks[torch.randint(len(chunks), (batch_size,))]
            logits, _, commitment = vq(batch)
            loss = F.cross_entropy(logits.flatten(0, 1), batch.flatten()) + commitment
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    vq.eval()
    with torch.no_grad():
        logits, codes, _ = zip(*map(vq, chunks.split(batch_size)))
    rebuilt = torch.cat([part.argmax(-1) for part in logits]) == chunks
    return torch.cat(codes), rebuilt.float().mean().item()


def reasoning_chunks(response, tokenizer, chunk_size):
    """The whole chunks of K tokens that come before the `####` of a response.

    -> (ids, ends): the chunks' token ids, (M, K) as lists, and where in the text each chunk ends."""
    reasoning = response.rpartition("####")[0].rstrip()
    encoded = tokenizer(response, add_special_tokens=False, return_offsets_mapping=True)
    inside = sum(end <= len(reasoning) for _, end in encoded.offset_mapping)
    places = range(0, inside - chunk_size + 1, chunk_size)
    ids = [encoded.input_ids[i : i + chunk_size] for i in places]
    return ids, [encoded.offset_mapping[i + chunk_size - 1][1] for i in places]


def assort(examples, lm, tokenizer, chunk_size, num_codes, seed=0):
    """[Example] for training, a random prefix of each one's reasoning in codes -> (examples, a sentence about it).

    Adds the codes to the LM and its tokenizer, in place; neither changes where there is no reasoning to replace.
    Raises ValueError for a tokenizer that cannot tell where in the text its tokens are."""
    if not tokenizer.is_fast:
        raise ValueError("--method tokenassorted needs a fast tokenizer, which knows where in the text its tokens are.")
    found = [reasoning_chunks(example.response, tokenizer, chunk_size) for example in examples]
    chunks = torch.tensor([ids for chunk_ids, _ in found for ids in chunk_ids])  # (n, K)
    if not len(chunks):
        return examples, (f"no answer has a whole chunk (K = {chunk_size}) of reasoning before its ####, so there is "
                          f"nothing to put into codes: this is plain SFT")
    codes, rebuilt = train_vq(chunks, lm.get_input_embeddings().weight, num_codes, seed=seed)
    names = [f"<|code_{i}|>" for i in range(num_codes)]
    add_tokens(lm, tokenizer, [CODES_BEGIN, CODES_END, *names])
    rng, codes, mixed, replaced = random.Random(seed), iter(codes.tolist()), [], 0
    for example, (chunk_ids, ends) in zip(examples, found):
        own = [names[next(codes)] for _ in chunk_ids]
        m = rng.randint(0, len(own))
        replaced += m
        if m:
            rest = example.response[ends[m - 1] :]
            example = replace(example, response=CODES_BEGIN + "".join(own[:m]) + CODES_END + rest)
        mixed.append(example)
    return mixed, (f"{replaced} of {len(chunks)} chunks of reasoning put into {num_codes} codes, which can rebuild "
                   f"{100 * rebuilt:.0f}% of their tokens")
