"""eval.py: intervals and p values against simulations, comparisons of runs against sums done by hand."""
import json

import numpy as np
import pytest

import eval as evaluation


def write_run(path, seed, answers, base=None, method="sft", **config):
    """A finished run whose test answers are right (1) or wrong (0) as given."""
    path.mkdir(parents=True)
    (path / "model").mkdir()
    config = {"seed": seed, "out": str(path), "data": "sums", "method": method, "lr": 0.1, **config}
    (path / "config.json").write_text(json.dumps(config))
    row = lambda i, right: {"prompt": f"{i}?", "strict": right, "flexible": right, "cut_off": False, "ids": [7] * i}
    rows = {name: [row(i, bool(right)) for i, right in enumerate(given)]
            for name, given in (("base", base), (method, answers)) if given}
    metrics = {"test": {name: {**evaluation.summarise(given), "nll": 1.5} for name, given in rows.items()}}
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
    runs = [write_run(tmp_path / f"{name}-s{s}", s, given[s], before[s], lr=lr)
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
