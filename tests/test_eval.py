"""eval.py: intervals and p values against simulations, comparisons of runs against sums done by hand."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import analyze
import data
import eval as evaluation
import train
from dlr import DLRModel


def write_run(path, seed, answers, base=None, method="sft", nll=None, **config):
    """A finished run whose test answers are right (1) or wrong (0) as given, and as likely (nats, tokens) as given."""
    path.mkdir(parents=True)
    (path / "model").mkdir()
    config = {"seed": seed, "out": str(path), "data": "sums", "method": method, "lr": 0.1, **config}
    (path / "config.json").write_text(json.dumps(config))
    row = lambda i, right: {"prompt": f"{i}?", "strict": right, "flexible": right, "cut_off": False, "ids": [7] * i}
    rows = {name: [row(i, bool(right)) for i, right in enumerate(given)]
            for name, given in (("base", base), (method, answers)) if given}
    metrics = {"test": {name: {**evaluation.summarise(given), "nll": 1.5} for name, given in rows.items()}}
    if nll:
        metrics["test"][method]["nll"] = float(np.divide(*np.sum(nll, 0)))
        rows[method] = [{**row, "nll": pair} for row, pair in zip(rows[method], nll, strict=True)]
    (path / "metrics.json").write_text(json.dumps(metrics))
    lines = [json.dumps({"condition": name, **row}) for name, given in rows.items() for row in given]
    (path / "predictions.jsonl").write_text("\n".join(lines))
    return str(path)


def rows_of(printed):
    return {line.split()[1]: line.split() for line in printed.splitlines()[1:]}


def test_intervals_cover_at_their_nominal_rate():
    """400 samples of 200 answers with a known mean; the tolerance is three standard errors of a share of 400."""
    rng = np.random.default_rng(1)
    found = np.array([evaluation.interval(rng.random(200) < 0.7) for _ in range(400)])
    covered = np.mean((found[:, 1] <= 0.7) & (0.7 <= found[:, 2]))
    assert abs(covered - 0.95) < 3 * (0.95 * 0.05 / 400) ** 0.5


def test_p_values_are_uniform_where_there_is_no_difference():
    rng = np.random.default_rng(2)
    p = np.array([evaluation.compare(*(rng.random((2, 200)) < 0.5))[3] for _ in range(300)])
    for level in (0.05, 0.2, 0.5):
        assert abs(np.mean(p <= level) - level) < 3 * (level * (1 - level) / 300) ** 0.5 + 0.02  # answers are discrete


def test_a_run_against_itself_differs_by_exactly_nothing(tmp_path, capsys):
    run = write_run(tmp_path / "a", 0, [1, 0, 1, 1, 0, 0, 1])
    evaluation.main([run, "--saved", "--against", run])
    assert rows_of(capsys.readouterr().out)["a"][-5:] == ["+0.0", "[", "+0.0,", "+0.0]", "1.000"]
    values = np.random.default_rng(0).random(50) < 0.5
    assert evaluation.compare(values, values) == (0.0, 0.0, 0.0, 1.0)


def test_seeds_are_joined_and_paired(tmp_path, capsys):
    """Three seeds of two methods: means, standard deviations and differences as the numbers below make them."""
    one = [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]  # 75, 50, 100 %
    two = [[1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]  # 25, 25, 50 %
    before = [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    runs = [write_run(tmp_path / f"{name}-s{s}", s, given[s], before[s], lr=lr, conditions=["base", "off"][:s])
            for name, lr, given in (("one", 0.1, one), ("two", 0.2, two)) for s in range(3)]
    evaluation.main([*runs, "--saved", "--seeds", "--against", runs[4]])  # any run of the group stands for it
    rows = rows_of(capsys.readouterr().out)
    assert list(rows) == ["base", "one", "two"]
    for name, given in (("base", before), ("one", one), ("two", two)):
        per_seed = 100 * np.mean(given, 1)
        assert rows[name][2] == "3" and float(rows[name][3]) == pytest.approx(per_seed.mean(), abs=0.05)
        sd = rows[name][rows[name].index("0.0") - 2]  # before flexible and cut off
        assert float(sd) == pytest.approx(per_seed.std(ddof=1), abs=0.05)
    difference = np.mean(np.array(one) - np.array(two), 0)  # per example, over seeds: 0, 2/3, 2/3, 1/3
    error = (np.mean(one, 1) - np.mean(two, 1)).std(ddof=1) / 3**0.5
    assert f"{100 * error:.1f}" == rows["one"][-2]
    assert "+41.7" in rows["one"] and 100 * difference.mean() == pytest.approx(41.67, abs=0.01)
    mean, low, high, p = evaluation.compare(np.mean(one, 0), np.mean(two, 0))
    assert low >= 0 and high <= 200 / 3 and f"{p:.3f}" == rows["one"][-1]


def test_what_cannot_be_compared_is_not(tmp_path, capsys):
    one = write_run(tmp_path / "one", 0, [1, 0, 1])
    other = write_run(tmp_path / "two", 0, [1, 0, 1, 1])
    elsewhere = write_run(tmp_path / "three", 0, [1, 0, 1], data="other")
    with pytest.raises(SystemExit) as stopped:
        evaluation.main([one, other, str(tmp_path / "nowhere"), elsewhere, "--saved", "--against", one])
    sentences = stopped.value.code.splitlines()
    assert len(sentences) == 1 and "nowhere" in sentences[0] and "not a finished run" in sentences[0]
    rows = rows_of(capsys.readouterr().out)  # the others are there
    assert rows["two"][-2:] == rows["three"][-2:] == ["not", "comparable"] and rows["one"][-1] == "1.000"
    with pytest.raises(SystemExit, match="should be one of the runs given, or base"):
        evaluation.main([one, "--saved", "--against", "on"])


def test_runs_of_one_name_stay_apart(tmp_path, capsys):
    runs = [write_run(tmp_path / place / "run-s0", 0, [1, 0, 1], lr=lr) for place, lr in (("a", 1), ("b", 2))]
    for flags in ([], ["--seeds"]):
        evaluation.main([*runs, "--saved", *flags])
        assert len(rows_of(capsys.readouterr().out)) == 2


# Comparisons by NLL

def numbers(line):
    return [float(word.strip("[],")) for word in line.split()[2:] if word != "["]


def test_nll_is_compared_over_tokens_by_hand(tmp_path, capsys):
    """Two seeds of two methods, responses of unlike length; the last example's prompt left no room for any."""
    rng = np.random.default_rng(3)
    tokens = np.array([*rng.integers(1, 30, 40), 0])
    nats = {name: (rng.random((2, 41)) + level) * tokens for name, level in (("one", 0.5), ("two", 0.7))}
    runs = [write_run(tmp_path / f"{name}-s{s}", s, [1, 0] * 20 + [1], method="sft", lr=lr,
                      nll=list(zip(nats[name][s].tolist(), tokens.tolist())))
            for name, lr in (("one", 0.1), ("two", 0.2)) for s in range(2)]
    evaluation.main([*runs, "--saved", "--seeds", "--against", runs[3], "--by", "nll"])
    head, *lines = capsys.readouterr().out.splitlines()
    assert "strict" not in head and [line.split()[1] for line in lines] == ["one", "two"]
    drawn = np.random.default_rng(9).integers(0, 40, (4000, 40))  # resamples of the examples that have a response
    for name, line in zip(nats, lines):
        seeds, center, low, high, sd, difference, below, above, error, p = numbers(line)
        per_seed = nats[name].sum(1) / tokens.sum()
        assert seeds == 2 and center == pytest.approx(per_seed.mean(), abs=6e-5)
        assert sd == pytest.approx(abs(per_seed[0] - per_seed[1]) / 2**0.5, abs=6e-5)
        mean = nats[name].mean(0)
        means = mean[drawn].sum(1) / tokens[drawn].sum(1)
        assert (low, high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.01) and low < center < high
    seeds, center, low, high, sd, difference, below, above, error, p = numbers(lines[0])
    gap = nats["one"] - nats["two"]
    assert difference == pytest.approx(gap.mean(0).sum() / tokens.sum(), abs=6e-5) and difference < -0.05
    assert difference != pytest.approx(np.mean(gap[:, :40] / tokens[:40]), abs=6e-5)  # not a mean over examples
    means = gap.mean(0)[drawn].sum(1) / tokens[drawn].sum(1)
    assert (below, above) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.01)
    gaps = gap.sum(1) / tokens.sum()
    assert error == pytest.approx(abs(gaps[0] - gaps[1]) / 2, abs=6e-5)  # sd of two over the root of two
    assert p == pytest.approx(2 * min(np.mean(means <= 0), np.mean(means >= 0)), abs=0.01)
    assert numbers(lines[1])[-5:] == [0, 0, 0, 0, 1]
    evaluation.main([*runs, "--saved", "--seeds", "--against", runs[3]])  # they have answers, which come first
    assert "strict" in capsys.readouterr().out


def test_other_tokens_are_not_comparable(tmp_path, capsys):
    one = write_run(tmp_path / "one", 0, [1, 0, 1], nll=[(1.0, 2), (2.0, 2), (3.0, 4)])
    other = write_run(tmp_path / "two", 0, [1, 0, 1], nll=[(1.0, 2), (2.0, 2), (3.0, 3)])
    evaluation.main([one, other, "--saved", "--by", "nll", "--against", one])
    rows = rows_of(capsys.readouterr().out)
    assert rows["two"][-2:] == ["not", "comparable"] and rows["one"][-1] == "1.000"
    evaluation.main([one, other, "--saved", "--against", one])
    assert rows_of(capsys.readouterr().out)["two"][-1] == "1.000"


def test_runs_that_lack_what_is_compared_are_named(tmp_path, capsys):
    old = write_run(tmp_path / "old", 0, [1, 0, 1], base=[0, 0, 1])
    new = write_run(tmp_path / "new", 0, [1, 1, 1], base=[0, 0, 1], nll=[(1.0, 2), (2.0, 2), (3.0, 3)], lr=0.2)
    evaluation.main([old, new, "--saved", "--against", "base"])
    assert list(rows_of(capsys.readouterr().out)) == ["base", "old", "new"]
    with pytest.raises(SystemExit) as stopped:
        evaluation.main([old, new, "--saved", "--against", "base", "--by", "nll"])
    said = stopped.value.code
    assert "\n" not in said and f"{old} is left out" in said and "evaluate it anew" in said
    rows = rows_of(capsys.readouterr().out)  # nor does the base hold it
    assert list(rows) == ["new"] and rows["new"][-2:] == ["not", "comparable"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A local model folder (an untaught GPT-2 that reads sums), and beside it texts of many lengths."""
    path = tmp_path_factory.mktemp("models") / "little"
    tokenizer = data.arithmetic_tokenizer()
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_layer=2, n_embd=16, n_head=2, n_positions=64,
                               bos_token_id=None, eos_token_id=tokenizer.eos_token_id)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    rows = [{"prompt": "1+" * (i % 13) + f"{i}=", "response": "2+3=5" * (i % 3) + f" #### {i % 7}"} for i in range(120)]
    (path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


MAX_LENGTH = 24  # some of the texts are cut there, and some prompts leave no room


def by_hand(model, tokenizer, prompt, response, codes=None):
    """Nats and tokens of one response, alone, with codes (M,) or none."""
    ids = tokenizer(prompt).input_ids
    start, ids = len(ids), (ids + tokenizer(response).input_ids + [tokenizer.eos_token_id])[:MAX_LENGTH]
    if len(ids) <= start:
        return 0, 0
    codes = torch.full((1, -(-len(ids) // model.chunk_size)), -1) if codes is None else codes[None]
    with torch.no_grad():
        log_p = model(torch.tensor([ids]), codes=codes).log_softmax(-1)[0]
    return -sum(log_p[t - 1, ids[t]].item() for t in range(start, len(ids))), len(ids) - start


def test_every_prediction_holds_the_nll_of_its_response(folder):
    tokenizer = data.arithmetic_tokenizer()
    torch.manual_seed(1)
    model = DLRModel(GPT2LMHeadModel.from_pretrained(folder), num_codes=4, chunk_size=3, layer=0, scale=5.0).eval()
    torch.nn.init.normal_(model.codebook)
    torch.nn.init.normal_(model.router.weight)
    examples = data.load(str(folder / "mine.jsonl"), val=1)["test"]
    lengths = [(len(tokenizer(e.prompt).input_ids), len(tokenizer(e.response).input_ids) + 1) for e in examples]
    kept = [i for i, (prompt, _) in enumerate(lengths) if prompt < MAX_LENGTH]
    assert 3 < len(kept) < len(examples) and kept != list(range(len(kept)))  # some are left out, not just the last
    assert any(sum(lengths[i]) > MAX_LENGTH for i in kept) and len({lengths[i][1] for i in kept}) > 1
    whole = {i: (tokenizer(examples[i].prompt + examples[i].response).input_ids + [1])[:MAX_LENGTH] for i in kept}
    codes = {i: model.route(torch.tensor([ids])).argmax(-1)[0] for i, ids in whole.items()}
    others = {i: row.clone() for i, row in codes.items()}
    for m in range(max(map(len, codes.values()))):
        here = [i for i in kept if m < -(-(len(whole[i]) - 1) // 3)]  # the texts that have such a chunk
        for i, before in zip(here, here[-1:] + here[:-1]):
            others[i][m] = codes[before][m]
    assert any(not torch.equal(codes[i], others[i]) for i in kept)
    given = {"steered": codes, "off": {}, "other": others}
    for new in (0, 4):
        metrics, predictions = evaluation.evaluate(model, tokenizer, examples, ["steered", "off", "random", "other"],
                                                   max_length=MAX_LENGTH, max_new_tokens=new, batch_size=5)
        for name, rows in given.items():
            found = [row["nll"] for row in predictions[name]]
            hand = [by_hand(model, tokenizer, e.prompt, e.response, rows.get(i)) for i, e in enumerate(examples)]
            assert np.array(found) == pytest.approx(np.array(hand), rel=1e-4), name
            assert metrics[name]["nll"] == pytest.approx(np.divide(*np.sum(hand, 0)), rel=1e-4)
        assert len({round(row["nll"], 4) for row in metrics.values()}) == 4  # no condition is like another
        for name, row in metrics.items():
            nats, tokens = np.sum([one["nll"] for one in predictions[name]], 0)
            assert row["nll"] == pytest.approx(nats / tokens) and ("strict" in row) == (new > 0)
            assert all([one["prompt"], one["answer"]] == [e.prompt, e.answer] and ("ids" in one) == (new > 0)
                       for one, e in zip(predictions[name], examples, strict=True))


def train_run(folder, out, *flags):
    train.main(["--model", str(folder), "--data", str(folder / "mine.jsonl"), "--n", "32", "--val", "4", "--codes", "4",
                "--rollouts", "2", "--scale", "1", "--lr", "1e-2", "--code-lr", "1e-2", "--device", "cpu",
                "--max-length", str(MAX_LENGTH), "--out", str(out), *flags])
    return str(out)


def test_runs_without_answers_from_training_to_comparison(folder, tmp_path, capsys):
    runs = [train_run(folder, tmp_path / f"{method}-s{s}", "--method", method, "--seed", str(s),
                      "--max-new-tokens", "0") for method in ("dlr", "sft") for s in range(2)]
    printed = capsys.readouterr().out
    metrics = json.loads(Path(runs[0], "metrics.json").read_text())
    assert list(metrics["test"]) == ["base", "steered", "off", "random", "other"] and metrics["validation"]["nll"] > 0
    for name, row in metrics["test"].items():
        assert set(row) == {"n", "nll"} and row["n"] == 12
        assert f"\n{name} - - - - {row['nll']:.4f}\n" in "\n".join(" ".join(l.split()) for l in printed.splitlines())
    lines = [json.loads(line) for line in Path(runs[0], "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 5 * 12 and all(set(line) == {"condition", "prompt", "answer", "nll"} for line in lines)

    tables = []
    for flags in (["--by", "nll"], []):  # there is nothing else to compare
        evaluation.main([*runs, "--saved", "--seeds", *flags, "--against", runs[2]])
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
    rows = {line.split()[1]: numbers(line) for line in tables[0].splitlines()[1:]}
    assert list(rows) == ["base", "dlr", "sft"]
    nll = {name: np.mean([json.loads(Path(run, "metrics.json").read_text())["test"][key]["nll"] for run in pair])
           for name, key, pair in (("base", "base", runs[:2]), ("dlr", "steered", runs[:2]), ("sft", "sft", runs[2:]))}
    for name, (_, center, low, high, _, difference, *_) in rows.items():
        assert center == pytest.approx(nll[name], abs=6e-5) and low < center < high
        assert difference == pytest.approx(nll[name] - nll["sft"], abs=6e-5)
    assert rows["base"][5] > 0.1  # training helps, so the comparison is not of nothing

    with pytest.raises(SystemExit) as stopped:
        evaluation.main([runs[0], "--saved", "--by", "strict"])
    assert "\n" not in stopped.value.code and "holds no answers; give --by nll" in stopped.value.code
    with pytest.raises(SystemExit) as stopped:
        analyze.main([runs[0], "--device", "cpu", "--interventions"])
    assert "\n" not in stopped.value.code and "without answers" in stopped.value.code
    with pytest.raises(SystemExit, match="--max-new-tokens is -1; it must not be negative"):
        train_run(folder, tmp_path / "none", "--max-new-tokens", "-1")


def test_an_old_run_gets_its_nll_and_keeps_its_answers(folder, tmp_path, capsys):
    run = train_run(folder, tmp_path / "run", "--max-new-tokens", "5")
    path, metrics = Path(run, "predictions.jsonl"), Path(run, "metrics.json").read_text()
    old = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "nll"}) + "\n" for row in old))
    with pytest.raises(SystemExit, match="evaluate it anew"):
        evaluation.main([run, "--saved", "--by", "nll"])
    evaluation.main([run, "--device", "cpu", "--max-new-tokens", "0"])
    assert "- " not in capsys.readouterr().out.splitlines()[-2]  # the answers are in the table, too
    key = lambda row: (row["condition"], row["prompt"])
    rows = {key(row): row for row in map(json.loads, path.read_text().splitlines())}
    assert len(rows) == len(old) == 5 * 12
    for row in old:
        found = rows[key(row)]
        assert found == (row if row["condition"] != "base" else {k: v for k, v in row.items() if k != "nll"})
    assert json.loads(Path(run, "metrics.json").read_text()) == json.loads(metrics)
    evaluation.main([run, "--saved", "--by", "nll"])
    assert list(rows_of(capsys.readouterr().out)) == ["run"]
    evaluation.main([run, "--device", "cpu", "--max-new-tokens", "0", "--test", "5"])  # another test set
    row = json.loads(Path(run, "metrics.json").read_text())["test"]["steered"]
    assert set(row) == {"n", "nll"} and row["n"] == 5


def test_what_is_evaluated_can_be_chosen(folder, tmp_path, capsys):
    """Each condition comes out as it does among all of them; the model as trained is always there."""
    scores = lambda run: json.loads(Path(run, "metrics.json").read_text())["test"]
    whole = scores(train_run(folder, tmp_path / "whole", "--max-new-tokens", "5"))
    few = train_run(folder, tmp_path / "few", "--max-new-tokens", "5", "--conditions", "other", "base")
    assert scores(few) == {name: whole[name] for name in ("base", "steered", "other")}
    capsys.readouterr()
    evaluation.main([few, "--device", "cpu", "--conditions", "off"])
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:] if line]
    assert shown == ["steered", "off"] and scores(few) == {name: whole[name] for name in scores(few)}
    assert set(scores(few)) == {"base", "steered", "off", "other"}

    frozen = train_run(folder, tmp_path / "frozen", "--max-new-tokens", "0", "--freeze", "--conditions", "base")
    assert list(scores(frozen)) == ["base", "steered"] and scores(frozen)["base"]["nll"] == whole["base"]["nll"]
    sft = train_run(folder, tmp_path / "sft", "--max-new-tokens", "0", "--method", "sft", "--conditions", "steered")
    assert list(scores(sft)) == ["sft"]
    with pytest.raises(SystemExit, match="invalid choice: 'of'"):
        train_run(folder, tmp_path / "none", "--conditions", "of")
