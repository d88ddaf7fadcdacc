"""The generator of synthetic notes: seeded, varied, split by construction, gold that the text supports."""

import dataclasses
import datetime
import hashlib
import itertools
import json
import re

import pytest

from benchmarks.demo_models.notes import DOMAINS, KEYS, SPLITS, Style, Variety, draw, score, stream
from benchmarks.demo_models.notes.phrasings import wording
from benchmarks.demo_models.notes.values import held_out
from benchmarks.demo_models.notes.variety import cross

FIELDS = [(domain, key) for domain in DOMAINS for key in KEYS[domain]]
MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]


def slot_of(key):
    return "amount" if key == "currency" else key


@pytest.fixture(scope="module", params=SPLITS)
def notes(request):
    return draw(11, 1500, request.param)


def test_the_same_seed_draws_the_same_notes_on_every_machine():
    text = "".join(note.prompt + note.answer for split in SPLITS for note in draw(3, 30, split))
    assert (
        hashlib.sha256(text.encode()).hexdigest()
        == "9302c222c4f48611305c1cdf7811c2e4b3460270dc572b23f9d4e599d6c69b6c"
    )


def test_a_longer_draw_begins_with_the_shorter_one():
    assert draw(5, 20)[:7] == draw(5, 7)


def test_another_seed_draws_other_notes():
    assert not {n.text for n in draw(1, 200)} & {n.text for n in draw(2, 200)}


def test_a_domain_can_be_asked_for():
    assert {note.domain for note in draw(1, 9, domain="ward")} == {"ward"}
    assert [note.domain for note in draw(1, 3)] == list(DOMAINS)


def test_the_domains_of_one_seed_share_no_names():
    claim, ward = (draw(1, 1, domain=domain)[0] for domain in ("claim", "ward"))
    assert claim.gold["claimant"] != ward.gold["patient"]
    assert claim.gold["date"] != ward.gold["date"]


def test_an_unknown_split_is_refused_by_name():
    with pytest.raises(ValueError, match="unseen_valuez"):
        draw(1, 1, "unseen_valuez")


@pytest.mark.parametrize(("domain", "key"), FIELDS)
def test_every_field_has_at_least_200_phrasings_in_training(domain, key):
    assert wording(domain).count(slot_of(key)) >= 200


@pytest.mark.parametrize(("domain", "key"), FIELDS)
def test_every_field_has_phrasings_kept_from_training(domain, key):
    table, slot = wording(domain), slot_of(key)
    assert table.count(slot, unseen=True) >= 5
    trained = {w for lines in table.sections.values() for p in lines if not p.unseen for w in p.wordings()}
    kept = {w for lines in table.sections.values() for p in lines if p.unseen for w in p.wordings()}
    assert not trained & kept


@pytest.mark.parametrize("domain", DOMAINS)
def test_wide_wording_adds_lines_to_every_section_and_none_that_was_kept_from_training(domain):
    narrow, wide = all_lines(wording(domain)), all_lines(wording(domain, wide=True))
    assert narrow.keys() == wide.keys()
    kept = {w for lines in narrow.values() for p in lines if p.unseen for w in p.wordings()}
    for name, lines in wide.items():
        added = lines[len(narrow[name]) :]
        assert len(added) >= 20
        assert not [p for p in added if p.unseen or p.wordings() & kept]
        assert frozenset().union(*(p.slots for p in added)) <= frozenset().union(*(p.slots for p in narrow[name]))


def all_lines(table):
    categories = {(slot, label): p for slot, labels in table.categories.items() for label, p in labels.items()}
    return table.sections | categories


def test_wholly_unseen_notes_are_the_same_for_every_model():
    assert draw(2, 60, "unseen_templates", wide=True) == draw(2, 60, "unseen_templates")
    assert draw(2, 60, "unseen_values", wide=True) != draw(2, 60, "unseen_values")


def test_every_note_is_unlike_the_others(notes):
    assert len({note.text for note in notes}) == len(notes)


def test_no_markup_of_the_tables_reaches_a_note(notes):
    assert not [note.text for note in notes if re.search(r"[\[\]{}|~]|  | \.|\.\.", note.text)]


def names_and_numbers(note):
    """(kind, value) of every open value in a gold, as the split hashes them."""
    for key, value in note.gold.items():
        if value is None or key in ("currency", "event", "frequency", "reason"):
            continue
        if key in ("claimant", "patient") or (key in ("payer", "payee") and not is_company(value)):
            yield "first", value.split(" ")[0]
            yield "surname", value.split(" ")[-1]
        else:
            yield {"payer": "company", "payee": "company"}.get(key, key), value


def is_company(name):
    return name.split(" ")[-1] in ["Ltd", "GmbH", "AG", "SA", "BV", "AB", "Inc", "LLC", "plc", "Oy", "ApS", "Srl"]


def test_training_and_held_out_notes_share_no_value():
    seen = {split: set(itertools.chain(*map(names_and_numbers, draw(4, 3000, split)))) for split in SPLITS}
    assert len(seen["train"]) > 5000
    made_up = itertools.islice(stream(4, "train", style=Style(invented=0.6)), 1000)
    seen["train"] |= set(itertools.chain(*map(names_and_numbers, made_up)))
    assert not seen["train"] & (seen["unseen_values"] | seen["unseen_templates"])
    assert not any(held_out(*pair) for pair in seen["train"])
    assert all(held_out(*pair) for pair in seen["unseen_values"] | seen["unseen_templates"])


def test_keys_keep_their_order_and_the_answer_is_compact_json(notes):
    for note in notes:
        assert tuple(json.loads(note.answer)) == KEYS[note.domain]
        assert ": " not in re.sub(r'"[^"]*"', "", note.answer)


def test_every_stated_value_can_be_read_in_the_text(notes):
    assert_readable(notes)


def test_notes_of_wide_wording_are_as_sound():
    notes = draw(11, 600, "unseen_values", wide=True)
    assert_readable(notes)
    test_no_markup_of_the_tables_reaches_a_note(notes)


VARIETY = Variety(garbled=1.0, reworded=1.0, mixed=1.0, crowded=1.0, crossed=1.0)


def test_straying_from_the_tables_leaves_every_value_readable():
    strayed = list(itertools.islice(stream(11, "train", style=Style(variety=VARIETY)), 300))
    for note in strayed:
        # not `amount`: where the word between two numbers is lost they read as one
        kept = {k: v for k, v in note.gold.items() if k not in ("event", "frequency", "reason", "amount")}
        assert_readable([dataclasses.replace(note, gold=kept)])
    assert not [note.text for note in strayed if re.search(r"[\[\]{}|~]", note.text)]


def test_straying_from_the_tables_gives_words_that_no_table_has():
    def words(variety):
        notes = itertools.islice(stream(11, "train", style=Style(variety=variety)), 300)
        return {word for note in notes for word in re.findall(r"\b[a-z]{4,}\b", note.text)}

    assert len(words(VARIETY) - words(Variety())) > 500


def test_crossed_lines_state_the_slot_once():
    assert cross("We saw {patient} today.", "{patient} is well.") == "We saw {patient} is well."
    assert cross("{patient} is well.", "We saw {patient}.") == "{patient} is well."


def assert_readable(notes):
    for note in notes:
        for key, value in note.gold.items():
            if value is not None:
                assert SUPPORT.get(key, literally)(value, note), (key, value, note.text)


def literally(value, note):
    return value in note.text or all(part in note.text for part in value.rsplit(" ", 1))


def amount_is_written(value, note):
    whole, cents = value.split(".")
    digits = re.sub(r"(?<=\d)[,.' ](?=\d{3}(?!\d))", "", note.text)
    return re.search(rf"(?<!\d){whole}([.,]{cents}|{r'(?![.,]?[0-9])' if cents == '00' else 'X'})", digits)


def currency_is_written(value, note):
    signs = {
        "GBP": ("£", "pounds"),
        "EUR": ("€", "euros"),
        "USD": ("$", "US dollars"),
        "CHF": ("Swiss francs",),
        "SEK": ("Swedish kronor",),
        "CAD": ("C$",),
        "AUD": ("A$",),
    }
    return any(sign in note.text for sign in (value, *signs[value]))


def date_is_written(value, note):
    day = datetime.date.fromisoformat(value)
    month = MONTHS[day.month - 1]
    ways = (
        rf"{day.day}(st|nd|rd|th)?[ -](of )?{month}\w*[ -]{day.year}",
        rf"{month}\w* {day.day}, {day.year}",
        value,
        rf"{day:%d}[./]{day:%m}[./]({day:%Y}|{day:%y})",
    )
    return any(re.search(way, note.text) for way in ways)


def dose_is_written(value, note):
    number, unit = value.split(" ")
    words = {"mg": "milligrams", "mcg": "micrograms", "ml": "millilitres", "g": "grams", "units": "units"}
    return re.search(rf"(?<![\d.]){re.escape(number)} ?({unit}|{words[unit]})", note.text)


def category_is_said(slot):
    def said(value, note):
        ways = {w.strip() for p in wording(note.domain, wide=True).categories[slot][value] for w in p.wordings()}
        return any(way.lower() in note.text.lower() for way in ways)

    return said


SUPPORT = {
    "amount": amount_is_written,
    "currency": currency_is_written,
    "date": date_is_written,
    "dose": dose_is_written,
    **{slot: category_is_said(slot) for slot in ("event", "frequency", "reason")},
}


def test_notes_have_distractors_and_missing_fields():
    notes = draw(8, 900, "train")
    missing = sum(value is None for note in notes for value in note.gold.values())
    assert 0.05 < missing / sum(len(note.gold) for note in notes) < 0.2
    assert (
        sum("adjuster" in n.text.lower() or "excess" in n.text.lower() for n in notes if n.domain == "claim") > 30
    )


def test_the_gold_scores_full_marks_and_prose_scores_none():
    note = draw(1, 1)[0]
    assert score(note.gold, note.answer).exact
    assert not score(note.gold, "I think the claimant is unknown.").valid
    assert score(note.gold, "[" * 100_000).correct == 0
    assert score(note.gold, "[1]").correct == 0


def test_a_missing_field_is_right_only_as_an_explicit_null():
    scores = score({"payer": "Ada Borg", "payee": None}, '{"payer":"Ada Borg"}')
    assert scores.right == {"payer": True, "payee": False}
    assert (scores.correct, scores.total, scores.exact, scores.valid) == (1, 2, False, True)
