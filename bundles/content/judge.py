"""The judgement on a model's files, whoever holds them: a builder, a verifier or the importer."""

from collections.abc import Mapping
from functools import partial

from bundles.content import forbidden, safetensors, text
from bundles.content.files import ModelFiles
from bundles.content.inspector import Inspector, Verdict
from bundles.format.errors import BundleError
from bundles.format.manifest import Kind, Model, role_of


def check_listing(sizes: Mapping[str, int]) -> None:
    """Refuse files for their names and sizes, before any byte of them is read.

    Args:
        sizes: bytes of each file, by its path.

    Raises:
        BundleError: the codes of `forbidden.check_names`, CONTENT_TOO_LARGE.
    """
    forbidden.check_names(sizes)
    for path, size in sizes.items():
        text.check_size(path, size)


def judge(files: ModelFiles, inspector: Inspector, kind: Kind) -> Verdict:
    """Judge the files of a model, adapter or draft; of weights only the header and the end are read.

    Args:
        files: all of them.
        inspector: runs engine-inspect.
        kind: what they must be; a draft is a model.

    Raises:
        BundleError: the codes of forbidden, text, safetensors and inspector.
    """
    check_listing(files.sizes)
    tensors: dict[str, frozenset[str]] = {}
    indexes: dict[str, dict[str, str]] = {}
    for path, size in files.sizes.items():
        read = partial(files.read, path)
        forbidden.check_magic(path, read(0, forbidden.HEAD_BYTES))
        forbidden.check_end(path, size, read)
        match role_of(path):
            case "weights":
                found = safetensors.read_tensors(read, size, path)
                tensors[path] = frozenset(tensor.name for tensor in found)
            case "weights-index":
                indexes[path] = safetensors.read_index(text.content(files, path), path)
            case _:
                text.check_small(files, path)
    _check_distinct(tensors)
    for path, index in indexes.items():
        safetensors.check_index(index, tensors, path)
    return inspector.inspect(files, kind)


def model_of(verdict: Verdict, digests: Mapping[str, str]) -> Model:
    """A manifest's description of the model that was judged; `digests` by path."""
    return Model(
        architecture=verdict.architecture,
        dtype=verdict.dtype,
        quantisation=verdict.quantisation,
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


def _check_distinct(tensors: Mapping[str, frozenset[str]]) -> None:
    seen: set[str] = set()
    for path, names in tensors.items():
        if seen & names:
            raise BundleError("SAFETENSORS_DUPLICATE", f"{path} repeats a tensor of another shard")
        seen |= names
