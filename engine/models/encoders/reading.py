"""What the families of encoders read alike from config.json."""

from collections.abc import Mapping
from typing import Any

from engine.models.encoders.spec import ScoreHead
from engine.models.fields import Fields, invalid, unsupported

_INERT = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    *("eos_token_id", "cls_token_id", "sep_token_id", "tie_word_embeddings", "finetuning_task", "output_past"),
    *("directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers"),
    *("pooler_size_per_head", "pooler_type"),
)
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
_SCORES = {
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.modules.linear.Identity": "identity",
}
_CLASSIFIER = "ForSequenceClassification"
_UNNAMED_LABELS = 2  # what transformers takes where a configuration names none


def begin(fields: Fields) -> None:
    """Take the fields that mean nothing to an encoder, and those that must say nothing else than usual."""
    fields.ignore(*_INERT)
    fields.only("position_embedding_type", "absolute", default="absolute")
    fields.only("add_pooling_layer", True, False, default=True)


def heads(fields: Fields, hidden: int) -> int:
    """Heads of attention, of which each has as many numbers."""
    count = fields.size("num_attention_heads")
    if hidden % count:
        raise invalid("num_attention_heads", f"a divisor of hidden_size {hidden}", count)
    return count


def activation(fields: Fields, name: str, *supported: str, default: str | None = None) -> str:
    """A function by one of its names in transformers, as `kernels.encoder_ops.POINTWISE` calls it."""
    value = fields.take(name, default)
    found = _ACTIVATIONS.get(value) if isinstance(value, str) else None
    if found is None or (supported and found not in supported):
        names = sorted(key for key, one in _ACTIVATIONS.items() if not supported or one in supported)
        raise unsupported(f"{name} = {value!r} (supported: {', '.join(names)})")
    return found


def score(fields: Fields) -> str:
    """What is done to the classifier's one number: what sentence-transformers does with a cross-encoder.

    Raises:
        EngineError: CONFIG_UNSUPPORTED (several labels, or another function).
    """
    labels = _labels(fields)
    if labels != 1:
        raise unsupported(f"{labels} labels: a reranker has one score")
    given = fields.mapping("sentence_transformers") or {}
    rest = Fields({name: value for name, value in given.items() if name != "version"}, "sentence_transformers ")
    name = rest.take("activation_fn", fields.take("sbert_ce_default_activation_function", next(iter(_SCORES))))
    rest.refuse_rest()
    if not isinstance(name, str) or name not in _SCORES:
        raise unsupported(f"the cross-encoder's activation {str(name)[:100]!r} (supported: {', '.join(_SCORES)})")
    return _SCORES[name]


def head(fields: Fields, architecture: str, pooling: str = "cls", **other: Any) -> ScoreHead | None:
    """The head of a classifier, pooled so, with tanh and biases unless told; None where there is no head."""
    if not architecture.endswith(_CLASSIFIER):
        fields.ignore("sentence_transformers", "sbert_ce_default_activation_function", "num_labels")
        return None
    given: dict[str, Any] = {"activation": "tanh", "has_bias": True, "has_norm": False} | other
    return ScoreHead(pooling=pooling, score=score(fields), **given)


def padding_id(raw: Mapping[str, Any], default: int, vocabulary: int) -> int:
    """The token that fills up batches, which positions are counted from."""
    value = raw.get("pad_token_id", default)
    if type(value) is not int or not 0 <= value < vocabulary:
        raise invalid("pad_token_id", f"a token id below {vocabulary}", value)
    return value


def _labels(fields: Fields) -> int:
    count, names = fields.take("num_labels"), fields.take("id2label")
    if names is None:
        return fields.size("num_labels", _UNNAMED_LABELS)
    if not isinstance(names, dict) or count not in (None, len(names)):
        raise invalid("id2label", "an object with num_labels names", names)
    return len(names)
