"""How training strays from the wording tables, so that a model leans on whatever part of a line it knows.

Only the tables' own words are touched, never a value. The splits that measure are drawn without any of this.
"""

from __future__ import annotations

import functools
import random
import re
from dataclasses import dataclass

from benchmarks.demo_models.notes.phrasings import DATA, Phrasing, wording

_WORD = re.compile(r"\{\w+\}|[^\W\d_]+(?:['’][a-z]+)?")
_INVENTED, _DROPPED = 0.45, 0.75  # of a hundred garbled words 45 are made up, 30 dropped, 25 exchanged


@dataclass(frozen=True)
class Variety:
    """Shares from 0 to 1: of notes garbled, reworded, of mixed register, crowded; of lines that are crossed."""

    garbled: float = 0.0
    reworded: float = 0.0
    mixed: float = 0.0
    crowded: float = 0.0
    crossed: float = 0.0


PLAIN = Variety()


class Strayer:
    """What one note does to its wording; a plain one draws no random number."""

    def __init__(self, variety: Variety, rng: random.Random, domain: str, wide: bool) -> None:
        self.variety = variety
        self.rng = rng
        self.domain = domain
        self.wide = wide
        self.mixed = self._happens(variety.mixed)
        self.more_noise = rng.randint(1, 3) if self._happens(variety.crowded) else 0
        self.loss = rng.uniform(0.05, 0.2) if self._happens(variety.garbled) else 0.0
        self.rewording = rng.uniform(0.1, 0.5) if self._happens(variety.reworded) else 0.0

    def _happens(self, share: float) -> bool:
        return share > 0 and self.rng.random() < share

    def template(self, phrasing: Phrasing) -> str:
        """A wording of `phrasing`, its slots still open; it may end as another line about the same slot does."""
        text = phrasing.pick(self.rng)
        if len(phrasing.slots) == 1 and self._happens(self.variety.crossed):
            text = cross(text, self.rng.choice(companions(self.domain, self.wide)[phrasing]).pick(self.rng))
        return self.disturb(text)

    def disturb(self, text: str) -> str:
        """Exchange, invent and drop words of `text` as often as this note does."""
        if not self.loss and not self.rewording:
            return text
        changed = _tidy(_WORD.sub(lambda found: self._word(found.group()), text))
        return changed if _WORD.search(changed) else text

    def _word(self, word: str) -> str:
        if word.startswith("{"):
            return word
        new = word
        if self._happens(self.rewording):
            new = self.rng.choice(synonyms().get(word.lower(), (word,)))
        if self._happens(self.loss):
            new = self._lost()
        return new[:1].upper() + new[1:] if word[0].isupper() else new

    def _lost(self) -> str:
        """What is left of a garbled word: one made of the halves of two others, nothing, or some other word."""
        kind = self.rng.random()
        words = vocabulary(self.domain, self.wide)
        one, other = self.rng.choice(words), self.rng.choice(words)
        if kind < _INVENTED:
            return one[: (len(one) + 1) // 2] + other[len(other) // 2 :]
        return "" if kind < _DROPPED else one


def cross(head: str, tail: str) -> str:
    """`head` up to its slot and `tail` from there on; `head` itself when it opens with the slot."""
    before, opening, rest = head.partition("{")
    slot = opening + rest.partition("}")[0] + "}"
    return before + slot + tail.partition("}")[2] if before.strip() else head


def _tidy(text: str) -> str:
    """Close the gaps that dropped words leave."""
    return re.sub(r" +([.,;:!?])", r"\1", re.sub(r" {2,}", " ", text)).strip(" ,;")


@functools.cache
def companions(domain: str, wide: bool) -> dict[Phrasing, list[Phrasing]]:
    """For each of training's lines all lines of its section about the same slots."""
    sections = [[p for p in lines if not p.unseen] for lines in wording(domain, wide).sections.values()]
    return {one: [p for p in lines if p.slots == one.slots] for lines in sections for one in lines}


@functools.cache
def vocabulary(domain: str, wide: bool) -> tuple[str, ...]:
    """Every word that training's lines of a domain use."""
    table = wording(domain, wide)
    lines = [p for lines in table.sections.values() for p in lines if not p.unseen]
    words = {word for p in lines for part in p.parts for text in part for word in _WORD.findall(text)}
    return tuple(sorted(word for word in words if word[0].isalpha() and word.islower()))


@functools.cache
def synonyms() -> dict[str, tuple[str, ...]]:
    """For a word the ways to put it, itself among them: `data/synonyms.txt`, one group per line."""
    groups: dict[str, tuple[str, ...]] = {}
    for line in (DATA / "synonyms.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            group = tuple(line.split("|"))
            groups.update({word: groups.get(word, ()) + group for word in group})
    return groups
