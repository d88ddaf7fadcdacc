"""Other engines on the same machine and the same shape of model, measured by turns with ours.

One file per engine; `python -m benchmarks.peers.setup NAME` fetches or builds one, which nothing else here does.
"""
