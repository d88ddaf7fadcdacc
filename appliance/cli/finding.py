"""What a check of `cloister doctor` found."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        check: what was looked at.
        level: OK, WARN or FAIL.
        found: what is there.
        remedy: what to do; empty with OK.
    """

    check: str
    level: str
    found: str
    remedy: str = ""
