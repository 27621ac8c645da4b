"""figures.py: no text is lost in colour, and what is drawn is what the run holds."""
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.image import imread
from scipy.stats import ttest_rel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import analyze
import data
import figures
from eval import answer, load_run
from eval import main as evaluate
from figures import PAGE, ansi, as_html, as_text, bracketed, painted, painter, pieces, span


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token a byte, so that characters are split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


class Text(HTMLParser):
    """What a page says inside <pre>, without its tags."""

    def __init__(self, page):
        super().__init__()
        self.found, self.inside = [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "pre":
            self.inside = True
            self.found.append("")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "pre"

    def handle_data(self, text):
        if self.inside:
            self.found[-1] += text


def plain(text):
    """Without colours and numbers of codes."""
    return re.sub(r"\x1b\[[\d;]*m|\[(-|\d+)\]", "", text)


def test_colours_lose_no_text(byte_tokenizer):
    text = "naïve <b>日本</b> & \"x\"\n\n🙂 done"
    ids = byte_tokenizer(text).input_ids
    for chunk_size in (1, 2, 3, 4, 7):
        cut = pieces(byte_tokenizer, ids, 5, [3, 1, -1, 40], chunk_size)
        assert "".join(piece for piece, _, _ in cut) == text and "\ufffd" not in str(cut)
        assert "".join(piece for piece, _, is_answer in cut if not is_answer) == "naïv"
        items = [(cut, "right")]
        assert text in plain(as_text("run", items, ansi)) and text in plain(as_text("run", items, bracketed))
        assert Text(PAGE.format(as_html("run", items))).found[1] == text
    cut = pieces(byte_tokenizer, ids[:-6], 5, [0] * 99, 4)  # the answer was cut off within the emoji
    assert "".join(piece for piece, _, _ in cut) == byte_tokenizer.decode(ids[:-6])


def test_each_piece_has_the_colour_of_its_chunk(tokenizer):
    ids = tokenizer("12+34=").input_ids
    cut = pieces(tokenizer, ids, 3, [5, -1], 2)
    assert cut == [("12", 5, False), ("+", -1, False), ("3", -1, True), ("4=", -1, True)]
    assert painted(cut, bracketed) == "[5]12[-]+[-]34="
    assert painted([("1", 7, False), ("2", 7, False), ("", 3, True)], bracketed) == "[7]12"
    line = ansi("a\nb", 5, False)
    start = line[: line.index("a")]
    assert start and line == f"{start}a\x1b[0m\n{start}b\x1b[0m"
    assert ansi("a", -1, False) == "a" and 'title="code 5"' in span("a", 5, True)
    assert len({ansi("a", code, False) for code in range(64)}) == 64


def test_colours_are_for_terminals(monkeypatch):
    class Stream:
        def __init__(self, terminal):
            self.isatty = lambda: terminal

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert painter(Stream(True)) is ansi and painter(Stream(False)) is bracketed
    monkeypatch.setenv("NO_COLOR", "")  # by its definition, empty is as good as not set
    assert painter(Stream(True)) is ansi
    monkeypatch.setenv("NO_COLOR", "1")
    assert painter(Stream(True)) is bracketed


@pytest.fixture(scope="module")
def analysed(saved_run):
    flags = [str(saved_run), "--device", "cpu", "--test", "12"]
    evaluate(flags)
    analyze.main([*flags, "--min-count", "2"])
    return saved_run


def test_saved_answers_are_those_that_the_model_gives(analysed, tmp_path, capsys):
    page = tmp_path / "deep" / "codes.html"
    figures.main([str(analysed), "--show", "3", "--html", str(page)])
    printed = capsys.readouterr().out
    model, tokenizer, config = load_run(analysed)
    test = data.load("arithmetic", n=20, val=5, test=12)["test"][:3]
    predictions, codes = answer(model, tokenizer, test, max_new_tokens=config["max_new_tokens"], batch_size=3)
    shown = Text(page.read_text()).found
    assert len(shown) == 1 + 3
    for example, prediction, row, text in zip(test, predictions, codes.tolist(), shown[1:]):
        assert text == prediction["prompt"] + prediction["text"] and f"\n{text}\n" in plain(printed)
        prompt = tokenizer(example.prompt).input_ids
        cut = pieces(tokenizer, prompt + prediction["ids"], len(prompt), row, model.settings.chunk_size)
        assert f"\n{painted(cut, bracketed)}\n" in printed and painted(cut, span) in page.read_text()
    used = {code for row in codes.tolist() for code in row if code >= 0}
    assert set(map(int, shown[0].removeprefix("codes").split())) == used


def test_a_long_prompt_is_shown_as_it_was_cut(saved_run, tmp_path):
    model, tokenizer, config = load_run(saved_run)
    example = data.Example("1" * 59 + "=", "", "5")  # the LM reads 48 tokens, of which 6 are kept for the answer
    (prediction,), codes = answer(model, tokenizer, [example], max_new_tokens=config["max_new_tokens"])
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(saved_run / "model")
    (run / "config.json").write_text((saved_run / "config.json").read_text())
    (run / "metrics.json").write_text("{}")
    row = {"condition": "steered", **prediction, "codes": [code for code in codes[0].tolist() if code >= 0]}
    (run / "predictions.jsonl").write_text(json.dumps(row) + "\n")
    ids = tokenizer("1" * 41 + "=").input_ids
    ((cut, _),) = figures.saved_answers(run, 1)
    assert cut == pieces(tokenizer, ids + prediction["ids"], 42, codes[0].tolist(), 2)


def test_figures_are_drawn(analysed, tmp_path, capsys):
    figures.main([str(analysed), "--out", str(tmp_path)])
    assert capsys.readouterr().out == ""
    for name in ("curves", "usage", "interventions", "purity", "topics"):
        picture = imread(tmp_path / f"{name}.png")
        assert picture.shape[:2] == (750, 1125) and picture[..., :3].std() > 0.05, name


def test_the_method_is_drawn_without_a_run(tmp_path, capsys):
    figures.main(["--method", "--out", str(tmp_path / "figures")])
    (drawn,) = (tmp_path / "figures").iterdir()
    picture = imread(drawn)[..., :3]
    assert drawn.name == "method.png" and drawn.stat().st_size < 150_000 and capsys.readouterr().out == ""
    assert picture.shape[:2] == (660, 1500) and picture.std() > 0.05
    colours, counts = np.unique((255 * picture).round().reshape(-1, 3), axis=0, return_counts=True)
    tinted = colours[(counts > 5000) & (np.ptp(colours, axis=1) > 50)]
    assert len(tinted) >= 6  # text and bars of three chunks, each in the colour of its code


def answered(folder, name, n, right, nats):
    """A finished run of SFT as the map reads it: who was right (40,), nats of each answer (40,)."""
    run = folder / name
    (run / "model").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"data": "arithmetic", "method": "sft", "seed": int(name[-1]), "n": n}))
    (run / "metrics.json").write_text('{"test": {}}')
    rows = [{"condition": "sft", "prompt": f"{i}", "strict": bool(r), "flexible": bool(r), "nll": (float(v), 2)}
            for i, (r, v) in enumerate(zip(right, nats))]
    (run / "predictions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(run)


def test_the_map_is_the_paired_difference_and_holms_p(tmp_path, capsys):
    """Against the t test of scipy over seeds, and Holm's rule written out."""
    rng, names, runs, share, nats = np.random.default_rng(0), ("sft", "far", "near", "same"), [], {}, {}
    for n in (16, 64):
        for name, chance in zip(names, (0.5, 0.95, 0.7, 0.5)):
            for seed in range(5):
                right, v = rng.random(40) < chance, rng.random(40)
                runs.append(answered(tmp_path, f"n{n}-{name}-s{seed}", n, right, v))
                share.setdefault((n, name), []).append(right.mean())
                nats.setdefault((n, name), []).append(v.sum() / 80)
    table = figures.over_n(runs, "sft")
    assert set(table) == set(names[1:])
    for n in (16, 64):
        for values, by in ((share, "strict"), (nats, "nll")):
            p = {name: ttest_rel(values[n, name], values[n, "sft"]).pvalue for name in names[1:]}
            first, second, third = sorted(p, key=p.get)
            holm = {first: min(1, 3 * p[first])}
            holm[second] = max(holm[first], min(1, 2 * p[second]))
            holm[third] = max(holm[second], p[third])
            for name in names[1:]:
                gain = np.subtract(values[n, name], values[n, "sft"])
                expected = gain.mean(), gain.std(ddof=1) / 5**0.5, holm[name]
                np.testing.assert_allclose(table[name][n][by], expected, rtol=1e-6)
    figures.main([*runs, "--against", "sft", "--out", str(tmp_path / "drawn")])
    printed = capsys.readouterr().out
    assert f"{100 * table['far'][16]['strict'][0]:+.1f} ± " in printed and "*" in printed
    assert imread(tmp_path / "drawn" / "little_data.png")[..., :3].std() > 0.02
    for wrong, against, word in ((runs[:1], "dlr", "n16-dlr"), ([*runs, str(tmp_path)], "sft", "finished"),
                                 (runs[:6], "sft", "one seed alone")):
        with pytest.raises(SystemExit, match=word):
            figures.main([*wrong, "--against", against, "--out", str(tmp_path / "drawn")])


def test_what_is_left_out_is_named(analysed, tmp_path, capsys):
    found = figures.saved_analysis(analysed)
    for row in found["interventions"].values():
        row["topics"] = {}
    found["codes"].pop("purity", None)
    said = figures.plots(tmp_path, found, tmp_path)  # nor is there a log.jsonl
    assert len(said) == 3 and sorted(path.name for path in tmp_path.iterdir()) == ["interventions.png", "usage.png"]


def test_a_run_that_lacks_something_is_told_what_to_do(analysed, tmp_path, capsys):
    run = tmp_path / "young"
    (run / "model").mkdir(parents=True)
    for name in ("config.json", "metrics.json", "predictions.jsonl"):
        (run / name).write_text("{}" if name.endswith("n") else "")
    with pytest.raises(SystemExit) as stopped:
        figures.main([str(tmp_path / "gone"), str(run), str(analysed), "--out", str(tmp_path / "out")])
    gone, young = stopped.value.code.splitlines()
    assert str(tmp_path / "gone") in gone and young.endswith(f"first run: python analyze.py {run}")
    assert (tmp_path / "out" / analysed.name / "usage.png").is_file()  # of the run that has all
    with pytest.raises(SystemExit, match=f"first run: python eval.py {run}"):
        figures.main([str(run), "--show", "1"])


@pytest.mark.parametrize("flags, word", [(["run"], "--out DIR"), (["run", "--show", "0"], "--show is 0"), ([], "RUN"),
                                         (["run", "--plots", "x"], "--plots"),
                                         (["--method"], "--out DIR"), (["--out", "x"], "RUN"),
                                         (["run", "--against", "sft"], "--out DIR")])
def test_mistakes_get_one_sentence(flags, word):
    with pytest.raises(SystemExit) as stopped:
        figures.main(flags)
    message = str(stopped.value.code)
    assert message.startswith("figures.py: ") and word in message and "\n" not in message
