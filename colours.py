"""A text in the colours of the codes that steer it: for a terminal, for a pipe or a file, and for a browser.

`pieces` cuts a text into chunks; `ansi`, `bracketed` and `span` paint one chunk; `painted` joins them again.
"""
import html
import itertools
import os

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
