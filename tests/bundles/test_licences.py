"""SPDX expressions against a site's list."""

import pytest

from bundles.format.errors import BundleError
from bundles.trust.licences import is_allowed, parse

ALLOWED = ("MIT", "Apache-2.0", "GPL-2.0-only WITH Classpath-exception-2.0", "LicenseRef-acme", "LGPL-2.1-only")


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("mit", True),
        ("BSD-3-Clause", False),
        ("MIT AND Apache-2.0", True),
        ("MIT AND BSD-3-Clause", False),
        ("MIT OR BSD-3-Clause", True),
        ("BSD-2-Clause OR BSD-3-Clause", False),
        ("MIT OR BSD-3-Clause AND GPL-3.0-only", True),
        ("(MIT OR BSD-3-Clause) AND GPL-3.0-only", False),
        ("BSD-3-Clause AND (MIT OR Apache-2.0)", False),
        ("GPL-2.0-only WITH Classpath-exception-2.0", True),
        ("GPL-2.0-only", False),
        ("MIT WITH Autoconf-exception-2.0", True),
        ("GPL-2.0-only WITH Autoconf-exception-2.0", False),
        ("Apache-2.0+", True),
        ("LGPL-2.1-only+ OR BSD-3-Clause", True),
        ("LicenseRef-acme", True),
        ("DocumentRef-x:LicenseRef-acme", False),
        ("NOASSERTION", False),
        ("((((MIT))))", True),
        ("  MIT   OR\tApache-2.0 ", True),
    ],
)
def test_an_expression_is_allowed_as_it_is_meant(expression: str, allowed: bool) -> None:
    assert is_allowed(expression, ALLOWED) is allowed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "()",
        "MIT AND",
        "OR MIT",
        "MIT Apache-2.0",
        "(MIT",
        "MIT)",
        "MIT WITH",
        "MIT WITH (X)",
        "MIT and Apache-2.0",
        "MIT, Apache-2.0",
        "MIT WITH A+",
        "my licence!",
        "(" * 40 + "MIT" + ")" * 40,
    ],
)
def test_what_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(BundleError, match="LICENCE_EXPRESSION"):
        parse(text)
