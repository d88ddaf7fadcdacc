"""The memory plan: what it says before loading is what loading holds, and what does not fit is refused with it."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.derived import loading
from engine.errors import EngineError
from engine.memory_plan import PROCESS_BYTES, MemoryPlan, plan_memory, read_model
from engine.options import EngineOptions
from tests.engine.plan_against_process import held_bytes
from tests.engine.tiny import engine, file_set, save_llama

MIB = 2**20
ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = [
    {"backend": "cpu"},
    {"backend": "cpu", "dtype": "bfloat16"},
    {"backend": "torch", "deterministic": True},
    {"backend": "reference"},
    {"backend": "reference", "dtype": "bfloat16"},
    {"backend": "triton"},
    {"backend": "triton", "dtype": "bfloat16", "kv_dtype": "int8"},
]
_FULL = {"kv_blocks": 18, "max_context_tokens": 96, "max_step_tokens": 64, "max_running": 3, "threads": 1}
_SLOW = {"kv_blocks": 6, "max_context_tokens": 32}  # the reference attends token by token
MEASURED = [layout | _FULL for layout in LAYOUTS[:3]] + [LAYOUTS[4] | _FULL | _SLOW]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_llama(folder, attention_bias=True, mlp_bias=True)
    return folder


@pytest.fixture(scope="module")
def mid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that what grows with the model outweighs what does not: 19 million numbers."""
    folder = tmp_path_factory.mktemp("mid")
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6}
    save_llama(folder, vocab_size=8000, num_key_value_heads=3, tie_word_embeddings=True,
               max_position_embeddings=1024, **sizes)  # fmt: skip
    return folder


def planned(folder: Path, available: int = 1 << 40, **options: Any) -> MemoryPlan:
    return plan_memory(read_model(*file_set(folder)), EngineOptions(**options), available, cores=3)


@pytest.fixture(scope="module")
def measured(mid: Path) -> list[Any]:
    """What a full engine takes in each of MEASURED, all from one process that imports torch once."""
    argv = [sys.executable, "-m", "tests.engine.plan_against_process", str(mid), json.dumps(MEASURED)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_weights_and_pages_are_planned_to_the_byte(tiny: Path, layout: dict[str, Any]) -> None:
    loop = engine(tiny, **layout)
    runner: Any = loop._runner
    plan = planned(tiny, kv_blocks=64, block_size=8, threads=1, **layout)
    assert (plan.weights, plan.kv) == (held_bytes(runner._model), held_bytes(runner._kv))
    assert plan.options == loop.options


@pytest.mark.parametrize("case", range(len(MEASURED)), ids=[str(layout) for layout in MEASURED])
def test_the_total_bounds_what_a_full_engine_takes_and_is_near_it(measured: list[Any], case: int) -> None:
    found = measured[case]
    assert found["held"] == {part: found["planned"][part] for part in ("weights", "kv")}
    assert found["steps"] <= found["planned"]["steps"]
    assert found["peak"] <= found["planned"]["total"] <= 1.6 * found["peak"]


def test_parts_add_up_and_the_line_says_them(tiny: Path) -> None:
    plan = planned(tiny)
    assert plan.total == plan.process + plan.weights + plan.kv + plan.activations + plan.loading
    assert plan.fits
    assert plan.advice == ""
    assert plan.full_contexts == 32
    numbers = [float(n) for n in re.findall(r"\d+\.\d+", plan.summary)]
    assert numbers[0] == pytest.approx(sum(numbers[1:6]), abs=0.03)
    assert plan.parameters == sum(math.prod(shape) for shape in read_model(*file_set(tiny)).shapes.values())


def test_default_pages_leave_room_for_a_step(tiny: Path) -> None:
    least = planned(tiny, kv_blocks=16)
    roomy = planned(tiny, available=least.total + least.kv)
    assert roomy.fits
    assert 16 <= roomy.options.kv_blocks < 32 * 16
    assert not planned(tiny, available=least.total - least.kv_block - 1).fits


def test_what_does_not_fit_is_refused_with_the_numbers_before_a_weight_is_read(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(*args: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(loading, "load_weights", unread)
    with pytest.raises(EngineError, match=r"needs [\d,.]+ GiB: .*available .*lower kv_blocks") as error:
        engine(tiny, kv_blocks=2**24, block_size=1024, max_step_tokens=2048)
    assert error.value.code == "OUT_OF_MEMORY"


def test_a_large_vocabulary_is_planned_for(tiny: Path) -> None:
    files, _ = file_set(tiny)
    small = read_model(*file_set(tiny))
    assert small.tokenizer == files.get("tokenizer.json").size
    large = dataclasses.replace(small, tokenizer=8 * MIB)
    plans = [plan_memory(model, EngineOptions(kv_blocks=16), 1 << 40, cores=1) for model in (small, large)]
    # 128,000 tokens in 7.9 MiB of JSON were measured to take 79 MiB of a worker.
    assert plans[1].process - plans[0].process >= 79 * MIB


def test_weights_of_another_number_type_cost_more_while_loading(tiny: Path) -> None:
    same = read_model(*file_set(tiny))
    double = dataclasses.replace(same, stored={name: 2 * size for name, size in same.stored.items()})
    options = EngineOptions(kv_blocks=16, max_step_tokens=32, max_running=8)
    plans = [plan_memory(model, options, 1 << 40, cores=1) for model in (same, double)]
    assert plans[0].weights == plans[1].weights
    heavy = {name: 2000 * size for name, size in same.stored.items()}
    heavier = plan_memory(dataclasses.replace(same, stored=heavy), options, 1 << 40, cores=1)
    assert heavier.loading > sum(heavy.values()) - heavier.weights - heavier.kv - heavier.activations
    assert heavier.total > plans[1].total >= plans[0].total


@pytest.mark.parametrize(
    ("options", "advised"),
    [
        ({"kv_blocks": 100_000}, "lower kv_blocks (now 100000)"),
        ({"kv_blocks": 32, "max_running": 4096, "max_step_tokens": 65536}, "lower max_running (now 4096)"),
    ],
    ids=str,
)
def test_the_advice_names_what_weighs_most(tiny: Path, options: dict[str, Any], advised: str) -> None:
    plan = planned(tiny, available=PROCESS_BYTES, **options)
    assert advised in plan.advice
    assert "max_context_tokens (now 256)" in plan.advice
    assert "bfloat16" in plan.advice
    assert "bfloat16," not in planned(tiny, available=0, dtype="bfloat16", **options).advice


def test_a_changed_header_is_a_changed_file(tiny: Path, tmp_path: Path) -> None:
    files, open_file = file_set(tiny)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"\0" * 8 + (tiny / "model.safetensors").read_bytes()[8:])

    def opened(digest: str) -> int:
        changed = files.get("model.safetensors").sha256 == digest
        return os.open(weights, os.O_RDONLY) if changed else open_file(digest)

    with pytest.raises(EngineError, match="import the bundle again") as error:
        read_model(files, opened)
    assert error.value.code == "WEIGHTS_DIGEST_MISMATCH"


def test_planning_loads_no_torch() -> None:
    check = "import sys, engine.memory_plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0
