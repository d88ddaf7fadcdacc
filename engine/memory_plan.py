"""What a deployment takes of a device and whether it fits: one computation for planning, refusing and loading.

engine-host answers PlanDeployment with it, from config.json and the headers of the weights; the worker resolves
its options with it before it reads a weight. Needs no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from engine import encoder_footprint, footprint, triton_footprint
from engine.cores import engine_cores, usable_cores
from engine.encoder_footprint import EncoderSizes
from engine.errors import EngineError
from engine.footprint import Sizes
from engine.models.encoders.spec import EncoderConfig
from engine.models.served import Layout, Served, layout, read_served
from engine.models.spec import ModelConfig
from engine.models.tensors import Shapes
from engine.options import CPU, EngineOptions
from engine.request import Task
from engine.weights.files import FileSet, OpenFile, read_verified
from engine.weights.formats import Format
from engine.weights.quantisation import assign, stored_names
from engine.weights.safetensors import TensorEntry, read_stored_header
from kernels.native.layout import MOST_HEAD_DIM
from kernels.native.location import find_library

CUDA_PROCESS_BYTES = 1536 * 2**20
"""Of the host's memory, what a worker on a CUDA device takes beside the files it reads: CUDA's own libraries keep
copies of their kernels there, and pinned buffers. A bound that no device has confirmed yet."""
PROCESS_BYTES = 192 * 2**20
"""What a worker takes beside its tensors and its vocabulary. With everything imported, 150 MiB that no file backs
(torch 2.13, measured); the rest is for gRPC and its threads."""
_TOKENIZER_TIMES = 12
"""Bytes for each byte of tokenizer.json while its vocabulary is kept; measured 10 with 128,000 tokens."""

_WIDE = ("F32", "F64")
_GIB = 2**30
_MIB = 2**20


class HostMemory(NamedTuple):
    """What a deployment takes of the host's memory where its device has memory of its own.

    Attributes:
        process: the worker itself and its vocabulary.
        loading: the files it reads, and what it makes of them before that is on the device.
        available: what the host has for it now.
    """

    process: int
    loading: int
    available: int

    @property
    def total(self) -> int:
        """At its highest point."""
        return self.process + self.loading


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of each part of a deployment, at their highest, and what there is for them.

    Attributes:
        device: where it would run.
        process: the worker itself and its vocabulary; of a device's own memory, its context, kernels and graphs.
        weights: in the layout of the backend; exact.
        kv: KV pages; exact.
        activations: most that one step takes, logits included.
        loading: most that loading takes beyond all these together.
        available: what the device has for it now.
        kv_block: one KV page over all layers.
        options: with every default filled in.
        parameters: numbers of the model's weights.
        host: what it takes beside all this, of the host; None where the device is the host.
    """

    device: str
    process: int
    weights: int
    kv: int
    activations: int
    loading: int
    available: int
    kv_block: int
    options: EngineOptions
    parameters: int
    host: HostMemory | None = None

    @property
    def total(self) -> int:
        """What the deployment needs at its highest point."""
        return self.process + self.weights + self.kv + self.activations + self.loading

    @property
    def fits(self) -> bool:
        """The device has as much, and so has the host."""
        return self.total <= self.available and self._fits_host

    @property
    def _fits_host(self) -> bool:
        return self.host is None or self.host.total <= self.host.available

    @property
    def full_contexts(self) -> int:
        """Full contexts that the KV pages hold at once."""
        return self.options.kv_blocks // -(-self.options.max_context_tokens // self.options.block_size)

    @property
    def advice(self) -> str:
        """What to change; empty when it fits."""
        if self.fits:
            return ""
        if self.total <= self.available:
            return "free memory of the host: unload a deployment that runs on the CPU"
        ways = []
        if self.kv >= self.activations:
            ways.append(f"lower kv_blocks (now {self.options.kv_blocks})")
        ways.append(f"lower max_context_tokens (now {self.options.max_context_tokens})")
        if self.activations > self.kv:
            name = "max_running" if self.kv_block else "max_step_tokens"
            ways.append(f"lower {name} (now {getattr(self.options, name)})")
        if self.options.dtype == "float32":
            ways.append("take bfloat16")
        return f"{', '.join(ways)}, or free memory: unload another deployment"

    @property
    def summary(self) -> str:
        """All of it in one line."""
        parts = {
            "weights": self.weights,
            "KV": self.kv,
            "activations": self.activations,
            "loading": self.loading,
            "process": self.process,
        }
        unit, name = (_GIB, "GiB") if self.total >= _GIB else (_MIB, "MiB")
        named = ", ".join(f"{part} {count / unit:,.2f}" for part, count in parts.items())
        line = f"needs {self.total / unit:,.2f} {name}: {named}; available {self.available / unit:,.2f} {name}"
        if self.host is None:
            return line
        return (
            f"{line} on {self.device}; of the host {self.host.total / unit:,.2f} {name}, "
            f"available {self.host.available / unit:,.2f} {name}"
        )

    def require_fit(self) -> None:
        """Refuse a deployment that does not fit.

        Raises:
            EngineError: OUT_OF_MEMORY, with the numbers and what to change.
        """
        if not self.fits:
            raise EngineError("OUT_OF_MEMORY", f"{self.summary}; {self.advice}")


@dataclass(frozen=True, slots=True)
class Model:
    """What a plan needs to know of a model.

    Attributes:
        served: its configuration, and what it is for.
        layout: its tensors.
        stored: bytes of each tensor in its file; of a quantised matrix, by its plain name, of all its tensors.
        tokenizer: bytes of tokenizer.json, where a vocabulary is made of it.
        formats: of the matrices that are quantised.
        dtype: float32 where most of its numbers are stored so, else bfloat16: what it is served in by default.
    """

    served: Served
    layout: Layout
    stored: Mapping[str, int]
    tokenizer: int = 0
    formats: Mapping[str, Format] = field(default_factory=dict)
    dtype: str = "float32"

    @property
    def config(self) -> ModelConfig | EncoderConfig:
        """Its configuration."""
        return self.served.config

    @property
    def shapes(self) -> Shapes:
        """The tensors it computes with."""
        return self.layout.shapes

    @property
    def process(self) -> int:
        """Bytes of a worker beside its tensors."""
        return PROCESS_BYTES + _TOKENIZER_TIMES * self.tokenizer


def read_model(files: FileSet, open_file: OpenFile) -> Model:
    """The model in `files`: its configuration verified, of its weights the headers alone, which loading verifies.

    Raises:
        EngineError: MODEL_FILE_MISSING, FILE_MISSING, FILE_DIGEST_MISMATCH, CONFIG_INVALID, CONFIG_UNSUPPORTED,
            ARCHITECTURE_UNSUPPORTED, POOLING_UNSUPPORTED, QUANTISATION_UNSUPPORTED, WEIGHTS_INVALID; of a
            quantised model TENSORS_MISMATCH, DTYPE_UNSUPPORTED.
    """
    served = read_served(lambda path: _content(files, open_file, path))
    entries: dict[str, TensorEntry] = {}
    for file in files.matching(".safetensors"):
        entries.update(read_stored_header(file, open_file))
    tensors, formats = layout(served, entries), dict[str, Format]()
    stored = {name: entry.end - entry.begin for name, entry in entries.items()}
    if served.quantisation is not None:
        formats = assign(
            tensors.shapes, tensors.matrices, served.quantisation, entries, tensors.spare, tensors.tables
        )
    for name, found in formats.items():
        names = stored_names(name, found, tensors.shapes[name], tensors.shapes)
        stored[name] = sum(stored[part] for part in names if part in entries)
    tokenizer = files.find("tokenizer.json") if served.task is Task.GENERATE else None
    return Model(served, tensors, stored, tokenizer.size if tokenizer else 0, formats, _dtype(entries))


def _dtype(entries: Mapping[str, TensorEntry]) -> str:
    wide = sum(prod(entry.shape) for entry in entries.values() if entry.dtype in _WIDE)
    return "float32" if 2 * wide > sum(prod(entry.shape) for entry in entries.values()) else "bfloat16"


def _content(files: FileSet, open_file: OpenFile, path: str) -> bytes | None:
    """The verified bytes of a file; None where there is none."""
    file = files.find(path)
    return None if file is None else bytes(read_verified(file, open_file))


def plan_memory(
    model: Model,
    options: EngineOptions,
    available: int,
    cores: int | None = None,
    has_native: bool | None = None,
    host_available: int = 0,
) -> MemoryPlan:
    """What `model` takes with `options`, their defaults filled in for a device with `available` bytes.

    Args:
        model: the model.
        options: as asked for.
        available: bytes that this deployment may take.
        cores: for its threads by default; those of `engine.cores.engine_cores` when None.
        has_native: the native library serves where options do not say otherwise; when None, where it is installed.
        host_available: bytes of the host, where the device has memory of its own.

    Raises:
        EngineError: OPTIONS_INVALID names the option.
    """
    has_native = find_library() is not None if has_native is None else has_native
    options = options.choose(model.dtype, has_native and model.config.head_dim <= MOST_HEAD_DIM)
    if options.backend == "native" and model.config.head_dim > MOST_HEAD_DIM:
        raise EngineError("OPTIONS_INVALID", f"backend native takes heads of at most {MOST_HEAD_DIM} numbers")
    # A spinning thread that shares its core slows a step tenfold: one core is for the other processes.
    cores = engine_cores(usable_cores()) if cores is None else cores
    config = model.config
    sizes: Sizes | EncoderSizes
    if isinstance(config, EncoderConfig):
        options = encoder_footprint.resolve(config, options, cores)
        sizes = EncoderSizes(config, model.shapes, options, model.formats)
        parts = _encoder_parts(sizes, model.stored)
    else:
        options = _resolve(model, config, options, available, cores)
        sizes = Sizes(config, model.shapes, options, model.formats, model.layout.embeddings)
        parts = _decoder_parts(sizes, model.stored)
    return MemoryPlan(
        device=options.device or CPU,
        process=_process(model, sizes),
        weights=parts.weights,
        kv=parts.kv,
        activations=parts.activations,
        loading=max(0, parts.loading_peak - parts.weights - parts.kv - parts.activations),
        available=available,
        kv_block=parts.kv_block,
        options=options,
        parameters=footprint.parameters(model.shapes),
        host=_host(model, sizes, host_available) if options.is_cuda else None,
    )


def _host(model: Model, of: Sizes | EncoderSizes, available: int) -> HostMemory:
    """What a deployment on a CUDA device takes of the host."""
    loading = triton_footprint.host_loading_bytes(of, model.stored)
    return HostMemory(CUDA_PROCESS_BYTES + model.process, loading, available)


def _process(model: Model, of: Sizes | EncoderSizes) -> int:
    """Of the device's memory what is no tensor."""
    if not of.options.is_cuda:
        return model.process
    return triton_footprint.context_bytes(of.options, of.config, triton_footprint.large_tensors(of))


class _Parts(NamedTuple):
    """Bytes by what they are for."""

    weights: int
    kv: int
    kv_block: int
    activations: int
    loading_peak: int


def _encoder_parts(sizes: EncoderSizes, stored: Mapping[str, int]) -> _Parts:
    return _Parts(
        weights=encoder_footprint.weights_bytes(sizes),
        kv=0,
        kv_block=0,
        activations=encoder_footprint.activation_bytes(sizes),
        loading_peak=encoder_footprint.loading_peak(sizes, stored),
    )


def _decoder_parts(sizes: Sizes, stored: Mapping[str, int]) -> _Parts:
    return _Parts(
        weights=footprint.weights_bytes(sizes),
        kv=footprint.kv_bytes(sizes),
        kv_block=footprint.block_bytes(sizes),
        activations=footprint.activation_bytes(sizes),
        loading_peak=footprint.loading_peak(sizes, stored),
    )


def _resolve(
    model: Model, config: ModelConfig, options: EngineOptions, available: int, cores: int
) -> EngineOptions:
    """`options` completed: KV pages by default get half of what the weights leave, or what activations leave."""
    first = options.resolve(config.max_context_tokens, 1, 0, cores)
    sizes = Sizes(config, model.shapes, first, model.formats, model.layout.embeddings)
    left = available - _process(model, sizes) - footprint.weights_bytes(sizes)
    return options.resolve(
        model_context=config.max_context_tokens,
        block_bytes_per_token=footprint.block_bytes(sizes) // first.block_size,
        memory_bytes=min(left, 2 * (left - footprint.activation_bytes(sizes) - footprint.block_bytes(sizes))),
        cores=cores,
    )
