"""`python -m tests.gpu.first_cases [KERNEL]`: the first proof of each family, for tools that watch a process."""

import sys

from kernels.bench.device import take_device
from kernels.triton.case import PROOF, Draw
from kernels.triton.families import FAMILIES
from tests.kernels.proofs import check, family_name


def main(only: str = "") -> None:
    """Prove them on the device."""
    take_device()
    for family in FAMILIES:
        if only in family_name(family):
            check(next(iter(family.cases(Draw("cuda"), PROOF))))
            print(family_name(family), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
