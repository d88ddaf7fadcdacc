"""Which derived file serves a deployment: by its model, and by all that its layout follows from. Needs no torch.

A layout's name is only where to look. What a file was made for stands in it, too, as the backend itself says it,
and what is not the same there is not used.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from engine.memory_plan import Model
from engine.options import EngineOptions
from kernels.native.location import find_library
from kernels.triton.cache import digest_of, made_for

_FORMAT = 1  # of the files
_ROOT = Path(__file__).parents[2]
_PACKING = ("kernels", "engine/derived", "engine/models", "engine/weights")  # what is packed follows from these
_LIBRARIES = ("cloister", "torch")
_CPUINFO = Path("/proc/cpuinfo")
_PROCESSOR = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU implementer", "CPU part")
_CHOICES = ("CLOISTER_KERNELS_ISA", "ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA")


def pays(model: Model, options: EngineOptions) -> bool:
    """Packing this model once is worth a file: quantised matrices are unpacked, transposed and packed again.

    Plain weights are not: they are as many bytes packed as they are in the store, so that nothing but one pass
    over memory is saved, for twice the disk. The reference backend keeps plain numbers of everything, which are
    more bytes to read than what they are made of.

    Args:
        model: of the deployment.
        options: of the deployment, with every default filled in.
    """
    return bool(model.formats) and options.backend != "reference"


def layout_name(options: EngineOptions, cpuinfo: Path = _CPUINFO) -> str:
    """The name of the layout of a deployment on this machine: BACKEND-DTYPE-16 hexadecimal digits.

    The digits follow from the format of the files, the programs and libraries that pack and compute, the
    processor, and the variables that choose among kernels. So another machine, another version or another choice
    is another file.

    Args:
        options: with every default filled in.
        cpuinfo: proc_cpuinfo(5).
    """
    facts = {
        "format": _FORMAT,
        "sources": sources(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "native": _native(),
        "processor": _processor(cpuinfo),
        "choices": {name: os.environ.get(name, "") for name in _CHOICES},
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{options.backend}-{options.dtype}-{digest[:16]}"


def kernels_layout_name(options: EngineOptions, device: str, capability: str) -> str:
    """The name of the layout of a cache of compiled kernels: BACKEND-DTYPE-16 hexadecimal digits.

    The digits follow from the format of the files, the program and its tables of configurations, Triton, the kind
    of device, and the options that sizes of steps follow from. Two devices of one kind have the same.

    Args:
        options: with every default filled in.
        device: its name, as its driver tells it.
        capability: its compute capability, "9.0".
    """
    shaping = {name: value for name, value in asdict(options).items() if name not in ("device", "threads")}
    tables = {path.name: digest_of(path) for path in sorted((_ROOT / "kernels" / "configs").glob("*.json"))}
    facts = {
        "format": _FORMAT,
        "sources": sources(),
        "tables": tables,
        "triton": made_for(),
        "device": (device, capability),
        "options": shaping,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{options.backend}-{options.dtype}-{digest[:16]}"


def sources(root: Path = _ROOT) -> str:
    """The digest of the Python sources that packing follows from: a checkout's change without another version.

    Args:
        root: where the packages lie.
    """
    digest = hashlib.sha256()
    for path in sorted(path for folder in _PACKING for path in (root / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _native() -> str:
    """The digest of the compiled kernels, where there are any."""
    library = find_library()
    return hashlib.sha256(library.read_bytes()).hexdigest() if library else ""


def _processor(cpuinfo: Path) -> Mapping[str, str]:
    """What the first processor is, and can do."""
    first = cpuinfo.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    lines = (line.partition(":") for line in first.splitlines())
    told = {name.strip(): value.strip() for name, _, value in lines}
    return {name: told[name] for name in _PROCESSOR if name in told}
