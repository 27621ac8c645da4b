"""Every family of causal LMs that the installed transformers knows: is it steered exactly, or refused?

Each is built tiny, with random weights, and wrapped. Then it has to be

    exact    logits under padding on the left, greedy generation with a cache and the searches agree with a re-statement
             that has neither padding nor cache nor trunk: one text, a hook on one block, one chunk after the other;
    refused  by `DLRModel(lm)`, with a ValueError of its own.

A number that is wrong, or any other exception, is a failure: the exit status is 1. Searches that resume (beam, exact,
response) may refuse on their own. A random LM answers other than a trained one would, but in the same way.

    python tests/families.py               # all of them, as a table in Markdown: a minute on one core
    python tests/families.py gpt_neo bert  # these
"""
import re
import signal
import sys
import traceback
import warnings
from collections import Counter, defaultdict
from datetime import date
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dlr import DLRModel, find_blocks
from search import beam_search, response_search

C, K, SCALE, NEW = 5, 2, 2.0, 4  # codes, tokens a chunk, alpha, tokens generated
TOLERANCE = 2e-5  # of the largest logit, in float32
LOOSE = {"nemotron_h": 1e-3, "zamba2": 1e-3}  # what these compute in a scan and step by step differs by 2e-4
SECONDS = 30  # of computing, for one family

# A config takes of these what it knows. Windows are shorter than the texts, except where an LM's own cache forgets what
# its own mask still shows: sparse attention (index_topk) and moshi.
TINY = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    intermediate_size=48, max_position_embeddings=64, initializer_range=0.2, sliding_window=4, attention_chunk_size=4,
    rotary_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, vocab_size_per_layer_input=64, unpadded_vocab_size=64,
    encoder_layers=4, decoder_layers=4, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    # experts
    num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    shared_expert_intermediate_size=16, n_group=1, topk_group=1,
    # latent and sparse attention
    q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, qk_head_dim=16,
    index_topk=64, index_n_heads=2, index_head_dim=16,
    # recurrent blocks
    state_size=8, mamba_d_state=8, mamba_n_heads=8, mamba_d_head=8, mamba_d_ssm=64, linear_num_key_heads=2,
    linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, time_step_rank=4,
)
MIXED = ["linear_attention", "full_attention"] * 2
ROPE = dict(rope_type="default", rope_theta=1e4)
SLIDING = ["sliding_attention", "full_attention"] * 2
EXTRA = {  # what a family needs beyond that to be built, and to have blocks of all its kinds, attention last
    "bailing_hybrid": dict(layer_types=MIXED),
    "bamba": dict(attn_layer_indices=[1, 3]),
    "cohere_compass_text": dict(layer_types=SLIDING, rope_parameters={kind: ROPE for kind in SLIDING}),
    "dbrx": dict(d_model=32, attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8),
                 ffn_config=dict(ffn_hidden_size=48)),
    "dots1": dict(n_shared_experts=1),
    "gemma3n_text": dict(num_kv_shared_layers=0, layer_types=SLIDING),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]], window_size=4),
    "granitemoehybrid": dict(layer_types=MIXED),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "kimi_linear": dict(layer_types=MIXED),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 2),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
    "mamba2": dict(num_heads=8),
    "mllama_text_model": dict(cross_attention_layers=[1]),
    "nemotron_h": dict(layers_block_type=["linear_attention", "moe", "mlp", "full_attention"]),
    "moshi": dict(sliding_window=64),
    "qwen4_exp_text": dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=4,
                           indexer_compress_ratio=2),
    "reformer": dict(is_decoder=True, axial_pos_embds_dim=[16, 16]),
    "xlnet": dict(d_head=8),
    "zamba": dict(layers_block_type=["linear_attention", "hybrid"] * 2),
    "zamba2": dict(layers_block_type=["mamba", "hybrid"] * 2),
    "zaya": dict(num_experts_per_tok=1),
}


class TooSlow(BaseException):
    """Not an Exception: nothing on the way may take it for the LM's."""


def build(family):
    """-> the family's LM with a tiny config and random weights, in eval mode."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(_tiny(CONFIG_MAPPING[family], EXTRA.get(family, {}))).eval()
    for weight in lm.parameters():  # large ones, so that tokens do look at each other
        if weight.dim() > 1 and 0 < weight.std() < 0.2:
            weight.data *= 0.3 / weight.std()
    return lm


def _tiny(cls, extra):
    default = cls()
    settings = {name: value for name, value in TINY.items() if _takes(default, name)}
    if _takes(default, "kv_lora_rank"):
        settings["num_key_value_heads"] = TINY["num_attention_heads"]
    for name in cls.sub_configs:
        part = getattr(default, name, None)
        if part is not None and _takes(part, "num_hidden_layers"):
            settings[name] = _tiny(type(part), EXTRA.get(part.model_type, {})).to_dict()
    return cls(**{**settings, **extra})


def _takes(config, name):
    try:
        value = getattr(config, name)
    except (AttributeError, NotImplementedError):
        return False
    except Exception:  # heterogeneous: its value depends on the layer
        return True
    try:
        setattr(config, name, value)
    except (AttributeError, NotImplementedError):
        return False
    return True


def restate(model, text, codes=None):
    """One text (T,), steered by codes (M,) or, where they are None, by the router's -> logits (T, V), codes used."""
    used, passes = [], []
    blocks = model.lm.get_submodule(find_blocks(model.lm))

    def steer(block, args, output):
        passes.append(block)
        hidden = (output if torch.is_tensor(output) else output[0]).clone()  # (1, T, H)
        for start in range(0, len(text), K):
            code = (model.router.weight @ hidden[0, start]).argmax() if codes is None else codes[start // K]
            hidden[0, start : start + K] += SCALE * model.codebook[code]
            used.append(int(code))
        return hidden if torch.is_tensor(output) else (hidden, *output[1:])

    hook = blocks[len(blocks) // 2].register_forward_hook(steer)
    try:
        logits = model.lm(input_ids=text[None], use_cache=False).logits[0]
    finally:
        hook.remove()
    if len(passes) != 1:
        raise AssertionError(f"a forward runs block {len(blocks) // 2} {len(passes)} times")
    return logits, used


def _apart(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1))


@torch.no_grad()
def hold_to_restatement(model, of_generation=TOLERANCE):
    """Raise AssertionError where `model` differs from `restate` -> the ValueError of searches that resume, or None."""
    def hold(what, found, wanted, tolerance=TOLERANCE):
        if not _apart(found, wanted) <= tolerance:  # NaN as well
            raise AssertionError(f"{what} differ by {_apart(found, wanted):.1g} of the largest")

    torch.manual_seed(1)
    model.codebook.normal_()
    model.router.weight.normal_()
    texts = [torch.randint(3, 60, (length,)) for length in (7, 4)]
    ids, mask = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, -len(text) :], mask[row, -len(text) :] = text, 1
    given = torch.tensor([[0, 1, 2, 3], [4, 0, 1, 2]])
    last = [restate(model, texts[0], codes)[0][-1] for codes in (given[0], torch.tensor([0, 1, 4, 3]))]
    if _apart(*last) < 5 * TOLERANCE:
        raise AssertionError("no code steers the tokens of later chunks: too tiny to show anything")
    steered, routed = model(ids, mask, codes=given).logits, model(ids, mask).logits
    off = model(ids, mask, codes=torch.full_like(given, -1)).logits
    out = model.generate(ids, mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, output_logits=True,
                         return_dict_in_generate=True)
    for row, text in enumerate(texts):
        tokens = slice(7 - len(text), None)
        hold("logits without codes", off[row, tokens], model.lm(input_ids=text[None], use_cache=False).logits[0])
        hold("logits with given codes", steered[row, tokens], restate(model, text, given[row])[0])
        hold("logits with routed codes", routed[row, tokens], restate(model, text)[0])
        logits, codes = restate(model, torch.cat([text, out.sequences[row, 7:-1]]))
        hold("logits of generated tokens", torch.stack([step[row] for step in out.logits]), logits[-NEW:],
             of_generation)
        if model.last_codes[row, : len(codes)].tolist() != codes:
            raise AssertionError(f"codes of generation are {model.last_codes[row].tolist()}, not {codes}")
    response = mask.bool() & (torch.arange(7) > 3)
    trunk, labels = model.trunk(ids, mask), ids.masked_fill(~response, -100)
    try:
        found = [beam_search(model, trunk, labels, width=2), response_search(model, trunk, labels, rollouts=2)]
    except ValueError as error:
        return error
    for result in found:
        for row, text in enumerate(texts):
            for codes, score in zip(result.rollouts[row], result.log_likelihood[row]):
                log_p = restate(model, text, codes)[0][:-1].log_softmax(-1).gather(1, text[1:, None])
                hold("scores of a search", score, log_p[response[row, 7 - len(text) + 1 :]].sum())


def _in_general(lm, error):
    """The sentence of a ValueError that dlr.py or search.py raised, without what is this LM's alone; others go on."""
    if Path(traceback.extract_tb(error.__traceback__)[-1].filename).name not in ("dlr.py", "search.py"):
        raise error
    version = f" (transformers {transformers.__version__})"
    sentence = str(error).replace(version, "").replace(type(lm).__name__, "this LM")
    return re.sub(r" by \S+, more than rounding \(\S+\)", "", re.sub(r"\w+(Encoder|AudioModel)", r"its \1", sentence))


def examine(family):
    """-> "exact", "refused", "not built" or "FAILED", and why."""
    try:
        lm = build(family)
    except Exception as error:
        return "not built", _first_line(error)
    try:
        try:
            model = DLRModel(lm, num_codes=C, chunk_size=K, scale=SCALE).eval()
        except ValueError as error:
            return "refused", _in_general(lm, error)
        refused = hold_to_restatement(model, LOOSE.get(family, TOLERANCE))
        return "exact", "" if refused is None else _in_general(lm, refused)
    except Exception as error:
        return "FAILED", _first_line(error)


def _first_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def main():
    """The command: examine the families named, or all, print the table -> whether none failed."""
    def stop(*_):
        raise TooSlow

    signal.signal(signal.SIGPROF, stop)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows, counts = defaultdict(list), Counter()
    for family in sys.argv[1:] or FAMILIES:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            result = examine(family)
        except TooSlow:
            result = "skipped", f"takes more than {SECONDS} seconds"
        signal.setitimer(signal.ITIMER_PROF, 0)
        rows[result].append(family)
        counts[result[0]] += 1
    print(f"transformers {transformers.__version__}, {date.today()}: {sum(counts.values())} families, "
          + ", ".join(f"{n} {result}" for result, n in counts.most_common()) + ".\n")
    print("| result | families | because |\n|---|---|---|")
    for (result, why), families in sorted(rows.items(), key=lambda row: (row[0][0], -len(row[1]))):
        print(f"| {result} | {', '.join(families)} | {why.replace('|', '/')} |")
    return not counts["FAILED"]


if __name__ == "__main__":
    sys.exit(not main())
