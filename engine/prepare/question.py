"""What engine-prepare is asked on standard input: one JSON object, all of whose fields are there.

{"do": "convert", "source": "/media/model.gguf", "out": "/tmp/x", "keep": true, "embeddings":
true} or {"do": "quantise", "source":
"/models/m", "out": "/tmp/y", "bits": 4, "group": 32, "symmetric": false, "calibration": "/texts.jsonl", "tokens":
32768, "threads": 2, "embeddings": 8}; `calibration` may be null. Or of engine-host: {"do": "pack", "model_digest":
"ab..", "files": [["config.json", 712, "cd.."], ..], "store": "/home/store", "out": "/home/derived", "layout":
"cpu-bfloat16-0123456789abcdef", "backend": "cpu", "dtype": "bfloat16", "threads": 2, "most_bytes": 1000000}. Of a
deployment on a CUDA device: {"do": "kernels", .. as above but for "backend" and "dtype", "options": {"backend":
"triton", ..}, all of them and all filled in, "device": "NVIDIA H200", "capability": "9.0"}.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import EngineError
from engine.options import EngineOptions
from engine.weights.files import File, FileSet

Told = Callable[[str, int, int], None]
"""Hears what is done, how much of it, and of how much; 0 where nobody knows."""


@dataclass(frozen=True)
class Settings:
    """How a model is quantised.

    Attributes:
        bits: 8 or 4.
        group: columns that share a scale; 0: all.
        symmetric: no zeros.
        calibration: JSON lines of texts; needed for int4.
        tokens: most of them that errors are fed back for.
        threads: of the processor.
        embeddings: bits of embeddings and of the matrix of the logits, 8 or 4; 0: they stay as they are.
    """

    bits: int
    group: int
    symmetric: bool
    calibration: Path | None
    tokens: int
    threads: int
    embeddings: int = 0


@dataclass(frozen=True)
class Question:
    """What is to be made, of what, and where.

    Attributes:
        source: a GGUF file to convert, or a model's folder to quantise.
        out: an empty folder.
        settings: how to quantise; None: convert.
        keep: quantised numbers of a GGUF file may stay so.
        keep_embeddings: those of its embeddings and matrix of the logits must.
    """

    source: Path
    out: Path
    settings: Settings | None
    keep: bool = False
    keep_embeddings: bool = False


@dataclass(frozen=True)
class Packing:
    """Weights of the store that are to be put into the layout of a backend.

    Attributes:
        files: of the model.
        store: where they lie.
        out: where the derived file goes.
        layout: what it is called by, beside the model's digest.
        options: backend, dtype and threads; the rest does not matter here.
        most_bytes: that the file may have.
    """

    files: FileSet
    store: Path
    out: Path
    layout: str
    options: EngineOptions
    most_bytes: int


@dataclass(frozen=True)
class Compiling:
    """Kernels that a deployment will start, which are to be compiled for its device.

    Attributes:
        packing: files, store, out, layout, options and most_bytes as there; every option matters.
        device: its name, as its driver tells it.
        capability: its compute capability, 90 for 9.0.
    """

    packing: Packing
    device: str
    capability: int


def read_question(source: BinaryIO) -> Question | Packing | Compiling:
    """The question on standard input.

    Raises:
        EngineError: INVALID_QUESTION.
    """
    try:
        asked: dict[str, Any] = json.loads(source.read())
        match asked.pop("do"):
            case "convert":
                settings = None
            case "quantise":
                settings = _settings(asked)
            case "pack":
                options = EngineOptions(str(asked["backend"]), str(asked["dtype"]), threads=int(asked["threads"]))
                return _packing(asked, options)
            case "kernels":
                packing = _packing(asked, _options(asked))
                return Compiling(packing, str(asked["device"]), read_capability(str(asked["capability"])))
            case other:
                raise ValueError(other)
        keep, tables = (settings is None and bool(asked[key]) for key in ("keep", "embeddings"))
        return Question(Path(asked["source"]), Path(asked["out"]), settings, keep, tables)
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError("INVALID_QUESTION", "standard input is no question to engine-prepare") from error


def read_capability(text: str) -> int:
    """A compute capability: "9.0" is 90.

    Raises:
        ValueError: it is none.
    """
    major, minor = map(int, text.split("."))
    return 10 * major + minor


def _options(asked: dict[str, Any]) -> EngineOptions:
    return replace(EngineOptions(**asked["options"]), threads=int(asked["threads"]))


def _packing(asked: dict[str, Any], options: EngineOptions) -> Packing:
    files = tuple(File(str(path), int(size), str(sha256)) for path, size, sha256 in asked["files"])
    return Packing(
        files=FileSet(str(asked["model_digest"]), files),
        store=Path(asked["store"]),
        out=Path(asked["out"]),
        layout=str(asked["layout"]),
        options=options,
        most_bytes=int(asked["most_bytes"]),
    )


def _settings(asked: dict[str, Any]) -> Settings:
    calibration = asked["calibration"]
    return Settings(
        bits=int(asked["bits"]),
        group=int(asked["group"]),
        symmetric=bool(asked["symmetric"]),
        calibration=None if calibration is None else Path(calibration),
        tokens=int(asked["tokens"]),
        threads=int(asked["threads"]),
        embeddings=int(asked["embeddings"]),
    )
