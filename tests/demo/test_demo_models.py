"""The committed demo models: what any user of their folders relies on. Training is never run here."""

import json
from pathlib import Path

import jinja2.sandbox
import pytest
import tokenizers
import torch

from benchmarks.demo_models.answering import Model
from benchmarks.demo_models.notes import draw
from benchmarks.demo_models.tokens import ASSISTANT, BOS, EOS, SPECIAL, USER

DEMO = Path(__file__).parents[2] / "demo"
MILLIONS = {"demo-notes-s": (1, 2), "demo-notes-m": (8, 11)}
ALL_MILLIONS = 13  # of all demo models together: the repository carries their weights
FIELDS_RIGHT = {
    "demo-notes-s": 0.97,
    "demo-notes-m": 0.97,
}  # of twelve held-out notes; the model cards have the measured shares


@pytest.fixture(scope="module", autouse=True)
def one_thread():  # on a busy machine two wait for each other at every operation
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=MILLIONS)
def folder(request):
    return DEMO / request.param


@pytest.fixture(scope="module")
def model(folder):
    return Model.load(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def rendered(folder, messages):
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
    return sandbox.from_string(template).render(
        messages=messages, add_generation_prompt=True, bos_token=BOS, eos_token=EOS
    )


def test_it_answers_held_out_notes_as_its_card_says(folder, model):
    scores = [answer.scores for answer in model.answer(draw(3000, 12, "unseen_values"))]
    assert sum(s.correct for s in scores) / sum(s.total for s in scores) >= FIELDS_RIGHT[folder.name]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_canaries_are_its_greedy_answers_in_either_precision(folder, precision):
    canaries = json.loads((folder / "canaries.json").read_text(encoding="utf-8"))["canaries"]
    model = Model.load(folder, getattr(torch, precision))
    assert len(canaries) == 3
    for canary in canaries:
        asked = torch.tensor(
            [model.tokenizer.encode(rendered(folder, canary["messages"]), add_special_tokens=False)]
        )
        said = model.network.generate(input_ids=asked, attention_mask=torch.ones_like(asked))[0, asked.shape[1] :]
        assert model.tokenizer.decode(said) == canary["expected"] + EOS


def test_it_has_as_many_parameters_as_its_name_promises_in_one_small_file(folder, model):
    least, most = MILLIONS[folder.name]
    assert least <= model.network.num_parameters() / 1e6 <= most
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert (folder / "model.safetensors").stat().st_size < 2.01 * model.network.num_parameters() + 50_000


def test_all_demo_models_together_stay_small():
    assert sum((DEMO / name / "model.safetensors").stat().st_size for name in MILLIONS) < 2e6 * ALL_MILLIONS


def test_the_folder_has_the_hugging_face_llama_layout(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert config["tie_word_embeddings"] is True
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
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


def test_the_template_renders_in_a_sandbox_as_transformers_renders_it(folder, model):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "{}"},
        {"role": "user", "content": "b"},
    ]
    text = rendered(folder, messages)
    assert text == f"{BOS}<|system|>Be brief.{EOS}{USER}a{EOS}{ASSISTANT}{{}}{EOS}{USER}b{EOS}{ASSISTANT}"
    assert text == model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_the_card_says_what_it_is_and_where_its_numbers_come_from(folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    for said in (
        "synthetic",
        "not for real use",
        "apache-2.0",
        "python -m benchmarks.demo_models.evaluate",
        "unseen_templates",
    ):
        assert said in card
