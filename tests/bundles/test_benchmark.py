"""The benchmark of the importer: what it measures is a real import, and what it prints a program can read."""

import json
from pathlib import Path

import pytest

from appliance.cli.main import main
from bundles.benchmark.ceilings import drop_cache
from bundles.benchmark.model import random_blocks
from bundles.benchmark.rounds import Outcome, Round


def test_no_block_of_a_benchmark_s_model_is_ever_the_same() -> None:
    blocks = [block for _ in range(2) for block in random_blocks(20 << 20)]
    assert [len(block) for block in blocks] == 2 * [8 << 20, 8 << 20, 4 << 20]
    kibibytes = [block[at : at + 1024] for block in blocks for at in range(0, len(block), 1 << 20)]
    assert len(set(kibibytes)) == len(kibibytes)


def test_how_much_of_a_file_is_in_memory_is_told_as_a_share(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    assert 0.0 <= drop_cache(tmp_path / "file") <= 1.0


def test_each_import_is_held_to_what_its_own_round_could_do() -> None:
    def found(read: float, write: float, hashed: float, imported: float, streamed: float) -> Round:
        return Round(0, read, write, hashed, hashed, imported, streamed, 1)

    slow_store = found(100.0, 40.0, 160.0, 25.0, 32.0)
    slow_medium = found(10.0, 45.0, 160.0, 8.0, 9.0)
    slow_processor = found(100.0, 45.0, 40.0, 20.0, 20.0)
    outcome = Outcome(1, 4, (slow_store, slow_medium, slow_processor))
    assert (outcome.ceiling, outcome.share(), outcome.share("streamed")) == (20.0, 0.8, 0.9)


@pytest.mark.parametrize("size", ["1MiB", "0", "2 GiB", "2TiB", "-1GiB"])
def test_a_size_that_is_none_is_bad_usage(tmp_path: Path, size: str) -> None:
    with pytest.raises(SystemExit) as left:
        main(["bench", "import", "--size", size, "--to", str(tmp_path)])
    assert left.value.code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "import", "--size", "16384GiB", "--to", str(tmp_path)]) == 1
    assert "STORE_SPACE" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_import_is_measured_beside_its_ceilings_and_nothing_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "import", "--size", "32MiB", "--rounds", "1", "--to", str(tmp_path)]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    medians = told["medians"]
    assert told["bundle_bytes"] > 30 << 20
    assert told["ceiling"] == min(medians["read"], medians["write"], medians["hashing_all"] / 2)
    assert 0 < medians["imported"] < medians["streamed"]
    assert 20 << 20 < medians["rss_peak"] < 512 << 20
    assert list(tmp_path.iterdir()) == []
