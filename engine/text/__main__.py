"""`python -m engine.text`: tokenizer and chat template of one deployment, without torch and without devices."""

import sys
from functools import partial
from pathlib import Path

import grpc

from engine.errors import EngineError
from engine.launch import Launch, exit_refused, read_launch
from engine.models.served import read_served
from engine.process import Process, configure_logging, run
from engine.protos import engine_pb2_grpc
from engine.text.limits import LOAD_CPU_S, LOAD_MEMORY_BYTES, cpu_limit, memory_limit
from engine.text.model import MAX_FILE_BYTES, TextModel, load_text_model
from engine.text.service import TextService
from engine.weights.files import read_verified

NAME = "engine-text"
FORBIDDEN = ("torch", "sqlalchemy", "sqlite3")
_MAX_REQUEST_BYTES = 8 << 20
_REQUEST_MEMORY_BYTES = 1 << 30  # beyond what the loaded process has
_DRAIN_S = 5.0


def main() -> int:
    """Load, serve, drain; the exit status."""
    configure_logging(NAME)
    try:
        launch = read_launch(NAME)
        model, capabilities = _load_within_limits(launch)
    except EngineError as error:
        exit_refused(error)
    return run(NAME, partial(_serve, launch.socket, model, capabilities), FORBIDDEN)


def _load_within_limits(launch: Launch) -> tuple[TextModel, tuple[str, ...]]:
    memory_limit(LOAD_MEMORY_BYTES)
    try:
        with cpu_limit(LOAD_CPU_S, "loading the tokenizer and the chat template", "TEXT_TOO_COSTLY"):
            return _load(launch)
    except MemoryError:
        raise EngineError(
            "TEXT_TOO_COSTLY", f"loading the tokenizer and the chat template takes over {LOAD_MEMORY_BYTES} bytes"
        ) from None


def _load(launch: Launch) -> tuple[TextModel, tuple[str, ...]]:
    """Tokenizer and template, and what the model can be asked for."""
    files = launch.files

    def read(path: str) -> bytes | None:
        file = files.find(path)
        if file is None:
            return None
        if file.size > MAX_FILE_BYTES:
            raise EngineError("FILE_TOO_LARGE", f"{path} has {file.size} bytes; {MAX_FILE_BYTES} are allowed")
        return bytes(read_verified(file, launch.open_file))

    served = read_served(read)
    options = launch.deployment.options
    most = served.context(options.max_context_tokens, options.max_step_tokens)
    model = load_text_model(read, most, served.num_types)
    return model, served.capabilities(can_chat=model.template is not None)


async def _serve(socket: Path, model: TextModel, capabilities: tuple[str, ...], process: Process) -> None:
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", _MAX_REQUEST_BYTES)])
    engine_pb2_grpc.add_TextServiceServicer_to_server(TextService(model), server)
    process.listen(server, socket)
    await server.start()
    memory_limit(_REQUEST_MEMORY_BYTES)
    process.ready({"CAPABILITIES": ",".join(capabilities)})
    await process.stopping.wait()
    await server.stop(_DRAIN_S)


if __name__ == "__main__":
    sys.exit(main())
