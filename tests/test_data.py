"""data.py: formats, splits, errors, arithmetic against an independent account, answers, tokens and batches."""

import json
import os
import socket

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import data
from data import Example, arithmetic, arithmetic_tokenizer, collate, collate_prompts, encode, encode_prompts
from data import extract, load, score, subtasks

DATA_DIR = os.environ.get("DLR_DATA_DIR")
NO_DATA = "REAL DATA NOT TESTED: set DLR_DATA_DIR to a folder with gsm8k/train.jsonl, gsm8k/test.jsonl and so on"
with_real_data = pytest.mark.skipif(not DATA_DIR, reason=NO_DATA)

GSM8K = {"question": "How many?", "answer": "He has 2*500=<<2*500=1000>>1000.\nAnd 5: <<1000+5=1005>>1005.\n#### 1,005"}
CSQA = {
    "question": "Where?",
    "choices": {"label": ["A", "B"], "text": ["bank", "library"]},
    "answerKey": "B",
}
SCIENCEQA = {"question": "Which?", "choices": ["iron", "wood", "air"], "answer": 2}
STRATEGYQA = {"question": "Would it?", "answer": False, "facts": "It is far."}


def example_of(task, row):
    return data.TASKS[task]["example"](row)


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prompts(examples):
    return [example.prompt for example in examples]


def test_gsm8k_format():
    expected = " He has 2*500=1000.\nAnd 5: 1005.\n#### 1005"
    assert example_of("gsm8k", GSM8K) == Example("Question: How many?\nAnswer:", expected, "1005")


def test_commonsense_qa_format():
    expected = Example("Question: Where?\nA. bank\nB. library\nAnswer:", " library\n#### B", "B")
    assert example_of("commonsense_qa", CSQA) == expected


def test_scienceqa_format_with_and_without_optional_columns():
    prompt = "Question: Which?\nA. iron\nB. wood\nC. air\nAnswer:"
    assert example_of("scienceqa", SCIENCEQA) == Example(prompt, " air\n#### C", "C")
    empty = SCIENCEQA | {"hint": "", "solution": None, "topic": "", "subject": "natural science"}
    assert example_of("scienceqa", empty) == Example(prompt, " air\n#### C", "C", "natural science")
    full = SCIENCEQA | {"hint": "Look.", "solution": "Air is a gas. ", "topic": "air", "subject": "x", "lecture": "L"}
    hinted = "Question: Look.\nWhich?\nA. iron\nB. wood\nC. air\nAnswer:"
    assert example_of("scienceqa", full) == Example(hinted, " Air is a gas.\n#### C", "C", "air")
    twice = full | {"question": "Look.\nWhich?"}
    assert example_of("scienceqa", twice).prompt == hinted


@pytest.mark.parametrize(
    "change, response",
    [
        ({}, " It is far.\n#### no"),
        ({"answer": True, "facts": ["One.", "Two."]}, " One. Two.\n#### yes"),
        ({"answer": "yes", "facts": ""}, "\n#### yes"),
        ({"facts": None}, "\n#### no"),
    ],
)
def test_strategyqa_format(change, response):
    example = example_of("strategyqa", STRATEGYQA | change)
    assert example == Example("Question: Would it?\nAnswer:", response, response.split()[-1])
    assert example_of("strategyqa", {"question": "Q?", "answer": True}).response == "\n#### yes"


def test_local_file_format(tmp_path):
    rows = [
        {"prompt": "2+2= \n", "response": "4"},
        {"prompt": " a\n b", "response": "\nSo.\n#### 7 ", "topic": "t"},
        {"prompt": "c", "response": " text", "answer": 3},
    ] + [{"prompt": f"p{i}", "response": "r"} for i in range(20)]
    parts = load(str(write_rows(tmp_path / "mine.jsonl", rows)))
    assert {name: len(part) for name, part in parts.items()} == {"train": 19, "validation": 2, "test": 2}
    found = {example.prompt: example for part in parts.values() for example in part}
    assert found["2+2="] == Example("2+2=", " 4", "4")
    assert found[" a\n b"] == Example(" a\n b", "\nSo.\n#### 7 ", "7", "t")
    assert found["c"] == Example("c", " text", "3")


@with_real_data
@pytest.mark.parametrize(
    "task, train, test",
    [("gsm8k", 7473, 1319), ("commonsense_qa", 9741, 1221), ("strategyqa", 1603, 687), ("scienceqa", 6508, 2224)],
)
def test_real_data(task, train, test):
    parts = load(task, test=0, data_dir=DATA_DIR)
    assert len(parts["test"]) == test and len(parts["validation"]) == 100
    assert train - 105 < len(parts["train"]) <= train - 100  # a few prompts of a data set may be there twice
    seen = [set(prompts(part)) for part in parts.values()]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    for example in parts["train"] + parts["validation"] + parts["test"]:
        assert example.prompt == example.prompt.rstrip() and example.response[0] in " \n"
        assert example.response.endswith(f"#### {example.answer}") and "<<" not in example.response
        assert score(example.response, example.answer) == (True, True), example
        assert score(example.response.replace("####", ""), example.answer)[1], example
        assert score("I cannot tell.", example.answer) == (False, False)
    if task == "scienceqa":
        assert {example.topic for example in parts["test"]} == {"natural science", "language science", "social science"}


@pytest.fixture
def folder(tmp_path):
    def row(i):
        return {"question": f"q{i}", "answer": f"s\n#### {i}"}

    # 0..59 to train on, with 5 also in test and 10 twice; 20 to test on
    write_rows(tmp_path / "gsm8k" / "train.jsonl", [row(i) for i in [*range(60), *range(10)]])
    write_rows(tmp_path / "gsm8k" / "test.jsonl", [row(i) for i in range(55, 75)])
    return tmp_path


def test_splits_are_disjoint_and_only_train_depends_on_the_seed(folder):
    def parts(**kwargs):
        return load("gsm8k", data_dir=folder, **({"n": 20, "val": 25, "test": 6} | kwargs))

    first, other, same = parts(), parts(seed=1), parts()
    assert first == same
    assert first["validation"] == other["validation"] and first["test"] == other["test"]
    assert first["train"] != other["train"]
    assert [len(first[name]) for name in ("train", "validation", "test")] == [20, 25, 6]
    everything = parts(n=0, test=0)
    assert len(everything["test"]) == 20 and first["test"] == everything["test"][:6]
    assert len(everything["validation"]) == 6 and first["validation"][:6] == everything["validation"]
    train, validation, test = (set(prompts(part)) for part in everything.values())
    assert not (train & validation or train & test or validation & test)
    assert len(train | validation) == 55  # the 5 that are in the test split as well have been left out
    assert set(prompts(first["train"])) < train
    # Also where only a part of the test split is used, the rest of it is not trained on.
    assert not set(prompts(parts(n=0)["train"])) & test


def test_local_file_keeps_its_test_set_whatever_is_asked_for(tmp_path):
    path = str(write_rows(tmp_path / "f.jsonl", [{"prompt": f"p{i % 45}", "response": "r"} for i in range(50)]))
    whole, small = load(path, test=0), load(path, n=5, val=2, test=2, seed=3)
    assert len(whole["test"]) == 5 and small["test"] == whole["test"][:2]
    assert len(small["train"]) == 5 and len(small["validation"]) == 2
    assert not set(prompts(small["train"] + small["validation"])) & set(prompts(whole["test"]))
    assert not set(prompts(small["train"])) & set(prompts(small["validation"]))


def test_requests_that_cannot_be_met(folder, tmp_path):
    unique = write_unique(folder)
    with pytest.raises(ValueError, match="the largest n is 55 "):
        load("gsm8k", n=2000, val=20, test=5, data_dir=unique)
    exact = load("gsm8k", n=55, val=20, test=5000, data_dir=unique)  # of val and test, what is there at most
    assert len(exact["train"]) == 55 and exact["validation"] == [] and len(exact["test"]) == 20
    with pytest.raises(ValueError, match="has 0 training and 1 test examples"):
        load(str(write_rows(tmp_path / "small.jsonl", [{"prompt": "a", "response": "b"}] * 2)))
    with pytest.raises(ValueError, match="must not be negative: n=-1"):
        load("gsm8k", n=-1, data_dir=folder)
    with pytest.raises(ValueError, match="known are arithmetic, gsm8k, .* file.jsonl"):
        load("gsm9k")
    with pytest.raises(FileNotFoundError, match=r"scienceqa.*test.jsonl does not exist.*DIR/scienceqa/train.jsonl"):
        load("scienceqa", data_dir=folder)
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl does not exist"):
        load("nowhere.jsonl")


def write_unique(folder):
    """The same folder without the repeated rows, so that the number left does not depend on where they fall."""
    path = folder / "gsm8k" / "train.jsonl"
    path.write_text("".join(dict.fromkeys(path.read_text().splitlines(keepends=True))))
    return folder


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "a"}', "line 4: field 'response' is missing"),
        ('{"prompt": null, "response": "b"}', "line 4: field 'prompt' is missing"),
        ('{"prompt": " ", "response": "b"}', "line 4: field 'prompt' must be text"),
        ('{"prompt": "a", "response": ["b"]}', "line 4: field 'response' must be text"),
        ('{"prompt": "a"', "line 4 is not valid JSON"),
        ("[1]", "line 4 is not valid JSON"),
        (b'{"prompt": "\xff"}', "line 4 is not valid JSON"),
    ],
)
def test_malformed_line_is_named(tmp_path, line, message):
    good = b'{"prompt": "a", "response": "b"}\n'
    path = tmp_path / "bad.jsonl"
    path.write_bytes(good + b"\n" + good + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good)
    with pytest.raises(ValueError) as error:
        load(str(path))
    assert str(error.value).startswith(f"{path}, {message}")


@pytest.mark.parametrize(
    "task, row, message",
    [
        ("gsm8k", {"question": "q"}, "'answer' is missing"),
        ("gsm8k", {"question": "q", "answer": "7"}, "no '#### number'"),
        ("commonsense_qa", {"question": "q", "answerKey": "A"}, "'choices' is missing"),
        ("commonsense_qa", CSQA | {"answerKey": "E"}, "'E' is not in list"),
        ("commonsense_qa", CSQA | {"choices": ["a", "b"]}, "line 1"),
        ("scienceqa", SCIENCEQA | {"answer": 3}, "index out of range"),
        ("strategyqa", {"question": "q"}, "'answer' is missing"),
        ("strategyqa", {"question": "q", "answer": "perhaps"}, "must be true or false"),
    ],
)
def test_malformed_row_of_a_task_is_named(tmp_path, task, row, message):
    for split in ("train", "test", "validation"):
        path = write_rows(tmp_path / task / f"{split}.jsonl", [row])
    with pytest.raises(ValueError, match=message) as error:
        load(task, data_dir=tmp_path)
    assert str(path.parent) in str(error.value) and "line 1" in str(error.value)


@pytest.mark.parametrize(
    "task, row, hub, config, test",
    [
        ("gsm8k", GSM8K, "openai/gsm8k", "main", "test"),
        ("commonsense_qa", CSQA, "tau/commonsense_qa", None, "validation"),
        ("strategyqa", STRATEGYQA, "ChilleD/StrategyQA", None, "test"),
        ("scienceqa", SCIENCEQA, "derek-thomas/ScienceQA", None, "test"),
    ],
)
def test_what_the_hub_is_asked_for(monkeypatch, task, row, hub, config, test):
    asked = []

    def load_dataset(path, name=None, *, split):
        asked.append((path, name, split))
        rows = [row | {"question": f"{split} {i}?"} for i in range(6)]
        if task != "scienceqa":
            return datasets.Dataset.from_list(rows)
        # Two items have an image; one of them could not be decoded.
        images = [None, None, {"bytes": b"no image at all", "path": None}, None, {"bytes": b"", "path": None}, None]
        features = datasets.Dataset.from_list(rows).features | {"image": datasets.Image()}
        rows = [row | {"image": image} for row, image in zip(rows, images)]
        return datasets.Dataset.from_list(rows, features=datasets.Features(features))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    parts = load(task, val=1, test=0)
    assert sorted(asked) == sorted([(hub, config, "train"), (hub, config, test)])
    texts = "".join(prompts(parts["test"]))
    left_out = [2, 4] if task == "scienceqa" else []
    assert [f"{test} {i}?" in texts for i in range(6)] == [i not in left_out for i in range(6)]
    assert len(parts["train"]) == 5 - len(left_out) and len(parts["validation"]) == 1
    assert all("train " in prompt for prompt in prompts(parts["train"] + parts["validation"]))


@pytest.mark.parametrize("cause", [ConnectionError("Couldn't\nreach"), ValueError("no cache for config main"), None])
def test_no_hub_and_no_cache_is_one_sentence(monkeypatch, tmp_path, cause):
    if cause:

        def load_dataset(*args, **kwargs):
            raise cause

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    else:  # the true library, which is told that it is offline and has an empty cache
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))
    with pytest.raises(ConnectionError) as error:
        load("gsm8k")
    message = str(error.value)
    for part in ("openai/gsm8k", "--data-dir DIR with DIR/gsm8k/train.jsonl", "`python train.py` with no arguments"):
        assert part in message
    assert "\n" not in message


def oracle(a, b, op, digits):
    """The same labels and depth from the definition: a carry into column i is a matter of the i lowest digits."""
    columns = range(digits + 1)
    xy = [(int(x), int(y)) for x, y in zip(reversed(f"{a:0{digits + 1}d}"), reversed(f"{b:0{digits + 1}d}"))]
    if op == "+":
        carry = [a % 10**i + b % 10**i >= 10**i for i in columns]
        passes, makes = [x + y == 9 for x, y in xy], [x + y >= 10 for x, y in xy]
        names = {(True, True): "US", (True, False): "UC", (False, True): "SS"}
        plain, maker = "SA", "SC"
    else:
        carry = [a % 10**i < b % 10**i for i in columns]
        passes, makes = [x == y for x, y in xy], [x < y for x, y in xy]
        names = {(True, True): "UD", (True, False): "UB", (False, True): "ME"}
        plain, maker = "MD", "MB"
    labels = tuple(names.get((carry[i], passes[i]), maker if makes[i] else plain) for i in reversed(columns))
    depth = 0
    for start in columns:
        if makes[start]:
            end = start + 1
            while end < digits and passes[end]:
                end += 1
            depth = max(depth, end - start)
    return labels, depth


def test_subtasks_agree_with_the_oracle_on_every_problem_of_two_digits_and_many_of_five():
    for a in range(100):
        for b in range(100):
            assert subtasks(a, b, "+", 2) == oracle(a, b, "+", 2)
            if a >= b:
                assert subtasks(a, b, "-", 2) == oracle(a, b, "-", 2)
    for example in arithmetic(3000, digits=5, ops="+-", nines=0.6):
        op = "+" if "+" in example.prompt else "-"
        a, b = map(int, example.prompt.rstrip("=").split(op))
        assert (example.labels, example.depth) == oracle(a, b, op, 5)


@pytest.mark.parametrize(
    "a, op, b, labels, depth",
    [
        (123, "+", 456, "SA SA SA SS", 0),  # a column that sums to 9, but no carry
        (999, "+", 1, "UC US US SC", 3),  # one carry through two nines into the leading digit: as deep as it gets
        (455, "+", 545, "UC US US SC", 3),
        (555, "+", 555, "UC UC UC SC", 1),  # three carries, each used up at once
        (905, "+", 905, "UC SC UC SC", 1),
        (90, "+", 15, "SA UC SC SA", 1),
        (999, "-", 999, "ME ME ME ME", 0),
        (500, "-", 1, "ME UB UD MB", 2),  # one borrow through a column of two zeros: as deep as three digits go
        (543, "-", 121, "ME MD MD MD", 0),
        (321, "-", 145, "ME UB UB MB", 1),  # 2-4 borrows once more: a chain of its own
    ],
)
def test_subtasks_worked_by_hand(a, op, b, labels, depth):
    assert subtasks(a, b, op, 3) == (tuple(labels.split()), depth)


def test_arithmetic_examples():
    examples = arithmetic(2000, digits=3, ops="+-", seed=5)
    assert examples == arithmetic(2000, digits=3, ops="+-", seed=5) != arithmetic(2000, digits=3, ops="+-", seed=6)
    assert len(set(prompts(examples))) == 2000
    for example in examples:
        op = example.prompt[3]
        a, b = int(example.prompt[:3]), int(example.prompt[4:7])
        assert op in "+-" and example.prompt[7:] == "=" and (op == "+" or a >= b)
        assert example.answer == str(a + b if op == "+" else a - b).zfill(4)
        assert example.response == f" #### {example.answer}" and len(example.labels) == 4
        assert example.topic == ("S" if op == "+" else "M") + str(example.depth)
    topics = {example.topic for example in examples}
    assert topics == {"S0", "S1", "S2", "S3", "M0", "M1", "M2"}  # every depth there is, and no other
    assert {"S5", "S6"} <= {example.topic for example in arithmetic(500, digits=6)}


def test_nines_make_long_chains():
    def deep(**kwargs):
        return sum(example.depth >= 3 for example in arithmetic(1000, digits=5, **kwargs))

    assert deep(nines=0.5) > 3 * deep(nines=0) > 0
    assert deep(nines=0.5, ops="-") > 3 * deep(nines=0, ops="-") > 0
    assert all(example.labels[1:] == ("SS",) * 3 for example in arithmetic(50, nines=1))


def test_arithmetic_distinct_excluded_and_exhausted():
    everything = arithmetic(100, digits=1)  # all there are
    assert len(set(prompts(everything))) == 100
    assert len(arithmetic(9000, digits=2)) == 9000  # many draws in vain in all, but never very many in a row
    rest = arithmetic(40, digits=1, exclude=set(prompts(everything[:60])), seed=9)
    assert set(prompts(rest)) == set(prompts(everything[60:]))
    with pytest.raises(ValueError, match="found only 100 of 101 distinct"):
        arithmetic(101, digits=1)
    for wrong in ({"digits": 0}, {"ops": "*"}, {"ops": ""}, {"nines": 1.5}, {"n": -1}):
        with pytest.raises(ValueError, match="arithmetic takes"):
            arithmetic(**({"n": 3} | wrong))


def test_load_arithmetic():
    parts = load("arithmetic", n=300, val=50, test=120, digits=2, ops="+-")
    other = load("arithmetic", n=300, val=50, test=120, digits=2, ops="+-", seed=1)
    assert [len(parts[name]) for name in ("train", "validation", "test")] == [300, 50, 120]
    assert len(set(prompts(sum(parts.values(), [])))) == 470
    assert parts["test"] == other["test"] and parts["validation"] == other["validation"]
    assert parts["train"] != other["train"]
    for wrong in ({"n": 0}, {"n": 5, "test": 0}):
        with pytest.raises(ValueError, match="say how many with --n"):
            load("arithmetic", **wrong)


@pytest.mark.parametrize(
    "text, answer, found",
    [
        # numbers
        (" ...\n#### 18", "18", ("18", "18")),
        ("#### 0579", "579", ("0579", "0579")),
        ("#### $1,234.00.", "1234", ("1234.00", "1234.00")),
        ("####18%", "18", ("18", "18")),
        ("#### **-5**", "-5", ("-5", "-5")),
        ("#### −$5", "-5", ("-5", "-5")),
        ("#### +7", "7", ("7", "7")),
        ("#### .50", "0.5", (".50", ".50")),
        ("She makes 3-5 and 16-3=13 dollars.", "13", (None, "13")),
        ("It takes 7-3", "3", (None, "3")),
        ("It is (-3)", "-3", (None, "-3")),
        ("first 1,450,000 then 1,2,3", "3", (None, "3")),
        ("12,3456", "3456", (None, "3456")),  # not a thousands comma
        ("So 2,125.", "2125", (None, "2125")),
        ("", "3", (None, None)),
        ("nothing", "3", (None, None)),
        ("#### 18\nQuestion: another?\nAnswer: 2\n#### 4", "18", ("18", "18")),  # did not stop: the first counts
        ("#### Step one\n2+2\n#### 4", "4", ("4", "4")),  # a heading is no answer
        ("#### ", "4", (None, None)),
        ("####\n4", "4", (None, "4")),  # strict wants the same line
        # letters
        ("#### B", "B", ("B", "B")),
        ("#### (B)", "C", ("B", "B")),
        ("####  **B**", "B", ("B", "B")),
        ("#### B. library", "B", ("B", "B")),
        ("#### A bank", "A", ("A", "A")),
        ("#### Bank", "B", (None, None)),
        ("A dog barks. The answer is (D).", "D", (None, "D")),
        ("B is right. A dog barks.\nA cat does not.", "B", (None, "B")),
        ("The answer is A because it is.", "A", (None, "A")),
        ("It is C, I think. I'm sure. And I know. That's 'it'", "C", (None, "C")),
        ("A", "A", (None, "A")),
        ("A. bank", "A", (None, "A")),
        ("'B'", "B", (None, "B")),
        ("DNA and vitamin-b", "B", (None, None)),
        # yes and no
        ("Facts.\n#### yes", "yes", ("yes", "yes")),
        ("#### **No**", "yes", ("no", "no")),
        ("Yes? I know nothing, yesterday: NO.", "no", (None, "no")),
        ("#### maybe", "no", (None, None)),
        # free text
        ("Think.\n#### deep blue \nQuestion:", "deep blue", ("deep blue", "deep blue")),
        (" deep blue\n", "deep blue", (None, "deep blue")),
        ("", "deep blue", (None, None)),
    ],
)
def test_extract(text, answer, found):
    assert extract(text, answer) == found


@pytest.mark.parametrize(
    "text, answer, right",
    [
        ("#### 579", "0579", (True, True)),
        ("#### 1,005.0", "1005", (True, True)),
        ("#### 1005", "$1,005.", (True, True)),
        ("#### 0.1", "0.10", (True, True)),
        ("#### 9007199254740993", "9007199254740992", (False, False)),  # equal as floats
        ("#### 0.30000000000000000001", "0.3", (False, False)),
        ("#### -0", "0", (True, True)),
        ("#### 5", "-5", (False, False)),
        ("it is 18", "18", (False, True)),
        ("#### 17 ... 18", "18", (False, False)),
        ("#### b", "B", (False, False)),
        ("#### YES", "yes", (True, True)),
        ("#### Blue", "blue", (False, False)),
        ("1/2", "1/2", (False, True)),
        ("", "1", (False, False)),
    ],
)
def test_score(text, answer, right):
    assert score(text, answer) == right


def character_tokenizer():
    """A character tokenizer that pads with its eos, and puts <s> before and </s> behind each text."""
    vocabulary = {token: i for i, token in enumerate(["</s>", "<s>", *map(chr, range(10, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special_tokens = [("<s>", 1), ("</s>", 0)]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=special_tokens)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", bos_token="<s>")


EXAMPLES = [Example("ab", " c\n#### 1", "1"), Example("abcd", " #### 2", "2"), Example("a" * 9, " #### 3", "3")]


def test_encode_and_collate_where_pad_is_eos():
    tokenizer = character_tokenizer()
    rows, cut, dropped = encode(EXAMPLES, tokenizer)
    assert (len(rows), cut, dropped) == (3, 0, 0)
    for example, (ids, length) in zip(EXAMPLES, rows):
        tokens = tokenizer.convert_ids_to_tokens(ids)
        assert tokens[:length] == ["<s>", *example.prompt]  # its BOS, but no eos between prompt and response
        assert tokens[length:] == [*example.response, "</s>"]  # the eos, and no second BOS
    batch = collate(rows, pad_id=tokenizer.pad_token_id)
    input_ids, attention_mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    assert input_ids.shape == attention_mask.shape == labels.shape == (3, max(len(ids) for ids, _ in rows))
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}
    for row, (ids, length) in enumerate(rows):
        end = len(ids)
        assert input_ids[row].tolist() == ids + [tokenizer.pad_token_id] * (input_ids.shape[1] - end)
        assert attention_mask[row].nonzero().flatten().tolist() == list(range(end))
        assert labels[row].tolist() == [-100] * length + ids[length:] + [-100] * (input_ids.shape[1] - end)
        assert labels[row, end - 1] == tokenizer.eos_token_id
    other = collate(rows, pad_id=7)
    assert torch.equal(other["attention_mask"], attention_mask) and torch.equal(other["labels"], labels)
    assert encode([], tokenizer) == ([], 0, 0)


def test_encode_cuts_and_drops():
    tokenizer = character_tokenizer()
    full = encode(EXAMPLES, tokenizer)[0]
    lengths = [len(ids) for ids, _ in full]  # 13, 13, 18 with prompts of 3, 5, 10 tokens
    assert lengths == [13, 13, 18]
    cases = {18: (3, 0, 0), 17: (3, 1, 0), 13: (3, 1, 0), 12: (3, 3, 0), 10: (2, 2, 1), 3: (0, 0, 3)}
    for limit, expected in cases.items():
        rows, cut, dropped = encode(EXAMPLES, tokenizer, max_length=limit)
        assert (len(rows), cut, dropped) == expected
        assert rows == [(ids[:limit], length) for ids, length in full if length < limit]
        assert all(len(ids) > length for ids, length in rows)


def test_encode_without_end_of_text():
    tokenizer = character_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        encode(EXAMPLES, tokenizer)


def test_prompts_for_generation():
    tokenizer = character_tokenizer()
    ids = encode_prompts(prompts(EXAMPLES), tokenizer)
    assert ids == [row[:length] for row, length in encode(EXAMPLES, tokenizer)[0]]
    input_ids, attention_mask = collate_prompts(ids, pad_id=tokenizer.pad_token_id)
    assert input_ids.dtype == attention_mask.dtype == torch.long
    assert input_ids.tolist() == [[0] * (10 - len(row)) + row for row in ids]
    assert attention_mask.tolist() == [[0] * (10 - len(row)) + [1] * len(row) for row in ids]


def test_arithmetic_tokenizer(tmp_path):
    tokenizer = arithmetic_tokenizer()
    assert tokenizer.bos_token is None and tokenizer.pad_token_id != tokenizer.eos_token_id
    LlamaConfig().save_pretrained(tmp_path)  # a model beside it must not change how the tokenizer is read
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for example in arithmetic(50, ops="+-"):
        text = example.prompt + example.response
        ids = tokenizer(text).input_ids
        assert len(ids) == 8 + 1 + 4 and tokenizer.decode(ids) == text  # a token a character, and one for " #### "
        assert again(text).input_ids == ids and again.decode(ids) == text
        (row, length), = encode([example], tokenizer)[0]
        assert row == ids + [tokenizer.eos_token_id] and length == 8
    assert (again.eos_token_id, again.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.decode(tokenizer("12 + x").input_ids) == "12<unk>+<unk><unk>"
