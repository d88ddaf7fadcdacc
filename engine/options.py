"""How a deployment runs: the engine's own copy of cloister.engine.v1.DeploymentOptions, checked and completed."""

import os
from dataclasses import dataclass, replace

from engine.errors import EngineError

CPU = "cpu"
"""The device that models run on where options name none."""

BACKENDS = ("reference", "cpu", "native", "torch", "triton")
DTYPES = ("float32", "bfloat16")
KV_DTYPES = (*DTYPES, "int8", "float8")
_KV_DTYPES_OF = {"cpu": KV_DTYPES[:3], "native": KV_DTYPES[:3], "triton": KV_DTYPES}  # others: as dtype says
_FULL_CONTEXTS = 32
_SHARE_OF_MEMORY = 2  # KV pages take a half unless the options say otherwise; activations need memory too
_AT_MOST = {
    "kv_blocks": 2**24,
    "block_size": 1024,
    "max_step_tokens": 2**16,
    "max_running": 4096,
    "threads": 1024,
}
_DEFAULT_RUNNING = 64
_DEFAULT_STEP = 512
_PAGE = 16
_CUDA_RUNNING = 256  # so many rows read weights once, and still no more than their products take to compute
_CUDA_STEP = 2048
_CUDA_THREADS = 4  # which load weights; the device computes


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Options of one deployment; 0 or empty takes the default that `resolve` fills in.

    Attributes:
        backend: native, torch or reference; cpu is native where its library is there, else torch; triton on CUDA
            devices, and on these alone.
        dtype: float32 or bfloat16.
        deterministic: same output bit for bit whatever shares the batch.
        kv_blocks: KV pages.
        block_size: tokens per KV page.
        max_step_tokens: most tokens computed in one step.
        max_running: most requests in one step.
        max_context_tokens: prompt and answer together.
        threads: threads of the worker.
        kv_dtype: of keys and values: float32, bfloat16 or int8, or with triton float8; only it and native have
            another than dtype.
        device: id of the device; empty is the CPU.
    """

    backend: str = ""
    dtype: str = ""
    deterministic: bool = False
    kv_blocks: int = 0
    block_size: int = 0
    max_step_tokens: int = 0
    max_running: int = 0
    max_context_tokens: int = 0
    threads: int = 0
    kv_dtype: str = ""
    device: str = ""

    @property
    def is_cuda(self) -> bool:
        """It runs on a CUDA device."""
        return self.device not in ("", CPU)

    def choose(self, stored: str, has_native: bool) -> "EngineOptions":
        """These options with backend and number types filled in.

        Args:
            stored: number type that the model is stored in.
            has_native: the native library is there.
        """
        dtype = self.dtype or stored
        found = "triton" if self.is_cuda else "native" if has_native else "torch"
        chosen = ("",) if self.is_cuda else ("", "cpu")
        return replace(
            self,
            backend=found if self.backend in chosen else self.backend,
            dtype=dtype,
            kv_dtype=self.kv_dtype or dtype,
        )

    def resolve(
        self, model_context: int, block_bytes_per_token: int, memory_bytes: int, cores: int
    ) -> "EngineOptions":
        """These options with every default filled in.

        Args:
            model_context: the model's own limit, in tokens.
            block_bytes_per_token: KV bytes of one token over all layers.
            memory_bytes: what is left after the weights. When `kv_blocks` is 0 the pages hold 32 full contexts, or
                as many as fit into half of this, but never less than one. Whether they fit at all is for
                `engine.memory_plan` to say.
            cores: threads when `threads` is 0; at least one is taken.

        Raises:
            EngineError: OPTIONS_INVALID names the option.
        """
        self._check_sizes()
        block_size = self.block_size or _PAGE
        max_step_tokens = self.max_step_tokens or (_CUDA_STEP if self.is_cuda else _DEFAULT_STEP)
        most = _CUDA_RUNNING if self.is_cuda else _DEFAULT_RUNNING
        context = self.max_context_tokens or model_context
        resolved = replace(
            self,
            backend=self.backend or "cpu",
            dtype=self.dtype or "float32",
            kv_dtype=self.kv_dtype or self.dtype or "float32",
            block_size=block_size,
            max_step_tokens=max_step_tokens,
            max_running=self.max_running or max(1, min(most, max_step_tokens - block_size)),
            max_context_tokens=context,
            kv_blocks=self.kv_blocks or _default_blocks(context, block_size, block_bytes_per_token, memory_bytes),
            threads=self.threads or max(1, min(cores, _CUDA_THREADS) if self.is_cuda else cores),
        )
        resolved._check(model_context)
        return resolved

    def _check_sizes(self) -> None:
        for name, limit in _AT_MOST.items():
            if not 0 <= getattr(self, name) <= limit:
                raise EngineError("OPTIONS_INVALID", f"{name} must lie between 0 and {limit}")

    def _check(self, model_context: int) -> None:
        wrong = {
            f"backend {self.backend!r} is not one of {', '.join(BACKENDS)}": self.backend not in BACKENDS,
            f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}": self.dtype not in DTYPES,
            f"kv_dtype {self.kv_dtype!r} is not one of {', '.join(KV_DTYPES)}": self.kv_dtype not in KV_DTYPES,
            f"kv_dtype {self.kv_dtype} is not dtype {self.dtype}, and backend {self.backend} has no such: "
            "native has others, and triton float8 too": (
                self.kv_dtype not in (self.dtype, *_KV_DTYPES_OF.get(self.backend, ()))
            ),
            f"backend {self.backend} computes on the CPU, not on device {self.device}: leave backend out, or "
            "device": self.is_cuda and self.backend != "triton",
            "backend triton computes on CUDA devices: name one as device, as `cloister gpu list` shows them": (
                self.backend == "triton" and not self.is_cuda and not _is_interpreted()
            ),
            f"max_context_tokens {self.max_context_tokens} is beyond the model's {model_context}": (
                self.max_context_tokens > model_context
            ),
            f"max_step_tokens {self.max_step_tokens} is less than max_running {self.max_running} + block_size "
            f"{self.block_size}: a prompt could wait for ever": (
                self.max_step_tokens < self.max_running + self.block_size
            ),
            "max_context_tokens is negative": self.max_context_tokens < 0,
        }
        for message, holds in wrong.items():
            if holds:
                raise EngineError("OPTIONS_INVALID", message)


def _is_interpreted() -> bool:
    """Triton's kernels run in its interpreter, on the CPU: for tests, as it is slow."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _default_blocks(context: int, block_size: int, bytes_per_token: int, memory_bytes: int) -> int:
    """Pages for 32 full contexts, or what fits into half of the memory, but at least for one."""
    one = -(-context // block_size)
    affordable = memory_bytes // _SHARE_OF_MEMORY // (bytes_per_token * block_size)
    return max(one, min(_FULL_CONTEXTS * one, affordable))
