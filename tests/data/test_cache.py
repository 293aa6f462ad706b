"""A cache is an optimisation: it never changes what is read, nor stops who cannot write it."""

import pytest

from lineage_jax.data.cache import cached, write_whole


def never():
    raise AssertionError("built again")


def test_what_was_built_once_is_not_built_again(tmp_path):
    path = tmp_path / "deep" / "x"
    assert cached(path, lambda: b"con\ntent") == b"con\ntent"
    assert cached(path, never) == b"con\ntent"


@pytest.mark.parametrize("position", [0, 40, 64, 65, -1])
def test_a_flipped_bit_anywhere_is_rebuilt_and_repaired(tmp_path, position):
    cached(tmp_path / "x", lambda: b"content")
    damaged = bytearray((tmp_path / "x").read_bytes())
    damaged[position] ^= 1
    (tmp_path / "x").write_bytes(damaged)
    assert cached(tmp_path / "x", lambda: b"anew") == b"anew"
    assert cached(tmp_path / "x", never) == b"anew"


def test_a_truncated_or_empty_cache_is_rebuilt(tmp_path):
    cached(tmp_path / "x", lambda: b"content")
    whole = (tmp_path / "x").read_bytes()
    for damaged in (whole[:-1], whole[:10], b""):
        (tmp_path / "x").write_bytes(damaged)
        assert cached(tmp_path / "x", lambda: b"content") == b"content"


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    assert cached(tmp_path / "file" / "x", lambda: b"content") == b"content"
    assert "not cached" in caplog.text


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_whole(tmp_path / "x", b"old")
    monkeypatch.setattr("pathlib.PurePath.with_name", None, raising=False)
    monkeypatch.undo()

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(type(tmp_path / "x"), "replace", fail)
    monkeypatch.setattr("etils.epath.gpath._GPath.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "x", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]  # no .tmp beside it
    assert (tmp_path / "x").read_bytes() == b"old"
