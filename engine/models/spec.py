"""What a decoder computes, as plain data: the one description that every family's configuration is read into.

Needs neither torch nor transformers.
"""

import math
import struct
from dataclasses import dataclass
from typing import TypeAlias

from engine.weights.quantisation import Quantisation

DEFAULT_THETA = 10000.0  # what transformers assumes where a configuration does not say


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        kind: default, linear, dynamic, yarn, longrope or llama3.
        theta: base of the frequencies.
        factor: by which positions are stretched (linear, yarn, llama3); dynamic stretches only positions beyond
            the model's context, which are not served.
        low_freq_factor: wavelengths beyond original / this are stretched fully (llama3).
        high_freq_factor: wavelengths below original / this are left alone (llama3).
        original_context: positions the model was first trained on (yarn, longrope, llama3).
        partial: share of each head's numbers that is rotated, the first ones.
        scale: of cosines and sines (yarn, longrope).
        beta_fast: frequencies of more turns than this in the original context are left alone (yarn).
        beta_slow: frequencies of fewer turns are stretched fully (yarn).
        truncate: the borders between these are whole numbers of a frequency's place (yarn).
        short_factors: by which each frequency is divided in contexts up to the original (longrope).
        long_factors: the same beyond it (longrope).
    """

    kind: str = "default"
    theta: float = DEFAULT_THETA
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_context: int = 0
    partial: float = 1.0
    scale: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def rotated(self, head_dim: int) -> int:
        """How many numbers of a head are rotated."""
        return int(head_dim * self.partial)

    def inv_freq(self, head_dim: int, context: int) -> tuple[float, ...]:
        """Radians per token of each pair of numbers, rotated / 2 of them, each a float32.

        They are rounded where transformers rounds them, for models are trained and published with those: far into
        a context an angle differs by more from the exact one than a logit may.

        Args:
            head_dim: numbers of a head.
            context: the longest context that is served, which decides between short and long factors (longrope);
                every position of a deployment has the same factors, as its keys are kept.

        Source: Su et al., "RoFormer", 2021, equation 15; Chen et al., "Extending Context Window of Large Language
        Models via Positional Interpolation", 2023; Peng et al., "YaRN", 2023, section 3.4; Ding et al.,
        "LongRoPE", 2024; for llama3, Meta's Llama 3.1 reference implementation.
        """
        count = self.rotated(head_dim)
        powers = [_float32(self.theta ** _float32(i / count)) for i in range(0, count, 2)]
        if self.kind == "longrope":
            factors = self.long_factors if context > self.original_context else self.short_factors
            return tuple(
                _float32(1 / _float32(_float32(f) * power)) for f, power in zip(factors, powers, strict=True)
            )
        if self.kind == "yarn":
            return self._yarn(powers)
        plain = [_float32(1 / power) for power in powers]
        if self.kind == "llama3":
            return tuple(_float32(self._llama3(frequency)) for frequency in plain)
        return (
            tuple(_float32(frequency / self.factor) for frequency in plain) if self.kind == "linear" else (*plain,)
        )

    def _llama3(self, frequency: float) -> float:
        turns = self.original_context * frequency / (2 * math.pi)
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        smooth = min(1.0, max(0.0, smooth))
        return (1 - smooth) * frequency / self.factor + smooth * frequency

    def _yarn(self, powers: list[float]) -> tuple[float, ...]:
        count = 2 * len(powers)
        low, high = self._place(self.beta_fast, count), self._place(self.beta_slow, count)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, count - 1)
        if low == high:
            high += 0.001
        found = []
        for i, power in enumerate(powers):
            alone = _float32(1 - min(1.0, max(0.0, _float32(_float32(i - low) / (high - low)))))
            stretched = _float32(1 / _float32(self.factor * power))
            found.append(_float32(stretched * _float32(1 - alone) + _float32(_float32(1 / power) * alone)))
        return tuple(found)

    def _place(self, turns: float, count: int) -> float:
        """Which pair makes this many turns in the original context (YaRN, equation 17)."""
        return count * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(self.theta))


@dataclass(frozen=True, slots=True)
class Dense:
    """A gated MLP that every token takes: numbers per token inside it."""

    intermediate: int


@dataclass(frozen=True, slots=True)
class Mixture:
    """Gated MLPs of which every token takes a few.

    Attributes:
        experts: how many there are.
        top_k: how many a token takes.
        intermediate: numbers per token inside each.
        normalise: their weights add up to one; else they are shares of the softmax over all.
        has_bias: the router and the experts' matrices have biases.
    """

    experts: int
    top_k: int
    intermediate: int
    normalise: bool
    has_bias: bool = False


Mlp: TypeAlias = Dense | Mixture


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer.

    Attributes:
        mlp: its second half.
        window: a token attends to this many last ones, itself included; 0: to all.
        rope: which of the model's rotary embeddings.
        has_sinks: each head has one more score, which adds nothing.
    """

    mlp: Mlp
    window: int = 0
    rope: int = 0
    has_sinks: bool = False


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder.

    Attributes:
        architecture: as config.json names it.
        model_type: as config.json names it; decides with transformers, and is the architecture's.
        vocab_size: tokens.
        hidden_size: numbers per token between layers.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides num_heads.
        head_dim: numbers per head; even.
        max_context_tokens: positions the model knows.
        eos_token_ids: tokens that end an answer.
        tie_word_embeddings: the output matrix is the embedding table.
        layers: its layers.
        ropes: rotary embeddings that layers name.
        norm_eps: added under the root of each norm.
        activation: of the gated MLPs, one of kernels.ops.ACTIVATIONS.
        attention_scale: factor of q·k.
        norm_offset: added to the weight of each norm (Gemma's 1).
        qk_norm: queries and keys are normed: "" not, "head" each head, "all" all heads of a token at once.
        attention_bias: q, k and v projections have a bias.
        out_bias: the o projection has one.
        mlp_bias: gate, up and down projections have one.
        attention_softcap: scores become this · tanh(score / this); 0: they stay.
        embedding_scale: factor of the embeddings.
        residual_scale: factor of what each half of a layer adds.
        logits_scale: factor of the logits.
        logits_softcap: logits become this · tanh(logit / this); 0: they stay.
        quantisation: of its matrices; None: they are plain.
    """

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context_tokens: int
    eos_token_ids: tuple[int, ...]
    tie_word_embeddings: bool
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeConfig, ...]
    norm_eps: float
    activation: str
    attention_scale: float
    norm_offset: float = 0.0
    qk_norm: str = ""
    attention_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    attention_softcap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    logits_softcap: float = 0.0
    quantisation: Quantisation | None = None

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)


def _float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])
