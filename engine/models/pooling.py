"""What becomes of a model's hidden states, as the files of sentence-transformers say it; unknown ones are refused.

Source: sentence-transformers, the layout of its model folders: modules.json names a folder for each module, which
has its own config.json. Needs neither torch nor that library.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import EngineError
from engine.strict_json import load_object, load_value

ReadFile = Callable[[str], bytes | None]
"""The bytes of a model's file by its path; None when the model has no such file."""

MODULES = "modules.json"
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
_MODES = {"cls": "cls", "mean": "mean", "max": "max", "lasttoken": "last"}
_SIZES = ("word_embedding_dimension", "embedding_dimension")
_TEXT_SETTINGS = {  # of the module that reads text: what each may say
    "transformer_task": ("feature-extraction", "sequence-classification"),
    "modality_config": ({"text": {"method": "forward", "method_output_name": "last_hidden_state"}},),
    "module_output_name": ("token_embeddings",),
}


@dataclass(frozen=True, slots=True)
class Pooling:
    """How hidden states become the vector of a text.

    Attributes:
        kind: one of `kernels.encoder_ops.POOLINGS`.
        normalise: the vector is divided by its Euclidean norm.
        max_tokens: longest text the publisher says it is for; 0: the model's own limit.
    """

    kind: str
    normalise: bool = False
    max_tokens: int = 0

    def __str__(self) -> str:
        return f"{self.kind} pooling{', normalised' if self.normalise else ''}"


def read_pooling(read: ReadFile, hidden_size: int) -> Pooling | None:
    """What the model's files say; None where there is no modules.json.

    Raises:
        EngineError: POOLING_UNSUPPORTED names what is not computed; CONFIG_INVALID.
    """
    content = read(MODULES)
    if content is None:
        return None
    modules = [_module(entry) for entry in _list(load_value(content, MODULES, "CONFIG_INVALID"))]
    kinds = [kind for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise _unsupported(MODULES, f"the modules {', '.join(kinds)}")
    if modules[0][1]:
        raise _unsupported(MODULES, f"the model in folder {modules[0][1]}, not beside it")
    _check_prompts(read)
    return Pooling(
        kind=_kind(read, f"{modules[1][1]}/config.json", hidden_size),
        normalise=len(modules) == 3,
        max_tokens=_longest(read),
    )


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise EngineError("CONFIG_INVALID", f"{MODULES} is not a list")
    return value


def _module(entry: object) -> tuple[str, str]:
    """The last part of a module's type, and its folder."""
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in ("path", "type")):
        raise EngineError("CONFIG_INVALID", f"{MODULES}: a module without path or type")
    package, _, kind = entry["type"].rpartition(".")
    if package.partition(".")[0] != "sentence_transformers":
        raise _unsupported(MODULES, f"the module {entry['type'][:100]}")
    return kind, entry["path"]


def _kind(read: ReadFile, path: str, hidden_size: int) -> str:
    content = read(path)
    if content is None:
        raise EngineError("MODEL_FILE_MISSING", f"{MODULES} names {path}, which is not there")
    fields = dict(load_object(content, path, "CONFIG_INVALID"))
    for name in _SIZES:
        if fields.pop(name, hidden_size) != hidden_size:
            raise EngineError("CONFIG_INVALID", f"{path}: {name} is not the model's {hidden_size}")
    if fields.pop("include_prompt", True) is not True:
        raise _unsupported(path, "include_prompt = false")
    named = fields.pop("pooling_mode", None)
    flags = {kind: fields.pop(name, False) for name, kind in _FLAGS.items()}
    if fields or any(type(flag) is not bool for flag in flags.values()):
        raise _unsupported(path, f"{', '.join(sorted(fields)) or 'a pooling mode that is neither true nor false'}")
    chosen = [kind for kind, flag in flags.items() if flag]
    if named is not None:
        chosen = chosen or [_MODES.get(named, named) if isinstance(named, str) else "no name"]
    if len(chosen) != 1 or chosen[0] not in _MODES.values():
        raise _unsupported(path, f"pooling by {' and '.join(map(str, chosen))[:100] or 'nothing'}")
    return str(chosen[0])


def _longest(read: ReadFile) -> int:
    """The longest text that the publisher allows for; 0 where nothing is said."""
    path = "sentence_bert_config.json"
    fields = _optional(read, path)
    longest = fields.pop("max_seq_length", None)
    if fields.pop("do_lower_case", False) is not False and not _lowers(read):
        raise _unsupported(path, "do_lower_case beside a tokenizer that leaves letters as they are")
    for name, supported in _TEXT_SETTINGS.items():
        if fields.pop(name, supported[0]) not in supported:
            raise _unsupported(path, name)
    if fields:
        raise _unsupported(path, ", ".join(sorted(fields)))
    if longest is not None and (type(longest) is not int or longest < 1):
        raise EngineError("CONFIG_INVALID", f"{path}: max_seq_length must be a positive whole number")
    return longest or 0


def _lowers(read: ReadFile) -> bool:
    """Whether the tokenizer makes letters small by itself, so that doing it before changes nothing."""
    content = read("tokenizer.json")
    return content is not None and _lowering(
        load_object(content, "tokenizer.json", "TOKENIZER_INVALID").get("normalizer")
    )


def _lowering(normalizer: object) -> bool:
    if not isinstance(normalizer, dict):
        return False
    inner = normalizer.get("normalizers")
    if normalizer.get("type") == "Sequence" and isinstance(inner, list):
        return any(map(_lowering, inner))
    return normalizer.get("type") == "Lowercase" or (
        normalizer.get("type") == "BertNormalizer" and normalizer.get("lowercase") is True
    )


def _check_prompts(read: ReadFile) -> None:
    """Refuse a text that would be put before every input: whoever wants one sends it."""
    path = "config_sentence_transformers.json"
    if _optional(read, path).get("default_prompt_name") is not None:
        raise _unsupported(path, "a default_prompt_name")


def _optional(read: ReadFile, path: str) -> dict[str, Any]:
    content = read(path)
    fields: Mapping[str, Any] = {} if content is None else load_object(content, path, "CONFIG_INVALID")
    return {name: value for name, value in fields.items() if value is not None}


def _unsupported(path: str, what: str) -> EngineError:
    return EngineError("POOLING_UNSUPPORTED", f"{path}: {what}; this engine does not compute it")
