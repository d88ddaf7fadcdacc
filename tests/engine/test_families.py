"""Logits of every family equal those of transformers, prompt and answer alike, in fixed and in drawn variants."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.models.registry import DECODERS
from kernels.cpu import CpuBackend
from kernels.native.backend import NativeBackend
from kernels.native.location import find_library
from kernels.ops import Backend, KvSpec, Rows
from kernels.reference import ReferenceBackend
from kernels.steps import StepLimits
from tests.engine.drawn import SEED, draw
from tests.engine.families import (
    CONTEXT,
    FAMILIES,
    Tiny,
    built,
    check_that_it_tells,
    compare,
    computed,
    draw_tokens,
    make,
    routed_clearly,
)

BACKENDS: dict[str, Callable[[], Backend]] = {
    "cpu": CpuBackend,
    "cpu, deterministic": lambda: CpuBackend(deterministic=True),
    "reference": ReferenceBackend,
    "native": NativeBackend,
}
NATIVE = ["native"] if find_library() else []
YARN = {"rope_type": "yarn", "rope_theta": 5e3, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FACTORS = {"short_factor": [1.0, 1.3, 1.1, 2.0], "long_factor": [2.0, 3.5, 5.0, 9.0]}
LONGROPE = FACTORS | {"rope_type": "longrope", "rope_theta": 1e4}
HALF = {
    "short_factor": [1.2, 1.5],
    "long_factor": [3.0, 7.0],
    "rope_type": "longrope",
    "partial_rotary_factor": 0.5,
}
ORIGINAL = "original_max_position_embeddings"
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}


def rope(**parameters: Any) -> dict[str, Any]:
    """A rotary embedding with these parameters."""
    return {"rope_parameters": {"rope_theta": 1e4} | parameters}


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "grouped": {},
        "one head each, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
        "one key head, wide": {"num_key_value_heads": 1, "head_dim": 16},
        "biases": {"attention_bias": True, "mlp_bias": True},
        "linear": rope(rope_type="linear", factor=3.0),
        "dynamic": rope(rope_type="dynamic", factor=2.0),
        "yarn": rope(**YARN),
        "yarn, exact borders": rope(**YARN | {"truncate": False, "beta_fast": 8.0, "beta_slow": 0.5}),
        "yarn, scaled": rope(**YARN | {"attention_factor": 1.7}),
        "yarn, two scales": rope(**YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}),
        "longrope, short": rope(**LONGROPE | {ORIGINAL: CONTEXT}),
        "longrope, long": rope(**LONGROPE | {ORIGINAL: 16}),
        "longrope, a factor of its own": rope(**LONGROPE | {ORIGINAL: 16, "factor": 3.0}),
        "llama3": rope(**LLAMA3),
    },
    "mistral": {
        "no window": {},
        "window": {"sliding_window": 9, "num_key_value_heads": 4},
        "window of two": {"sliding_window": 2},
        "window, yarn, tied": {"sliding_window": 6, "tie_word_embeddings": True} | rope(**YARN),
    },
    "qwen2": {
        "no window": {},
        "windows from layer 1 on": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
        "windows by name, tied": {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": KINDS,
            "tie_word_embeddings": True,
        },
        "yarn, one head each": {"num_key_value_heads": 4} | rope(**YARN),
    },
    "qwen3": {
        "grouped": {},
        "windows, biases": {
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 2,
            "attention_bias": True,
        },
        "wide heads, tied": {"head_dim": 16, "num_key_value_heads": 4, "tie_word_embeddings": True},
    },
    "gemma2": {
        "as it is": {},
        "tight caps": {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.0, "layer_types": KINDS},
        "no caps, untied": {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
            "attention_bias": True,
        },
    },
    "gemma3_text": {
        "as it is": {},
        "linear beyond the window": {"rope_parameters": GEMMA3_ROPES, "layer_types": KINDS},
        "capped, untied": {
            "final_logit_softcapping": 1.5,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "num_key_value_heads": 1,
        },
    },
    "phi3": {
        "default": {},
        "rotated in part, tied": {"tie_word_embeddings": True} | rope(partial_rotary_factor=0.5),
        "longrope, short": {ORIGINAL: CONTEXT} | rope(**LONGROPE),
        "longrope, long, in part": {ORIGINAL: 16, "num_key_value_heads": 4} | rope(**HALF),
        "window": {"sliding_window": 11},
    },
    "granite": {
        "multipliers": {},
        "biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    },
    "olmo2": {
        "grouped": {},
        "one head each, biases, tied": {
            "num_key_value_heads": 4,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    },
    "mixtral": {
        "two of five": {},
        "one of five, window": {"num_experts_per_tok": 1, "sliding_window": 9},
        "all, tied": {"num_experts_per_tok": 5, "tie_word_embeddings": True, "head_dim": 16},
    },
    "qwen3_moe": {
        "two of five": {},
        "shares of all": {"norm_topk_prob": False, "num_experts_per_tok": 3, "tie_word_embeddings": True},
        "every second layer": {"decoder_sparse_step": 2, "attention_bias": True},
        "one named dense, windows": {"mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 8},
    },
    "gpt_oss": {
        "as it is": rope(**YARN | {"truncate": False}),
        "one expert, no biases": {"num_experts_per_tok": 1, "attention_bias": False, "layer_types": KINDS},
        "tied, default rope": {"tie_word_embeddings": True} | rope(rope_type="default"),
    },
}
pytestmark = pytest.mark.usefixtures("one_thread")
FIXED = [(model_type, name) for model_type, variants in VARIANTS.items() for name in variants]
DRAWN = 2  # of each family in an ordinary run
MANY = 40  # in a long one


def check(folder: Path, model_type: str, changes: dict[str, Any], backends: Sequence[str]) -> Tiny:
    """The model that says the same here, in each of `backends`, as in transformers."""
    prompts = [draw_tokens(1), draw_tokens(2, count=23)]
    seed, tiny = 0, make(folder, model_type, changes)
    while not routed_clearly(tiny, prompts[0]) or not routed_clearly(tiny, prompts[1]):
        seed += 1
        tiny = make(folder, model_type, changes, seed)
    for name in backends:
        print(f"{model_type}, {name}: off by {compare(tiny, BACKENDS[name](), prompts):.1e}")
    return tiny


@pytest.mark.parametrize(("model_type", "variant"), FIXED, ids=[f"{family}: {name}" for family, name in FIXED])
def test_logits_of_a_family_equal_those_of_transformers(tmp_path: Path, model_type: str, variant: str) -> None:
    tiny = check(tmp_path, model_type, VARIANTS[model_type][variant], [*(NATIVE or ["cpu"]), "reference"])
    check_that_it_tells(tiny, draw_tokens(1))


@pytest.mark.parametrize("nth", range(DRAWN))
@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_of_a_drawn_model_equal_those_of_transformers(tmp_path: Path, model_type: str, nth: int) -> None:
    print(f"CLOISTER_SEED={SEED}")
    check(tmp_path, model_type, draw(model_type, SEED + nth), [["cpu", *NATIVE], ["cpu, deterministic"]][nth])


@pytest.mark.slow
@pytest.mark.parametrize("nth", range(DRAWN, MANY))
@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_of_many_drawn_models_equal_those_of_transformers(
    tmp_path: Path, model_type: str, nth: int
) -> None:
    print(f"CLOISTER_SEED={SEED}")
    check(tmp_path, model_type, draw(model_type, SEED + nth), ["cpu", "cpu, deterministic", "reference", *NATIVE])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_deterministic_model_gives_the_same_bits_in_any_company_and_chunks(
    tmp_path: Path, model_type: str
) -> None:
    changes = {"use_sliding_window": True, "sliding_window": 6} if "qwen" in model_type else {}
    tiny = make(tmp_path, model_type, changes)
    company = [draw_tokens(2, count=30), draw_tokens(1), draw_tokens(3, count=7)]
    kinds: list[Backend] = [CpuBackend(torch.bfloat16, deterministic=True)]
    if NATIVE:
        kinds.append(NativeBackend(torch.bfloat16, "int8"))
        check_program(tiny, NativeBackend(torch.bfloat16))
    for ops in kinds:
        alone = computed(tiny.config_json, tiny.tensors, ops, [draw_tokens(1)], chunk=8)[0]
        assert torch.equal(computed(tiny.config_json, tiny.tensors, ops, company, chunk=12)[1], alone)


def check_program(tiny: Tiny, ops: NativeBackend) -> None:
    """A recorded step has the bits of its ops one by one, and leaves the same pages."""
    model = built(tiny.config_json, tiny.tensors, ops)
    config, sequence = model.config, draw_tokens(1, 60)
    spec = KvSpec(config.num_layers, 12, 4, config.num_kv_heads, config.head_dim)
    own, other = ops.allocate_kv(spec), ops.allocate_kv(spec)
    step, tables = ops.compile(model, own, StepLimits(40, 3, CONTEXT)), [(1, 5, 3, 4), (2, 9, 0), (7, 11)]
    with torch.inference_mode():
        for which, starts, counts, picked in (
            ((0, 1), [0, 0], [12, 7], [11, 18]),
            ((0, 1, 2), [12, 7, 0], [1, 1, 5], [1, 0]),
            ((0, 2), [13, 5], [3, 2], []),
        ):
            rows = Rows(sequence[: sum(counts)], starts, counts, [tables[i] for i in which])
            hidden, logits = step(rows, picked)
            expected = model(ops, other, ops.begin(rows, other))
            assert torch.equal(hidden, expected)
            assert torch.equal(logits, model.logits(ops, expected, picked))
            assert torch.equal(own.pages, other.pages)


def test_every_family_is_among_them() -> None:
    assert {family.model_type for family in DECODERS.values()} == set(FAMILIES) == set(VARIANTS)
