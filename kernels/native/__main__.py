"""`python -m kernels.native`: says in a line which kernels serve on this machine, for `cloister doctor`."""

import sys

from kernels.native.library import NativeUnavailable, load
from kernels.native.location import statement


def main() -> int:
    """Print `native ISA, WHY` or `torch, WHY`; 0, or 1 where the environment asks for what is not there."""
    try:
        library = load()
    except NativeUnavailable as error:
        print(f"torch, {error}")
    except ValueError as error:
        print(f"CLOISTER_KERNELS_ISA: {error}", file=sys.stderr)
        return 1
    else:
        print(f"native {library.isa}, {statement()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
