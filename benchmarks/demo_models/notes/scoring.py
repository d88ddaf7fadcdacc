"""How right an answer is, field by field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class FieldScores:
    """Which fields of the gold the answer has exactly `right`, and whether it was one JSON object (`valid`)."""

    right: dict[str, bool]
    valid: bool

    @property
    def correct(self) -> int:
        """How many fields are right."""
        return sum(self.right.values())

    @property
    def total(self) -> int:
        """How many fields there are."""
        return len(self.right)

    @property
    def exact(self) -> bool:
        """True when every field is right."""
        return self.correct == self.total


def score(gold: Mapping[str, str | None], answer_text: str) -> FieldScores:
    """Compare an answer with the gold.

    A missing field is right only as an explicit null; an answer that is no JSON object has no field right.
    """
    try:
        answer = json.loads(answer_text)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        return FieldScores(dict.fromkeys(gold, False), valid=False)
    return FieldScores({key: key in answer and answer[key] == want for key, want in gold.items()}, valid=True)
