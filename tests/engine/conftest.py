"""Model folders shared by the tests of the engine's processes."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.protos import engine_pb2
from tests.engine.tiny_models import into_store, write_llama


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What repeats the models that this run drew, if it drew any."""
    drawn = sys.modules.get("tests.engine.drawn")
    if drawn is not None:
        terminalreporter.write_line(f"models drawn with CLOISTER_SEED={drawn.SEED}")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama with tokenizer and chat template; not to be written to."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    write_llama(folder)
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors too small to share are computed by one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def socket_dir() -> Iterator[Path]:
    """A directory with a path short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="cl-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def tiny_store(tiny_llama: Path, tmp_path: Path) -> tuple[Path, engine_pb2.FileSet]:
    """A content-addressed store that holds the tiny Llama, and the file set that names it."""
    store = tmp_path / "store"
    return store, into_store(tiny_llama, store)
