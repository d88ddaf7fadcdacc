"""Growing a trained model: the larger one computes the same, and its halves are free to part."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.demo_models.grow import grow

TOKENS = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=4,
        intermediate_size=40,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
        assert weight.std() > 0.1, name
    return model


@torch.no_grad()
@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("layers", [3, 5])
def test_a_grown_model_has_the_logits_of_the_one_it_grew_from(small, layers, noise):
    grown = grow(small, layers, noise, seed=4).eval()
    before, after = small(TOKENS).logits, grown(TOKENS).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    assert before.std() > 0.5  # a flat model would pass any comparison
    assert (grown.config.hidden_size, grown.config.num_hidden_layers) == (48, layers)


def test_noise_parts_the_halves_of_a_grown_model_in_the_first_step(small):
    grown = grow(small, 3, noise=0.5, seed=4)
    grown(TOKENS, labels=TOKENS).loss.backward()
    left, right = grown.get_input_embeddings().weight.grad.chunk(2, dim=1)
    assert (left - right).abs().max() > 0.1 * left.abs().max()


def test_a_model_does_not_grow_to_fewer_layers(small):
    with pytest.raises(ValueError, match="3 layers cannot grow to 2"):
        grow(small, 2, noise=0.0, seed=4)
