"""Refusals 73 to 84: bytes that are not what was signed, and files that no signature lets into a model."""

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime

from bundles.content.inspector import Inspector
from bundles.importer.workplace import Workplace
from bundles.trust.policy import Site
from tests.bundles.attacks import Attack, Refusal, Scene, full_chunk, manifest
from tests.bundles.forging import Draft, Fields, encoded, flipped, oms_statement
from tests.bundles.making import safetensors, sha256, with_header

_8 = bytes(8)


def _files(files: Mapping[str, bytes | None]) -> Callable[[Scene], Draft]:
    """An attack with other files, signed by release keys and publisher."""
    return lambda scene: scene.good.holding(files)


def _weights(raw: bytes) -> Callable[[Scene], Draft]:
    return _files({"more.safetensors": raw})


def _tensors(
    tensors: Mapping[str, tuple[str, list[int], list[int]]], data: bytes = _8
) -> Callable[[Scene], Draft]:
    return _weights(safetensors(tensors, data))


def _chunk_flipped(scene: Scene) -> Draft:
    name = full_chunk(scene.good)
    return scene.good.put(name, flipped(scene.good[name], 77))


def _chunks_exchanged(scene: Scene) -> Draft:
    """A file's chunks in another order, in manifest and container alike: each is what it says, the file is not."""

    def exchange(fields: Fields) -> None:
        chunks = next(file["chunks"] for file in fields["files"] if len(file["chunks"]) > 2)
        chunks[0], chunks[1] = chunks[1], chunks[0]

    draft = scene.good.described(exchange)
    held = dict(draft.members)
    carried = [f"c/{digest}" for file in draft.manifest["files"] for digest in file["chunks"]]
    return draft.arranged(
        lambda members: [
            *(entry for entry in members[:-1] if not entry[0].startswith("c/")),
            *((name, held[name]) for name in carried),
            members[-1],
        ]
    )


def _published_other(scene: Scene) -> Draft:
    files = {file["path"]: file["sha256"] for file in scene.good.manifest["files"]}
    return scene.good.with_oms(oms_statement(files | {"config.json": "0" * 64}))


def _published_fewer(scene: Scene) -> Draft:
    """A file that the publisher did not sign, excused by his `ignore_paths`."""
    statement = oms_statement(
        {file["path"]: file["sha256"] for file in scene.good.manifest["files"] if file["path"] != "LICENSE"}
    )
    statement["predicate"]["serialization"]["ignore_paths"] = ["LICENSE"]
    return scene.good.with_oms(statement)


def _published_elsewhere(scene: Scene) -> Draft:
    """A good publisher's signature in the place of the one that the release keys saw."""
    return scene.good.put("oms.sig", scene.base["oms.sig"])


def zip_among_weights(by: str) -> bytes:
    """Weights that a zip reader opens: a directory far from the end, and an end that says where it is.

    Args:
        by: how the reader finds it, from the `offset` or from the `size` of the directory.
    """
    data = bytearray(b"\x01" * 200_000)
    end, entry = len(data) - 22, 60_000
    header = safetensors({"w": ("U8", [len(data)], [0, len(data)])}, b"")
    data[entry : entry + 46] = b"PK\x01\x02" + bytes(42)
    size, offset = (end - entry, 2**31) if by == "size" else (1, len(header) + entry)
    data[end:] = b"PK\x05\x06" + struct.pack("<4xHHIIH", 1, 1, size, offset, 0)
    return header + bytes(data)


def _config(**fields: object) -> Callable[[Scene], Attack]:
    """A configuration that engine-inspect itself judges."""

    def forge(scene: Scene) -> Attack:
        config = json.loads(scene.good.content("config.json")) | fields
        return judged({"config.json": encoded(config)})(scene)

    return forge


def judged(files: Mapping[str, bytes | None]) -> Callable[[Scene], Attack]:
    """Other files that the real engine-inspect judges."""
    return lambda scene: Attack(scene.write(scene.good.holding(files)), site=_really_inspecting)


def _really_inspecting(place: Workplace) -> Workplace:
    return replace(place, inspector=Inspector())


def _other_dtype(scene: Scene) -> Attack:
    """The model's own weights, said to be integers of the same width."""
    raw = scene.good.content("model.safetensors")
    (length,) = struct.unpack("<Q", raw[:8])
    header = raw[8 : 8 + length].replace(b'"F16"', b'"I16"')
    return judged({"model.safetensors": with_header(header, raw[8 + length :])})(scene)


def gguf(dimensions: int, offset: int, entries: int) -> bytes:
    """A GGUF file of one tensor as llama.cpp reads it, with numbers that a careless reader believes."""
    name = b"w"
    tensor = struct.pack("<Q", len(name)) + name + struct.pack("<I", dimensions)
    tensor += struct.pack(f"<{min(dimensions, 64)}Q", *[2] * min(dimensions, 64)) + struct.pack("<IQ", 0, offset)
    return b"GGUF" + struct.pack("<IQQ", 3, 1, entries) + tensor + bytes(64)


def _needing(scene: Scene, *, site: Site, gpus: int = 0, gpu_memory: int = 0) -> Attack:
    resources = {"gpu_memory": gpu_memory, "gpus": gpus}
    return Attack(scene.write(scene.good.described(lambda m: m.update(resources=resources))), verified=site)


DIGESTS = (
    Refusal(73, "a bit flipped in a chunk", "CHUNK_DIGEST", _chunk_flipped, early=False),
    Refusal(
        73,
        "a bit flipped in a licence",
        "DOCUMENT_DIGEST",
        lambda s: s.good.put("licence/LICENSE", flipped(s.good["licence/LICENSE"], 3)),
    ),
    Refusal(74, "chunks exchanged", "FILE_DIGEST", _chunks_exchanged, early=False),
    Refusal(75, "the publisher signed another file", "OMS_FILES_DIFFER", _published_other),
    Refusal(75, "a file that the publisher ignores", "OMS_FILES_DIFFER", _published_fewer),
    Refusal(75, "the publisher's signature of another bundle", "OMS_DIGEST", _published_elsewhere),
)

FORBIDDEN = (
    *(
        Refusal(76, f"a file {name}", "CONTENT_PICKLE", _files({name: _8}))
        for name in ("model.bin", "model.pt", "model.PKL", "model.ckpt")
    ),
    *(
        Refusal(76, f"a pickle of protocol {first[1]}", "CONTENT_PICKLE", _files({"a.model": first}), early=False)
        for first in (b"\x80\x02}q\x00(X", b"\x80\x04\x95\x10\x00")
    ),
    Refusal(76, "a zip archive", "CONTENT_PICKLE", _files({"a.model": b"PK\x03\x04" + _8}), early=False),
    *(
        Refusal(
            76,
            f"weights with a zip directory in their midst, by its {by}",
            "CONTENT_ARCHIVE",
            _weights(zip_among_weights(by)),
            early=False,
        )
        for by in ("offset", "size")
    ),
    Refusal(76, "a program", "CONTENT_CODE", _files({"a.model": b"\x7fELF\x02\x01" + _8}), early=False),
)

WEIGHTS = (
    Refusal(
        77,
        "a header over 100 MB",
        "SAFETENSORS_HEADER",
        _weights(struct.pack("<Q", 100_000_001) + b"{}"),
        early=False,
    ),
    Refusal(
        77, "a header of 2^63 bytes", "SAFETENSORS_HEADER", _weights(struct.pack("<Q", 2**63) + b"{}"), early=False
    ),
    Refusal(
        77,
        "tensors that overlap",
        "SAFETENSORS_OVERLAP",
        _tensors({"a": ("U8", [8], [0, 8]), "b": ("U8", [4], [4, 8])}),
        early=False,
    ),
    Refusal(
        77,
        "a tensor of no bytes inside another",
        "SAFETENSORS_OVERLAP",
        _tensors({"a": ("U8", [8], [0, 8]), "b": ("U8", [0], [4, 4])}),
        early=False,
    ),
    Refusal(
        77,
        "a hole",
        "SAFETENSORS_HOLE",
        _tensors({"a": ("U8", [4], [0, 4]), "b": ("U8", [2], [6, 8])}),
        early=False,
    ),
    Refusal(
        77,
        "bytes that are not type times shape",
        "SAFETENSORS_SIZE",
        _tensors({"a": ("F32", [8], [0, 8])}),
        early=False,
    ),
    Refusal(
        77,
        "a shape that overflows",
        "SAFETENSORS_SIZE",
        _tensors({"a": ("U8", [2**32, 2**32], [0, 8])}),
        early=False,
    ),
    Refusal(
        77,
        "a tensor of another file again",
        "SAFETENSORS_DUPLICATE",
        lambda s: s.good.holding({"more.safetensors": s.good.content("model.safetensors")}),
        early=False,
    ),
    Refusal(
        77,
        "a tensor twice",
        "SAFETENSORS_DUPLICATE",
        _weights(
            with_header(
                b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},'
                b'"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}',
                _8,
            )
        ),
        early=False,
    ),
    Refusal(
        78,
        "an index that names an absent shard",
        "INDEX_SHARD_ABSENT",
        _files({"model.safetensors.index.json": b'{"weight_map": {"w": "model-2.safetensors"}}'}),
        early=False,
    ),
    Refusal(
        78,
        "an index that names a shard elsewhere",
        "INDEX_SHARD_ABSENT",
        _files({"model.safetensors.index.json": b'{"weight_map": {"w": "../model.safetensors"}}'}),
        early=False,
    ),
    Refusal(79, "a file model.gguf", "CONTENT_GGUF", _files({"model.gguf": gguf(2, 0, 0)})),
    *(
        Refusal(79, f"GGUF with {what}, renamed", "CONTENT_GGUF", _files({"a.model": raw}), early=False)
        for what, raw in (
            ("more than 4 dimensions", gguf(5, 0, 0)),
            ("an offset that overflows", gguf(2, 2**64 - 1, 0)),
            ("a huge key-value table", gguf(2, 0, 2**62)),
        )
    ),
)

CODE = (
    *(
        Refusal(80, f"a file {name}", "CONTENT_CODE", _files({name: b"x"}))
        for name in ("modeling_tiny.py", "kernel.so", "kernel.so.1", "run.sh")
    ),
    Refusal(
        80,
        "auto_map",
        "CONTENT_REMOTE_CODE",
        _files({"config.json": b'{"architectures": ["LlamaForCausalLM"], "auto_map": {"AutoModel": "x.Y"}}'}),
        early=False,
    ),
    Refusal(
        80,
        "auto_map in disguise",
        "CONTENT_REMOTE_CODE",
        _files({"tokenizer_config.json": b'{"\\u0061uto_map": null}'}),
        early=False,
    ),
    Refusal(
        80,
        "trust_remote_code",
        "CONTENT_REMOTE_CODE",
        _files({"generation_config.json": b'{"trust_remote_code": true}'}),
        early=False,
    ),
    Refusal(
        81,
        "a template over its size",
        "TEMPLATE_TOO_LARGE",
        judged({"chat_template.jinja": b" " * (1 << 20) + b"{{ messages }}"}),
        early=False,
    ),
    Refusal(
        81,
        "a template that leaves its sandbox",
        "TEMPLATE_REFUSED",
        judged({"chat_template.jinja": b"{{ messages[0].__class__.__base__.__subclasses__() }}"}),
        early=False,
    ),
    Refusal(
        82,
        "an unknown architecture",
        "ARCHITECTURE_UNSUPPORTED",
        _config(architectures=["MysteryForCausalLM"]),
        early=False,
    ),
    Refusal(82, "an unknown number type", "DTYPE_UNSUPPORTED", _other_dtype, early=False),
    Refusal(
        82,
        "an unknown quantisation",
        "QUANTISATION_UNSUPPORTED",
        _config(quantization_config={"quant_method": "mystery", "bits": 3}),
        early=False,
    ),
)

NEEDS = (
    Refusal(83, "a newer engine", "ENGINE_TOO_OLD", manifest(lambda m: m.update(min_engine="99.0.0"))),
    Refusal(
        83,
        "GPUs that are not here",
        "RESOURCES_INSUFFICIENT",
        lambda s: _needing(s, gpus=2, site=Site(datetime.now(UTC), gpus=1)),
    ),
    Refusal(
        83,
        "more memory than the GPUs have",
        "RESOURCES_INSUFFICIENT",
        lambda s: _needing(s, gpu_memory=80 << 30, site=Site(datetime.now(UTC), gpu_memory=24 << 30)),
    ),
    Refusal(
        84,
        "a licence that the site does not list",
        "LICENCE_NOT_ALLOWED",
        lambda s: Attack(s.write(s.good), site=lambda place: replace(place, licences=frozenset({"MIT"}))),
    ),
    Refusal(84, "no licence", "LICENCE_MISSING", manifest(lambda m: m.update(licences=[]))),
)


def llama(seed: int = 0, hidden: int = 16, vocabulary: int = 320, layers: int = 1) -> tuple[bytes, bytes]:
    """config.json and model.safetensors of a Llama of numbers that never repeat, nor with another seed."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": hidden // 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    shapes = {"model.embed_tokens.weight": [vocabulary, hidden], "model.norm.weight": [hidden]}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in _layer(hidden).items()}
    tensors, at = {}, 0
    for name, shape in shapes.items():
        tensors[name] = ("F16", shape, [at, at := at + 2 * math.prod(shape)])
    data = b"".join(bytes.fromhex(sha256(b"%d %d" % (seed, block))) for block in range(at // 32 + 1))[:at]
    return encoded(config), safetensors(tensors, data)


def _layer(hidden: int) -> dict[str, list[int]]:
    return {
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
        "self_attn.q_proj": [hidden, hidden],
        "self_attn.k_proj": [hidden // 2, hidden],
        "self_attn.v_proj": [hidden // 2, hidden],
        "self_attn.o_proj": [hidden, hidden],
        "mlp.gate_proj": [2 * hidden, hidden],
        "mlp.up_proj": [2 * hidden, hidden],
        "mlp.down_proj": [hidden, 2 * hidden],
    }
