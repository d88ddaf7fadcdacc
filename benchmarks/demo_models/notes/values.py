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


def _on_side(kind: str, unseen: bool, make: Callable[[], str]) -> str:
    """Draw until the value is on the wanted side of the split."""
    while True:
        value = make()
        if held_out(kind, value) == unseen:
            return value


def _surname(rng: random.Random) -> str:
    if rng.random() < 0.3:
        return rng.choice(_table("surnames"))
    return rng.choice(_table("surname_heads")) + rng.choice(_table("surname_tails"))


def person(rng: random.Random, unseen: bool) -> str:
    """A full name; its first name and its surname are both on the wanted side."""
    first = _on_side("first", unseen, lambda: rng.choice(_table("first_names")))
    last = _on_side("surname", unseen, lambda: _surname(rng))
    middle = f"{rng.choice(_CAPITALS)}. " if rng.random() < 0.1 else ""
    return f"{first} {middle}{last}"


def written_person(rng: random.Random, name: str, register: str) -> str:
    """How a note writes a name: forms and clipped notes may put the surname first."""
    if register == "prose" or rng.random() > 0.15:
        return name
    given, last = name.rsplit(" ", 1)
    return f"{last}, {given}"


def company(rng: random.Random, unseen: bool) -> str:
    """A firm's name, like `Northwind Freight GmbH` or `Hartwell & Sons Ltd`."""

    def make() -> str:
        form = rng.choice(_table("company_forms"))
        if rng.random() < 0.35:
            tail = rng.choice(
                ("& Sons", "& Daughters", "Brothers", "& Partners", rng.choice(_table("company_trades")))
            )
            return f"{_surname(rng)} {tail} {form}"
        return f"{rng.choice(_table('company_words'))} {rng.choice(_table('company_trades'))} {form}"

    return _on_side("company", unseen, make)


def identifier(rng: random.Random, unseen: bool, kind: str) -> str:
    """A policy number, payment reference or foreign reference (`kind`: policy, reference, other)."""
    return _on_side(kind, unseen, lambda: _fill(rng, rng.choice(_table(f"{kind}_shapes"))))


def _fill(rng: random.Random, shape: str) -> str:
    if shape[:2] not in ("IN", "RE", "PO"):
        shape = "".join(rng.choice(_CAPITALS) if c == "A" else c for c in shape)
    return "".join(rng.choice("0123456789") if c == "9" else c for c in shape)


def money(rng: random.Random, unseen: bool) -> Value:
    """An amount with its currency, from 12.00 to about 250 000.00."""

    def make() -> str:
        whole = int(12 * 10 ** (rng.random() * 4.3))
        return f"{whole}.{rng.choice(('00', '00', '50', f'{rng.randrange(100):02d}'))}"

    amount = _on_side("amount", unseen, make)
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


def day(rng: random.Random, unseen: bool) -> datetime.date:
    """Any day from 2023 to 2026 that is on the wanted side."""
    return _day_among(rng, unseen, _FIRST_DAY, range(_DAYS))


def day_near(rng: random.Random, unseen: bool, other: datetime.date, direction: int) -> datetime.date:
    """A day some weeks after (`direction` 1) or before (-1) another one."""
    return _day_among(rng, unseen, other, range(direction, 46 * direction, direction))


def _day_among(rng: random.Random, unseen: bool, start: datetime.date, offsets: range) -> datetime.date:
    def make() -> str:
        return str(start + datetime.timedelta(rng.choice(offsets)))

    return datetime.date.fromisoformat(_on_side("date", unseen, make))


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


def drug(rng: random.Random, unseen: bool) -> str:
    """A medicine: a real generic name or one composed of the stems that generic names use."""

    def make() -> str:
        if rng.random() < 0.5:
            return rng.choice(_table("drugs"))
        middle = rng.choice(_table("drug_middles")) if rng.random() < 0.6 else ""
        return rng.choice(_table("drug_heads")) + middle + rng.choice(_table("drug_tails"))

    return _on_side("drug", unseen, make)


def dose(rng: random.Random, unseen: bool) -> Value:
    """A strength with its unit; the gold has one space and the short unit."""

    def make() -> str:
        unit = rng.choice(("mg", "mg", "mg", "mg", "mcg", "ml", "g", "units"))
        return f"{rng.choice(_table('strengths_' + unit))} {unit}"

    gold = _on_side("dose", unseen, make)
    number, unit = gold.split(" ")
    text = rng.choice((gold, gold, gold.replace(" ", "") if unit != "units" else gold, f"{number} {_UNITS[unit]}"))
    return Value(text, {"dose": gold})


def ward(rng: random.Random, unseen: bool) -> str:
    """A ward's name, like `Maple Ward`, `Ward 7B` or `Stroke Unit 2`."""

    def make() -> str:
        style = rng.random()
        if style < 0.4:
            return f"{rng.choice(_table('ward_names'))} {rng.choice(_table('ward_kinds'))}"
        if style < 0.7:
            return f"Ward {rng.randrange(1, 40)}{rng.choice(('', 'A', 'B', 'C', 'D', 'E', 'F', 'K'))}"
        return f"{rng.choice(_table('ward_units'))} Unit{rng.choice(('', '', f' {rng.randrange(1, 10)}'))}"

    return _on_side("ward", unseen, make)
