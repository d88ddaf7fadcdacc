"""The main job in a network namespace that holds nothing but a loopback; run by test_air_gap.py.

Prints the answer's text. Fails when another interface is there, or when anything on the way needs one.
"""

import fcntl
import os
import socket
import struct

from tests.e2e.appliance import ALIAS, running_appliance

_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1


def raise_loopback() -> None:
    """Bring `lo` up, as a booting machine does."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))


def main() -> None:
    """Bundle to answer, alone."""
    interfaces = [name for _, name in socket.if_nameindex()]
    assert interfaces == ["lo"], f"not alone: {interfaces} as uid {os.getuid()}"
    raise_loopback()
    with running_appliance() as appliance, appliance.client() as client:
        print("".join(client.generate(ALIAS, text="hello", temperature=0, max_tokens=8)))
        assert appliance.json("audit", "verify")["intact"]


if __name__ == "__main__":
    main()
