"""Client of a Cloister appliance: chat, generate, embed, rerank, tokenize and list models over mutual TLS.

Needs grpcio and protobuf only.

Example:
    >>> from appliance.client import Client
    >>> with Client.from_dir("credentials") as client:
    ...     for text in client.chat("notes", [{"role": "user", "content": "Hello"}], temperature=0):
    ...         print(text, end="", flush=True)
"""

from appliance.client.aio import AsyncClient, AsyncStream
from appliance.client.batches import (
    BatchTimings,
    CallOptions,
    Embedding,
    Embeddings,
    RankedDocument,
    Ranking,
)
from appliance.client.requests import Options
from appliance.client.results import (
    Accepted,
    Choice,
    Completed,
    Completion,
    Delta,
    Finished,
    Message,
    Model,
    Receipt,
    Timings,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from appliance.client.sync import Client, Stream
from appliance.errors import CloisterError

__all__ = [
    "Accepted",
    "AsyncClient",
    "AsyncStream",
    "BatchTimings",
    "CallOptions",
    "Choice",
    "Client",
    "CloisterError",
    "Completed",
    "Completion",
    "Delta",
    "Embedding",
    "Embeddings",
    "Finished",
    "Message",
    "Model",
    "Options",
    "RankedDocument",
    "Ranking",
    "Receipt",
    "Stream",
    "Timings",
    "TokenLogprob",
    "TopLogprob",
    "Usage",
]
