"""benchmark.py: operations against torch's counter, memory against real steps, and the commands."""
from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

import benchmark
import data
from dlr import DLRModel

CONFIGS = {
    "gpt2": lambda **other: GPT2Config(vocab_size=700, n_embd=128, n_layer=4, n_head=4, n_positions=128,
                                       bos_token_id=0, eos_token_id=0, **other),
    "llama": lambda **other: LlamaConfig(vocab_size=900, hidden_size=128, num_hidden_layers=5, num_attention_heads=4,
                                         num_key_value_heads=2, intermediate_size=352, max_position_embeddings=128,
                                         **other),
    "qwen3": lambda **other: Qwen3Config(vocab_size=500, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
                                         num_key_value_heads=2, head_dim=32, intermediate_size=160,
                                         tie_word_embeddings=True, **other)}
TEXTS, LENGTH, ANSWERED = 3, 96, 40
SHAPE_BY_HAND = ["--hidden", "128", "--layers", "5", "--heads", "4", "--kv-heads", "2", "--intermediate", "352",
                 "--vocab", "900"]


def build(config, checkpointing=False, **settings):
    torch.manual_seed(0)
    model = DLRModel(AutoModelForCausalLM.from_config(config), **settings).train()
    if checkpointing:
        lm = model.lm
        getattr(lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable)()
    ids = torch.randint(config.vocab_size, (TEXTS, LENGTH))
    labels = ids.masked_fill(torch.arange(LENGTH) < LENGTH - ANSWERED, -100)
    return model, dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)


def loss_of(model, batch, rollouts):
    return benchmark.sft_step(model, batch) if rollouts is None else benchmark.dlr_step(model, batch, rollouts)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("rollouts, layer, checkpointing", [(None, 1, False), (8, 1, False), (3, 0, False),
                                                            (8, 1, True)])
def test_operations_are_those_that_torch_counts(kind, rollouts, layer, checkpointing):
    """Of attention without fused kernels, which torch's counter does not see on a CPU."""
    config = CONFIGS[kind](attn_implementation="eager")
    model, batch = build(config, checkpointing, layer=layer)
    with FlopCounterMode(display=False) as counter:
        loss_of(model, batch, rollouts).backward()
    size = benchmark.Size(config, layer)
    expected = benchmark.operations(size, benchmark.Batch(TEXTS, LENGTH, TEXTS * ANSWERED), rollouts,
                                   checkpointing=checkpointing)
    # checkpointing spares itself the last product of each block
    assert sum(expected) == pytest.approx(counter.get_total_flops(), rel=0.08 if checkpointing else 0.01)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rollouts, dtype", [(None, "float32"), (4, "float32"), (24, "float32"), (4, "bfloat16")])
def test_the_peak_is_that_of_the_tensors_of_a_real_step(kind, checkpointing, rollouts, dtype):
    config = CONFIGS[kind]()
    model, batch = build(config, checkpointing)
    low = torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else nullcontext()
    with benchmark.Bytes(model) as count:
        with low:
            loss = loss_of(model, batch, rollouts)
        loss.backward()
    shape = benchmark.Batch(TEXTS, LENGTH, TEXTS * ANSWERED)
    held = benchmark.memory(benchmark.Size(config), shape, rollouts, dtype == "bfloat16", checkpointing)
    assert held["peak"] - held["weights"] - held["Adam"] == pytest.approx(count.peak, rel=0.2)


def test_bytes_counts_what_is_alive():
    module = torch.nn.Linear(10, 10)
    with benchmark.Bytes(module) as count:
        a = torch.zeros(100)
        view, weights = a.view(10, 10), module.weight.t()
        b = a + 1
        del a, weights
        assert count.live == 800  # the view holds the first
        del view
        assert count.live == 400 and count.peak == 800
        del b
    assert count.live == 0


@pytest.mark.parametrize("kind", CONFIGS)
def test_parameters_are_those_of_the_model(kind):
    config = CONFIGS[kind]()
    lm, size = AutoModelForCausalLM.from_config(config), benchmark.Size(config)
    assert size.total == sum(p.numel() for p in lm.parameters())
    blocks = lm.transformer.h if kind == "gpt2" else lm.model.layers
    assert size.blocks == [sum(p.numel() for p in block.parameters()) for block in blocks]
    assert size.tied == (kind != "llama")


def test_several_processes_share_what_is_not_whole_in_each():
    size, batch = benchmark.Size(CONFIGS["llama"]()), benchmark.Batch(TEXTS, LENGTH, TEXTS * ANSWERED)
    one, two, many = (benchmark.memory(size, batch, 4, processes=n) for n in (1, 2, 1000))
    assert one["Adam"] == 2 * two["Adam"] == 8 * size.total and one["weights"] == 4 * size.total
    assert many["weights"] > 4 * 2 * 900 * 128  # embeddings and head
    assert many["update"] == one["update"] and many["peak"] < two["peak"]


def test_the_naive_step_has_the_loss_of_ours(folder):
    """With one code there is one rollout, so both know the winner."""
    tokenizer = data.arithmetic_tokenizer()
    model = DLRModel(AutoModelForCausalLM.from_pretrained(folder), num_codes=1, chunk_size=2, scale=1.0).eval()
    torch.nn.init.normal_(model.codebook)
    batch = data.collate(data.encode(data.arithmetic(5) + data.arithmetic(2, digits=6), tokenizer)[0])
    trunk = model.trunk(batch["input_ids"], batch["attention_mask"])
    ours = model.loss(trunk, batch["labels"], model.search(trunk, batch["labels"]))
    naive = benchmark.naive_dlr_step(model, batch, 3)
    torch.testing.assert_close(naive, ours.generalist + ours.steered)


def test_every_kind_of_step_is_timed_and_nothing_is_trained(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    loaded = []
    load = benchmark.load
    monkeypatch.setattr(benchmark, "load", lambda *args: loaded.extend(load(*args)) or loaded)
    benchmark.main(["--model", str(folder), "--n", "8", "--rounds", "1", "--layer", "0", "--device", "cpu"])
    printed = capsys.readouterr().out
    rows = {line[:31].strip(): line[31:].split() for line in printed.splitlines()}
    kinds = [name for name, row in rows.items() if len(row) >= 4 and name.startswith(("SFT", "DLR", "naive"))]
    assert len(kinds) == 8 and min(float(rows[name][0]) for name in kinds) > 0
    # the floor, written out: two of three blocks above the injection; each sum has 14 tokens, 6 of them of the response
    block, head = 2 * 12 * 32**2 + 4 * 14 * 32, 2 * len(data.arithmetic_tokenizer()) * 32 * 6 / 14
    sft = 3 * (3 * block + head)
    for n in (1, 4, 8, 16):
        least = 3 * block + (n + 6) * (2 * block + head) + 3 * 2 * 32 * 32 / 4
        assert float(rows[f"DLR, N = {n}"][5]) == pytest.approx(least / sft, abs=0.006)
    after = loaded[0].lm.state_dict()
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not (tmp_path / "runs").exists()


def test_a_shape_by_hand_is_timed_and_held_to_the_peak(capsys):
    benchmark.main([*SHAPE_BY_HAND, "--length", "24", "--batch-size", "2", "--rounds", "1", "--peak", "0.5", "--device",
                    "cpu"])
    printed = capsys.readouterr().out
    assert printed.startswith("2 texts, 48 tokens, 24 of them of responses")
    row = next(line for line in printed.splitlines() if line.startswith("SFT, logits"))[31:].split()
    work = benchmark.operations(benchmark.Size(CONFIGS["llama"]()), benchmark.Batch(2, 24, 24))
    least, most = (100 * sum(work) / (float(row[0]) + off) / 0.5e12 for off in (0.0005, -0.0005))  # as it is rounded
    assert least - 0.05 <= float(row[-1]) <= most + 0.05


def table(printed):
    """-> {name: [SFT, DLR]} of the rows of an estimate."""
    return {line[:30].strip(): [float(value) for value in line[30:].split()] for line in printed.splitlines()[2:]}


def test_a_config_in_a_folder_and_the_same_shape_by_hand(tmp_path, capsys):
    """No weights lie in the folder."""
    CONFIGS["llama"]().save_pretrained(tmp_path)
    answers = []
    for which in (["--model", str(tmp_path)], SHAPE_BY_HAND):
        benchmark.main(["--estimate", *which, "--length", "96", "--batch-size", "3", "--peak", "2", "--search-peak",
                        "1", "--utilisation", "0.5"])
        answers.append(table(capsys.readouterr().out))
    assert answers[0] == answers[1]
    size = benchmark.Size(CONFIGS["llama"]())
    search, update = benchmark.operations(size, benchmark.Batch(3, 96, 144), 8)
    rows = answers[0]
    assert rows["TFLOP, update"][1] == pytest.approx(update / 1e12, abs=6e-4)
    assert rows["seconds"][1] == pytest.approx((search / 1 + update / 2) / 0.5 / 1e12, abs=6e-4)
    assert rows["TFLOP, search"][0] == 0 and rows["GB, Adam"][0] == pytest.approx(8e-9 * size.total, abs=6e-4)


def test_a_text_is_no_longer_than_the_model_reads(folder, capsys):
    benchmark.main(["--estimate", "--model", str(folder), "--length", "1000"])
    assert "texts of 64 tokens" in capsys.readouterr().out


def test_the_table_says_what_fits(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "SHAPES", {"small": (64, 2, 2, 2, 128, 500), "vast": (40000, 3, 8, 8, 200000, 500)})
    benchmark.main(["--estimate", "--table"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == [f"| {name}, {gpus}" for name in ("small", "vast") for gpus in (1, 8, 64)]
    assert {row[-1] for row in rows[:3]} == {"yes |"} and rows[3][-1] == "no |"


@pytest.mark.parametrize("flags, said", [
    (["--rounds", "0"], "--rounds is 0"),
    (["--batch-size", "-1"], "--batch-size is -1"),
    (["--round", "x"], "invalid int value"),
    (["--data", "gsm9k"], "unknown data 'gsm9k'"),
    (["--layer", "3"], "blocks 0 to 2"),
    (["--length", "8"], "--length 8; raise it"),
    (["--hidden", "128"], "--vocab, all of them"),
    (["--table"], "for --estimate"),
    (["--estimate", "--hidden", "128"], "--vocab, all of them"),
    (["--estimate", *SHAPE_BY_HAND, "--heads", "3"], "--heads is 3"),
    (["--estimate", *SHAPE_BY_HAND, "--layer", "5"], "blocks 0 to 4"),
    (["--estimate", *SHAPE_BY_HAND, "--layers", "1"], "one block"),
    (["--estimate", "--model", "tiny"], "wants a --model"),
    (["--estimate", "--model", "no/such-model"], "pass a model folder"),
    (["--estimate", "--response-share", "1.5"], "at most 1"),
    (["--estimate", "--processes", "0"], "--processes is 0"),
    (["--estimate", "--peak", "-3"], "--peak is -3"),
])
def test_bad_input_is_answered_in_one_sentence(folder, tmp_path, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--model", str(folder), "--n", "8", "--device", "cpu", *flags])
    message = stopped.value.code
    assert isinstance(message, str) and len(message.splitlines()) == 1 and said in message, message
