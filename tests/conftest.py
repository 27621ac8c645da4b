import json
import logging
import os
import re
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the network; those of the hub path bring their own cache
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)  # tiny models: more threads only wait for each other


def pytest_configure(config):
    """A call of ours that sets off a warning of deprecation fails its test: the release after next has its removal.

    What a library sets off by itself gets a line of its own below these, "ignore:message:category", and its reason.
    Today there is one, which users are spared as well: peft's, in baselines.add_lora."""
    for line in ("error::FutureWarning", "error::DeprecationWarning"):
        config.addinivalue_line("filterwarnings", line)


class _Deprecations(logging.Handler):
    """Keeps what is logged of deprecations: transformers also has warnings that go to its log alone."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        if re.search("deprecated|will be removed", record.getMessage()):
            self.messages.append(record.getMessage())


@pytest.fixture(autouse=True)
def deprecations(monkeypatch):
    """A test fails where something deprecated was logged while it ran."""
    monkeypatch.setattr("transformers.logging.set_verbosity_error", lambda: None)  # train.py spares its users the rest
    handler, loggers = _Deprecations(), [logging.getLogger(name) for name in ("transformers", "datasets", "peft")]
    logging.Logger.warning_once.cache_clear()  # a warning that was given once is given to each test that deserves it
    for logger in loggers:
        logger.addHandler(handler)
    yield
    for logger in loggers:
        logger.removeHandler(handler)
    assert not handler.messages, handler.messages


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A local model folder: an untaught GPT-2 with dropout (which a resumed run has to repeat) and its tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    import data

    path = tmp_path_factory.mktemp("models") / "little"
    torch.manual_seed(0)
    tokenizer = data.arithmetic_tokenizer()
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_layer=3, n_embd=32, n_head=2, n_positions=64,
                               bos_token_id=None, eos_token_id=tokenizer.eos_token_id)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer():
    import data

    return data.arithmetic_tokenizer()


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory, tokenizer):
    """A folder as train.py leaves it, around an untrained model of 4 codes, chunks of 2 tokens; no answers yet."""
    from transformers import GPT2Config, GPT2LMHeadModel

    import train
    from dlr import DLRModel

    folder = tmp_path_factory.mktemp("runs") / "good"
    torch.manual_seed(0)
    model = DLRModel(GPT2LMHeadModel(GPT2Config(
        vocab_size=len(tokenizer), n_positions=48, n_embd=16, n_layer=2, n_head=2, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id)), num_codes=4, chunk_size=2, layer=0, scale=1.0)
    model.lm.transformer.wte.weight.data[tokenizer.eos_token_id] *= -2  # some answers end
    torch.nn.init.normal_(model.codebook)
    torch.nn.init.normal_(model.router.weight)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "predictions.jsonl").touch()
    settings = train.parse_args(["--test", "40", "--val", "5", "--n", "20", "--device", "cpu", "--max-new-tokens", "6",
                                 "--chunk", "2"])
    (folder / "config.json").write_text(json.dumps(vars(settings)))
    (folder / "metrics.json").write_text('{"test": {"steered": {"n": 40}}, "analysis": {"swap": "of before"}}')
    lines = [{"step": i, "generalist": 2.0, "mean_nll": 2 - i / 40, "best_nll": 1.9 - i / 40} for i in range(30)]
    lines[10]["argmax_nll"] = lines[20]["argmax_nll"] = 1.5
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.stats.get("skipped", []):
        terminalreporter.write_line(f"SKIPPED {report.nodeid}: {report.longrepr[-1]}", yellow=True)
