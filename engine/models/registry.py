"""The architectures this engine computes, by the name config.json gives them."""

from collections.abc import Callable
from typing import NamedTuple

from engine.errors import EngineError
from engine.models import llama
from engine.models.blocks import Decoder, Shapes, Weights
from engine.models.config import ModelConfig
from kernels.ops import Backend


class Architecture(NamedTuple):
    """A family: the tensors it needs, and how to build it."""

    tensor_shapes: Callable[[ModelConfig], Shapes]
    build: Callable[[ModelConfig, Weights, Backend, int], Decoder]


ARCHITECTURES = {"LlamaForCausalLM": Architecture(llama.tensor_shapes, llama.build)}


def architecture(config: ModelConfig) -> Architecture:
    """The family of `config`.

    Raises:
        EngineError: ARCHITECTURE_UNSUPPORTED.
    """
    found = ARCHITECTURES.get(config.architecture)
    if found is None:
        raise EngineError(
            "ARCHITECTURE_UNSUPPORTED",
            f"{config.architecture} is not one of {', '.join(sorted(ARCHITECTURES))}",
        )
    return found
