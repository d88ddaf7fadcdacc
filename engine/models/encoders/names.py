"""The tensors of an encoder: a family says what it calls them, a configuration which there are and how large."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from engine.models.encoders.spec import EncoderConfig
from engine.models.tensors import Shape, Shapes


@dataclass(frozen=True, slots=True)
class LayerNames:
    """Modules of a layer, below its own name.

    Attributes:
        query_key_value: one fused projection, or three.
        attention_out: the projection behind attention.
        attention_norm: its norm.
        up: one matrix, which is gate and up one upon the other where the MLP is gated.
        down: the other matrix of the MLP.
        mlp_norm: its norm.
    """

    query_key_value: tuple[str, ...]
    attention_out: str
    attention_norm: str
    up: tuple[str, ...]
    down: str
    mlp_norm: str


@dataclass(frozen=True, slots=True)
class EncoderNames:
    """Modules of an encoder; empty where a family has none.

    Attributes:
        prefix: of the encoder inside a classifier; alone it has none.
        words: the table of tokens.
        places: the table of positions.
        types: the table of segments.
        first_norm: the norm of the embeddings.
        layers: what the numbers of layers follow.
        layer: inside each.
        last_norm: the norm of what the layers come to.
        dense: the first layer of the head, the prefix included.
        norm: the head's norm, the prefix included.
        classifier: the last layer of the head.
        spare: modules or tensors that files may hold beside, and that nothing here reads.
    """

    prefix: str
    words: str
    places: str
    types: str
    first_norm: str
    layers: str
    layer: LayerNames
    last_norm: str
    dense: str
    norm: str
    classifier: str
    spare: tuple[str, ...]

    def of(self, config: EncoderConfig) -> str:
        """What the encoder's own names begin with."""
        return self.prefix if config.head else ""


def tensor_shapes(config: EncoderConfig, names: EncoderNames) -> Shapes:
    """The tensors that the encoder computes with."""
    prefix = names.of(config)
    shapes: dict[str, Shape] = {}
    tables = ((names.words, config.vocab_size), (names.places, config.num_places), (names.types, config.num_types))
    shapes |= {f"{prefix}{name}.weight": (rows, config.hidden_size) for name, rows in tables if name}
    shapes |= _norm(config, f"{prefix}{names.first_norm}")
    for i in range(config.num_layers):
        shapes |= _layer(config, names.layer, f"{prefix}{names.layers}.{i}.", has_first=has_first_norm(config, i))
    if names.last_norm:
        shapes |= _norm(config, f"{prefix}{names.last_norm}")
    return shapes | _head(config, names)


def matrices(config: EncoderConfig, names: EncoderNames) -> frozenset[str]:
    """Those of the tensors that may be quantised: the matrices of the layers."""
    layer = names.layer
    modules = (*layer.query_key_value, layer.attention_out, *layer.up, layer.down)
    prefix = f"{names.of(config)}{names.layers}"
    return frozenset(f"{prefix}.{i}.{name}.weight" for i in range(config.num_layers) for name in modules)


def has_first_norm(config: EncoderConfig, layer: int) -> bool:
    """Whether a layer has a norm at its attention: before the first one, the embeddings are normalised already."""
    return not config.pre_norm or layer > 0


def spare_names(config: EncoderConfig, names: EncoderNames, stored: Collection[str]) -> Iterator[str]:
    """Of the tensors in the files, those that are known and of no use here."""
    own = set(tensor_shapes(config, names))
    for spare in names.spare:
        for name in (f"{names.of(config)}{spare}{end}" for end in ("", ".weight", ".bias")):
            if name in stored and name not in own:
                yield name


def _layer(config: EncoderConfig, names: LayerNames, prefix: str, has_first: bool) -> dict[str, Shape]:
    hidden, inner = config.hidden_size, config.intermediate_size
    parts = 3 // len(names.query_key_value)
    shapes: dict[str, Shape] = {}
    for name in names.query_key_value:
        shapes |= _linear(f"{prefix}{name}", parts * hidden, hidden, config.attention_bias)
    shapes |= _linear(f"{prefix}{names.attention_out}", hidden, hidden, config.attention_bias)
    for name in names.up:
        shapes |= _linear(f"{prefix}{name}", inner * (2 if config.is_gated else 1), hidden, config.mlp_bias)
    shapes |= _linear(f"{prefix}{names.down}", hidden, inner, config.mlp_bias)
    if has_first:
        shapes |= _norm(config, f"{prefix}{names.attention_norm}")
    return shapes | _norm(config, f"{prefix}{names.mlp_norm}")


def _head(config: EncoderConfig, names: EncoderNames) -> dict[str, Shape]:
    if config.head is None:
        return {}
    shapes = dict(_linear(names.dense, config.hidden_size, config.hidden_size, config.head.has_bias))
    if config.head.has_norm:
        shapes |= _norm(config, names.norm)
    return shapes | _linear(names.classifier, 1, config.hidden_size, has_bias=True)


def _linear(name: str, out: int, inner: int, has_bias: bool) -> dict[str, Shape]:
    bias: dict[str, Shape] = {f"{name}.bias": (out,)} if has_bias else {}
    return {f"{name}.weight": (out, inner), **bias}


def _norm(config: EncoderConfig, name: str) -> dict[str, Shape]:
    bias: dict[str, Shape] = {f"{name}.bias": (config.hidden_size,)} if config.norm_bias else {}
    return {f"{name}.weight": (config.hidden_size,), **bias}
