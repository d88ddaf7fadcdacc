"""Which cores each deployment's threads have to themselves, and which are left to everybody else.

A thread for a core, as long as there are cores; no second one on a core while another has none. The first cores
are left for the others: interrupts are mostly served there.
"""

from collections import Counter
from collections.abc import Mapping

from engine.cores import Core, engine_cores


class CoreMap:
    """The cores of a machine, and who has which.

    Args:
        cores: that may be used, in order.
    """

    def __init__(self, cores: tuple[Core, ...]) -> None:
        self._cores = cores
        self._taken: dict[str, tuple[int, ...]] = {}

    def take(self, name: str, threads: int) -> tuple[int, ...]:
        """Hardware threads for a deployment's threads, one for each; what it had before is given back.

        Deployments whose threads are more than there are cores for share some: those that fewest have.

        Returns: none where it wants none, or more than there are: its threads run on what is left to all.
        """
        self.give_back(name)
        if threads:
            chosen = self._best(threads)
            if len(chosen) == threads:
                self._taken[name] = chosen
        return self.of(name)

    def give_back(self, name: str) -> None:
        """The deployment needs none any more."""
        self._taken.pop(name, None)

    def of(self, name: str) -> tuple[int, ...]:
        """What a deployment has."""
        return self._taken.get(name, ())

    @property
    def taken(self) -> Mapping[str, tuple[int, ...]]:
        """What each deployment has."""
        return self._taken

    @property
    def left(self) -> frozenset[int]:
        """For all other processes: the cores without a deployment's thread; if none, what such threads leave of
        cores; if nothing, all.
        """
        taken = {number for chosen in self._taken.values() for number in chosen}
        free = [core for core in self._cores if not taken.intersection(core)]
        every = frozenset(number for core in self._cores for number in core)
        return frozenset(number for core in free for number in core) or every - taken or every

    def _best(self, threads: int) -> tuple[int, ...]:
        """First hardware threads of cores before second ones; as many cores stay free as can."""
        count = len(self._cores)
        kept = count - engine_cores(count) if threads <= engine_cores(count) else int(threads < count)
        teams = Counter(number for chosen in self._taken.values() for number in chosen)
        loads = {core: sum(teams[number] for number in core) for core in self._cores}
        ranked = [(level, loads[core], number) for core in self._cores[kept:] for level, number in enumerate(core)]
        return tuple(sorted(number for *_, number in sorted(ranked)[:threads]))
