"""Reads a model's config.json strictly: what this engine cannot compute exactly, it refuses by name.

Reads the layout of transformers 5 and of transformers 4. Needs neither torch nor transformers. A field that is not
known is refused, for it may change the mathematics.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from engine.models.fields import Fields, invalid
from engine.models.registry import find_family
from engine.models.shared import architecture_name
from engine.models.spec import ModelConfig
from engine.strict_json import load_object
from engine.weights.quantisation import FIELDS as QUANTISATION_FIELDS
from engine.weights.quantisation import parse_quantisation


def parse_config(config_json: bytes, generation_config_json: bytes | None = None) -> ModelConfig:
    """The configuration in a model's config.json; end tokens from generation_config.json where it names any.

    Raises:
        EngineError: CONFIG_INVALID (not JSON, a field missing or of the wrong type), CONFIG_UNSUPPORTED (a field
            or value this engine does not compute), ARCHITECTURE_UNSUPPORTED or QUANTISATION_UNSUPPORTED; the
            message names it.
    """
    fields = Fields(load_object(config_json, "config.json", "CONFIG_INVALID"))
    family = find_family(architecture_name(fields), fields.text("model_type"))
    config = family.parse(fields)
    quantisation = parse_quantisation({name: fields.take(name) for name in QUANTISATION_FIELDS})
    config = replace(config, eos_token_ids=_eos(fields, generation_config_json), quantisation=quantisation)
    fields.refuse_rest()
    if any(token >= config.vocab_size for token in config.eos_token_ids):
        raise invalid("eos_token_id", f"below the vocabulary's {config.vocab_size}", config.eos_token_ids)
    return config


def _eos(fields: Fields, generation_config_json: bytes | None) -> tuple[int, ...]:
    own = fields.take("eos_token_id", [])
    generation: Mapping[str, Any] = {}
    if generation_config_json:
        generation = load_object(generation_config_json, "generation_config.json", "CONFIG_INVALID")
    value = generation.get("eos_token_id")
    value = own if value is None else value
    ids = value if isinstance(value, list) else [value]
    if any(type(i) is not int or i < 0 for i in ids):
        raise invalid("eos_token_id", "a token id or a list of them", value)
    return tuple(ids)
