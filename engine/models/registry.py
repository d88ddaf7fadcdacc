"""The architectures this engine computes, by the name config.json gives them."""

from collections.abc import Callable
from typing import NamedTuple

from engine.errors import EngineError
from engine.models import llama
from engine.models.blocks import Decoder, Shapes, Weights
from engine.models.config import ModelConfig
from kernels.ops import Backend


class Architecture(NamedTuple):
    """A family: the model_type that goes with its name, the tensors it needs, and how to build it."""

    model_type: str
    tensor_shapes: Callable[[ModelConfig], Shapes]
    build: Callable[[ModelConfig, Weights, Backend, int], Decoder]


ARCHITECTURES = {"LlamaForCausalLM": Architecture("llama", llama.tensor_shapes, llama.build)}


def architecture(config: ModelConfig) -> Architecture:
    """The family of `config`.

    Raises:
        EngineError: ARCHITECTURE_UNSUPPORTED; CONFIG_UNSUPPORTED when model_type names another family, whose
            mathematics transformers would use.
    """
    found = ARCHITECTURES.get(config.architecture)
    if found is None:
        raise EngineError(
            "ARCHITECTURE_UNSUPPORTED",
            f"{config.architecture} is not one of {', '.join(sorted(ARCHITECTURES))}",
        )
    if config.model_type != found.model_type:
        raise EngineError(
            "CONFIG_UNSUPPORTED",
            f"config.json: model_type = {config.model_type!r} beside {config.architecture}, which is "
            f"{found.model_type!r}",
        )
    return found
