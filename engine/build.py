"""Puts a deployment together: from a set of files and options to a loop that answers."""

import logging
from functools import partial

import torch

from engine.block_pool import BlockPool
from engine.derived.loading import Refused, build_model, load_model
from engine.derived.location import Location
from engine.detokenizer import Vocabulary
from engine.device import Device, open_device
from engine.encoder_runner import EncoderRunner
from engine.errors import EngineError
from engine.footprint import positions
from engine.loop import EngineLoop
from engine.memory import available_bytes, own_bytes
from engine.memory_plan import PROCESS_BYTES, MemoryPlan, Model, plan_memory, read_model
from engine.models.decoder import Decoder
from engine.models.encoders.encoder import Encoder
from engine.models.encoders.spec import EncoderConfig
from engine.models.pooling import Pooling
from engine.models.served import Served
from engine.options import EngineOptions
from engine.overlapped import OverlappedLoop, StartingRunner
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
            TOKENIZER_UNSUPPORTED; DEVICE_UNAVAILABLE, the device is not to be had.
    """
    known = read_model(files, open_file)
    if options.is_cuda:
        return _build_on_device(known, files, open_file, options, derived, refused)
    options = resolve_options(options, known)
    return _build(known, files, open_file, options, make_backend(options), derived, refused)


def _build_on_device(
    known: Model,
    files: FileSet,
    open_file: OpenFile,
    options: EngineOptions,
    derived: Location | None,
    refused: Refused | None,
) -> EngineLoop:
    """The same on a CUDA device, whose kernels were compiled before; the derived file has these."""
    from engine.derived.kernels import open_kernels
    from kernels.triton import configs
    from kernels.triton.cache import CacheError

    device = open_device(options)
    plan = _plan(options, known, device)
    plan.require_fit()
    device.hold_to(plan)
    configs.select(device.name, device.capability)
    try:
        cache = open_kernels(derived, refused)
        loop = _build(known, files, open_file, plan.options, make_backend(plan.options), None, None)
        cache.seal()
    except CacheError as error:
        raise EngineError(error.code, error.message) from error
    return loop


def _build(
    known: Model,
    files: FileSet,
    open_file: OpenFile,
    options: EngineOptions,
    ops: EncoderBackend,
    derived: Location | None,
    refused: Refused | None,
) -> EngineLoop:
    """The loop, with options that have every default filled in."""
    torch.set_num_threads(options.threads)
    vocabulary = _vocabulary(files, open_file, known.served)
    limits = Limits(
        options.max_step_tokens,
        options.max_running,
        options.max_context_tokens,
        whole_blocks=options.deterministic and options.backend != "native",  # which cuts prompts anywhere
        whole_prompts=isinstance(known.config, EncoderConfig),
    )
    build = partial(build_model, known, max_positions=positions(options), context=options.max_context_tokens)
    model = load_model(known, files, open_file, build, ops, derived, refused)
    runner, eos_ids = make_runner(model, ops, options, known.served.pooling)
    pool = BlockPool(options.kv_blocks, options.block_size)
    overlaps = options.is_cuda and isinstance(runner, StartingRunner) and runner.overlaps
    return (OverlappedLoop if overlaps else EngineLoop)(
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


def make_runner(
    model: Decoder | Encoder, ops: EncoderBackend, options: EngineOptions, pooling: Pooling | None
) -> tuple[ModelRunner | EncoderRunner, tuple[int, ...]]:
    """What carries out plans, with every kernel loaded that it may start, and the model's end tokens.

    Args:
        model: in the layouts of `ops`.
        ops: the backend.
        options: with every default filled in.
        pooling: of a model that makes vectors.
    """
    if isinstance(model, Encoder):
        encoding = EncoderRunner(model, ops, pooling)
        if options.is_cuda:
            encoding.warm_up(options.max_step_tokens, options.max_context_tokens)
        return encoding, ()
    config = model.config
    kv = KvSpec(config.num_layers, options.kv_blocks, options.block_size, config.num_kv_heads, config.head_dim)
    limits = StepLimits(options.max_step_tokens, options.max_running, options.max_context_tokens)
    return ModelRunner(model, ops, kv, limits, pooling), config.eos_token_ids


def resolve_options(options: EngineOptions, model: Model) -> EngineOptions:
    """`options` with every default filled in for this model on this machine, which has memory for it.

    Raises:
        EngineError: OPTIONS_INVALID; OUT_OF_MEMORY with the numbers of the plan.
    """
    plan = _plan(options, model)
    plan.require_fit()
    return plan.options


def _plan(options: EngineOptions, model: Model, device: Device | None = None) -> MemoryPlan:
    """What `model` takes, against what this machine has for it now."""
    host = available_bytes() + min(own_bytes(), PROCESS_BYTES)
    if device is None:
        return plan_memory(model, options, host, has_native=_has_native(options))
    return plan_memory(model, options, device.available, has_native=False, host_available=host)


def make_backend(options: EngineOptions, place: str = "") -> EncoderBackend:
    """The backend that options name.

    Args:
        options: of the deployment.
        place: where torch has its tensors: "cuda", "cpu" or "meta"; empty goes by the options.

    Raises:
        EngineError: OPTIONS_INVALID, there is no such backend, or it does not run here.
    """
    if options.backend == "triton":
        return _make_triton(options, place or ("cuda" if options.is_cuda else "cpu"))
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


def _make_triton(options: EngineOptions, place: str) -> EncoderBackend:
    try:
        from kernels.triton.backend import TritonBackend
    except ImportError as error:
        raise EngineError("OPTIONS_INVALID", f"backend triton: {error}; it comes with torch for CUDA") from error
    return TritonBackend(_DTYPES[options.dtype], options.kv_dtype, options.deterministic, place)


def _has_native(options: EngineOptions) -> bool:
    """Whether the native library serves; where it does not load, that is told, unless nobody asked for it.

    Raises:
        EngineError: OPTIONS_INVALID, the environment names an instruction set that does not run here.
    """
    if options.backend in ("reference", "torch", "triton"):
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
