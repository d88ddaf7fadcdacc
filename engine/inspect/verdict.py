"""What a model is, and whether this engine can run exactly what its files hold; nothing in them is executed.

The configuration, the tokenizer and the template are judged by the code that will use them.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from engine.errors import EngineError
from engine.inspect.folder import Folder
from engine.inspect.tensors import most_common_dtype, read_tensors
from engine.models.encoders.spec import EncoderConfig
from engine.models.served import Layout, Served, layout, read_served
from engine.models.spec import Mixture, ModelConfig
from engine.strict_json import load_object
from engine.text.conversation import render_marked
from engine.text.limits import LOAD_CPU_S, cpu_limit
from engine.text.model import MAX_FILE_BYTES, TextModel, load_text_model
from engine.text.template import MAX_SOURCE_CHARS, Message, private_names
from engine.weights.formats import Format
from engine.weights.quantisation import assign

MAX_CONFIG_BYTES = 1 << 20
MAX_SETTINGS_BYTES = 4 << 20  # of the tokenizer, which may have templates in them
TEMPLATE_LIMIT_S = 2.0
_MAX_DTYPE, _MAX_QUANTISATION = 32, 64  # characters of a bundle's manifest
_CODE_SUFFIXES = (".py", ".pyc", ".so", ".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".npy", ".npz")
_QUANTISATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_PROBES = (
    (Message("user", "Which claims are open?"),),
    (Message("user", " Hello. "), Message("assistant", "Good day."), Message("user", "{{ 7 * 7 }} <b>")),
)


@dataclass(frozen=True)
class Verdict:
    """What a sound model or adapter is.

    Attributes:
        architecture: as config.json names it; LoRA for an adapter.
        max_context_tokens: prompt and answer together, or the longest text where there is no answer; 0 for an
            adapter.
        parameters: numbers that are computed with.
        dtype: number type of most of them, or how most matrices are quantised; at most 32 characters.
        capabilities: generate, chat, embed, rerank; none of an adapter.
        facts: more for people to read, by name.
        quantisation: how matrices are quantised, most of them first; at most 64 characters; None: they are plain.
    """

    architecture: str
    max_context_tokens: int
    parameters: int
    dtype: str
    capabilities: tuple[str, ...]
    facts: Mapping[str, str] = field(default_factory=dict)
    quantisation: str | None = None


def judge(folder: Folder) -> Verdict:
    """The verdict on a sound model.

    Raises:
        EngineError: the code and the message say what is wrong with it.
    """
    _refuse_code(folder)
    served = read_served(partial(_read, folder))
    config = served.config
    if served.quantisation is None:
        _refuse_quantisation(folder)
    entries = read_tensors(folder)
    tensors = layout(served, entries)
    formats = assign(tensors.shapes, tensors.matrices, served.quantisation, entries, tensors.spare, tensors.tables)
    _check_templates(folder)
    with cpu_limit(LOAD_CPU_S, "loading the tokenizer and the chat template", "TEXT_TOO_COSTLY"):
        text = load_text_model(lambda path: folder.read(path, MAX_FILE_BYTES), config.max_context_tokens)
    if text.tokenizer.size > config.vocab_size:
        raise EngineError(
            "TOKENIZER_TOO_LARGE",
            f"the tokenizer has ids up to {text.tokenizer.size - 1}, the model only {config.vocab_size} tokens",
        )
    _probe_template(text)
    facts, labels = _facts(served, text), _labels(tensors, formats)
    if formats:
        facts["quantised matrices"] = f"{len(formats.keys() & tensors.matrices)} of {len(tensors.matrices)}"
        for name in formats.keys() - tensors.matrices:
            facts["quantised embeddings"] = formats[name].label
    return Verdict(
        config.architecture,
        config.max_context_tokens,
        sum(map(math.prod, tensors.shapes.values())),
        labels[0][:_MAX_DTYPE] if labels else most_common_dtype(entries)[0],
        served.capabilities(can_chat=text.template is not None),
        facts,
        " and ".join(labels)[:_MAX_QUANTISATION] or None,
    )


def _read(folder: Folder, path: str) -> bytes | None:
    """A file that says what the model is; only its tokenizer may be large."""
    return folder.read(path, MAX_FILE_BYTES if path == "tokenizer.json" else MAX_CONFIG_BYTES)


def _facts(served: Served, text: TextModel) -> dict[str, str]:
    config = served.config
    return {
        "layers": str(config.num_layers),
        "hidden size": str(config.hidden_size),
        "attention heads": str(config.num_heads),
        **_facts_of_kind(config),
        "vocabulary": str(config.vocab_size),
        "tokenizer vocabulary": str(text.tokenizer.size),
        **({} if served.pooling is None else {"vectors": str(served.pooling)}),
    }


def _facts_of_kind(config: ModelConfig | EncoderConfig) -> dict[str, str]:
    """What only a decoder has, or only a classifier."""
    if not isinstance(config, EncoderConfig):
        return {"key-value heads": str(config.num_kv_heads), **_facts_of_layers(config)}
    return {} if config.head is None else {"scores": config.head.score}


def _facts_of_layers(config: ModelConfig) -> dict[str, str]:
    """Experts and windows, where there are any."""
    facts = {}
    mixtures = [layer.mlp for layer in config.layers if isinstance(layer.mlp, Mixture)]
    if mixtures:
        facts["experts"] = f"{mixtures[0].experts} in {len(mixtures)} layers, {mixtures[0].top_k} for each token"
    windows = [layer.window for layer in config.layers if layer.window]
    if windows:
        facts["sliding window"] = f"{windows[0]} tokens in {len(windows)} layers"
    return facts


def _refuse_code(folder: Folder) -> None:
    """Neither programs, nor pickles, nor pointers to programs."""
    for path in folder.paths:
        if path.lower().endswith(_CODE_SUFFIXES):
            raise EngineError("CODE_REFUSED", f"{path} may hold code; only safetensors, JSON and text are taken")
    for path, limit in (("config.json", MAX_CONFIG_BYTES), ("tokenizer_config.json", MAX_SETTINGS_BYTES)):
        content = folder.read(path, limit)
        if content is not None and "auto_map" in load_object(content, path, "CONFIG_INVALID"):
            raise EngineError("AUTO_MAP_REFUSED", f"{path} has auto_map, which names code to execute: remove it")


def _refuse_quantisation(folder: Folder) -> None:
    """No file that calls the weights quantised where config.json, which decides, does not."""
    for path in folder.paths:
        if path.rpartition("/")[2].lower() in _QUANTISATION_FILES:
            raise EngineError(
                "QUANTISATION_UNSUPPORTED", f"{path} says that the weights are quantised, config.json does not"
            )


def _check_templates(folder: Folder) -> None:
    """Refuse a template, wherever a loader finds it, that is too long or reaches for what the sandbox hides."""
    for where, source in _template_sources(folder):
        if len(source) > MAX_SOURCE_CHARS:
            raise EngineError("TEMPLATE_TOO_LARGE", f"{where} has {len(source)} bytes, over {MAX_SOURCE_CHARS}")
        with cpu_limit(LOAD_CPU_S, f"reading {where}", "TEXT_TOO_COSTLY"):
            hidden = private_names(source.decode(errors="replace"))
        if hidden:
            raise EngineError("TEMPLATE_REFUSED", f"{where} reaches for {hidden[0][:40]}, which the sandbox hides")


def _template_sources(folder: Folder) -> Iterator[tuple[str, bytes]]:
    """Where each template is, and its text, or so much of it that it is seen to be too long."""
    for path in folder.matching(".jinja"):
        yield path, folder.head(path, MAX_SOURCE_CHARS + 1)
    settings = folder.read("tokenizer_config.json", MAX_SETTINGS_BYTES)
    if settings is not None:
        given = load_object(settings, "tokenizer_config.json", "TOKENIZER_INVALID").get("chat_template")
        yield from ((f"tokenizer_config.json {name}".strip(), text.encode()) for name, text in _named(given))


def _named(given: object) -> list[tuple[str, str]]:
    """The templates of a tokenizer's settings: one, or several with names."""
    if isinstance(given, str):
        return [("", given)]
    entries: list[Any] = given if isinstance(given, list) else []
    named = [(entry.get("name"), entry.get("template")) for entry in entries if isinstance(entry, dict)]
    return [(str(name), text) for name, text in named if isinstance(text, str)]


def _labels(tensors: Layout, formats: Mapping[str, Format]) -> list[str]:
    """How matrices are quantised, as people call it; the way of most numbers first."""
    numbers = Counter[str]()
    for name, found in formats.items():
        numbers[found.label] += math.prod(tensors.shapes[name])
    return [label for label, _ in numbers.most_common()]


def _probe_template(text: TextModel) -> None:
    """Render ordinary conversations as requests will, within a time limit."""
    if text.template is None:
        return
    with cpu_limit(TEMPLATE_LIMIT_S, "the chat template", "TEMPLATE_REFUSED"):
        for probe in _PROBES:
            text.tokenizer.encode(render_marked(text.template, probe, text.tokenizer), add_special_tokens=False)
