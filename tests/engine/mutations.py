"""Every field of a configuration with other values, and what this engine and transformers make of each."""

import copy
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from engine.errors import EngineError
from engine.models.config import parse_config
from engine.models.registry import architecture
from engine.models.spec import ModelConfig
from kernels.cpu import CpuBackend
from tests.engine.families import Tiny, computed, draw_tokens

REFUSALS = ("CONFIG_INVALID", "CONFIG_UNSUPPORTED", "ARCHITECTURE_UNSUPPORTED", "QUANTISATION_UNSUPPORTED")
TOKENS = draw_tokens(5, count=24)
ODD: tuple[Any, ...] = (None, 0, -1, 10**9, 10**400, True, False, "", "7", "gelu", "unheard_of", [], [0], {})
FURTHER: tuple[Any, ...] = (
    1,
    2,
    3,
    0.5,
    1.0,
    4.7,
    1e-9,
    "swish",
    "silu",
    "gelu_new",
    [1, 2],
    {"a": 1},
    [None],
    [[]],
)
OF_ANY: dict[str, Any] = {  # fields that transformers 4, the hub or another family has; none is a family's default
    "rope_theta": 77.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "rope_local_base_freq": 77.0,
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 16,
    "sliding_window": 5,
    "sliding_window_pattern": 2,
    "sliding_window_size": 5,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "layer_types": ["sliding_attention", "full_attention"],
    "attention_bias": True,
    "mlp_bias": True,
    "lm_head_bias": True,
    "qkv_bias": True,
    "use_qk_norm": True,
    "clip_qkv": 3.0,
    "logit_scale": 2.0,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 2.0,
    "query_pre_attn_scalar": 7,
    "attention_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.3,
    "logits_scaling": 3.0,
    "swiglu_limit": 3.0,
    "swiglu_alpha": 1.0,
    "norm_topk_prob": True,
    "num_experts": 3,
    "num_local_experts": 3,
    "num_experts_per_tok": 1,
    "experts_per_token": 1,
    "initial_context_length": 77,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [0],
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "router_jitter_noise": 0.5,
    "use_bidirectional_attention": True,
    "is_decoder": True,
    "add_cross_attention": True,
    "tie_encoder_decoder": True,
    "pretraining_tp": 2,
    "rope_interleaved": True,
    "use_mrope": True,
    "full_attn_mod": 2,
    "interpolate_factor": 2,
    "no_rope_layers": [0, 1],
    "per_layer_config": {"0": {"rms_norm_eps": 0.1}},
    "hidden_activation": "silu",
    "_attn_implementation": "eager",
    "gradient_checkpointing": True,
    "max_sequence_length": 16,
    "quantization_config": {"quant_method": "unheard_of"},
}


class Mutation(NamedTuple):
    """A configuration of which one field, or one field of an object in it, has another value."""

    field: str
    value: Any
    config: dict[str, Any]


def mutations(config: Mapping[str, Any], names: Collection[str], thorough: bool) -> Iterator[Mutation]:
    """The fields `names` and those of rotary embeddings, with each odd value and some of their type."""
    for name in sorted(names):
        yield from _others(config, (name,), config.get(name), thorough)
    for name in ("rope_parameters", "rope_scaling"):
        yield from _inside(config, (name,), thorough)


def _inside(config: Mapping[str, Any], path: tuple[str, ...], thorough: bool) -> Iterator[Mutation]:
    values = _at(config, path)
    if not isinstance(values, dict):
        return
    for name in sorted({*values, *_ROPE_FIELDS, "surplus"}):
        if isinstance(values.get(name), dict):
            yield from _inside(config, (*path, name), thorough)
        yield from _others(config, (*path, name), values.get(name), thorough)


_ROPE_FIELDS: dict[str, Any] = {
    "type": "linear",
    "rope_type": "yarn",
    "factor": 2.0,
    "rope_theta": 77.0,
    "partial_rotary_factor": 0.5,
    "low_freq_factor": 0.7,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 20,
    "beta_fast": 9.0,
    "beta_slow": 0.7,
    "mscale": 0.5,
    "mscale_all_dim": 0.7,
    "attention_factor": 1.3,
    "truncate": False,
    "short_factor": [1.5],
    "long_factor": [2.5],
    "mrope_section": [1, 1, 2],
}


def _others(config: Mapping[str, Any], path: tuple[str, ...], value: Any, thorough: bool) -> Iterator[Mutation]:
    own = [OF_ANY[path[-1]]] if len(path) == 1 and path[-1] in OF_ANY else []
    own += [_ROPE_FIELDS[path[-1]]] if len(path) > 1 and path[-1] in _ROPE_FIELDS else []
    for other in (*own, *_near(value), *ODD, *(FURTHER if thorough else ())):
        if type(other) is type(value) and other == value:
            continue
        changed = copy.deepcopy(dict(config))
        _at(changed, path[:-1])[path[-1]] = other
        yield Mutation(".".join(path), other, changed)


def _near(value: Any) -> list[Any]:
    """Other values of its type."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, float(value)]
    if isinstance(value, float):
        return [value * 1.25, int(value)]
    if isinstance(value, list):
        return [value[::-1], value[:-1], [*value, *value[:1]]]
    return []


def _at(config: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        config = config.get(name) if isinstance(config, dict) else None
    return config


def every_field(config: Mapping[str, Any]) -> set[str]:
    """The fields of a configuration, of transformers' class for it, of other families, and one that nobody has."""
    from transformers import CONFIG_MAPPING

    of_class = {field.name for field in dataclasses.fields(CONFIG_MAPPING[config["model_type"]])}
    return {*config, *of_class, *OF_ANY, "surplus"}


def judged(mutation: Mutation, tiny: Tiny) -> ModelConfig | None:
    """What this engine reads of it; None where it refuses it, by name, or has no such tensors.

    Raises:
        AssertionError: the refusal names no field.
    """
    try:
        config = parse_config(tiny._replace(config=mutation.config).config_json)
    except EngineError as error:
        return _named(mutation, error)
    shapes = {name: tuple(tensor.shape) for name, tensor in tiny.tensors.items()}
    return config if dict(architecture(config).tensor_shapes(config)) == shapes else None


def _named(mutation: Mutation, refusal: EngineError) -> None:
    inner = mutation.value if isinstance(mutation.value, dict) else {}
    names = {mutation.field.rpartition(".")[2], *mutation.config, *_ROPE_FIELDS, *inner}
    assert refusal.code in REFUSALS
    assert any(name in refusal.message for name in names), (mutation.field, mutation.value, refusal.message)


class NoOracleError(Exception):
    """Transformers refuses the configuration, or cannot run it."""


def read(config: Mapping[str, Any]) -> Any:
    """As transformers reads it.

    Raises:
        NoOracleError: it refuses it.
    """
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))
    except Exception as error:  # whatever it raises: there is nothing to compare with
        raise NoOracleError from error


def oracle(config: Mapping[str, Any], tiny: Tiny) -> torch.Tensor:
    """Logits of transformers' model with this configuration and the weights of `tiny`.

    Raises:
        NoOracleError: it has none.
        RuntimeError: it wants other weights.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_config(read(config), dtype=torch.float32).eval()
    except Exception as error:  # whatever it raises: there is nothing to compare with
        raise NoOracleError from error
    model.load_state_dict(tiny.model.state_dict())
    try:
        with torch.no_grad():
            logits: torch.Tensor = model(torch.tensor([served(config)])).logits[0]
    except Exception as error:
        raise NoOracleError from error
    return logits


def own(config: Mapping[str, Any], tiny: Tiny) -> torch.Tensor:
    """Logits of this engine with this configuration and the weights of `tiny`."""
    context = min(int(config["max_position_embeddings"]), 256)
    content, tokens = tiny._replace(config=dict(config)).config_json, served(config)
    return computed(content, tiny.tensors, CpuBackend(), [tokens], chunk=12, context=context)[0]


def served(config: Mapping[str, Any]) -> list[int]:
    """Tokens that the model has positions for."""
    most = config.get("max_position_embeddings")
    return TOKENS[:most] if type(most) is int and most > 0 else TOKENS
