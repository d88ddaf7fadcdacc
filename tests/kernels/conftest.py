"""One thread for kernels under test unless a test says otherwise: spinning threads stall where others compute."""

from collections.abc import Iterator

import pytest
import torch

from kernels.native import library as native
from kernels.native.library import Library, NativeUnavailable

NO_LIBRARY = "there is no native library to test"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def instruction_sets() -> tuple[str, ...]:
    """Those that the library has and this processor runs."""
    try:
        return tuple(native.load().isas)
    except NativeUnavailable:
        return (NO_LIBRARY,)


@pytest.fixture(params=instruction_sets())
def library(request: pytest.FixtureRequest) -> Iterator[Library]:
    """The library on each instruction set in turn."""
    if request.param == NO_LIBRARY:
        pytest.skip(NO_LIBRARY)
    found = native.load()
    before = found.isa
    found.select(request.param)
    yield found
    found.select(before)
