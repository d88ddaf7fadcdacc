"""A conversation rendered so that one can tell the template's characters from the messages'.

The template is rendered with every message's text written in characters nobody else uses. Control tokens found
in that rendering are the template's own and get their aliases; then the messages are put back. A template that
looks into the messages (splits them, escapes them) may render the disguised ones differently; it gets a second
disguise that covers only what could become part of a control token, and is refused if it alters even that.
"""

from collections.abc import Callable, Iterator, Sequence

from engine.errors import EngineError
from engine.text.template import ChatTemplate, Message
from engine.text.tokens import ControlTokenizer

_PRIVATE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
_Disguise = Callable[[Sequence[Message], Iterator[int]], tuple[list[Message], dict[int, str]]]


def render_marked(template: ChatTemplate, messages: Sequence[Message], tokenizer: ControlTokenizer) -> str:
    """The rendered conversation, the template's control tokens as aliases, the messages' text as it is.

    Raises:
        EngineError: TEMPLATE_REFUSED; or CONTROL_TEXT_REFUSED, a message spells a control token and the template
            rewrites messages, so that the two cannot be told apart.
    """
    plain = template.render(messages)
    used = set(template.source).union(template.constants, *(message.content for message in messages))
    controls = [text for text in tokenizer.controls if not text.isspace()]

    def suspicious(given: Sequence[Message], spare: Iterator[int]) -> tuple[list[Message], dict[int, str]]:
        return _cover_suspicious(given, controls, spare)

    disguises: tuple[_Disguise, ...] = (_cover_all, suspicious)
    for disguise in disguises:
        spare = (code for codes in _PRIVATE for code in codes if chr(code) not in used)
        covered, back = disguise(messages, spare)
        rendered = template.render(covered)
        if rendered.translate(back) == plain:
            return tokenizer.mark_controls(rendered).translate(back)
    raise EngineError(
        "CONTROL_TEXT_REFUSED",
        "a message spells a control token and the chat template rewrites messages; remove the token's text",
    )


def _cover_all(messages: Sequence[Message], spare: Iterator[int]) -> tuple[list[Message], dict[int, str]]:
    """Every character but whitespace, which templates may trim, replaced by a private one."""
    characters = {c for message in messages for c in message.content if not c.isspace()}
    codes = dict(zip(characters, spare, strict=False))
    if len(codes) < len(characters):
        raise EngineError("UNSUPPORTED_TEXT", f"over {len(codes)} different characters in one conversation")
    table = {ord(character): code for character, code in codes.items()}
    covered = [Message(message.role, message.content.translate(table)) for message in messages]
    return covered, {code: character for character, code in codes.items()}


def _cover_suspicious(
    messages: Sequence[Message], controls: Sequence[str], spare: Iterator[int]
) -> tuple[list[Message], dict[int, str]]:
    """One character covered of every control token, or part of one at a message's edge."""
    back: dict[int, str] = {}
    forth: dict[str, str] = {}
    covered = []
    for message in messages:
        characters = list(message.content)
        for position in _suspicious_positions(message.content, controls):
            original = message.content[position]
            if original not in forth:
                code = next(spare)
                forth[original], back[code] = chr(code), original
            characters[position] = forth[original]
        covered.append(Message(message.role, "".join(characters)))
    return covered, back


def _suspicious_positions(content: str, controls: Sequence[str]) -> Iterator[int]:
    """Where a control token begins, or a piece of one begins or ends the text (trimmed or not)."""
    begin = len(content) - len(content.lstrip())
    trimmed = content.strip()
    for control in controls:
        found = content.find(control)
        while found >= 0:
            yield found
            found = content.find(control, found + 1)
        for cut in range(1, len(control)):
            if trimmed.endswith(control[:cut]):
                yield begin + len(trimmed) - cut
            if trimmed and (trimmed.startswith(control[cut:]) or control[cut:].startswith(trimmed)):
                yield begin
