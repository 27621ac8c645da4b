"""A DLRModel in other people's tools: transformers' Trainer, DistributedDataParallel, the lm-evaluation-harness."""
import copy

import pytest
import torch
from test_dlr import V, assert_gradients, build, gradients, training, without_dropout
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

K, PROMPT = 3, 4


def counting(number, longest=12):
    """Texts that count up from some number, padded on the right; the prompt is not to be learned."""
    rows = []
    for i in range(number):
        length = longest - i % 3
        ids = torch.full((longest,), 7)
        ids[:length] = 10 + (5 * i + torch.arange(length)) % 20
        mask = (torch.arange(longest) < length).long()
        labels = ids.masked_fill((mask == 0) | (torch.arange(longest) < PROMPT), -100)
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


def stacked(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def trained(folder, steps=8, resume=None, **settings):
    """A GPT-2, whose embeddings are tied, after `steps` steps of transformers' Trainer -> the trainer."""
    model = build("gpt2", rollouts=3)
    torch.nn.init.normal_(model.codebook, std=0.1)
    arguments = TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=4, per_device_eval_batch_size=12,
        learning_rate=3e-3, lr_scheduler_type="constant", logging_steps=1, save_steps=4, seed=1, use_cpu=True,
        report_to=[], disable_tqdm=True, **settings)
    trainer = Trainer(model, arguments, train_dataset=counting(40), eval_dataset=counting(12))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("trainer"))


def test_trainer_lowers_the_loss_and_evaluates_the_routed_nll(finished):
    losses = [entry["loss"] for entry in finished.state.log_history if "loss" in entry]
    assert len(losses) == 8 and sum(losses[-2:]) < 0.9 * sum(losses[:2])
    with torch.no_grad():
        expected = finished.model.eval()(**stacked(counting(12)))
    metrics = finished.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    predicted = finished.predict(counting(12))
    torch.testing.assert_close(torch.tensor(predicted.predictions), expected.logits)


def test_trainer_resumes_where_it_was_stopped(finished, tmp_path):
    folder = f"{finished.args.output_dir}/checkpoint-4"
    resumed = trained(tmp_path, resume=folder)
    assert resumed.state.global_step == 8
    for (name, one), two in zip(resumed.model.state_dict().items(), finished.model.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    lm = resumed.model.lm
    assert lm.lm_head.weight is lm.transformer.wte.weight
    stopped = trained(tmp_path / "stopped", steps=4).model.codebook
    assert not torch.equal(stopped, finished.model.codebook)


@pytest.mark.parametrize("size, parts", [(4, 1), (1, 4)])
def test_trainer_steps_down_the_gradient_of_the_whole_batch(size, parts, tmp_path):
    """In one part or in several; with one rollout at tau = 0 there is no chance in it. First tokens do not count."""
    model = without_dropout(build("gpt2", rollouts=1, temperature=0.0, alpha_policy=0.0, alpha_reg=0.0)).train()
    rows = [{**row, "labels": row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)} for row in counting(4)]
    wanted = gradients(model, model(**stacked(rows)).loss)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=parts,
        learning_rate=1.0, optim="sgd", max_grad_norm=0.0, save_strategy="no", use_cpu=True, report_to=[],
        disable_tqdm=True)
    model.zero_grad()
    Trainer(model, arguments, train_dataset=rows).train()
    assert wanted["codebook"].abs().max() > 0
    assert_gradients({name: before[name] - p.detach() for name, p in model.named_parameters()}, wanted)


def test_distributed_data_parallel_needs_no_wrapper(tmp_path):
    model, ids, mask, labels = training("gpt2", rollouts=3)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        steps = []
        for wrap in (lambda model: model, DistributedDataParallel):
            step = wrap(copy.deepcopy(model))
            torch.manual_seed(0)
            out = step(ids, attention_mask=mask, labels=labels)
            steps.append((out, gradients(getattr(step, "module", step), out.loss)))
    finally:
        distributed.destroy_process_group()
    (plain, wanted), (wrapped, got) = steps
    assert torch.equal(wrapped.loss, plain.loss) and torch.equal(wrapped.found.codes, plain.found.codes)
    assert_gradients(got, wanted)
    assert got.keys() == {name for name, _ in model.named_parameters()}


@pytest.fixture(scope="module")
def harness():
    """-> HFLM of a steered model, the model, and its tokenizer: words "w0" to "w40", and "<eos>"."""
    HFLM = pytest.importorskip("lm_eval.models.huggingface", reason="lm-evaluation-harness is not installed").HFLM
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = Tokenizer(models.WordLevel({f"w{i}" if i != 2 else "<eos>": i for i in range(V)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    model = build("llama", chunk_size=K)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3), model, tokenizer


def request(kind, *arguments):
    from lm_eval.api.instance import Instance
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


PROMPTS = ["w5 w6 w7 w8", "w30 w31", "w9 w9 w12 w13 w14 w15 w16"]


@torch.no_grad()
def test_the_harness_scores_continuations_under_the_routers_codes(harness):
    lm, model, tokenizer = harness
    continuations = [" w9 w10 w11", " w32", " w17 w18 w19 w20"]
    got = lm.loglikelihood([request("loglikelihood", *pair) for pair in zip(PROMPTS, continuations)])
    for (score, greedy), prompt, continuation in zip(got, PROMPTS, continuations):
        ids = tokenizer(prompt + continuation, return_tensors="pt")["input_ids"]
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(prompt.split()), -100)
        trunk = model.trunk(ids)
        assert score == pytest.approx(model.log_likelihood(trunk, labels).item(), abs=1e-4)
        unsteered = model.log_likelihood(trunk, labels, torch.full_like(trunk.first, -1)).item()
        assert abs(score - unsteered) > 1e-2 and not greedy


@torch.no_grad()
def test_the_harness_generates_what_the_model_does(harness):
    lm, model, tokenizer = harness
    got = lm.generate_until([request("generate_until", prompt, {"until": ["zzz"], "max_gen_toks": 9})
                             for prompt in PROMPTS])
    for prompt, answer in zip(PROMPTS, got):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        said = model.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1]:]
        assert answer.split() == tokenizer.decode(said, skip_special_tokens=True).split() and len(answer.split()) == 9
        assert not torch.equal(model.lm.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1]:], said)
