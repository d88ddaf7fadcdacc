"""The tree is RFC 9162's, the notes are C2SP's: against definitions and vectors written down independently."""

import base64
import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from appliance.control.audit import note
from appliance.control.audit.note import Checkpoint, NoteError
from appliance.control.audit.record import leaf_hash
from appliance.control.audit.tree import EMPTY_ROOT, Edge, edge_nodes


def merkle_tree_hash(entries: list[bytes]) -> bytes:
    """RFC 9162, section 2.1.1, word for word."""
    if not entries:
        return hashlib.sha256(b"").digest()
    if len(entries) == 1:
        return hashlib.sha256(b"\x00" + entries[0]).digest()
    k = 1
    while k * 2 < len(entries):
        k *= 2
    return hashlib.sha256(b"\x01" + merkle_tree_hash(entries[:k]) + merkle_tree_hash(entries[k:])).digest()


def edge_over(entries: list[bytes]) -> tuple[Edge, dict[tuple[int, int], bytes]]:
    edge, nodes = Edge(), {}
    for entry in entries:
        nodes.update({(node.level, node.position): node.hash for node in edge.append(leaf_hash(entry))})
    return edge, nodes


# The eight inputs of certificate-transparency-go's reference tests and the root over all of them.
VECTOR = [bytes.fromhex(t) for t in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657")]
VECTOR.append(bytes.fromhex("606162636465666768696a6b6c6d6e6f"))
VECTOR_ROOT = "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"


def test_root_of_the_reference_vector_is_the_published_one() -> None:
    assert edge_over(VECTOR)[0].root().hex() == VECTOR_ROOT


def test_empty_tree_has_the_hash_of_nothing_as_root() -> None:
    assert Edge().root() == EMPTY_ROOT == hashlib.sha256(b"").digest()


@given(st.lists(st.binary(max_size=8), max_size=70))
def test_root_and_nodes_are_the_recursive_definitions(entries: list[bytes]) -> None:
    edge, nodes = edge_over(entries)
    assert edge.root() == merkle_tree_hash(entries)
    for (level, position), value in nodes.items():
        assert value == merkle_tree_hash(entries[position << level : (position + 1) << level])
    assert len(nodes) == 2 * len(entries) - len(entries).bit_count()
    assert Edge(len(entries), [nodes[name] for name in edge_nodes(len(entries))]).root() == edge.root()


def test_edge_with_the_wrong_number_of_hashes_is_refused() -> None:
    with pytest.raises(ValueError, match="2 edge nodes, not 1"):
        Edge(3, [EMPTY_ROOT])


KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw()
STATED = Checkpoint("cloister/test/audit", 7, bytes(range(32)), bytes(range(32, 64)))


def test_note_is_laid_out_as_c2sp_says() -> None:
    lines = note.sign(STATED, KEY, head=False).split("\n")
    text = "\n".join(lines[:4]) + "\n"
    root, previous = (base64.b64encode(value).decode() for value in (STATED.root, STATED.previous))
    assert text == f"cloister/test/audit\n7\n{root}\n{previous}\n"
    assert lines[4] == ""
    assert lines[6:] == [""]
    dash, name, signature = lines[5].split(" ")
    raw = base64.b64decode(signature)
    assert (dash, name) == ("\u2014", "cloister/test/audit")
    assert raw[:4] == hashlib.sha256(b"cloister/test/audit\n\x01" + PUBLIC).digest()[:4]
    KEY.public_key().verify(raw[4:], text.encode())


def test_note_of_a_published_key_keeps_its_key_id() -> None:
    # Key and id of the Go checksum database, sum.golang.org+033de0ae+...
    key = note.parse_verifier_key("sum.golang.org+033de0ae+Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8")
    assert note.verifier_key("sum.golang.org", key).split("+")[1] == "033de0ae"


@pytest.mark.parametrize("head", [True, False])
def test_checkpoint_and_head_never_pass_for_each_other(head: bool) -> None:
    signed = note.sign(STATED, KEY, head=head)
    assert note.verify(signed, PUBLIC, head=head) == STATED
    with pytest.raises(NoteError):
        note.verify(signed, PUBLIC, head=not head)


def test_every_changed_byte_of_a_head_is_refused() -> None:
    signed = note.sign(STATED, KEY, head=True).encode()
    for i in range(len(signed)):
        changed = bytes([*signed[:i], signed[i] ^ 1, *signed[i + 1 :]])
        with pytest.raises(NoteError):
            note.verify(changed.decode("utf-8", errors="replace"), PUBLIC, head=True)


def test_signature_of_a_witness_beside_ours_is_left_alone() -> None:
    signed = note.sign(STATED, KEY, head=False)
    text = signed.rpartition("\n\n")[0]
    witnessed = (
        f"{text}\n\n\u2014 witness.example {base64.b64encode(bytes(76)).decode()}\n" + signed.split("\n\n")[1]
    )
    assert note.verify(witnessed, PUBLIC, head=False) == STATED


def test_head_of_the_longest_name_and_size_fits_a_sector() -> None:
    stated = Checkpoint("x" * 120, 2**63 - 1, bytes(32), bytes(32))
    signed = note.sign(stated, KEY, head=True)
    assert note.verify(signed, PUBLIC, head=True) == stated
    assert len(signed.encode()) <= 512


@pytest.mark.parametrize("name", ["", "two words", "a+b", "x" * 121, "zeile\n"])
def test_name_that_a_note_cannot_carry_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="audit origin"):
        note.check_origin(name)
