"""What is known of a bundle when it is built; statements are written so that equal facts give equal bytes."""

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from bundles.attest.card import Card
from bundles.format.manifest import File, Kind, Licence, Model, Requirement

TOOL = "cloister"
MOST_BYTES = 12 * 1024 * 1024
"""Bytes that a statement spends on listing files, so that it stays a document that a bundle may carry."""

_BYTES_PER_FILE = 400  # of a statement, beyond the path, which stands in it three times


@dataclass(frozen=True)
class Made:
    """What a converted or quantised model was made from.

    Attributes:
        steps: what was done, and what came of it.
        sources: name and SHA-256 of each file.
        statement: name and SHA-256 of the document that tells of it in full.
    """

    steps: tuple[Mapping[str, object], ...]
    sources: tuple[tuple[str, str], ...]
    statement: tuple[str, str]


@dataclass(frozen=True)
class Facts:
    """A release and its files.

    Attributes:
        name: of the release.
        version: shown to people.
        sequence: of the release.
        kind: model, adapter or draft.
        issued_at: as manifests write times; the only time in a statement.
        tool_version: of the builder.
        files: every file.
        model: as engine-inspect judged it.
        details: more of what it found, by name.
        licences: of the release.
        card: the model card.
        requires: models that this one needs.
        base: SHA-256 of the manifest that a delta builds on, or None.
        upstream: SHA-256 of the publisher's signature of the source, and whether it is over these very files.
        parameters: what the builder was told beyond all this.
        made: what the files were made from, where they are not a publisher's own.
    """

    name: str
    version: str
    sequence: int
    kind: Kind
    issued_at: str
    tool_version: str
    files: tuple[File, ...]
    model: Model
    details: Mapping[str, str]
    licences: tuple[Licence, ...]
    card: Card
    requires: tuple[Requirement, ...]
    base: str | None
    upstream: tuple[str, bool] | None
    parameters: Mapping[str, object]
    made: Made | None = None

    @cached_property
    def listed(self) -> tuple[File, ...]:
        """The files that statements list: all, or the first of very many."""
        needed = (_BYTES_PER_FILE + 3 * len(json.dumps(file.path)) for file in self.files)
        return tuple(f for f, total in zip(self.files, accumulate(needed), strict=True) if total <= MOST_BYTES)


def encode(statement: Mapping[str, object]) -> bytes:
    """A statement as JSON, always the same."""
    return json.dumps(statement, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"


def derived_uuid(statement: Mapping[str, object]) -> str:
    """A UUID that is a statement's own: the same for the same content (RFC 9562, version 5)."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"urn:x-cloister:statement:{encode(statement).decode()}"))
