"""What an encoder is, as plain data: every family's configuration comes to this, and one builder reads it."""

from dataclasses import dataclass

from engine.weights.quantisation import Quantisation


@dataclass(frozen=True, slots=True)
class ScoreHead:
    """What makes a score of a prompt: score(classifier(norm(activation(dense(pooled))))).

    Attributes:
        pooling: how the hidden states become one; one of `kernels.encoder_ops.POOLINGS`.
        activation: one of `kernels.encoder_ops.POINTWISE`.
        has_bias: the dense layer has one.
        has_norm: there is a norm behind the activation.
        score: sigmoid or identity, of the classifier's one number.
    """

    pooling: str
    activation: str
    has_bias: bool
    has_norm: bool
    score: str


@dataclass(frozen=True, slots=True)
class EncoderLayerSpec:
    """How one layer attends.

    Attributes:
        reach: a token sees this many on each side; 0: all.
        theta: base of its rotary frequencies; 0: nothing is rotated.
    """

    reach: int = 0
    theta: float = 0.0


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """An encoder.

    Attributes:
        architecture: as config.json names it.
        model_type: as config.json names it.
        vocab_size: tokens.
        hidden_size: numbers per token between layers; num_heads divides it.
        intermediate_size: numbers per token inside the MLP.
        num_heads: of attention.
        max_context_tokens: longest prompt.
        norm_eps: added under the root of each norm.
        activation: of the MLP; one of `kernels.encoder_ops.POINTWISE`, gated one of `kernels.ops.ACTIVATIONS`.
        layers: how each attends.
        num_places: rows of the table of positions; 0: there is none.
        num_types: segments; 0: there is no table of them.
        padding_id: positions are counted from the one behind this one, and this token's stays there (RoBERTa);
            None: from 0.
        is_gated: the MLP is down(act(gate(x)) · up(x)), else down(act(up(x))).
        pre_norm: each half reads the normalised stream and adds to it; else what it adds to is normalised.
        attention_bias: all projections of attention have a bias.
        mlp_bias: those of the MLP do.
        norm_bias: norms do.
        head: what makes a score; None: the hidden states are what is wanted.
        quantisation: how matrices may be quantised; None: they are plain.
    """

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    max_context_tokens: int
    norm_eps: float
    activation: str
    layers: tuple[EncoderLayerSpec, ...]
    num_places: int = 0
    num_types: int = 0
    padding_id: int | None = None
    is_gated: bool = False
    pre_norm: bool = False
    attention_bias: bool = True
    mlp_bias: bool = True
    norm_bias: bool = True
    head: ScoreHead | None = None
    quantisation: Quantisation | None = None

    @property
    def num_layers(self) -> int:
        """Layers."""
        return len(self.layers)

    @property
    def head_dim(self) -> int:
        """Numbers per head."""
        return self.hidden_size // self.num_heads

    @property
    def thetas(self) -> tuple[float, ...]:
        """Bases of the rotary frequencies that layers use."""
        return tuple(sorted({layer.theta for layer in self.layers} - {0.0}))
