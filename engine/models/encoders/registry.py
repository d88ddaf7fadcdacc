"""The encoders this engine computes, by the name config.json gives them."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from engine.models.encoders import bert, encoder, modernbert, names, roberta
from engine.models.encoders.encoder import Encoder
from engine.models.encoders.names import EncoderNames
from engine.models.encoders.spec import EncoderConfig
from engine.models.fields import Fields, unsupported
from engine.models.tensors import Shapes, Weights
from engine.weights.quantisation import FIELDS as QUANTISATION_FIELDS
from engine.weights.quantisation import parse_quantisation
from kernels.encoder_ops import EncoderBackend


class EncoderFamily(NamedTuple):
    """A family: the model_type that goes with its name, how its configuration is read, and its tensors' names."""

    model_type: str
    parse: Callable[[str, Fields], EncoderConfig]
    names: EncoderNames

    def tensor_shapes(self, config: EncoderConfig) -> Shapes:
        """The tensors a model needs, unquantised."""
        return names.tensor_shapes(config, self.names)

    def matrices(self, config: EncoderConfig) -> frozenset[str]:
        """Those of them that may be quantised."""
        return names.matrices(config, self.names)

    def spare(self, config: EncoderConfig, stored: Collection[str]) -> frozenset[str]:
        """Of the tensors in the files, those that are known and not needed."""
        return frozenset(names.spare_names(config, self.names, stored))

    def build(self, config: EncoderConfig, weights: Weights, ops: EncoderBackend, max_positions: int) -> Encoder:
        """The model; see `engine.models.encoders.encoder.build`."""
        return encoder.build(config, self.names, weights, ops, max_positions)


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
    quantisation = parse_quantisation({name: fields.take(name) for name in QUANTISATION_FIELDS})
    fields.refuse_rest()
    return replace(config, quantisation=quantisation)
