"""GGUF files made into a model's folder: against the `gguf` package, and against the models that they hold."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers

from engine.errors import EngineError
from engine.models.spec import RopeConfig
from engine.prepare.converting import convert_gguf
from engine.prepare.folder import ModelFolder
from engine.prepare.gguf import BLOCKS, read_container
from engine.prepare.gguf_blocks import dequantise
from engine.prepare.gguf_metadata import Metadata
from engine.prepare.gguf_tokenizer import read_tokenizer
from engine.prepare.streaming import read_plain
from tests.engine.gguf_files import (
    CORPUS,
    FAMILIES,
    Q,
    any_blocks,
    load_converted,
    make_network,
    make_tokenizer,
    write_gguf,
)
from tests.engine.tiny import engine, teacher_forced

TEXTS = (*CORPUS, "a  b\n\n c<|end|>d", "naïve 日本 🙂 x<|unknown|>", "  lead")


def convert(source: Path, folder: Path) -> Path:
    folder.mkdir()
    convert_gguf(source, folder, lambda stage, done, total: None)
    return folder


def refused(source: Path, folder: Path) -> EngineError:
    with pytest.raises(EngineError) as found:
        convert(source, folder)
    return found.value


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_every_type_of_block_stands_for_the_numbers_that_the_gguf_package_makes_of_it_bit_for_bit(
    kind: str,
) -> None:
    random = np.random.default_rng(7)
    _, size = BLOCKS[kind]
    if kind in ("F32", "F16", "BF16"):
        numbers = random.standard_normal(4096).astype(np.float32)
        raw = np.asarray(gguf.quants.quantize(numbers, Q[kind])).view(np.uint8)
    else:
        raw = any_blocks(Q[kind], 64, random)
    wanted = gguf.quants.dequantize(raw.reshape(-1, size), Q[kind]).astype(np.float32).reshape(-1)
    assert np.array_equal(dequantise(kind, raw.tobytes()), wanted)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_converted_model_computes_what_the_one_it_was_made_of_computes(name: str, tmp_path: Path) -> None:
    network = make_network(name)
    folder = convert(write_gguf(tmp_path / "x.gguf", name, network), tmp_path / "out")
    ids = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted, found = network(ids).logits, load_converted(folder)(ids).logits
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_a_converted_matrix_is_what_the_gguf_package_makes_of_it_and_bfloat16_only_where_nothing_holds_it_exactly(
    kind: str, tmp_path: Path
) -> None:
    network = make_network("qwen2") if kind not in ("Q4_K", "Q6_K") else make_wide()
    source = write_gguf(tmp_path / "x.gguf", "qwen2", network, Q[kind])
    found = ModelFolder(convert(source, tmp_path / "out"))
    for given, name in (("blk.1.ffn_down", "model.layers.1.mlp.down_proj"), ("token_embd", "model.embed_tokens")):
        (tensor,) = [t for t in gguf.GGUFReader(source).tensors if t.name == f"{given}.weight"]
        wanted = torch.from_numpy(gguf.quants.dequantize(tensor.data, Q[kind]).astype(np.float32))
        exact = kind in ("F16", "BF16") or (kind in ("Q8_0", "Q4_0") and given != "token_embd")
        assert torch.equal(read_plain(found, f"{name}.weight"), wanted if exact else wanted.bfloat16().float())


@pytest.mark.parametrize(("kind", "label"), [("Q8_0", (8, 32)), ("Q4_0", (4, 32))])
def test_blocks_that_our_own_format_holds_are_moved_and_served_and_are_plain_where_that_is_asked(
    kind: str, label: tuple[int, int], tmp_path: Path
) -> None:
    source = write_gguf(tmp_path / "x.gguf", "llama", make_network("llama"), Q[kind])
    folder, plain = convert(source, tmp_path / "out"), tmp_path / "plain"
    plain.mkdir()
    convert_gguf(source, plain, lambda stage, done, total: None, keep=False)
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (stated["bits"], stated["group_size"], stated["symmetric"]) == (*label, True)
    kept, rounded = ModelFolder(folder), ModelFolder(plain)
    assert not rounded.quantised
    for name in kept.shapes:
        assert torch.equal(read_plain(kept, name).bfloat16().float(), read_plain(rounded, name).bfloat16().float())
    tokens = torch.randint(2, 300, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    found, wanted = (teacher_forced(engine(each), tokens, prompt_length=20) for each in (folder, plain))
    assert float((found - wanted).norm() / wanted.norm()) < 0.02  # the plain one is rounded to bfloat16


@pytest.mark.parametrize(("kind", "name"), [("Q8_0", "llama"), ("Q4_0", "llama"), ("Q4_0", "qwen2")])
def test_embeddings_and_heads_stay_quantised_where_that_is_asked_and_else_become_plain(
    kind: str, name: str, tmp_path: Path
) -> None:
    source, out = write_gguf(tmp_path / "x.gguf", name, make_network(name), Q[kind]), tmp_path / "out"
    out.mkdir()
    report = convert_gguf(source, out, lambda stage, done, total: None, keep_embeddings=True)
    assert report["kept_embeddings"] == report["kept"] == kind
    found = ModelFolder(out)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    given = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}
    assert found.tables <= given.keys()
    for table in found.tables:
        wanted = gguf.quants.dequantize(tensors[given[table]].data, Q[kind]).astype(np.float32)
        assert torch.equal(read_plain(found, table), torch.from_numpy(wanted))
    plain = ModelFolder(convert(source, tmp_path / "plain"))
    assert "model.embed_tokens.weight" in plain.entries
    assert "model.embed_tokens.weight" not in found.entries


def test_embeddings_of_a_kind_that_cannot_be_kept_are_refused_where_that_is_asked(tmp_path: Path) -> None:
    source, out = write_gguf(tmp_path / "x.gguf", "qwen2", make_network("qwen2"), Q["F16"]), tmp_path / "out"
    out.mkdir()
    with pytest.raises(EngineError, match="cannot be kept") as found:
        convert_gguf(source, out, lambda stage, done, total: None, keep_embeddings=True)
    assert found.value.code == "GGUF_UNSUPPORTED"


def make_wide() -> object:
    """Q4_K and Q6_K have blocks of 256."""
    network = make_network("qwen2")
    network.config.update({"hidden_size": 256, "intermediate_size": 512, "head_dim": 64})
    return type(network)(network.config)


def test_the_tokenizer_template_and_ends_of_a_file_are_those_it_was_written_with(tmp_path: Path) -> None:
    folder = convert(write_gguf(tmp_path / "x.gguf", "llama", make_network("llama")), tmp_path / "out")
    found, wanted = Tokenizer.from_file(str(folder / "tokenizer.json")), make_tokenizer()
    for text in TEXTS:
        assert found.encode(text).ids == wanted.encode(text).ids
        assert found.decode(found.encode(text).ids) == wanted.decode(wanted.encode(text).ids)
    config = json.loads((folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, [1])
    assert "<|assistant|>" in (folder / "chat_template.jinja").read_text()
    assert "license: apache-2.0" in (folder / "README.md").read_text()


def sentence_piece(tokens: dict[str, tuple[float, int]]) -> Metadata:
    return Metadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [*tokens],
            "tokenizer.ggml.scores": [score for score, _ in tokens.values()],
            "tokenizer.ggml.token_type": [kind for _, kind in tokens.values()],
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.bos_token_id": 1,
        }
    )


def test_sentence_piece_merges_the_best_scored_piece_first_and_falls_back_to_bytes() -> None:
    pieces = {"<unk>": (0.0, 2), "<s>": (0.0, 3), "</s>": (0.0, 3)}
    pieces |= {f"<0x{i:02X}>": (0.0, 6) for i in range(256)}
    pieces |= {piece: (-float(i), 1) for i, piece in enumerate(("bc", "ab", "▁a", "abc", "▁", "a", "b", "c"))}
    files = read_tokenizer(sentence_piece(pieces))
    tokenizer = Tokenizer.from_str(json.dumps(files.document))
    # "bc" scores best, so it is merged before "ab" or "▁a" can take its letters; then "▁a".
    assert tokenizer.encode("abc", add_special_tokens=False).tokens == ["▁a", "bc"]
    assert tokenizer.encode("é").tokens == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("abc é").ids) == "abc é"
    by_hand = Tokenizer(
        models.BPE(tokenizer.get_vocab(), [("b", "c"), ("a", "b"), ("▁", "a"), ("a", "bc"), ("ab", "c")],
                   byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )  # fmt: skip
    by_hand.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    by_hand.decoder = decoders.ByteFallback()
    for text in ("abcabc", "cab bca  x", "aabbcc"):
        assert tokenizer.encode(text, add_special_tokens=False).ids == by_hand.encode(text).ids


def test_llama_3_rope_factors_become_its_parameters_and_any_others_are_refused(tmp_path: Path) -> None:
    network = make_network("llama")
    scaled = RopeConfig("llama3", 10000.0, 8.0, 1.0, 4.0, 8192).inv_freq(16, 8192)
    factors = np.array([a / b for a, b in zip(RopeConfig().inv_freq(16, 8192), scaled, strict=True)])
    folder = convert(write_gguf(tmp_path / "x.gguf", "llama", network, rope_factors=factors), tmp_path / "out")
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("llama3", 8.0, 8192)
    factors[-2] *= 1.01
    source = write_gguf(tmp_path / "y.gguf", "llama", network, rope_factors=factors)
    assert refused(source, tmp_path / "other").code == "GGUF_UNSUPPORTED"


@pytest.mark.parametrize(
    ("change", "code", "word"),
    [
        (lambda w: w.add_sliding_window(64), "GGUF_UNSUPPORTED", "llama.attention.sliding_window"),
        (lambda w: w.add_expert_count(8), "GGUF_UNSUPPORTED", "llama.expert_count"),
        (lambda w: w.add_float32("llama.attention.something", 2.0), "GGUF_UNSUPPORTED", "attention.something"),
        (lambda w: w.add_string("llama.rope.scaling.type", "longrope"), "GGUF_INVALID", "rope.scaling.factor"),
        (
            lambda w: w.add_tensor("blk.0.odd.weight", np.ones(4, np.float32)),
            "GGUF_UNSUPPORTED",
            "blk.0.odd.weight",
        ),
        (lambda w: w.add_tensor("x", np.ones(176, np.uint8), raw_dtype=Q.Q5_K), "GGUF_UNSUPPORTED", "Q5_K"),
        (lambda w: w.add_uint16("split.count", 3), "GGUF_UNSUPPORTED", "split"),
    ],
)
def test_what_is_not_known_to_the_conversion_is_refused_by_its_name(
    change: Callable[[gguf.GGUFWriter], None], code: str, word: str, tmp_path: Path
) -> None:
    error = refused(
        write_gguf(tmp_path / "x.gguf", "llama", make_network("llama"), change=change), tmp_path / "out"
    )
    assert error.code == code
    assert word in error.message


def test_an_unknown_pre_tokenizer_and_an_unknown_kind_of_tokenizer_are_refused_by_name() -> None:
    values = {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.token_type": [1, 1],
              "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "chameleon"}  # fmt: skip
    for change, word in (({}, "chameleon"), ({"tokenizer.ggml.model": "rwkv"}, "rwkv")):
        with pytest.raises(EngineError, match=word) as found:
            read_tokenizer(Metadata({**values, **change}))
        assert found.value.code == "GGUF_TOKENIZER"


def test_a_number_that_is_none_is_refused(tmp_path: Path) -> None:
    network = make_network("llama")
    with torch.no_grad():
        network.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    error = refused(write_gguf(tmp_path / "x.gguf", "llama", network), tmp_path / "out")
    assert (error.code, "blk.1.ffn_up.weight" in error.message) == ("GGUF_INVALID", True)


def test_the_container_is_what_the_gguf_package_reads_in_it(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "x.gguf", "gemma2", make_network("gemma2"), Q.Q8_0)
    found, wanted = read_container(source), gguf.GGUFReader(source)
    assert {name: (tensor.offset, tensor.length) for name, tensor in found.tensors.items()} == {
        tensor.name: (tensor.data_offset, tensor.n_bytes) for tensor in wanted.tensors
    }
    for key, value in found.metadata.items():
        assert value == wanted.fields[key].contents()
