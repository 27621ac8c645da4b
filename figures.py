"""What a trained model does, in pictures: drawn from what a finished run holds; no model is loaded.

    python figures.py runs/tiny-arithmetic-dlr-s0 --out figures     # curves, usage, interventions, purity, topics
    python figures.py runs/tiny-arithmetic-dlr-s0 --show 3 --html codes.html   # answers in colours of codes
    python figures.py --method --out figures                        # how the method works: no run is needed
    python figures.py runs/n*-s2* --against sft --out figures       # who wins at which n, of runs named nN-METHOD-sSEED

--out draws what `python analyze.py RUN` found, beside the curves of the training log. --show and --html read the
answers that train.py or eval.py last saved.
"""
import argparse
import html
import itertools
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from scipy.stats import t as student
from transformers import AutoConfig, AutoTokenizer

from compare import paired, saved_result
from eval import encode_to_answer, read_config

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777"  # colour-blind-safe (Okabe, Ito)


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Answers in the colours of their codes</title><style>
body {{ max-width: 60em; margin: 2em auto; padding: 0 1em; font: 16px/1.5 sans-serif; color: #111; background: #fff }}
pre {{ font: 15px/1.7 monospace; white-space: pre-wrap; overflow-wrap: anywhere }}
h3 {{ font-size: 1em; margin: 1.5em 0 0 }} .answer {{ font-weight: bold }} span {{ padding: 0.1em 0 }}
</style></head><body>
<p>Each chunk has the colour of the code that steers it (hover for its number; white: none). Answers are bold.</p>
{}</body></html>
"""


def pieces(tokenizer, ids, prompt_length, codes, chunk_size):
    """Cut a text where chunks begin and where its prompt ends -> [(text, code, whether it is answer)], -1 for no code.

    The texts add up to the decoded whole: a character whose bytes are split goes to the piece that completes it."""
    borders = sorted({*range(0, len(ids), chunk_size), prompt_length, len(ids)})
    shown, cut = "", []
    for begin, end in zip(borders, borders[1:]):
        text = tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if end < len(ids):
            text = text.rstrip("\ufffd")
        code = codes[begin // chunk_size] if begin // chunk_size < len(codes) else -1
        cut.append((text[len(shown):], code, begin >= prompt_length))
        shown = text
    return cut


def palette():
    """Light colours (red, green, blue), each 0 to 5 as terminals have them, the next always unlike those before."""
    light = [rgb for rgb in itertools.product(range(6), repeat=3) if rgb[1] >= 2 and 8 <= sum(rgb) <= 13]
    taken = [(5, 4, 1)]
    while len(taken) < len(light):
        taken.append(max(light, key=lambda rgb: min(sum((a - b) ** 2 for a, b in zip(rgb, other)) for other in taken)))
    return taken


COLOURS = palette()


def ansi(text, code, is_answer):
    """A piece for a terminal of 256 colours: the code's background, black on it; answers bold."""
    red, green, blue = COLOURS[code % len(COLOURS)]
    style = ["1"] * is_answer + [f"38;5;16;48;5;{16 + 36 * red + 6 * green + blue}"] * (code >= 0)
    start = f"\x1b[{';'.join(style)}m" if style else ""
    # a line ends without colour, else the terminal paints the rest of it
    return start + text.replace("\n", f"\x1b[0m\n{start}") + "\x1b[0m" * bool(style)


def bracketed(text, code, is_answer):
    """A piece where there are no colours: behind the number of its code."""
    return f"[{code if code >= 0 else '-'}]{text}"


def span(text, code, is_answer):
    """A piece for a browser."""
    rgb = "".join(f"{55 + 40 * level if level else 0:02x}" for level in COLOURS[code % len(COLOURS)])
    style = f' style="background:#{rgb}" title="code {code}"' if code >= 0 else ""
    return f"<span{' class=answer' * is_answer}{style}>{html.escape(text)}</span>"


def painter(stream):
    """What paints pieces for a stream: `ansi` for a terminal, unless NO_COLOR is set, else `bracketed`."""
    return ansi if stream.isatty() and not os.environ.get("NO_COLOR") else bracketed


def painted(cut, paint):
    """A text from `pieces` as one string; neighbours that look alike are painted together."""
    alike = itertools.groupby((piece for piece in cut if piece[0]), key=lambda piece: piece[1:])
    return "".join(paint("".join(text for text, *_ in group), *look) for look, group in alike)


def legend(cuts, paint):
    """The codes that occur in some texts, each in its colour."""
    codes = sorted({code for cut in cuts for text, code, _ in cut if text and code >= 0})
    return " ".join(paint(f" {code} ", code, False) for code in codes)


def as_text(run, items, paint):
    """Answers as lines for a terminal, or for a file; items: [(pieces, verdict)]."""
    title = "prompt and answer, each chunk behind the number of its code"
    if paint is ansi:
        title = f"prompt, and answer in bold, in the colours of the codes {legend([cut for cut, _ in items], paint)}"
    blocks = [f"{number}. {verdict}\n{painted(cut, paint)}\n" for number, (cut, verdict) in enumerate(items, 1)]
    return f"{run}: {title}\n\n" + "\n".join(blocks)


def as_html(run, items):
    """Answers as a section of a page, see PAGE."""
    blocks = [f"<h3>{number}. {html.escape(verdict)}</h3>\n<pre>{painted(cut, span)}</pre>\n"
              for number, (cut, verdict) in enumerate(items, 1)]
    codes = legend([cut for cut, _ in items], span)
    return f"<h2>{html.escape(str(run))}</h2>\n<pre>codes {codes}</pre>\n{''.join(blocks)}"


def draw_curves(figure, run, analysis):
    """The loss in training: what the search found, what the router makes of it, and the LM without steering."""
    path = Path(run, "log.jsonl")
    lines = list(map(json.loads, path.read_text().splitlines())) if path.is_file() else []
    off = "off_nll" if any("off_nll" in line for line in lines) else "generalist"
    axes = figure.subplots()
    for name, label, ink in ((off, "off", RED), ("mean_nll", "mean of the rollouts", GREY),
                             ("argmax_nll", "router's argmax", BLUE), ("best_nll", "best rollout", GREEN)):
        points = np.array([(line["step"], line[name]) for line in lines if line.get(name)])  # some on some steps only
        if len(points):
            width = max(1, len(points) // 20)
            smooth = [np.convolve(column, np.ones(width) / width, "valid") for column in points.T]
            axes.plot(*points.T, color=ink, alpha=0.2, linewidth=1)
            axes.plot(*smooth, color=ink, linewidth=2, label=label)
    if not axes.lines:
        return "log.jsonl has no losses under codes"
    axes.set(xlabel="optimiser step", ylabel="NLL (nats per response token)", title="Loss on training texts")
    figure.legend(loc="outside lower center", ncols=4)


def draw_usage(figure, run, analysis):
    """Shares of the codes on the reference texts by rank, against the prior 1 / rank."""
    activity = analysis["codes"]
    uses = 100 * np.sort(activity["uses"])[::-1] / sum(activity["uses"])  # (C,), %
    rank = np.arange(1, len(uses) + 1)
    axes = figure.subplots()
    axes.bar(rank[uses > 0], uses[uses > 0], color=BLUE, label="codes")
    axes.plot(rank, 100 / rank / (1 / rank).sum(), "o-", color=ORANGE, label="prior: 1 / rank")
    axes.set(yscale="log", xlabel="rank of the code", ylabel="share of chunks (%)",
             title=f"{np.sum(uses > 0)} of {len(uses)} codes used, effectively {activity['effective']:.1f}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend()


def bars(axes, place, values, height=0.8, **look):
    """Horizontal bars at `place` with their intervals; values (mean, low, high) as shares, drawn in %."""
    mean, low, high = 100 * np.array(values).T
    reach = np.maximum((mean - low, high - mean), 0)
    axes.barh(place, mean, height, xerr=reach, error_kw=dict(capsize=3, ecolor="#333333"), **look)


def draw_interventions(figure, run, analysis):
    """Accuracy under the seven conditions."""
    found = analysis["interventions"]
    axes = figure.subplots()
    inks = [BLUE if name == "on" else RED if name.startswith("off") else ORANGE for name in found]
    bars(axes, np.arange(len(found)), [row["strict"] for row in found.values()], color=inks)
    axes.set_yticks(np.arange(len(found)), found)
    axes.invert_yaxis()
    axes.set(xlabel="strict accuracy (%, 95% intervals)",
             title="Codes off change accuracy by {:+.1f} points [{:+.1f}, {:+.1f}]".format(
                 *(100 * value for value in found["off"]["change"])))


def draw_purity(figure, run, analysis):
    """Topic purity of code n-grams and what it has to be held against."""
    found = {int(n): row for n, row in analysis["codes"].get("purity", {}).items() if row}
    if not found:
        return "there is no topic purity to draw"
    n, rows = list(found), list(found.values())
    axes = figure.subplots()
    null = np.array([row["null"] for row in rows]).T
    axes.fill_between(n, *null, color=GREY, alpha=0.4, label="topics exchanged: mean and 95% quantile")
    axes.plot(n, null[0], ":", color=GREY)
    for name, label, ink, style in (("purity", "purity", BLUE, "o-"), ("prior", "topic prior", RED, "s--"),
                                    ("position_matched", "position-matched", ORANGE, "^-.")):
        axes.plot(n, [row[name] for row in rows], style, color=ink, label=label)
    axes.set(xlabel="n, codes in a row", ylabel="share in the n-gram's most frequent topic", xticks=n,
             title=f"Topic purity of code {n[-1]}-grams: {rows[-1]['purity']:.2f}, by chance {null[0, -1]:.2f}")
    axes.legend()


def draw_topics(figure, run, analysis):
    """Accuracy on, off and under random codes for each of the twelve most frequent topics."""
    found = analysis["interventions"]
    topics = list(found["on"]["topics"])[:12]
    if not topics:
        return "its data has no topics"
    figure.set_figheight(max(5, 2 + 0.45 * len(topics)))
    axes = figure.subplots()
    for i, (name, ink) in enumerate({"on": BLUE, "off": RED, "random": ORANGE}.items()):
        bars(axes, np.arange(len(topics)) + 0.27 * (i - 1), [found[name]["topics"][topic] for topic in topics],
             0.27, color=ink, label=name)
    axes.set_yticks(np.arange(len(topics)), topics)
    axes.invert_yaxis()
    gain = {topic: 100 * (found["on"]["topics"][topic][0] - found["off"]["topics"][topic][0]) for topic in topics}
    most, least = max(gain, key=gain.get), min(gain, key=gain.get)
    axes.set(xlabel="strict accuracy (%, 95% intervals)",
             title=f"Codes change accuracy by {gain[most]:+.1f} points in {most}, {gain[least]:+.1f} in {least}")
    figure.legend(loc="outside lower center", ncols=3)


def plots(run, analysis, folder):
    """Draw curves, usage, interventions, purity and topics into `folder` as PNG -> sentences on what was left out."""
    import matplotlib  # slow to import, and generate.py, which only wants colours, does without
    from matplotlib.figure import Figure

    left_out = []
    for draw in (draw_curves, draw_usage, draw_interventions, draw_purity, draw_topics):
        name = draw.__name__.removeprefix("draw_")
        with matplotlib.rc_context({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False}):
            figure = Figure(figsize=(7.5, 5), layout="constrained")
            figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # inches around the axes
            missing = draw(figure, run, analysis)
            if missing:
                left_out.append(f"{run}: {name}.png is not drawn: {missing}.")
            else:
                figure.savefig(Path(folder, f"{name}.png"), dpi=150)
    return left_out


def draw_method(figure, run=None, analysis=None):
    """How DLR works: text in chunks, their codes added at one layer; a step that searches, selects and updates."""
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 15), ylim=(0, 6.6))
    axes.axis("off")
    ink = {2: BLUE, 7: ORANGE, 5: GREEN, 0: RED}  # of codes
    say = lambda x, y, text, **look: axes.text(x, y, text, va="center", **{"ha": "center", "fontsize": 11, **look})
    arrow = lambda start, end, **look: axes.annotate("", end, start, arrowprops=dict(
        arrowstyle="-|>", **{"color": GREY, "linewidth": 1, **look}))

    def box(x, y, width, height, colour, alpha=1.0, edge="none"):
        from matplotlib.patches import FancyBboxPatch

        axes.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.09", edgecolor=edge,
                                      facecolor=(colour, alpha), linewidth=1.5))

    tokens, codes = "Two hens lay 3 eggs each . All : 2x3 = 6".split(), (2, 7, 5)
    x = [0.3 + 0.72 * i + 0.18 * (i // 4) for i in range(len(tokens))]
    for y, words in ((1.25, "the blocks below run once"), (4.15, "the blocks above run once for each code sequence")):
        box(0.25, y, 9.05, 0.7, GREY, 0.2)
        say(4.78, y + 0.35, words)
    for i, token in enumerate(tokens):
        colour, first = ink[codes[i // 4]], i % 4 == 0
        box(x[i], 0.45, 0.66, 0.5, colour, 0.35)
        say(x[i] + 0.33, 0.7, token, weight="bold" if i > 8 else "normal")
        for low, high in ((0.95, 1.25), (3.75, 4.15), (4.85, 5.15)) + (() if first else ((1.95, 3.15),)):
            arrow((x[i] + 0.33, low), (x[i] + 0.33, high))
        axes.plot(x[i] + 0.33, 2.33, "o", color="white", markeredgecolor=colour, markersize=14, zorder=4)
        say(x[i] + 0.33, 2.33, "h", fontsize=10, zorder=5, weight="bold" if first else "normal")
        if first:  # what the router reads
            arrow((x[i] + 0.33, 1.95), (x[i] + 0.33, 2.2))
            arrow((x[i] + 0.33, 2.5), (x[i] + 0.33, 3.15), color=colour, linewidth=3)
            box(x[i], 3.15, 2.82, 0.6, colour, 0.6)
            say(x[i] + 1.41, 3.45, f"code {codes[i // 4]}:  h + \u03b1 e[{codes[i // 4]}]")
            say(x[i] + 0.5, 2.8, "router", ha="left", fontsize=10, zorder=6,
                bbox=dict(facecolor="white", edgecolor="none", pad=1))
    say(0.25, 0.18, "text in chunks of K = 4 tokens (bold: the answer)", ha="left", fontsize=10)
    say(4.78, 5.35, "log p(answer | codes)")
    say(0.25, 6.2, "A code steers each chunk, from one layer on", ha="left", fontsize=13, weight="bold")

    say(9.95, 6.2, "Training: search, select, update", ha="left", fontsize=13, weight="bold")
    say(9.95, 5.55, "1  search: draw N code sequences", ha="left")
    for row, (drawn, score) in enumerate((((2, 0, 5), 3.1), ((2, 7, 5), 2.2), ((7, 2, 0), 4.0), ((2, 7, 0), 2.9))):
        y = 4.85 - 0.5 * row
        for place, code in enumerate(drawn):
            box(10.35 + 0.72 * place, y - 0.19, 0.62, 0.38, ink[code], 0.6)
            say(10.66 + 0.72 * place, y, code)
        say(12.75, y, f"log p = \u2212{score}", ha="left")
    box(10.23, 4.09, 4.3, 0.52, "white", 0.0, edge="black")
    say(9.95, 2.75, "2  select: the likeliest is a*", ha="left")
    say(9.95, 2.1, "3  update LM, codebook, router on", ha="left")
    say(10.35, 1.58, "\u2212 log p(x)  \u2212 log p(x | a*)", ha="left")
    say(10.35, 1.12, "\u2212 \u03b1' log p(a* | x)  + prior", ha="left")
    say(10.35, 0.6, "Without the answer, a chunk takes\nits router's likeliest code.", ha="left", fontsize=10)


def method(folder):
    """Draw how DLR works as `method.png` into `folder`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4))
    draw_method(figure)
    figure.savefig(Path(folder, "method.png"), dpi=150)


def over_n(runs, against):
    """Finished runs nN-METHOD-sSEED -> {METHOD: {N: (mean, s.e., p) of strict accuracy, the same of NLL}}.

    Each is the difference to the method `against`, paired over test examples and seeds; p is that of a t test over
    seeds, after Holm's correction for looking at so many methods at this N. Raises ValueError where runs lack."""
    rows = {}
    for result in map(saved_result, runs):
        found = re.fullmatch(r"n(\d+)-(.+)-s\d+", Path(result.run).name)
        if not found:
            raise ValueError(f"{result.run} is not named nN-METHOD-sSEED, so it has no place on the map.")
        rows.setdefault(int(found[1]), {}).setdefault(found[2], []).append((result, result.main))
    table = {}
    for n, methods in sorted(rows.items()):
        if against not in methods:
            raise ValueError(f"there is no run n{n}-{against}-s* to compare with.")
        others = [name for name in methods if name != against]
        for by in ("strict", "nll"):
            found = {name: paired(methods[name], methods[against], by) for name in others}
            means = {name: (one[0], one[4]) for name, one in found.items() if one}
            if any(np.isnan(error) for _, error in means.values()):
                raise ValueError(f"the map shows spreads over seeds, and n = {n} has methods with one seed alone.")
            t = {name: abs(mean) / max(error, 1e-12) for name, (mean, error) in means.items()}  # 0 for no difference
            seeds = {name: {result.config["seed"] for result, _ in row} for name, row in methods.items()}
            raw = {name: 2 * student.sf(t[name], len(seeds[name] & seeds[against]) - 1) for name in t}
            order, p = sorted(raw, key=raw.get), 0.0
            for i, name in enumerate(order):
                p = max(p, min(1.0, (len(order) - i) * raw[name]))
                table.setdefault(name, {}).setdefault(n, {})[by] = (*means[name], p)
    return table


def as_markdown(table):
    """The table of `over_n` as text: points, NLL; * where Holm's p is below .05."""
    ns = sorted({n for row in table.values() for n in row})

    def cell(by, scale, form, row):
        if by not in row:
            return ""
        mean, error, p = row[by]
        return f"{scale * mean:+{form}} ± {scale * error:{form}}{'*' if p < 0.05 else ''}"

    lines = ["| " + " | ".join(["", *(f"n = {n}, points | NLL" for n in ns)]) + " |", "|---" * (2 * len(ns) + 1) + "|"]
    for name, row in table.items():
        cells = [cell(*look, row.get(n, {})) for n in ns for look in (("strict", 100, ".1f"), ("nll", 1, ".4f"))]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def draw_map(figure, table, against):
    """A panel a method: points more than `against`, by the number of training examples, with a band of one s.e."""
    columns, ticks = min(5, len(table)), sorted({n for row in table.values() for n in row})
    figure.set_size_inches(2.1 * columns + 0.6, 2.1 * -(-len(table) // columns) + 0.6)
    panels = figure.subplots(-(-len(table) // columns), columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, (name, row) in zip(panels, table.items()):
        n, (mean, error) = list(row), 100 * np.array([one["strict"][:2] for one in row.values()]).T
        axes.axhline(0, color=GREY, linewidth=1)
        axes.fill_between(n, mean - error, mean + error, color=BLUE, alpha=0.25)
        axes.plot(n, mean, "o-", color=BLUE)
        axes.set(xscale="log", xlim=(0.7 * ticks[0], 1.4 * ticks[-1]), title=name)
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
        axes.tick_params(labelbottom=True)
    for axes in panels[len(table):]:
        axes.axis("off")
    figure.supxlabel("training examples")
    figure.supylabel(f"points more than {against}")


def map_of_little_data(runs, against, folder):
    """Print how the methods differ from `against` at each n, and draw it as `little_data.png` into `folder`."""
    import matplotlib
    from matplotlib.figure import Figure

    table = over_n(runs, against)
    print(as_markdown(table))
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(layout="constrained")
        draw_map(figure, table, against)
        figure.savefig(Path(folder, "little_data.png"), dpi=120)


def saved_analysis(run):
    """What analyze.py found in a run -> dict. Raises OSError or ValueError where that is missing."""
    read_config(run)
    analysis = json.loads(Path(run, "metrics.json").read_text()).get("analysis", {})
    if not {"interventions", "codes"} <= set(analysis):
        raise ValueError(f"it does not hold yet what is drawn; first run: python analyze.py {run}")
    return analysis


def saved_answers(run, count):
    """The first answers that a run saved with its codes on -> [(pieces of prompt and answer, verdict)].

    Raises OSError or ValueError where the run is not finished, or holds no such answers."""
    config, lines = read_config(run), Path(run, "predictions.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["condition"] == "steered"][:count]
    if not rows or "ids" not in rows[0]:
        raise ValueError(f"it holds no answers given with codes; first run: python eval.py {run} --max-new-tokens 64")
    tokenizer, lm = (auto.from_pretrained(Path(run, "model")) for auto in (AutoTokenizer, AutoConfig))
    model = SimpleNamespace(lm=SimpleNamespace(config=lm))  # all that is needed to cut a long prompt as it was cut
    size = json.loads(Path(run, "model", "dlr_config.json").read_text())["chunk_size"]
    prompts, _ = encode_to_answer(model, tokenizer, [SimpleNamespace(**row) for row in rows], config["max_new_tokens"])
    return [(pieces(tokenizer, ids + row["ids"], len(ids), row["codes"], size),
             "right" if row["strict"] else f"wrong: the answer is {row['answer']}") for ids, row in zip(prompts, rows)]


def parse_args(argv=None):
    """What to draw. -> argparse.Namespace"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"figures.py: {message}; see --help.")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder(s) written by train.py, with codes")
    parser.add_argument("--method", action="store_true", help="draw how the method works, for which --out is enough")
    parser.add_argument("--against", metavar="METHOD", help="draw how runs nN-METHOD-sSEED differ from this METHOD")
    parser.add_argument("--out", metavar="DIR", help="draw PNGs (with several runs: in DIR/<name of the run>)")
    parser.add_argument("--show", type=int, metavar="N", help="print the first N answers in the colours of their codes")
    parser.add_argument("--html", metavar="FILE", help="the same as a page (N: 20 without --show)")
    args = parser.parse_args(argv)
    if args.show is not None and args.show < 1:
        parser.error(f"--show is {args.show}, it must be at least 1")
    if (args.method or args.against) and not args.out:
        parser.error("--method and --against want a folder to draw into: --out DIR")
    if not (args.runs or args.method):
        parser.error("no RUN is given, the folder of a run")
    if not (args.out or args.show or args.html):
        parser.error("nothing is asked for: give --out DIR, --show N or --html FILE")
    return args


def main(argv=None):
    args, sections, left_out = parse_args(argv), [], []
    if args.method:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        method(args.out)
    if args.against:
        try:
            Path(args.out).mkdir(parents=True, exist_ok=True)
            return map_of_little_data(args.runs, args.against, args.out)
        except (OSError, ValueError) as error:
            sys.exit(f"figures.py: {error}")
    for run in args.runs:
        try:
            if args.show or args.html:
                items = saved_answers(run, args.show or 20)
                sections.append(as_html(run, items))
            if args.show:
                print(as_text(run, items, painter(sys.stdout)))
            if args.out:
                folder = Path(args.out, Path(run).name if len(args.runs) > 1 else "")
                analysis = saved_analysis(run)
                folder.mkdir(parents=True, exist_ok=True)
                print("".join(f"{sentence}\n" for sentence in plots(run, analysis, folder)), end="")
        except (OSError, ValueError) as error:
            left_out.append(f"figures.py: {run} is left out: {error}".splitlines()[0])
    if args.html and sections:
        Path(args.html).parent.mkdir(parents=True, exist_ok=True)
        Path(args.html).write_text(PAGE.format("\n".join(sections)), encoding="utf-8")
    if left_out:
        sys.exit("\n".join(left_out))


if __name__ == "__main__":
    main()
