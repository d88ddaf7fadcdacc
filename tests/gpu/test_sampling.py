"""Draws on a device from vocabularies of published models are those of the host."""

import pytest
import torch

from kernels.sampling import sample
from tests.kernels.test_triton_sampling import drawn, some


@pytest.mark.parametrize("vocabulary", [32000, 128256, 262144])
@pytest.mark.parametrize("coarse", [False, True])
def test_tokens_are_those_that_the_host_draws(vocabulary: int, coarse: bool) -> None:
    logits, given = some(64, vocabulary, vocabulary, coarse)
    tokens, finite = drawn(logits, given)
    expected = sample(logits, given)
    assert finite == expected.finite
    assert tokens == expected.token_ids


def test_a_row_draws_alike_alone_and_among_others() -> None:
    logits, given = some(32, 128256, 7, coarse=True)
    together, _ = drawn(logits, given)
    for row in range(0, 32, 5):
        one = slice(row, row + 1)
        alone = given._replace(**{name: getattr(given, name)[one] for name in given._fields[:5]})
        assert drawn(logits[one], alone)[0] == [together[row]]
    assert torch.cuda.is_available()
