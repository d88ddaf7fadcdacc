"""The mirror of the C ABI says what the header says; the library is found, loaded and refused for a reason."""

import ctypes
import re
from pathlib import Path

import pytest

import kernels.native
from kernels.native import library, location
from kernels.native.library import Library, NativeUnavailable
from kernels.ops import ACTIVATIONS

_HEADER = Path(kernels.native.__file__).with_name("include") / "cloister_kernels.h"
_TYPES = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}


def header() -> str:
    """Without comments."""
    return re.sub(r"/\*.*?\*/", "", _HEADER.read_text(encoding="utf-8"), flags=re.DOTALL)


def declared(body: str) -> list[tuple[str, type]]:
    """Names and types of a struct's fields; what is declared with a star is an address."""
    fields = []
    for declaration in filter(None, map(str.strip, body.split(";"))):
        kind, _, names = declaration.removeprefix("const ").partition(" ")
        for name in names.split(","):
            is_pointer = "*" in name or kind.endswith("*")
            fields.append((name.strip(" *"), ctypes.c_void_p if is_pointer else _TYPES[kind]))
    return fields


def test_every_struct_of_the_header_has_its_mirror_field_by_field() -> None:
    structs = re.findall(r"typedef struct \{(.*?)\} (\w+);", header(), flags=re.DOTALL)
    mirrored = {name for name, value in vars(library).items() if isinstance(value, type) and name[:2] == "Cl"}
    assert {name for _, name in structs} == mirrored
    for body, name in structs:
        assert declared(body) == list(getattr(library, name)._fields_), name


def test_numbers_of_the_header_are_those_of_the_mirror() -> None:
    text = header()
    for body in re.findall(r"enum \w+ \{(.*?)\};", text, flags=re.DOTALL):
        names = [entry.split("=")[0].strip() for entry in body.split(",") if entry.strip()]
        for number, name in enumerate(names):
            assert name == "CL_OPS" or getattr(library, name) == number
    defined = dict(re.findall(r"#define CL_(\w+) (\d+)", text))
    assert defined == {"ABI": "2", "GROUP": "32", "SCALED": "128", "TILE": "16", "STRIDE": "64"}
    assert (library.ABI, library.CL_GROUP, library.CL_SCALED) == (2, 32, 128)
    assert (library.CL_TILE, library.CL_STRIDE) == (16, 64)
    assert ACTIVATIONS.index("clamped_swiglu") == 3


def test_every_function_of_the_header_is_bound_with_as_many_arguments() -> None:
    found = re.findall(r"CL_EXPORT [\w ]+[ *](cl_\w+)\((.*?)\);", header(), flags=re.DOTALL)
    counts = {name: 0 if arguments == "void" else arguments.count(",") + 1 for name, arguments in found}
    assert counts == {name: len(arguments) for name, (_, arguments) in library._SIGNATURES.items()}


def test_a_library_that_is_not_there_or_does_not_load_is_told_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOISTER_KERNELS_LIBRARY", str(tmp_path / "none.so"))
    assert location.find_library() is None
    assert str(tmp_path / "none.so") in location.missing()
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setenv("CLOISTER_KERNELS_LIBRARY", str(broken))
    assert location.find_library() == broken
    with pytest.raises(NativeUnavailable, match=r"broken\.so does not load"):
        Library(str(broken))
    with pytest.raises(NativeUnavailable, match="does not load"):
        Library("libc.so.6")


@pytest.mark.skipif(location.find_library() is None, reason="there is no native library to test")
def test_all_instruction_sets_that_this_processor_runs_are_there() -> None:
    """Tests of the kernels run on what the library offers: none may go missing unseen."""
    needed = {
        "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"},
        "avxvnni": {"avx2", "fma", "avx_vnni"},
        "avx2": {"avx2", "fma"},
    }
    flags = set(re.findall(r"\w+", "".join(re.findall(r"^flags.*", Path("/proc/cpuinfo").read_text(), re.M)[:1])))
    assert set(library.load().isas) == {"portable", *(isa for isa, wanted in needed.items() if wanted <= flags)}
