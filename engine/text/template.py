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
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import EngineError

MAX_OUTPUT_CHARS = 4 << 20
"""Characters a rendered conversation may have."""

_LARGEST_OPERAND = 64  # of a power


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


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, in which repetition and powers cannot make a value of unbounded size."""

    intercepted_binops = frozenset({"*", "**"})  # neither are they computed when the template is compiled

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`left * right` or `left ** right`, within bounds."""
        if operator == "**" and not (_is_small(left) and _is_small(right)):
            raise SecurityError("a power out of bounds")
        if operator == "*" and not _is_number(left, right) and _repeated(left, right) > MAX_OUTPUT_CHARS:
            raise SecurityError("a repetition out of bounds")
        return super().call_binop(context, operator, left, right)


def _is_small(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= _LARGEST_OPERAND


def _is_number(*values: object) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _repeated(left: Any, right: Any) -> int:
    """Items of a sequence times a number, in either order; 0 when that is an error anyway."""
    sequence, count = (right, left) if isinstance(left, int) else (left, right)
    return len(sequence) * count if isinstance(count, int) and hasattr(sequence, "__len__") else 0


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock])
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
