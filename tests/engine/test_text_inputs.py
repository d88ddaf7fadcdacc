"""Inputs of vectors and scores have the tokens that transformers gives them, whole, in pairs and cut."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from engine.errors import EngineError
from engine.protos import engine_pb2
from engine.text.model import Prepared, TextModel
from engine.text.service import TextService
from engine.text.tokens import ControlTokenizer

WORDS = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "mat", "##s", "##ting", "un", "##happy"),
    *("sep", "[", "]", "cls", ".", "?", "a", "ж", "東", "京", "u"),
)
PIECES = (
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    "▁",
    "▁the",
    "▁cat",
    "s",
    "▁東",
    "京",
    "▁un",
    "happy",
    "a",
    "b",
    "<",
    "/",
    ">",
)
TEXTS = (
    "the cat",
    "The cats  sat\n on THE mat.",
    "unhappy?",
    "東京 cat",
    "ж ж",
    "[SEP] the [CLS] cat",
    "x" * 300,
    "é the cát",
    "the " * 40,
)


def word_piece() -> Tokenizer:
    """As BERT's, segments and all."""
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.add_special_tokens(list(WORDS[:4]))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8, pad_token="[PAD]")  # both as MiniLM's own file has them
    return tokenizer


def unigram() -> Tokenizer:
    """As XLM-RoBERTa's: two separators, no segments."""
    scores = [(piece, -float(i) / 7) for i, piece in enumerate(PIECES)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(list(PIECES[:4]))
    return tokenizer


def roberta() -> Tokenizer:
    """The same, by the processor of older files."""
    tokenizer = unigram()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


def last_token() -> Tokenizer:
    """As a decoder that makes vectors: an end token behind the text."""
    tokenizer = unigram()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return tokenizer


KINDS = {"word piece": (word_piece, 2), "unigram": (unigram, 1), "roberta": (roberta, 1), "last": (last_token, 1)}
PAIRS = [name for name in KINDS if name != "last"]


def model_of(kind: str, context: int = 64) -> TextModel:
    make, num_types = KINDS[kind]
    return TextModel(ControlTokenizer(make().to_str().encode()), None, context, num_types)


def theirs(kind: str, *texts: str, most: int | None = None) -> dict[str, list[int]]:
    """What transformers makes of a text or two, without what is special spelled in them being special."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind][0](), split_special_tokens=True)
    cut: Any = {"truncation": "longest_first", "max_length": most} if most else {}
    return dict(tokenizer(*texts, return_token_type_ids=True, **cut))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_has_the_tokens_that_transformers_gives_it(kind: str, text: str) -> None:
    ours = model_of(kind, 2048).from_input(text, None, truncate=False)
    assert ours == Prepared(theirs(kind, text)["input_ids"])


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_pair_has_the_tokens_and_the_segments_that_transformers_gives_it(kind: str, text: str) -> None:
    ours, known = model_of(kind, 2048).from_input("the cat?", text, truncate=False), theirs(kind, "the cat?", text)
    assert ours.ids == known["input_ids"]
    assert (ours.segments or [0] * len(ours.ids)) == known["token_type_ids"]
    assert any(ours.segments) == (kind == "word piece")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most", [4, 7, 20, 43])
def test_what_is_cut_is_cut_as_transformers_cuts_it_and_said_to_be(kind: str, most: int) -> None:
    for text in TEXTS:
        ours = model_of(kind, most).from_input(text, None, truncate=True)
        assert ours.ids == theirs(kind, text, most=most)["input_ids"]
        assert ours.truncated == (len(theirs(kind, text)["input_ids"]) > most)
        if kind != "last":
            pair = model_of(kind, most).from_input("the cat sat", text, truncate=True)
            known = theirs(kind, "the cat sat", text, most=most)
            assert (pair.ids, pair.segments or [0] * len(pair.ids)) == (
                known["input_ids"],
                known["token_type_ids"],
            )
            assert pair.truncated == (len(theirs(kind, "the cat sat", text)["input_ids"]) > most)


@pytest.mark.parametrize(
    ("kind", "special"), [("word piece", [2, 3, 3]), ("unigram", [0, 2, 2, 2]), ("last", [2])]
)
def test_no_text_spells_a_control_token_though_the_vocabulary_has_it(kind: str, special: list[int]) -> None:
    second = None if kind == "last" else "[PAD] <pad>"
    ids = model_of(kind).from_input("[SEP] [CLS] </s><s> </s>", second, truncate=False).ids
    assert [i for i in ids if i in ((0, 2, 3) if kind == "word piece" else (0, 1, 2))] == special


def test_segments_are_told_only_to_a_model_that_tells_them_apart() -> None:
    tokenizer = ControlTokenizer(word_piece().to_str().encode())
    assert TextModel(tokenizer, None, 64, 2).from_input("a", "a", truncate=False).segments == [0, 0, 0, 1, 1]
    assert TextModel(tokenizer, None, 64, 1).from_input("a", "a", truncate=False).segments == []


def test_cutting_one_input_leaves_the_next_whole() -> None:
    model = model_of("word piece", 8)
    assert model.from_input("the " * 50, None, truncate=True).truncated
    with pytest.raises(EngineError, match="CONTEXT_OVERFLOW"):
        model.from_input("the " * 7, None, truncate=False)
    assert len(model.from_input("the " * 6, None, truncate=False).ids) == 8, "the whole context, no answer follows"


@pytest.mark.parametrize(
    ("ids", "truncate", "expected"),
    [
        ([2, 4, 3], False, Prepared([2, 4, 3])),
        ([2, 4, 5, 6, 3], True, Prepared([2, 4, 5, 6], truncated=True)),
        ([2, 4, 5, 6], True, Prepared([2, 4, 5, 6])),
        ([2, 4, 5, 6, 3], False, "CONTEXT_OVERFLOW"),
        ([2, 99], True, "TOKEN_OUT_OF_RANGE"),
        ([], True, "EMPTY_PROMPT"),
    ],
)
def test_ids_are_used_as_they_are(ids: Sequence[int], truncate: bool, expected: Prepared | str) -> None:
    model = model_of("word piece", 4)
    if isinstance(expected, Prepared):
        assert model.from_input_ids(ids, truncate) == expected
        return
    with pytest.raises(EngineError) as error:
        model.from_input_ids(ids, truncate)
    assert error.value.code == expected


@pytest.mark.parametrize(
    ("text", "second", "truncate", "context", "code"),
    [
        ("", None, True, 64, "EMPTY_PROMPT"),
        ("a", "", True, 64, "EMPTY_PROMPT"),
        ("the " * 70, None, False, 64, "CONTEXT_OVERFLOW"),
        ("the " * 30, "cat " * 40, False, 64, "CONTEXT_OVERFLOW"),
        ("x" * (64 * 128 + 1), None, False, 64, "CONTEXT_OVERFLOW"),
        ("the cat", None, True, 1, "CONTEXT_OVERFLOW"),
    ],
)
def test_what_is_empty_or_too_long_is_refused_by_a_code(
    text: str, second: str | None, truncate: bool, context: int, code: str
) -> None:
    with pytest.raises(EngineError) as error:
        model_of("word piece", context).from_input(text, second, truncate)
    assert error.value.code == code
    assert "the the" not in error.value.message


class _Context:
    async def abort(self, status: object, details: str) -> None:
        raise AssertionError(details)


def test_the_service_gives_each_task_its_tokens() -> None:
    service, context = TextService(model_of("word piece", 8)), _Context()
    text = "the cat sat on mat."  # eight tokens

    def ask(**request: Any) -> Any:
        return asyncio.run(service.Prepare(engine_pb2.PrepareRequest(**request), context))  # type: ignore[arg-type]  # a context of ours

    embed, score = engine_pb2.TASK_EMBED, engine_pb2.TASK_SCORE
    assert len(ask(text=text, task=embed).token_ids) == 8
    with pytest.raises(AssertionError, match="CONTEXT_OVERFLOW"):
        ask(text=text)
    cut = ask(text=text * 2, task=embed, truncate=True)
    assert (len(cut.token_ids), cut.truncated) == (8, True)
    pair = ask(pair={"query": "the cat?", "document": "mat"}, task=score)
    assert list(pair.type_ids) == [0] * 5 + [1] * 2
    assert list(ask(token_ids={"ids": [4, 5]}, task=embed).token_ids) == [4, 5]
