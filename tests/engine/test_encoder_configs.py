"""Encoders: what a configuration or a way to vectors says that is not known, is refused by name."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import EngineError
from engine.models.served import layout, read_served
from tests.engine.tiny import engine
from tests.engine.vector_models import add_modules, change_config, hidden_states, save, texts, vectors


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    root = tmp_path_factory.mktemp("encoders")
    fields: dict[str, dict[str, Any]] = {
        "bert": {},
        "xlm-roberta": {"type_vocab_size": 1},
        "modernbert": {"local_attention": 16},
    }
    return {family: (root / family, save(root / family, family, **own)) for family, own in fields.items()}


ODD: tuple[Any, ...] = (None, 0, -1, 1, 2, 64.7, 10**9, 10**400, True, False, "", "relu", [], {})
COMMON = (
    *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "max_position_embeddings", "is_decoder", "add_cross_attention", "pad_token_id"),
    *("attention_dropout", "surplus", "position_embedding_type", "tie_word_embeddings", "use_cache"),
)
OWN = {
    "bert": ("hidden_act", "type_vocab_size", "layer_norm_eps", "pad_token_id"),
    "xlm-roberta": (*COMMON, "hidden_act", "type_vocab_size", "layer_norm_eps"),
    "modernbert": (
        *COMMON,
        *("hidden_activation", "norm_eps", "norm_bias", "attention_bias", "mlp_bias", "local_attention"),
        *("global_attn_every_n_layers", "layer_types", "rope_parameters", "global_rope_theta", "local_rope_theta"),
        *("rope_scaling", "classifier_pooling"),
    ),
}
REFUSED = {
    "CONFIG_INVALID",
    "CONFIG_UNSUPPORTED",
    "TENSORS_MISMATCH",
    "CONTEXT_OVERFLOW",
    "ARCHITECTURE_UNSUPPORTED",
}


@pytest.mark.parametrize(("family", "field"), [(f, name) for f, own in OWN.items() for name in own])
def test_an_odd_value_in_the_configuration_is_refused_or_gives_the_vectors_of_transformers(
    models: dict[str, tuple[Path, Any]], tmp_path: Path, family: str, field: str
) -> None:
    (source, model), prompt = models[family], texts(3)[2]
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    raw = json.loads((source / "config.json").read_text())
    for odd in ODD:
        (tmp_path / "config.json").write_text(json.dumps(raw | {field: odd}))
        found, code = vectors_or_refusal(tmp_path, prompt)
        assert code in REFUSED | {""}, (odd, code)
        expected = None if found is None else oracle(tmp_path, model, prompt)
        if found is not None and expected is not None:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4, msg=f"{odd!r}")


def vectors_or_refusal(folder: Path, prompt: list[int]) -> tuple[torch.Tensor | None, str]:
    try:
        return vectors(engine(folder), [prompt])[0], ""
    except EngineError as error:
        return None, error.code


def oracle(folder: Path, like: Any, prompt: list[int]) -> torch.Tensor | None:
    """What transformers makes of config.json and the weights of `like`; None where it cannot."""
    from transformers import AutoConfig, AutoModel

    try:
        build: Any = AutoModel.from_config
        model = build(AutoConfig.from_pretrained(folder)).eval()
        model.load_state_dict(like.state_dict())
        return hidden_states(model, prompt).mean(0)
    except Exception:
        return None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, "2 labels"),
        ({"id2label": None}, "2 labels"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh"}}, "Tanh"),
        ({"sentence_transformers": {"surprise": 1}}, "surprise"),
        ({"sbert_ce_default_activation_function": "my.Function"}, "my.Function"),
        ({"quantization_config": {"quant_method": "mystery"}}, "mystery"),
    ],
    ids=str,
)
def test_a_head_that_is_not_known_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    save(tmp_path, "bert", "ForSequenceClassification", num_labels=1)
    change_config(tmp_path, **changes)
    with pytest.raises(EngineError, match=named):
        engine(tmp_path)


@pytest.mark.parametrize(
    ("path", "changes", "named"),
    [
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "cls and mean"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False}, "nothing"),
        ("1_Pooling/config.json", {"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
        ("1_Pooling/config.json", {"pooling_mode_surprise": True}, "surprise"),
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt"),
        ("1_Pooling/config.json", {"word_embedding_dimension": 31}, "word_embedding_dimension"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case"),
        ("sentence_bert_config.json", {"max_seq_length": "long"}, "max_seq_length"),
        ("sentence_bert_config.json", {"surprise": 1}, "surprise"),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "default_prompt_name"),
    ],
    ids=str,
)
def test_a_way_to_vectors_that_is_not_known_is_refused_by_name(
    models: dict[str, tuple[Path, Any]], tmp_path: Path, path: str, changes: dict[str, Any], named: str
) -> None:
    for file in models["bert"][0].iterdir():
        (tmp_path / file.name).symlink_to(file)
    add_modules(tmp_path)
    given = tmp_path / path
    raw = json.loads(given.read_text()) if given.exists() else {}
    given.write_text(json.dumps(raw | changes))
    with pytest.raises(EngineError, match=named):
        engine(tmp_path)


def test_modules_that_are_not_computed_are_refused_by_name(
    models: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    for file in models["bert"][0].iterdir():
        (tmp_path / file.name).symlink_to(file)
    add_modules(tmp_path, "pooling_mode_mean_tokens", "Dense")
    with pytest.raises(EngineError, match=r"POOLING_UNSUPPORTED: .*Dense"):
        engine(tmp_path)


def test_small_letters_are_left_to_a_tokenizer_that_makes_them(
    models: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    for file in models["bert"][0].iterdir():
        (tmp_path / file.name).symlink_to(file)
    add_modules(tmp_path, do_lower_case=True)
    for normalizer, taken in (
        ({"type": "BertNormalizer", "lowercase": True}, True),
        ({"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}, True),
        ({"type": "BertNormalizer", "lowercase": False}, False),
        (None, False),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps({"normalizer": normalizer}))
        if taken:
            assert len(vectors(engine(tmp_path), [[5, 6]])[0]) == 32
        else:
            with pytest.raises(EngineError, match="do_lower_case"):
                engine(tmp_path)


_OF_BERT = {
    "attention_probs_dropout_prob": 0.1,
    "classifier_dropout": None,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "position_embedding_type": "absolute",
    "use_cache": True,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "sentence-transformers/all-MiniLM-L6-v2": _OF_BERT
    | {
        "_name_or_path": "nreimers/MiniLM-L6-H384-uncased",
        "architectures": ["BertModel"],
        "gradient_checkpointing": False,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "model_type": "bert",
        "num_attention_heads": 12,
        "num_hidden_layers": 6,
        "pad_token_id": 0,
        "transformers_version": "4.8.2",
        "type_vocab_size": 2,
        "vocab_size": 30522,
    },
    "BAAI/bge-reranker-v2-m3": _OF_BERT
    | {
        "architectures": ["XLMRobertaForSequenceClassification"],
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_size": 1024,
        "id2label": {"0": "LABEL_0"},
        "intermediate_size": 4096,
        "label2id": {"LABEL_0": 0},
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 8194,
        "model_type": "xlm-roberta",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "output_past": True,
        "pad_token_id": 1,
        "torch_dtype": "float32",
        "transformers_version": "4.38.1",
        "type_vocab_size": 1,
        "vocab_size": 250002,
    },
    "Alibaba-NLP/gte-modernbert-base": {
        "architectures": ["ModernBertModel"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 50281,
        "classifier_activation": "gelu",
        "classifier_bias": False,
        "classifier_dropout": 0.0,
        "classifier_pooling": "mean",
        "cls_token_id": 50281,
        "decoder_bias": True,
        "deterministic_flash_attn": False,
        "embedding_dropout": 0.0,
        "eos_token_id": 50282,
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 160000.0,
        "gradient_checkpointing": False,
        "hidden_activation": "gelu",
        "hidden_size": 768,
        "initializer_cutoff_factor": 2.0,
        "initializer_range": 0.02,
        "intermediate_size": 1152,
        "layer_norm_eps": 1e-05,
        "local_attention": 128,
        "local_rope_theta": 10000.0,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "mlp_dropout": 0.0,
        "model_type": "modernbert",
        "norm_bias": False,
        "norm_eps": 1e-05,
        "num_attention_heads": 12,
        "num_hidden_layers": 22,
        "pad_token_id": 50283,
        "position_embedding_type": "absolute",
        "reference_compile": None,
        "repad_logits_with_grad": False,
        "sep_token_id": 50282,
        "sparse_pred_ignore_index": -100,
        "sparse_prediction": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "transformers_version": "4.48.0.dev0",
        "vocab_size": 50368,
    },
}
PARAMETERS = {  # without poolers and buffers, which vectors do not need
    "sentence-transformers/all-MiniLM-L6-v2": 22_565_376,
    "BAAI/bge-reranker-v2-m3": 567_755_777,
    "Alibaba-NLP/gte-modernbert-base": 149_014_272,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_taken_and_mean_models_of_their_size(name: str) -> None:
    served = read_served({"config.json": json.dumps(PUBLISHED[name]).encode()}.get)
    assert sum(map(math.prod, layout(served, ()).shapes.values())) == PARAMETERS[name]
    assert (
        served.config.max_context_tokens
        == {"bert": 512, "xlm-roberta": 8192, "modernbert": 8192}[served.config.model_type]
    )
