"""The front matter of a Hugging Face model card: names with a text or a list of texts, as far as it is that plain.

It is YAML; only its first level is read, and of that only what needs no more than this: `name: text`,
`name: [a, b]`, and `name:` with lines `- a` below. Anything else is left out, never guessed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_CARD = 1024 * 1024
_MOST_ENTRIES = 100
_FIELD = re.compile(r"([A-Za-z_][A-Za-z0-9_-]{0,63}):(?:[ \t]+(.*))?")
_ITEM = re.compile(r"[ \t]*-[ \t]+(.*)")
_PLAIN = re.compile(r"[^\[\]{}&*!|>%@`#\x00-\x1f\x7f][^\x00-\x1f\x7f]{0,255}")


@dataclass(frozen=True)
class Card:
    """What a model card states.

    Attributes:
        fields: texts by name; a single text is a list of one.
    """

    fields: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def first(self, name: str) -> str:
        """The first text of a field; empty where there is none."""
        return self.fields.get(name, ("",))[0]


def read_card(text: str) -> Card:
    """The front matter of a model card; nothing where it has none."""
    lines = text[:MAX_CARD].splitlines()
    if not lines or lines[0].strip() != "---":
        return Card()
    found: dict[str, list[str]] = {}
    name = ""
    for line in lines[1:]:
        if line.strip() == "---":
            return Card({key: tuple(values[:_MOST_ENTRIES]) for key, values in found.items() if values})
        entry, item = _FIELD.fullmatch(line), _ITEM.fullmatch(line)
        if entry is not None:
            name = entry[1]
            found[name] = _values(entry[2] or "")
        elif item is not None and name:
            found[name] += _scalar(item[1])
        elif not line.startswith((" ", "\t")):
            name = ""
    return Card()  # front matter that does not end is none


def _values(text: str) -> list[str]:
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        return [value for part in text[1:-1].split(",") for value in _scalar(part)]
    return _scalar(text)


def _scalar(text: str) -> list[str]:
    """A text, without its quotation marks; none where it is something else."""
    text = text.strip()
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    elif re.match(r"[A-Za-z_-]+:\s", text):
        return []  # a mapping inside a list
    else:
        text = re.split(r"\s#", text, maxsplit=1)[0].rstrip()  # a comment
    if text in ("null", "~"):
        return []
    return [text] if _PLAIN.fullmatch(text) else []
