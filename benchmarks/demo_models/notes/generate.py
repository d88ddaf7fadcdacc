"""Seeded notes of three regulated trades, each with the one JSON answer it deserves."""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from benchmarks.demo_models.notes import values
from benchmarks.demo_models.notes.phrasings import DATA, REGISTERS, Phrasing, Wording, wording
from benchmarks.demo_models.notes.values import Source, Value
from benchmarks.demo_models.notes.variety import PLAIN, Strayer, Variety

Split = Literal["train", "unseen_values", "unseen_templates"]
Domain = Literal["claim", "ward", "payment"]

SPLITS: tuple[Split, ...] = ("train", "unseen_values", "unseen_templates")
DOMAINS: tuple[Domain, ...] = ("claim", "ward", "payment")
KEYS: dict[Domain, tuple[str, ...]] = {
    "claim": ("claimant", "policy", "amount", "currency", "date", "event"),
    "ward": ("patient", "ward", "drug", "dose", "frequency", "date"),
    "payment": ("payer", "payee", "amount", "currency", "reference", "reason"),
}
MISSING = 0.1

_PEOPLE = ("claimant", "patient", "payer", "payee", "other_person")
_IDENTIFIERS = {"policy": "policy", "reference": "reference", "other_id": "other"}
_REGISTER_ODDS = (5, 3, 2)
_NOISE_ODDS = (3, 4, 3, 1)


@dataclass(frozen=True)
class Note:
    """A note, the user message that asks about it (`prompt`), and its fields, None where it is silent."""

    domain: Domain
    text: str
    prompt: str
    gold: dict[str, str | None]

    @property
    def answer(self) -> str:
        """The gold as the model should write it: compact JSON in the order of `KEYS`."""
        return json.dumps(self.gold, ensure_ascii=False, separators=(",", ":"))

    @property
    def messages(self) -> list[dict[str, str]]:
        """The chat that asks for the answer."""
        return [{"role": "user", "content": self.prompt}]


def instructions(domain: Domain) -> list[str]:
    """The ways to ask for a domain's fields; the first is the one the demo uses."""
    return _instructions()[domain]


def draw(
    seed: int, count: int, split: Split = "unseen_values", domain: Domain | None = None, wide: bool = False
) -> list[Note]:
    """`count` notes; the same seed gives the same notes on every machine. No `domain`: all three in turn.

    `wide` draws from the wide wording, too, but for `unseen_templates`, which is the same for every model.
    """
    return list(itertools.islice(stream(seed, split, domain, style=Style(wide=wide)), count))


@dataclass(frozen=True)
class Style:
    """How notes are written: `missing` is the chance to leave a field out, `invented` the share of new names."""

    missing: float = MISSING
    invented: float = 0.0
    wide: bool = False
    variety: Variety = PLAIN


def stream(seed: int, split: Split, domain: Domain | None = None, style: Style | None = None) -> Iterator[Note]:
    """Notes without end."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    for index in itertools.count():
        rng = random.Random(":".join(("notes", str(seed), split, str(index), *([domain] if domain else []))))
        yield _Writer(rng, domain or DOMAINS[index % len(DOMAINS)], split, style or Style()).note()


@functools.cache
def _instructions() -> dict[str, list[str]]:
    asked: dict[str, list[str]] = json.loads((DATA / "instructions.json").read_text(encoding="utf-8"))
    return asked


class _Writer:
    """Writes one note: chooses a register, states the fields it keeps, adds distractors, shuffles."""

    def __init__(self, rng: random.Random, domain: Domain, split: Split, style: Style) -> None:
        self.rng = rng
        self.domain = domain
        self.missing = style.missing
        self.unseen_lines = split == "unseen_templates"
        wide = style.wide and not self.unseen_lines
        self.table: Wording = wording(domain, wide)
        self.source = Source(rng, split != "train", style.invented)
        self.strayer = Strayer(style.variety, rng, domain, wide)
        self.register = rng.choices(REGISTERS, _REGISTER_ODDS)[0]
        self.day = values.day(self.source)

    def note(self) -> Note:
        stated = {slot: self.value(slot) for slot in self.kept()}
        lines = [self.say(phrasing, stated) for phrasing in self.cover(set(stated))]
        lines += [self.distract(phrasing, stated) for phrasing in self.noise()]
        self.rng.shuffle(lines)
        text = self.frame(lines, stated)
        found = {key: gold for value in stated.values() for key, gold in value.gold.items()}
        asked = instructions(self.domain)
        instruction = asked[0] if self.rng.random() < 0.6 else self.rng.choice(asked)
        return Note(
            self.domain, text, f"{instruction}\n\n{text}", {key: found.get(key) for key in KEYS[self.domain]}
        )

    def kept(self) -> list[str]:
        """The slots this note states, at least two; an amount brings its currency along."""
        slots = [key for key in KEYS[self.domain] if key != "currency"]
        kept = [slot for slot in slots if self.rng.random() >= self.missing]
        return kept if len(kept) > 1 else self.rng.sample(slots, 2)

    def lines(self, kind: str = "") -> list[Phrasing]:
        """The phrasings of this note's register; where registers are mixed, of any one, anew at each call."""
        register = self.rng.choice(REGISTERS) if self.strayer.mixed else self.register
        return self.table.lines(kind + register, self.unseen_lines)

    def cover(self, slots: set[str]) -> list[Phrasing]:
        """Phrasings that together state each slot exactly once."""
        chosen: list[Phrasing] = []
        while slots:
            lines = self.lines()
            slot = self.rng.choice(sorted(slots))
            phrasing = self.rng.choice([p for p in lines if slot in p.slots and p.slots <= slots])
            chosen.append(phrasing)
            slots = slots - phrasing.slots
        return chosen

    def noise(self) -> list[Phrasing]:
        """None to three lines about other people, days and sums; more in a crowded note."""
        lines = self.lines("noise ")
        count = self.rng.choices(range(4), _NOISE_ODDS)[0] + self.strayer.more_noise
        return self.rng.sample(lines, min(len(lines), count))

    def value(self, slot: str) -> Value:
        """A fresh value for a slot, written in this note's register."""
        if slot in self.table.categories:
            return self.category(slot)
        kind = slot.removeprefix("other_")
        if kind == "amount":
            return values.money(self.source)
        if kind == "date":
            return values.date(self.rng, self.day if slot == "date" else self.other_day(), self.register)
        if slot == "dose":
            return values.dose(self.source)
        return self.named(slot, kind)

    def other_day(self) -> datetime.date:
        """A day for a distractor: claims are handled after the loss, patients come in before their review."""
        return values.day_near(self.source, self.day, 1 if self.domain == "claim" else -1)

    def named(self, slot: str, kind: str) -> Value:
        """A value that the answer copies as it is: a name or a number on paper."""
        if slot in _IDENTIFIERS:
            text = values.identifier(self.source, _IDENTIFIERS[slot])
        elif slot in ("payer", "payee") and self.rng.random() < 0.55:
            text = values.company(self.source)
        elif slot in _PEOPLE:
            name = values.person(self.source)
            return Value(values.written_person(self.rng, name, self.register), {slot: name})
        else:
            text = {"drug": values.drug, "ward": values.ward}[kind](self.source)
        return Value(text, {slot: text})

    def category(self, slot: str) -> Value:
        """One label of a closed set, in one of its many wordings."""
        label = self.rng.choice(self.table.labels(slot))
        phrasing = self.rng.choice(self.table.spoken(slot, label, self.unseen_lines))
        return Value(self.strayer.template(phrasing).strip(), {slot: label})

    def say(self, phrasing: Phrasing, stated: dict[str, Value]) -> str:
        template = self.strayer.template(phrasing)
        sentence = template.format_map({slot: stated[slot].text for slot in phrasing.slots})
        return (sentence[0].upper() + sentence[1:]).replace("..", ".")  # `Borg, Ada M.` may end a sentence

    def distract(self, phrasing: Phrasing, stated: dict[str, Value]) -> str:
        """A line whose values are none of the note's own."""
        taken = {gold for value in stated.values() for gold in value.gold.values()}
        drawn = {slot: self.value(slot) for slot in sorted(phrasing.slots)}
        while any(set(value.gold.values()) & taken for value in drawn.values()):
            drawn = {slot: self.value(slot) for slot in sorted(phrasing.slots)}
        return self.say(phrasing, drawn)

    def frame(self, lines: list[str], stated: dict[str, Value]) -> str:
        """The lines as one text, often with an opening and a closing."""
        parts = ["\n".join(lines) if self.register == "form" else " ".join(lines)]
        if self.rng.random() < 0.35:
            parts.insert(0, self.say(self.rng.choice(self.table.sections["open"]), {}))
        if self.rng.random() < 0.3:
            self.register = "prose"  # whoever signs a form still signs with the first name first
            parts.append(self.distract(self.rng.choice(self.table.sections["close"]), stated))
        return "\n".join(parts)
