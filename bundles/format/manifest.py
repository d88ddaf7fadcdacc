"""The manifest: what a bundle holds, which release of which model it is, and where it may be used.

The signed bytes are parsed strictly, after their signatures hold; there is no canonical JSON and no field that a
reader may skip. Sizes are bytes, digests are SHA-256 in lower-case hex, times are UTC to the second.
"""

import hashlib
import json
from datetime import UTC, datetime
from typing import Annotated, Literal
from weakref import WeakValueDictionary

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from bundles.format import strict_json
from bundles.format.chunks import CHUNK_SIZE, EMPTY_SHA256, MIN_CHUNK_SIZE
from bundles.format.errors import BundleError
from bundles.format.paths import check_paths

SCHEMA = "cloister.bundle/1"
PAYLOAD_TYPE = "application/vnd.cloister.bundle-manifest.v1+json"
PRODUCT = "cloister"
MAX_MANIFEST = 32 * 1024 * 1024
MAX_FILES = 100_000
MAX_VOLUMES = 999
MAX_DOCUMENTS = 64
MAX_DOCUMENTS_SIZE = 64 * 1024 * 1024
MAX_TOTAL = 2**50
_MOST_SAID = 200
_TIME = "%Y-%m-%dT%H:%M:%SZ"


def format_time(moment: datetime) -> str:
    """A moment as manifests write it."""
    return moment.astimezone(UTC).strftime(_TIME)


def parse_time(text: str) -> datetime:
    """The moment that `format_time` wrote.

    Raises:
        ValueError: it is not in that form.
    """
    moment = datetime.strptime(text, _TIME).replace(tzinfo=UTC)
    if format_time(moment) != text:
        raise ValueError(f"{text!a} is not a time like 2026-01-31T23:59:59Z")
    return moment


def _checked_time(text: str) -> str:
    parse_time(text)
    return text


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?$")]
Version = Annotated[str, Field(pattern=r"^[0-9A-Za-z](?:[0-9A-Za-z.+_-]{0,62}[0-9A-Za-z])?$")]
Time = Annotated[str, AfterValidator(_checked_time)]
Text = Annotated[str, Field(max_length=4096)]
Size = Annotated[int, Field(ge=0, le=MAX_TOTAL)]
Sequence = Annotated[int, Field(gt=0, lt=2**53)]
Target = Annotated[str, Field(min_length=1, max_length=128)]
Spdx = Annotated[str, Field(min_length=1, max_length=128)]
Kind = Literal["model", "adapter", "draft"]
Role = Literal["weights", "weights-index", "config", "tokenizer", "template", "licence", "document"]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Statement(_Strict):
    """What a person types of a release; `build` refuses it early."""

    name: Name
    version: Version
    sequence: Sequence
    targets: tuple[Target, ...]
    spdx: Spdx


class Requirement(_Strict):
    """A model that an adapter or draft needs: by name, and by manifest digest where only one will do."""

    name: Name
    model_digest: Digest | None


class Model(_Strict):
    """What the model is, as engine-inspect judged its files."""

    architecture: Annotated[str, Field(min_length=1, max_length=128)]
    dtype: Annotated[str, Field(min_length=1, max_length=32)]
    quantisation: Annotated[str, Field(max_length=64)] | None
    max_context_tokens: Annotated[int, Field(ge=0)]
    parameters: Annotated[int, Field(ge=0)]
    capabilities: tuple[Annotated[str, Field(max_length=64)], ...]
    tokenizer_sha256: Digest | None


class Resources(_Strict):
    """The least the release was meant for: memory per device in bytes, number of GPUs; 0 where a CPU is enough."""

    gpu_memory: Size
    gpus: Annotated[int, Field(ge=0, le=1024)]


@dataclass(frozen=True, slots=True, config=ConfigDict(strict=True, extra="forbid"))
class File:
    """One file of the model's folder and its chunks, in order; with slots, for there may be 100 000."""

    path: str
    size: Size
    sha256: Digest
    media_type: Annotated[str, Field(max_length=128)]
    role: Role
    chunks: tuple[Digest, ...]


class Document(_Strict):
    """A document that travels beside the model: an attestation or a licence's text."""

    member: Annotated[str, Field(pattern=r"^(?:attest|licence)/[A-Za-z0-9][A-Za-z0-9._-]{0,80}$")]
    size: Annotated[int, Field(ge=0, le=16 * 1024 * 1024)]
    sha256: Digest


class Licence(Document):
    """A licence and its SPDX expression; where `accept` says so, an operator accepts it before first use."""

    spdx: Spdx
    accept: bool


class Volume(_Strict):
    """One of several files that a bundle is split into: its number, from 1, and how many chunks it carries."""

    index: Annotated[int, Field(ge=1, le=MAX_VOLUMES)]
    chunks: Annotated[int, Field(ge=0)]


class Message(_Strict):
    """One message of a canary's conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text


class Canary(_Strict):
    """A conversation whose greedy answer shows that the model works as released."""

    messages: Annotated[tuple[Message, ...], Field(min_length=1, max_length=64)]
    expected: Text
    match: Literal["exact", "prefix", "contains", "json", "json_fields"]
    max_tokens: Annotated[int, Field(gt=0, le=4096)]


class Manifest(_Strict):
    """All that a release states about a bundle. Made by `build`, signed by `sign`, read by `parse`."""

    schema_: Annotated[Literal["cloister.bundle/1"], Field(alias="schema")]
    bundle_id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    product: Annotated[str, Field(max_length=64)]
    kind: Kind
    name: Name
    version: Version
    sequence: Sequence
    issued_at: Time
    not_before: Time
    expires: Time | None
    min_engine: Annotated[str, Field(pattern=r"^[0-9]{1,6}(\.[0-9]{1,6}){0,2}$")]
    supersedes: Digest | None
    base: Digest | None
    targets: tuple[Target, ...]
    requires: tuple[Requirement, ...]
    model: Model
    resources: Resources
    chunk_size: Annotated[int, Field(ge=MIN_CHUNK_SIZE, le=CHUNK_SIZE, multiple_of=MIN_CHUNK_SIZE)]
    files: Annotated[tuple[File, ...], Field(min_length=1)]
    total_size: Size
    volumes: tuple[Volume, ...]
    oms_sha256: Digest | None
    attestations: tuple[Document, ...]
    licences: tuple[Licence, ...]
    canary: tuple[Canary, ...]
    canary_pass_percent: Annotated[int, Field(ge=0, le=100)]
    critical: tuple[Annotated[str, Field(max_length=64)], ...]

    @property
    def reference(self) -> str:
        """name@version."""
        return f"{self.name}@{self.version}"

    @property
    def chunk_count(self) -> int:
        """Chunks of all files, each as often as it occurs."""
        return sum(len(file.chunks) for file in self.files)

    @property
    def documents(self) -> tuple[Document, ...]:
        """Attestations, then licences: their order in the container."""
        return (*self.attestations, *self.licences)

    def encode(self) -> bytes:
        """The bytes to sign."""
        return self.model_dump_json(by_alias=True, indent=1).encode()


_HELD: WeakValueDictionary[bytes, Manifest] = WeakValueDictionary()  # by SHA-256; one of 100 000 files has 60 MB


def parse(raw: bytes) -> Manifest:
    """The manifest in `raw`, complete and consistent in itself; the same one while somebody holds it.

    Raises:
        BundleError: MANIFEST_TOO_LARGE, MANIFEST_SCHEMA, MANIFEST_CRITICAL, MANIFEST_FILES, MANIFEST_SIZES,
            MANIFEST_DOCUMENTS, MANIFEST_REQUIRES, MANIFEST_VOLUMES, LICENCE_MISSING; the JSON and PATH codes.
    """
    digest = hashlib.sha256(raw).digest()
    held = _HELD.get(digest)
    if held is None:
        _HELD[digest] = held = _parse(raw)
    return held


def _parse(raw: bytes) -> Manifest:
    if len(raw) > MAX_MANIFEST:
        raise BundleError("MANIFEST_TOO_LARGE", f"the manifest has {len(raw)} bytes, over {MAX_MANIFEST}")
    text = _strict(raw)
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise BundleError("MANIFEST_SCHEMA", f"the manifest's {fault_of(error)}") from None
    _check_kind(manifest)
    _check_files(manifest)
    _check_volumes(manifest)
    _check_documents(manifest)
    return manifest


def _strict(raw: bytes) -> str:
    """The document as JSON that has one reading only; the tree of 100 000 files is gone before they are made."""
    value = strict_json.parse_object(raw, "the manifest")
    if value.get("critical"):
        raise BundleError("MANIFEST_CRITICAL", "the manifest needs a newer Cloister: it has critical extensions")
    files = value.get("files")
    if isinstance(files, list) and len(files) > MAX_FILES:
        raise BundleError("MANIFEST_FILES", f"the manifest lists over {MAX_FILES} files")
    return json.dumps(value)


def fault_of(error: ValidationError) -> str:
    """Where a document is not as it must be, and why; what its own fields are called is spelled out, and cut."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))[:_MOST_SAID] or "whole"
    return f"{where if where.isprintable() else ascii(where)}: {first['msg'][:_MOST_SAID]}"


def _check_kind(manifest: Manifest) -> None:
    if (manifest.kind == "model") == bool(manifest.requires):
        raise BundleError(
            "MANIFEST_REQUIRES",
            f"the bundle holds {'a' if manifest.kind != 'adapter' else 'an'} {manifest.kind} and requires "
            f"{len(manifest.requires)} models; an adapter or draft requires some, a model none",
        )


def _check_volumes(manifest: Manifest) -> None:
    volumes = manifest.volumes
    if not volumes:
        return
    if len(volumes) == 1 or [volume.index for volume in volumes] != list(range(1, len(volumes) + 1)):
        raise BundleError("MANIFEST_VOLUMES", "the manifest's volumes are not numbered 1, 2, .. or are only one")
    if not all(volume.chunks for volume in volumes[1:]):
        raise BundleError("MANIFEST_VOLUMES", "the manifest has a volume after the first that carries no chunk")
    chunks, carried = manifest.chunk_count, sum(volume.chunks for volume in volumes)
    if carried != chunks and (manifest.base is None or carried > chunks):
        raise BundleError("MANIFEST_VOLUMES", f"the volumes carry {carried} chunks, the files have {chunks}")


def _check_files(manifest: Manifest) -> None:
    check_paths(file.path for file in manifest.files)
    if manifest.total_size != sum(file.size for file in manifest.files):
        raise BundleError("MANIFEST_SIZES", "the files' sizes do not add up to the manifest's total_size")
    for file in manifest.files:
        if (file.role, file.media_type) != (role_of(file.path), media_type_of(file.path)):
            raise BundleError("MANIFEST_FILES", f"{file.path} is given a role or type that its name does not have")
        _check_chunks(file, manifest.chunk_size)


def _check_chunks(file: File, chunk_size: int) -> None:
    if len(file.chunks) != -(-file.size // chunk_size):
        raise BundleError("MANIFEST_SIZES", f"{file.path} has another number of chunks than its size needs")
    expected = {0: EMPTY_SHA256, 1: file.chunks[0] if file.chunks else ""}.get(len(file.chunks), file.sha256)
    if file.sha256 != expected:
        raise BundleError("MANIFEST_SIZES", f"{file.path} has another digest than its only chunk")


def _check_documents(manifest: Manifest) -> None:
    folders = [(manifest.attestations, "attest/"), (manifest.licences, "licence/")]
    names = [document.member for document in manifest.documents]
    misplaced = [d.member for documents, folder in folders for d in documents if not d.member.startswith(folder)]
    if misplaced or len(set(names)) != len(names):
        raise BundleError("MANIFEST_DOCUMENTS", "a document is listed twice or in the wrong folder")
    if len(names) > MAX_DOCUMENTS or sum(d.size for d in manifest.documents) > MAX_DOCUMENTS_SIZE:
        raise BundleError(
            "MANIFEST_DOCUMENTS", f"the documents are over {MAX_DOCUMENTS} or {MAX_DOCUMENTS_SIZE} bytes"
        )
    if not manifest.licences:
        raise BundleError("LICENCE_MISSING", "the manifest names no licence; every bundle states one")


def media_type_of(path: str) -> str:
    """The media type a manifest gives a file, by its name."""
    _, dot, suffix = path.rpartition("/")[2].lower().rpartition(".")
    return {
        "json": "application/json",
        "safetensors": "application/vnd.safetensors",
        "jinja": "text/x-jinja",
        "md": "text/markdown",
        "model": "application/vnd.sentencepiece",
    }.get(suffix if dot else "", "text/plain")


def role_of(path: str) -> Role:
    """What a file is for, by its name, as Hugging Face folders name them."""
    name = path.rpartition("/")[2].lower()
    if name.endswith(".safetensors"):
        return "weights"
    if name.endswith(".safetensors.index.json"):
        return "weights-index"
    if name.endswith(".jinja"):
        return "template"
    if name.startswith(("tokenizer", "vocab", "merges", "special_tokens", "added_tokens")):
        return "tokenizer"
    if name.startswith(("licence", "license", "notice")):
        return "licence"
    return "config" if name.endswith(".json") else "document"
