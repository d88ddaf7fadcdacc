"""Models for tests: random tiny Llamas in the Hugging Face layout, their file sets, and engines over them."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine.build import build_engine
from engine.loop import EngineLoop
from engine.models.config import parse_config
from engine.models.registry import architecture
from engine.options import EngineOptions
from engine.plan import StepPlan, TokenLogprob
from engine.request import End, Request, SamplingParams, StopCriteria
from engine.weights.files import File, FileSet, OpenFile

VOCAB = 300


def save_llama(folder: Path, seed: int = 0, **overrides: Any) -> None:
    """A random Llama in `folder`, beside a byte-level tokenizer. Weights are large, so that its logits differ."""
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
    } | overrides
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1]}))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    config = parse_config((folder / "config.json").read_bytes())
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 0.1)
        + name.endswith("norm.weight")
        for name, shape in architecture(config).tensor_shapes(config).items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def byte_tokenizer(size: int = VOCAB) -> Tokenizer:
    """A byte-level BPE tokenizer: two special tokens, every byte, and merges of pairs of letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    merges = [(a, b) for a in letters for b in letters][: size - len(alphabet) - 2]
    tokens = ["<s>", "</s>", *alphabet, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def file_set(folder: Path) -> tuple[FileSet, OpenFile]:
    """The files of `folder`, and what opens them by digest."""
    found = [(hashlib.sha256(p.read_bytes()).hexdigest(), p) for p in sorted(folder.rglob("*")) if p.is_file()]
    files = tuple(File(str(p.relative_to(folder)), p.stat().st_size, digest) for digest, p in found)
    paths = dict(found)
    return FileSet("0" * 64, files), lambda digest: os.open(paths[digest], os.O_RDONLY)


def engine(folder: Path, **options: Any) -> EngineLoop:
    """A small engine over the model in `folder`; on one thread unless told."""
    defaults = {"kv_blocks": 64, "block_size": 8, "threads": 1}
    return build_engine(*file_set(folder), EngineOptions(**(defaults | options)))


def request(handle: int, prompt: Sequence[int], max_tokens: int = 8, scope: str = "a", **rest: Any) -> Request:
    """A request; `rest` goes to SamplingParams, StopCriteria and Request by name."""
    sampling, stop = (
        {field.name: rest.pop(field.name) for field in fields(kind) if field.name in rest}
        for kind in (SamplingParams, StopCriteria)
    )
    return Request(handle, prompt, SamplingParams(**sampling), StopCriteria(max_tokens, **stop), scope, **rest)


class Answer:
    """All that an engine said about one request."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.pieces: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob] = []
        self.values: list[float] = []
        self.ends: list[End] = []

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def end(self) -> End:
        (end,) = self.ends
        return end


def run(loop: EngineLoop, after_step: Callable[[], None] = lambda: None) -> dict[int, Answer]:
    """Step until nothing is left; the answers by handle. Pages are checked after every step."""
    answers: dict[int, Answer] = {}
    while loop.has_work:
        for row in loop.step():
            answer = answers.setdefault(row.handle, Answer())
            answer.token_ids.extend(row.token_ids)
            answer.pieces.append(row.text)
            answer.logprobs.extend(row.logprobs)
            answer.prompt_logprobs.extend(row.prompt_logprobs)
            answer.values.extend(row.values)
            if row.end is not None:
                answer.ends.append(row.end)
        loop.scheduler.check()
        after_step()
    status = loop.status()
    assert status.blocks_free + status.blocks_cached == status.blocks_total
    return answers


def record_logits(loop: EngineLoop) -> dict[tuple[int, int], torch.Tensor]:
    """From now on every row of logits the engine computes, by handle and position of the token it decides."""
    seen: dict[tuple[int, int], torch.Tensor] = {}
    runner: Any = loop._runner
    compute = runner.compute

    def recording(plan: StepPlan) -> tuple[Any, Any]:
        hidden, logits = compute(plan)
        sampled = [row for row in plan.rows if row.sampling_slot is not None]
        seen.update({(row.handle, row.end): logits[i].clone() for i, row in enumerate(sampled)})
        return hidden, logits

    runner.compute = recording
    return seen


def teacher_forced(loop: EngineLoop, tokens: Sequence[int], prompt_length: int) -> torch.Tensor:
    """Logits [len(tokens) - prompt_length + 1, vocabulary] with `tokens` in place of what the engine draws."""
    seen = record_logits(loop)
    forced = request(0, tokens[:prompt_length], len(tokens) - prompt_length + 1, ignore_eos=True)
    loop.submit(forced)
    while loop.has_work:
        loop.step()
        if forced.num_generated:
            forced.tokens[:] = tokens[: forced.num_tokens]
    return torch.stack([seen[0, position] for position in range(prompt_length, len(tokens) + 1)])
