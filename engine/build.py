"""Puts a deployment together: from a set of files and options to a loop that answers."""

import logging
from functools import partial

import torch

from engine.block_pool import BlockPool
from engine.derived.loading import Refused, build_model, load_model
from engine.derived.location import Location
from engine.detokenizer import Vocabulary
from engine.encoder_runner import EncoderRunner
from engine.errors import EngineError
from engine.footprint import positions
from engine.loop import EngineLoop
from engine.memory import available_bytes, own_bytes
from engine.memory_plan import PROCESS_BYTES, Model, plan_memory, read_model
from engine.models.decoder import Decoder
from engine.models.encoders.encoder import Encoder
from engine.models.encoders.spec import EncoderConfig
from engine.models.pooling import Pooling
from engine.models.served import Served
from engine.options import EngineOptions
from engine.request import Task
from engine.runner import ModelRunner
from engine.scheduler import Limits, Scheduler
from engine.weights.files import FileSet, OpenFile, read_verified
from kernels.cpu import CpuBackend
from kernels.encoder_ops import EncoderBackend
from kernels.native.backend import NativeBackend
from kernels.native.library import NativeUnavailable, load
from kernels.ops import KvSpec
from kernels.reference import ReferenceBackend
from kernels.steps import StepLimits

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_engine(
    files: FileSet,
    open_file: OpenFile,
    options: EngineOptions,
    derived: Location | None = None,
    refused: Refused | None = None,
) -> EngineLoop:
    """A loop over the model in `files`, ready to take requests.

    Every byte that is used is hashed and compared first. Sets the number of torch's threads for this process.

    Args:
        files: of the model.
        open_file: opens them.
        options: of the deployment.
        derived: its weights, packed before; what they were made of is taken where they cannot be used.
        refused: told why they were not.

    Raises:
        EngineError: any code of `read_model`, `resolve_options` and `load_weights`; ARCHITECTURE_UNSUPPORTED,
            TOKENIZER_UNSUPPORTED.
    """
    known = read_model(files, open_file)
    options = resolve_options(options, known)
    torch.set_num_threads(options.threads)
    vocabulary = _vocabulary(files, open_file, known.served)
    ops = make_backend(options)
    limits = Limits(
        options.max_step_tokens,
        options.max_running,
        options.max_context_tokens,
        whole_blocks=options.deterministic and options.backend != "native",  # which cuts prompts anywhere
        whole_prompts=isinstance(known.config, EncoderConfig),
    )
    build = partial(build_model, known, max_positions=positions(options), context=options.max_context_tokens)
    model = load_model(known, files, open_file, build, ops, derived, refused)
    runner, eos_ids = _runner(model, ops, options, known.served.pooling)
    pool = BlockPool(options.kv_blocks, options.block_size)
    return EngineLoop(
        runner=runner,
        scheduler=Scheduler(pool, limits, files.model_digest, eos_ids),
        vocabulary=vocabulary,
        eos_ids=eos_ids,
        options=options,
        tasks=(known.served.task,),
        num_types=known.served.num_types,
    )


def _vocabulary(files: FileSet, open_file: OpenFile, served: Served) -> Vocabulary:
    """The bytes of each token; of a model that writes no text, none."""
    writes = served.task is Task.GENERATE
    content = bytes(read_verified(files.get("tokenizer.json"), open_file)) if writes else None
    return Vocabulary(content, served.config.vocab_size)


def _runner(
    model: Decoder | Encoder, ops: EncoderBackend, options: EngineOptions, pooling: Pooling | None
) -> tuple[ModelRunner | EncoderRunner, tuple[int, ...]]:
    """What carries out plans, and the model's end tokens."""
    if isinstance(model, Encoder):
        return EncoderRunner(model, ops, pooling), ()
    config = model.config
    kv = KvSpec(config.num_layers, options.kv_blocks, options.block_size, config.num_kv_heads, config.head_dim)
    limits = StepLimits(options.max_step_tokens, options.max_running, options.max_context_tokens)
    return ModelRunner(model, ops, kv, limits, pooling), config.eos_token_ids


def resolve_options(options: EngineOptions, model: Model) -> EngineOptions:
    """`options` with every default filled in for this model on this machine, which has memory for it.

    Raises:
        EngineError: OPTIONS_INVALID; OUT_OF_MEMORY with the numbers of the plan.
    """
    available = available_bytes() + min(own_bytes(), PROCESS_BYTES)
    plan = plan_memory(model, options, available, has_native=_has_native(options))
    plan.require_fit()
    return plan.options


def make_backend(options: EngineOptions) -> EncoderBackend:
    """The backend that options name.

    Raises:
        EngineError: OPTIONS_INVALID, there is no such backend, or it does not run here.
    """
    dtype, name = _DTYPES[options.dtype], options.backend
    if name == "cpu":
        name = "native" if _has_native(options) else "torch"
    if name == "reference":
        return ReferenceBackend(dtype)
    if name == "torch" and options.kv_dtype in ("", options.dtype):
        return CpuBackend(dtype, options.deterministic)
    if name == "native":
        try:
            return NativeBackend(dtype, options.kv_dtype, options.deterministic)
        except NativeUnavailable as error:
            raise EngineError("OPTIONS_INVALID", f"backend native: {error}") from error
    raise EngineError("OPTIONS_INVALID", f"there is no backend {name!r} with kv_dtype {options.kv_dtype!r}")


def _has_native(options: EngineOptions) -> bool:
    """Whether the native library serves; where it does not load, that is told, unless nobody asked for it.

    Raises:
        EngineError: OPTIONS_INVALID, the environment names an instruction set that does not run here.
    """
    if options.backend in ("reference", "torch"):
        return False
    try:
        library = load()
    except NativeUnavailable as error:
        log.warning("no native kernels", extra={"reason": str(error)})
        return False
    except ValueError as error:
        raise EngineError("OPTIONS_INVALID", f"CLOISTER_KERNELS_ISA: {error}") from error
    log.info("native kernels", extra={"library": library.path, "isa": library.isa})
    return True
