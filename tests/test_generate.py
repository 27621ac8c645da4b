"""generate.py against a slow re-statement that shares nothing with dlr.py: a hook on the plain LM, no cache."""
import io
import json
import re
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import generate

PROMPTS = ("12+34=", "905+96=")


def slow_answer(folder, ids, rule, end, most):
    """Greedy continuation of `ids` with codes = rule(router's codes (M,)) -> (ids, codes (M,), NLL a token)."""
    lm, own = AutoModelForCausalLM.from_pretrained(folder), load_file(folder / "dlr.safetensors")
    size, used, ids, nll, begun = 2, [], list(ids), [], len(ids)

    def steer(block, args, hidden):
        codes = rule((hidden[0, ::size] @ own["router.weight"].T).argmax(-1))  # (M,)
        used[:] = codes.tolist()
        vectors = own["codebook"][codes] * (codes >= 0)[:, None]
        return hidden + vectors.repeat_interleave(size, 0)[: hidden.shape[1]]

    lm.transformer.h[0].register_forward_hook(steer)
    while len(nll) < most and ids[-1] != end:
        with torch.no_grad():
            log_p = lm(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
        nll.append(-log_p.max().item())
        ids.append(log_p.argmax().item())
    return ids[begun:], used, sum(nll) / len(nll)


def by_hand(codes):
    def rule(chosen):
        chosen[: len(codes)] = torch.tensor(codes)[: len(chosen)]
        return chosen
    return rule


RULES = {"base": lambda codes: torch.full_like(codes, -1), "steered": lambda codes: codes,
         "--codes 3,3,1,0": by_hand([3, 3, 1, 0]), "--codes 2": by_hand([2]),
         "--swap 0:3": lambda codes: torch.where(codes == 0, 3, codes)}


def expected(run, tokenizer, prompt, name, most=64):
    """-> ([(token's text, code or "-")], NLL), tokens without the end."""
    ids = tokenizer(prompt).input_ids
    most = min(most, 48 - len(ids))  # the LM reads 48 tokens
    answer, codes, nll = slow_answer(run / "model", ids, RULES[name], tokenizer.eos_token_id, most)
    text = [i for i in ids + answer if i != tokenizer.eos_token_id]
    codes = [codes[t // 2] if t // 2 < len(codes) and codes[t // 2] >= 0 else "-" for t in range(len(text))]
    spoken = [tokenizer.decode([i], skip_special_tokens=True) for i in text]
    return [(letter, str(code)) for token, code in zip(spoken, codes) for letter in token], nll


def read(line):
    """A line off a terminal -> [(letter, code)]."""
    found = re.findall(r"\[(-|\d+)\]([^\[]*)", line)
    assert "".join(f"[{code}]{text}" for code, text in found) == line
    return [(letter, code) for code, text in found for letter in text]


def said(capsys, *flags):
    generate.main([*map(str, flags), "--device", "cpu"])
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("name, flags", [("steered", []), ("base", ["--off"]), ("--codes 3,3,1,0", None),
                                         ("--codes 2", None), ("--swap 0:3", None)])
def test_an_answer_and_its_codes(saved_run, tokenizer, capsys, name, flags):
    flags = name.split() if flags is None else flags
    for prompt in PROMPTS:
        (line,) = said(capsys, saved_run, prompt, *flags)
        assert read(line) == expected(saved_run, tokenizer, prompt, name)[0]


def test_the_rules_differ_and_some_answers_end(saved_run, tokenizer):
    """Otherwise the tests here could not tell them apart."""
    answers = [expected(saved_run, tokenizer, PROMPTS[1], name)[0] for name in RULES]
    lengths = {len("".join(letter for letter, _ in answer)) for answer in answers}
    assert len(set(map(str, answers))) == len(RULES) and len(lengths) > 1


@pytest.mark.parametrize("asked, most", [("--codes 3,3,1,0", 64), ("--swap 0:3", 5), ("", 1), ("--off", 4)])
def test_compare_puts_answers_and_their_nll_under_each_other(saved_run, tokenizer, capsys, asked, most):
    names = ["base", "steered"] + [asked] * (asked not in ("", "--off"))
    lines = said(capsys, saved_run, PROMPTS[1], "--compare", "--max-new-tokens", most, *asked.split())
    assert len(lines) == len(names)
    for line, name in zip(lines, names):
        letters, nll = expected(saved_run, tokenizer, PROMPTS[1], name, most)
        head, value, text = re.fullmatch(r"(.*?) +NLL ([\d.]+)  (.*)", line).groups()
        assert head == name and float(value) == pytest.approx(nll, abs=1e-4) and read(text) == letters
    assert len({line.index("NLL") for line in lines}) == 1


def test_lines_from_a_pipe(saved_run, capsys, monkeypatch):
    alone = [line for prompt in PROMPTS for line in said(capsys, saved_run, prompt)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(PROMPTS)))
    assert said(capsys, saved_run) == alone
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPTS[0]}\n\n"))
    with pytest.raises(SystemExit, match="prompt is empty"):
        said(capsys, saved_run)
    assert capsys.readouterr().out.splitlines() == alone[:1]


def test_a_terminal_gets_colours_and_a_legend(saved_run, tokenizer, capsys, monkeypatch):
    letters, _ = expected(saved_run, tokenizer, PROMPTS[0], "steered")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    line, legend = said(capsys, saved_run, PROMPTS[0])
    assert re.sub(r"\x1b\[[\d;]*m", "", line) == "".join(letter for letter, _ in letters)
    named = dict(re.findall(r"\x1b\[38;5;16;48;5;(\d+)m (\d+) \x1b\[0m", legend))  # colour: code
    assert set(named.values()) == {code for _, code in letters} - {"-"}
    coloured = re.findall(r"\x1b\[(?:1;)?38;5;16;48;5;(\d+)m(.*?)\x1b\[0m", line)
    assert [(letter, named[colour]) for colour, text in coloured for letter in text] == [
        pair for pair in letters if pair[1] != "-"]
    monkeypatch.setenv("NO_COLOR", "1")
    (line,) = said(capsys, saved_run, PROMPTS[0])
    assert read(line) == letters


def test_a_line_break_in_a_prompt(saved_run, capsys, monkeypatch):
    """The arithmetic tokenizer does not know it, so what the model is given is looked at."""
    given = []
    monkeypatch.setattr(generate, "reply", lambda model, tokenizer, prompt, *_: (
        given.append(prompt) or [("a\nb", 1, True)], 0.5))
    lines = said(capsys, saved_run, r"1\n2", "--compare")
    assert given == ["1\n2"] * 2
    assert lines[:2] == ["base     NLL 0.5000  [1]a", " " * 21 + "b"]


def test_a_folder_of_save_pretrained(saved_run, capsys):
    assert said(capsys, saved_run / "model", PROMPTS[0]) == said(capsys, saved_run, PROMPTS[0])


def test_what_is_not_a_model_with_its_tokenizer(saved_run, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "dlr_config.json").write_text(json.dumps({}))  # as save_pretrained alone leaves it
    for folder in (tmp_path / "gone", tmp_path / "bare"):
        with pytest.raises(SystemExit) as stopped:
            generate.main([str(folder), "1", "--device", "cpu"])
        assert stopped.value.code.startswith(f"generate.py: {folder} is not") and "\n" not in stopped.value.code


@pytest.mark.parametrize("flags, word", [
    (["1", "--codes", "0,4"], "codes 0 to 3"), (["1", "--swap", "4:0"], "codes 0 to 3"), ([" "], "empty"),
    (["1", "--codes", "x"], "3,3,1,0"), (["1", "--swap", "1:2:3"], "2:5"),
    (["1", "--off", "--codes", "1"], "not allowed"),
    (["1", "--max-new-tokens", "0"], "--max-new-tokens is 0"), (["1", "--device", "abacus"], "abacus")])
def test_mistakes_get_one_sentence(saved_run, flags, word):
    with pytest.raises(SystemExit) as stopped:
        generate.main([str(saved_run), *flags])
    message = str(stopped.value.code)
    assert message.startswith("generate.py: ") and word in message and "\n" not in message
