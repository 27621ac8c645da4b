"""train.py through its command line, on tiny models and sums; and its pieces against other ways."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, modeling_utils

import baselines
import compare
import data
import eval as evaluation
import search
import train
from dlr import DLRModel

ROOT = Path(__file__).resolve().parent.parent
SUMS = ["--recipe", "paper", "--data", "arithmetic", "--n", "96", "--val", "8", "--test", "12", "--batch-size", "8",
        "--codes", "4", "--rollouts", "3", "--scale", "1", "--lr", "1e-3", "--code-lr", "1e-2", "--device", "cpu"]


def call(main, *args):
    """main(argv) in this process -> the message it exits with."""
    with pytest.raises(SystemExit) as stopped:
        main([str(arg) for arg in args])
    assert isinstance(stopped.value.code, str) and len(stopped.value.code.splitlines()) == 1, stopped.value.code
    return stopped.value.code


def command(*args, script="train.py"):
    return [sys.executable, str(ROOT / script), *map(str, args)]


def run(*args, cwd, script="train.py", env=None):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(command(*args, script=script), cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def often_saving(folder):
    """A script that is train.py but saves its state every three steps."""
    path = folder / "often.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                    f"import train\ntrain.SAVE_EVERY = 3\ntrain.main()\n")
    return str(path)


def log_of(out):
    lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_s"} for line in lines]


def test_a_run_from_command_to_checkpoint_and_back(folder, tmp_path, monkeypatch):
    done = run("--model", folder, *SUMS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr  # no terminal: little is said, and without bars or colours
    assert "\r" not in said and "\x1b" not in said and len(said.splitlines()) < 25
    out = tmp_path / "runs" / "little-arithmetic-dlr-s0"
    assert {path.name for path in out.iterdir()} == {"config.json", "log.jsonl", "metrics.json", "predictions.jsonl",
                                                     "model"}
    log = log_of(out)
    assert [line["step"] for line in log] == list(range(12))
    for line in log:
        assert line["best_nll"] <= line["mean_nll"] and 0 < line["codes_used"] <= 1
        weighted = line["generalist"] + line["steered"] + 0.5 * line["policy"] + 0.1 * line["prior"]
        assert line["loss"] == pytest.approx(weighted, rel=1e-4)
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics["test"]) == ["base", "steered", "off", "random", "other"]
    for name in metrics["test"]:
        assert f"\n{name} " in done.stdout
    config = json.loads((out / "config.json").read_text())
    lm = AutoModelForCausalLM.from_pretrained(folder)
    assert config["trained_parameters"] == sum(p.numel() for p in lm.parameters()) + 2 * 4 * 32

    before = (out / "predictions.jsonl").read_text(), (out / "metrics.json").read_text()
    again = run(out, "--device", "cpu", script="eval.py", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    parse = lambda text: sorted(text.splitlines())
    assert parse((out / "predictions.jsonl").read_text()) == parse(before[0])
    assert json.loads((out / "metrics.json").read_text()) == json.loads(before[1])

    # a finished run is not lost by accident
    monkeypatch.chdir(tmp_path)
    for again in ([], ["--resume"]):
        assert "holds a finished run" in call(train.main, "--model", folder, *SUMS, *again)
    assert (out / "metrics.json").read_text() == before[1]


def test_the_ablations_teach_what_they_say(folder, tmp_path, monkeypatch):
    """Without dropout, the loss of a step is what its log says of best, argmax and off."""
    monkeypatch.chdir(tmp_path)
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(lm.config, name, 0.0)
    lm.save_pretrained("dry")
    tokenizer.save_pretrained("dry")
    logs = {}
    for generalist in (True, False):
        for codes in ("best", "argmax"):
            out = f"run-{generalist}-{codes}"
            train.main(["--model", "dry", *SUMS, "--set", f"generalist={generalist}", f"update_on={codes}", "--test",
                        "1", "--out", out])
            for line in log_of(out):
                assert line["steered"] == pytest.approx(line[f"{codes}_nll"], rel=1e-5)
                assert line["generalist"] == pytest.approx(line["off_nll"] * generalist, rel=1e-5)
                assert line["best_nll"] <= line["mean_nll"]
            logs[generalist, codes] = line
    assert len({line["argmax_nll"] for line in logs.values()}) == 4  # four ways to train


@pytest.mark.parametrize("flags", [["--recipe", "ours"], ["--method", "soft"], ["--set", "update_on=sample"],
                                   ["--search", "beam"], ["--search", "response"],
                                   ["--search", "response", "--recipe", "ours", "--set", "update_on=sample"]])
def test_what_goes_beyond_the_paper(folder, tmp_path, monkeypatch, capsys, flags):
    """The log tells how far router and search are apart; a reloaded run answers alike, whatever its units and norms."""
    monkeypatch.chdir(tmp_path)
    train.main(["--model", str(folder), *SUMS, *flags, "--out", "run"])
    looks, printed = log_of("run"), capsys.readouterr().out
    for line in looks:
        assert line["best_nll"] <= line["mean_nll"] and line["same_winner"] == 1 and line["noise"] < 1e-4
        assert 0 < line["entropy"] <= np.log(4) + 1e-6
    assert looks[0]["push"] == 0 < looks[-1]["push"]
    off, mean, best, argmax = (np.mean([line[f"{name}_nll"] for line in looks[-2:]])
                               for name in ("off", "mean", "best", "argmax"))
    if off - best > 1e-4 and argmax < off:
        assert f"the router recovers {100 * (off - argmax) / (off - best):.0f}% of what the search finds" in printed
    config = json.loads(Path("run", "config.json").read_text())
    if "--recipe" in flags:
        update_on = "sample" if "update_on=sample" in flags else "argmax"
        assert (config["policy"], config["update_on"], config["scale_units"]) == ("rloo", update_on, "hidden")
        assert (config["alpha_policy"], config["router_norm"]) == (2.0, "rms")
        assert abs(DLRModel.from_pretrained("run/model").unit - 1) > 1e-3
    before = Path("run", "metrics.json").read_text()
    evaluation.main(["run", "--device", "cpu"])
    assert json.loads(Path("run", "metrics.json").read_text()) == json.loads(before)


def test_the_hindsight_sentence_averages_the_last_fifth_of_the_looks(tmp_path):
    def said(lines, *flags):
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return search.hindsight_gap(train.parse_args(["--model", "x", "--out", str(tmp_path), *flags]))

    look = lambda off, mean, argmax, best: dict(off_nll=off, mean_nll=mean, argmax_nll=argmax, best_nll=best)
    early, late = [look(9.0, 9.0, 9.0, 9.0)] * 8, [look(2.0, 1.5, 1.4, 1.0), look(1.0, 0.7, 0.8, 0.6)]
    between = {"step": 3, "best_nll": 7.0, "mean_nll": 7.0}  # a step that was not looked at
    sentence = said([*early, late[0], between, late[1]])
    assert "off 1.5000, rollouts' mean 1.1000, router's argmax 1.1000, best rollout 0.8000" in sentence
    assert "the router recovers 57% of what the search finds" in sentence  # (1.5 - 1.1) / (1.5 - 0.8)
    assert "no better than none" in said([look(1.0, 1.0, 1.1, 0.9)])
    assert "finds nothing yet" in said([look(1.0, 1.0, 1.0, 1.0 - 1e-5)])
    for flags in (["--codes", "1"], ["--rollouts", "1"], ["--rollouts", "1", "--search", "response"]):
        assert "nothing was searched" in said(late, *flags)
    assert "recovers" in said(late, "--rollouts", "1", "--search", "exact")


def test_two_runs_that_teach_the_same_base_do_not_disturb_each_other(tmp_path, monkeypatch):
    args, teach = train.parse_args(["--digits", "1", "--out", str(tmp_path / "run")]), baselines.teach_tiny
    first = teach(args, "cpu", most_steps=1)
    weights = (first / "model.safetensors").read_bytes()
    monkeypatch.setattr(Path, "is_file", lambda path: False)  # the second one looked before the first was done
    assert teach(args, "cpu", most_steps=2) == first
    assert (first / "model.safetensors").read_bytes() == weights and list(tmp_path.iterdir()) == [first]


@pytest.mark.parametrize("name", ["response", "rollouts", "beam"])
def test_a_prompt_that_was_not_searched_is_steered_but_not_imitated(folder, name):
    """With the response search the policy term is the cross-entropy of response chunks alone; otherwise of all."""
    args = train.parse_args(["--model", str(folder), *SUMS, "--search", name, "--chunk", "2"])
    model = train.build(args, AutoModelForCausalLM.from_pretrained(folder), None, torch.device("cpu"))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.nn.init.normal_(model.codebook)
    ids = torch.arange(20).view(2, 10) % 11
    labels = ids.masked_fill(torch.arange(10) < torch.tensor([[5], [8]]), -100)
    torch.manual_seed(0)
    out = model.train()(ids, labels=labels)
    searched = torch.tensor([[False, False, True, True, True], [False] * 4 + [True]]) if name == "response" else None
    codes, z = out.found.codes, model.route(out.trunk)
    assert out.found.rollouts.shape[1] == args.rollouts == 3  # a beam is as wide
    if searched is None:
        searched = torch.ones_like(codes, dtype=torch.bool)
    assert torch.equal(codes[~searched], z.argmax(-1)[~searched])
    expected = -z.log_softmax(-1).gather(-1, codes[..., None])[..., 0][searched].mean()
    torch.testing.assert_close(out.policy, expected)
    torch.testing.assert_close(out.steered, -model.log_likelihood(out.trunk, labels, codes).sum() / 7)


@pytest.mark.parametrize("how, method", [(signal.SIGINT, "dlr"), (signal.SIGKILL, "dlr"), (signal.SIGTERM, "lora")])
def test_an_interrupted_run_resumes_to_the_same_numbers(folder, tmp_path, monkeypatch, how, method):
    settings = ["--model", str(folder), *SUMS, "--method", method, "--epochs", "4", "--accumulate", "2"]
    monkeypatch.chdir(tmp_path)
    train.main([*settings, "--out", "whole"])
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    saves = often_saving(tmp_path)
    process = subprocess.Popen([sys.executable, saves, *settings, "--out", "cut"], cwd=tmp_path, env=env,
                               stderr=subprocess.PIPE)
    log = tmp_path / "cut" / "log.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 5):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(how)
    assert process.wait() != 0
    assert not (tmp_path / "cut" / "metrics.json").exists()
    assert 5 <= len(log.read_text().splitlines()) < 24

    assert "--resume" in call(train.main, *settings, "--out", "cut")
    assert "lr was 0.001" in call(train.main, *settings, "--lr", "0.5", "--out", "cut", "--resume")
    train.main([*settings, "--out", "cut", "--resume"])
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    for name in ("metrics.json", "predictions.jsonl"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()
    states = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("cut", "whole")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_embedded_default_gives_codes_that_carry_weight(tmp_path, monkeypatch):
    """Half the data of the default: steering must beat the frozen LM, and only with the router's own codes."""
    done = run("--n", "3840", "--val", "100", "--test", "500", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert "frozen" in first and "--no-freeze" in first
    out = tmp_path / "runs" / "tiny-arithmetic-dlr-s0"
    test = json.loads((out / "metrics.json").read_text())["test"]
    strict = {name: row["strict"][0] for name, row in test.items()}
    assert strict["base"] == strict["off"] and test["base"]["nll"] == test["off"]["nll"]
    assert strict["steered"] > strict["off"] + 0.03 and strict["steered"] > strict["random"] + 0.1
    assert strict["steered"] > strict["other"] + 0.03
    taught = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "tiny-3digit-sums-nines0.5-seed0").state_dict()
    frozen = AutoModelForCausalLM.from_pretrained(out / "model").state_dict()
    assert all(torch.equal(taught[name], frozen[name]) for name in taught)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(baselines, "GPT2LMHeadModel", None)  # the base is there: nothing is taught again
    train.main(["--n", "64", "--val", "8", "--test", "8", "--no-freeze", "--out", "runs/along"])
    moved = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "along" / "model").state_dict()
    assert not torch.equal(moved["transformer.wte.weight"], taught["transformer.wte.weight"])


@pytest.mark.parametrize("flags, said", [
    (["--data", "gsm9k"], "gsm8k"),
    (["--model", "tiny", "--data", "gsm9k"], "unknown data 'gsm9k'"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
    (["--data", "gsm8k", "--data-dir", "nowhere"], "nowhere/gsm8k"),
    (["--data", "mine.jsonl", "--n", "50"], "the largest n is"),
    (["--method", "drl"], "--method: invalid choice: 'drl'"),
    (["--epocs", "3"], "--epocs"),
    (["--chunk", "0"], "--chunk is 0"),
    (["--codes", "-3"], "--codes is -3"),
    (["--layer", "3"], "blocks 0 to 2"),
    (["--lr", "-1"], "--lr is -1"),
    (["--freeze", "--method", "sft"], "have nothing to train"),
    (["--method", "lora", "--lora-layers", "0", "3"], "blocks 0 to 2"),
    (["--search", "beam", "--set", "policy=rloo"], "want draws"),
    (["--set", "polciy=rloo"], "--set polciy=rloo is none of"),
    (["--set", "generalist=no"], "--set generalist=no is none of"),
    (["--set", "alpha_policy=much"], "--set alpha_policy=much is none of"),
    (["--set", "policy=imitates"], "policy is 'imitates'; it should be one of imitate, rloo"),
    (["--set", "scale_units=metres"], "scale_units should be one of absolute, hidden"),
    (["--epochs", "0"], "--epochs is 0"),
    (["--scale", "inf"], "--scale is inf"),
    (["--set", "temperature=-1"], "temperature is -1"),
    (["--model", "empty"], "no config.json"),
    (["--model", "wordless-gpt2"], "has no tokenizer (it knows no text)"),
    (["--model", "wordless-llama"], "has no tokenizer ("),
    (["--model", "nowhere.gguf"], "nowhere.gguf does not exist"),
    (["--model", "no/such-model"], "pass a model folder"),
    (["--device", "cudaa"], "--device cudaa"),
    (["--model", "tiny", "--data", "mine.jsonl"], "--model tiny only reads arithmetic"),
    (["--model", "tiny", "--data", "arithmetic", "--layer", "2", "--n", "9"], "blocks 0 to 1"),
    (["--resume"], "holds no run to resume"),
    (["--recipe", "paper", "--patience", "3"], "belong together"),
    (["--recipe", "paper", "--evaluate-every", "3"], "belong together"),
    (["--evaluate-every", "0", "--patience", "3"], "--evaluate-every is 0"),
    (["--evaluate-every", "3", "--patience", "-1"], "--patience is -1"),
    (["--evaluate-every", "3", "--patience", "2", "--val", "0"], "--val is 0"),
    (["--evaluate-every", "3", "--patience", "2", "--n", "27"], "--n 27 leaves none"),
    (["--epochs", "-1"], "--epochs is -1"),
    (["--method", "sft", "--lora-rank", "2"], "--lora-rank is for"),
    (["--shard"], "without adapters or --patience"),
    (["--shard", "--recipe", "paper"], "start it with torchrun"),
])
def test_bad_input_is_answered_in_one_sentence(folder, tmp_path, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    if "wordless" in flags[-1]:
        small = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2)
        config = AutoConfig.for_model(flags[-1].split("-")[1], **small)
        AutoModelForCausalLM.from_config(config).save_pretrained(flags[-1])
    rows = [json.dumps({"prompt": f"{i}+0=", "response": f"#### {i}"}) for i in range(30)]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows))
    assert said in call(train.main, "--model", folder, "--data", "mine.jsonl", *flags)
    assert not (tmp_path / "runs").exists() or "wordless" in flags[-1]


def test_out_of_memory_says_what_helps(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    large = torch.empty

    def full(*args):
        large(2**60)  # what the allocator itself says

    monkeypatch.setattr(train, "train_step", full)
    assert "--gradient-checkpointing" in call(train.main, "--model", folder, *SUMS)
    monkeypatch.setattr(train, "train_step", lambda *args: torch.ones(2) @ torch.ones(3))  # another error stays itself
    with pytest.raises(RuntimeError, match="size"):
        train.main(["--model", str(folder), *SUMS, "--out", "run"])


def test_a_limit_that_leaves_no_room_for_answers(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--max-length 8;" in call(train.main, "--model", folder, *SUMS, "--max-length", "8")


def test_patience_wants_a_validation_text_that_can_be_scored(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load", lambda *args: {"train": data.arithmetic(8), "test": data.arithmetic(2, seed=1),
                                                     "validation": data.arithmetic(2, digits=9)})
    flags = ["--evaluate-every", "1", "--patience", "1", "--max-length", "14"]
    assert "no prompt of the validation texts leaves room" in call(train.main, "--model", folder, *SUMS, *flags)


def test_an_infinite_loss_names_step_and_batch(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sentence = call(train.main, "--model", folder, *SUMS, "--lr", "1e30")
    assert "Step " in sentence and "training examples [" in sentence


def test_the_log_shows_that_a_coarse_search_selects_by_rounding(folder, tmp_path, monkeypatch):
    """The second pass is in float32: against scores in bfloat16 it finds noise, and other winners."""
    monkeypatch.chdir(tmp_path)
    train.main(["--model", str(folder), *SUMS, "--set", "search_dtype=bfloat16", "--scale", "0.01", "--test", "1",
                "--out", "run"])
    looks = log_of("run")
    assert max(line["noise"] for line in looks) > 1e-3 and min(line["same_winner"] for line in looks) < 1


def test_a_run_that_selects_by_rounding_warns(folder, tmp_path, monkeypatch, capsys):
    settings = ["--model", str(folder), *SUMS, "--max-new-tokens", "0"]
    monkeypatch.chdir(tmp_path)
    train.main([*settings, "--scale", "1e-6", "--out", "faint"])
    assert capsys.readouterr().out.count("winners are drawn by rounding") == 1
    train.main([*settings, "--out", "loud"])
    assert "by rounding" not in capsys.readouterr().out


def killed_and_resumed(monkeypatch, step, settings):
    """A run that ends in an error at this step, and then goes on from its last state."""
    def killed(*args):
        if args[6] == step:
            raise RuntimeError("killed")
        return train_step(*args)

    train_step = train.train_step
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(train, "train_step", killed)
        train.main(settings)
    train.main([*settings, "--resume"])


PATIENT = ["--evaluate-every", "2", "--patience", "3", "--epochs", "3.33", "--max-new-tokens", "0", "--test", "4"]


def test_patience_stops_on_a_made_up_curve_and_keeps_the_best(folder, tmp_path, monkeypatch):
    """Looks after steps 2, 4, ..; the best is the third, and three looks later training ends."""
    monkeypatch.chdir(tmp_path)
    curve, states = iter([3.0, 2.0, 1.0, 1.5, 1.0, 2.0, 0.1]), []

    def look(args, model, rows):
        states.append(model.codebook.detach().clone())
        return next(curve)

    kept = {}
    monkeypatch.setattr(train, "validation_nll", look)
    monkeypatch.setattr(train, "finish", lambda args, model, *rest: kept.update(model=model, kept=rest[4]))
    train.main(["--model", str(folder), *SUMS, *PATIENT, "--out", "run"])
    lines = log_of("run")
    assert len(lines) == 12 and [line.get("validation_nll") for line in lines[1::2]] == [3.0, 2.0, 1.0, 1.5, 1.0, 2.0]
    assert not any("validation_nll" in line for line in lines[::2])
    assert kept["kept"] == {"step": 6, "nll": 1.0}
    assert torch.equal(kept["model"].codebook, states[2]) and not torch.equal(states[2], states[-1])
    assert [line["code_lr"] for line in lines] == pytest.approx([1e-2 * min((i + 1) / 10, 1) for i in range(12)])


def test_where_the_limit_ends_training_the_last_state_is_looked_at_too(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    curve, kept = iter([3.0, 2.0, 1.0]), []
    monkeypatch.setattr(train, "validation_nll", lambda *args: next(curve))
    monkeypatch.setattr(train, "finish", lambda *args: kept.append(args[6]))
    train.main(["--model", str(folder), *SUMS, *PATIENT, "--epochs", "0.4", "--out", "run"])
    assert [line.get("validation_nll") for line in log_of("run")] == [None, 3.0, None, 2.0, 1.0]
    assert kept == [{"step": 5, "nll": 1.0}]


@pytest.mark.parametrize("flags", [[], ["--method", "soft", "--lora-rank", "2", "--freeze"]])
def test_a_patient_run_saves_its_best_state_and_resumes_to_the_bit(folder, tmp_path, monkeypatch, capsys, flags):
    settings = ["--model", str(folder), *SUMS, *PATIENT, *flags]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "SAVE_EVERY", 3)
    train.main([*settings, "--out", "whole"])
    metrics = json.loads(Path("whole", "metrics.json").read_text())
    assert f"after step {metrics['kept']['step']}, the best of those looked at" in capsys.readouterr().out
    looks = {line["step"] + 1: line["validation_nll"] for line in log_of("whole") if "validation_nll" in line}
    assert looks[metrics["kept"]["step"]] == metrics["kept"]["nll"] == min(looks.values())
    assert metrics["validation"]["nll"] == pytest.approx(metrics["kept"]["nll"], rel=1e-5)  # what is saved is the best
    assert not Path("whole", "best.pt").exists()
    killed_and_resumed(monkeypatch, 7, [*settings, "--out", "cut"])  # past a look and a save
    assert log_of("cut") == log_of("whole")
    assert Path("cut", "metrics.json").read_text() == Path("whole", "metrics.json").read_text()
    states = [DLRModel.from_pretrained(Path(name, "model")).state_dict() for name in ("cut", "whole")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_codes_with_an_adapter(folder, tmp_path, monkeypatch):
    """The LM learns through the adapter alone; merged, it is an ordinary LM that answers as the unmerged one did."""
    monkeypatch.chdir(tmp_path)
    settings = [*SUMS, "--lora-rank", "2", "--lora-layers", "1", "2", "--max-new-tokens", "6"]
    args = train.parse_args(["--model", str(folder), *settings, "--out", "run"])
    lm = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: weight.clone() for name, weight in lm.state_dict().items()}
    baselines.dress(args, lm, None, {})
    model = train.build(args, lm, None, torch.device("cpu"))
    batch = data.collate(data.encode(data.arithmetic(6), data.arithmetic_tokenizer())[0])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    for _ in range(3):
        model.train()(**batch).loss.backward()
        optimizer.step()
    moved, codes = {name for name, p in model.named_parameters() if p.grad is not None}, {"codebook", "router.weight"}
    assert codes < moved and all("lora_" in name for name in moved - codes)
    ids, mask = data.collate_prompts([[5, 6, 14], [7]])
    new = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    model.eval()
    logits, said = model(**batch).logits, model.generate(ids, mask, **new)
    baselines.merge_lora(model.lm)
    torch.testing.assert_close(model(**batch).logits, logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.generate(ids, mask, **new), said)
    assert lm.state_dict().keys() == before.keys()
    changed = {name for name, weight in lm.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed and all(name.startswith(("transformer.h.1.", "transformer.h.2.")) for name in changed)
    train.main(["--model", str(folder), *settings, "--freeze", "--out", "run"])
    test = json.loads(Path("run", "metrics.json").read_text())["test"]
    assert test["base"]["nll"] != test["off"]["nll"]  # the LM moved: the base is another one
    evaluation.main(["run", "--device", "cpu"])
    assert json.loads(Path("run", "metrics.json").read_text())["test"] == test


def test_a_search_that_is_too_large_says_so(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sentence = call(train.main, "--model", folder, *SUMS, "--search", "exact", "--chunk", "1", "--codes", "8")
    assert "prefixes" in sentence


def test_a_local_file_of_prompts_and_responses(tmp_path, monkeypatch):
    """A model whose tokenizer is not ours, text without '####', pad token = end of text."""
    path = word_level_gpt2(tmp_path / "words")
    rows = [{"prompt": f"say {word}", "response": f"{word} {word}"} for word in "a b c d e f g h i j k l".split()]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    train.main(["--model", str(path), "--data", "mine.jsonl", "--val", "1", "--test", "1", "--max-new-tokens", "4",
                "--lr", "1e-3", "--batch-size", "2", "--epochs", "0.9"])
    assert len(log_of(tmp_path / "runs" / "words-mine-dlr-s0")) == 5  # nine tenths of ten texts


def word_level_gpt2(path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", "<unk>", "say", *"abcdefghijkl", "Question", "Answer", ":", "#", *"0123456789"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>",
                                        unk_token="<unk>")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(words), n_layer=2, n_embd=16, n_head=2, n_positions=128, bos_token_id=0,
                               eos_token_id=0)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def hub_cache(tmp_path_factory):
    """An HF_HOME that holds a tiny GPT-2 as the hub's `gpt2`, and a few items as its `openai/gsm8k`, config `main`."""
    import datasets

    home = tmp_path_factory.mktemp("hf_home")
    snapshot = home / "hub" / "models--gpt2" / "snapshots" / ("0" * 40)
    word_level_gpt2(snapshot)
    (home / "hub" / "models--gpt2" / "refs").mkdir()
    (home / "hub" / "models--gpt2" / "refs" / "main").write_text("0" * 40)
    source = tmp_path_factory.mktemp("gsm8k")
    for split, count in (("train", 12), ("test", 3)):
        rows = [{"question": f"{split} {i}?", "answer": f"say <<1+1=2>>{i}\n#### {i}"} for i in range(count)]
        (source / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {split: str(source / f"{split}.jsonl") for split in ("train", "test")}
    builder = datasets.load_dataset_builder("json", data_files=files, cache_dir=str(source / "cache"))
    builder.download_and_prepare()
    prepared = home / "datasets" / "openai___gsm8k" / "main" / "0.0.0" / ("1" * 40)
    prepared.mkdir(parents=True)
    for arrow in Path(builder.cache_dir).glob("*.arrow"):
        (prepared / arrow.name.replace("json-", "gsm8k-")).write_bytes(arrow.read_bytes())
    info = json.loads((Path(builder.cache_dir) / "dataset_info.json").read_text())
    info.update(builder_name="gsm8k", dataset_name="gsm8k", config_name="main")
    for split in info["splits"].values():
        split["dataset_name"] = "gsm8k"
    (prepared / "dataset_info.json").write_text(json.dumps(info))
    return home


def test_the_readme_command_with_a_hub_name_and_a_hub_dataset(hub_cache, tmp_path):
    """`--model gpt2 --data gsm8k` itself, with sizes that fit the few cached items."""
    env = {"HF_HOME": str(hub_cache), "HF_HUB_OFFLINE": "1"}
    done = run("--model", "gpt2", "--data", "gsm8k", "--n", "8", "--val", "2", "--test", "3", "--max-new-tokens", "8",
               cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "gpt2-gsm8k-dlr-s0"
    assert 1 <= len(log_of(out)) <= 20 and (out / "model" / "dlr.safetensors").is_file()
    assert "At most 20 steps of 8 texts; every 8 a look at 2 validation texts" in done.stdout
    assert "\nTraining " in done.stdout and " The codes " in done.stdout
    assert "the best of those looked at" in done.stdout


def test_without_network_and_cache_one_sentence_says_what_to_pass(tmp_path):
    done = run("--model", "gpt2", "--data", "gsm8k", "--n", "256", cwd=tmp_path,
               env={"HF_HOME": str(tmp_path / "nothing"), "HF_HUB_OFFLINE": "1"})
    sentence = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "--data-dir" in sentence and "--model FOLDER" in sentence


def test_the_sft_loss_is_the_lms_own(folder):
    lm = AutoModelForCausalLM.from_pretrained(folder)
    batch = data.collate(data.encode(data.arithmetic(6), AutoTokenizer.from_pretrained(folder))[0])
    expected = lm(**batch).loss
    plain = baselines.Unsteered(lm)
    for module in plain.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(plain(**batch).loss, expected)
    torch.testing.assert_close(plain.eval()(**batch).loss, expected)


@pytest.mark.parametrize("method", ["sft", "soft", "dlr"])
def test_accumulated_batches_step_like_one(steady_folder, tmp_path, method):
    """Texts of unequal length: two batches of 4 make the step of one batch of 8, in every term that is a sum over
    texts (policy and prior are means of each batch, weighted by its tokens: off here)."""
    weights, lines = [], []
    examples = data.arithmetic(7, digits=2) + data.arithmetic(1, digits=15)  # one of the two batches is the longer one
    for size in (4, 8):
        out = tmp_path / str(size)
        out.mkdir()
        args = train.parse_args(["--model", str(steady_folder), "--recipe", "paper", "--method", method,
                                 "--batch-size", str(size), "--accumulate", str(8 // size), "--lr", "1e-3",
                                 "--codes", "4", "--chunk", "2", "--set", "temperature=0",
                                 "--set", "alpha_policy=0", "--set", "alpha_reg=0", "--out", str(out)])
        lm, tokenizer = baselines.load_model(args, dict(pretrained_model_name_or_path=steady_folder), "cpu")
        model = train.build(args, lm, None, torch.device("cpu"))
        torch.nn.init.normal_(model.codebook)
        assert train.train(args, model, data.encode(examples, tokenizer)[0], [], torch.device("cpu"))
        weights.append(model.lm.transformer.h[0].mlp.c_fc.weight)
        lines.append(log_of(out)[0])
    before = AutoModelForCausalLM.from_pretrained(steady_folder).transformer.h[0].mlp.c_fc.weight
    assert (weights[0] - before).abs().max() > 1e-4
    torch.testing.assert_close(weights[0], weights[1], atol=2e-6, rtol=1e-4)
    terms = [] if method == "sft" else ["generalist", "steered"]
    for name in [*terms, "loss", "grad_norm"]:  # AdamW's first step hardly tells the scale of a gradient
        assert lines[0][name] == pytest.approx(lines[1][name], rel=1e-4), name


@pytest.fixture(scope="session")
def steady_folder(folder, tmp_path_factory):
    """The little model without dropout."""
    path = tmp_path_factory.mktemp("models") / "steady"
    lm = AutoModelForCausalLM.from_pretrained(folder, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    lm.save_pretrained(path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(path)
    return path


def test_gradient_checkpointing_changes_no_number(steady_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ["--model", str(steady_folder), *SUMS, "--max-new-tokens", "0"]
    train.main([*settings, "--out", "plain"])
    again = []
    checkpoint = modeling_utils.checkpoint
    monkeypatch.setattr(modeling_utils, "checkpoint", lambda *a, **k: again.append(1) or checkpoint(*a, **k))
    train.main([*settings, "--gradient-checkpointing", "--out", "checkpointed"])
    assert again  # it was on
    for line, other in zip(log_of("plain"), log_of("checkpointed"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def together(*args):
    """The command that runs train.py in two processes. Without the dashes torchrun takes --n for one of its own."""
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--",
            str(ROOT / "train.py"), *map(str, args)]


@pytest.mark.parametrize("flags", [["--evaluate-every", "4", "--patience", "9", "--val", "5"], ["--shard"]])
def test_two_processes_make_the_steps_of_one_and_resume(steady_folder, tmp_path, monkeypatch, flags):
    """Where nothing is drawn, in all but the prior, which each process sees of its own texts. The last batch of each
    epoch has one text: the second process has none there, and must not hang."""
    settings = ["--model", str(steady_folder), *SUMS, "--n", "33", "--epochs", "3", "--set",
                "temperature=0", "alpha_reg=0", *flags]
    alone = [flag for flag in settings if flag != "--shard"] + ["--batch-size", "8", "--out", "one"]
    shared = [*settings, "--batch-size", "4", "--out", "two"]
    monkeypatch.chdir(tmp_path)
    train.main(alone)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(together(*shared), cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "two" / "log.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 5):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert process.wait() != 0
    assert not (tmp_path / "two" / "metrics.json").exists()
    assert 5 <= len(log.read_text().splitlines()) < 15
    done = subprocess.run(together(*shared, "--resume"), cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test examples") == 1  # one process speaks, and writes
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert len(one) == len(two) == 15
    for line, other in zip(one, two):
        for name in ("generalist", "steered", "policy", "loss", "best_nll", "mean_nll", "grad_norm"):
            assert line[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), (line["step"], name)
        assert line.get("validation_nll", 0) == pytest.approx(other.get("validation_nll", 0), rel=1e-3)
    answers = [json.loads(Path(name, "metrics.json").read_text()) for name in ("one", "two")]
    for condition in ("base", "steered", "off"):
        assert answers[0]["test"][condition]["nll"] == pytest.approx(answers[1]["test"][condition]["nll"], rel=1e-4)


def test_the_last_sentences_read_the_table_right():
    """Against the NLL it was made with: the base at 1 nat a token, the conditions a given step above or below it."""
    rng = np.random.default_rng(0)
    tokens, noise = rng.integers(1, 9, 60), rng.normal(0, 0.02, 60)

    def read(steered, off, random, method="dlr"):
        nll = {"base": 1, "steered" if method == "dlr" else method: steered, "off": off, "random": random}
        rows = {name: [{"nll": (float(n * (value + e * (name == "random"))), int(n))} for n, e in zip(tokens, noise)]
                for name, value in nll.items() if value is not None}
        return compare.reading(method, rows)

    assert read(0.5, 0.7, 0.9).startswith("Training helped: NLL -0.500 [-0.500, -0.500] against the base. "
                                          "The codes carry weight: without them NLL +0.200 [+0.200, +0.200]")
    assert "The codes are inert" in read(0.5, 0.5, 0.5) and "act, but it does not matter" in read(0.5, 0.7, 0.5)
    assert "The codes carry weight" in read(0.5, 0.5, 0.7)  # no better than none, but not any code will do
    assert read(1.5, None, None, "sft") == "Training hurt: NLL +0.500 [+0.500, +0.500] against the base."
    assert "nothing beyond chance" in read(1, None, None, "sft")


def test_the_embedded_settings_give_way_to_flags():
    args = train.parse_args([])
    assert (args.num_codes, args.chunk_size, args.rollouts, args.freeze, args.layer) == (8, 1, 4, True, 0)
    args = train.parse_args(["--codes", "5", "--no-freeze"])
    assert (args.num_codes, args.chunk_size, args.freeze) == (5, 1, False)
    assert (args.patience, args.scale_units, args.router_norm) == (None, "absolute", "none")
    args = train.parse_args(["--model", "gpt2", "--data", "gsm8k"])
    method = (32, 4, 8, None, 0.5, 0.1, False, "imitate", "best")
    names = "num_codes chunk_size rollouts layer alpha_policy alpha_reg freeze policy update_on".split()
    assert tuple(getattr(args, name) for name in names) == method
    assert args.scale_units == "hidden" and args.patience and args.evaluate_every
    paper = train.parse_args(["--model", "gpt2", "--data", "gsm8k", "--recipe", "paper"])
    assert tuple(getattr(paper, name) for name in names) == method
    assert (paper.scale, paper.lr, paper.code_lr, paper.epochs, paper.patience) == (0.1, 1e-5, 1e-3, 1, None)
    assert args.out == "runs/gpt2-gsm8k-dlr-s0" and args.max_new_tokens == 256


def test_a_recipe_is_the_flags_that_help_spells_it_with(monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")  # no line is broken
    said = " ".join(train.flags().format_help().split())
    spelled = re.search(r"tiny has its own\): (.*?); paper: .*?; ours: (.*?) --model", said)
    for recipe, flags in zip(("tuned", "ours"), spelled.groups()):
        by_name, by_hand = (vars(train.parse_args(["--model", "gpt2", "--data", "gsm8k", *more]))
                            for more in (["--recipe", recipe], ["--recipe", "paper", *flags.split()]))
        assert {**by_hand, "recipe": recipe} == by_name


needs_real = pytest.mark.skipif(not (os.environ.get("DLR_DATA_DIR") and os.environ.get("DLR_GGUF")),
                                reason="set DLR_DATA_DIR (real data) and DLR_GGUF (a pretrained model) to run this")


@needs_real
def test_a_pretrained_gguf_on_real_data(tmp_path):
    done = run("--model", os.environ["DLR_GGUF"], "--data", "commonsense_qa", "--data-dir", os.environ["DLR_DATA_DIR"],
               "--n", "4", "--batch-size", "4", "--val", "1", "--test", "2", "--max-new-tokens", "6", "--freeze",
               "--epochs", "2", "--rollouts", "4", "--out", "run", cwd=tmp_path,
               env={"OMP_NUM_THREADS": str(os.cpu_count())})
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    again = run("run", script="eval.py", cwd=tmp_path, env={"OMP_NUM_THREADS": str(os.cpu_count())})
    assert again.returncode == 0, again.stderr
    assert sorted((tmp_path / "run" / "predictions.jsonl").read_text().splitlines()) == sorted(lines)
