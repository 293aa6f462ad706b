"""A few settings give the same batches each time, quickly, and a record of what they are."""

import json
import math
import pathlib

import numpy as np
import pytest

from lineage_jax.data import TextData, load_text, train_bpe, write_tokens
from lineage_jax.data.tokens import join

SHAKESPEARE = pathlib.Path(__file__).parents[3] / "shared" / "data" / "tinyshakespeare.txt"
SMALL = {"seq_len": 16, "batch_size": 4}


@pytest.fixture
def folder(tmp_path):
    """Forty short files, enough to be split by document."""
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i:02}.txt").write_text(f"The number {i} is told here.\n" * 4)
    return tmp_path / "text"


def test_a_folder_of_text_becomes_batches_that_decode_to_it(folder):
    data = load_text(TextData(path=str(folder), heldout_fraction=0.2, **SMALL))
    assert data.name == "text" and data.vocab_size == 257
    assert data.train(0)["tokens"].shape == (4, 16)
    assert "number" in data.tokenizer.decode(data.heldout.stream.ids)
    assert data.num_train_tokens + data.num_heldout_tokens == sum(
        file.stat().st_size + 1 for file in folder.iterdir()
    )


def test_train_and_heldout_share_no_document(folder):
    data = load_text(TextData(path=str(folder), heldout_fraction=0.2, **SMALL))
    sides = [
        {document.tobytes() for document in batches.stream.documents}
        for batches in (data.train, data.heldout)
    ]
    assert all(sides) and not sides[0] & sides[1]


def test_bits_per_byte_of_a_uniform_guess_are_what_they_should_be(folder):
    data = load_text(TextData(path=str(folder), heldout_fraction=0.2, **SMALL))
    # Over bytes there are as many targets (all but the first byte, and the end) as bytes.
    assert data.bytes_per_token == 1
    assert math.log(256) / math.log(2) / data.bytes_per_token == pytest.approx(8)


def test_bpe_is_trained_once_on_the_training_side_and_kept(folder, tmp_path, monkeypatch):
    config = TextData(
        path=str(folder), tokenizer="bpe", vocab_size=280, cache_dir=str(tmp_path / "c"),
        heldout_fraction=0.2, **SMALL,
    )  # fmt: skip
    first = load_text(config)
    assert first.vocab_size <= 280 and first.bytes_per_token > 1.5
    texts = [first.tokenizer.decode(ids) for ids in first.train.stream.documents]
    assert first.tokenizer.digest == train_bpe(texts, 280).digest
    for name in ("train_tokenizers.train_bpe", "tokens.tokenize"):
        monkeypatch.setattr(f"lineage_jax.data.{name}", None)
    assert load_text(config).provenance() == first.provenance()


def test_a_damaged_cache_changes_nothing(folder, tmp_path):
    config = TextData(
        path=str(folder), tokenizer="bpe", vocab_size=270, cache_dir=str(tmp_path / "c"),
        heldout_fraction=0.2, **SMALL,
    )  # fmt: skip
    first = load_text(config)
    files = list((tmp_path / "c").iterdir())
    assert len(files) == 3  # the tokenizer, and the tokens of either side
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    assert load_text(config).provenance() == first.provenance()


def test_a_tokenizer_file_is_used_for_text_and_sizes_token_files(folder, tmp_path):
    train_bpe(["The number is told here."], 270).save(tmp_path / "t")
    settings = {"tokenizer": str(tmp_path / "t"), "cache_dir": str(tmp_path), **SMALL}
    text = load_text(TextData(path=str(folder), heldout_fraction=0.2, **settings))
    write_tokens(text.train.stream, tmp_path / "t.parquet")
    tokens = load_text(TextData(path=str(tmp_path / "t.parquet"), **settings))
    assert text.vocab_size == tokens.vocab_size
    assert tokens.tokenizer.digest == text.tokenizer.digest
    assert tokens.num_train_tokens + tokens.num_heldout_tokens == text.num_train_tokens


@pytest.mark.parametrize("name", ["t.array_record", "t.parquet", "folder/t.array_record-00000"])
def test_token_files_need_only_their_vocabulary(tmp_path, name):
    rng = np.random.default_rng(0)
    stream = join([rng.integers(0, 50, 20) for _ in range(60)], 50, None)
    write_tokens(stream, tmp_path / name)
    path = str(tmp_path / name.partition("/")[0])
    data = load_text(TextData(path=path, vocab_size=50, heldout_fraction=0.2, **SMALL))
    assert (data.tokenizer, data.bytes_per_token, data.vocab_size) == (None, None, 50)
    assert data.num_train_tokens + data.num_heldout_tokens == 1200
    json.dumps(data.provenance())
    with pytest.raises(ValueError, match=r"give --data\.vocab-size"):
        load_text(TextData(path=path, **SMALL))
    with pytest.raises(ValueError, match=r"document \d+: wanted ids in \[0, 20\)"):
        load_text(TextData(path=path, vocab_size=20, **SMALL))


def test_without_a_path_it_is_python_s_own_text():
    data = load_text(TextData())
    record = json.loads(json.dumps(data.provenance()))
    assert record["name"].startswith("python-3.")
    assert record["train"]["bytes"] > 20 * record["heldout"]["bytes"] / 2 > 1e6
    assert record["digest"] == data.digest
    assert data.heldout.num_batches * data.heldout.tokens_per_batch >= data.num_heldout_tokens - 1


def test_another_seed_is_another_order_of_the_same_data(folder):
    one, two = (load_text(TextData(path=str(folder), seed=seed, **SMALL)) for seed in (0, 1))
    assert one.digest == two.digest
    assert not np.array_equal(one.train(0)["tokens"], two.train(0)["tokens"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "a", "huggingface": "b"}, "came both"),
        ({"heldout_fraction": 0.0}, "0 < heldout_fraction < 1"),
        ({"seq_len": 0}, "seq_len >= 1"),
        ({"batch_size": -2}, "batch_size >= 1"),
        ({"seed": -1}, "seed >= 0"),
        ({"vocab_size": 1}, "vocab_size >= 2"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        TextData(**settings)


def test_bad_input_is_refused_with_what_to_do(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(FileNotFoundError, match=r"a\.txt: no such file or folder"):
        load_text(TextData(path=str(path)))
    path.write_text("One line.\n")
    with pytest.raises(ValueError, match="too short to hold out"):
        load_text(TextData(path=str(path)))
    path.write_text("One line that is somewhat longer than the other line was.\n")
    with pytest.raises(ValueError, match=r"give more text, or lower --data\.batch-size"):
        load_text(TextData(path=str(path)))
    path.write_text("Some lines.\n" * 99)
    with pytest.raises(ValueError, match=r"has 257 tokens, more than --data\.vocab-size 100"):
        load_text(TextData(path=str(path), vocab_size=100, **SMALL))
    with pytest.raises(ValueError, match="at least 257"):
        load_text(TextData(path=str(path), vocab_size=100, tokenizer="bpe", **SMALL))
    with pytest.raises(FileNotFoundError, match="no such tokenizer; wanted bytes, bpe"):
        load_text(TextData(path=str(path), tokenizer="bites", **SMALL))


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="tinyshakespeare is not here")
def test_the_last_tenth_of_tinyshakespeare_is_held_out():
    data = load_text(TextData(path=str(SHAKESPEARE), heldout_fraction=0.1))
    text = SHAKESPEARE.read_text()
    decode = data.tokenizer.decode
    assert decode(data.train.stream.ids) + decode(data.heldout.stream.ids) == text
    assert data.provenance()["heldout"]["bytes"] / len(text) == pytest.approx(0.1, abs=1e-4)


def test_the_package_imports_neither_jax_nor_the_heavy_readers():
    import subprocess
    import sys

    code = (
        "import sys, lineage_jax.data as d; "
        "heavy = {'jax', 'grain', 'pyarrow', 'tokenizers', 'sentencepiece', 'datasets', "
        "'etils', 'babel', 'num2words'} & set(sys.modules);"
        "sys.exit(' '.join(sorted(heavy)) or 0)"
    )
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_setting_is_an_option_of_the_command_line_with_its_help(capsys):
    import tyro

    parsed = tyro.cli(TextData, args=["--path", "x", "--seq-len", "8", "--vocab-size", "300"])
    assert parsed == TextData(path="x", seq_len=8, vocab_size=300)
    with pytest.raises(SystemExit):
        tyro.cli(TextData, args=["--help"])
    assert "trained on the training text" in " ".join(capsys.readouterr().out.split())
