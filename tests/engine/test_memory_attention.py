"""The plan bounds a step with windows, sinks and experts over long contexts, where scores outweigh all else."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.families import make
from tests.engine.tiny import byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
LONG = {"kv_blocks": 34, "block_size": 64, "max_context_tokens": 1024, "max_step_tokens": 512, "max_running": 2}
LAYOUTS: list[dict[str, Any]] = [
    LONG | {"backend": "cpu", "threads": 1},
    LONG | {"backend": "torch", "threads": 1, "dtype": "bfloat16"},
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What full engines take in each of LAYOUTS, in a process of their own."""
    folder = tmp_path_factory.mktemp("long")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 16, "head_dim": 16}
    make(folder, "gpt_oss", sizes | {"max_position_embeddings": 1024, "sliding_window": 100})
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    argv = [sys.executable, "-m", "tests.engine.plan_against_process", str(folder), json.dumps(LAYOUTS)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", range(len(LAYOUTS)), ids=["float32", "bfloat16"])
def test_the_total_bounds_what_a_full_engine_takes(measured: list[Any], case: int) -> None:
    found = measured[case]
    assert found["held"] == {part: found["planned"][part] for part in ("weights", "kv")}
    assert found["steps"] <= found["planned"]["steps"]
    assert found["peak"] <= found["planned"]["total"]
