"""Options of a deployment: defaults that fit the machine, and combinations that cannot work refused by name."""

from typing import Any

import pytest

from engine.errors import EngineError
from engine.options import EngineOptions

GIB = 2**30


def resolve(**options: Any) -> EngineOptions:
    return EngineOptions(**options).resolve(
        model_context=1000, block_bytes_per_token=1024, memory_bytes=GIB, cores=3
    )


def test_defaults_are_those_the_protocol_names() -> None:
    assert resolve() == EngineOptions(
        backend="cpu",
        dtype="float32",
        kv_dtype="float32",
        kv_blocks=32 * 63,
        block_size=16,
        max_step_tokens=512,
        max_running=64,
        max_context_tokens=1000,
        threads=3,
    )


def test_a_model_is_served_as_it_is_stored_by_native_kernels_where_they_are() -> None:
    found = EngineOptions().choose("bfloat16", has_native=True)
    assert (found.backend, found.dtype, found.kv_dtype) == ("native", "bfloat16", "bfloat16")
    found = EngineOptions("cpu", "float32", kv_dtype="int8").choose("bfloat16", has_native=False)
    assert (found.backend, found.dtype, found.kv_dtype) == ("torch", "float32", "int8")
    assert EngineOptions("reference").choose("float32", has_native=True).backend == "reference"


def test_on_a_cuda_device_triton_serves_with_larger_steps() -> None:
    chosen = EngineOptions(device="GPU-a").choose("bfloat16", has_native=True)
    assert (chosen.backend, chosen.dtype, chosen.kv_dtype) == ("triton", "bfloat16", "bfloat16")
    found = chosen.resolve(1000, 1024, GIB, 16)
    assert (found.max_step_tokens, found.max_running, found.threads) == (2048, 256, 4)
    assert EngineOptions(device="cpu").choose("bfloat16", has_native=True).backend == "native"
    float8 = EngineOptions(device="GPU-a", kv_dtype="float8").choose("bfloat16", has_native=True)
    assert float8.resolve(1000, 1024, GIB, 16).kv_dtype == "float8"


def test_triton_without_a_device_is_refused_but_where_it_interprets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve(backend="triton").backend == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(EngineError, match="name one as device"):
        resolve(backend="triton")


def test_pages_stay_within_memory_but_hold_one_context() -> None:
    options = EngineOptions()
    page = 16 * 1024
    assert options.resolve(1000, 1024, 200 * page, 1).kv_blocks == 100
    assert options.resolve(1000, 1024, 63 * page, 1).kv_blocks == 63


@pytest.mark.parametrize("memory_bytes", [63 * 16 * 1024 - 1, 0, -GIB])
def test_pages_for_one_context_are_taken_even_where_memory_is_short(memory_bytes: int) -> None:
    assert EngineOptions().resolve(1000, 1024, memory_bytes, 1).kv_blocks == 63


def test_a_small_step_takes_fewer_requests() -> None:
    assert resolve(max_step_tokens=40).max_running == 24


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"backend": "cuda"}, "cuda"),
        ({"dtype": "float16"}, "float16"),
        ({"kv_dtype": "int4"}, "int4"),
        ({"kv_dtype": "int8", "backend": "torch"}, "native has others"),
        ({"kv_dtype": "bfloat16", "backend": "reference"}, "native has others"),
        ({"kv_dtype": "float8", "backend": "native"}, "triton float8 too"),
        ({"backend": "native", "device": "GPU-a"}, "computes on the CPU"),
        ({"backend": "cpu", "device": "GPU-a"}, "computes on the CPU"),
        ({"max_context_tokens": 1001}, "max_context_tokens"),
        ({"max_step_tokens": 64, "max_running": 64}, "max_step_tokens"),
        ({"max_step_tokens": 16}, "max_step_tokens"),
        ({"kv_blocks": -1}, "kv_blocks"),
        ({"kv_blocks": 2**32 - 1}, "kv_blocks"),
        ({"block_size": 2**20}, "block_size"),
        ({"max_running": 2**31}, "max_running"),
        ({"max_step_tokens": 2**31}, "max_step_tokens"),
        ({"threads": 10**6}, "threads"),
        ({"max_context_tokens": -1}, "negative"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(EngineError, match=named) as error:
        resolve(**options)
    assert error.value.code == "OPTIONS_INVALID"
