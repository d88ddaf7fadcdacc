"""Streamed text equals the text decoded whole, character by character, and stop strings are found anywhere."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from engine.detokenizer import Detokenizer, Vocabulary
from engine.errors import EngineError
from engine.request import StopCriteria
from tests.engine.tiny import byte_tokenizer

SPOKEN = "Grüße, naïve 東京 🙂👩‍👩‍👧 — Ω\u0301 end"


def metaspace_tokenizer(decoder: object = None) -> Tokenizer:
    """A Llama 2 style tokenizer: words with a marked space, and a token for every byte."""
    words = ["▁the", "▁ward", "▁", "Grü", "ße", "東", "a", "▁▁", "🙂", "</p>"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoder or decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


BYTE_LEVEL = byte_tokenizer()
BYTE_LEVEL.add_tokens([AddedToken("<think> ö", special=False)])
METASPACE = metaspace_tokenizer()


def vocabulary(tokenizer: Tokenizer, surplus: int = 3) -> Vocabulary:
    return Vocabulary(tokenizer.to_str().encode(), tokenizer.get_vocab_size() + surplus)


VOCABULARIES = {id(tokenizer): vocabulary(tokenizer) for tokenizer in (BYTE_LEVEL, METASPACE)}


def stream(
    tokenizer: Tokenizer, tokens: list[int], *stops: str, include: bool = False, least: int = 0
) -> list[str]:
    """The pieces of an answer, the flushed one last; none after a stop."""
    stop = StopCriteria(len(tokens) + 1, strings=stops, include_stop=include, min_tokens=least)
    detokenizer = Detokenizer(VOCABULARIES[id(tokenizer)], stop)
    pieces = []
    for token in tokens:
        piece = detokenizer.push(token)
        pieces.append(piece.text)
        if piece.stop:
            return pieces
    return [*pieces, detokenizer.flush().text]


@settings(deadline=None)
@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() + 2), max_size=40))
def test_any_byte_level_tokens_stream_to_what_they_decode_to_whole(tokens: list[int]) -> None:
    assert "".join(stream(BYTE_LEVEL, tokens)) == BYTE_LEVEL.decode(tokens)


@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_text_streams_in_whole_characters_through_bytes(text: str) -> None:
    tokens = [METASPACE.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    pieces = stream(METASPACE, tokens)
    assert "".join(pieces) == text
    assert "\ufffd" in text or "\ufffd" not in "".join(pieces)


@settings(deadline=None)
@given(st.lists(st.sampled_from(range(259, METASPACE.get_vocab_size())), max_size=20))
def test_metaspace_words_stream_as_the_continuation_of_a_prompt(tokens: list[int]) -> None:
    prompt = [METASPACE.token_to_id("a")]
    assert "a" + "".join(stream(METASPACE, tokens)) == METASPACE.decode(prompt + tokens)


def test_no_piece_holds_half_a_character() -> None:
    tokens = [METASPACE.token_to_id(f"<0x{byte:02X}>") for byte in SPOKEN.encode()]
    for piece in stream(METASPACE, tokens):
        assert "\ufffd" not in piece
    whole = BYTE_LEVEL.encode(SPOKEN).ids
    assert "".join(stream(BYTE_LEVEL, whole)) == SPOKEN
    assert all("\ufffd" not in piece for piece in stream(BYTE_LEVEL, whole))


def test_an_unfinished_character_is_replaced_at_the_end_and_only_there() -> None:
    tokens = BYTE_LEVEL.encode("ok🙂").ids[:-1]
    pieces = stream(BYTE_LEVEL, tokens)
    assert "".join(pieces[:-1]) == "ok"
    assert pieces[-1] == "\ufffd"


def test_special_tokens_and_ids_beyond_the_tokenizer_have_no_text() -> None:
    tokens = BYTE_LEVEL.encode("ab").ids
    surplus = BYTE_LEVEL.get_vocab_size() + 2
    assert "".join(stream(BYTE_LEVEL, [0, *tokens, 1, surplus])) == "ab"


def test_a_stop_string_across_tokens_is_found_and_nothing_of_it_leaves() -> None:
    tokens = [BYTE_LEVEL.encode(character).ids[0] for character in "one STOp STOP two"]
    assert "".join(stream(BYTE_LEVEL, tokens, "STOP")) == "one STOp "
    assert "".join(stream(BYTE_LEVEL, tokens, "STOP", include=True)) == "one STOp STOP"
    assert stream(BYTE_LEVEL, tokens, "STOP")[4:8] == ["", "", "", "STOp"]  # held back while it could be a stop


def test_the_stop_string_that_ends_first_wins() -> None:
    tokens = [BYTE_LEVEL.encode(character).ids[0] for character in "abcdef"]
    assert "".join(stream(BYTE_LEVEL, tokens, "bcde", "cd")) == "ab"
    assert "".join(stream(BYTE_LEVEL, tokens, "d", "bcd")) == "a"


def test_a_stop_string_that_never_completes_is_delivered_at_the_end() -> None:
    tokens = BYTE_LEVEL.encode("to be STO").ids
    assert "".join(stream(BYTE_LEVEL, tokens, "STOP")) == "to be STO"


@settings(max_examples=200, deadline=None)
@given(st.text("ab🙂", max_size=20), st.lists(st.text("ab🙂", min_size=1, max_size=4), min_size=1, max_size=3))
def test_streaming_cuts_where_a_search_of_the_whole_text_would(text: str, stops: list[str]) -> None:
    rng = random.Random(text)
    tokens = (
        [t for c in text for t in BYTE_LEVEL.encode(c).ids] if rng.random() < 0.5 else BYTE_LEVEL.encode(text).ids
    )
    ends = [(end, -len(stop)) for end in range(len(text) + 1) for stop in stops if text[:end].endswith(stop)]
    expected = text if not ends else text[: min(ends)[0] + min(ends)[1]]
    # One token may complete several stops at once; the earliest end wins all the same.
    assert "".join(stream(BYTE_LEVEL, tokens, *stops)) == expected


@settings(max_examples=200, deadline=None)
@given(
    st.text("ab🙂", max_size=20),
    st.lists(st.text("ab🙂", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(0, 20),
)
def test_a_stop_string_counts_once_its_last_character_comes_late_enough(
    text: str, stops: list[str], least: int
) -> None:
    tokens = [BYTE_LEVEL.encode(c).ids for c in text]
    flat = [token for of_character in tokens for token in of_character]
    least = min(least, len(flat))
    written = [sum(map(len, tokens[:end])) for end in range(len(text) + 1)]
    ends = [
        (end, -len(stop))
        for end in range(1, len(text) + 1)
        for stop in stops
        if text[:end].endswith(stop) and written[end] >= least
    ]
    expected = text if not ends else text[: min(ends)[0] + min(ends)[1]]
    assert "".join(stream(BYTE_LEVEL, flat, *stops, least=least)) == expected


@pytest.mark.parametrize(
    "decoder", [decoders.WordPiece(), decoders.Sequence([decoders.Replace("_", " "), decoders.Fuse()])], ids=str
)
def test_a_decoder_that_is_not_understood_is_refused(decoder: object) -> None:
    with pytest.raises(EngineError, match="TOKENIZER_UNSUPPORTED"):
        vocabulary(metaspace_tokenizer(decoder))


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", json.dumps({"decoder": None}).encode()])
def test_a_broken_tokenizer_file_is_refused(content: bytes) -> None:
    with pytest.raises(EngineError, match="TOKENIZER_UNSUPPORTED"):
        Vocabulary(content, 10)


def test_a_metaspace_decoder_gives_words_their_spaces() -> None:
    tokenizer = metaspace_tokenizer(decoders.Metaspace())
    words = vocabulary(tokenizer)
    assert words[tokenizer.token_to_id("▁ward")] == b" ward"
