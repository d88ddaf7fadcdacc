"""A model's chat template, compiled in Jinja's sandbox and rendered within bounds.

Templates come from signed bundles and are still treated as hostile: nothing but the listed names is visible,
objects are immutable, output is capped, and compiling computes nothing. The sandbox bounds access, not work; the
process's limits bound work.

A conversation is rendered as Hugging Face `transformers` renders it, with one difference: what would make one
conversation two prompts (`strftime_now`, `lipsum`, `random`) is not defined here. A template that asks whether
it is, as stock Llama 3.2 does, takes its fixed date; one that does not ask is refused.

Source: jinja2.sandbox; the names, whitespace rules and the `generation` block of `transformers`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import EngineError

MAX_OUTPUT_CHARS = 4 << 20
"""Characters a rendered conversation may have."""

MAX_SOURCE_CHARS = 1 << 20
"""Characters a template may have."""

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The tokens a template may write by name; one the model does not have is undefined."""

_GLOBALS = ("range", "dict", "namespace", "cycler", "joiner")
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
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [nodes.Scope(body).set_lineno(line)]


class _TemplateRaisedError(jinja2.TemplateError):
    """The template called `raise_exception`."""


def _raise_exception(message: object) -> NoReturn:
    raise _TemplateRaisedError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _CodeGenerator(CodeGenerator):
    """Leaves every expression to the rendering, which has limits of its own."""

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, in which repetition and powers cannot make a value of unbounded size."""

    code_generator_class = _CodeGenerator
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
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[loopcontrols, _GenerationBlock]
    )
    kept = {name: environment.globals[name] for name in _GLOBALS}
    environment.globals.clear()
    environment.globals.update(kept, raise_exception=_raise_exception)
    environment.filters["tojson"] = _to_json
    del environment.filters["random"]
    return environment


def _compile(source: str) -> jinja2.Template:
    if len(source) > MAX_SOURCE_CHARS:
        raise EngineError("TEMPLATE_INVALID", f"the chat template has over {MAX_SOURCE_CHARS} characters")
    environment = _environment()
    tree = environment.parse(source)
    if tree.find(nodes.EvalContextModifier) is not None:  # its argument is computed when compiling
        raise EngineError("TEMPLATE_INVALID", "the chat template uses autoescape, which is not offered")
    return environment.from_string(tree)


def private_names(source: str) -> tuple[str, ...]:
    """Names beginning with an underscore that a template reaches for, in branches that are never taken, too.

    The sandbox hides them all when a template is rendered; no honest template asks. One that does not parse asks
    for nothing here: it does not compile.
    """
    try:
        tree = _environment().parse(source)
        asked = [node.attr for node in tree.find_all(nodes.Getattr)]
        keys = [node.arg for node in tree.find_all(nodes.Getitem)]
        keys += [node.args[0] for node in tree.find_all(nodes.Filter) if node.name == "attr" and node.args]
    except Exception:  # jinja2 fails on hostile sources in many ways; compiling refuses them by name
        return ()
    asked += [str(key.value) for key in keys if isinstance(key, nodes.Const)]
    return tuple(name for name in asked if name.startswith("_"))


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the Jinja source.
        tokens: text of the special tokens the model has, by the names in `SPECIAL_TOKENS`.
        limit: characters a rendered conversation may have.

    Raises:
        EngineError: TEMPLATE_INVALID, the source does not compile or wants what is not offered.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], limit: int = MAX_OUTPUT_CHARS) -> None:
        try:
            self._template = _compile(source)
        except EngineError:
            raise
        except jinja2.TemplateError as error:
            raise EngineError("TEMPLATE_INVALID", f"the chat template does not compile: {error}") from error
        except Exception as error:  # jinja2 and the compiler below it fail on hostile sources in many ways
            raise EngineError(
                "TEMPLATE_INVALID", f"the chat template does not compile: {type(error).__name__}"
            ) from error
        self.source = source
        self.constants = "".join(tokens.values())
        self._names = {"tools": None, "documents": None, "add_generation_prompt": True, **tokens}
        self._limit = limit

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as the template writes it, ready for the assistant's answer.

        Raises:
            EngineError: TEMPLATE_REFUSED, the template raised, failed or wrote too much.
        """
        pieces: list[str] = []
        length = 0
        try:
            given = [message._asdict() for message in messages]
            for piece in self._template.generate(messages=given, **self._names):
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
