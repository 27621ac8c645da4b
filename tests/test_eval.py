"""eval.py: intervals and p values against simulations; answers and likelihoods against single ones."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_compare import numbers, rows_of
from transformers import GPT2Config, GPT2LMHeadModel

import analyze
import compare
import data
import eval as evaluation
import train
from dlr import DLRModel


def test_intervals_cover_at_their_nominal_rate():
    """400 samples of 200 answers with a known mean; the tolerance is three standard errors of a share of 400."""
    samples = np.random.default_rng(1).random((400, 200)) < 0.7
    found = np.array([evaluation.interval(sample) for sample in samples])
    covered = np.mean((found[:, 1] <= 0.7) & (0.7 <= found[:, 2]))
    assert abs(covered - 0.95) < 3 * (0.95 * 0.05 / 400) ** 0.5
    assert np.allclose(found[:, 0], samples.mean(1)) and evaluation.interval([True] * 9) == (1.0, 1.0, 1.0)


def test_auto_takes_the_best_device_there_is(monkeypatch):
    for cuda, mps, name in ((True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        assert evaluation.choose_device().type == name
    assert evaluation.choose_device("cpu").type == "cpu"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A local model folder (an untaught GPT-2 that reads sums), and beside it texts of many lengths."""
    path = tmp_path_factory.mktemp("models") / "little"
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_layer=2, n_embd=16, n_head=2, n_positions=64,
                               bos_token_id=None, eos_token_id=tokenizer.eos_token_id)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    rows = [{"prompt": "1+" * (i % 13) + f"{i}=", "response": "2+3=5" * (i % 3) + f" #### {i % 7}"} for i in range(120)]
    (path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def model(folder):
    """That LM with random codes, four for chunks of three tokens, which push hard."""
    lm = GPT2LMHeadModel.from_pretrained(folder)
    torch.manual_seed(2)
    model = DLRModel(lm, num_codes=4, chunk_size=3, layer=0, scale=5.0).eval()
    lm.transformer.wte.weight.data[lm.config.eos_token_id] *= -2  # some answers end
    torch.nn.init.normal_(model.codebook)
    torch.nn.init.normal_(model.router.weight)
    return model


def continued(model, tokenizer, ids, new):
    """The greedy answer to one prompt (token ids), without a cache, up to its end."""
    said = []
    while len(said) < new:
        said.append(model(torch.tensor([ids + said])).logits[0, -1].argmax().item())
        if said[-1] == tokenizer.eos_token_id:
            return said[:-1]
    return said


@pytest.mark.parametrize("use", [None, "off"])
def test_answers_are_greedy_whatever_the_lm_brings_along(model, tokenizer, use):
    """Many LMs come with settings that sample. In padded batches, too, an answer is the likeliest token, each time."""
    model.lm.generation_config.update(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=5.0, num_beams=2)
    examples = data.arithmetic(4, digits=2) + data.arithmetic(5, digits=6)
    predictions, codes = evaluation.answer(model, tokenizer, examples, use, max_new_tokens=9, batch_size=4)
    for example, found, row in zip(examples, predictions, codes, strict=True):
        prompt = tokenizer(example.prompt).input_ids
        with model.intervene(use):
            said = continued(model, tokenizer, prompt, 9)
        assert found["ids"] == said and found["cut_off"] == (len(said) == 9)
        chosen = model.route(model.trunk(torch.tensor([prompt + said]))).argmax(-1)[0]
        assert torch.equal(row[row >= 0], chosen[:0] if use else chosen)
    assert len({found["cut_off"] for found in predictions}) == 2


def test_a_long_prompt_keeps_its_end(model, tokenizer):
    """The LM has 64 positions. A prompt of more than half of them loses its beginning; the question is at its end."""
    examples = data.arithmetic(2, digits=3) + data.arithmetic(1, digits=12) + data.arithmetic(1, digits=30)
    whole = [tokenizer(example.prompt).input_ids for example in examples]
    assert list(map(len, whole)) == [8, 8, 26, 62]
    model.lm.transformer.wte.weight.data[tokenizer.eos_token_id] = 0  # no answer ends before its limit
    for some, read, room in ((slice(3), whole[:3], 38), (slice(4), whole[:3] + [whole[3][-32:]], 32)):
        predictions, _ = evaluation.answer(model, tokenizer, examples[some], max_new_tokens=60, batch_size=2)
        assert [row["ids"] for row in predictions] == [continued(model, tokenizer, ids, room) for ids in read]
    predictions, _ = evaluation.answer(model, tokenizer, examples, max_new_tokens=9, batch_size=2)
    assert predictions[3]["ids"] == continued(model, tokenizer, whole[3][-55:], 9)  # short answers leave more


def test_another_examples_codes_really_steer(model, tokenizer):
    codes = torch.tensor([[1, 2, 3], [4, 5, -1], [6, -1, -1]])
    assert evaluation.others_codes(codes).tolist() == [[6, 5, -1], [1, 2, -1], [4, -1, -1]]
    _, codes = evaluation.answer(model, tokenizer, data.arithmetic(6), max_new_tokens=6, batch_size=3)
    others = evaluation.others_codes(codes)
    _, used = evaluation.answer(model, tokenizer, data.arithmetic(6), others, max_new_tokens=6, batch_size=4)
    width = min(used.shape[1], others.shape[1])
    decided = (others[:, :width] >= 0) & (used[:, :width] >= 0)
    assert decided.sum() > 12 and torch.equal(used[:, :width][decided], others[:, :width][decided])


MAX_LENGTH = 24  # some of the texts are cut there, and some prompts leave no room


def by_hand(model, tokenizer, prompt, response, codes=None):
    """Nats and tokens of one response, alone, with codes (M,) or none."""
    ids = tokenizer(prompt).input_ids
    start, ids = len(ids), (ids + tokenizer(response).input_ids + [tokenizer.eos_token_id])[:MAX_LENGTH]
    if len(ids) <= start:
        return 0, 0
    codes = torch.full((1, -(-len(ids) // model.settings.chunk_size)), -1) if codes is None else codes[None]
    with torch.no_grad():
        log_p = model(torch.tensor([ids]), codes=codes).logits.log_softmax(-1)[0]
    return -sum(log_p[t - 1, ids[t]].item() for t in range(start, len(ids))), len(ids) - start


def test_every_prediction_holds_the_nll_of_its_response(folder, model, tokenizer):
    examples = data.load(str(folder / "mine.jsonl"), val=1)["test"]
    lengths = [(len(tokenizer(e.prompt).input_ids), len(tokenizer(e.response).input_ids) + 1) for e in examples]
    kept = [i for i, (prompt, _) in enumerate(lengths) if prompt < MAX_LENGTH]
    assert 3 < len(kept) < len(examples) and kept != list(range(len(kept)))  # some are left out, not just the last
    assert any(sum(lengths[i]) > MAX_LENGTH for i in kept) and len({lengths[i][1] for i in kept}) > 1
    whole = {i: (tokenizer(examples[i].prompt + examples[i].response).input_ids + [1])[:MAX_LENGTH] for i in kept}
    codes = {i: model.route(model.trunk(torch.tensor([ids]))).argmax(-1)[0] for i, ids in whole.items()}
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
        compare.main([*runs, "--seeds", *flags, "--against", runs[2]])
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
        compare.main([runs[0], "--by", "strict"])
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
        compare.main([run, "--by", "nll"])
    evaluation.main([run, "--device", "cpu", "--max-new-tokens", "0"])
    assert "- " not in capsys.readouterr().out.splitlines()[-2]  # the answers are in the table, too
    key = lambda row: (row["condition"], row["prompt"])
    rows = {key(row): row for row in map(json.loads, path.read_text().splitlines())}
    assert len(rows) == len(old) == 5 * 12
    for row in old:
        found = rows[key(row)]
        assert found == (row if row["condition"] != "base" else {k: v for k, v in row.items() if k != "nll"})
    assert json.loads(Path(run, "metrics.json").read_text()) == json.loads(metrics)
    compare.main([run, "--by", "nll"])
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
    evaluation.main([few, "--device", "cpu", "--test", "5", "--conditions", "off"])
    assert f"{few}: 5 test examples" in capsys.readouterr().out
    compare.main([few, "--against", "base", "--by", "nll"])  # the LM before is not here any more: it answered 12
    base, row = capsys.readouterr().out.splitlines()[1:]
    assert "questions" not in base and row.endswith("asked 5 of 12 questions")
    lines = [json.loads(line) for line in Path(few, "predictions.jsonl").read_text().splitlines()]
    nats = {(line["condition"], line["prompt"]): line["nll"] for line in lines}
    both = [(*nats[name, prompt], nats["base", prompt][0]) for name, prompt in nats if name == "steered"]
    nats, tokens, before = np.sum(both, 0)
    found = numbers(row.partition("  asked")[0])[4]
    assert len(both) == 5 and found == pytest.approx((nats - before) / tokens, abs=6e-5)

    frozen = train_run(folder, tmp_path / "frozen", "--max-new-tokens", "0", "--freeze", "--conditions", "base")
    assert list(scores(frozen)) == ["base", "steered"] and scores(frozen)["base"]["nll"] == whole["base"]["nll"]
    sft = train_run(folder, tmp_path / "sft", "--max-new-tokens", "0", "--method", "sft", "--conditions", "steered")
    assert list(scores(sft)) == ["sft"]
    with pytest.raises(SystemExit, match="invalid choice: 'of'"):
        train_run(folder, tmp_path / "none", "--conditions", "of")


def test_a_run_of_the_last_version_answers_as_it_did(folder, tmp_path, capsys):
    """Its config has other flags, its model fewer settings and more tensors. What is gone for good is said."""
    run = Path(train_run(folder, tmp_path / "run", "--max-new-tokens", "5"))
    metrics, codes = json.loads((run / "metrics.json").read_text()), load_file(run / "model" / "dlr.safetensors")
    config = json.loads((run / "config.json").read_text())
    for name in ("generalist", "num_codes", "chunk_size"):
        config.pop(name)
    config |= {"codes": 4, "chunk": 4, "objective": "full", "pauses": 10, "rollout_batch": 0, "processes": 1}
    (run / "config.json").write_text(json.dumps(config))
    save_file({**codes, "center": torch.zeros(16)}, run / "model" / "dlr.safetensors")
    for norm in ("none", "centred"):
        settings = {"num_codes": 4, "chunk_size": 4, "layer": 1, "scale": 1.0, "router_norm": norm}
        (run / "model" / "dlr_config.json").write_text(json.dumps(settings))
        (run / "metrics.json").write_text(json.dumps({"test": {"base": metrics["test"]["base"]}}))
        if norm == "none":
            evaluation.main([str(run), "--device", "cpu"])
            assert json.loads((run / "metrics.json").read_text())["test"] == metrics["test"]
    with pytest.raises(SystemExit, match="left out: router_norm is 'centred'; it should be one of none, rms"):
        evaluation.main([str(run), "--device", "cpu"])
    capsys.readouterr()
    compare.main([str(run), "--against", "base"])  # its answers can be compared all the same
    assert list(rows_of(capsys.readouterr().out)) == ["base", "run"]
