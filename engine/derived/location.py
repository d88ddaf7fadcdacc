"""A derived file by its model, its layout and its digest, and where it lies."""

import re
from dataclasses import dataclass
from pathlib import Path

UNFINISHED = ".making"
"""What the name of a file ends with while it is written."""

_NAME = re.compile(r"[0-9a-f]{64}\.[a-z0-9]{1,16}-[a-z0-9]{1,16}-[0-9a-f]{16}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Derived:
    """One derived file.

    Attributes:
        model_digest: of the model that it was made of, hex.
        layout: what it was made for; see `engine.derived.layout`.
        sha256: of the file, hex.
        size: its bytes.
    """

    model_digest: str
    layout: str
    sha256: str
    size: int

    @property
    def name(self) -> str:
        """Of the file."""
        return f"{self.model_digest}.{self.layout}"

    @property
    def is_sound(self) -> bool:
        """Nothing in it leads out of its folder, or can be no file of ours."""
        return bool(_NAME.fullmatch(self.name) and _SHA256.fullmatch(self.sha256) and self.size > 0)


@dataclass(frozen=True, slots=True)
class Location:
    """A derived file where it lies."""

    folder: Path
    derived: Derived

    @property
    def path(self) -> Path:
        """Of the file."""
        return self.folder / self.derived.name
