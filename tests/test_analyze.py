"""analyze.py against a model whose behaviour is known by construction, and against numbers worked out by hand."""
import copy
import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import analyze
import data
from data import Example
from dlr import DLRModel
from eval import answer

SETTINGS = dict(max_new_tokens=6, batch_size=3)


@pytest.fixture(scope="module")
def model(tokenizer):
    """A bigram LM (its only block adds nothing) whose answers need codes; 5 codes, chunks of 2 tokens.

    A digit is followed by ` #### ` in the first two places of a text, and by <eos> later. ` #### ` is followed by digit
    k under code k, and by 9 without a code. The router reads code d from a digit d < 4, 1 from `=`, 0 from the rest."""
    vocabulary, late, codes = len(tokenizer), len(tokenizer), len(tokenizer) + 1
    width = codes + 5 + 1  # one dimension a token, one for "late", one a code, one that balances (see below)
    lm = GPT2LMHeadModel(GPT2Config(
        vocab_size=vocabulary, n_positions=16, n_embd=width, n_layer=1, n_head=1, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id))
    for parameter in lm.parameters():
        parameter.data.zero_()
    lm.transformer.ln_f.weight.data.fill_(1)
    lm.transformer.wte.weight.data[:, :vocabulary] = torch.eye(vocabulary)
    lm.transformer.wpe.weight.data[2:, late] = 1
    head = lm.lm_head.weight.data  # (V, H)
    token = tokenizer.convert_tokens_to_ids
    digits, mark, end = [token(str(d)) for d in range(10)], token(" #### "), tokenizer.eos_token_id
    head[mark, digits] = 20
    head[end, digits] = 15
    head[end, late] = 10
    head[digits, mark] = 10
    head[digits[9], mark] = 12
    for k in range(5):
        head[digits[k], codes + k] = 5
    head[:, -1] = -head.sum(1)  # rows that sum to zero do not see the mean that the last norm takes away
    model = DLRModel(lm, num_codes=5, chunk_size=2, layer=0, scale=1.0).eval()
    model.codebook.data[torch.arange(5), codes + torch.arange(5)] = 1
    model.router.weight.data.zero_()
    model.router.weight.data[range(4), digits[:4]] = 1
    model.router.weight.data[1, token("=")] = 1
    return model


def known_examples(times=1):
    """A: the code of the chunk that begins in the prompt must be the digit. B: that of the answer's chunk must be 0."""
    a = [Example(d, f" #### {d}", d, "A") for d in "002223"]
    b = [Example(f"={d}", " #### 0", "0", "B") for d in "57"]
    return (a + b) * times


def known_codes(condition):
    """By hand: the codes of the two chunks of the eight texts above, under a condition."""
    on = [[0, 0], [0, 0], [2, 2], [2, 2], [2, 2], [3, 3], [1, 0], [1, 0]]
    return {"on": on, "off": [[-1, -1]] * 8, "off-answer": [[code, -1] for code, _ in on],
            "off-prompt": [[-1, code] for _, code in on], "frequent": [[2, 0]] * 8,
            "other": [[1, 0], [0, 0], [0, 0], [2, 2], [2, 2], [2, 2], [3, 3], [1, 0]]}[condition]


@pytest.fixture(scope="module")
def known(model, tokenizer):
    examples = known_examples()
    on = answer(model, tokenizer, examples, **SETTINGS)
    return examples, on, data.encode(examples, tokenizer)[0]


def test_interventions_on_a_model_with_known_answers(model, tokenizer, known):
    examples, on, rows = known
    assert on[1].tolist() == known_codes("on")
    found = analyze.interventions(model, tokenizer, examples, on, rows, **SETTINGS)
    right = {"on": 8, "off": 0, "off-answer": 6, "off-prompt": 2, "frequent": 5, "other": 4}
    for name, count in right.items():
        assert found[name]["strict"][0] == count / 8, name
        assert found[name]["change"][0] == count / 8 - 1, name
        assert found[name]["cut_off"] == 0
        low, high = found[name]["strict"][1:]
        assert low <= count / 8 <= high and (low < high) == (0 < count < 8)
    topics = {name: [found[name]["topics"][topic][0] for topic in "AB"] for name in right}
    assert topics["off-answer"] == [1, 0] and topics["off-prompt"] == [0, 1]
    assert topics["frequent"] == [3 / 6, 1] and topics["other"] == [3 / 6, 1 / 2]


@pytest.mark.parametrize("name", ["on", "off", "off-answer", "off-prompt", "frequent", "other"])
def test_nll_is_that_of_each_text_under_the_known_codes(model, tokenizer, known, name):
    examples, on, rows = known
    total = 0.0
    for (ids, prompt), codes in zip(rows, known_codes(name)):
        log_p = model(torch.tensor([ids]), codes=torch.tensor([codes + [-1]])).logits.log_softmax(-1)[0]  # (T, V)
        total -= sum(log_p[t - 1, ids[t]].item() for t in range(prompt, len(ids)))
    found = analyze.interventions(model, tokenizer, examples, on, rows, **SETTINGS)
    assert found[name]["nll"][0] == pytest.approx(total / 24, rel=1e-5)  # 8 responses of 3 tokens
    assert found[name]["nll_change"][0] == pytest.approx(found[name]["nll"][0] - found["on"]["nll"][0], abs=1e-6)


def test_random_codes_are_right_by_chance(model, tokenizer):
    examples = known_examples(times=50)
    settings = dict(max_new_tokens=6, batch_size=100)
    on = answer(model, tokenizer, examples, **settings)
    found = analyze.interventions(model, tokenizer, examples, on, data.encode(examples, tokenizer)[0], **settings)
    assert found["random"]["strict"][0] == pytest.approx(1 / 5, abs=0.06)  # 3 standard errors
    assert found["random"]["strict"][1] < 1 / 5 < found["random"]["strict"][2]


def test_a_long_prompt_is_cut_as_it_is_for_the_answer(model, tokenizer):
    examples = [Example("1" * length, " #### 1", "1") for length in (30, 13, 2)]
    prompts, room = analyze.encode_to_answer(model, tokenizer, examples, max_new_tokens=4)  # of 16 places
    assert [len(ids) for ids in prompts] == [12, 12, 2] and room == 4
    predictions, codes = answer(model, tokenizer, examples, max_new_tokens=4, batch_size=3)
    chunks = [-(-(len(ids) + len(prediction["ids"])) // 2) for ids, prediction in zip(prompts, predictions)]
    assert (codes >= 0).sum(1).tolist() == chunks


def test_swapping_a_code_costs_what_hangs_on_it(model, tokenizer):
    examples, settings = known_examples(times=8), dict(max_new_tokens=6, batch_size=20)
    found = analyze.swap(model, tokenizer, examples, answer(model, tokenizer, examples, **settings), **settings)
    assert {k: (row["share"], row["change"][0]) for k, row in found["codes"].items()} == {
        "0": (6 / 16, -4 / 8), "1": (2 / 16, 0), "2": (6 / 16, -3 / 8), "3": (2 / 16, -1 / 8)}  # 4 is never used
    assert found["mean"] == pytest.approx(-1 / 4)
    assert found["codes"]["0"]["topics"]["A"][0] == pytest.approx(-2 / 6)
    assert found["codes"]["0"]["topics"]["B"][0] == -1 and found["codes"]["1"]["topics"]["B"] == (0, 0, 0)


def test_activity_of_a_known_codebook(model, known):
    codes = analyze.router_codes(model, known[2], batch_size=3)
    assert codes.tolist() == known_codes("on")
    model = copy.deepcopy(model)
    model.settings.scale, model.unit = 0.5, torch.tensor(2.0)  # of alpha: the same push as without them
    found = analyze.activity(model, codes, known[2], batch_size=3)
    a = analyze.activity(model, codes[:6], known[2][:6], batch_size=3)
    shares = np.array([6, 2, 6, 2]) / 16
    assert found["uses"] == [6, 2, 6, 2, 0] and found["used"] == 4 / 5
    assert found["entropy"] == pytest.approx(-(shares * np.log2(shares)).sum())
    assert found["cosine"] == pytest.approx(0)
    # the states are 1 long in the first two places, else 2 ** .5; of A's four without the first, that is the most
    assert a["state_norm"] == found["state_norm"] == pytest.approx(2**0.5)
    assert found["push_median"] == pytest.approx(2**-0.5) and found["push_max"] == pytest.approx(2**-0.5)


def test_push_is_measured_on_real_tokens_but_the_first(model):
    """Neither an attention sink in the first place nor padding may move the median |h|."""
    model = copy.deepcopy(model)
    positions = model.lm.transformer.wpe.weight.data  # (16, H), of which the last entry is free
    positions[:, -1] = torch.arange(16.0) + 10
    positions[0, -1] = 1000
    long, short = [3] * 12, [3] * 3  # padded by nine places, were they counted
    rows = [(long, 2)] + [(short, 2)] * 5
    loud = [(1 + int(t >= 2) + (t + 10) ** 2) ** 0.5 for ids, _ in rows for t in range(1, len(ids))]  # |h|, by hand
    found = analyze.activity(model, analyze.router_codes(model, rows, 6), rows, batch_size=6)
    assert found["state_norm"] == pytest.approx(sorted(loud)[(len(loud) - 1) // 2])


def test_purity_by_hand():
    codes = np.array([[0, 1, 0], [0, 0, -1], [1, 1, 0], [1, 0, -1]])
    topics = ["a", "a", "b", "b"]
    found = analyze.purity(codes, topics, 1, min_count=4)
    # code 0 six times, 4 of them in a; code 1 four times, 3 in b; each topic has 5 of the 10 windows, also by position
    assert found["ngrams"] == 2 and found["purity"] == pytest.approx((4 + 3) / 10)
    assert found["prior"] == 0.5 and found["position_matched"] == 0.5
    # pairs: 01 a, 10 a b b, 00 a, 11 b
    found = analyze.purity(codes, topics, 2, min_count=2)
    assert found["ngrams"] == 1 and found["purity"] == pytest.approx(2 / 3)
    assert analyze.purity(codes, topics, 2, min_count=4) is None and analyze.purity(codes, topics, 4) is None


def test_purity_by_counting():
    rng = np.random.default_rng(0)
    codes, topics = rng.integers(0, 3, (60, 8)), rng.choice(list("abc"), 60, p=[0.5, 0.3, 0.2])
    for row, length in zip(codes, rng.integers(1, 9, 60)):
        row[length:] = -1
    for n in (1, 2, 3):
        windows = [(tuple(row[m : m + n]), topic, m) for row, topic in zip(codes, topics)
                   for m in range(8 - n + 1) if row[m + n - 1] >= 0]
        seen, at = Counter(gram for gram, _, _ in windows), Counter(m for _, _, m in windows)
        here = Counter((topic, m) for _, topic, m in windows)
        pure = matched = total = 0
        for gram in (gram for gram, count in seen.items() if count >= 5):
            top, count = sorted(Counter(t for g, t, _ in windows if g == gram).items(), key=lambda x: (-x[1], x[0]))[0]
            pure, total = pure + count, total + seen[gram]
            matched += sum(here[top, m] / at[m] for g, _, m in windows if g == gram)
        found = analyze.purity(codes, topics, n, min_count=5, permutations=5)
        assert found["purity"] == pytest.approx(pure / total)
        assert found["position_matched"] == pytest.approx(matched / total)


def test_a_code_for_the_first_chunk_is_as_pure_as_its_position():
    # texts of topic a have one chunk, those of b four; code 0 comes first, code 1 elsewhere
    codes = np.array([[0, -1, -1, -1]] * 30 + [[0, 1, 1, 1]] * 10)
    found = analyze.purity(codes, ["a"] * 30 + ["b"] * 10, 1)
    assert found["prior"] == 40 / 70 and found["purity"] == pytest.approx((30 + 30) / 70)
    assert found["position_matched"] == pytest.approx(found["purity"])
    assert found["p"] == 1  # length tells the topic already


def test_the_permutation_null_knows_chance_from_information():
    rng = np.random.default_rng(1)
    topics = rng.choice(list("ab"), 200)
    informative = np.where(topics == "a", 0, 1)[:, None].repeat(3, 1)
    assert analyze.purity(informative, topics, 1)["purity"] == 1
    assert analyze.purity(informative, topics, 1)["p"] == 1 / 201
    ps = [analyze.purity(rng.integers(0, 4, (200, 3)), topics, 1)["p"] for _ in range(10)]
    assert np.mean(ps) > 0.25 and min(ps) > 1 / 201


def test_mutual_information_by_hand():
    # first column: x tells y for two of four values, I = 1/2 bit of 1; second: y never varies, so it is not counted
    x = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 0], [3, 1], [3, 1]])
    y = np.array([[0, 0], [1, 0], [0, 0], [1, 0], [0, 0], [0, 0], [1, 0], [1, 0]])
    assert analyze.mutual_information(x, y) == pytest.approx((0.5, 1))
    assert analyze.mutual_information(x, np.zeros_like(y)) == (0, 0)
    # p(y) = 3/4, 1/4 and x a noisy copy: joint 3/8, 1/8 | 3/8, 1/8 is independent; 2/4, 0 | 1/4, 1/4 is not
    x, y = np.array([0, 0, 1, 1])[:, None], np.array([0, 0, 0, 1])[:, None]
    possible = 2 - 0.75 * np.log2(3)
    assert analyze.mutual_information(x, y) == pytest.approx((1 + possible - 1.5, possible))


def test_information_about_the_digit_that_a_code_is_read_before(tokenizer):
    """A router that reads the token: before the last digit of `a+b=` it knows the digit before, and nothing else."""
    examples = data.arithmetic(60, digits=2, ops="+-", seed=3)
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=17, n_layer=1, n_head=1,
                                    bos_token_id=None, eos_token_id=1))
    for parameter in lm.parameters():
        parameter.data.zero_()
    lm.transformer.wte.weight.data.copy_(torch.eye(17))
    model = DLRModel(lm, num_codes=17, chunk_size=1, layer=0)
    model.eval().router.weight.data.copy_(torch.eye(17))  # the code is the token
    rows, _, _ = data.encode(examples, tokenizer)
    codes = analyze.router_codes(model, rows, batch_size=7)
    before = model.router.weight.clone()
    found = analyze.digit_information(model, tokenizer, examples, rows, codes, batch_size=7)
    assert torch.equal(model.router.weight, before)  # the untrained routers are gone again

    def bits(pairs):
        count, n = Counter(pairs), len(pairs)
        a, b = Counter(x for x, _ in pairs), Counter(y for _, y in pairs)
        return sum(c / n * np.log2(c * n / (a[x] * b[y])) for (x, y), c in count.items())

    texts = [f"#{example.answer}" for example in examples]  # the first digit is read from the ` #### ` before it
    expected = np.mean([bits([(text[d], text[d + 1]) for text in texts]) for d in range(3)])
    assert found["digit"]["bits"] == pytest.approx(expected)
    carried = [[label in ("US", "UC", "UD", "UB") for label in example.labels] for example in examples]
    read = [[(text[d], c[d]) for text, c in zip(texts, carried)] for d in range(2)]  # nothing is carried into the last
    expected = np.mean([bits(pairs) for pairs in read])
    assert found["carry in"]["bits"] == pytest.approx(expected)
    assert 0 <= found["digit"]["null"] < found["digit"]["possible"]


def test_digits_need_a_token_each(tokenizer):
    whole = Tokenizer(models.WordLevel({"<eos>": 0, "####": 1, "0579": 2, "1": 3}, unk_token="<eos>"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    whole = PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="<eos>")
    example = Example("1", " #### 0579", "0579", labels=("SA",) * 4)
    assert analyze.digit_chunks(whole, [example], data.encode([example], whole)[0], 1) is None
    rows = data.encode([example], tokenizer)[0]  # 1, ` #### `, 0, 5, 7, 9, <eos>
    assert analyze.digit_chunks(tokenizer, [example], rows, 1).tolist() == [[1, 2, 3, 4]]
    assert analyze.digit_chunks(tokenizer, [example], rows, 2).tolist() == [[0, 1, 1, 2]]


def test_a_broken_run_is_named_and_the_good_one_analysed(saved_run, tmp_path, capsys):
    sft = tmp_path / "sft"
    (sft / "model").mkdir(parents=True)
    (sft / "config.json").write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        analyze.main([str(tmp_path / "gone"), str(sft), str(saved_run), "--device", "cpu", "--min-count", "20"])
    printed, named = capsys.readouterr().out, stopped.value.code.splitlines()  # a text: exit status 1, text to stderr
    assert len(named) == 2 and str(tmp_path / "gone") in named[0] and f"{sft} is left out: it has no codes" in named[1]

    metrics = json.loads((saved_run / "metrics.json").read_text())
    found = metrics["analysis"]
    assert metrics["test"] == {"steered": {"n": 40}} and found["swap"] == "of before"
    for name, row in found["interventions"].items():
        line = next(line for line in printed.splitlines() if line.split()[:1] == [name])
        numbers = [float(number) for number in re.findall(r"[-+]?\d+\.\d+", line)]
        kept = [*(100 * v for v in row["strict"]), *(100 * v for v in row["change"]), 100 * row["cut_off"], *row["nll"],
                *row["nll_change"]]
        if name == "on":
            kept = [*kept[:3], kept[6], *kept[7:10]]
        assert numbers == pytest.approx(kept, abs=0.051), name
    for n, row in found["codes"]["purity"].items():
        assert row is None or f"{row['purity']:.3f}" in printed
    assert f"{found['codes']['digits']['sums to 9']['bits']:.3f}" in printed
    assert found["settings"]["codes"]["test"] == 40 and f"{saved_run}: 40 test examples" in printed


@pytest.mark.parametrize("flags, word", [(["--swop"], "--swop"), (["--min-count", "0"], "--min-count is 0"),
                                         ([], "RUN"), (["RUN", "--device", "abacus"], "abacus")])
def test_mistakes_get_one_sentence(flags, word):
    with pytest.raises(SystemExit) as stopped:
        analyze.main(["run", *flags] if flags and flags[0] != "RUN" else flags)
    message = str(stopped.value.code)
    assert message.startswith("analyze.py: ") and word in message and "\n" not in message


def test_searches_of_growing_size_come_to_the_optimum(model, tokenizer):
    """Four texts of a few chunks, against brute force over all their code sequences."""
    import itertools

    rows = data.encode([Example("1", " #### 2", "2"), Example("12", " #### 3", "3")], tokenizer)[0]
    found = analyze.search_gap(model, rows, batch_size=1, most=8)
    best = off = tokens = 0
    for ids, prompt_length in rows:
        batch = data.collate([(ids, prompt_length)])
        trunk, labels = model.trunk(batch["input_ids"]), batch["labels"]
        chunks = -(-len(ids) // model.settings.chunk_size)
        every = torch.tensor(list(itertools.product(range(model.settings.num_codes), repeat=chunks)))[None]
        best -= model.log_likelihood(trunk, labels, every).max().item()
        off -= model.log_likelihood(trunk, labels, torch.full((1, chunks), -1)).item()
        tokens += (labels >= 0).sum().item()
    assert found["optimum"] == pytest.approx(best / tokens, abs=1e-5) and found["off"] == pytest.approx(off / tokens)
    for how in ("rollouts", "beam"):
        assert found["n"] == [1, 2, 4, 8] and found[how] == sorted(found[how], reverse=True)
        assert found[how][-1] >= found["optimum"] - 1e-6
    assert "optimum" in analyze.search_text(found)
