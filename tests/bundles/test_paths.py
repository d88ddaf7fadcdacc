"""Path rules: what could name anything but one plain file below the model's folder is refused by name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bundles.format.errors import BundleError
from bundles.format.paths import check_path, check_paths

_BAD = [
    ("", "PATH_EMPTY"),
    ("/etc/passwd", "PATH_ABSOLUTE"),
    ("../evil", "PATH_TRAVERSAL"),
    ("a/../../evil", "PATH_TRAVERSAL"),
    ("a//b", "PATH_EMPTY_COMPONENT"),
    ("a/./b", "PATH_EMPTY_COMPONENT"),
    ("a/", "PATH_EMPTY_COMPONENT"),
    ("a\\b", "PATH_BACKSLASH"),
    ("C:evil", "PATH_BACKSLASH"),
    ("a\0b", "PATH_CONTROL"),
    ("a\nb", "PATH_CONTROL"),
    ("a\x85b", "PATH_CONTROL"),
    ("a\u202etxt.exe", "PATH_CONTROL"),
    ("config\u200b.json", "PATH_CONTROL"),
    ("\ufeffconfig.json", "PATH_CONTROL"),
    ("a\u2028b", "PATH_CONTROL"),
    ("a\u0378", "PATH_CONTROL"),
    ("a\ue000", "PATH_CONTROL"),
    ("what?.json", "PATH_RESERVED"),
    ("a|b", "PATH_RESERVED"),
    ("a\ud800", "PATH_ENCODING"),
    ("cafe\u0301.json", "PATH_NOT_NFC"),
    ("a" * 256, "PATH_TOO_LONG"),
    ("é" * 128, "PATH_TOO_LONG"),
    ("/".join(["a" * 200] * 6), "PATH_TOO_LONG"),
    (".git/config", "PATH_HIDDEN"),
    ("a/.gitattributes", "PATH_HIDDEN"),
    ("a.", "PATH_TRAILING"),
    ("a /b", "PATH_TRAILING"),
    ("con", "PATH_DEVICE_NAME"),
    ("a/LPT1.json", "PATH_DEVICE_NAME"),
    ("nul.safetensors", "PATH_DEVICE_NAME"),
    ("nul .safetensors", "PATH_DEVICE_NAME"),
]


@pytest.mark.parametrize(("path", "code"), _BAD)
def test_a_bad_path_is_refused_by_name(path: str, code: str) -> None:
    with pytest.raises(BundleError) as error:
        check_path(path)
    assert error.value.code == code
    assert error.value.exit_status == 3


@pytest.mark.parametrize(
    ("paths", "code"),
    [
        (["a.json", "a.json"], "PATH_DUPLICATE"),
        (["Config.json", "config.json"], "PATH_CASE_COLLISION"),
        (["straße", "STRASSE"], "PATH_CASE_COLLISION"),
        (["\ufb01le", "file"], "PATH_NORMAL_COLLISION"),
        (["caf\u00e9", "cafe\u0301"], "PATH_NORMAL_COLLISION"),
        (["a", "a/b"], "PATH_PREFIX"),
        (["x/A/b", "X/a"], "PATH_PREFIX"),
    ],
)
def test_paths_that_some_file_system_would_merge_are_refused(paths: list[str], code: str) -> None:
    for order in (paths, paths[::-1]):
        with pytest.raises(BundleError) as error:
            check_paths(order)
        assert error.value.code == code


@pytest.mark.parametrize(
    "path", ["config.json", "a/b/c.txt", "model-00001-of-00002.safetensors", "日本.json", "a b"]
)
def test_an_ordinary_path_is_accepted(path: str) -> None:
    check_paths([path])


@given(st.text(max_size=30))
def test_an_accepted_path_stays_below_any_folder(path: str) -> None:
    try:
        check_path(path)
    except BundleError:
        return
    assert not path.startswith("/")
    assert all(part not in ("", ".", "..") for part in path.split("/"))
    path.encode()
