"""What the hub holds of each family is read: sizes are those published, frequencies those of transformers."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import EngineError
from engine.footprint import parameters
from engine.models.config import parse_config
from engine.models.registry import DECODERS, architecture
from kernels.cpu import CpuBackend
from tests.engine.families import compare, draw_tokens, make_of
from tests.engine.published import PUBLISHED, shrunken


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_as_many_numbers_as_it_is_said_to(name: str) -> None:
    fields, count = PUBLISHED[name]
    config = parse_config(json.dumps(fields).encode())
    assert parameters(architecture(config).tensor_shapes(config)) == count


def test_there_is_one_of_every_family() -> None:
    assert {fields["architectures"][0] for fields, _ in PUBLISHED.values()} == set(DECODERS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_computed_as_transformers_computes_it(tmp_path: Path, name: str) -> None:
    from transformers import CONFIG_MAPPING

    fields = shrunken(name)
    tiny = make_of(tmp_path, CONFIG_MAPPING[fields["model_type"]].from_dict(copy.deepcopy(fields)))
    compare(tiny._replace(config=fields), CpuBackend(), [draw_tokens(1), draw_tokens(2, count=9)])


@pytest.mark.parametrize("name", [name for name, (fields, _) in PUBLISHED.items() if fields.get("rope_scaling")])
def test_frequencies_of_a_published_model_are_those_of_transformers(name: str) -> None:
    from transformers import CONFIG_MAPPING
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    fields: dict[str, Any] = PUBLISHED[name][0]
    config = parse_config(json.dumps(fields).encode())
    theirs = CONFIG_MAPPING[config.model_type].from_dict(dict(fields))
    (rope,) = config.ropes
    for context in (4096, 8192):  # on either side of the context that LongRoPE changes at
        wanted, scale = ROPE_INIT_FUNCTIONS[rope.kind](theirs, torch.device("cpu"), seq_len=context)
        torch.testing.assert_close(
            torch.tensor(rope.inv_freq(config.head_dim, context)), wanted, rtol=3e-7, atol=0
        )
        assert rope.scale == pytest.approx(scale, rel=1e-12)


def test_a_published_context_of_another_length_is_chosen_by_what_is_served() -> None:
    config = parse_config(json.dumps(PUBLISHED["Phi 4 mini"][0]).encode())
    (rope,) = config.ropes
    assert len(rope.inv_freq(config.head_dim, 4096)) == 48
    assert rope.inv_freq(config.head_dim, 4096) != rope.inv_freq(config.head_dim, 4097)
    assert rope.inv_freq(config.head_dim, 4097) == rope.inv_freq(config.head_dim, 131072)


@pytest.mark.parametrize(
    ("name", "field", "other"),
    [
        ("Gemma 2 9B", "sliding_window_size", 512),
        ("Gemma 2 27B", "_attn_implementation", "somebody/kernel"),
        ("Qwen 3 Coder 30B A3B", "qkv_bias", True),
        ("Qwen 3 Coder 30B A3B", "use_qk_norm", False),
        ("Qwen 3 Coder 30B A3B", "shared_expert_intermediate_size", 512),
    ],
)
def test_a_published_field_that_says_otherwise_is_refused_by_name(name: str, field: str, other: object) -> None:
    fields = PUBLISHED[name][0]
    assert fields[field] != other
    with pytest.raises(EngineError, match=f"CONFIG_UNSUPPORTED.*{field}"):
        parse_config(json.dumps(fields | {field: other}).encode())
