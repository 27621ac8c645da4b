"""README.md, RESULTS.md and the docstrings: every command is one that its script takes, every example runs."""
import ast
import importlib
import json
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = {name: (ROOT / name).read_text() for name in ("README.md", "RESULTS.md")}
FILES = [*sorted(ROOT.glob("*.py")), ROOT / "tests" / "families.py"]
DOCSTRINGS = {path.name: ast.get_docstring(ast.parse(path.read_text())) for path in FILES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Bash itself expands loops, functions and variables; a command is written down in place of being run (but mkdir: what
# follows may write there), and there is no PATH, so that another one than these is an error.
BASH = r"""set -eu
python() { printf '%s\x1f' "$@"; printf '\x1e'; }
torchrun() { while [ "$1" != -- ]; do shift; done; shift; python "$@"; }
for name in pip touch jq grep sort sed; do eval "$name() { :; }"; done
mkdir() { /bin/mkdir "$@"; }
"""


def commands(block, folder):
    """What a block of bash would run with python -> [[script, flag, ...]]."""
    done = subprocess.run(["/bin/bash", "-c", BASH + block], cwd=folder, env={"PATH": "/nowhere"}, text=True,
                          capture_output=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{done.stderr} in\n{block}"
    return [command.split("\x1f")[:-1] for command in done.stdout.split("\x1e")[:-1]]


def hold_to_parser(command):
    """Fails for a script that does not exist, and for flags that its own parser does not take."""
    script, *flags = command
    if script == "-m":
        assert find_spec(flags[0]), command
        return
    assert (ROOT / script).is_file(), command
    parse_args = getattr(importlib.import_module(Path(script).stem), "parse_args", None)
    if parse_args is None:  # takes names only
        assert not any(flag.startswith("-") for flag in flags), command
        return
    try:
        parse_args(flags)
    except SystemExit as stop:
        assert stop.code == 0, f"{stop.code} In: {' '.join(command)}"


def spans(text):
    """Commands within the prose, as lines of bash."""
    return "\n".join(" ".join(span.split()) for span in re.findall(r"`(python [\w/]+\.py[^`]*)`", FENCE.sub("", text)))


@pytest.mark.parametrize("name, least", [("README.md", 12), ("RESULTS.md", 500)])
def test_commands_of_the_documents_are_taken(name, least, tmp_path):
    blocks = [block for language, block in FENCE.findall(DOCUMENTS[name]) if language == "bash"]
    found = commands("\n".join([*blocks, spans(DOCUMENTS[name])]), tmp_path)
    assert len(found) >= least
    for command in found:
        hold_to_parser(command)


@pytest.mark.parametrize("name", DOCSTRINGS)
def test_commands_of_the_docstrings_are_taken(name, tmp_path):
    text = DOCSTRINGS[name]
    lines = "\n".join(re.findall(r"^ {4,}((?:python|torchrun) .*)$", text, re.MULTILINE))
    for command in commands(f"{lines}\n{spans(text)}", tmp_path):
        hold_to_parser(command)


@pytest.mark.parametrize("block", [
    "python train.py --no-such-flag", 'run() { python train.py "${@:2}"; }\nfor s in 1; do run a --no-such-flag; done',
    'F="--n 3 --no-such-flag"\npython train.py $F', "torchrun --nproc_per_node=2 -- train.py --no-such-flag",
    "python no_such_file.py", "python compare.py --against runs/a runs/b", "python analyze.py", "no_such_command"])
def test_a_wrong_command_is_found(block, tmp_path):
    with pytest.raises(AssertionError):
        for command in commands(block, tmp_path):
            hold_to_parser(command)


@pytest.fixture
def tiny_gpt2(tmp_path, tokenizer, monkeypatch):
    """The name "gpt2" means a tiny model; my.jsonl is there."""
    folder = tmp_path / "tiny"
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2,
                               bos_token_id=1, eos_token_id=tokenizer.eos_token_id)).save_pretrained(folder)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # as GPT-2's
    tokenizer.save_pretrained(folder)
    for auto in (AutoModelForCausalLM, AutoTokenizer):
        def load(name, *args, before=auto.from_pretrained, **kwargs):
            return before(folder if name == "gpt2" else name, *args, **kwargs)

        monkeypatch.setattr(auto, "from_pretrained", load)
    rows = [json.dumps({"prompt": f"{i}+{i}=", "response": f" #### {2 * i}"}) for i in range(30)]
    (tmp_path / "my.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)


def scored(lm, tasks, limit):
    """In place of the harness's `simple_evaluate`, which would download its tasks."""
    from lm_eval.api.instance import Instance

    request = Instance(request_type="loglikelihood", doc={}, arguments=("2+2=", "4"), idx=0)
    return {"results": lm.loglikelihood([request])}


def test_python_of_the_documents_runs(tiny_gpt2, monkeypatch, capsys):
    if find_spec("lm_eval"):
        monkeypatch.setattr("lm_eval.simple_evaluate", scored)
    names, ran = {}, 0
    fences = [fence for text in DOCUMENTS.values() for fence in FENCE.findall(text)]
    for (language, block), (following, output) in zip(fences, [*fences[1:], ("", "")]):
        if language != "python" or "lm_eval" in block and not find_spec("lm_eval"):
            continue
        capsys.readouterr()
        exec(block, names)
        ran += 1
        if following == "text":  # what it prints
            assert capsys.readouterr().out == output
    assert ran >= 3
    assert Path("my-model", "dlr.safetensors").is_file() and names["trainer"].state.global_step > 0


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_pictures_exist(name):
    text = FENCE.sub("", DOCUMENTS[name])
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        assert not path or (ROOT / path).is_file(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", DOCUMENTS[path or name], re.MULTILINE)
            assert anchor in map(slug, headings), link


def test_pictures_are_few_small_and_shown():
    pictures = sorted((ROOT / "figures").iterdir())
    assert 2 <= len(pictures) <= 4
    for picture in pictures:
        assert picture.suffix == ".png" and picture.stat().st_size < 150_000, picture
        assert any(f"figures/{picture.name}" in text for text in DOCUMENTS.values()), picture


def test_the_readme_stays_short_and_tables_readable():
    readme = DOCUMENTS["README.md"]
    assert len(readme.splitlines()) <= 220 and len(readme.encode()) <= 16 * 1024
    for line in FENCE.sub("", DOCUMENTS["RESULTS.md"]).splitlines():
        if line.startswith("|"):
            for cell in re.sub(r"\]\([^)]*\)", "]", line).split("|"):
                assert len(cell.strip()) < 60, cell


def test_the_readme_says_of_each_file_what_the_file_says():
    rows = dict(re.findall(r"^\| `(\w+\.py)` \| (.*) \|$", DOCUMENTS["README.md"], re.MULTILINE))
    assert rows == {path.name: DOCSTRINGS[path.name].splitlines()[0] for path in ROOT.glob("*.py")}
