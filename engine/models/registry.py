"""The decoders this engine computes, by the architecture config.json names."""

from collections.abc import Callable
from typing import NamedTuple

from engine.errors import EngineError
from engine.models import (
    decoder,
    gemma2,
    gemma3,
    gpt_oss,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    tensors,
)
from engine.models.decoder import Decoder
from engine.models.fields import Fields
from engine.models.spec import ModelConfig
from engine.models.tensors import Names, Shapes, Weights
from kernels.ops import Backend


class Family(NamedTuple):
    """A family's declaration.

    Attributes:
        model_type: that goes with its architecture's name, and decides with transformers.
        parse: reads its configuration.
        names: what it calls its tensors.
    """

    model_type: str
    parse: Callable[[Fields], ModelConfig]
    names: Names

    def tensor_shapes(self, config: ModelConfig) -> Shapes:
        """The tensors a model needs, unquantised."""
        return tensors.tensor_shapes(config, self.names)

    def matrices(self, config: ModelConfig) -> frozenset[str]:
        """Those of them that may be quantised as layers are."""
        return tensors.matrices(config, self.names)

    def tables(self, config: ModelConfig) -> frozenset[str]:
        """Those of them with a row for each token, which are quantised in a way of their own, or not."""
        return tensors.tables(config, self.names)

    def spare(self, config: ModelConfig) -> frozenset[str]:
        """Tensors that files may hold beside, and that nothing reads."""
        return tensors.spare(config, self.names)

    def build(
        self, config: ModelConfig, weights: Weights, ops: Backend, max_positions: int, context: int
    ) -> Decoder:
        """The model; see `engine.models.decoder.build`."""
        return decoder.build(config, self.names, weights, ops, max_positions, context)


DECODERS = {
    "Gemma2ForCausalLM": Family("gemma2", gemma2.parse, gemma2.NAMES),
    "Gemma3ForCausalLM": Family("gemma3_text", gemma3.parse, gemma3.NAMES),
    "GptOssForCausalLM": Family("gpt_oss", gpt_oss.parse, gpt_oss.NAMES),
    "GraniteForCausalLM": Family("granite", granite.parse, granite.NAMES),
    "LlamaForCausalLM": Family("llama", llama.parse, llama.NAMES),
    "MistralForCausalLM": Family("mistral", mistral.parse, mistral.NAMES),
    "MixtralForCausalLM": Family("mixtral", mixtral.parse, mixtral.NAMES),
    "Olmo2ForCausalLM": Family("olmo2", olmo2.parse, olmo2.NAMES),
    "Phi3ForCausalLM": Family("phi3", phi3.parse, phi3.NAMES),
    "Qwen2ForCausalLM": Family("qwen2", qwen2.parse, qwen2.NAMES),
    "Qwen3ForCausalLM": Family("qwen3", qwen3.parse, qwen3.NAMES),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", qwen3_moe.parse, qwen3_moe.NAMES),
}


def architecture(config: ModelConfig) -> Family:
    """The family of `config`."""
    return DECODERS[config.architecture]


def find_family(name: str, model_type: str) -> Family:
    """The family with this architecture.

    Raises:
        EngineError: ARCHITECTURE_UNSUPPORTED; CONFIG_UNSUPPORTED when `model_type` names another family, whose
            mathematics transformers would use.
    """
    found = DECODERS.get(name)
    if found is None:
        raise EngineError("ARCHITECTURE_UNSUPPORTED", f"{name[:100]} is not one of {', '.join(sorted(DECODERS))}")
    if model_type != found.model_type:
        raise EngineError(
            "CONFIG_UNSUPPORTED",
            f"config.json: model_type = {model_type[:100]!r} beside {name}, which is {found.model_type!r}",
        )
    return found
