"""Tasks as text: load or generate them, split them, turn them into padded batches of tokens, and read answers back.

An Example is a prompt and the response a model should give. The prompt ends without white space; the response begins
with some, so that the two tokenise apart as they do when a model continues the prompt, and it ends with `#### answer`.
The format is plain text, without a chat template, and the same for every model. One item of GSM8K:

    prompt    Question: Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes ... earn?
              Answer:
    response  ␣Weng earns 12/60 = $0.2 per minute.
              Working 50 minutes, she earned 0.2 x 50 = $10.
              #### 10
    answer    10

Tasks: gsm8k, commonsense_qa, strategyqa and scienceqa (its items without an image), from the Hugging Face hub or from
a folder; `arithmetic`, which is generated; and any local `file.jsonl` with `prompt` and `response` on each line (used
as they are: such a response need not have a `####`).
"""

import json
import random
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from string import ascii_uppercase

import torch

HELD_OUT_SEED = 20_260  # draws the validation and test sets, which must not change with the seed of a run


@dataclass(frozen=True)
class Example:
    """One item. For arithmetic also `labels`, a sub-task for each answer digit, left to right, and `depth`."""

    prompt: str
    response: str
    answer: str
    topic: str | None = None
    labels: tuple[str, ...] = ()
    depth: int | None = None


def _text(row, field):
    """The text in `field`. Errors need not say where: `_examples` puts the place before them."""
    if row.get(field) is None:
        raise KeyError(field)
    if not isinstance(row[field], str) or not row[field].strip():
        raise ValueError(f"field '{field}' must be text, not {row[field]!r}")
    return row[field].strip()


def _gsm8k(row):
    solution, mark, answer = _text(row, "answer").rpartition("####")
    if not mark:
        raise ValueError("field 'answer' has no '#### number'")
    solution = re.sub(r"<<[^>]*>>", "", solution).strip()  # <<48/2=24>>: marks for a calculator that is not used here
    answer = answer.strip().replace(",", "")
    return Example(f"Question: {_text(row, 'question')}\nAnswer:", f" {solution}\n#### {answer}", answer)


def _multiple_choice(question, letters, choices, answer, reason=None, topic=None):
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices))
    reason = reason or choices[letters.index(answer)].strip()
    return Example(f"Question: {question}\n{options}\nAnswer:", f" {reason}\n#### {answer}", answer, topic)


def _csqa(row):
    choices = row["choices"]
    return _multiple_choice(_text(row, "question"), choices["label"], choices["text"], _text(row, "answerKey"))


def _scienceqa(row):
    # The hub's `lecture` stays out of the prompt: it teaches the very rule that the item asks for, and it is long.
    question, hint = _text(row, "question"), (row.get("hint") or "").strip()
    if hint not in question:
        question = f"{hint}\n{question}"
    letters = ascii_uppercase[: len(row["choices"])]
    reason, topic = (row.get("solution") or "").strip(), row.get("topic") or row.get("subject")
    return _multiple_choice(question, letters, row["choices"], letters[row["answer"]], reason, topic)


def _strategyqa(row):
    answer = {"true": "yes", "yes": "yes", "false": "no", "no": "no"}.get(str(row["answer"]).lower())
    if answer is None:
        raise ValueError(f"field 'answer' must be true or false, not {row['answer']!r}")
    facts = row.get("facts") or ""
    facts = " " + (facts if isinstance(facts, str) else " ".join(facts))
    return Example(f"Question: {_text(row, 'question')}\nAnswer:", f"{facts.rstrip()}\n#### {answer}", answer)


def _prompt_and_response(row):
    for field in ("prompt", "response"):
        _text(row, field)  # must be there, but keeps the white space it has
    prompt, response = row["prompt"].rstrip(), row["response"]
    answer = row.get("answer")
    answer = response.rpartition("####")[2] if answer is None else str(answer)
    return Example(prompt, response if response[0].isspace() else f" {response}", answer.strip(), row.get("topic"))


TASKS = {
    "gsm8k": dict(hub="openai/gsm8k", config="main", train="train", test="test", example=_gsm8k),
    # The hub's test split of commonsense_qa has no answers, so its validation split is the test set (as in papers).
    "commonsense_qa": dict(hub="tau/commonsense_qa", config=None, train="train", test="validation", example=_csqa),
    "strategyqa": dict(hub="ChilleD/StrategyQA", config=None, train="train", test="test", example=_strategyqa),
    "scienceqa": dict(hub="derek-thomas/ScienceQA", config=None, train="train", test="test", example=_scienceqa),
}


def _file_rows(path):
    """Yields (place, row) for each line of a .jsonl file."""
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is not valid JSON (one object with its fields)")
        yield f"{path}, line {number}", row


def _files(task):
    return f"DIR/{task}/{TASKS[task]['train']}.jsonl and DIR/{task}/{TASKS[task]['test']}.jsonl"


def _hub_rows(task, split):
    """Yields (place, row) for each item without an image of a split on the hub (or in its cache)."""
    import datasets  # slow to import, and only needed here

    hub = TASKS[task]["hub"]
    try:
        table = datasets.load_dataset(hub, TASKS[task]["config"], split=split)
    except (OSError, ValueError) as error:  # OSError: no network; ValueError: no network, and another config is cached
        reason = " ".join(str(error).split())
        raise ConnectionError(
            f"the Hugging Face hub could not be reached for {hub}, which is not in the cache ({reason}): pass "
            f"--data-dir DIR with {_files(task)} and --model FOLDER, or run `python train.py` with no arguments"
        ) from error
    if "image" in table.column_names:
        table = table.cast_column("image", datasets.Image(decode=False))  # is there one? Answered without decoding it
    for number, row in enumerate(table):
        if row.get("image") is None:
            yield f"{hub}, {split}, row {number}", row


def _examples(rows, example):
    """Applies `example` to each (place, row); its errors get the place put before them."""
    examples = []
    for place, row in rows:
        try:
            examples.append(example(row))
        except KeyError as error:
            raise ValueError(f"{place}: field {error} is missing") from None
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{place}: {error}") from None
    return examples


def _split(task, split, data_dir):
    """All examples of one split of a task in TASKS."""
    if data_dir is None:
        return _examples(_hub_rows(task, split), TASKS[task]["example"])
    path = Path(data_dir) / task / f"{split}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: --data-dir DIR needs {_files(task)}")
    return _examples(_file_rows(path), TASKS[task]["example"])


def _shuffled(examples, seed):
    return random.Random(seed).sample(examples, len(examples))


def load(task, n=0, val=100, test=200, seed=0, data_dir=None, digits=3, ops="+", nines=0.5):
    """Loads a task -> {"train": [Example], "validation": [Example], "test": [Example]}, with no prompt in two of them.

    task: a name in TASKS, "arithmetic", or the path of a .jsonl file. n: training examples, 0 = all that are left.
    test: at most so many test examples, 0 = the whole test split. val: at most so many for validation, taken from the
    training split: nothing that n needs, and a tenth where n is 0. `seed` only chooses the n training examples:
    validation and test are the same for every seed, so that runs can be compared. Of a .jsonl file, a tenth is the
    test split. data_dir: read DIR/task/split.jsonl, not the hub. digits, ops, nines: see `arithmetic`.

    Raises ValueError for a bad request or a malformed row, FileNotFoundError for a file that is not there, and
    ConnectionError where the hub is out of reach, each with one sentence fit to be shown to the user.
    """
    if min(n, val, test) < 0:
        raise ValueError(f"n, val and test must not be negative: n={n}, val={val}, test={test}")
    if task == "arithmetic":
        if n == 0 or test == 0:
            raise ValueError("arithmetic is generated and has no end: say how many with --n and --test")
        fixed = arithmetic(test + val, digits, ops, nines, HELD_OUT_SEED)
        train = arithmetic(n, digits, ops, nines, seed, exclude={example.prompt for example in fixed})
        return {"train": train, "validation": fixed[test:], "test": fixed[:test]}
    if task in TASKS:
        held_out = _split(task, TASKS[task]["test"], data_dir)
        pool = _split(task, TASKS[task]["train"], data_dir)
    elif task.endswith(".jsonl"):
        if not Path(task).is_file():
            raise FileNotFoundError(f"{task} does not exist: it should have a prompt and a response on each line")
        rows = _shuffled(_examples(_file_rows(task), _prompt_and_response), HELD_OUT_SEED)
        tenth = max(1, len(rows) // 10)
        held_out, pool = rows[:tenth], rows[tenth:]
    else:
        raise ValueError(f"unknown data '{task}': known are arithmetic, {', '.join(TASKS)} and any file.jsonl")

    # Whatever the test set that is asked for, nothing of the *whole* test split is trained on.
    test_prompts = {example.prompt for example in held_out}
    pool = _shuffled([example for example in pool if example.prompt not in test_prompts], HELD_OUT_SEED)
    val = min(val, max(0, len(pool) - n) if n else max(1, len(pool) // 10))
    validation = pool[:val]
    val_prompts = {example.prompt for example in validation}
    train = [example for example in pool[val:] if example.prompt not in val_prompts]
    if not held_out or not train:
        raise ValueError(f"{task} has {len(train)} training and {len(held_out)} test examples: too few to run on")
    if n > len(train):
        raise ValueError(f"{task}: n={n}, but the largest n is {len(train)} (0 takes them all)")
    return {
        "train": _shuffled(train, seed)[: n or None],
        "validation": validation,
        "test": _shuffled(held_out, HELD_OUT_SEED)[: test or None],
    }


def subtasks(a, b, op, digits):
    """What it takes to write each answer digit of a + b, or of a - b with a >= b -> (labels, depth).

    labels: digits + 1 names, the leading digit first (its column is 0 and 0), after Quirke et al., "Understanding
    Addition and Subtraction in Transformers". With a carry coming in: US if the column sums to 9 (it passes the carry
    on), else UC; without: SS sums to 9, SC makes a carry, SA is plain. Subtraction, where a column of two equal
    digits passes a borrow on: UD, UB; ME, MB, MD.

    depth: how many columns the longest-travelled carry (borrow) reaches: 0 with none, 1 where it is used up at once,
    one more for each column that passes it on. At most `digits` for a sum, and digits - 1 for a difference, whose
    leading column is never borrowed from.
    """
    names = ("US", "UC", "SS", "SC", "SA") if op == "+" else ("UD", "UB", "ME", "MB", "MD")
    labels, depth, reach = [], 0, 0  # reach: columns that the carry coming in has reached, this one included
    for column in range(digits + 1):
        x, y = a // 10**column % 10, b // 10**column % 10
        passes, makes = (x + y == 9, x + y > 9) if op == "+" else (x == y, x < y)
        labels.append(names[0 if passes else 1] if reach else names[2 if passes else 3 if makes else 4])
        depth = max(depth, reach)
        reach = reach + 1 if reach and passes else int(makes)
    return tuple(reversed(labels)), depth


def arithmetic(n, digits=3, ops="+", nines=0.5, seed=0, exclude=frozenset()):
    """n problems with distinct prompts, none of them in `exclude` (a set of prompts) -> [Example].

    `123+456=` is answered by ` #### 0579`: operands have `digits` digits, answers one more, with zeros in front, so
    that every digit has its place in the text. ops: "+", "-" (a >= b) or "+-". nines: the probability that a column is
    made to pass a carry on (its digits sum to 9; in a difference, they are equal); digits are uniform otherwise.
    Uniform digits (0) hardly ever carry far, 0.5 gives many long chains. topic: `S3` is a sum, `M3` a difference, of
    depth 3 (see `subtasks`).

    Raises ValueError if an argument is out of range, or if n distinct problems are not found.
    """
    if n < 0 or digits < 1 or ops not in ("+", "-", "+-") or not 0 <= nines <= 1:
        raise ValueError("arithmetic takes n >= 0, digits >= 1, nines from 0 to 1, and ops '+', '-' or '+-'")
    rng, examples, seen, misses = random.Random(seed), [], set(exclude), 0
    while len(examples) < n:
        op, a, b = rng.choice(ops), 0, 0
        for _ in range(digits):
            x, y = rng.randrange(10), rng.randrange(10)
            if rng.random() < nines:
                y = 9 - x if op == "+" else x
            a, b = 10 * a + x, 10 * b + y
        if op == "-" and a < b:
            a, b = b, a
        prompt = f"{a:0{digits}d}{op}{b:0{digits}d}="
        if prompt in seen:
            misses += 1
            if misses == 10_000:  # in a row: (nearly) everything has been drawn
                raise ValueError(
                    f"arithmetic: found only {len(examples)} of {n} distinct problems (beside {len(exclude)} held out) "
                    f"with digits={digits}, ops={ops!r}, nines={nines}: ask for fewer, or for more digits"
                )
            continue
        misses = 0
        seen.add(prompt)
        answer = f"{a + b if op == '+' else a - b:0{digits + 1}d}"
        labels, depth = subtasks(a, b, op, digits)
        examples.append(Example(prompt, f" #### {answer}", answer, f"{'SM'[op == '-']}{depth}", labels, depth))
    return examples


def arithmetic_tokenizer():
    """A Hugging Face tokenizer for arithmetic: one token a character, one for ` #### `; `<pad>`, `<eos>`, no BOS.

    One token a digit lets a chunk of one token be one digit. Any other character becomes `<unk>`. 17 tokens in all.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<eos>", "<unk>", " #### ", *"0123456789+-="]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" #### |[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()  # without it, decoding puts a space between tokens
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def encode_prompts(prompts, tokenizer):
    """Prompts (strings) -> lists of token ids, with the tokenizer's own BOS if it has one, and never an eos."""
    return [ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids for ids in tokenizer(prompts).input_ids]


def encode(examples, tokenizer, max_length=512):
    """Tokenises examples -> (rows, cut, dropped); a row is (ids, prompt_length), ids = prompt + response + eos.

    Rows of more than max_length tokens lose their end, the eos included. `cut` of the rows have been shortened so;
    `dropped` examples are not among the rows, because their prompt alone fills max_length. Prompt and response are
    tokenised apart, as at inference, where the response is not there yet.

    Raises ValueError if the tokenizer has no eos token, without which a model cannot learn to stop.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token, so the model could not learn where to stop: set one")
    if not examples:
        return [], 0, 0
    prompts = encode_prompts([example.prompt for example in examples], tokenizer)
    responses = tokenizer([example.response for example in examples], add_special_tokens=False).input_ids
    full = [(prompt + response + [tokenizer.eos_token_id], len(prompt)) for prompt, response in zip(prompts, responses)]
    rows = [(ids[:max_length], length) for ids, length in full if length < max_length]
    cut = sum(len(ids) > max_length > length for ids, length in full)
    return rows, cut, len(full) - len(rows)


def collate(rows, pad_id=0, device="cpu"):
    """Rows of `encode`, right-padded -> dict of input_ids, attention_mask, labels, each (B, T) long.

    labels are the ids at the tokens that the loss counts, the response and its eos, and -100 elsewhere. Masks are made
    from lengths, never from ids: many tokenizers pad with their eos token, and that one must be learned.
    """
    lengths = torch.tensor([len(ids) for ids, _ in rows])[:, None]  # (B, 1)
    prompt_lengths = torch.tensor([length for _, length in rows])[:, None]  # (B, 1)
    T = int(lengths.max())
    input_ids = torch.tensor([ids + [pad_id] * (T - len(ids)) for ids, _ in rows])
    position = torch.arange(T)  # (T,)
    labels = input_ids.masked_fill((position < prompt_lengths) | (position >= lengths), -100)
    batch = dict(input_ids=input_ids, attention_mask=(position < lengths).long(), labels=labels)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def collate_prompts(prompts, pad_id=0, device="cpu"):
    """Lists of token ids, left-padded for generation -> input_ids (B, T) long, attention_mask (B, T) long."""
    T = max(len(ids) for ids in prompts)
    input_ids = torch.tensor([[pad_id] * (T - len(ids)) + ids for ids in prompts])
    attention_mask = torch.tensor([[0] * (T - len(ids)) + [1] * len(ids) for ids in prompts])
    return input_ids.to(device), attention_mask.to(device)


# A minus right behind a digit, letter or bracket is an operator or a dash (7-3, 3-5). Commas only between thousands.
NUMBER = r"(?:(?<![\w)])[-−+])?\$?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
# A capital on its own: not a part of a word, nor I'm, nor the pronoun in "I think".
LETTER = r"(?<![^\W_])(?!I [a-z])[A-Z](?!['’]?[^\W_])"
YES_NO = r"(?i:\b(?:yes|no)\b)"
ARTICLE = r"(?:\A|[.!?\n])\s*A(?= [a-z])"  # "A dog ..." at the start of a sentence; but "the answer is A because" stays


def _pattern(answer):
    """The pattern for answers of the kind that the gold `answer` is; None for free text."""
    for pattern, whole in ((LETTER, LETTER), (YES_NO, YES_NO), (NUMBER, NUMBER + r"%?\.?")):
        if re.fullmatch(whole, answer):
            return pattern


def _normal(found):
    """`$1,234` -> `1234`, `Yes` -> `yes`; a single letter keeps its case."""
    found = re.sub(r"[,$+]", "", found).replace("−", "-")
    return found.lower() if len(found) > 1 else found


def extract(text, answer):
    """The answers in a generated `text` -> (strict, flexible), each a string, or None where there is none.

    What is looked for follows from the gold `answer`: a number, a single capital letter, yes or no, or free text.
    Strict: what comes right after `####`, at the *first* place where such an answer does (in free text, the rest of
    that line). The first, because a model that does not stop goes on to invent further questions with answers of their
    own; a heading such as `#### Step one` is passed over. Flexible: the same if there is one, else the last number,
    stand-alone letter, or yes or no in the text (free text: all of it), so whatever strict accepts, flexible does too.
    """
    pattern = _pattern(answer)
    if pattern is None:
        strict = re.search(r"####[ \t]*(\S.*)", text)
        return (strict[1].strip(),) * 2 if strict else (None, text.strip() or None)
    strict = re.search(rf"####[ \t]*[*_(\[$\"']*({pattern})", text)
    if strict:
        return (_normal(strict[1]),) * 2
    found = re.findall(pattern, re.sub(ARTICLE, " ", text) if pattern == LETTER else text)
    return None, _normal(found[-1]) if found else None


def score(text, answer):
    """Whether the answers in a generated `text` are right -> (strict, flexible). Numbers compare by value, exactly."""
    pattern = _pattern(answer)
    gold = _normal(re.match(pattern, answer)[0]) if pattern else answer
    value = Decimal if pattern == NUMBER else str
    strict, flexible = (found is not None and value(found) == value(gold) for found in extract(text, answer))
    return strict, flexible
