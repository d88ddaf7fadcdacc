"""The engine's benchmark: it times the steps it names, over weights of the sizes it says; and what it prints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from appliance.cli.main import main as cloister
from engine.bench import subject as bench_subject
from engine.bench.__main__ import main
from engine.bench.measures import Bench, Decode, Prefill, Workload
from engine.bench.report import ceiling
from engine.bench.shapes import SHAPES, read_shape
from engine.bench.subject import Subject, engine_options, of_shape
from engine.bench.weights import FORMATS, DrawnWeights
from engine.build import make_backend
from engine.errors import EngineError
from engine.models.registry import architecture
from engine.overlapped import OverlappedLoop
from engine.request import Request, SamplingParams, StopCriteria
from kernels.bench import device
from kernels.bench.ceilings import Products
from kernels.packed import Packed
from tests.engine.tiny import save_llama

GIGA = 1e9


def subject(*measures: Prefill | Decode | Workload, weights: str = "bf16") -> Subject:
    """An engine with room for the largest of the measures."""
    load = max((measure.load for measure in measures), key=lambda load: load.tokens)
    return of_shape("tiny", weights, engine_options(load, "cpu", "bfloat16", 1), quantised_head=weights != "bf16")


def test_all_measures_are_told_for_people_and_as_an_object_in_the_last_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = "--shape tiny --weights int4-g32 --quantised-head --threads 1 --rounds 1 --prompt 40 --steps 2"
    sizes = "--context 40 --requests 4 --scale 0.02 --only prefill,b1,b8,context,workload"
    assert main([*words.split(), *sizes.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = json.loads(lines[-1])
    assert list(told["measures"]) == ["prefill", "b1", "b8", "context", "workload"]
    for name, found in told["measures"].items():
        assert any(line.startswith(name) for line in lines)
        assert 0 < found["slowest"] <= found["tokens_per_second"] <= found["fastest"]
        assert 0 < found["outside_kernels"] < 1
        assert (found["at_most"] is None) == (name == "workload")
    assert told["measures"]["b8"]["steps"] == 2


def test_a_folder_is_measured_with_its_own_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_llama(tmp_path / "model")
    words = [
        "--folder",
        str(tmp_path / "model"),
        "--only",
        "b1",
        "--rounds",
        "1",
        "--steps",
        "2",
        "--threads",
        "1",
    ]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    stored = (tmp_path / "model" / "model.safetensors").stat().st_size
    table = 300 * 48 * 4
    assert (told["model"], told["weights"]) == ("model", "as in its files")
    assert told["weight_bytes"] == pytest.approx(stored - table, abs=4096)  # less the header


def test_the_command_line_hands_its_words_on_and_the_status_back(capfd: pytest.CaptureFixture[str]) -> None:
    assert cloister(["bench", "engine", "--shape", "no such"]) == 2
    assert "invalid choice: 'no such'" in capfd.readouterr().err


def test_steps_that_are_timed_bring_each_request_one_token() -> None:
    measure = Decode(3, 4, 10)
    under = subject(measure)
    timed = measure.run(Bench(under.loop, under.vocabulary))
    assert (timed.tokens, timed.steps) == (12, 4)
    assert not under.loop.has_work


def test_a_prompt_is_one_step_and_a_workload_all_its_answers() -> None:
    prefill, workload = Prefill(100), Workload(5, 0.02, 2)
    under = subject(prefill, workload)
    assert prefill.run(Bench(under.loop, under.vocabulary)).steps == 1
    timed = workload.run(Bench(under.loop, under.vocabulary))
    assert (
        timed.tokens == sum(answer for _, answer in workload.lengths) == under.loop.status().tokens_generated - 1
    )
    assert all(2 <= length <= 20 for pair in workload.lengths for length in pair)


def test_a_request_that_fails_stops_the_benchmark() -> None:
    under = subject(Prefill(8))
    bench = Bench(under.loop, under.vocabulary)
    under.loop._runner.execute = lambda plan: 1 / 0  # type: ignore[method-assign,assignment,return-value]  # it fails
    under.loop.submit(Request(0, [1], SamplingParams(), StopCriteria(1)))
    with pytest.raises(RuntimeError, match="ENGINE_STEP_FAILED"):
        bench.drain()


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_every_shape_is_a_model_that_this_engine_computes(name: str) -> None:
    config = read_shape(name)
    shapes = architecture(config).tensor_shapes(config)
    weights = DrawnWeights(shapes, frozenset(), FORMATS["bf16"])
    billions = {"llama-3.2-1b": 1.24, "llama-3.2-3b": 3.21, "llama-3.1-8b": 8.03, "qwen3-0.6b": 0.60}
    assert weights.nbytes / 2 / GIGA == pytest.approx(billions.get(name, 0.0), abs=0.01)


def test_drawn_weights_have_the_sizes_of_their_format() -> None:
    config = read_shape("llama-3.2-1b")
    shapes = architecture(config).tensor_shapes(config)
    weights = DrawnWeights(shapes, frozenset(n for n, s in shapes.items() if len(s) == 2), FORMATS["int4-g32"])
    assert weights.nbytes / GIGA == pytest.approx(0.695, abs=0.001)  # as llama.cpp's Q4_0 of the same shape
    matrix = weights.matrix("model.layers.0.self_attn.k_proj")
    assert isinstance(matrix, Packed)
    assert (matrix.shape, matrix.scales.shape, matrix.bits) == ((512, 2048), (512, 64), 4)
    assert (int(matrix.codes.min()), int(matrix.codes.max())) == (-7, 7)
    assert isinstance(weights.pop("model.embed_tokens.weight"), Packed)
    assert bool((weights.pop("model.norm.weight") == 1).all())
    again = DrawnWeights(shapes, weights.quantised, weights.stored).matrix("model.layers.0.self_attn.k_proj")
    assert torch.equal(matrix.codes, again.codes)


def test_the_ceiling_is_the_slower_of_memory_and_arithmetic() -> None:
    under = subject(Decode(8, 2, 32))
    slow_memory = ceiling(under, Decode(8, 2, 32), 1e6, 1e15)
    read = under.weight_bytes + under.kv_bytes * 8 * (32 + 2 + 1)
    assert slow_memory == pytest.approx(8 * 1e6 / read)
    numbers = under.matrix_numbers + under.head_numbers
    assert ceiling(under, Decode(8, 2, 32), 1e15, 1e6) == pytest.approx(1e6 / 2 / numbers)
    assert ceiling(under, Workload(), 1e6, 1e6) is None
    assert numbers * 2 == pytest.approx(under.weight_bytes, rel=0.01)


def test_integers_are_held_to_the_products_of_integers_unless_they_are_decoded() -> None:
    most = Products(int8=3.0, bfloat16=2.0, float32=1.0)
    assert most.of("bfloat16", quantised=True) == 3.0
    assert most.of("bfloat16", quantised=False) == 2.0
    assert most.of("float32", quantised=True) == 1.0


@pytest.mark.parametrize(("shape", "weights"), [("none", "bf16"), ("tiny", "none")])
def test_what_there_is_not_is_refused(shape: str, weights: str) -> None:
    with pytest.raises(EngineError, match="UNKNOWN"):
        of_shape(shape, weights, engine_options(Prefill(8).load, "cpu", "float32", 1))


def test_a_cuda_device_is_held_to_its_own_ceilings_by_the_overlapped_loop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loops: list[Any] = []

    class Noted(OverlappedLoop):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            loops.append(self)

    monkeypatch.setattr(bench_subject, "OverlappedLoop", Noted)
    monkeypatch.setattr(bench_subject, "_take_device", lambda: None)
    monkeypatch.setattr(bench_subject, "make_backend", lambda options: make_backend(options, "cpu"))
    monkeypatch.setattr(device, "copied_per_second", lambda: 4e12)
    monkeypatch.setattr(device, "products_per_second", lambda dtype: 8e14)
    monkeypatch.setitem(SHAPES, "tiny", SHAPES["tiny"] | {"num_hidden_layers": 1, "vocab_size": 256})
    words = "--device cuda --shape tiny --kv-dtype int8 --threads 1 --rounds 1 --steps 1 --only context"
    assert main([*words.split(), "--context", "4", "--batch", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = json.loads(lines[-1])
    assert [type(loop) for loop in loops] == [Noted]
    assert (told["device"], told["kv_dtype"], told["backend"]) == ("cuda", "int8", "TritonBackend")
    read = told["weight_bytes"] + 2 * 2 * 32 * (2 * 6)  # keys and values of 2 heads, a byte each
    assert told["measures"]["context"]["at_most"] == pytest.approx(2 * 4e12 / read)
    assert told["measures"]["context"]["outside_kernels"] is None
    assert lines[-2].split()[-1] == "-"


def test_without_a_cuda_device_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    assert main(["--device", "cuda", "--shape", "tiny"]) == 1
    assert "NO_CUDA_DEVICE" in capsys.readouterr().err
