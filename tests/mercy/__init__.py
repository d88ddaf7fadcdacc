"""What makes a short-tempered watchdog safe in tests."""

from pathlib import Path

MODULES = Path(__file__).parent
PROGRAM = (MODULES / "sitecustomize.py").read_text()


def environment(victims: Path) -> dict[str, str]:
    """Variables under which watchdogs judge only the processes whose ids stand in the file `victims`."""
    return {"PYTHONPATH": f"{MODULES}:{Path(__file__).parents[2]}", "TEST_VICTIMS": str(victims)}


def give_up(victims: Path, pid: int) -> None:
    """From now on watchdogs judge this process, too."""
    with victims.open("a") as file:
        file.write(f"{pid}\n")
