"""What a model can be asked for: its configuration, and what becomes of its hidden states.

A decoder generates, unless sentence-transformers' files say that its hidden states make vectors; an encoder makes
vectors, or scores where it is a classifier with one label. Needs no torch.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from engine.errors import EngineError
from engine.models.config import parse_config
from engine.models.encoders.registry import ENCODERS, parse_encoder
from engine.models.encoders.spec import EncoderConfig
from engine.models.pooling import MODULES, Pooling, ReadFile, read_pooling
from engine.models.registry import DECODERS, Family, architecture
from engine.models.spec import ModelConfig
from engine.models.tensors import Names, Shapes
from engine.request import Task
from engine.strict_json import load_object
from engine.weights.quantisation import Quantisation

_CAUSAL, _BARE = "ForCausalLM", "Model"
_DECODER = "model."  # what the tensors of a decoder begin with that is not alone in its files
_CAPABILITIES = {Task.GENERATE: "generate", Task.EMBED: "embed", Task.SCORE: "rerank"}


@dataclass(frozen=True, slots=True)
class Served:
    """A model's configuration, and what it is for.

    Attributes:
        config: of the decoder or encoder; its context is no longer than the publisher says texts may be.
        task: what can be asked of it.
        pooling: what becomes of the hidden states, where vectors are wanted.
    """

    config: ModelConfig | EncoderConfig
    task: Task
    pooling: Pooling | None = None

    @property
    def quantisation(self) -> Quantisation | None:
        """Of its matrices; None: they are plain."""
        return self.config.quantisation

    @property
    def num_types(self) -> int:
        """Segments it tells apart; 1: none."""
        return max(1, self.config.num_types) if isinstance(self.config, EncoderConfig) else 1

    def context(self, wanted: int, step: int) -> int:
        """Most tokens of a request where a deployment wants so many, and so many in a step; 0 is the default."""
        most = wanted or self.config.max_context_tokens
        return min(most, step or most) if isinstance(self.config, EncoderConfig) else most

    def capabilities(self, can_chat: bool) -> tuple[str, ...]:
        """generate, embed or rerank, and chat where it generates and has a template."""
        chat = ("chat",) if can_chat and self.task is Task.GENERATE else ()
        return (_CAPABILITIES[self.task], *chat)


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of a model.

    Attributes:
        shapes: those that are computed with, unquantised.
        matrices: those of them that may be quantised as layers are.
        spare: those that the files hold beside, and that nothing reads.
        tables: those of `shapes` that may be quantised as embeddings and the matrix of the logits are.
    """

    shapes: Shapes
    matrices: frozenset[str]
    spare: frozenset[str] = frozenset()
    tables: frozenset[str] = frozenset()

    @property
    def embeddings(self) -> Mapping[str, bool]:
        """Those of `tables` whose rows are read: whether each is the matrix of the logits as well."""
        read = self.tables - self.matrices
        return dict.fromkeys(read, read == self.tables)


def read_served(read: ReadFile) -> Served:
    """What the files of a model say of it.

    Raises:
        EngineError: MODEL_FILE_MISSING, CONFIG_INVALID, CONFIG_UNSUPPORTED, ARCHITECTURE_UNSUPPORTED,
            POOLING_UNSUPPORTED.
    """
    content = read("config.json")
    if content is None:
        raise EngineError("MODEL_FILE_MISSING", "the model has no config.json")
    raw = load_object(content, "config.json", "CONFIG_INVALID")
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else ""
    if name in ENCODERS:
        return _encoder(parse_encoder(name, raw), read)
    causal = name.removesuffix(_BARE) + _CAUSAL
    is_bare = name.endswith(_BARE) and causal in DECODERS
    if is_bare:
        content = json.dumps(raw | {"architectures": [causal]}).encode()
    return _decoder(parse_config(content, read("generation_config.json")), is_bare, read)


def decoder_family(
    config: ModelConfig, stored: Collection[str], pooling: Pooling | None
) -> tuple[ModelConfig, Family]:
    """The configuration and family of a decoder whose files hold the tensors `stored`, as they are named there.

    Files of a tied model may hold a matrix of logits of their own, which then counts, as it does in transformers.
    Embedders come without one, and often as the decoder alone, whose names have no prefix.
    """
    family = architecture(config)
    has_head = any(name.startswith(f"{family.names.head}.") for name in stored)
    if pooling is None:
        return replace(config, tie_word_embeddings=config.tie_word_embeddings and not has_head), family
    if not any(name.startswith(_DECODER) for name in stored):
        family = family._replace(names=_without_prefix(family.names))
    if not has_head:
        config = replace(config, tie_word_embeddings=True)
    return config, family


def layout(served: Served, stored: Collection[str]) -> Layout:
    """The tensors of a model whose files hold `stored`."""
    config = served.config
    if isinstance(config, EncoderConfig):
        encoder = ENCODERS[config.architecture]
        return Layout(encoder.tensor_shapes(config), encoder.matrices(config), encoder.spare(config, stored))
    config, family = decoder_family(config, stored, served.pooling)
    spare = family.spare(config) & set(stored)
    return Layout(family.tensor_shapes(config), family.matrices(config), spare, family.tables(config))


def _encoder(config: EncoderConfig, read: ReadFile) -> Served:
    if config.head is not None:
        if read(MODULES) is not None:
            raise EngineError(
                "POOLING_UNSUPPORTED", f"{MODULES} beside a classifier, whose own head makes its score"
            )
        return Served(config, Task.SCORE)
    pooling = read_pooling(read, config.hidden_size) or Pooling("mean")  # the default of sentence-transformers
    longest = min(pooling.max_tokens or config.max_context_tokens, config.max_context_tokens)
    return Served(replace(config, max_context_tokens=longest), Task.EMBED, pooling)


def _decoder(config: ModelConfig, is_bare: bool, read: ReadFile) -> Served:
    pooling = read_pooling(read, config.hidden_size) or (Pooling("last") if is_bare else None)
    if pooling is None:
        return Served(config, Task.GENERATE)
    if pooling.kind != "last":
        raise EngineError(
            "POOLING_UNSUPPORTED", f"pooling by {pooling.kind} of a decoder, whose last token saw all"
        )
    longest = min(pooling.max_tokens or config.max_context_tokens, config.max_context_tokens)
    return Served(replace(config, max_context_tokens=longest), Task.EMBED, pooling)


def _without_prefix(names: Names) -> Names:
    return replace(
        names,
        embedding=names.embedding.removeprefix(_DECODER),
        final_norm=names.final_norm.removeprefix(_DECODER),
        layer=names.layer.removeprefix(_DECODER),
    )
