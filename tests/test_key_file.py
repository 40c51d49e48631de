"""Files with API keys, whatever is in them: keys that a client can send, or one line that says what to mend."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from starlette.datastructures import Headers

from serving.key_file import read_keys
from vllm_ext.errors import UsageError

KEYS = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1).filter(lambda key: key[0] != "#")


def read(content: bytes) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys"
        file.write_bytes(content)
        return read_keys(file)


@settings(deadline=None)
@given(st.lists(KEYS, min_size=1), st.sampled_from(["\n", "\r\n"]))
def test_reads_back_the_keys_that_were_written(keys, end):
    assert read(end.join(["# keys", "", *(f"  {key}\t" for key in keys), ""]).encode()) == keys


@settings(deadline=None)
@given(st.binary() | st.text().map(str.encode))
@example(b"one\x0ctwo")
@example("one\x85two".encode())
@example("\ufeffkey".encode())
@example("schlüssel".encode())
@example(b"one two")
@example(b"\x00")
@example(b"\xff\xfe")
def test_whatever_is_in_it_a_key_is_a_whole_line_that_a_header_can_carry(content):
    keys, complaint = [], None
    try:
        keys = read(content)
    except UsageError as error:
        complaint = str(error)
    assert bool(keys) is (complaint is None)
    if complaint is not None:
        assert "write one key a line" in complaint
        assert "\n" not in complaint
        return
    lines = [line.strip(b" \t") for line in content.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")]
    assert [key.encode() for key in keys] == [line for line in lines if line and not line.startswith(b"#")]
    for key in keys:
        assert Headers(raw=[(b"authorization", f"Bearer {key}".encode("latin-1"))])["authorization"].split() == [
            "Bearer",
            key,
        ]


def test_the_line_is_named_and_the_key_is_not(tmp_path):
    (tmp_path / "keys").write_text("good\n# ü\nsecret-é\n")
    with pytest.raises(UsageError, match=r"line 3 has U\+00E9") as caught:
        read_keys(tmp_path / "keys")
    assert "secret" not in str(caught.value)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read_keys(tmp_path)
