"""The benchmark of ops: it counts what kernels take once, and prints each op beside its ceiling."""

import json
import time

import pytest

from kernels.bench.__main__ import main
from kernels.bench.clock import CallClock


class Ops:
    def outer(self) -> int:
        time.sleep(0.002)
        return self.inner() + 1

    def inner(self) -> int:
        time.sleep(0.002)
        return 1


def test_a_call_within_a_call_counts_once() -> None:
    ops = Ops()
    clock = CallClock(ops, ("outer", "inner"))
    began = time.perf_counter_ns()
    assert ops.outer() == 2
    passed = time.perf_counter_ns() - began
    assert 4_000_000 <= clock() <= passed


def test_what_raises_counts_and_is_raised() -> None:
    class Failing:
        def op(self) -> None:
            raise ValueError("failed")

    ops = Failing()
    clock = CallClock(ops, ("op",))
    for _ in range(2):
        with pytest.raises(ValueError, match="failed"):
            ops.op()
    assert clock() > 0


def test_ops_are_told_beside_memory_and_their_ceiling(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--backend", "torch", "--only", "small", "--threads", "1"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["backend"], told["threads"], len(told["ops"])) == ("torch", 1, 6)
    for op in told["ops"]:
        assert op["bytes_per_second"] * op["seconds"] > 1000
        assert 0 < op["ceiling"] == pytest.approx(op["bytes_per_second"] / op["memory"])


def test_a_group_that_there_is_not_is_bad_usage() -> None:
    with pytest.raises(SystemExit) as left:
        main(["--only", "products,else"])
    assert left.value.code == 2
