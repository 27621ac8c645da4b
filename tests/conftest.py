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


def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.stats.get("skipped", []):
        terminalreporter.write_line(f"SKIPPED {report.nodeid}: {report.longrepr[-1]}", yellow=True)
