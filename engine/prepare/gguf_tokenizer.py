"""A tokenizer.json from a GGUF file's vocabulary, where it splits text exactly as the model's own tokenizer does.

Byte-level BPE is taken where its pre-tokenizer is known by name; SentencePiece's BPE, whose merges follow from the
scores, as transformers converts it. Any other kind is refused by name: a tokenizer that nearly fits makes a model
worse and shows it nowhere.

Source: ggml, docs/gguf.md (tokenizer.ggml.*); llama.cpp, llama-vocab.cpp (names of pre-tokenizers); the
tokenizer.json of the models that these names come from; Kudo and Richardson, "SentencePiece", EMNLP 2018.
"""

from typing import Any, NamedTuple

from engine.errors import EngineError
from engine.prepare.gguf_metadata import Metadata

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3, _QWEN2 = _WORDS.format(digits=r"\p{N}{1,3}"), _WORDS.format(digits=r"\p{N}")
_SPACE = "▁"
_LONGEST_PIECE = 512


class _Splitting(NamedTuple):
    """How text is cut before merging.

    Attributes:
        patterns: regular expressions, one after another.
        nfc: text is normalised first.
        ignore_merges: a piece that is a token as a whole is that token.
        bos: whether the begin token is added where the file does not say.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    bos: bool = False


_SPLITTING = {
    "gpt-2": _Splitting((_GPT2,)),
    "llama-bpe": _Splitting((_LLAMA3,), ignore_merges=True, bos=True),
    "qwen2": _Splitting((_QWEN2,), nfc=True),
    "smollm": _Splitting((r"\p{N}", _GPT2)),
    "starcoder": _Splitting((r"\p{N}", _GPT2)),
    "refact": _Splitting((r"\p{N}", _GPT2)),
}


class TokenizerFiles(NamedTuple):
    """What is written of a tokenizer.

    Attributes:
        document: tokenizer.json.
        settings: tokenizer_config.json.
        template: chat_template.jinja; empty where there is none.
        eos: ids that end an answer.
        bos: id that begins a text, or None.
        size: tokens that the file lists.
    """

    document: dict[str, Any]
    settings: dict[str, Any]
    template: str
    eos: tuple[int, ...]
    bos: int | None
    size: int


def read_tokenizer(metadata: Metadata) -> TokenizerFiles:
    """The tokenizer of a file.

    Raises:
        EngineError: GGUF_TOKENIZER, a kind or a pre-tokenizer that is not converted exactly; GGUF_INVALID.
    """
    kind = metadata.text("tokenizer.ggml.model")
    tokens, types = _vocabulary(metadata)
    if kind == "gpt2":
        document, bos_default = _byte_level(metadata, tokens, types)
    elif kind == "llama":
        document, bos_default = _sentence_piece(metadata, tokens, types), True
    else:
        raise EngineError("GGUF_TOKENIZER", f"tokenizer.ggml.model {kind[:40]!a}; converted are gpt2 and llama")
    special = {
        name: _token_id(metadata, name, len(tokens)) for name in ("bos", "eos", "eot", "padding", "unknown")
    }
    document["post_processor"] = _post_processor(metadata, tokens, special, bos_default)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for name, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        number = special[theirs]
        if number is not None:
            settings[f"{name}_token"] = tokens[number]
    eos = dict.fromkeys(number for name in ("eos", "eot") if (number := special[name]) is not None)
    if not eos:
        raise EngineError("GGUF_INVALID", "tokenizer.ggml.eos_token_id is missing: no answer would end")
    return TokenizerFiles(
        document, settings, metadata.text("tokenizer.chat_template", ""), tuple(eos), special["bos"], len(tokens)
    )


def _vocabulary(metadata: Metadata) -> tuple[list[str], list[int]]:
    tokens = metadata.texts("tokenizer.ggml.tokens")
    types = metadata.numbers("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if not tokens or len(set(tokens)) != len(tokens) or len(types) != len(tokens):
        raise EngineError(
            "GGUF_INVALID", "the vocabulary is empty, repeats a token, or has no type for each token"
        )
    unknown = next((t for t in types if t not in (_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE)), None)
    if unknown is not None:
        raise EngineError("GGUF_INVALID", f"a token of the unknown type {unknown}")
    return tokens, types


def _byte_level(metadata: Metadata, tokens: list[str], types: list[int]) -> tuple[dict[str, Any], bool]:
    name = metadata.text("tokenizer.ggml.pre", "")
    splitting = _SPLITTING.get(name)
    if splitting is None:
        raise EngineError(
            "GGUF_TOKENIZER",
            f"the pre-tokenizer {name[:40]!a} is not one of {', '.join(sorted(_SPLITTING))}; convert the model "
            "from its own folder, which has its tokenizer",
        )
    if metadata.flag("tokenizer.ggml.add_space_prefix", False):
        raise EngineError("GGUF_TOKENIZER", "a byte-level tokenizer that adds a space before a text")
    vocabulary = {text: i for i, (text, kind) in enumerate(zip(tokens, types, strict=True)) if kind != _UNUSED}
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in splitting.patterns
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = {
        "type": "BPE",
        "vocab": vocabulary,
        "merges": _merges(metadata, vocabulary),
        "ignore_merges": splitting.ignore_merges,
    }
    document = _document(tokens, types, model)
    document["normalizer"] = {"type": "NFC"} if splitting.nfc else None
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*splits, level]}
    document["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return document, splitting.bos


def _merges(metadata: Metadata, vocabulary: dict[str, int]) -> list[list[str]]:
    """The merges as pairs; each of tokens that are there, and making one."""
    merges = [merge.split(" ") for merge in metadata.texts("tokenizer.ggml.merges")]
    for merge in merges:
        if len(merge) != 2 or not all(part in vocabulary for part in (*merge, "".join(merge))):
            raise EngineError("GGUF_INVALID", "tokenizer.ggml.merges has one that its vocabulary does not know")
    return merges


def _sentence_piece(metadata: Metadata, tokens: list[str], types: list[int]) -> dict[str, Any]:
    scores = metadata.numbers("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise EngineError("GGUF_INVALID", "tokenizer.ggml.scores has no score for each token")
    if metadata.flag("tokenizer.ggml.remove_extra_whitespaces", False):
        raise EngineError("GGUF_TOKENIZER", "a SentencePiece tokenizer that removes spaces")
    prefix = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    unknown = [text for text, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN]
    if len(unknown) != 1:
        raise EngineError("GGUF_INVALID", f"{len(unknown)} tokens for the unknown, where there is one")
    model = {
        "type": "BPE",
        "unk_token": unknown[0],
        "fuse_unk": True,
        "byte_fallback": _BYTE in types,
        "vocab": {text: i for i, text in enumerate(tokens)},
        "merges": _scored_merges(tokens, types, scores),
    }
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    document = _document(tokens, types, model)
    if prefix:
        document["normalizer"] = {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": _SPACE}, spaces],
        }
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    else:
        document["normalizer"] = spaces
    document["decoder"] = {"type": "Sequence", "decoders": back}
    return document


def _scored_merges(tokens: list[str], types: list[int], scores: list[Any]) -> list[list[str]]:
    """Every way to make a piece, the best piece first: SentencePiece merges the pair whose whole scores best."""
    normal = {text: i for i, (text, kind) in enumerate(zip(tokens, types, strict=True)) if kind == _NORMAL}
    found = [
        (-scores[i], i, normal[text[:at]], normal[text[at:]])
        for text, i in normal.items()
        if len(text) <= _LONGEST_PIECE
        for at in range(1, len(text))
        if text[:at] in normal and text[at:] in normal
    ]
    return [[tokens[left], tokens[right]] for _, _, left, right in sorted(found)]


def _document(tokens: list[str], types: list[int], model: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json with its added tokens: control tokens are special, user's own are found in text first."""
    added = [
        {
            "id": i,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != _USER,
        }
        for i, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER, _UNKNOWN)
    ]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": None, "post_processor": None, "decoder": None, "model": model}  # fmt: skip


def _token_id(metadata: Metadata, name: str, count: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    return metadata.integer(key, most=count - 1) if metadata.has(key) else None


def _post_processor(
    metadata: Metadata, tokens: list[str], special: dict[str, int | None], bos_default: bool
) -> dict[str, Any] | None:
    """Adds the begin and end tokens that the model wants around a text."""
    ends = []
    for name, default in (("bos", bos_default), ("eos", False)):
        wanted = metadata.flag(f"tokenizer.ggml.add_{name}_token", default)
        number = special[name]
        if wanted and number is None and metadata.has(f"tokenizer.ggml.add_{name}_token"):
            raise EngineError("GGUF_INVALID", f"add_{name}_token without {name}_token_id")
        ends.append(number if wanted else None)
    if ends == [None, None]:
        return None
    known = {tokens[n]: {"id": tokens[n], "ids": [n], "tokens": [tokens[n]]} for n in ends if n is not None}
    before, after = ([{"SpecialToken": {"id": tokens[n], "type_id": 0}}] if n is not None else [] for n in ends)
    text, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [*before, text, *after],
        "pair": [*before, text, *after, *before, second, *after],
        "special_tokens": known,
    }
