"""The texts that quantising is measured with: JSON lines of text or conversations, as the model's own tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import EngineError
from engine.strict_json import load_object
from engine.text.conversation import render_marked
from engine.text.model import ROLES, TextModel
from engine.text.template import ChatTemplate, Message

MAX_BYTES = 1 << 30
MAX_LINE_BYTES = 4 << 20
LEAST_TEXTS = 8
LONGEST = 2048  # tokens of a text; what is over is left out
HELD_OUT_EVERY = 8  # this one of so many texts is not calibrated with, but measured
MOST_HELD_OUT = 16384  # tokens


class Sample(NamedTuple):
    """A text: its tokens, and the first that a model is to foresee; of a conversation, the last answer's first."""

    ids: Sequence[int]
    first: int


class Calibration(NamedTuple):
    """Texts as tokens.

    Attributes:
        texts: that errors are fed back for.
        held_out: that perplexity is measured on.
        sha256: of the file.
    """

    texts: Sequence[Sample]
    held_out: Sequence[Sample]
    sha256: str

    @property
    def tokens(self) -> int:
        """Of the texts that are calibrated with."""
        return count(self.texts)


def count(samples: Sequence[Sample]) -> int:
    """Tokens of all of them."""
    return sum(len(sample.ids) for sample in samples)


def read_calibration(path: Path, model: TextModel, end: int, most_tokens: int) -> Calibration:
    """The texts of a file, a JSON object a line: {"text": "..."} or {"messages": [{"role", "content"}, ..]}.

    They are taken in order until there are `most_tokens`; every eighth is held out. The answer that a conversation
    ends with follows the prompt as it would when served, and then `end`, the token that ends it.

    Raises:
        EngineError: CALIBRATION_INVALID, a line is neither; CALIBRATION_TOO_SMALL; SOURCE_UNREADABLE.
    """
    digest = hashlib.sha256()
    found: tuple[list[Sample], list[Sample]] = ([], [])
    most = (most_tokens, MOST_HELD_OUT)
    number = 0
    for number, line in enumerate(_lines(path, digest), 1):
        which = int(number % HELD_OUT_EVERY == 0)
        left = min(LONGEST, model.max_context_tokens, most[which] - count(found[which]))
        if left <= 0:
            continue
        sample = _sample(line, number, model, end)
        if sample.first < min(left, len(sample.ids)):
            found[which].append(Sample(sample.ids[:left], sample.first))
    if number < LEAST_TEXTS or not all(found):
        raise EngineError(
            "CALIBRATION_TOO_SMALL", f"{number} texts in {path.name}; at least {LEAST_TEXTS} are needed"
        )
    return Calibration(*found, digest.hexdigest())


def _lines(path: Path, digest: Any) -> Iterator[bytes]:
    """The lines that are not empty."""
    try:
        with path.open("rb") as stream:
            while line := stream.readline(MAX_LINE_BYTES + 1):
                digest.update(line)
                if len(line) > MAX_LINE_BYTES or stream.tell() > MAX_BYTES:
                    raise EngineError("CALIBRATION_INVALID", f"{path.name} or a line of it is too long")
                yield line
    except OSError as error:
        raise EngineError("SOURCE_UNREADABLE", f"{path.name} cannot be read: {error.strerror}") from None


def _sample(line: bytes, number: int, model: TextModel, end: int) -> Sample:
    where = f"line {number} of the calibration"
    match load_object(line, where, "CALIBRATION_INVALID"):
        case {"text": str(text)}:
            return Sample(model.tokenizer.encode(text, add_special_tokens=True), 1)
        case {"messages": list(messages)} if messages and model.template is not None:
            return _conversation([_message(message, where) for message in messages], model, model.template, end)
    raise EngineError("CALIBRATION_INVALID", f'{where} has neither "text" nor, for a model that chats, "messages"')


def _conversation(messages: Sequence[Message], model: TextModel, template: ChatTemplate, end: int) -> Sample:
    answered = len(messages) > 1 and messages[-1].role == "assistant"
    asked = messages[:-1] if answered else messages
    prompt = model.tokenizer.encode(render_marked(template, asked, model.tokenizer), add_special_tokens=False)
    if not answered:
        return Sample(prompt, 1)
    answer = model.tokenizer.encode(messages[-1].content, add_special_tokens=False)
    return Sample([*prompt, *answer, end], len(prompt))


def _message(value: object, where: str) -> Message:
    match value:
        case {"role": str(role), "content": str(content)} if role in ROLES:
            return Message(role, content)
    raise EngineError("CALIBRATION_INVALID", f"{where}: a message has a role of {', '.join(ROLES)} and content")
