"""baselines.py: pause tokens, mixed texts and adapters, each against what it should be, and through the commands."""
import importlib.util
import json
import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import baselines
import compare
import data
import eval as evaluation
import train

REASONS = ["first we add the two and", "then a carry moves on to", "nothing is left over so",
           "ça coûte 3€ 😀 en tout"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A local model folder: a tiny GPT-2 with a byte-level BPE tokenizer that splits rare characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("models") / "bytes"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<eos>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(REASONS[:3], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_layer=2, n_embd=32, n_head=2, n_positions=160,
                               resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0,
                               eos_token_id=0)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def reasoned(n, seed=0):
    """Examples whose answers have up to three sentences of reasoning."""
    rng = random.Random(seed)
    examples = []
    for i in range(n):
        reason = " ".join(rng.choices(REASONS, k=rng.randint(0, 3)))
        examples.append(data.Example(f"Question: {i}?\nAnswer:", f" {reason}\n#### {i % 7}", str(i % 7)))
    return examples


def test_pause_tokens_are_context_and_never_counted(loaded):
    lm, tokenizer = loaded
    before = lm.get_input_embeddings().weight.detach().clone()
    baselines.add_tokens(lm, tokenizer, [baselines.PAUSE])
    assert torch.equal(lm.get_input_embeddings().weight[:-1], before)
    pause = tokenizer.convert_tokens_to_ids(baselines.PAUSE)
    assert pause == len(before)  # a token of its own
    plain = reasoned(5)
    rows, _, _ = data.encode(baselines.with_pauses(plain, 10), tokenizer)
    for (ids, length), (old, old_length) in zip(rows, data.encode(plain, tokenizer)[0]):
        assert ids == old[:old_length] + [pause] * 10 + old[old_length:] and length == old_length + 10
    batch = data.collate(rows)
    assert (batch["input_ids"] == pause).sum() == 50 and not (batch["labels"] == pause).any()
    expected = lm(**batch).loss
    loss = baselines.Unsteered(lm).train()(**batch).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()  # though not predicted, they are learned
    assert lm.get_input_embeddings().weight.grad[pause].abs().max() > 0


def test_mixed_texts_lose_nothing_but_what_the_codes_stand_for(loaded):
    """Codes out, text intact: what is left is the end of the response, and the codes say how many chunks went."""
    lm, tokenizer = loaded
    K, C, plain = 4, 8, reasoned(120)
    mixed, said = baselines.assort(plain, lm, tokenizer, K, C, seed=3)
    codes = tokenizer.convert_tokens_to_ids([f"<|code_{i}|>" for i in range(C)])
    shares = []
    for old, new in zip(plain, mixed):
        assert replace(new, response=old.response) == old
        ids = tokenizer(new.response).input_ids
        written = [i for i in ids if i in codes]
        kept = tokenizer.decode(ids, skip_special_tokens=True)
        assert old.response.endswith(kept) and kept.endswith(f"#### {old.answer}")
        gone = tokenizer(old.response[: len(old.response) - len(kept)]).input_ids
        whole = len(tokenizer(old.response.split("\n####")[0]).input_ids) // K
        # a character that a chunk cuts in two goes with the chunk, so up to three tokens more than K a code
        assert K * len(written) <= len(gone) <= K * len(written) + 3
        assert ("<|codes|>" in new.response) == bool(written) and len(written) <= whole
        if whole:
            shares.append(len(written) / whole)
    assert min(shares) == 0 and max(shares) == 1 and 0.4 < sum(shares) / len(shares) < 0.6
    chunks = sum(len(tokenizer(example.response.split("\n####")[0]).input_ids) // K for example in plain)
    assert f"of {chunks} chunks" in said


def test_without_reasoning_nothing_is_replaced(loaded):
    lm, tokenizer = loaded
    size = len(tokenizer)
    examples = [data.Example(f"{i}+0=", f" #### {i}", str(i)) for i in range(9)]
    assert baselines.assort(examples, lm, tokenizer, 4, 8)[0] == examples
    assert len(tokenizer) == size == lm.get_input_embeddings().num_embeddings


def test_the_vq_vae_tells_as_many_chunks_apart_as_it_has_codes():
    torch.manual_seed(0)
    kinds = torch.randint(50, (6, 4))
    which = torch.randint(6, (300,))
    embedding = torch.randn(50, 32)
    codes, rebuilt = baselines.train_vq(kinds[which], embedding, num_codes=6)
    assert rebuilt == 1.0 and len({(a, b) for a, b in zip(codes.tolist(), which.tolist())}) == 6
    few = [baselines.train_vq(kinds[which], embedding, num_codes=2, steps=50, seed=seed) for seed in (1, 1)]
    assert few[0][1] < 0.8 and set(few[0][0].tolist()) <= {0, 1}
    assert torch.equal(few[0][0], few[1][0])  # a resumed run makes the same texts


def llama(layers=3):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
                                        num_attention_heads=4, num_key_value_heads=2))


@pytest.mark.parametrize("layers", [None, [1]])
def test_lora_trains_its_adapters_and_merges_to_the_same_function(layers):
    lm, ids = llama(), torch.randint(64, (2, 9))
    plain = {name: p.detach().clone() for name, p in lm.named_parameters()}
    before = lm(ids).logits
    baselines.add_lora(lm, 2, layers)
    torch.testing.assert_close(lm(ids).logits, before)
    trained = {name: p for name, p in lm.named_parameters() if p.requires_grad}
    shapes = [part.shape for name, part in plain.items() if part.dim() == 2 and ".layers." in name
              and (layers is None or f".layers.{layers[0]}." in name)]
    assert sum(p.numel() for p in trained.values()) == sum(2 * (out + into) for out, into in shapes)
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    for _ in range(3):
        lm(ids, labels=ids).loss.backward()
        optimizer.step()
    after = lm(ids).logits
    assert (after - before).abs().max() > 1e-2
    baselines.merge_lora(lm)
    torch.testing.assert_close(lm(ids).logits, after, atol=1e-5, rtol=1e-4)
    merged = dict(lm.named_parameters())
    assert merged.keys() == plain.keys()
    changed = {name for name in plain if not torch.equal(plain[name], merged[name])}
    assert len(changed) == len(shapes) and all(layers is None or f".layers.{layers[0]}." in name for name in changed)


@pytest.mark.parametrize("layer", [None, 0])
def test_reft_adds_what_it_says_at_one_block_and_trains_nothing_else(layer):
    """Against the equation, h + U (V h + b), with a stand-in for the block; the two ways through the LM agree."""
    lm, ids = llama(), torch.randint(64, (2, 9))
    before, block = lm(ids).logits, 1 if layer is None else layer
    baselines.add_reft(lm, layer, 3)
    torch.testing.assert_close(lm(ids).logits, before)
    trained = {name: p for name, p in lm.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == 2 * 3 * 32 + 3
    for p in trained.values():
        torch.nn.init.normal_(p)
    (U,), (V,), (b,) = ([p for p in trained.values() if p.shape == shape] for shape in ((32, 3), (3, 32), (3,)))
    plain = llama()
    plain.model.layers[block].register_forward_hook(lambda part, args, h: h + torch.einsum(
        "hr,btr->bth", U, torch.einsum("rh,bth->btr", V, h) + b))
    expected = plain(ids).logits
    torch.testing.assert_close(lm(ids).logits, expected, atol=1e-5, rtol=1e-4)
    assert (expected - before).abs().max() > 0.1
    loss = baselines.Unsteered(lm).train()(ids, labels=ids).loss
    torch.testing.assert_close(loss, lm(ids, labels=ids).loss, atol=1e-5, rtol=1e-4)
    loss.backward()
    assert all((p.grad is not None) == (name in trained) for name, p in lm.named_parameters())


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for method, package in (("lora", "peft"), ("tokenassorted", "vector-quantize-pytorch")):
        with pytest.raises(ValueError, match=f"pip install {package}"):
            baselines.check_packages(method)
    baselines.check_packages("sft")


@pytest.mark.parametrize("method", ["pause", "tokenassorted", "lora", "reft"])
def test_every_method_from_command_to_checkpoint_and_back(folder, tmp_path, monkeypatch, capsys, method):
    rows = [{"prompt": e.prompt, "response": e.response} for e in reasoned(80)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    train.main(["--model", str(folder), "--data", "mine.jsonl", "--method", method, "--val", "4", "--test", "6",
                "--lr", "1e-1" if method in ("lora", "reft") else "1e-2", "--max-new-tokens", "12", "--out", "run",
                *["--lora-rank", "2"] * (method == "lora"), *["--codes", "8"] * (method == "reft")])
    printed = capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert list(metrics["test"]) == ["base", method]
    gain = metrics["test"]["base"]["nll"] - metrics["test"][method]["nll"]
    assert gain > (0.05 if method in ("lora", "reft") else 0.3)  # these cannot raise an untaught head's tiny logits far
    lm = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    # lora: rank 2, two blocks, each with attention 32 -> 96 and 32 -> 32, MLP 32 -> 128 -> 32
    adapters = 2 * 2 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32))
    trained = {"pause": lm + 32, "tokenassorted": lm + 34 * 32, "lora": adapters,
               "reft": 2 * 8 * 32 + 8}
    assert f" {trained[method]:,} parameters trained" in printed
    lines = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    own = [json.loads(line) for line in lines if json.loads(line)["condition"] == method]
    assert all(row["prompt"].endswith(10 * baselines.PAUSE) == (method == "pause") for row in own)
    assert not any("<|" in row["text"] for row in own)
    evaluation.main(["run", "--device", "cpu"])
    assert sorted((tmp_path / "run" / "predictions.jsonl").read_text().splitlines()) == sorted(lines)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
    if method == "pause":  # with other prompts than the base's, it is still the same question
        capsys.readouterr()
        compare.main(["run", "--against", "base"])
        assert "not comparable" not in capsys.readouterr().out
