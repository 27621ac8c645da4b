import families
import pytest
from dlr import DLRModel


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "gpt_neox", "bloom", "llama", "qwen3", "gemma3_text", "mixtral",
                                    "mamba", "qwen3_next", "minimax"])
def test_a_family_is_steered_exactly(family):
    """Logits, generation and searches against the re-statement: tuples, ALiBi, windows, experts, recurrent blocks."""
    assert families.examine(family)[0] == "exact", families.examine(family)


@pytest.mark.parametrize("family", ["bert", "bart", "xlstm", "gemma3n_text", "deepseek_v4"])
def test_a_family_is_refused_in_one_sentence(family):
    """No chunks of a text that looks ahead, of two streams of states, or whose own padding moves it."""
    result, why = families.examine(family)
    assert result == "refused" and why.endswith("."), why


def test_the_restatement_notices_a_wrong_scale():
    model = DLRModel(families.build("llama"), num_codes=families.C, chunk_size=families.K, scale=families.SCALE * 1.01)
    with pytest.raises(AssertionError, match="given codes"):
        families.hold_to_restatement(model.eval())
