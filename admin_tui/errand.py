"""Blocking calls on threads that nobody waits for at the end: a console quits while control is silent."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import grpc

from appliance.errors import CloisterError, from_rpc_error

T = TypeVar("T")


async def ask(call: Callable[[], T]) -> T:
    """What `call` returns, without holding up the event loop.

    Raises:
        CloisterError: what it raised; any other error becomes one, code CONSOLE_DEFECT.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def work() -> None:
        try:
            result = call()
        except Exception as error:
            _tell(loop, _fail, answer, _known(error))
        else:
            _tell(loop, _succeed, answer, result)

    threading.Thread(target=work, daemon=True, name="console-call").start()
    return await answer


async def listen(stream: Callable[[], Iterator[T]], told: Callable[[T], None]) -> None:
    """Hand every message of `stream` to `told` on the event loop, until it ends.

    Raises:
        CloisterError: what it ended with.
    """
    loop = asyncio.get_running_loop()

    def work() -> None:
        for message in stream():
            _tell(loop, told, message)

    await ask(work)


def _tell(loop: asyncio.AbstractEventLoop, what: Callable[..., None], *words: object) -> None:
    """Call on the loop; a loop that is closed, because the console has quit, needs no answer."""
    try:
        loop.call_soon_threadsafe(what, *words)
    except RuntimeError:
        if not loop.is_closed():
            raise


def _succeed(answer: "asyncio.Future[T]", result: T) -> None:
    if not answer.done():
        answer.set_result(result)


def _fail(answer: "asyncio.Future[object]", error: CloisterError) -> None:
    if not answer.done():
        answer.set_exception(error)


def _known(error: Exception) -> CloisterError:
    if isinstance(error, CloisterError):
        return error
    if isinstance(error, grpc.RpcError):
        return from_rpc_error(error)
    return CloisterError("CONSOLE_DEFECT", f"{type(error).__name__}: {error}", grpc.StatusCode.INTERNAL)
