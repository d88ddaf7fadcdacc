"""How a model's matrices are quantised: config.json read strictly, and which format each stored matrix has.

Which layers stay plain, writers say in ways that differ from loader to loader; here the files decide. Of every
matrix either the plain tensor is there or exactly the tensors of one declared format, by name, number type and
shape, and nothing else: so no list of names can be misread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from engine.errors import EngineError
from engine.weights import awq, compressed_tensors, fp8, gptq, int_weights, mxfp4
from engine.weights.formats import FLOATS, Format, Shape, Stored, prefix
from engine.weights.settings import Settings, unsupported

FIELDS = ("quantization_config", "compression_config")
"""Where config.json says it; two names of one thing."""

_METHODS: Mapping[str, Callable[[Settings], tuple[Format, ...]]] = {
    "cloister": int_weights.parse,
    "awq": awq.parse,
    "gptq": gptq.parse,
    "compressed-tensors": compressed_tensors.parse,
    "fp8": fp8.parse,
    "mxfp4": mxfp4.parse,
}


@dataclass(frozen=True, slots=True)
class Quantisation:
    """What config.json says of quantised weights.

    Attributes:
        method: who defined the format, as `quant_method` calls it.
        formats: what a quantised matrix may be; the files decide which.
        tables: what embeddings and the matrix of the logits may be; where this is empty, the latter may be one of
            `formats`.
    """

    method: str
    formats: tuple[Format, ...]
    tables: tuple[Format, ...] = ()


class Entry(Protocol):
    """A tensor as a file's header describes it."""

    @property
    def dtype(self) -> str:
        """Its number type, as safetensors calls it."""

    @property
    def shape(self) -> Shape:
        """Its shape."""


def parse_quantisation(config: Mapping[str, Any]) -> Quantisation | None:
    """What config.json, as an object, says of quantised weights; None when they are plain.

    Raises:
        EngineError: QUANTISATION_UNSUPPORTED names the method, field or value that is not known.
    """
    given = [(name, config[name]) for name in FIELDS if config.get(name) is not None]
    if not given:
        return None
    if len(given) > 1:
        raise unsupported(FIELDS[0], f"there is a {FIELDS[1]} beside it")
    where, raw = given[0]
    settings = Settings(raw, where)
    method = settings.one_of("quant_method", *_METHODS)
    formats = _METHODS[method](settings)
    tables = int_weights.parse_tables(settings) if method == "cloister" else ()
    settings.finish()
    return Quantisation(method, formats, tables)


def assign(
    shapes: Mapping[str, Shape],
    matrices: Collection[str],
    quantisation: Quantisation | None,
    entries: Mapping[str, Entry],
    spare: Collection[str] = (),
    tables: Collection[str] = (),
) -> dict[str, Format]:
    """Which of a model's matrices are quantised, and how; every tensor of the files is then accounted for.

    Args:
        shapes: the plain tensors that the model declares.
        matrices: names of those that may be quantised as layers are.
        quantisation: what config.json says.
        entries: the tensors of the files.
        spare: tensors that may be there and that nobody takes.
        tables: names of those with a row for each token.

    Raises:
        EngineError: TENSORS_MISMATCH or DTYPE_UNSUPPORTED; the message names a tensor that is missing, surplus, or
            of another shape or number type than its place.
    """
    formats: dict[str, Format] = {}
    used: set[str] = set()
    for name, shape in sorted(shapes.items()):
        if name not in entries or entries[name].dtype not in FLOATS:
            declared = _declared(name, quantisation, matrices, tables)
            found = _format(name, shape, declared, entries, shapes)
            if found is not None:
                formats[name] = found
                used |= {stored for stored in _stored(found, name, shape, shapes) if stored in entries}
                continue
        _check_plain(name, shape, entries)
        used.add(name)
    surplus = sorted(entries.keys() - used - set(spare))
    if surplus:
        raise EngineError("TENSORS_MISMATCH", f"tensor {surplus[0]} is not part of the model its config describes")
    return formats


def _declared(
    name: str, quantisation: Quantisation | None, matrices: Collection[str], tables: Collection[str]
) -> tuple[Format, ...]:
    """What the tensor `name` may be, if it is not plain."""
    if quantisation is None:
        return ()
    if quantisation.tables and name in tables:
        return quantisation.tables
    return quantisation.formats if name in matrices else ()


def stored_names(name: str, found: Format, shape: Shape, shapes: Mapping[str, Shape]) -> tuple[str, ...]:
    """The tensors that make the quantised `name`; those that are optional may be missing."""
    return tuple(_stored(found, name, shape, shapes))


def _stored(found: Format, name: str, shape: Shape, shapes: Mapping[str, Shape]) -> dict[str, Stored]:
    """A bias that the model declares is the model's, not the format's."""
    return {key: value for key, value in found.stored(name, shape).items() if key == name or key not in shapes}


def _format(
    name: str,
    shape: Shape,
    declared: tuple[Format, ...],
    entries: Mapping[str, Entry],
    shapes: Mapping[str, Shape],
) -> Format | None:
    """The one declared format whose tensors are there; None where no tensor of any is."""
    candidates = [candidate for candidate in declared if candidate.dimensions == len(shape)]
    tables = [(candidate, _stored(candidate, name, shape, shapes)) for candidate in candidates]
    fitting = [candidate for candidate, table in tables if _fits(table, entries)]
    if fitting:
        return fitting[0]
    for _, table in tables:
        for key, stored in table.items():
            if key in entries and not stored.fits(entries[key].dtype, entries[key].shape):
                wanted = f"{' or '.join(stored.dtypes)} {' or '.join(str(list(s)) for s in stored.shapes)}"
                given = f"{entries[key].dtype} {list(entries[key].shape)}"
                raise EngineError("TENSORS_MISMATCH", f"tensor {key} is {given}, wanted {wanted}")
    for _, table in tables:
        missing = [key for key, stored in table.items() if key not in entries and not stored.optional]
        if table.keys() & entries.keys():
            raise EngineError("TENSORS_MISMATCH", f"tensor {missing[0]} is missing, {prefix(name)} is quantised")
    return None


def _fits(table: Mapping[str, Stored], entries: Mapping[str, Entry]) -> bool:
    return all(
        stored.fits(entries[key].dtype, entries[key].shape) if key in entries else stored.optional
        for key, stored in table.items()
    )


def _check_plain(name: str, shape: Shape, entries: Mapping[str, Entry]) -> None:
    if name not in entries:
        raise EngineError("TENSORS_MISMATCH", f"tensor {name} is missing")
    entry = entries[name]
    if entry.dtype not in FLOATS:
        raise EngineError("DTYPE_UNSUPPORTED", f"tensor {name} is {entry.dtype}; plain are {', '.join(FLOATS)}")
    if entry.shape != tuple(shape):
        raise EngineError("TENSORS_MISMATCH", f"tensor {name} has shape {list(entry.shape)}, not {list(shape)}")
