"""What a release takes from a model's folder: its visible files, licences, documents beside it, canaries."""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from bundles.attest.card import Card, read_card
from bundles.format import manifest as manifests
from bundles.format import strict_json
from bundles.format.chunks import BUFFER_SIZE
from bundles.format.container import open_file
from bundles.format.errors import BundleError
from bundles.format.manifest import MAX_FILES, Canary, Document, File, Licence

CANARIES = "canaries.json"
PUBLISHED_SIGNATURE = "model.sig"
_BESIDE = frozenset({CANARIES, PUBLISHED_SIGNATURE})
MODEL_CARD = "README.md"
_LICENCE_NAMES = ("license", "licence", "copying")
_NO_LINKS = "a bundle has none: copy the folder with cp -RL, which copies files"
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class ModelFolder:
    """A model's folder: its visible files, opened when they are read, each the very file that was there at first.

    A `content.files.ModelFiles`; use `opened`.

    Args:
        fd: descriptor of the folder, which `close` closes.
        found: what each file was when it was listed, by path.
    """

    def __init__(self, fd: int, found: dict[str, os.stat_result]) -> None:
        self._fd = fd
        self._found = found
        self._open = ("", -1)
        self.sizes = {path: state.st_size for path, state in found.items()}

    def read(self, path: str, offset: int, length: int) -> bytes:
        """See `content.files.ModelFiles`; the file that was read last stays open."""
        if self._open[0] != path:
            self._leave()
            self._open = (path, self.open(path))
        return _read(self._open[1], path, offset, max(0, min(length, self.sizes[path] - offset)))

    def open(self, path: str) -> int:
        """A descriptor of a file, for the caller to close.

        Raises:
            BundleError: SOURCE_CHANGED, it is not the file that was listed.
        """
        try:
            fd = os.open(path, _OPEN, dir_fd=self._fd)
        except OSError as error:
            raise BundleError("SOURCE_CHANGED", f"{path!a} cannot be opened: {error.strerror}") from None
        if _identity(os.fstat(fd)) != _identity(self._found[path]):
            os.close(fd)
            raise BundleError("SOURCE_CHANGED", f"{path!a} changed while the bundle was built; repeat")
        return fd

    def close(self) -> None:
        """Close what is open."""
        self._leave()
        os.close(self._fd)

    def _leave(self) -> None:
        if self._open[1] >= 0:
            os.close(self._open[1])
        self._open = ("", -1)


@contextmanager
def opened(folder: Path) -> Iterator[ModelFolder]:
    """A folder's visible files, in code point order.

    Raises:
        BundleError: SOURCE_UNREADABLE, SOURCE_SYMLINK, SOURCE_NOT_FILE, MANIFEST_FILES.
    """
    found = {}
    for path in sorted(_visible(folder)):
        state = (folder / path).lstat()
        if stat.S_ISLNK(state.st_mode):
            raise BundleError("SOURCE_SYMLINK", f"{folder / path} is a symbolic link; {_NO_LINKS}")
        if not stat.S_ISREG(state.st_mode):
            raise BundleError("SOURCE_NOT_FILE", f"{folder / path} is not a regular file")
        found[path] = state
    if not found:
        raise BundleError("SOURCE_UNREADABLE", f"{folder} is not a folder with files in it")
    if len(found) > MAX_FILES:
        raise BundleError("MANIFEST_FILES", f"{folder} has {len(found)} files, over {MAX_FILES}")
    files = ModelFolder(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), found)
    try:
        yield files
    finally:
        files.close()


def describe(files: ModelFolder, path: str, chunk_size: int, told: Callable[[int], None]) -> File:
    """The manifest's entry of a file, read once; `told` hears of every block.

    Raises:
        BundleError: SOURCE_CHANGED.
    """
    size = files.sizes[path]
    whole, chunks = hashlib.sha256(), []
    fd = files.open(path)
    try:
        for offset in range(0, size, chunk_size):
            chunk = hashlib.sha256()
            for block in blocks(fd, path, offset, min(chunk_size, size - offset)):
                whole.update(block)
                chunk.update(block)
                told(len(block))
            chunks.append(chunk.hexdigest())
    finally:
        os.close(fd)
    role, media_type = manifests.role_of(path), manifests.media_type_of(path)
    return File(
        path=path, size=size, sha256=whole.hexdigest(), media_type=media_type, role=role, chunks=tuple(chunks)
    )


def blocks(fd: int, path: str, offset: int, length: int) -> Iterator[bytes]:
    """The bytes of an open file from `offset` on, in blocks of at most `BUFFER_SIZE`.

    Raises:
        BundleError: SOURCE_CHANGED, the file ends early.
    """
    end = offset + length
    while offset < end:
        yield (block := _read(fd, path, offset, min(BUFFER_SIZE, end - offset)))
        offset += len(block)


def _read(fd: int, path: str, offset: int, length: int) -> bytes:
    parts: list[bytes] = []
    while length:
        try:
            part = os.pread(fd, length, offset)
        except OSError as error:
            raise BundleError("SOURCE_UNREADABLE", f"{path!a} cannot be read: {error.strerror}") from None
        if not part:
            raise BundleError("SOURCE_CHANGED", f"{path!a} became shorter while it was read; repeat")
        parts.append(part)
        offset, length = offset + len(part), length - len(part)
    return b"".join(parts)


def _identity(state: os.stat_result) -> tuple[int, ...]:
    return (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


def _visible(folder: Path) -> Iterator[str]:
    for base, folders, names in os.walk(folder, onerror=_refuse_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if (Path(base) / name).is_symlink():
                raise BundleError("SOURCE_SYMLINK", f"{base}/{name} is a symbolic link; {_NO_LINKS}")
        relative = os.path.relpath(base, folder)
        inside = relative != "."
        yield from (
            f"{relative}/{name}" if inside else name
            for name in names
            if not name.startswith(".") and (inside or name not in _BESIDE)
        )


def _refuse_unreadable(error: OSError) -> None:
    raise BundleError("SOURCE_UNREADABLE", f"{error.filename}: {error.strerror}")


def card(model: Path) -> Card:
    """What the folder's model card states."""
    return read_card((read_optional(model / MODEL_CARD) or b"").decode(errors="replace"))


def licences(
    model: Path, files: Sequence[Path], stated: str, *, accept: bool = False
) -> list[tuple[Licence, bytes]]:
    """The licences of a model and their texts: of `files`, else the folder's LICENSE files, else its model card.

    Args:
        model: the folder.
        files: texts that the caller names.
        stated: SPDX expression; where empty, the one of the model card.
        accept: an operator must accept them before first use.

    Raises:
        BundleError: LICENCE_MISSING, and as `documents`.
    """
    on_card = card(model).first("license")
    found: Sequence[Path] = sorted(
        path for path in model.iterdir() if path.name.lower().startswith(_LICENCE_NAMES) and path.is_file()
    )
    texts = documents("licence", files or found or ([model / MODEL_CARD] if on_card else []))
    if not texts:
        raise BundleError("LICENCE_MISSING", f"{model} has no LICENSE file; name one with --licence-file")
    spdx = stated or on_card or "NOASSERTION"
    try:
        return [(Licence(**document.model_dump(), spdx=spdx, accept=accept), text) for document, text in texts]
    except ValidationError:
        raise BundleError(
            "MANIFEST_SCHEMA", f"the model card states a licence that is too long: {spdx[:40]!a}.."
        ) from None


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
        found.append(document(f"{folder}/{path.name}", content))
    return found


def document(member: str, content: bytes) -> tuple[Document, bytes]:
    """A document as the manifest lists it, with its content.

    Raises:
        BundleError: MANIFEST_DOCUMENTS.
    """
    try:
        digest = hashlib.sha256(content).hexdigest()
        return Document(member=member, size=len(content), sha256=digest), content
    except ValidationError:
        raise BundleError(
            "MANIFEST_DOCUMENTS", f"{member!a} has a name or size that no document may have"
        ) from None


def canaries(path: Path) -> tuple[tuple[Canary, ...], int]:
    """Canaries, and the percent of them that must pass; 100 where the file does not say.

    Of a file {"canaries": [{"messages", "expected", "match"}, ..], "pass_percent", "decoding": {"max_tokens"}};
    the rest are notes.

    Raises:
        BundleError: MANIFEST_SCHEMA.
    """
    raw = read_optional(path)
    if raw is None:
        return (), 100
    page = strict_json.parse_object(raw, str(path), any_number=True)
    decoding, percent = page.get("decoding", {}), page.get("pass_percent", 100)
    try:
        if type(percent) is not int or not 0 <= percent <= 100:
            raise ValueError("pass_percent")
        limit = int(decoding["max_tokens"]) if isinstance(decoding, dict) and "max_tokens" in decoding else 256
        listed = TypeAdapter(list[dict[str, object]]).validate_python(page.get("canaries"))
        taken = [{"match": "exact", "max_tokens": limit, **canary} for canary in listed]
        known = [{key: value for key, value in canary.items() if key in Canary.model_fields} for canary in taken]
        found = TypeAdapter(tuple[Canary, ...]).validate_json(json.dumps(known))
        _check_expected(found)
        return found, percent
    except (ValidationError, ValueError, TypeError, RecursionError):
        raise BundleError(
            "MANIFEST_SCHEMA",
            f"{path} does not list canaries with messages and expected (JSON where JSON is compared), or its "
            "pass_percent is not 0 to 100",
        ) from None


def _check_expected(canaries: Sequence[Canary]) -> None:
    """Refuse (ValueError) canaries that compare JSON and expect none: no answer would ever pass."""
    for canary in canaries:
        if canary.match in ("json", "json_fields"):
            value = json.loads(canary.expected)
            if canary.match == "json_fields" and not isinstance(value, dict):
                raise ValueError("json_fields")


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
