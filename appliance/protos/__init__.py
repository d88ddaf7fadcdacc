"""Generated protobuf stubs; see .ci/stubs.py."""
