"""What is measured: the real loop over a folder, or over a published shape with drawn weights."""

import hashlib
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from engine.bench.shapes import read_shape
from engine.bench.weights import DrawnWeights, read_format
from engine.block_pool import BlockPool
from engine.build import build_engine, make_backend
from engine.detokenizer import Vocabulary
from engine.errors import EngineError
from engine.footprint import ITEM, positions
from engine.loop import EngineLoop
from engine.memory_plan import read_model
from engine.models.encoders.spec import EncoderConfig
from engine.models.registry import architecture
from engine.models.spec import ModelConfig
from engine.models.tensors import Shapes
from engine.options import CPU, EngineOptions
from engine.overlapped import OverlappedLoop
from engine.runner import ModelRunner
from engine.scheduler import Limits, Scheduler
from engine.weights.files import File, FileSet
from kernels.ops import KvSpec
from kernels.steps import StepLimits

CUDA = "cuda"
"""The first CUDA device that this process sees."""

_BLOCK = 16
_STEP, _CUDA_STEP = 1024, 16384  # tokens of prompts in one step
_CODES = {"int8": 1, "float8": 1}  # bytes of a number in pages; scales are not counted


@dataclass(frozen=True, slots=True)
class Load:
    """The largest work that is asked of a subject.

    Attributes:
        batch: requests at once.
        context: tokens of the longest, prompt and answer.
        tokens: of all requests at once, prompts and answers.
    """

    batch: int
    context: int
    tokens: int


@dataclass(frozen=True)
class Subject:
    """An engine to measure.

    Attributes:
        name: of the shape or the folder.
        loop: the engine.
        vocabulary: tokens of the model.
        weight_bytes: of all tensors that a step reads, in their stored format.
        matrix_numbers: numbers of the matrices that every token is multiplied with.
        head_numbers: of the matrix that a token is multiplied with whose successor is drawn.
        kv_bytes: keys and values of one token.
        quantised: the matrices are.
    """

    name: str
    loop: EngineLoop
    vocabulary: int
    weight_bytes: int
    matrix_numbers: int
    head_numbers: int
    kv_bytes: int
    quantised: bool

    @property
    def options(self) -> EngineOptions:
        """What it was built with."""
        return self.loop.options

    @property
    def backend(self) -> Any:
        """The backend, whose ops are timed."""
        runner: Any = self.loop._runner
        return runner._ops

    @property
    def step(self) -> Any:
        """What computes a whole step."""
        runner: Any = self.loop._runner
        return runner._step

    @property
    def backend_name(self) -> str:
        """What computes."""
        return type(self.backend).__name__


def engine_options(
    load: Load, backend: str | None, dtype: str, threads: int, kv_dtype: str = "", device: str = CPU
) -> EngineOptions:
    """Options with room for `load`; prompts of up to 1,024 tokens are one step, on a CUDA device of 16,384."""
    is_cuda = device == CUDA
    return EngineOptions(
        backend=backend or ("triton" if is_cuda else "cpu"),
        dtype=dtype,
        kv_dtype=kv_dtype,
        device=CUDA if is_cuda else "",
        kv_blocks=-(-load.tokens // _BLOCK) + 4 * load.batch,
        block_size=_BLOCK,
        max_step_tokens=(_CUDA_STEP if is_cuda else _STEP) + load.batch,
        max_running=load.batch,
        max_context_tokens=load.context,
        threads=threads,
    )


def of_shape(
    shape: str, stored: str, options: EngineOptions, *, quantised_head: bool = False, seed: int = 0
) -> Subject:
    """The engine over a published shape.

    Args:
        shape: its name.
        stored: the format of its matrices.
        options: complete but for what follows from the model.
        quantised_head: the table of embeddings and the matrix of the logits are stored like the other matrices.
        seed: of the weights.

    Raises:
        EngineError: SHAPE_UNKNOWN, FORMAT_UNKNOWN, OPTIONS_INVALID, NO_CUDA_DEVICE.
    """
    if options.is_cuda:
        _take_device()
    config, form = read_shape(shape), read_format(stored)
    family = architecture(config)
    shapes = family.tensor_shapes(config)
    ends = {family.names.embedding, f"{family.names.head}.weight"}
    matrices = family.matrices(config)
    quantised = (matrices | ends if quantised_head else matrices - ends) & shapes.keys()
    weights = DrawnWeights(shapes, frozenset(quantised if form.bits < 16 else ()), form, seed)
    table = 0 if config.tie_word_embeddings else _table_bytes(weights, family.names.embedding)
    return _subject(
        shape, _loop(config, weights, options), config, shapes, weights.nbytes - table, quantised=form.bits < 16
    )


def _subject(
    name: str, loop: EngineLoop, config: ModelConfig, shapes: Shapes, weight_bytes: int, *, quantised: bool
) -> Subject:
    head = config.vocab_size * config.hidden_size
    tables = head * (1 if config.tie_word_embeddings else 2)
    item = _CODES.get(loop.options.kv_dtype) or ITEM[loop.options.kv_dtype]
    return Subject(
        name=name,
        loop=loop,
        vocabulary=config.vocab_size,
        weight_bytes=weight_bytes,
        matrix_numbers=sum(prod(shape) for shape in shapes.values() if len(shape) > 1) - tables,
        head_numbers=head,
        kv_bytes=2 * config.num_layers * config.num_kv_heads * config.head_dim * item,
        quantised=quantised,
    )


def _table_bytes(weights: DrawnWeights, name: str) -> int:
    """A table that is not the head, too, is not read as a whole."""
    return weights.format_of(name).bytes_of(weights.shapes[name])


def _loop(config: ModelConfig, weights: DrawnWeights, options: EngineOptions) -> EngineLoop:
    """As `engine.build` makes it, without files."""
    options = options.resolve(config.max_context_tokens, 1, 0, options.threads)
    torch.set_num_threads(options.threads)
    ops = make_backend(options)
    context = options.max_context_tokens
    model = architecture(config).build(config, weights, ops, positions(options), context)
    kv = KvSpec(config.num_layers, options.kv_blocks, options.block_size, config.num_kv_heads, config.head_dim)
    limits = Limits(options.max_step_tokens, options.max_running, context)
    scheduler = Scheduler(BlockPool(options.kv_blocks, options.block_size), limits)
    runner = ModelRunner(model, ops, kv, StepLimits(options.max_step_tokens, options.max_running, context))
    kind = OverlappedLoop if options.is_cuda and runner.overlaps else EngineLoop
    return kind(runner, scheduler, Vocabulary(None, config.vocab_size), (), options)


def _take_device() -> None:
    """Choose the CUDA device and its table of configurations.

    Raises:
        EngineError: NO_CUDA_DEVICE.
    """
    from kernels.bench.device import NoDeviceError, take_device

    try:
        take_device()
    except NoDeviceError as error:
        raise EngineError(error.code, str(error)) from error


def of_folder(folder: Path, options: EngineOptions) -> Subject:
    """The engine over a model's folder, as a deployment builds it.

    Raises:
        EngineError: any code of `engine.build.build_engine`; MODEL_FILE_MISSING.
    """
    paths = {_digest(path): path for path in sorted(folder.iterdir()) if path.is_file()}
    found = tuple(File(path.name, path.stat().st_size, digest) for digest, path in paths.items())
    files, open_file = FileSet("0" * 64, found), lambda digest: os.open(paths[digest], os.O_RDONLY)
    model = read_model(files, open_file)
    config = model.config
    if isinstance(config, EncoderConfig):
        raise EngineError("TASK_UNSUPPORTED", f"{folder.name} writes no text; only models that do are measured")
    loop = build_engine(files, open_file, options)
    embedding = architecture(config).names.embedding
    table = 0 if config.tie_word_embeddings else model.stored.get(embedding, 0)
    return _subject(
        folder.name,
        loop,
        config,
        model.shapes,
        sum(model.stored.values()) - table,
        quantised=model.served.quantisation is not None,
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
