"""What a LoRA adapter is, and whether it is one that can be computed exactly; nothing in it is executed.

An adapter is `adapter_config.json` and `adapter_model.safetensors` as PEFT writes them, and nothing else that a
loader reads. Every field that changes the mathematics must have the value of plain LoRA; one that is not known
must be null, false or empty.

Source: Hu et al., "LoRA", 2021; Kalajdzievski, "rsLoRA", 2023; the files that PEFT writes (LoraConfig).
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from engine.errors import EngineError
from engine.inspect.folder import Folder
from engine.inspect.tensors import most_common_dtype, read_tensors
from engine.inspect.verdict import MAX_CONFIG_BYTES, Verdict
from engine.strict_json import load_object
from engine.weights.formats import FLOATS
from engine.weights.safetensors import TensorEntry

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK = 1024
_TARGETS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
_TENSOR = re.compile(
    r"base_model\.model\.(model\.layers\.[0-9]{1,4}\.(?:self_attn|mlp)\.([a-z]+_proj))\.lora_([AB])\.weight"
)
# What training or loading notes down and computing does not use.
_INERT = frozenset(
    (
        *("base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "lora_dropout"),
        *("megatron_core", "qalora_group_size"),
    )
)
_ONLY: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, "gaussian", None),
    "use_rslora": (True, False, None),
    "runtime_config": ({"ephemeral_gpu_offload": False}, {}, None),
}
_TAKEN = frozenset({"r", "lora_alpha", "target_modules"})


def judge(folder: Folder) -> Verdict:
    """The verdict on a sound adapter.

    Raises:
        EngineError: ADAPTER_FILES, ADAPTER_UNSUPPORTED, ADAPTER_INVALID, ADAPTER_TENSORS, or as `read_tensors`.
    """
    _check_files(folder)
    config = load_object(folder.read(CONFIG, MAX_CONFIG_BYTES) or b"", CONFIG, "ADAPTER_INVALID")
    _check_config(config)
    rank, targets = _rank(config), _targets(config)
    entries = read_tensors(folder, FLOATS)
    layers = _check_tensors(entries, rank, targets)
    dtype, parameters = most_common_dtype(entries)
    facts = {
        "rank": str(rank),
        "alpha": f"{config['lora_alpha']:g}",
        "scaling": "alpha / sqrt(rank)" if config.get("use_rslora") else "alpha / rank",
        "targets": ", ".join(sorted(targets)),
        "layers": str(layers),
    }
    return Verdict("LoRA", 0, parameters, dtype, (), facts)


def _check_files(folder: Folder) -> None:
    missing = [path for path in (CONFIG, WEIGHTS) if path not in folder.paths]
    if missing:
        raise EngineError("ADAPTER_FILES", f"the adapter has no {missing[0]}")
    surplus = [path for path in folder.paths if path not in (CONFIG, WEIGHTS)]
    if surplus:
        raise EngineError(
            "ADAPTER_FILES", f"an adapter has no {surplus[0]} of its own, its model has; leave it out"
        )


def _check_config(config: Mapping[str, Any]) -> None:
    for name, value in config.items():
        if name in _ONLY:
            plain = any(type(value) is type(allowed) and value == allowed for allowed in _ONLY[name])
        else:
            plain = name in _INERT | _TAKEN or value is False or value in (None, {}, [])  # 0 is a number
        if not plain:
            raise EngineError("ADAPTER_UNSUPPORTED", f"{CONFIG}: {name[:80]} = {str(value)[:80]}")
    if "peft_type" not in config:
        raise EngineError("ADAPTER_UNSUPPORTED", f"{CONFIG} has no peft_type; LORA is computed")
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha <= 1e6:
        raise EngineError("ADAPTER_INVALID", f"{CONFIG}: lora_alpha must be a number above 0")


def _rank(config: Mapping[str, Any]) -> int:
    rank = config.get("r")
    if type(rank) is not int or not 0 < rank <= MAX_RANK:
        raise EngineError("ADAPTER_INVALID", f"{CONFIG}: r must be a whole number from 1 to {MAX_RANK}")
    return rank


def _targets(config: Mapping[str, Any]) -> frozenset[str]:
    given = config.get("target_modules")
    if not isinstance(given, list) or not given or not all(isinstance(name, str) for name in given):
        raise EngineError("ADAPTER_INVALID", f"{CONFIG}: target_modules must be a list of names")
    unknown = sorted(set(given) - _TARGETS)
    if unknown:
        raise EngineError(
            "ADAPTER_UNSUPPORTED", f"{CONFIG}: target {unknown[0][:80]}; known are {', '.join(sorted(_TARGETS))}"
        )
    return frozenset(given)


def _check_tensors(entries: Mapping[str, TensorEntry], rank: int, targets: frozenset[str]) -> int:
    """Hold every target to an A [rank, in] and a B [out, rank] of one size in all layers; how many layers."""
    pairs: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    sizes: dict[str, tuple[int, ...]] = {}
    for name, entry in entries.items():
        match = _TENSOR.fullmatch(name)
        if match is None or match[2] not in targets:
            raise EngineError("ADAPTER_TENSORS", f"tensor {name[:120]} belongs to no target of the adapter")
        shape = tuple(entry.shape)
        if len(shape) != 2 or shape[0 if match[3] == "A" else 1] != rank:
            raise EngineError("ADAPTER_TENSORS", f"tensor {name} is {list(shape)}, which is not of rank {rank}")
        if sizes.setdefault(f"{match[2]}.{match[3]}", shape) != shape:
            raise EngineError("ADAPTER_TENSORS", f"tensor {name} is {list(shape)}, unlike that of another layer")
        pairs[match[1]][match[3]] = shape
    for module, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise EngineError("ADAPTER_TENSORS", f"{module} has half of a pair lora_A, lora_B")
    absent = sorted(targets - {module.rpartition(".")[2] for module in pairs})
    if absent:
        raise EngineError("ADAPTER_TENSORS", f"the target {absent[0]} has no tensors")
    return len({module.split(".")[2] for module in pairs})
