"""A damaged shard of the data is named before the first step, never learned from."""

import random

import numpy as np
import pytest

from lineage_jax import cli
from lineage_jax.data import read_tokens, write_tokens
from lineage_jax.data.tokens import join

KINDS = pytest.mark.parametrize("kind", ["array_record", "parquet"])
VOCAB = 200


@pytest.fixture
def shards(tmp_path, kind):
    """Two shards of seven documents each, in a folder of their own."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    for shard in range(2):
        documents = [rng.integers(0, VOCAB, 500 + i) for i in range(7)]
        write_tokens(join(documents, VOCAB, None), folder / f"t.{kind}-{shard:05d}-of-00002")
    return sorted(folder.iterdir())


def flipped(content, bit):
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


@KINDS
@pytest.mark.parametrize("harm", ["truncated", "flipped"])
def test_a_damaged_shard_is_named_in_one_line_before_a_run_begins(
    shards, harm, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    whole = shards[1].read_bytes()
    end = whole.find(bytes(200)) % len(whole)  # an ArrayRecord is padded
    shards[1].write_bytes(flipped(whole, 8 * (end // 2)) if harm == "flipped" else whole[:-300])
    data = ["--data.path", str(shards[1].parent), "--data.vocab-size", str(VOCAB)]
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "gpt", *data, "--run-dir", str(tmp_path / "run")])
    assert stop.value.code == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert f"{shards[1]}: wanted" in told[0]
    assert "truncated or damaged" in told[0]
    assert not (tmp_path / "run").exists()


@KINDS
def test_a_flipped_bit_anywhere_is_refused_or_changes_no_token(shards):
    chance = random.Random(0)
    path, whole = shards[0], shards[0].read_bytes()
    size = whole.find(bytes(200)) % len(whole)
    intact, refused = read_tokens(path, VOCAB).digest, 0
    for bit in chance.sample(range(8 * size), 300):
        path.write_bytes(flipped(whole, bit))
        try:
            read = read_tokens(path, VOCAB)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert read.digest == intact
    assert refused
