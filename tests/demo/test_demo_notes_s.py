"""The committed demo model: what any user of its folder relies on. Training is never run here."""

import json
from pathlib import Path

import jinja2.sandbox
import pytest
import tokenizers
import torch

from benchmarks.demo_models.answering import Model
from benchmarks.demo_models.notes import draw
from benchmarks.demo_models.tokens import ASSISTANT, BOS, EOS, SPECIAL, USER

FOLDER = Path(__file__).parents[2] / "demo" / "demo-notes-s"
FIELDS_RIGHT = 0.97  # of twelve held-out notes; the model card has the measured shares


@pytest.fixture(scope="module")
def model():
    return Model.load(FOLDER)


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def rendered(messages):
    template = (FOLDER / "chat_template.jinja").read_text(encoding="utf-8")
    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
    return sandbox.from_string(template).render(
        messages=messages, add_generation_prompt=True, bos_token=BOS, eos_token=EOS
    )


def test_it_answers_held_out_notes_as_its_card_says(model):
    scores = [answer.scores for answer in model.answer(draw(3000, 12, "unseen_values"))]
    assert sum(s.correct for s in scores) / sum(s.total for s in scores) >= FIELDS_RIGHT


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_canaries_are_its_greedy_answers_in_either_precision(precision):
    canaries = json.loads((FOLDER / "canaries.json").read_text(encoding="utf-8"))["canaries"]
    model = Model.load(FOLDER, getattr(torch, precision))
    assert len(canaries) == 3
    for canary in canaries:
        asked = torch.tensor([model.tokenizer.encode(rendered(canary["messages"]), add_special_tokens=False)])
        said = model.network.generate(input_ids=asked, attention_mask=torch.ones_like(asked))[0, asked.shape[1] :]
        assert model.tokenizer.decode(said) == canary["expected"] + EOS


def test_it_has_between_one_and_two_million_parameters_in_one_small_file(model):
    assert 1_000_000 <= model.network.num_parameters() <= 2_000_000
    assert [path.name for path in FOLDER.glob("*.safetensors")] == ["model.safetensors"]
    assert (FOLDER / "model.safetensors").stat().st_size < 4_500_000


def test_the_folder_has_the_hugging_face_llama_layout():
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert config["tie_word_embeddings"] is True
    generation = json.loads((FOLDER / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == config["eos_token_id"] == SPECIAL.index(EOS)


def test_the_tokenizer_gives_every_text_back_byte_for_byte(tokenizer):
    texts = ["", " a  b\r\n\tc\n", "Zoë Kovač £1,840.50", "".join(map(chr, range(1, 300))), "日本語 😀 e\u0301"]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_digits_and_names_have_the_same_tokens_in_note_and_answer(tokenizer):
    for value in ("Hartwell", "QX-20418", "1840.50", "Zopiclone"):
        alone = tokenizer.encode(value).tokens
        note, answer = tokenizer.encode(f"for {value} today").tokens, tokenizer.encode(f':"{value}","').tokens
        assert any(note[i : i + len(alone)] == alone for i in range(len(note)))
        assert any(answer[i : i + len(alone)] == alone for i in range(len(answer)))
    assert all(len(token) == 1 for token in tokenizer.encode("20418").tokens)


def test_special_tokens_come_first_and_only_they_are_special(tokenizer):
    assert [tokenizer.id_to_token(i) for i in range(len(SPECIAL))] == list(SPECIAL)
    assert {token.content for token in tokenizer.get_added_tokens_decoder().values()} == set(SPECIAL)


def test_control_tokens_in_a_users_text_can_be_read_as_plain_text(tokenizer):
    tokenizer.encode_special_tokens = True
    try:
        ids = tokenizer.encode(f"note {ASSISTANT} yes").ids
    finally:
        tokenizer.encode_special_tokens = False
    assert not set(ids) & set(range(len(SPECIAL)))
    assert tokenizer.decode(ids) == f"note {ASSISTANT} yes"


def test_the_template_renders_in_a_sandbox_as_transformers_renders_it(model):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "{}"},
        {"role": "user", "content": "b"},
    ]
    text = rendered(messages)
    assert text == f"{BOS}<|system|>Be brief.{EOS}{USER}a{EOS}{ASSISTANT}{{}}{EOS}{USER}b{EOS}{ASSISTANT}"
    assert text == model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_the_card_says_what_it_is_and_where_its_numbers_come_from():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for said in (
        "synthetic",
        "not for real use",
        "apache-2.0",
        "python -m benchmarks.demo_models.evaluate",
        "unseen_templates",
    ):
        assert said in card
