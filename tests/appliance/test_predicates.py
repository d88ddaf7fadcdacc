"""What a canary's answer is held to."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.control.activation.canaries import Verdict
from appliance.control.activation.predicates import MATCHES, holds
from appliance.errors import CloisterError


@pytest.mark.parametrize(
    ("match", "expected", "answer", "good"),
    [
        ("exact", "yes", " yes\n", True),
        ("exact", "yes", "Yes", False),
        ("exact", "yes", "yes.", False),
        ("prefix", "yes", "yes, of course", True),
        ("prefix", "yes", "oh yes", False),
        ("contains", "yes", "oh yes!", True),
        ("contains", "yes", "no", False),
        ("json", '{"a": 1, "b": [true]}', '{"b": [true], "a": 1.0}', True),
        ("json", '{"a": 1}', '{"a": 1, "b": 2}', False),
        ("json", '{"a": 1}', '{"a": true}', False),
        ("json", "[1, 2]", "[2, 1]", False),
        ("json", "[1]", "[1, 2]", False),
        ("json", '{"a": 1}', '{"a": 2, "a": 1}', False),
        ("json", "1", "NaN", False),
        ("json", "null", "no JSON", False),
        ("json", "no JSON", "no JSON", False),
        ("json_fields", '{"a": {"b": 0}}', '{"a": {"b": 0}, "c": 1}', True),
        ("json_fields", '{"a": {"b": 0}}', '{"a": {"b": 0, "c": 1}}', False),
        ("json_fields", '{"a": null}', "{}", False),
        ("json_fields", "[1]", "[1]", False),
        ("near", "yes", "yes", False),
    ],
)
def test_an_answer_holds_or_does_not(match: str, expected: str, answer: str, good: bool) -> None:
    assert holds(match, expected, answer) is good


@given(st.sampled_from(MATCHES), st.text(), st.text())
def test_no_text_makes_a_predicate_fail(match: str, expected: str, answer: str) -> None:
    assert isinstance(holds(match, expected, answer), bool)


def test_an_answer_nested_without_end_is_merely_wrong() -> None:
    assert not holds("json", "[]", "[" * 200_000)
    assert not holds("json", "[]", "1" * 10_000)
    nested = "[" * 900 + "]" * 900
    assert not holds("json", nested, nested)
    assert not holds("json_fields", f'{{"a": {nested}}}', f'{{"a": {nested}}}')


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(values)
def test_every_value_equals_itself_however_it_is_written(value: object) -> None:
    assert holds("json", json.dumps(value), json.dumps(value, indent=3, ensure_ascii=False))


@pytest.mark.parametrize(
    ("codes", "percent", "refusal"),
    [
        ([], 100, ""),
        (["", ""], 100, ""),
        (["", "MISMATCH"], 50, ""),
        (["", "MISMATCH"], 51, "CANARY_FAILED"),
        (["MISMATCH"], 0, ""),
        (["DEADLINE_EXCEEDED"], 100, "CANARY_TIMEOUT"),
        (["DEADLINE_EXCEEDED", "MISMATCH"], 100, "CANARY_FAILED"),
        (["", "", "UNAVAILABLE"], 67, "CANARY_FAILED"),
    ],
)
def test_a_rate_of_passes_is_asked_for_and_what_failed_is_named(
    codes: list[str], percent: int, refusal: str
) -> None:
    verdict = Verdict(len(codes))
    for code in codes:
        verdict = verdict.after(code)
    if not refusal:
        verdict.check(percent)
        return
    with pytest.raises(CloisterError) as caught:
        verdict.check(percent)
    assert caught.value.code == refusal
    for index, code in enumerate(codes):
        assert (f"{index} {code}" in caught.value.message) is bool(code)
