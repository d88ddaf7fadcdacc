"""Model folders shared by the tests of the engine's processes."""

from pathlib import Path

import pytest

from tests.engine.tiny_models import write_llama


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama with tokenizer and chat template; not to be written to."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    write_llama(folder)
    return folder
