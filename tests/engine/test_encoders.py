"""Encoders: hidden states, vectors and scores equal those of transformers, in the bytes that were planned."""

import math
import random
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import EngineError
from engine.loop import EngineLoop
from engine.memory_plan import plan_memory, read_model
from engine.models.encoders.registry import ENCODERS
from engine.models.served import layout
from engine.options import EngineOptions
from engine.request import Task
from kernels.encoder_ops import Span
from tests.engine.drawn import SEED
from tests.engine.plan_against_process import held_bytes
from tests.engine.tiny import engine, file_set
from tests.engine.vector_models import (
    CONTEXT,
    add_modules,
    ask,
    change_config,
    hidden_states,
    save,
    texts,
    vectors,
)

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "bert, tanh gelu, three segments": ("bert", {"hidden_act": "gelu_new", "type_vocab_size": 3}),
    "bert, relu, one head": ("bert", {"hidden_act": "relu", "num_attention_heads": 1, "layer_norm_eps": 1e-5}),
    "roberta": ("roberta", {"type_vocab_size": 1}),
    "xlm-roberta": ("xlm-roberta", {"type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "xlm-roberta, another padding": ("xlm-roberta", {"pad_token_id": 5}),
    "modernbert": ("modernbert", {"local_attention": 16}),
    "modernbert, biases": (
        "modernbert",
        {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "hidden_activation": "silu"},
    ),
    "modernbert, odd window, other layers": (
        "modernbert",
        {"local_attention": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
}
SCRATCH = 24 * 2**20  # of the plan, for buffers that no tensor is
OPTIONS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "cpu, deterministic": {"deterministic": True},
    "reference": {"backend": "reference"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    root = tmp_path_factory.mktemp("encoders")
    folders = {name: root / str(i) for i, name in enumerate(VARIANTS)}
    return {
        name: (folders[name], save(folders[name], family, **fields)) for name, (family, fields) in VARIANTS.items()
    }


def computed(loop: EngineLoop, prompts: list[list[int]]) -> list[torch.Tensor]:
    """The hidden states of prompts that share a step."""
    runner: Any = loop._runner
    passages = runner._model.passages(prompts, [()] * len(prompts))
    with torch.inference_mode():
        hidden = runner._model(runner._ops, runner._ops.begin_passages(passages))
    ends = torch.tensor(passages.counts).cumsum(0).tolist()
    return [hidden[end - len(prompt) : end] for end, prompt in zip(ends, prompts, strict=True)]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_of_texts_that_share_a_step_equal_those_of_transformers(
    models: dict[str, tuple[Path, Any]], variant: str, options: str
) -> None:
    folder, model = models[variant]
    prompts = texts(6)
    found = computed(engine(folder, **OPTIONS[options]), prompts)
    wanted = [hidden_states(model, prompt) for prompt in prompts]
    worst = max(float((one - other).abs().max()) for one, other in zip(found, wanted, strict=True))
    print(f"{variant}, {options}: off by {worst:.1e}")
    assert worst <= 1e-4
    assert min(float(hidden.std()) for hidden in found) > 0.2  # a flat model would pass any comparison


def drawn(family: str, seed: int) -> dict[str, Any]:
    of = random.Random(f"{family} {seed}")
    heads = of.choice([1, 2, 4])
    fields: dict[str, Any] = {
        "num_hidden_layers": of.choice([1, 2, 4]),
        "num_attention_heads": heads,
        "hidden_size": heads * of.choice([6, 8, 12]),
        "intermediate_size": of.choice([24, 40, 64]),
    }
    if family == "modernbert":
        flags = ("attention_bias", "mlp_bias", "norm_bias")
        fields |= {name: of.random() < 0.5 for name in flags}
        fields |= {"norm_eps": of.choice([1e-5, 1e-3]), "local_attention": of.randrange(2, 60)}
        fields["hidden_activation"] = of.choice(["gelu", "silu", "gelu_pytorch_tanh"])
        return fields
    fields |= {"layer_norm_eps": of.choice([1e-12, 1e-5]), "type_vocab_size": of.choice([1, 2])}
    return fields | {"hidden_act": of.choice(["gelu", "gelu_new", "relu", "silu"])}


@pytest.mark.parametrize("draw", range(2))
@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "modernbert"])
def test_hidden_states_of_drawn_models_equal_those_of_transformers(tmp_path: Path, family: str, draw: int) -> None:
    print(f"CLOISTER_SEED={SEED}")
    fields = drawn(family, SEED + draw)
    model = save(tmp_path, family, seed=SEED + draw, **fields)
    prompts = texts(4, seed=SEED)
    for prompt, hidden in zip(prompts, computed(engine(tmp_path), prompts), strict=True):
        torch.testing.assert_close(hidden, hidden_states(model, prompt), rtol=0, atol=1e-4, msg=str(fields))


def test_positions_leave_out_padding_tokens_inside_a_text(models: dict[str, tuple[Path, Any]]) -> None:
    for variant, padding in (("xlm-roberta", 1), ("xlm-roberta, another padding", 5), ("bert", 1)):
        folder, model = models[variant]
        prompt = [padding, 7, 8, padding, padding, 9, 10]
        (hidden,) = computed(engine(folder), [prompt])
        torch.testing.assert_close(hidden, hidden_states(model, prompt), rtol=0, atol=1e-4)


def test_bfloat16_vectors_are_as_close_as_bfloat16_is(models: dict[str, tuple[Path, Any]]) -> None:
    for variant in ("bert", "modernbert"):
        folder, model = models[variant]
        for deterministic in (False, True):
            found = vectors(engine(folder, dtype="bfloat16", deterministic=deterministic), texts(4))
            expected = torch.stack([hidden_states(model, prompt).mean(0) for prompt in texts(4)])
            assert torch.cosine_similarity(found, expected).min() > 0.99


POOLED = {
    "pooling_mode_cls_token": lambda hidden: hidden[0],
    "pooling_mode_mean_tokens": lambda hidden: hidden.mean(0),
    "pooling_mode_max_tokens": lambda hidden: hidden.max(0).values,
    "pooling_mode_lasttoken": lambda hidden: hidden[-1],
}


@pytest.mark.parametrize("mode", POOLED)
def test_vectors_are_pooled_and_normalised_as_the_files_say(tmp_path: Path, mode: str) -> None:
    model = save(tmp_path, "bert")
    prompts = texts(5)
    expected = torch.stack([POOLED[mode](hidden_states(model, prompt)) for prompt in prompts])
    add_modules(tmp_path, mode)
    for options in OPTIONS.values():
        found = vectors(engine(tmp_path, **options), prompts)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert torch.cosine_similarity(found, expected).min() >= 0.9999
    add_modules(tmp_path, mode, "Normalize")
    found = vectors(engine(tmp_path), prompts)
    torch.testing.assert_close(found, torch.nn.functional.normalize(expected), rtol=0, atol=1e-4)


def test_without_files_of_sentence_transformers_vectors_are_means(models: dict[str, tuple[Path, Any]]) -> None:
    folder, model = models["xlm-roberta"]
    expected = torch.stack([hidden_states(model, prompt).mean(0) for prompt in texts(3)])
    torch.testing.assert_close(vectors(engine(folder), texts(3)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", ["bert", "xlm-roberta", "modernbert"])
@pytest.mark.parametrize(
    "options", [{"deterministic": True}, {"deterministic": True, "dtype": "bfloat16"}], ids=str
)
def test_a_vector_has_the_same_bits_whatever_shares_the_step(
    models: dict[str, tuple[Path, Any]], variant: str, options: dict[str, Any]
) -> None:
    loop = engine(models[variant][0], max_step_tokens=300, **options)
    prompts = texts(12, seed=3)
    alone = torch.cat([vectors(loop, [prompt]) for prompt in prompts])
    together = vectors(loop, prompts)
    turned = vectors(loop, prompts[::-1]).flip(0)
    assert torch.equal(alone, together)
    assert torch.equal(alone, turned)


def test_the_reference_gives_the_same_bits_whatever_shares_the_step(models: dict[str, tuple[Path, Any]]) -> None:
    loop = engine(models["modernbert"][0], backend="reference")
    assert torch.equal(torch.cat([vectors(loop, [prompt]) for prompt in texts(6)]), vectors(loop, texts(6)))


def test_a_long_text_is_attended_in_slices_that_change_nothing(tmp_path: Path) -> None:
    model = save(tmp_path, "modernbert", max_position_embeddings=400, local_attention=40)
    prompts = [texts(3, longest=400)[2], texts(3, longest=131)[2]]
    for options in OPTIONS.values():
        for prompt, hidden in zip(prompts, computed(engine(tmp_path, **options), prompts), strict=True):
            torch.testing.assert_close(hidden, hidden_states(model, prompt), rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("bert", {}),
        ("roberta", {}),
        ("xlm-roberta", {"type_vocab_size": 1}),
        ("modernbert", {"local_attention": 16}),
        ("modernbert", {"classifier_pooling": "mean", "classifier_bias": True, "classifier_activation": "silu"}),
        ("modernbert", {"norm_bias": True}),
    ],
    ids=str,
)
def test_scores_equal_those_of_transformers(
    tmp_path: Path, family: str, fields: dict[str, Any], options: str
) -> None:
    model = save(tmp_path, family, "ForSequenceClassification", num_labels=1, **fields)
    prompts = texts(5)
    with torch.no_grad():
        logits = torch.stack([model(torch.tensor([prompt])).logits[0] for prompt in prompts])
    for score, expected in (("Identity", logits), ("Sigmoid", logits.sigmoid())):
        kind = "linear" if score == "Identity" else "activation"
        change_config(tmp_path, sentence_transformers={"activation_fn": f"torch.nn.modules.{kind}.{score}"})
        found = vectors(engine(tmp_path, **OPTIONS[options]), prompts, Task.SCORE)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert logits.std() > 0.1


def test_a_cross_encoder_tells_its_two_texts_apart_by_segments(tmp_path: Path) -> None:
    model = save(tmp_path, "bert", "ForSequenceClassification", num_labels=1)
    prompt, segments = texts(3)[2], [0] * 20 + [1] * 40
    with torch.no_grad():
        logit = model(torch.tensor([prompt]), token_type_ids=torch.tensor([segments])).logits[0]
    loop = engine(tmp_path)  # no word on a function: sentence-transformers takes the sigmoid
    found = vectors(loop, [prompt], Task.SCORE, type_ids=segments)[0]
    torch.testing.assert_close(found, logit.sigmoid(), rtol=0, atol=1e-4)
    assert abs(found.item() - vectors(loop, [prompt], Task.SCORE).item()) > 1e-3


def test_tensors_that_no_vector_needs_may_be_there_and_others_may_not(
    models: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    source = models["bert"][0]
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    assert "pooler.dense.weight" in tensors
    expected = vectors(engine(source), texts(2))
    positions = {"embeddings.position_ids": torch.arange(CONTEXT)[None]}
    bare = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}
    for given in (tensors | positions, bare):
        save_file(given, tmp_path / "model.safetensors")
        assert torch.equal(vectors(engine(tmp_path), texts(2)), expected)
    save_file(tensors | {"surplus.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(EngineError, match="surplus"):
        engine(tmp_path)


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"backend": "reference"}], ids=str)
@pytest.mark.parametrize("variant", ["bert", "modernbert"])
def test_weights_are_planned_to_the_byte_and_there_are_no_pages(
    models: dict[str, tuple[Path, Any]], variant: str, options: dict[str, Any]
) -> None:
    folder = models[variant][0]
    loop = engine(folder, **options)
    runner: Any = loop._runner
    asked = EngineOptions(kv_blocks=64, block_size=8, threads=1, **options)
    plan = plan_memory(read_model(*file_set(folder)), asked, 1 << 40, cores=1)
    assert (plan.weights, plan.kv, plan.kv_block) == (held_bytes(runner._model), 0, 0)
    assert plan.options == loop.options
    assert plan.options.kv_blocks == 0
    assert loop.status().blocks_total == 0
    short = plan_memory(read_model(*file_set(folder)), asked, plan.total - 1, cores=1)
    assert "max_step_tokens" in short.advice
    assert "kv_blocks" not in short.advice
    assert plan.parameters == sum(math.prod(shape) for shape in read_model(*file_set(folder)).shapes.values())


@pytest.mark.parametrize("variant", ["bert", "modernbert"])
def test_quantised_encoders_equal_what_their_matrices_stand_for_and_are_planned_to_the_byte(
    models: dict[str, tuple[Path, Any]], tmp_path: Path, variant: str
) -> None:
    source = models[variant][0]
    quantised, plain = tmp_path / "quantised", tmp_path / "plain"
    tensors, stands_for = load_file(source / "model.safetensors"), {}
    for name in layout(read_model(*file_set(source)).served, tensors).matrices:
        weight = tensors.pop(name)
        scales = weight.abs().amax(1, keepdim=True) / 127
        codes = (weight / scales).round()
        stands_for[name] = codes * scales
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.codes": codes.to(torch.int8), f"{module}.scales": scales}
    given = {"quant_method": "cloister", "bits": 8, "group_size": 0, "symmetric": True}
    for folder in (quantised, plain):
        folder.mkdir()
        (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    change_config(quantised, quantization_config=given)
    save_file(tensors, quantised / "model.safetensors")
    save_file(load_file(source / "model.safetensors") | stands_for, plain / "model.safetensors")
    for kind in OPTIONS.values():
        options = kind | {"dtype": "float32"}
        loop = engine(quantised, **options)
        expected = vectors(engine(plain, **options), texts(4))
        torch.testing.assert_close(vectors(loop, texts(4)), expected, rtol=0, atol=1e-4)
        asked = EngineOptions(threads=1, **options)
        plan = plan_memory(read_model(*file_set(quantised)), asked, 1 << 40, cores=1)
        runner: Any = loop._runner
        assert plan.weights == held_bytes(runner._model)


def test_a_step_takes_no_more_than_is_planned(tmp_path: Path) -> None:
    """What torch allocates at once in one full step, counted by its own profiler."""
    for family, deterministic in (("bert", True), ("modernbert", False), ("modernbert", True)):
        folder = tmp_path / f"{family}{deterministic}"
        save(folder, family, hidden_size=256, intermediate_size=512, max_position_embeddings=1024)
        loop = engine(folder, deterministic=deterministic)
        prompt = texts(3, longest=1020)[2]
        asked = EngineOptions(deterministic=deterministic, threads=1)
        plan = plan_memory(read_model(*file_set(folder)), asked, 1 << 40, cores=1)
        with torch.profiler.profile(profile_memory=True) as profile:
            vectors(loop, [prompt])
        kineto: Any = profile.profiler
        events = sorted(kineto.kineto_results.events(), key=lambda event: event.start_ns())
        held = list(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
        runner: Any = loop._runner
        most = max(held) + len(getattr(runner._ops, "_scratch", ()))  # no tensor of torch's allocator
        assert most <= plan.activations - SCRATCH <= 4 * most


def test_a_text_is_as_long_as_the_publisher_says(models: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    for file in models["bert"][0].iterdir():
        (tmp_path / file.name).symlink_to(file)
    add_modules(tmp_path, max_seq_length=20)
    loop = engine(tmp_path)
    assert loop.max_context_tokens == 20
    assert ask(loop, [[5] * 20])[0].end.prompt_tokens == 20
    with pytest.raises(EngineError, match="CONTEXT_OVERFLOW"):
        ask(loop, [[5] * 21])


def test_every_encoder_is_read_and_laid_out_without_torch() -> None:
    import subprocess
    import sys

    program = (
        "import sys; from engine.models import served; from engine import memory_plan;"
        "from engine.models.encoders.registry import ENCODERS; print(len(ENCODERS));"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(ENCODERS))]


def test_spans_are_pooled_by_themselves() -> None:
    from kernels.cpu import CpuBackend

    x = torch.arange(12.0).view(6, 2)
    pooled = CpuBackend().pool(x, [Span(0, 2), Span(5, 1)], "mean")
    assert pooled.tolist() == [[1.0, 2.0], [10.0, 11.0]]
