"""What a release takes from a model's folder: its visible files, licences, documents beside it, canaries."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from bundles.format import manifest as manifests
from bundles.format import strict_json
from bundles.format.chunks import digest_file
from bundles.format.container import open_file
from bundles.format.errors import BundleError
from bundles.format.manifest import Canary, Document, File, Licence

CANARIES = "canaries.json"
PUBLISHED_SIGNATURE = "model.sig"
_BESIDE = frozenset({CANARIES, PUBLISHED_SIGNATURE})
MODEL_CARD = "README.md"
# Front matter of a Hugging Face model card.
_CARD_LICENCE = re.compile(r"---\n(?:.*\n)*?licen[sc]e: *([A-Za-z0-9.+-]{1,64}) *\n(?:.*\n)*?---")
_LICENCE_NAMES = ("license", "licence", "copying")


def describe(path: str, fd: int, chunk_size: int) -> File:
    """The manifest's entry of an open file.

    Raises:
        BundleError: SOURCE_CHANGED.
    """
    size, sha256, chunks = digest_file(fd, chunk_size)
    role, media_type = manifests.role_of(path), manifests.media_type_of(path)
    return File(path=path, size=size, sha256=sha256, media_type=media_type, role=role, chunks=chunks)


@contextmanager
def opened(folder: Path) -> Iterator[dict[str, int]]:
    """Descriptors of a folder's visible files by relative path, in code point order."""
    with ExitStack() as stack:
        files = {}
        for path in sorted(_visible(folder)):
            files[path] = open_file(folder / path)
            stack.callback(os.close, files[path])
        if not files:
            raise BundleError("SOURCE_UNREADABLE", f"{folder} is not a folder with files in it")
        yield files


def _visible(folder: Path) -> Iterator[str]:
    for base, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if (Path(base) / name).is_symlink():
                raise BundleError("SOURCE_SYMLINK", f"{base}/{name} is a symbolic link; a bundle has none")
        relative = Path(base).relative_to(folder)
        inside = relative != Path(".")
        yield from (
            (relative / name).as_posix()
            for name in names
            if not name.startswith(".") and (inside or name not in _BESIDE)
        )


def licences(model: Path, files: Sequence[Path], stated: str) -> list[tuple[Licence, bytes]]:
    """The licences of a model and their texts: of `files`, else the folder's LICENSE files, else its model card.

    Args:
        model: the folder.
        files: texts that the caller names.
        stated: SPDX expression; where empty, the one of the model card.

    Raises:
        BundleError: LICENCE_MISSING, and as `documents`.
    """
    card = _CARD_LICENCE.match((read_optional(model / MODEL_CARD) or b"").decode(errors="replace"))
    found: Sequence[Path] = sorted(
        path for path in model.iterdir() if path.name.lower().startswith(_LICENCE_NAMES)
    )
    texts = documents("licence", files or found or ([model / MODEL_CARD] if card else []))
    if not texts:
        raise BundleError("LICENCE_MISSING", f"{model} has no LICENSE file; name one with --licence-file")
    spdx = stated or (card[1] if card else "NOASSERTION")
    return [(Licence(**document.model_dump(), spdx=spdx, accept=False), content) for document, content in texts]


def documents(folder: str, paths: Sequence[Path]) -> list[tuple[Document, bytes]]:
    """Files as members of `folder`, with their contents.

    Raises:
        BundleError: MANIFEST_DOCUMENTS, SOURCE_UNREADABLE and the other SOURCE codes.
    """
    found = []
    for path in paths:
        content = read_optional(path)
        if content is None:
            raise BundleError("SOURCE_UNREADABLE", f"{path} does not exist")
        try:
            member, digest = f"{folder}/{path.name}", hashlib.sha256(content).hexdigest()
            found.append((Document(member=member, size=len(content), sha256=digest), content))
        except ValidationError:
            raise BundleError(
                "MANIFEST_DOCUMENTS", f"{path} has a name or size that no document may have"
            ) from None
    return found


def canaries(path: Path) -> tuple[Canary, ...]:
    """Of a file {"canaries": [{"messages", "expected"}, ..], "decoding": {"max_tokens"}}; the rest are notes.

    Raises:
        BundleError: MANIFEST_SCHEMA.
    """
    raw = read_optional(path)
    if raw is None:
        return ()
    page = strict_json.parse_object(raw, str(path), any_number=True)
    decoding = page.get("decoding", {})
    try:
        limit = int(decoding["max_tokens"]) if isinstance(decoding, dict) and "max_tokens" in decoding else 256
        listed = TypeAdapter(list[dict[str, object]]).validate_python(page.get("canaries"))
        taken = [{"match": "exact", "max_tokens": limit, **canary} for canary in listed]
        known = [{key: value for key, value in canary.items() if key in Canary.model_fields} for canary in taken]
        return TypeAdapter(tuple[Canary, ...]).validate_json(json.dumps(known))
    except (ValidationError, ValueError, TypeError):
        raise BundleError("MANIFEST_SCHEMA", f"{path} does not list canaries with messages and expected") from None


def read_optional(path: Path) -> bytes | None:
    """A file's content; None when there is no such file.

    Raises:
        BundleError: the SOURCE codes.
    """
    if not path.exists():
        return None
    fd = open_file(path)
    with open(fd, "rb") as stream:
        return stream.read()
