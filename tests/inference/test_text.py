"""Text by pieces: whole characters, spaces, stop strings."""

import numpy as np
import pytest

from support.models import VOCAB
from tinyllama_jax.data.tokenizer import load_tokenizer
from tinyllama_jax.inference.text import Continuation, as_they_come, make_stop

TEXT = "A mesh of  4\n\tna\u00efve caf\u00e9s: \U0001f600\u4e2d\u6587 \u20ac5.\nEND and END"


@pytest.fixture(scope="module")
def tokenizer(data):
    return load_tokenizer(data.tokenizer)


def pieces(tokenizer, prompt, ids, stops=()):
    """What is shown after each id, and at the end."""
    text = Continuation(tokenizer, prompt, stops)
    return [text.add([token]) for token in ids] + [text.add([], last=True)]


@pytest.mark.parametrize("cut", [0, 1, 7, 18, 25])
def test_pieces_join_to_the_text_and_none_holds_half_a_character(tokenizer, cut):
    """Wherever the prompt ends, in the middle of a character too."""
    ids = tokenizer.encode(TEXT)
    shown = pieces(tokenizer, ids[:cut], ids[cut:])
    assert Continuation(tokenizer, ids[:cut]).prompt + "".join(shown) == TEXT
    assert "\ufffd" not in "".join(shown)
    assert sum(map(bool, shown)) > 15, "by and by"


def test_ids_that_are_no_text_join_to_what_sentencepiece_makes_of_them(tokenizer):
    rng = np.random.default_rng(0)
    for _ in range(300):
        # Mostly bytes, few of which make a character.
        ids = rng.integers(0, VOCAB if rng.random() < 0.3 else 259, 30).tolist()
        cut = int(rng.integers(1, 30))
        text = Continuation(tokenizer, ids[:cut])
        shown = "".join(pieces(tokenizer, ids[:cut], ids[cut:]))
        assert text.prompt + shown == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("stops", "wanted"),
    [
        (["END"], TEXT[: TEXT.index("END")]),
        (["ND and", "zzz", "D a"], TEXT[: TEXT.index("ND and")]),
        (["\u6587 "], TEXT[: TEXT.index("\u6587")]),
        (["END and ENDS", "nowhere"], TEXT),
        ([" of"], "A mesh"),
        (["A mesh", "caf"], "A mesh of  4\n\tna\u00efve "),
    ],
)
def test_a_stop_string_ends_the_text_and_no_part_of_it_is_shown(tokenizer, stops, wanted):
    ids = tokenizer.encode(TEXT)
    prompt = tokenizer.encode("A mesh")
    assert ids[: len(prompt)] == prompt
    shown = pieces(tokenizer, prompt, ids[len(prompt) :], stops)
    assert "A mesh" + "".join(shown) == wanted
    stop, new = make_stop(tokenizer, stops), ids[len(prompt) :]
    assert stop
    ends = [n for n in range(1, len(new) + 1) if stop(new[:n])]
    assert (ends == []) == (wanted == TEXT)
    if ends:  # by the token that makes the string whole
        assert not stop(new[: ends[0] - 1])


def test_a_terminal_shows_the_first_text_as_it_comes_and_then_the_others(tokenizer):
    prompts = [tokenizer.encode(text) for text in ("A mesh", "def")]
    new = [tokenizer.encode("A mesh of four")[len(prompts[0]) :], tokenizer.encode(" f\u00e9")]
    chunks = [[[token] for token in pair] for pair in zip(*new, strict=False)]
    parts = list(as_they_come(tokenizer, prompts, chunks))
    assert len(parts) == len(chunks) + 2
    length = len(chunks)
    whole = [tokenizer.decode(a + b[:length]) for a, b in zip(prompts, new, strict=True)]
    assert "".join(parts) == f"{whole[0]}\n---\n{whole[1]}\n"
    assert parts[0].startswith("A mesh") and "def" not in "".join(parts[:-1])
