"""Puts a deployment together: from a set of files and options to a loop that answers."""

import torch

from engine.block_pool import BlockPool
from engine.detokenizer import Vocabulary
from engine.errors import EngineError
from engine.footprint import positions
from engine.loop import EngineLoop
from engine.memory import available_bytes, own_bytes
from engine.memory_plan import PROCESS_BYTES, Model, plan_memory, read_model
from engine.models.plain import PlainWeights
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


def build_engine(files: FileSet, open_file: OpenFile, options: EngineOptions) -> EngineLoop:
    """A loop over the model in `files`, ready to take requests.

    Every byte that is used is hashed and compared first. Sets the number of torch's threads for this process.

    Raises:
        EngineError: any code of `read_model`, `resolve_options` and `load_weights`; ARCHITECTURE_UNSUPPORTED,
            TOKENIZER_UNSUPPORTED.
    """
    known = read_model(files, open_file)
    config, family = known.config, architecture(known.config)
    options = resolve_options(options, known)
    torch.set_num_threads(options.threads)
    vocabulary = Vocabulary(bytes(read_verified(files.get("tokenizer.json"), open_file)), config.vocab_size)
    weights = load_weights(files, open_file, known.shapes)
    ops = make_backend(options)
    model = family.build(config, PlainWeights(weights), ops, positions(options), options.max_context_tokens)
    kv = KvSpec(config.num_layers, options.kv_blocks, options.block_size, config.num_kv_heads, config.head_dim)
    limits = Limits(
        options.max_step_tokens, options.max_running, options.max_context_tokens, options.deterministic
    )
    pool = BlockPool(options.kv_blocks, options.block_size)
    return EngineLoop(
        runner=ModelRunner(model, ops, kv, options.max_running),
        scheduler=Scheduler(pool, limits, files.model_digest, config.eos_token_ids),
        vocabulary=vocabulary,
        eos_ids=config.eos_token_ids,
        options=options,
    )


def resolve_options(options: EngineOptions, model: Model) -> EngineOptions:
    """`options` with every default filled in for this model on this machine, which has memory for it.

    Raises:
        EngineError: OPTIONS_INVALID; OUT_OF_MEMORY with the numbers of the plan.
    """
    plan = plan_memory(model, options, available_bytes() + min(own_bytes(), PROCESS_BYTES))
    plan.require_fit()
    return plan.options


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
