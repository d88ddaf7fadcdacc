"""Tiny random models of every family, as transformers saves them, and what this engine computes of the files."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from engine.models.config import parse_config
from engine.models.decoder import Decoder
from engine.models.registry import architecture
from engine.models.spec import Mixture
from engine.weights.loading import LoadedWeights
from engine.weights.quantisation import assign
from kernels.ops import Backend, KvSpec, Rows
from tests.engine.quantised import entries

VOCAB = 300
CONTEXT = 128
PAGE = 4
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {  # by model type, what is not the same for all
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 24},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 24, "sliding_window_pattern": 2},
    "phi3": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.6,
        "logits_scaling": 0.7,
    },
    "olmo2": {},
    "mixtral": _EXPERTS,
    "qwen3_moe": _EXPERTS | {"moe_intermediate_size": 24, "head_dim": 8, "norm_topk_prob": True},
    "gpt_oss": _EXPERTS | {"head_dim": 8, "sliding_window": 6},
}


class Tiny(NamedTuple):
    """One model: transformers' own, and the config.json and tensors that it saves."""

    model: Any
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def config_json(self) -> bytes:
        """The file."""
        return json.dumps(self.config).encode()


def make(folder: Path, model_type: str, changes: Mapping[str, Any], seed: int = 0) -> Tiny:
    """A random model with these fields beside its family's, saved in `folder`."""
    from transformers import CONFIG_MAPPING

    return make_of(folder, CONFIG_MAPPING[model_type](**(SIZES | FAMILIES[model_type] | changes)), seed)


def make_of(folder: Path, config: Any, seed: int = 0) -> Tiny:
    """A random model with this configuration of transformers, saved in `folder`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model, seed)
    model.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    return Tiny(model, saved, load_file(folder / "model.safetensors"))


def randomise(model: Any, seed: int) -> None:
    """Weights so large that logits differ, and so small that a Gemma's embeddings do not outweigh its layers."""
    generator = torch.Generator().manual_seed(seed)
    small = 0.1 if "gemma" in model.config.model_type else 0.3
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.add_(noise * 0.1)
            else:
                weight.copy_(noise * (small if "embed_tokens" in name else 0.22))


def expected(tiny: Tiny, tokens: Sequence[int]) -> torch.Tensor:
    """Logits [len(tokens), vocabulary] of transformers, all tokens at once."""
    with torch.no_grad():
        logits: torch.Tensor = tiny.model(torch.tensor([list(tokens)])).logits[0]
    return logits


def routed_clearly(tiny: Tiny, tokens: Sequence[int]) -> bool:
    """No choice of experts hangs on a rounding."""
    mixtures = [layer.mlp for layer in parse_config(tiny.config_json).layers if isinstance(layer.mlp, Mixture)]
    if not mixtures:
        return True
    top_k = mixtures[0].top_k
    with torch.no_grad():
        scores = tiny.model(torch.tensor([list(tokens)]), output_router_logits=True).router_logits
    ranked = torch.cat([one.reshape(-1, one.shape[-1]) for one in scores]).sort(descending=True).values
    return top_k == ranked.shape[-1] or bool(((ranked[:, top_k - 1] - ranked[:, top_k]) > 1e-4).all())


def built(
    config_json: bytes, tensors: Mapping[str, torch.Tensor], ops: Backend, context: int = CONTEXT
) -> Decoder:
    """This engine's decoder."""
    config = parse_config(config_json)
    family = architecture(config)
    shapes = family.tensor_shapes(config)
    formats = assign(
        shapes, family.matrices(config), config.quantisation, entries(tensors), (), family.tables(config)
    )
    weights = LoadedWeights(dict(tensors), shapes, formats)
    model = family.build(config, weights, ops, max_positions=context, context=context)
    assert not weights.names
    return model


def computed(
    config_json: bytes,
    tensors: Mapping[str, torch.Tensor],
    ops: Backend,
    prompts: Sequence[Sequence[int]],
    chunk: int = 7,
    context: int = CONTEXT,
) -> list[torch.Tensor]:
    """Logits of every token of `prompts` in this engine's decoder, all in the same steps over paged keys.

    The first two thirds of each prompt go in chunks, the rest token by token; pages lie in disorder.
    """
    model = built(config_json, tensors, ops, context)
    config = model.config
    pages = -(-max(map(len, prompts)) // PAGE)
    kv = ops.allocate_kv(
        KvSpec(config.num_layers, pages * len(prompts), PAGE, config.num_kv_heads, config.head_dim)
    )
    shuffled = random.Random(0).sample(range(pages * len(prompts)), pages * len(prompts))
    tables = [shuffled[i * pages : (i + 1) * pages] for i in range(len(prompts))]
    done = [0] * len(prompts)
    found: list[list[torch.Tensor]] = [[] for _ in prompts]
    with torch.inference_mode():
        while any(at < len(prompt) for at, prompt in zip(done, prompts, strict=True)):
            rows = [i for i, prompt in enumerate(prompts) if done[i] < len(prompt)]
            counts = [max(1, min(chunk, 2 * len(prompts[i]) // 3 - done[i])) for i in rows]
            step = [prompts[i][done[i] : done[i] + n] for i, n in zip(rows, counts, strict=True)]
            starts, blocks = [done[i] for i in rows], [tables[i] for i in rows]
            batch = ops.begin(Rows([token for part in step for token in part], starts, counts, blocks), kv)
            logits = model.logits(ops, model(ops, kv, batch), range(sum(counts)))
            for i, part in zip(rows, torch.split(logits, counts), strict=True):
                found[i].append(part)
                done[i] += len(part)
    return [torch.cat(parts) for parts in found]


def draw_tokens(seed: int, count: int = 36) -> list[int]:
    """Tokens that are not special."""
    return torch.randint(2, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def compare(tiny: Tiny, ops: Backend, prompts: Sequence[Sequence[int]], context: int = CONTEXT) -> float:
    """The largest difference between this engine's logits and those of transformers.

    Raises:
        AssertionError: it is over 1e-4, or a token differs whose lead is no rounding.
    """
    worst = 0.0
    wanted = [expected(tiny, prompt) for prompt in prompts]
    for logits, oracle in zip(
        computed(tiny.config_json, tiny.tensors, ops, prompts, context=context), wanted, strict=True
    ):
        worst = max(worst, float((logits.double() - oracle.double()).abs().max()))
        assert worst <= 1e-4, f"off by {worst:.2e}: {tiny.config_json.decode()}"
        best = oracle.topk(2).values
        clear = best[:, 0] - best[:, 1] > 2e-4
        assert torch.equal(logits.argmax(-1)[clear], oracle.argmax(-1)[clear])
    return worst


def check_that_it_tells(tiny: Tiny, prompt: Sequence[int]) -> None:
    """A model that is flat, collapsed, or forgets its context would pass any comparison."""
    logits = expected(tiny, prompt)
    other = expected(tiny, [*prompt[:-1][::-1], prompt[-1]])[-1]
    best = logits.topk(2).values
    assert logits.std() > 0.3, "it is flat"
    assert (best[:, 0] - best[:, 1] > 2e-4).float().mean() > 0.9, "it cannot choose"
    assert len(set(logits.argmax(-1).tolist())) > 4, "it is collapsed"
    assert (other - logits[-1]).abs().max() > 0.05, "it forgets its context"
