"""No field of a family's configuration is misread silently: refused by name, or read as transformers reads it."""

import dataclasses
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.models.config import parse_config
from engine.models.spec import ModelConfig
from tests.engine.families import FAMILIES, Tiny, make
from tests.engine.mutations import Mutation, NoOracleError, every_field, judged, mutations, oracle, own, read
from tests.engine.test_families import GEMMA3_ROPES, HALF, LLAMA3, LONGROPE, ORIGINAL, YARN, rope

WINDOWS = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
ROPES = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "max_position_embeddings",
    ORIGINAL,
)
"""Fields that a Llama with another rope may read otherwise; of its other fields those of "llama" tell enough."""
pytestmark = pytest.mark.usefixtures("one_thread")
MOST = 2  # accepted values of one field that are computed in an ordinary run
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, linear": ("llama", rope(rope_type="linear", factor=3.0)),
    "llama, dynamic": ("llama", rope(rope_type="dynamic", factor=3.0)),
    "llama, yarn": ("llama", rope(**YARN | {"beta_fast": 8.0, "beta_slow": 0.5, "truncate": True})),
    "llama, yarn of two scales": ("llama", rope(**YARN | {"mscale": 0.7, "mscale_all_dim": 1.3})),
    "llama, longrope": ("llama", rope(**LONGROPE | {ORIGINAL: 16, "factor": 3.0})),
    "llama, llama3": ("llama", rope(**LLAMA3)),
    "mistral": ("mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", WINDOWS),
    "qwen3": ("qwen3", WINDOWS),
    "gemma2": ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3_text": ("gemma3_text", {"rope_parameters": GEMMA3_ROPES, "final_logit_softcapping": 3.0}),
    "phi3": ("phi3", {"sliding_window": 9} | rope(partial_rotary_factor=0.5)),
    "phi3, longrope": ("phi3", {ORIGINAL: 16} | rope(**HALF)),
    "granite": ("granite", {}),
    "olmo2": ("olmo2", {}),
    "mixtral": ("mixtral", {"sliding_window": 6}),
    "qwen3_moe": ("qwen3_moe", WINDOWS | {"mlp_only_layers": [], "decoder_sparse_step": 1}),
    "gpt_oss": ("gpt_oss", rope(**YARN | {"truncate": False})),
}


def base(folder: Path, name: str) -> Tiny:
    """A model of two layers whose configuration has as many fields as there are."""
    model_type, changes = BASES[name]
    return make(folder, model_type, {"num_hidden_layers": 2} | changes)


def older(config: dict[str, Any]) -> dict[str, Any]:
    """The same in the layout of transformers 4, as the hub has it."""
    old = dict(config)
    parameters = old.pop("rope_parameters")
    if config["model_type"] == "gemma3_text":
        full = dict(parameters["full_attention"])
        old |= {"rope_local_base_freq": parameters["sliding_attention"]["rope_theta"]}
    else:
        full = dict(parameters)
    old |= {"rope_theta": full.pop("rope_theta")}
    partial = full.pop("partial_rotary_factor", None)
    if partial is not None:
        old |= {"partial_rotary_factor": partial}
    if config["model_type"] == "phi3":
        full.pop(ORIGINAL, None)
    old["rope_scaling"] = None if full == {"rope_type": "default"} else full
    old["torch_dtype"] = old.pop("dtype")
    if config["model_type"] == "qwen3_moe":
        old["num_experts"] = old.pop("num_local_experts")
    return old


def check(config: dict[str, Any], tiny: Tiny, names: Collection[str], thorough: bool) -> None:
    """Every mutation of these fields is refused by name or computed as transformers does.

    Of those that are not refused only some of each field are computed, unless it is to be thorough.
    """
    untouched = parse_config(tiny._replace(config=config).config_json)
    inert: dict[str, list[Mutation]] = defaultdict(list)
    different: dict[str, list[Mutation]] = defaultdict(list)
    for mutation in mutations(config, names, thorough):
        found = judged(mutation, tiny)
        if found is not None:
            (inert if _same(found, untouched) else different)[mutation.field].append(mutation)
    most = None if thorough else MOST
    for values in different.values():
        for mutation in values[:most]:
            check_alone(mutation, tiny)
    check_inert(config, {field: values[:most] for field, values in inert.items()}, tiny)


def _same(one: ModelConfig, other: ModelConfig) -> bool:
    """They compute the same."""
    return dataclasses.replace(one, eos_token_ids=other.eos_token_ids) == other


def check_alone(mutation: Mutation, tiny: Tiny) -> None:
    """Both compute it alike, if transformers does."""
    if readable(mutation):
        same_as(own(mutation.config, tiny), mutation, tiny)


def check_inert(config: dict[str, Any], inert: dict[str, list[Mutation]], tiny: Tiny) -> None:
    """What changes nothing here changes nothing there either: one value of each field at a time, all together."""
    wanted = oracle(config, tiny)
    left = [[mutation for mutation in values if readable(mutation)] for values in inert.values()]
    for i in range(max(map(len, left), default=0)):
        chosen = [values[i] for values in left if i < len(values)]
        check_together(config, [mutation for mutation in chosen if "." not in mutation.field], wanted, tiny)
        for mutation in chosen:
            if "." in mutation.field:
                same_as(wanted, mutation, tiny)


def check_together(config: dict[str, Any], chosen: list[Mutation], wanted: torch.Tensor, tiny: Tiny) -> None:
    """They change nothing in transformers; if they do, or cannot be run, find which of them it is."""
    if len(chosen) == 1:
        same_as(wanted, chosen[0], tiny)
    elif chosen:
        try:
            found = oracle(config | {mutation.field: mutation.value for mutation in chosen}, tiny)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
        except (NoOracleError, AssertionError, RuntimeError):
            for half in (chosen[::2], chosen[1::2]):
                check_together(config, half, wanted, tiny)


def readable(mutation: Mutation) -> bool:
    """Transformers accepts the configuration."""
    try:
        read(mutation.config)
    except NoOracleError:
        return False
    return True


def same_as(wanted: torch.Tensor, mutation: Mutation, tiny: Tiny) -> None:
    """Transformers computes it so, if at all."""
    try:
        found = oracle(mutation.config, tiny)
    except NoOracleError:
        return
    said, size = f"{mutation.field}={mutation.value!r}", max(1.0, float(wanted.std()))  # of logits of any size
    torch.testing.assert_close(found / size, wanted / size, rtol=0, atol=1e-4, msg=lambda text: f"{said}: {text}")


@pytest.mark.parametrize("name", BASES)
def test_every_field_is_refused_by_name_or_means_what_transformers_reads(tmp_path: Path, name: str) -> None:
    tiny = base(tmp_path, name)
    check(tiny.config, tiny, ROPES if name.startswith("llama, ") else every_field(tiny.config), thorough=False)
    old = older(tiny.config)
    assert parse_config(tiny._replace(config=old).config_json) == parse_config(tiny.config_json)
    check(old, tiny, old.keys() - tiny.config.keys(), thorough=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_every_field_with_many_more_values(tmp_path: Path, name: str) -> None:
    tiny = base(tmp_path, name)
    for config in (tiny.config, older(tiny.config)):
        check(config, tiny, every_field(config), thorough=True)


def test_every_family_is_mutated() -> None:
    assert {model_type for model_type, _ in BASES.values()} == set(FAMILIES)
