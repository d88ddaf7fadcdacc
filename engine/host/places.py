"""Puts the processes of deployments, and this one, on their cores; each thread of a worker pins itself."""

import os
from collections.abc import Callable, Mapping

from engine.cores import Core, physical_cores, quota_cores
from engine.host.core_map import CoreMap
from engine.process import run_on
from engine.protos import engine_pb2


def own_cores() -> tuple[Core, ...]:
    """The cores that deployments can have to themselves.

    None under a quota that does not do for all: others run there as well, and what is pinned cannot evade them.
    """
    cores = physical_cores()
    return () if (quota_cores() or len(cores)) < len(cores) else cores


class Places:
    """Where each process of deployments runs.

    Args:
        cores: for deployments and everybody else.
        cores_left: told at each change which hardware threads are left to everybody else.
    """

    def __init__(self, cores: tuple[Core, ...], cores_left: Callable[[frozenset[int]], None]) -> None:
        self._map = CoreMap(cores)
        self._tell_left = cores_left
        self._settled: tuple[object, ...] = ()

    def take(self, deployment: engine_pb2.Deployment) -> tuple[int, ...]:
        """Hardware threads for the threads of a deployment that is to start."""
        return self._map.take(deployment.name, deployment.options.threads)

    def settle(self, pids: Mapping[str, tuple[int, ...]]) -> None:
        """Move what runs to where it belongs.

        Args:
            pids: of the processes of each deployment that has not failed; 0 where there is none.
        """
        for name in self._map.taken.keys() - pids.keys():
            self._map.give_back(name)
        left = self._map.left
        now = (left, dict(self._map.taken), dict(pids))
        if now == self._settled or (not left):
            return
        if self._settled[:1] != now[:1]:
            self._tell_left(left)
        self._settled = now
        run_on(os.getpid(), left)
        for name, some in pids.items():
            for pid in filter(None, some):
                run_on(pid, left, self._map.of(name))
