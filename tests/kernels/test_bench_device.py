"""The benchmark of a CUDA device, but for the device: what is started again, what is tried, the table written."""

import json
import math
from pathlib import Path

import pytest
import torch

from kernels.bench import tune
from kernels.bench.__main__ import main
from kernels.bench.device import Ceilings
from kernels.bench.starts import elsewhere, nbytes, start, starts_of
from kernels.triton import pointwise
from kernels.triton.configs import Config, config, table
from tests.kernels.proofs import DEVICE


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.parametrize("words", [[], ["--tune"]])
def test_without_a_device_it_says_so(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cuda", *words]) == 1
    assert "NO_CUDA_DEVICE" in capsys.readouterr().err


def test_tuning_is_of_a_device() -> None:
    with pytest.raises(SystemExit) as left:
        main(["--tune"])
    assert left.value.code == 2


def test_starts_can_be_repeated_and_moved_to_other_memory() -> None:
    x, weight = torch.randn(2, 16, device=DEVICE), torch.randn(16, 16, device=DEVICE)
    inner, out = torch.zeros(2, 16, device=DEVICE), torch.zeros(2, 16, device=DEVICE)

    def run() -> None:
        torch.mm(x, weight, out=inner)
        pointwise.add(inner, x, 2.0, out)
        out.double()  # of no deployment

    found = starts_of(run)
    wanted = out.clone()
    assert len(found) == 2
    assert nbytes(found) == sum(part.nbytes for part in (x, weight, inner, out))
    moved = elsewhere(found)
    inner.zero_(), out.zero_()
    start(moved)
    assert not out.any()
    assert torch.equal(moved[-1].args[2], wanted)
    start(found)
    assert torch.equal(out, wanted)


def test_of_a_large_piece_of_memory_only_what_is_touched_counts() -> None:
    pages, out = torch.zeros(1000, 16, device=DEVICE), torch.zeros(16, device=DEVICE)
    found = starts_of(lambda: pointwise.add(pages[7], pages[7], 2.0, out))
    assert nbytes(found) == pages[7].nbytes + out.nbytes


def test_the_ceiling_is_the_longer_of_moving_and_computing() -> None:
    most = Ceilings(memory=100.0, bfloat16=1000.0, int8=2000.0, float8=0.0, float32=10.0)
    assert most.seconds(200, 500, "bfloat16") == 2.0
    assert most.seconds(200, 5000, "bfloat16") == 5.0
    assert most.seconds(200, 5000, "float8") == most.seconds(200, 0, "") == 2.0


def test_tuning_takes_what_is_fastest_and_leaves_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(bucket: tune.Bucket, tried: Config, cases: object) -> float:
        if tried["num_warps"] == 8:
            return math.inf
        return 1.0 + abs(tried["BLOCK"] - 2048) / 1e4 + (tried["num_warps"] == 4)

    monkeypatch.setattr(tune, "_seconds", seconds)
    best, before, after = tune.best_of(("add", 1), [])
    assert best == {"BLOCK": 2048, "num_warps": 2}
    assert before > after == 1.0


def test_what_was_tuned_is_asked_for_as_it_is_tried() -> None:
    x, out = torch.ones(3, device=DEVICE), torch.empty(3, device=DEVICE)
    tried = config("add", 3) | {"BLOCK": 512}
    with tune.trying({("add", 1): tried}) as asked:
        (one,) = starts_of(lambda: pointwise.add(x, x, 1.0, out))
    assert asked == {("add", 1)}
    assert one.options["BLOCK"] == 512
    assert config("add", 3)["BLOCK"] == 1024


def test_a_table_keeps_the_buckets_that_were_not_tuned(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    tune.write(path, "Some GPU", {("rms_norm", 4096): {"num_warps": 2}})
    tune.write(path, "Some GPU", {("add", 1): {"BLOCK": 512, "num_warps": 2}})
    written = json.loads(path.read_text())
    assert written["rms_norm"] == table("default")["rms_norm"] | {"4096": {"num_warps": 2}}
    assert written["add"] == {"1": {"BLOCK": 512, "num_warps": 2}}
    assert "Some GPU" in written["_note"]
