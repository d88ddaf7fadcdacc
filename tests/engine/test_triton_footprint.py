"""The memory plan of a CUDA device, held against every tensor that steps of a published model's size make."""

import json
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.build import make_backend, make_runner
from engine.derived.loading import build_model
from engine.footprint import positions
from engine.memory_plan import MemoryPlan, plan_memory, read_model
from engine.options import EngineOptions
from engine.prepare.kernels import SizedWeights
from kernels.triton import launch
from tests.engine.tiny import byte_tokenizer, file_set

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
MIXTRAL = LLAMA | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that are there, and the most of them at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._held: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, Tensor):
                self._hold(made)
        return out

    def _hold(self, made: Tensor) -> None:
        storage = made.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not self._held[key]:
            self.now += size
            self.most = max(self.most, self.now)
        self._held[key] += 1
        weakref.finalize(made, self._let_go, key, size)

    def _let_go(self, key: int, size: int) -> None:
        self._held[key] -= 1
        if not self._held[key]:
            self.now -= size


def planned(folder: Path, config: dict[str, Any], **options: Any) -> tuple[MemoryPlan, Any]:
    """The plan of a model of this configuration, and the model read; its weights are sizes in a header."""
    (folder / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    known = read_model(*file_set(folder))
    asked = EngineOptions(device="GPU-a", dtype="bfloat16", **options)
    return plan_memory(known, asked, 1 << 40, cores=1, host_available=1 << 40), known


@pytest.mark.parametrize("config", [LLAMA, MIXTRAL], ids=["llama 8B", "mixtral 8x7B"])
def test_steps_of_a_published_model_take_no_more_than_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    plan, known = planned(tmp_path, config, kv_blocks=1024)
    ops: Any = make_backend(plan.options, "meta")
    monkeypatch.setattr(launch, "Launch", lambda *args: None)  # what is noted would keep every tensor
    with launch.recording(), torch.inference_mode():
        model = build_model(
            known, SizedWeights(known), ops, positions(plan.options), plan.options.max_context_tokens
        )
        live = LiveBytes()
        with live:
            _runner = make_runner(model, ops, plan.options, None)  # it starts every step there is
    print(
        f"planned {plan.activations:,}, taken {live.most - plan.kv:,} at most, {live.now - plan.kv:,} in the end"
    )
    assert live.now - plan.kv <= live.most - plan.kv <= plan.activations
    assert plan.activations <= 4 * (live.most - plan.kv)
