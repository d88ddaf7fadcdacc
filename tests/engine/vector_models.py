"""Tiny random encoders and embedders as transformers saves them, and what transformers makes of a text."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from engine.loop import EngineLoop
from engine.request import Task
from tests.engine.tiny import Answer, request, run

VOCAB = 99
CONTEXT = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
FAMILIES = {
    "bert": ("BertConfig", "Bert"),
    "roberta": ("RobertaConfig", "Roberta"),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRoberta"),
    "modernbert": ("ModernBertConfig", "ModernBert"),
    "qwen3": ("Qwen3Config", "Qwen3"),
}
_SPECIAL = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_OF_MODERNBERT = {"cls_token_id": 0, "sep_token_id": 2}


def save(folder: Path, family: str, kind: str = "Model", seed: int = 0, **fields: Any) -> Any:
    """A random model of a family in `folder`, and that model; its weights are large, so that vectors differ."""
    config_name, prefix = FAMILIES[family]
    special = _SPECIAL | (_OF_MODERNBERT if family == "modernbert" else {})
    config = getattr(transformers, config_name)(**(SIZES | special | fields))
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}{kind}")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.3 if parameter.dim() > 1 else parameter + noise * 0.1)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    return model


def change_config(folder: Path, **fields: Any) -> None:
    """Other values in config.json; None takes a field out."""
    path = folder / "config.json"
    changed = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in changed.items() if value is not None}))


def add_modules(folder: Path, pooling: str = "pooling_mode_mean_tokens", *kinds: str, **settings: Any) -> None:
    """The files of sentence-transformers: a model, a pooling of one mode, and modules of further kinds."""
    names = ("Transformer", "Pooling", *kinds)
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{name}" if i else "",
            "type": f"sentence_transformers.models.{name}",
        }
        for i, name in enumerate(names)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    fields = {"word_embedding_dimension": SIZES["hidden_size"], pooling: True, "include_prompt": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(fields))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": False} | settings))


def texts(count: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    """Prompts of mixed lengths."""
    of = random.Random(seed)
    lengths = [1, 2, longest, *(of.randrange(1, longest) for _ in range(count))][:count]
    return [[of.randrange(3, VOCAB) for _ in range(length)] for length in lengths]


def ask(loop: EngineLoop, prompts: Sequence[Sequence[int]], task: Task = Task.EMBED, **rest: Any) -> list[Answer]:
    """What the engine says of prompts that it is given together."""
    for i, prompt in enumerate(prompts):
        loop.submit(request(i, prompt, task=task, **rest))
    answers = run(loop)
    return [answers[i] for i in range(len(prompts))]


def vectors(
    loop: EngineLoop, prompts: Sequence[Sequence[int]], task: Task = Task.EMBED, **rest: Any
) -> torch.Tensor:
    """The values of prompts that the engine is given together, one row for each."""
    return torch.tensor([answer.values for answer in ask(loop, prompts, task, **rest)])


def hidden_states(model: Any, prompt: Sequence[int], type_ids: Sequence[int] = ()) -> torch.Tensor:
    """What transformers makes of each token of a prompt."""
    segments = {"token_type_ids": torch.tensor([list(type_ids)])} if type_ids else {}
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([list(prompt)]), **segments).last_hidden_state[0]
    return found
