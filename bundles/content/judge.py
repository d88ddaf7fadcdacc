"""The judgement on a model's files, whoever holds them: a builder, a verifier or the importer."""

import os
from collections.abc import Mapping

from bundles.content import forbidden, safetensors
from bundles.content.inspector import Inspector, Verdict
from bundles.format import strict_json
from bundles.format.chunks import Extent, read_extent
from bundles.format.errors import BundleError
from bundles.format.manifest import Model, role_of

_MAGIC_BYTES = 64
_INSPECTED = frozenset({"weights", "weights-index", "config", "tokenizer", "template"})
# Data tables, not configuration: engine-inspect parses them under limits.
_TABLES = frozenset({"tokenizer.json", "vocab.json"})


def judge(files: Mapping[str, tuple[int, int]], inspector: Inspector) -> Verdict:
    """Judge a model's files.

    Args:
        files: by path, a read-only descriptor and the size in bytes; of weights only the header is read here.
        inspector: runs engine-inspect.

    Raises:
        BundleError: the codes of forbidden, safetensors and inspector.
    """
    forbidden.check_names(files)
    tensors: dict[str, frozenset[str]] = {}
    indexes: dict[str, dict[str, object]] = {}
    for path, (fd, size) in files.items():
        forbidden.check_magic(path, os.pread(fd, _MAGIC_BYTES, 0))
        role = role_of(path)
        if role == "weights":
            tensors[path] = frozenset(tensor.name for tensor in safetensors.read_tensors(fd, size, path))
        elif role == "weights-index":
            indexes[path] = strict_json.parse_object(_content(fd, size, path), path)
        else:
            _check_small(path, fd, size)
    _check_distinct(tensors)
    for path, index in indexes.items():
        safetensors.check_index(index, tensors, path)
    return inspector.inspect({path: fd for path, (fd, _) in files.items() if role_of(path) in _INSPECTED})


def model_of(verdict: Verdict, digests: Mapping[str, str]) -> Model:
    """A manifest's description of the model that was judged; `digests` by path."""
    return Model(
        architecture=verdict.architecture,
        dtype=verdict.dtype,
        quantisation=None,
        max_context_tokens=verdict.max_context_tokens,
        parameters=verdict.parameters,
        capabilities=verdict.capabilities,
        tokenizer_sha256=digests.get("tokenizer.json"),
    )


def check_model(claimed: Model, verdict: Verdict, digests: Mapping[str, str]) -> None:
    """Refuse a manifest that describes another model than its files are.

    Raises:
        BundleError: MODEL_DIFFERS.
    """
    found = model_of(verdict, digests).model_dump()
    differing = [name for name, value in claimed.model_dump().items() if found[name] != value]
    if differing:
        raise BundleError("MODEL_DIFFERS", f"the manifest states another {differing[0]} than the files have")


def _check_small(path: str, fd: int, size: int) -> None:
    if path.endswith(".model"):
        return  # a binary table: no engine of ours parses it, and its magic was looked at
    content = _content(fd, size, path)
    forbidden.check_text(path, content)
    if path.endswith(".json") and path.rpartition("/")[2] not in _TABLES:
        if size > forbidden.MAX_CONFIG:
            raise BundleError("CONTENT_TOO_LARGE", f"{path!a} is no configuration with {size} bytes")
        forbidden.check_config(path, content)


def _check_distinct(tensors: Mapping[str, frozenset[str]]) -> None:
    seen: set[str] = set()
    for path, names in tensors.items():
        if seen & names:
            raise BundleError("SAFETENSORS_TENSOR", f"{path} repeats a tensor of another shard")
        seen |= names


def _content(fd: int, size: int, path: str) -> bytes:
    if size > forbidden.MAX_SMALL_FILE:
        raise BundleError("CONTENT_TOO_LARGE", f"{path!a} is too large with {size} bytes; only weights may be")
    return b"".join(read_extent(fd, Extent(0, size)))
