"""From tokens to text, one step at a time: whole characters only, stop strings found across token borders.

Every token of the supported tokenizers stands for a fixed string of bytes, so the text of an answer is the UTF-8
decoding of their concatenation: an incremental decoder keeps the bytes of an unfinished character until the rest
arrives or the answer ends. An answer continues a prompt, so a leading space of its first token is kept.

Source: tokenizer.json of the `tokenizers` library (decoders ByteLevel, Metaspace, and the Llama 2 sequence);
Unicode 16, section 3.9 (replacement of maximal subparts), which CPython and Rust follow alike.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from engine.errors import EngineError
from engine.request import StopCriteria

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "▁"


class Vocabulary:
    """The bytes each token stands for; special tokens stand for none.

    Args:
        tokenizer_json: content of the model's tokenizer.json; None for a model that writes no text, whose tokens
            all stand for nothing.
        size: tokens of the model, which may be more than the tokenizer knows; the surplus stands for nothing.

    Raises:
        EngineError: TOKENIZER_UNSUPPORTED: not JSON, or a decoder other than byte-level and metaspace.
    """

    def __init__(self, tokenizer_json: bytes | None, size: int) -> None:
        if tokenizer_json is None:
            self._bytes = [b""] * size
            return
        try:
            tokenizer = Tokenizer.from_buffer(bytes(tokenizer_json))
            to_bytes = _decoder(json.loads(tokenizer_json)["decoder"])
        except EngineError:
            raise
        except Exception as error:
            raise EngineError("TOKENIZER_UNSUPPORTED", "tokenizer.json cannot be read") from error
        special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        tokens = [None if i in special else tokenizer.id_to_token(i) for i in range(size)]
        self._bytes = [b"" if token is None else to_bytes(token) for token in tokens]

    def __len__(self) -> int:
        return len(self._bytes)

    def __getitem__(self, token_id: int) -> bytes:
        return self._bytes[token_id]


class Piece(NamedTuple):
    """New text of an answer; `stop` is the stop string that ended it, else empty."""

    text: str
    stop: str = ""


class Detokenizer:
    """The text of one answer.

    Text that could be the beginning of a stop string is held back until it is decided. A stop string whose last
    character comes before the answer has `min_tokens` tokens is none, and does not become one later. (So it is in
    vLLM, which passes over the one that token `min_tokens` completes as well; here an answer may end with it.)
    """

    def __init__(self, vocabulary: Vocabulary, stop: StopCriteria) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = stop.strings
        self._include = stop.include_stop
        self._unheeded = stop.min_tokens  # tokens to come before stop strings are looked for
        self._held = ""

    def push(self, token_id: int) -> Piece:
        """The text that `token_id` completes."""
        self._unheeded -= 1
        return self._add(self._decoder.decode(self._vocabulary[token_id]))

    def flush(self) -> Piece:
        """What was held back, at the end of the answer; an unfinished character becomes U+FFFD."""
        piece = self._add(self._decoder.decode(b"", final=True))
        if piece.stop:
            return piece
        rest, self._held = self._held, ""
        return Piece(piece.text + rest)

    def _add(self, text: str) -> Piece:
        before, self._held = len(self._held), self._held + text
        ends = [] if self._unheeded > 0 else list(self._ends(before))
        if ends:
            return self._cut(*min(ends, key=lambda found: (found[0], -len(found[1]))))
        keep = self._undecided()
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return Piece(ready)

    def _ends(self, before: int) -> Iterator[tuple[int, str]]:
        """Where stop strings first end in the held text, after its first `before` characters, and which."""
        for stop in self._stops:
            found = self._held.find(stop, max(0, before + 1 - len(stop)))
            if found >= 0:
                yield found + len(stop), stop

    def _cut(self, end: int, stop: str) -> Piece:
        text = self._held[: end if self._include else end - len(stop)]
        self._held = ""
        return Piece(text, stop)

    def _undecided(self) -> int:
        """Length of the longest tail that a stop string begins with."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        tails = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in tails if any(stop.startswith(self._held[-n:]) for stop in self._stops)), 0)


def _decoder(description: object) -> Callable[[str], bytes]:
    """How tokens become bytes under the decoder that tokenizer.json describes."""
    kinds = [step.get("type") for step in _steps(description)]
    if kinds == ["ByteLevel"]:
        return _byte_level()
    if kinds == ["Metaspace"]:
        return lambda token: token.replace(_METASPACE, " ").encode()
    replace = {"type": "Replace", "pattern": {"String": _METASPACE}, "content": " "}
    llama = kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"])
    if llama and _steps(description)[0] == replace:
        return _byte_fallback
    raise EngineError(
        "TOKENIZER_UNSUPPORTED", f"tokenizer.json: decoder {kinds} is neither byte-level nor metaspace"
    )


def _steps(description: object) -> Sequence[dict[str, object]]:
    if not isinstance(description, dict):
        return []
    steps = description.get("decoders") if description.get("type") == "Sequence" else [description]
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def _byte_fallback(token: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.replace(_METASPACE, " ").encode()


def _byte_level() -> Callable[[str], bytes]:
    """Printable Latin-1 stands for itself, the other bytes for the characters from U+0100 on (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}

    def to_bytes(token: str) -> bytes:
        if all(character in table for character in token):
            return bytes(table[character] for character in token)
        return token.encode()

    return to_bytes
