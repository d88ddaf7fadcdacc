"""Function-preserving growth of a trained Llama: wider by doubling, deeper by layers that begin as nothing.

Net2Net (Chen, Goodfellow, Shlens, ICLR 2016). The hidden state of the grown model is the old one twice over,
`[x, x]`, so every matrix becomes `[[W, W], [W, W]] / 2`. Noise that is added to one half of the columns and taken
from the other cancels on `[x, x]`: it parts the twins for training and leaves the function as it was.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

_WRITES = ("o_proj.weight", "down_proj.weight")  # what a layer adds to the hidden state


def grown_config(small: LlamaConfig, layers: int) -> LlamaConfig:
    """The shape of `small` at twice the width, with the same heads twice, and `layers` layers."""
    if layers < small.num_hidden_layers:
        raise ValueError(f"a model of {small.num_hidden_layers} layers cannot grow to {layers}")
    config = copy.deepcopy(small)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(config, name, 2 * getattr(small, name))
    config.num_hidden_layers = layers
    return config


def grow(small: LlamaForCausalLM, layers: int, noise: float, seed: int) -> LlamaForCausalLM:
    """`small` at twice the width and with `layers` layers, computing the same logits (to rounding).

    `noise` is the standard deviation of what parts the twins, as a share of each matrix's own. New layers stand in
    the middle with fresh weights that write nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    grown = LlamaForCausalLM(grown_config(small.config, layers))
    weights = {name: weight.float() for name, weight in small.state_dict().items()}
    old = small.config.num_hidden_layers
    added = layers - old
    first_new = (old + 1) // 2
    state = grown.state_dict()
    for name in state:
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        if ".layers." in name and first_new <= layer < first_new + added:
            if name.endswith(_WRITES):
                state[name].zero_()
            continue
        source = layer - added if layer >= first_new + added else layer
        weight = weights[name.replace(f"layers.{layer}.", f"layers.{source}.")]
        state[name].copy_(doubled(name, weight, noise, generator))
    grown.load_state_dict(state)
    return grown


def doubled(name: str, weight: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """One weight at twice its width; the head sums over both halves, so the last norm is halved."""
    if weight.ndim == 1:
        return weight.repeat(2) / (2 if name == "model.norm.weight" else 1)
    if "embed" in name or "lm_head" in name:
        return weight.repeat(1, 2)
    rows = weight.repeat(2, 1)
    parting = torch.randn(rows.shape, generator=generator) * noise * weight.std()
    return torch.cat([rows + parting, rows - parting], dim=1) / 2
