"""A deployment's model on its backend: out of its derived file, or else out of the store; and such a file made.

The derived file is a copy that may be gone or damaged at any time: whatever is wrong with it, the model comes out
of the store, as it does where no such file was ever made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import cast

from engine.derived.building import AbsentWeights, RecordingOps, RecordingWeights, ReplayingOps
from engine.derived.files import read_derived, writing
from engine.derived.location import Derived, Location
from engine.errors import EngineError, is_out_of_memory
from engine.memory_plan import Model
from engine.models.decoder import Decoder
from engine.models.encoders.encoder import Encoder
from engine.models.encoders.registry import ENCODERS
from engine.models.encoders.spec import EncoderConfig
from engine.models.served import decoder_family
from engine.models.tensors import Weights
from engine.weights.files import FileSet, OpenFile
from engine.weights.loading import LoadedWeights, load_weights
from kernels.encoder_ops import EncoderBackend

Refused = Callable[[EngineError], None]
"""Told why a derived file was not used."""

Build = Callable[[Weights, EncoderBackend], Decoder | Encoder]
"""Makes a model of tensors and a backend."""

log = logging.getLogger(__name__)


def build_model(
    known: Model, weights: Weights, ops: EncoderBackend, max_positions: int, context: int
) -> Decoder | Encoder:
    """The model in the layouts of `ops`; `weights` is emptied.

    Args:
        known: the model.
        weights: its tensors.
        ops: the backend.
        max_positions: positions that a request of a decoder can reach.
        context: the longest context that the deployment serves.
    """
    config = known.config
    if isinstance(config, EncoderConfig):
        return ENCODERS[config.architecture].build(config, weights, ops, context)
    config, family = decoder_family(config, known.stored, known.served.pooling)
    return family.build(config, weights, ops, max_positions, context)


def load_model(
    known: Model,
    files: FileSet,
    open_file: OpenFile,
    build: Build,
    ops: EncoderBackend,
    location: Location | None,
    refused: Refused | None = None,
) -> Decoder | Encoder:
    """The model, every byte of which was hashed and compared.

    Args:
        known: the model.
        files: of the store.
        open_file: opens them.
        build: the model of tensors and a backend.
        ops: the backend.
        location: its derived file, if there is one on record.
        refused: told why that was not used; DERIVED_MISSING, DERIVED_CHANGED or DERIVED_MISMATCH.

    Raises:
        EngineError: as `load_weights`.
    """
    if location is not None:
        try:
            return _replay(known, files.model_digest, build, ops, location)
        except EngineError as error:
            log.warning("derived file not used", extra={"code": error.code, "reason": error.message})
            if refused is not None:
                refused(error)
    return build(_store_weights(known, files, open_file), ops)


def derive(
    known: Model,
    files: FileSet,
    open_file: OpenFile,
    build: Build,
    ops: EncoderBackend,
    folder: Path,
    layout: str,
) -> Derived:
    """Make the derived file of a model.

    Args:
        known: the model.
        files: of the store.
        open_file: opens them.
        build: the model of tensors and a backend.
        ops: the backend.
        folder: where the file goes.
        layout: the name of the backend's layout; see `engine.derived.layout`.

    Raises:
        EngineError: as `load_weights`; DERIVED_UNSUPPORTED, the backend's objects cannot be kept in files.
        OSError: the file cannot be written.
    """
    weights = RecordingWeights(_store_weights(known, files, open_file))
    name = Derived(files.model_digest, layout, "", 0).name
    with writing(folder / name) as writer:
        recording = RecordingOps(ops, weights, writer)
        build(weights, cast(EncoderBackend, recording))
        sha256, size = recording.finish(files.model_digest)
    return Derived(files.model_digest, layout, sha256, size)


def _replay(
    known: Model, model_digest: str, build: Build, ops: EncoderBackend, location: Location
) -> Decoder | Encoder:
    """The model out of its derived file.

    Raises:
        EngineError: DERIVED_MISSING, DERIVED_CHANGED or DERIVED_MISMATCH.
    """
    try:
        weights = AbsentWeights(known.shapes)
        replaying = ReplayingOps(ops, weights, read_derived(location), model_digest)
        model = build(weights, cast(EncoderBackend, replaying))
        replaying.finish()
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise EngineError("DERIVED_MISMATCH", "the derived file is not as this program makes them") from error
    return model


def _store_weights(known: Model, files: FileSet, open_file: OpenFile) -> LoadedWeights:
    tensors = known.layout
    return load_weights(
        files,
        open_file,
        tensors.shapes,
        tensors.matrices,
        known.served.quantisation,
        tensors.spare,
        tensors.tables,
    )
