"""Try a trained model on a prompt: see the codes that steer its answer, and set them by hand.

    python generate.py runs/tiny-arithmetic-dlr-s0 "17+25="                       # one answer
    python generate.py runs/tiny-arithmetic-dlr-s0                                # lines, typed or from a pipe
    python generate.py runs/tiny-arithmetic-dlr-s0 "17+25=" --codes 3,3,1,0       # by hand; then the router goes on
    python generate.py runs/tiny-arithmetic-dlr-s0 "17+25=" --swap 2:5 --compare  # where the router picks 2, 5 steers

A prompt goes in as is, with \\n for a line break: write it as the training data did (gsm8k: "Question: ...\\nAnswer:").
Each chunk has the colour of its code, and answers are bold. Where the output is no terminal, or NO_COLOR is set, chunks
come behind the number of their code, [-] for none. --compare shows base (codes off; an LM that was trained along is the
trained one), steered, and what --codes or --swap ask for, with the NLL of what was said (its end too) under its codes.
"""
import argparse
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoTokenizer

from data import Example
from dlr import DLRModel
from eval import answer, choose_device, encode_to_answer, table_intervention
from figures import ansi, legend, painted, painter, pieces


def codes_like(pattern, example):
    """For argparse: a parser of texts that match `pattern` -> the code numbers in them."""
    def parse(text):
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text!r} should look like {example}")
        return [int(number) for number in re.findall(r"\d+", text)]
    return parse


def parse_args(argv=None):
    """What to answer, and how. -> argparse.Namespace"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"generate.py: {message}; see --help.")
    parser.add_argument("run", metavar="RUN", help="folder written by train.py or DLRModel.save_pretrained")
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="text to go on from (default: read lines)")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--codes", type=codes_like(r"\d+(,\d+)*", "3,3,1,0"), help="codes of the text's first chunks")
    asked.add_argument("--swap", type=codes_like(r"\d+:\d+", "2:5"), help="2:5 puts code 5 wherever the router picks 2")
    asked.add_argument("--off", action="store_true", help="no codes: neither in the prompt nor in the answer")
    parser.add_argument("--compare", action="store_true", help="base, steered, what was asked for; NLL: nats a token")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="length limit of an answer")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu or auto")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens is {args.max_new_tokens}, it must be at least 1")
    return args


def load(run, device):
    """-> (model, tokenizer). Raises OSError or ValueError for a folder that holds no such model."""
    transformers.logging.disable_progress_bar()
    folder = Path(run, "model") if Path(run, "model").is_dir() else Path(run)
    if not all(Path(folder, name).is_file() for name in ("dlr_config.json", "tokenizer_config.json")):
        raise FileNotFoundError(f"{run} is not a folder with a DLRModel and its tokenizer, as train.py writes them.")
    return DLRModel.from_pretrained(folder, dtype=torch.float32).to(device), AutoTokenizer.from_pretrained(folder)


def interventions(args, model):
    """What to answer under -> {name: intervention, as `answer` takes it}. Raises ValueError for a code out of range."""
    codes, asked = args.codes or args.swap or [0], {"base": "off"} if args.off else {}
    last = model.settings.num_codes - 1
    if max(codes) > last:
        raise ValueError(f"code {max(codes)} is out of range: this model has codes 0 to {last}.")
    if args.codes:
        table = torch.tensor([codes], device=model.device)
        asked = {f"--codes {','.join(map(str, codes))}": table_intervention(table)}
    if args.swap:
        asked = {"--swap {}:{}".format(*codes): lambda grid: torch.where(grid == codes[0], codes[1], grid)}
    return {"base": "off", "steered": None, **asked} if args.compare else asked or {"steered": None}


@torch.no_grad()
def reply(model, tokenizer, prompt, intervention, max_new_tokens):
    """Answer a prompt -> (pieces of prompt and answer, NLL of the answer's tokens in nats per token)."""
    example = Example(prompt, "", "")
    (head,), _ = encode_to_answer(model, tokenizer, [example], max_new_tokens)
    (said,), codes = answer(model, tokenizer, [example], intervention, max_new_tokens, batch_size=1)
    tail = said["ids"] + [tokenizer.eos_token_id] * (not said["cut_off"])
    text = torch.tensor([head + tail], device=model.device)  # (1, T)
    size = model.settings.chunk_size
    used = F.pad(codes, (0, -(-text.shape[1] // size) - codes.shape[1]), value=-1).to(text)  # (1, M)
    labels = torch.tensor([[-100] * len(head) + tail], device=model.device)
    nll = -model.log_likelihood(model.trunk(text), labels, used).item() / len(tail)
    return pieces(tokenizer, head + said["ids"], len(head), codes[0].tolist(), size), nll


def read_lines():
    """The prompts that are typed, or come through a pipe, one a line."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return


def main(argv=None):
    args, paint = parse_args(argv), painter(sys.stdout)
    try:
        model, tokenizer = load(args.run, choose_device(args.device))
        asked = interventions(args, model)
    except (OSError, ValueError) as error:
        sys.exit(f"generate.py: {error}".splitlines()[0])
    for prompt in read_lines() if args.prompt is None else [args.prompt]:
        if not prompt.strip():
            sys.exit("generate.py: this prompt is empty: give some text to go on from.")
        prompt = prompt.replace("\\n", "\n")
        replies = {name: reply(model, tokenizer, prompt, use, args.max_new_tokens) for name, use in asked.items()}
        for name, (cut, nll) in replies.items():
            head = f"{name:<{max(map(len, replies))}}  NLL {nll:.4f}  " if args.compare else ""
            print(head + painted(cut, paint).replace("\n", "\n" + " " * len(head)))
        if paint is ansi:
            print("codes", legend([cut for cut, _ in replies.values()], paint) or "off")


if __name__ == "__main__":
    main()
