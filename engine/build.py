"""Puts a deployment together: from a set of files and options to a loop that answers."""

import math
import os

import torch

from engine.block_pool import BlockPool
from engine.detokenizer import Vocabulary
from engine.errors import EngineError
from engine.loop import EngineLoop
from engine.memory import available_bytes
from engine.models.blocks import Shapes
from engine.models.config import ModelConfig, parse_config
from engine.models.registry import architecture
from engine.options import EngineOptions
from engine.runner import ModelRunner
from engine.scheduler import Limits, Scheduler
from engine.weights.files import FileSet, OpenFile, read_verified
from engine.weights.safetensors import load_weights
from kernels.cpu import CpuBackend
from kernels.ops import Backend, KvSpec
from kernels.reference import ReferenceBackend

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def read_config(files: FileSet, open_file: OpenFile) -> ModelConfig:
    """The model's configuration, from the files' verified bytes.

    Raises:
        EngineError: FILE_DIGEST_MISMATCH, MODEL_FILE_MISSING, CONFIG_INVALID or CONFIG_UNSUPPORTED.
    """
    generation = files.find("generation_config.json")
    return parse_config(
        bytes(read_verified(files.get("config.json"), open_file)),
        bytes(read_verified(generation, open_file)) if generation else None,
    )


def build_engine(files: FileSet, open_file: OpenFile, options: EngineOptions) -> EngineLoop:
    """A loop over the model in `files`, ready to take requests.

    Every byte that is used is hashed and compared first. Sets the number of torch's threads for this process.

    Raises:
        EngineError: any code of `read_config`, `resolve_options` and `load_weights`; ARCHITECTURE_UNSUPPORTED,
            TOKENIZER_UNSUPPORTED.
    """
    config = read_config(files, open_file)
    family = architecture(config)
    shapes = family.tensor_shapes(config)
    options = resolve_options(options, config, shapes, sum(file.size for file in files.matching(".safetensors")))
    torch.set_num_threads(options.threads)
    vocabulary = Vocabulary(bytes(read_verified(files.get("tokenizer.json"), open_file)), config.vocab_size)
    weights = load_weights(files, open_file, shapes)
    ops = make_backend(options)
    positions = min(options.max_context_tokens, options.kv_blocks * options.block_size)
    model = family.build(config, weights, ops, positions)
    kv = KvSpec(config.num_layers, options.kv_blocks, options.block_size, config.num_kv_heads, config.head_dim)
    limits = Limits(
        options.max_step_tokens, options.max_running, options.max_context_tokens, options.deterministic
    )
    return EngineLoop(
        runner=ModelRunner(model, ops, kv, options.max_running),
        scheduler=Scheduler(BlockPool(options.kv_blocks, options.block_size), limits),
        vocabulary=vocabulary,
        eos_ids=config.eos_token_ids,
        options=options,
    )


def resolve_options(options: EngineOptions, config: ModelConfig, shapes: Shapes, file_bytes: int) -> EngineOptions:
    """`options` with every default filled in for this model on this machine.

    Args:
        options: as asked for.
        config: of the model.
        shapes: its tensors.
        file_bytes: its safetensors files, which are in memory until each tensor has been prepared.

    Raises:
        EngineError: OPTIONS_INVALID; OUT_OF_MEMORY with the numbers.
    """
    item = 2 if options.dtype == "bfloat16" else 4
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * item
    weights = max(file_bytes, item * sum(math.prod(shape) for shape in shapes.values()))
    return options.resolve(
        model_context=config.max_context_tokens,
        block_bytes_per_token=per_token,
        memory_bytes=available_bytes() - weights,
        cores=len(os.sched_getaffinity(0)) - 1,  # a spinning thread that shares its core slows a step tenfold
    )


def make_backend(options: EngineOptions) -> Backend:
    """The backend that resolved options name.

    Raises:
        EngineError: OPTIONS_INVALID.
    """
    dtype = _DTYPES[options.dtype]
    if options.backend == "reference":
        return ReferenceBackend(dtype)
    if options.backend == "cpu":
        return CpuBackend(dtype, options.deterministic)
    raise EngineError("OPTIONS_INVALID", f"there is no backend {options.backend!r}")
