"""transformers as a contender: a model of the same shape with drawn bfloat16 weights, eager, with its own cache.

Run by a comparison: python -m benchmarks.peers.hugging_face SHAPE THREADS
"""

import sys
import time
from collections.abc import Mapping

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.peers.protocol import Asked, ProcessContender, answer
from engine.bench.shapes import SHAPES


def contender(shape: str, threads: int) -> ProcessContender:
    """transformers, in a process of its own."""
    command = (sys.executable, "-P", "-m", "benchmarks.peers.hugging_face", shape, str(threads))
    return ProcessContender("transformers bf16", command, {"PYTHONPATH": "."})


def drawn(shape: str) -> torch.nn.Module:
    """The model; its numbers are as initialised, which takes no time to speak of."""
    fields = dict(SHAPES[shape])
    config = AutoConfig.for_model(**fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def main(shape: str, threads: str) -> None:
    """Be asked."""
    torch.set_num_threads(int(threads))
    model, vocabulary = drawn(shape), SHAPES[shape]["vocab_size"]

    def measure(asked: Asked) -> Mapping[str, float]:
        with torch.inference_mode():
            prompt = torch.randint(vocabulary, (asked.batch, asked.context))
            if asked.kind == "prefill":
                prompt = torch.randint(vocabulary, (1, asked.tokens))
                began = time.perf_counter()
                model(prompt, use_cache=True, logits_to_keep=1)
                return {"rate": asked.tokens / (time.perf_counter() - began)}
            return {"rate": decode(prompt, asked.tokens)}

    def decode(prompt: torch.Tensor, steps: int) -> float:
        """Tokens per second of all answers, likeliest tokens alone; two steps pass before the clock starts."""
        told, began = model(prompt, use_cache=True, logits_to_keep=1), 0.0
        for step in range(steps + 2):
            if step == 2:
                began = time.perf_counter()
            token = told.logits[:, -1].argmax(-1, keepdim=True)
            told = model(token, past_key_values=told.past_key_values, use_cache=True)
        return len(prompt) * steps / (time.perf_counter() - began)

    measure(Asked("prefill", 64))
    answer(measure)


if __name__ == "__main__":
    main(*sys.argv[1:])
