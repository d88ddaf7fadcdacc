"""What engine-text needs of a model: its tokenizer, its chat template and how long a prompt may be."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.errors import EngineError
from engine.strict_json import load_object
from engine.text.conversation import render_marked
from engine.text.template import SPECIAL_TOKENS, ChatTemplate, Message
from engine.text.tokens import ControlTokenizer, Encoded

ROLES = ("system", "user", "assistant")
MAX_MESSAGES = 1 << 14
"""Turns of one conversation; rendering and tokenising so many empty ones took 0.2 s (measured)."""

MAX_TEXT_CHARS = 1 << 20
"""Characters of one prompt or conversation; the public API takes no more bytes."""

MAX_FILE_BYTES = 64 << 20
"""Bytes a tokenizer or template file may have."""

_MAX_TOKEN_CHARS = 128
"""More than any token in use stands for; so much of a text for each token, and what is behind cannot matter."""

ReadFile = Callable[[str], bytes | None]
"""The bytes of a model's file by its path; None when the model has no such file."""


@dataclass(frozen=True)
class Prepared:
    """An input as the model reads it.

    Attributes:
        ids: never empty.
        segments: of each token; none where all are of the first.
        truncated: an end was left out.
    """

    ids: list[int]
    segments: list[int] = field(default_factory=list)
    truncated: bool = False


@dataclass(frozen=True)
class TextModel:
    """A model's tokenizer and chat template.

    Attributes:
        tokenizer: control tokens out of the reach of text.
        template: None when the model has none and cannot chat.
        max_context_tokens: prompt and answer together.
        num_types: segments of an input that the model tells apart.
    """

    tokenizer: ControlTokenizer
    template: ChatTemplate | None
    max_context_tokens: int
    num_types: int = 1

    def from_text(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with the special tokens the tokenizer adds by itself.

        Raises:
            EngineError: EMPTY_PROMPT, CONTEXT_OVERFLOW.
        """
        if not text:
            raise EngineError("EMPTY_PROMPT", "the prompt is empty")
        self._check_length(len(text))
        return self._checked(self.tokenizer.encode(text, add_special_tokens=True))

    def from_ids(self, ids: Sequence[int]) -> list[int]:
        """The ids, each known to be a token.

        Raises:
            EngineError: EMPTY_PROMPT, TOKEN_OUT_OF_RANGE, CONTEXT_OVERFLOW.
        """
        self._check_known(ids)
        return self._checked(list(ids))

    def from_conversation(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation as the model's template writes it, ready for the answer.

        Raises:
            EngineError: EMPTY_PROMPT, INVALID_ROLE, TEMPLATE_MISSING, TEMPLATE_REFUSED, CONTROL_TEXT_REFUSED,
                CONTEXT_OVERFLOW.
        """
        if self.template is None:
            raise EngineError("TEMPLATE_MISSING", "this model has no chat template; use Generate")
        if not messages:
            raise EngineError("EMPTY_PROMPT", "the conversation has no message")
        self._check_turns(len(messages))
        if any(message.role not in ROLES for message in messages):
            raise EngineError("INVALID_ROLE", f"a message's role is not one of {', '.join(ROLES)}")
        self._check_length(sum(len(message.content) for message in messages))
        marked = render_marked(self.template, messages, self.tokenizer)
        return self._checked(self.tokenizer.encode(marked, add_special_tokens=False))

    def from_input(self, text: str, second: str | None, truncate: bool) -> Prepared:
        """A text that gets a vector, or two that get a score, with the tokenizer's usual special tokens.

        Raises:
            EngineError: EMPTY_PROMPT; CONTEXT_OVERFLOW, unless it is to be cut.
        """
        if not text or second == "":
            raise EngineError("EMPTY_PROMPT", "there is no text")
        limit, parts = self.max_context_tokens * _MAX_TOKEN_CHARS, [text, second or ""]
        if not truncate:
            self._check_characters(sum(map(len, parts)), min(MAX_TEXT_CHARS, limit))
            return self._whole(self.tokenizer.encode_whole(text, second))
        cut = any(len(part) > limit for part in parts)
        short = text[:limit], None if second is None else second[:limit]
        encoded = self.tokenizer.encode_within(*short, self.max_context_tokens)
        return self._whole(encoded._replace(cut=encoded.cut or cut))

    def from_input_ids(self, ids: Sequence[int], truncate: bool) -> Prepared:
        """The ids that get a vector, each known to be a token.

        Raises:
            EngineError: EMPTY_PROMPT, TOKEN_OUT_OF_RANGE; CONTEXT_OVERFLOW, unless they are to be cut.
        """
        self._check_known(ids)
        cut = truncate and len(ids) > self.max_context_tokens
        kept = ids[: self.max_context_tokens] if cut else ids
        return self._whole(Encoded(list(kept), [], cut))

    def tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text, as `from_text` makes them; none for an empty text without special tokens.

        Raises:
            EngineError: CONTEXT_OVERFLOW; the text is longer than any prompt may be.
        """
        self._check_length(len(text))
        return self.tokenizer.encode(text, add_special_tokens)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids; control tokens are left out, broken UTF-8 is replaced by U+FFFD.

        Raises:
            EngineError: TOKEN_OUT_OF_RANGE; CONTEXT_OVERFLOW, no context holds so many tokens or so much text.
        """
        if len(ids) > self.max_context_tokens:
            raise EngineError(
                "CONTEXT_OVERFLOW", f"{len(ids)} tokens are more than a context of {self.max_context_tokens} holds"
            )
        self._check_known(ids)
        self._check_length(self.tokenizer.length(ids))
        return self.tokenizer.decode(ids)

    def _check_known(self, ids: Sequence[int]) -> None:
        unknown = next((number for number in ids if not self.tokenizer.has(number)), None)
        if unknown is not None:
            raise EngineError("TOKEN_OUT_OF_RANGE", f"{unknown} is not in the vocabulary of {self.tokenizer.size}")

    def _check_turns(self, turns: int) -> None:
        """Refuse before rendering what has more turns than tokens, however short they are."""
        limit = min(MAX_MESSAGES, self.max_context_tokens - 1)
        if turns > limit:
            raise EngineError(
                "CONTEXT_OVERFLOW",
                f"{turns} messages; a conversation in a context of {self.max_context_tokens} tokens has {limit} "
                "at the very most",
            )

    def _check_length(self, characters: int) -> None:
        """Refuse before tokenising (or after looking up tokens) what could not fit the context in any case."""
        limit = self.max_context_tokens * self.tokenizer.longest_token
        self._check_characters(characters, min(MAX_TEXT_CHARS, limit))

    def _check_characters(self, characters: int, limit: int) -> None:
        if characters > limit:
            raise EngineError(
                "CONTEXT_OVERFLOW",
                f"{characters} characters of text; a context of {self.max_context_tokens} tokens has room for "
                f"{limit} at the very most",
            )

    def _checked(self, ids: list[int]) -> list[int]:
        if not ids:
            raise EngineError("EMPTY_PROMPT", "the prompt has no tokens")
        if len(ids) >= self.max_context_tokens:
            raise EngineError(
                "CONTEXT_OVERFLOW",
                f"the prompt has {len(ids)} tokens and leaves no room for an answer in a context of "
                f"{self.max_context_tokens}; shorten it",
            )
        return ids

    def _whole(self, encoded: Encoded) -> Prepared:
        """What fits the model, which needs no room for an answer."""
        if not encoded.ids:
            raise EngineError("EMPTY_PROMPT", "the text has no tokens")
        if len(encoded.ids) > self.max_context_tokens:
            raise EngineError(
                "CONTEXT_OVERFLOW",
                f"{len(encoded.ids)} tokens, and the model takes {self.max_context_tokens}; shorten it, or have "
                "it cut (truncate)",
            )
        told_apart = self.num_types > 1 and any(encoded.segments)
        return Prepared(encoded.ids, encoded.segments if told_apart else [], encoded.cut)


def load_text_model(read: ReadFile, max_context_tokens: int, num_types: int = 1) -> TextModel:
    """The tokenizer and chat template among a model's files.

    Raises:
        EngineError: TOKENIZER_MISSING, TOKENIZER_INVALID, TEMPLATE_INVALID.
    """
    document = read("tokenizer.json")
    if document is None:
        raise EngineError("TOKENIZER_MISSING", "the model has no tokenizer.json")
    settings = _json_object(read("tokenizer_config.json"), "tokenizer_config.json")
    special = _json_object(read("special_tokens_map.json"), "special_tokens_map.json")
    source = _template_source(read("chat_template.jinja"), settings)
    tokens = {name: _token_text(settings, name) or _token_text(special, name) for name in SPECIAL_TOKENS}
    known = {name: text for name, text in tokens.items() if text}
    template = None if source is None else ChatTemplate(source, known)
    return TextModel(ControlTokenizer(document), template, max_context_tokens, num_types)


def _template_source(file: bytes | None, settings: Mapping[str, Any]) -> str | None:
    """The template: its own file, else the one named default in the tokenizer's settings."""
    if file is not None:
        try:
            return file.decode()
        except UnicodeDecodeError as error:
            raise EngineError("TEMPLATE_INVALID", "chat_template.jinja is not UTF-8") from error
    given = settings.get("chat_template")
    if isinstance(given, list):
        named = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
        given = named.get("default")
    if given is not None and not isinstance(given, str):
        raise EngineError("TEMPLATE_INVALID", "chat_template in tokenizer_config.json is not text")
    return given


def _token_text(settings: Mapping[str, Any], name: str) -> str:
    """A special token's text; files write it as text or as an object."""
    given = settings.get(name)
    if isinstance(given, dict):
        given = given.get("content")
    return given if isinstance(given, str) else ""


def _json_object(content: bytes | None, path: str) -> Mapping[str, Any]:
    return {} if content is None else load_object(content, path, "TOKENIZER_INVALID")
