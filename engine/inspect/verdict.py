"""What a model is, and whether this engine can run exactly what its files hold; nothing in them is executed.

The configuration, the tokenizer and the template are judged by the code that will use them.
"""

import math
from collections import Counter
from dataclasses import dataclass

from engine.errors import EngineError
from engine.inspect.folder import Folder
from engine.models.config import ModelConfig, parse_config
from engine.models.registry import architecture
from engine.strict_json import load_object
from engine.text.conversation import render_marked
from engine.text.limits import LOAD_CPU_S, cpu_limit
from engine.text.model import MAX_FILE_BYTES, TextModel, load_text_model
from engine.text.template import Message
from engine.weights.safetensors import TensorEntry, read_header

MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 32 << 20
TEMPLATE_LIMIT_S = 2.0
_CODE_SUFFIXES = (".py", ".pyc", ".so", ".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".npy", ".npz")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PROBES = (
    (Message("user", "Which claims are open?"),),
    (Message("user", " Hello. "), Message("assistant", "Good day."), Message("user", "{{ 7 * 7 }} <b>")),
)


@dataclass(frozen=True)
class Verdict:
    """What a sound model is.

    Attributes:
        architecture: as config.json names it.
        max_context_tokens: prompt and answer together.
        parameters: numbers in all tensors.
        dtype: number type of most of them.
        capabilities: generate, chat.
    """

    architecture: str
    max_context_tokens: int
    parameters: int
    dtype: str
    capabilities: tuple[str, ...]


def judge(folder: Folder) -> Verdict:
    """The verdict on a sound model.

    Raises:
        EngineError: the code and the message say what is wrong with it.
    """
    _refuse_code(folder)
    config = _config(folder)
    entries = _tensors(folder)
    _compare(entries, config)
    with cpu_limit(LOAD_CPU_S, "loading the tokenizer and the chat template", "TEXT_TOO_COSTLY"):
        text = load_text_model(lambda path: folder.read(path, MAX_FILE_BYTES), config.max_context_tokens)
    if text.tokenizer.size > config.vocab_size:
        raise EngineError(
            "TOKENIZER_TOO_LARGE",
            f"the tokenizer has ids up to {text.tokenizer.size - 1}, the model only {config.vocab_size} tokens",
        )
    _probe_template(text)
    numbers = Counter[str]()
    for entry in entries.values():
        numbers[entry.dtype] += math.prod(entry.shape)
    dtype, _ = numbers.most_common(1)[0]
    return Verdict(
        config.architecture, config.max_context_tokens, numbers.total(), _DTYPES[dtype], text.capabilities
    )


def _refuse_code(folder: Folder) -> None:
    """Neither programs, nor pickles, nor pointers to programs."""
    for path in folder.paths:
        if path.lower().endswith(_CODE_SUFFIXES):
            raise EngineError("CODE_REFUSED", f"{path} may hold code; only safetensors, JSON and text are taken")
    for path in ("config.json", "tokenizer_config.json"):
        content = folder.read(path, MAX_CONFIG_BYTES)
        if content is not None and "auto_map" in load_object(content, path, "CONFIG_INVALID"):
            raise EngineError("AUTO_MAP_REFUSED", f"{path} has auto_map, which names code to execute")


def _config(folder: Folder) -> ModelConfig:
    content = folder.read("config.json", MAX_CONFIG_BYTES)
    if content is None:
        raise EngineError("MODEL_FILE_MISSING", "the model has no config.json")
    return parse_config(content, folder.read("generation_config.json", MAX_CONFIG_BYTES))


def _tensors(folder: Folder) -> dict[str, TensorEntry]:
    """Every tensor of every safetensors file, by name."""
    found: dict[str, TensorEntry] = {}
    for path in folder.matching(".safetensors"):
        length = int.from_bytes(folder.head(path, 8), "little")
        if length > MAX_HEADER_BYTES:
            raise EngineError("WEIGHTS_INVALID", f"{path} declares a header of {length} bytes")
        entries = read_header(folder.head(path, 8 + length), folder.size(path), path)
        twice = sorted(found.keys() & entries.keys())
        if twice:
            raise EngineError("TENSORS_MISMATCH", f"tensor {twice[0]} is in {path} and in another file")
        found.update(entries)
    if not found:
        raise EngineError("MODEL_FILE_MISSING", "the model has no tensors in safetensors files")
    return found


def _compare(entries: dict[str, TensorEntry], config: ModelConfig) -> None:
    """Refuse a tensor that is missing, surplus, or of another shape than the configuration implies."""
    expected = architecture(config).tensor_shapes(config)
    missing, surplus = sorted(expected.keys() - entries.keys()), sorted(entries.keys() - expected.keys())
    if missing:
        raise EngineError("TENSORS_MISMATCH", f"tensor {missing[0]} is missing, {len(missing)} in all")
    if surplus:
        raise EngineError("TENSORS_MISMATCH", f"tensor {surplus[0]} is not part of a {config.architecture}")
    for name, shape in sorted(expected.items()):
        if entries[name].shape != tuple(shape):
            raise EngineError(
                "TENSORS_MISMATCH", f"tensor {name} has shape {list(entries[name].shape)}, not {list(shape)}"
            )


def _probe_template(text: TextModel) -> None:
    """Render ordinary conversations as requests will, within a time limit."""
    if text.template is None:
        return
    with cpu_limit(TEMPLATE_LIMIT_S, "the chat template", "TEMPLATE_REFUSED"):
        for probe in _PROBES:
            text.tokenizer.encode(render_marked(text.template, probe, text.tokenizer), add_special_tokens=False)
