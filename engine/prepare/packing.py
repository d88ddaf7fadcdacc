"""Weights of the store put into the layout of a backend, once for all workers that will compute with them."""

from functools import partial
from typing import Any

import torch

from engine.build import make_backend
from engine.derived.loading import build_model, derive
from engine.launch import open_in_store
from engine.memory_plan import read_model
from engine.prepare.question import Packing


def pack(question: Packing) -> dict[str, Any]:
    """Make the derived file; its digest and size.

    Raises:
        EngineError: the model cannot be read, or DERIVED_UNSUPPORTED.
        OSError: the file cannot be written.
    """
    torch.set_num_threads(question.options.threads)
    open_file = partial(open_in_store, question.store)
    known = read_model(question.files, open_file)
    build = partial(build_model, known, max_positions=1, context=known.config.max_context_tokens)
    ops = make_backend(question.options)
    made = derive(known, question.files, open_file, build, ops, question.out, question.layout)
    return {"sha256": made.sha256, "size": made.size}
