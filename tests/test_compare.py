"""compare.py: comparisons of runs against sums done by hand."""
import json
from pathlib import Path

import numpy as np
import pytest

import compare
import eval as evaluation


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


def test_p_values_are_uniform_where_there_is_no_difference():
    rng = np.random.default_rng(2)
    p = np.array([compare.difference(*(rng.random((2, 200)) < 0.5))[3] for _ in range(300)])
    for level in (0.05, 0.2, 0.5):
        assert abs(np.mean(p <= level) - level) < 3 * (level * (1 - level) / 300) ** 0.5 + 0.02  # answers are discrete
    worse = rng.random(400) < 0.3
    better = worse | (rng.random(400) < 0.2)
    mean, low, high, p = compare.difference(better, worse)
    assert 0 < low < mean < high and mean == pytest.approx(better.mean() - worse.mean()) and p < 0.001


def test_a_run_against_itself_differs_by_exactly_nothing(tmp_path, capsys):
    run = write_run(tmp_path / "a", 0, [1, 0, 1, 1, 0, 0, 1])
    compare.main([run, "--against", run])
    assert rows_of(capsys.readouterr().out)["a"][-5:] == ["+0.0", "[", "+0.0,", "+0.0]", "1.000"]
    values = np.random.default_rng(0).random(50) < 0.5
    assert compare.difference(values, values) == (0.0, 0.0, 0.0, 1.0)


def test_seeds_are_joined_and_paired(tmp_path, capsys):
    """Three seeds of two methods: means, standard deviations and differences as the numbers below make them."""
    one = [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]  # 75, 50, 100 %
    two = [[1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]  # 25, 25, 50 %
    before = [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    runs = [write_run(tmp_path / f"{name}-s{s}", s, given[s], before[s], lr=lr, conditions=["base", "off"][:s])
            for name, lr, given in (("one", 0.1, one), ("two", 0.2, two)) for s in range(3)]
    compare.main([*runs, "--seeds", "--against", runs[4]])  # any run of the group stands for it
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
    mean, low, high, p = compare.difference(np.mean(one, 0), np.mean(two, 0))
    assert low >= 0 and high <= 200 / 3 and f"{p:.3f}" == rows["one"][-1]


def test_what_cannot_be_compared_is_not(tmp_path, capsys):
    one = write_run(tmp_path / "one", 0, [1, 0, 1])
    other = write_run(tmp_path / "two", 0, [1, 0, 1, 1])
    elsewhere = write_run(tmp_path / "three", 0, [1, 0, 1], data="other")
    with pytest.raises(SystemExit) as stopped:
        compare.main([one, other, str(tmp_path / "nowhere"), elsewhere, "--against", one])
    sentences = stopped.value.code.splitlines()
    assert len(sentences) == 1 and "nowhere" in sentences[0] and "not a finished run" in sentences[0]
    rows = rows_of(capsys.readouterr().out)  # the others are there
    assert rows["three"][-2:] == ["not", "comparable"]
    assert rows["one"][-6:] == ["1.000", "asked", "3", "of", "4", "questions"]
    assert rows["two"][-5:] == ["1.000", "compared", "on", "3", "questions"]  # what both were asked is the same
    with pytest.raises(SystemExit, match="should be one of the runs given, or base"):
        compare.main([one, "--against", "on"])


def test_runs_of_one_name_stay_apart(tmp_path, capsys):
    runs = [write_run(tmp_path / place / "run-s0", 0, [1, 0, 1], lr=lr) for place, lr in (("a", 1), ("b", 2))]
    for flags in ([], ["--seeds"]):
        compare.main([*runs, *flags])
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
    compare.main([*runs, "--seeds", "--against", runs[3], "--by", "nll"])
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
    compare.main([*runs, "--seeds", "--against", runs[3]])  # they have answers, which come first
    assert "strict" in capsys.readouterr().out


def test_other_tokens_are_not_comparable(tmp_path, capsys):
    one = write_run(tmp_path / "one", 0, [1, 0, 1], nll=[(1.0, 2), (2.0, 2), (3.0, 4)])
    other = write_run(tmp_path / "two", 0, [1, 0, 1], nll=[(1.0, 2), (2.0, 2), (3.0, 3)])
    compare.main([one, other, "--by", "nll", "--against", one])
    rows = rows_of(capsys.readouterr().out)
    assert rows["two"][-2:] == ["not", "comparable"] and rows["one"][-1] == "1.000"
    compare.main([one, other, "--against", one])
    assert rows_of(capsys.readouterr().out)["two"][-1] == "1.000"


def test_runs_that_lack_what_is_compared_are_named(tmp_path, capsys):
    old = write_run(tmp_path / "old", 0, [1, 0, 1], base=[0, 0, 1])
    new = write_run(tmp_path / "new", 0, [1, 1, 1], base=[0, 0, 1], nll=[(1.0, 2), (2.0, 2), (3.0, 3)], lr=0.2)
    compare.main([old, new, "--against", "base"])
    assert list(rows_of(capsys.readouterr().out)) == ["base", "old", "new"]
    with pytest.raises(SystemExit) as stopped:
        compare.main([old, new, "--against", "base", "--by", "nll"])
    said = stopped.value.code
    assert "\n" not in said and f"{old} is left out" in said and "evaluate it anew" in said
    rows = rows_of(capsys.readouterr().out)  # nor does the base hold it
    assert list(rows) == ["new"] and rows["new"][-2:] == ["not", "comparable"]


def rewrite(run, keep):
    """Put what `keep` makes of a run's answers (condition, prompt, ...) in their place."""
    path = Path(run, "predictions.jsonl")
    path.write_text("\n".join(map(json.dumps, keep([json.loads(line) for line in path.read_text().splitlines()]))))


def test_only_the_same_questions_are_paired(tmp_path, capsys):
    """A run evaluated on fewer, and other, questions than its base: by question, whatever their order."""
    run = write_run(tmp_path / "a", 0, [1, 1, 0, 1], base=[0, 1, 1, 0])
    new = {"condition": "sft", "prompt": "9?", "strict": False, "flexible": False, "cut_off": False, "ids": []}
    rewrite(run, lambda rows: [new, *(row for row in rows[::-1] if row["condition"] == "base" or row["prompt"] in
                                      ("3?", "0?"))])
    for flags in ([], ["--against", "base"], ["--against", run]):
        compare.main([run, *flags])
        base, row = capsys.readouterr().out.splitlines()[1:]
        assert "50.0 [" in base and "66.7 [" in row  # right on 2 of 4; on 2 of 3
        assert base.endswith("asked 4 of 5 questions") and row.endswith("asked 3 of 5 questions")
        if flags:  # questions 0 and 3: right twice, the base on neither
            assert ("+100.0 [" in row, "-100.0 [" in base) == (flags[1] == "base", flags[1] == run)
            assert "compared on 2 questions" in (row if flags[1] == "base" else base)
    other = write_run(tmp_path / "b", 0, [1], lr=1)
    rewrite(other, lambda rows: [{**rows[0], "prompt": "nothing alike"}])
    compare.main([other, run, "--against", run])
    assert "not comparable" in capsys.readouterr().out.splitlines()[2]  # behind the head and the base


def test_seeds_are_joined_on_the_questions_that_all_were_asked(tmp_path, capsys):
    runs = [write_run(tmp_path / f"a-s{s}", s, [1, 1, 0, 0]) for s in range(2)]
    rewrite(runs[1], lambda rows: rows[::-1])  # the same in another order
    compare.main([*runs, "--seeds"])
    (line,) = capsys.readouterr().out.splitlines()[1:]
    assert line.split()[2:6] == ["2", "50.0", "[", "0.0,"] and "questions" not in line
    rewrite(runs[1], lambda rows: [rows[1], rows[3]])
    compare.main([*runs, "--seeds", "--against", runs[0]])
    (line,) = capsys.readouterr().out.splitlines()[1:]
    assert line.split()[2:4] == ["2", "50.0"] and line.endswith("asked 2 of 4 questions") and "+0.0 [" in line
    rewrite(runs[1], lambda rows: [{**row, "prompt": "another"} for row in rows])
    compare.main([*runs, "--seeds", "--against", runs[0]])
    (line,) = capsys.readouterr().out.splitlines()[1:]
    assert line.endswith("not comparable: its seeds share no question")


def with_validation(run, nll):
    path = Path(run, "metrics.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "validation": {"nll": nll}}))
    return run


def test_the_best_of_is_chosen_by_validation_alone(tmp_path, capsys):
    """Against a naive choice over label and seed; the test answers are the opposite of the validation NLL."""
    rng, runs, table = np.random.default_rng(0), [], {}
    for method in ("sft", "lora"):
        for seed in range(2):
            for lr in (1e-4, 1e-3, 1e-2):
                nll = float(rng.random())
                answers = [int(i / 20 < nll) for i in range(20)]  # the worse in validation, the more are right
                run = write_run(tmp_path / f"{method}-{lr}-s{seed}", seed, answers, method=method, lr=lr)
                runs.append(with_validation(run, nll))
                table[method, seed, lr] = nll
    compare.main(["--best-of", "lr", "--seeds", "--against", runs[1], *runs])
    lines, rows = capsys.readouterr().out.split("\n\n")
    for (method, seed), line in zip([(m, s) for m in ("sft", "lora") for s in range(2)], lines.splitlines()):
        lr = min((1e-4, 1e-3, 1e-2), key=lambda lr: table[method, seed, lr])
        assert line.startswith(f"{tmp_path}/{method}-{lr}-s{seed}: lr {lr} of 0.0001 0.001 0.01")
        assert ("AT THE EDGE" in line) == (lr != 1e-3)
    rows = rows_of(rows)
    assert len(rows) == 2 and all(row[2] == "2" for row in rows.values())  # a row a label, of two seeds each
    strict = [np.mean([int(i / 20 < min(table["sft", seed, lr] for lr in (1e-4, 1e-3, 1e-2))) for i in range(20)])
              for seed in range(2)]
    assert float(list(rows.values())[0][3]) == pytest.approx(100 * np.mean(strict), abs=0.06)
    assert "+0.0" in list(rows.values())[0]  # the run that was named in --against is not kept, but its label is
    for flags, said in ((["--best-of", "dropout"], "no two of the runs"), (["--best-of", "lr", "x"], "x: no two")):
        with pytest.raises(SystemExit, match=said):
            compare.main([*runs, *flags])
    bare = write_run(tmp_path / "bare-s0", 0, [1], lr=5)
    with pytest.raises(SystemExit, match="has no validation NLL"):
        compare.main([*runs, bare, "--best-of", "lr"])
