"""Memory of the native kernels: where it starts, what it holds, and what of it lies in huge pages."""

import mmap
from pathlib import Path

import pytest
import torch

from kernels.native.memory import HUGE_PAGE, aligned_empty, huge_share

_GIVEN = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize("nbytes", [0, 1, 4096, HUGE_PAGE - 1, HUGE_PAGE, 3 * HUGE_PAGE + 5])
def test_memory_is_zero_starts_on_a_huge_page_and_is_as_much_as_was_asked(nbytes: int) -> None:
    memory = aligned_empty(nbytes)
    assert memory.dtype == torch.uint8
    assert memory.shape == (nbytes,)
    assert memory.data_ptr() % HUGE_PAGE == 0
    assert not memory.any()


def test_memory_lives_as_long_as_the_last_tensor_in_it() -> None:
    numbers = aligned_empty(4 * HUGE_PAGE).view(torch.float32)[7:]
    numbers.fill_(1.5)
    other = aligned_empty(4 * HUGE_PAGE)  # would lie where the first was, had it gone
    other.fill_(255)
    assert (numbers == 1.5).all()


def test_less_than_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 bytes"):
        aligned_empty(-1)


def test_memory_is_there_on_a_kernel_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9999)  # advice that no kernel knows: EINVAL, as without huge pages
    memory = aligned_empty(2 * HUGE_PAGE)
    memory.fill_(1)
    assert memory.all()


def test_huge_pages_are_asked_for_and_their_share_is_known() -> None:
    memory = aligned_empty(16 * HUGE_PAGE)
    memory.fill_(1)
    share = huge_share()
    if _GIVEN.exists():  # asked for, whatever the system gave
        assert share is not None
        assert 0 <= share <= 1


def test_the_share_counts_what_was_asked_for_alone(tmp_path: Path) -> None:
    smaps = tmp_path / "smaps"
    one = "10-20 rw-p 00000000 00:00 0 \nSize: 9 kB\nRss: {} kB\nAnonHugePages: {} kB\nVmFlags: rd wr {} \n"
    smaps.write_text(one.format(4000, 3000, "hg") + one.format(500, 0, "ac") + one.format(2000, 0, "hg ac"))
    assert huge_share(smaps) == 0.5
