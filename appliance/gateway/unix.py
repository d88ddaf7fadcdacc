"""Channels to the other processes of the house, over their Unix sockets."""

from pathlib import Path

import grpc

# A prompt of 1 MiB can become a million token ids.
_OPTIONS = (
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.max_send_message_length", 16 << 20),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
)


def open_channel(socket: Path) -> grpc.aio.Channel:
    """A channel to the process at `socket`; it reconnects by itself, soon, after the process was restarted."""
    return grpc.aio.insecure_channel(f"unix:{socket}", options=_OPTIONS)
