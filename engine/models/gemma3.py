"""The Gemma 3 family, text alone: Gemma 2's layers with normed queries and keys, and two rotary embeddings.

Layers with a window have a rotary embedding of their own, which is never stretched.

Source: Gemma Team, "Gemma 3 Technical Report", 2025; tensor names as Hugging Face publishes them.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from engine.models.fields import Fields, as_one_of, invalid, unsupported
from engine.models.gemma2 import NAMES as GEMMA2_NAMES
from engine.models.gemma2 import WINDOW, read_gemma, softcap
from engine.models.rope import rope_of
from engine.models.shared import FULL, SLIDING, sliding_layers, window_size, with_windows
from engine.models.spec import ModelConfig, RopeConfig

NAMES = GEMMA2_NAMES
_PATTERN = 6  # of so many layers the last attends to all
_THETA = {FULL: 1_000_000.0, SLIDING: 10_000.0}
_KINDS = ("default", "linear")


def parse(fields: Fields) -> ModelConfig:
    """The decoder that a Gemma 3 text configuration means."""
    config = read_gemma(fields, has_rope=False)
    pattern = fields.size("sliding_window_pattern", _PATTERN)
    fields.ignore("_sliding_window_pattern")  # transformers writes it, and reads `layer_types`
    sliding = sliding_layers(fields, [(i + 1) % pattern > 0 for i in range(config.num_layers)])
    fields.only("attn_logit_softcapping", None)  # which transformers does not compute
    config = with_windows(config, sliding, window_size(fields, WINDOW))
    return replace(
        config,
        ropes=_ropes(fields, config),
        layers=tuple(replace(layer, rope=int(layer.window > 0)) for layer in config.layers),
        qk_norm="head",
        logits_softcap=softcap(fields, "final_logit_softcapping", None),
    )


def _ropes(fields: Fields, config: ModelConfig) -> tuple[RopeConfig, ...]:
    """Of layers that attend to all, and of those with a window."""
    given = _given(fields)
    found = []
    for kind in (FULL, SLIDING):
        values = {name: value for name, value in given[kind].items() if value is not None}
        as_one_of("rope partial_rotary_factor", values.get("partial_rotary_factor", 1), (1,))
        found.append(rope_of(values, config.head_dim, config.max_context_tokens, _THETA[kind], _KINDS))
    return tuple(found)


def _given(fields: Fields) -> Mapping[str, Mapping[str, Any]]:
    """The object of each kind of layer, in the layout of transformers 5."""
    parameters, scaling = fields.mapping("rope_parameters"), fields.mapping("rope_scaling")
    thetas = {FULL: fields.take("rope_theta"), SLIDING: fields.take("rope_local_base_freq")}
    if parameters is None:
        as_one_of("rope_scaling rope_theta", (scaling or {}).get("rope_theta"), (None, thetas[FULL]))
        return {FULL: {**(scaling or {}), **_theta(thetas[FULL])}, SLIDING: _theta(thetas[SLIDING])}
    if scaling is not None or any(value is not None for value in thetas.values()):
        raise unsupported("rope_parameters beside rope_scaling, rope_theta or rope_local_base_freq")
    if set(parameters) - {FULL, SLIDING}:
        raise unsupported(f"rope_parameters of layers other than {FULL} and {SLIDING}")
    given = {kind: parameters.get(kind) or {} for kind in (FULL, SLIDING)}
    if not all(isinstance(value, dict) for value in given.values()):
        raise invalid("rope_parameters", f"an object for each of {FULL} and {SLIDING}", given)
    return given


def _theta(value: object) -> dict[str, Any]:
    return {} if value is None else {"rope_theta": value}
