"""A model's chat template, compiled in Jinja's sandbox and rendered within bounds.

Templates come from signed bundles and are still treated as hostile: nothing but the listed names is visible,
objects are immutable, output is capped. The sandbox bounds access, not work; the process's limits bound work.

Source: jinja2.sandbox; the names, whitespace rules and the `generation` block that Hugging Face `transformers`
gives chat templates.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import EngineError

MAX_OUTPUT_CHARS = 4 << 20
"""Characters a rendered conversation may have."""


class Message(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it as an instance attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements inside the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _TemplateRaisedError(jinja2.TemplateError):
    """The template called `raise_exception`."""


def _raise_exception(message: object) -> NoReturn:
    raise _TemplateRaisedError(str(message))


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    kept = {name: environment.globals[name] for name in ("range", "dict", "namespace")}
    environment.globals.clear()
    environment.globals.update(kept, raise_exception=_raise_exception)
    environment.filters["tojson"] = _to_json
    return environment


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the Jinja source.
        bos_token: text of the begin token, "" when the model has none.
        eos_token: text of the end token, "" when the model has none.
        limit: characters a rendered conversation may have.

    Raises:
        EngineError: TEMPLATE_INVALID, the source does not compile.
    """

    def __init__(self, source: str, bos_token: str, eos_token: str, limit: int = MAX_OUTPUT_CHARS) -> None:
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError, ValueError) as error:
            raise EngineError("TEMPLATE_INVALID", f"the chat template does not compile: {error}") from error
        self.source = source
        self.constants = bos_token + eos_token
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._limit = limit

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as the template writes it, ready for the assistant's answer.

        Raises:
            EngineError: TEMPLATE_REFUSED, the template raised, failed or wrote too much.
        """
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(
                messages=[message._asdict() for message in messages], add_generation_prompt=True, **self._tokens
            ):
                pieces.append(piece)
                length += len(piece)
                if length > self._limit:
                    raise EngineError("TEMPLATE_REFUSED", f"the chat template wrote over {self._limit} characters")
        except EngineError:
            raise
        except _TemplateRaisedError as error:
            raise EngineError("TEMPLATE_REFUSED", self._said(str(error))) from None
        except Exception as error:  # whatever a template does wrong is its refusal, not ours
            raise EngineError("TEMPLATE_REFUSED", f"the chat template failed: {type(error).__name__}") from None
        return "".join(pieces)

    def _said(self, message: str) -> str:
        """Why the template refused, if the words are its own and cannot be the prompt's."""
        own = message and message in self.source
        return (
            f"the chat template refuses this conversation: {message}"
            if own
            else ("the chat template refuses this conversation")
        )
