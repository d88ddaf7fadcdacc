"""The wording tables: how a domain may say each of its fields.

A table (`data/DOMAIN.txt`) has sections (`== prose`, `== noise form`, `== event = fire`) of one phrasing per line.
`[a|b]` is a choice, `{field}` a slot, and a leading `~` keeps the line from training, for `unseen_templates`.
`data/DOMAIN-wide.txt` has more lines of the same sections, for the models whose recipe asks for wide wording.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parent / "data"
REGISTERS = ("prose", "terse", "form")

_CHOICE = re.compile(r"\[([^\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Phrasing:
    """One line of a table: `parts` are the alternatives in order, `slots` the values it needs."""

    parts: tuple[tuple[str, ...], ...]
    slots: frozenset[str]
    unseen: bool

    @classmethod
    def parse(cls, line: str) -> Phrasing:
        """Read one line of a table."""
        text = line.removeprefix("~")
        pieces = _CHOICE.split(text)
        parts = tuple(tuple(p.split("|")) if i % 2 else (p,) for i, p in enumerate(pieces))
        return cls(parts, frozenset(_SLOT.findall(text)), line.startswith("~"))

    def pick(self, rng: random.Random) -> str:
        """One wording, its slots still open."""
        return "".join(rng.choice(part) for part in self.parts)

    def wordings(self) -> set[str]:
        """Every wording this line can produce."""
        return {"".join(choice) for choice in itertools.product(*self.parts)}


@dataclass(frozen=True)
class Wording:
    """All phrasings of a domain by section, and its categories (`event`, `frequency`, `reason`) by label."""

    domain: str
    sections: dict[str, tuple[Phrasing, ...]]
    categories: dict[str, dict[str, tuple[Phrasing, ...]]]

    def lines(self, section: str, unseen: bool) -> list[Phrasing]:
        """The phrasings of a section that belong to one side of the template split."""
        return [p for p in self.sections[section] if p.unseen == unseen]

    def labels(self, slot: str) -> list[str]:
        """The closed set of answers of a category, in table order."""
        return list(self.categories[slot])

    def spoken(self, slot: str, label: str, unseen: bool) -> list[Phrasing]:
        """The ways to say a category's label on one side of the template split."""
        return [p for p in self.categories[slot][label] if p.unseen == unseen]

    def count(self, slot: str, unseen: bool = False) -> int:
        """How many distinct phrasings state `slot` (a category's own synonyms not counted)."""
        lines = [p for r in REGISTERS for p in self.lines(r, unseen) if slot in p.slots]
        return len(set().union(*(p.wordings() for p in lines)))


@functools.cache
def wording(domain: str, wide: bool = False) -> Wording:
    """The table of `domain`, read once; `wide` adds the lines of its second file."""
    sections: dict[str, list[Phrasing]] = {}
    for name in (domain, f"{domain}-wide") if wide else (domain,):
        _read(DATA / f"{name}.txt", sections)
    categories: dict[str, dict[str, tuple[Phrasing, ...]]] = {}
    for name in [n for n in sections if " = " in n]:
        slot, label = name.split(" = ")
        categories.setdefault(slot, {})[label] = tuple(sections.pop(name))
    return Wording(domain, {n: tuple(p) for n, p in sections.items()}, categories)


def _read(table: Path, sections: dict[str, list[Phrasing]]) -> None:
    name = ""
    for line in table.read_text(encoding="utf-8").splitlines():
        if line.startswith("== "):
            name = line[3:]
            sections.setdefault(name, [])
        elif line and not line.startswith("#"):
            sections[name].append(Phrasing.parse(line))
