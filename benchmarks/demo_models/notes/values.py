"""The values of a note: names, numbers, dates, as a note writes them and as the gold answer has them.

Whether a value may be trained on is decided by a hash of the value itself, so train and held-out never share one.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.demo_models.notes.phrasings import DATA

_SYLLABLE = ("onsets", "vowels", "codas")
_FIRST_DAY = datetime.date(2023, 1, 1)
_DAYS = 4 * 365
_CAPITALS = "ABCDEFGHJKLMNPRSTUVWXYZ"
_SIGNS = {"GBP": "£", "EUR": "€", "USD": "$", "CAD": "C$", "AUD": "A$"}
_NOUNS = {"GBP": "pounds", "EUR": "euros", "USD": "US dollars", "CHF": "Swiss francs", "SEK": "Swedish kronor"}
_CURRENCIES = ("GBP", "GBP", "EUR", "EUR", "USD", "USD", "CHF", "SEK", "CAD", "AUD")
_UNITS = {"mg": "milligrams", "mcg": "micrograms", "ml": "millilitres", "g": "grams", "units": "units"}


@dataclass(frozen=True)
class Value:
    """`text` is what the note says; `gold` are the answer's keys it decides."""

    text: str
    gold: dict[str, str]


def held_out(kind: str, value: str) -> bool:
    """True for the fifth of all values that training never sees."""
    return hashlib.sha256(f"{kind}:{value}".encode()).digest()[0] % 5 == 0


@functools.cache
def _table(name: str) -> tuple[str, ...]:
    return tuple(_tables()[name])


@functools.cache
def _tables() -> dict[str, list[str]]:
    tables: dict[str, list[str]] = json.loads((DATA / "values.json").read_text(encoding="utf-8"))
    return tables


@functools.cache
def _trained(name: str) -> tuple[str, ...]:
    kinds = ("first", "surname", "drug")
    return tuple(word for word in _table(name) if not any(held_out(kind, word) for kind in kinds))


@dataclass(frozen=True)
class Source:
    """Where a note's values come from: its random numbers, its side of the split, and the share of made-up words.

    Words made up for training (`invented`) are the reason why the model copies names instead of knowing them.
    """

    rng: random.Random
    unseen: bool
    invented: float = 0.0

    def on_side(self, kind: str, make: Callable[[], str]) -> str:
        """Draw until the value is on the wanted side of the split."""
        while True:
            value = make()
            if held_out(kind, value) == self.unseen:
                return value

    def word(self, table: str) -> str:
        """A word of a table, or one made up."""
        if self.rng.random() >= self.invented:
            return self.rng.choice(_table(table))
        return self.spliced(table) if self.rng.random() < 0.5 else self.syllables()

    def spliced(self, table: str) -> str:
        """The head of one word of a table and the tail of another."""
        head, tail = self.rng.choice(_trained(table)), self.rng.choice(_trained(table))
        word = head[: self.rng.randrange(1, len(head))] + tail[self.rng.randrange(1, len(tail)) :].lower()
        return " ".join(word.split())

    def syllables(self) -> str:
        """One to four syllables of no language."""
        syllables = self.rng.choice((1, 2, 2, 3, 3, 4))
        return "".join(self.rng.choice(_table(part)) for part in _SYLLABLE * syllables).capitalize()


def _surname(source: Source) -> str:
    if source.rng.random() < max(0.3, source.invented):
        return source.word("surnames")
    return source.rng.choice(_table("surname_heads")) + source.rng.choice(_table("surname_tails"))


def person(source: Source) -> str:
    """A full name; its first name and its surname are both on the wanted side."""
    rng = source.rng
    first = source.on_side("first", lambda: source.word("first_names"))
    last = source.on_side("surname", lambda: _surname(source))
    middle = f"{rng.choice(_CAPITALS)}. " if rng.random() < 0.1 else ""
    return f"{first} {middle}{last}"


def written_person(rng: random.Random, name: str, register: str) -> str:
    """How a note writes a name: forms and clipped notes may put the surname first."""
    if register == "prose" or rng.random() > 0.15:
        return name
    given, last = name.rsplit(" ", 1)
    return f"{last}, {given}"


def company(source: Source) -> str:
    """A firm's name, like `Northwind Freight GmbH` or `Hartwell & Sons Ltd`."""
    rng = source.rng

    def make() -> str:
        form = rng.choice(_table("company_forms"))
        if rng.random() < 0.35:
            tail = rng.choice(("& Sons", "& Daughters", "Brothers", "& Partners", source.word("company_trades")))
            return f"{_surname(source)} {tail} {form}"
        return f"{source.word('company_words')} {source.word('company_trades')} {form}"

    return source.on_side("company", make)


def identifier(source: Source, kind: str) -> str:
    """A policy number, payment reference or foreign reference (`kind`: policy, reference, other)."""
    rng = source.rng
    return source.on_side(kind, lambda: _fill(rng, rng.choice(_table(f"{kind}_shapes"))))


def _fill(rng: random.Random, shape: str) -> str:
    if shape[:2] not in ("IN", "RE", "PO"):
        shape = "".join(rng.choice(_CAPITALS) if c == "A" else c for c in shape)
    return "".join(rng.choice("0123456789") if c == "9" else c for c in shape)


def money(source: Source) -> Value:
    """An amount with its currency, from 12.00 to about 250 000.00."""
    rng = source.rng

    def make() -> str:
        whole = int(12 * 10 ** (rng.random() * 4.3))
        return f"{whole}.{rng.choice(('00', '00', '50', f'{rng.randrange(100):02d}'))}"

    amount = source.on_side("amount", make)
    currency = rng.choice(_CURRENCIES)
    return Value(_written_money(rng, amount, currency), {"amount": amount, "currency": currency})


def _written_money(rng: random.Random, amount: str, currency: str) -> str:
    whole, cents = amount.split(".")
    grouped = f"{int(whole):,}"
    short = cents == "00" and rng.random() < 0.6
    number = (grouped if rng.random() < 0.7 else whole) + ("" if short else f".{cents}")
    continental = (grouped.replace(",", rng.choice(".' "))) + ("" if short else f",{cents}")
    forms = [f"{currency} {number}", f"{number} {currency}"]
    if currency in _SIGNS:
        forms += [f"{_SIGNS[currency]}{number}"] * 3
    if currency in _NOUNS:
        forms += [f"{number} {_NOUNS[currency]}"]
    if currency in ("EUR", "CHF", "SEK"):
        forms += [f"{currency} {continental}", f"{continental} {currency}"]
    return rng.choice(forms)


def day(source: Source) -> datetime.date:
    """Any day from 2023 to 2026 that is on the wanted side."""
    return _day_among(source, _FIRST_DAY, range(_DAYS))


def day_near(source: Source, other: datetime.date, direction: int) -> datetime.date:
    """A day some weeks after (`direction` 1) or before (-1) another one."""
    return _day_among(source, other, range(direction, 46 * direction, direction))


def _day_among(source: Source, start: datetime.date, offsets: range) -> datetime.date:
    rng = source.rng

    def make() -> str:
        return str(start + datetime.timedelta(rng.choice(offsets)))

    return datetime.date.fromisoformat(source.on_side("date", make))


def date(rng: random.Random, chosen: datetime.date, register: str) -> Value:
    """A day as written; the gold is ISO 8601, the note in digits is always day before month."""
    return Value(_written_date(rng, chosen, register), {"date": chosen.isoformat()})


def _written_date(rng: random.Random, day: datetime.date, register: str) -> str:
    month, number = _table("months")[day.month - 1], day.day
    forms = [
        f"{number} {month} {day.year}",
        f"{number} {month[:3]} {day.year}",
        f"{day:%d/%m/%Y}",
        f"{day:%d.%m.%Y}",
        f"{month} {number}, {day.year}",
        day.isoformat(),
    ]
    if register == "prose":
        forms += [f"the {number}{_ordinal(number)} of {month} {day.year}", f"{number} {month} {day.year}"]
    else:
        forms += [f"{day:%d}-{month[:3]}-{day.year}", f"{day:%d.%m.%y}"]
    return rng.choice(forms)


def _ordinal(number: int) -> str:
    if number in (11, 12, 13):
        return "th"
    return {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")


def drug(source: Source) -> str:
    """A medicine: a real generic name or one composed of the stems that generic names use."""
    rng = source.rng

    def make() -> str:
        if rng.random() < max(0.5, source.invented):
            return source.word("drugs")
        middle = rng.choice(_table("drug_middles")) if rng.random() < 0.6 else ""
        return rng.choice(_table("drug_heads")) + middle + rng.choice(_table("drug_tails"))

    return source.on_side("drug", make)


def dose(source: Source) -> Value:
    """A strength with its unit; the gold has one space and the short unit."""
    rng = source.rng

    def make() -> str:
        unit = rng.choice(("mg", "mg", "mg", "mg", "mcg", "ml", "g", "units"))
        return f"{rng.choice(_table('strengths_' + unit))} {unit}"

    gold = source.on_side("dose", make)
    number, unit = gold.split(" ")
    text = rng.choice((gold, gold, gold.replace(" ", "") if unit != "units" else gold, f"{number} {_UNITS[unit]}"))
    return Value(text, {"dose": gold})


def ward(source: Source) -> str:
    """A ward's name, like `Maple Ward`, `Ward 7B` or `Stroke Unit 2`."""
    rng = source.rng

    def make() -> str:
        style = rng.random()
        if style < 0.4:
            return f"{source.word('ward_names')} {rng.choice(_table('ward_kinds'))}"
        if style < 0.7:
            return f"Ward {rng.randrange(1, 40)}{rng.choice(('', 'A', 'B', 'C', 'D', 'E', 'F', 'K'))}"
        return f"{source.word('ward_units')} Unit{rng.choice(('', '', f' {rng.randrange(1, 10)}'))}"

    return source.on_side("ward", make)
