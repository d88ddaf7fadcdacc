"""Tiny models as files, made here and now: a byte-level tokenizer like the demo's, and a random Llama."""

import hashlib
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from engine.protos import engine_pb2

CONTROLS = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>")
CORPUS = (
    "Claim 4711 of Maria Hartwell: water damage, 1,250.00 EUR, reported on 3 May.",
    "The patient was moved to ward B after surgery; dosage unchanged.",
    "Payment alert: three transfers to the same account within one hour.",
)
VOCABULARY = 320
CONTEXT = 256
TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>' + message['content'] | trim + eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def byte_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer with the control tokens first."""
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r"\p{Lu}\p{Ll}*| ?\p{Ll}+|\p{N}|\r?\n| ?[^\s\p{L}\p{N}]+|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(CONTROLS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer, template: str | None = TEMPLATE) -> None:
    """The tokenizer's files as Hugging Face lays them out."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def write_llama(folder: Path) -> None:
    """A random two-layer Llama with tokenizer and chat template, as `transformers` saves it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder, byte_tokenizer())


def into_store(folder: Path, store: Path) -> engine_pb2.FileSet:
    """Copy the files of a model folder into a content-addressed store; the file set that names them."""
    files = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        place = store / "sha256" / digest[:2] / digest
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
        files.append(engine_pb2.File(path=path.name, size=len(content), sha256=digest))
    return engine_pb2.FileSet(model_digest="ab" * 32, files=files)
