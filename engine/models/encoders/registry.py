"""The encoders this engine computes, by the name config.json gives them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from engine.models.encoders import bert, modernbert, roberta
from engine.models.encoders.names import EncoderNames
from engine.models.encoders.spec import EncoderConfig
from engine.models.fields import Fields, unsupported


class EncoderFamily(NamedTuple):
    """A family: the model_type that goes with its name, how its configuration is read, and its tensors' names."""

    model_type: str
    parse: Callable[[str, Fields], EncoderConfig]
    names: EncoderNames


_BERT = EncoderFamily("bert", bert.parse, bert.NAMES)
_ROBERTA = EncoderFamily("roberta", roberta.parse, roberta.NAMES)
_XLM_ROBERTA = EncoderFamily("xlm-roberta", roberta.parse, roberta.NAMES)
_MODERNBERT = EncoderFamily("modernbert", modernbert.parse, modernbert.NAMES)

ENCODERS = {
    f"{name}{kind}": family
    for name, family in (
        ("Bert", _BERT),
        ("Roberta", _ROBERTA),
        ("XLMRoberta", _XLM_ROBERTA),
        ("ModernBert", _MODERNBERT),
    )
    for kind in ("Model", "ForSequenceClassification")
}


def parse_encoder(architecture: str, raw: Mapping[str, Any]) -> EncoderConfig:
    """The configuration of one of `ENCODERS`.

    Raises:
        EngineError: CONFIG_INVALID or CONFIG_UNSUPPORTED; the message names the field.
    """
    family = ENCODERS[architecture]
    fields = Fields(raw)
    config = family.parse(architecture, fields)
    if config.model_type != family.model_type:
        raise unsupported(
            f"model_type = {config.model_type!r} beside {architecture}, which is {family.model_type!r}"
        )
    fields.refuse_rest()
    return config
