"""Signed JSON has one reading: what two parsers could understand differently is refused."""

import pytest

from bundles.format import strict_json
from bundles.format.errors import BundleError


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b'{"a": 1, "a": 2}', "JSON_DUPLICATE_KEY"),
        (b'{"a": {"b": 1, "\\u0062": 2}}', "JSON_DUPLICATE_KEY"),
        (b'{"a": NaN}', "JSON_CONSTANT"),
        (b'{"a": -Infinity}', "JSON_CONSTANT"),
        (b'{"a": 1.0}', "JSON_FLOAT"),
        (b'{"a": 1e3}', "JSON_FLOAT"),
        (b'{"a": 9007199254740993}', "JSON_INTEGER"),
        (b'{"a": ' + b"9" * 5000 + b"}", "JSON_INTEGER"),
        (b'{"a":' * 33 + b"1" + b"}" * 33, "JSON_DEPTH"),
        (b"[" * 100_000, "JSON_DEPTH"),
        (b"[" * 33 + b"]" * 33, "JSON_DEPTH"),
        (b'{"a": [' + b"[]," * 1_500_000 + b"[]]}", "JSON_VALUES"),
        (b"\xef\xbb\xbf{}", "JSON_BOM"),
        (b'{"a": "\xff"}', "JSON_ENCODING"),
        (b'{"a": "\\ud800"}', "JSON_SURROGATE"),
        (b'{"\\udfff": 1}', "JSON_SURROGATE"),
        (b"{} {}", "JSON_TRAILING"),
        (b"{}\0", "JSON_TRAILING"),
        (b"{", "JSON_SYNTAX"),
        (b"[]", "JSON_NOT_OBJECT"),
    ],
)
def test_ambiguous_json_is_refused_by_name(raw: bytes, code: str) -> None:
    with pytest.raises(BundleError) as error:
        strict_json.parse_object(raw, "the document")
    assert error.value.code == code


def test_the_limits_themselves_are_accepted() -> None:
    assert strict_json.parse(b'{"a": 9007199254740992}', "it") == {"a": 2**53}
    for nested in (b'{"a":' * 32 + b"1" + b"}" * 32, b"[" * 32 + b"]" * 32):
        strict_json.parse(nested, "it")


def test_model_configuration_may_have_any_number_but_no_ambiguity() -> None:
    raw = b'{"eps": 1e-6, "model_max_length": 1000000000000000019884624838656}'
    value = strict_json.parse_object(raw, "config", any_number=True)
    assert value == {"eps": 1e-6, "model_max_length": 1000000000000000019884624838656}
    for ambiguous, code in ((b'{"a": 1, "a": 1.5}', "JSON_DUPLICATE_KEY"), (b'{"a": 1e999}', "JSON_CONSTANT")):
        with pytest.raises(BundleError, match=code):
            strict_json.parse(ambiguous, "config", any_number=True)
