"""Names that operators give: checked once, here, before anything is made of them."""

import re
from collections.abc import Iterable

from appliance.errors import CloisterError

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
LONGEST_DEPLOYMENT = 32
"""A deployment's name is part of a socket's path, which the kernel bounds."""
SYSTEM_TENANT = "system"
"""The appliance itself, as a client of its own gateway."""
TRIAL_ALIAS = "trial.{deployment}"
"""What it calls a version under trial; no name, so nobody else can be granted it."""


def is_name(text: str) -> bool:
    """Lower-case letters, digits and inner hyphens, 1 to 63 of them: a DNS label (RFC 1123)."""
    return _NAME.fullmatch(text) is not None


def check_name(text: str, field: str, longest: int = 63) -> str:
    """`text`, if it is a name.

    Raises:
        CloisterError: INVALID_NAME, without echoing the text.
    """
    if not is_name(text) or len(text) > longest:
        raise CloisterError(
            "INVALID_NAME",
            f"{field}: 1 to {longest} lower-case letters, digits and inner hyphens are a name; choose such a one",
            field=field,
        )
    return text


def check_names(texts: Iterable[str], field: str) -> list[str]:
    """`texts`, each a name, sorted and without repetition."""
    return sorted({check_name(text, field) for text in texts})
