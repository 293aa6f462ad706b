"""What two milestones differ in is what their papers differ in."""

import pytest

from experiments.difference import difference
from lineage_jax import cli


def found(*names, part, **options):
    return {
        row.name: (row.left, row.right) for row in difference(*names, **options) if row.part == part
    }


def test_llama_has_no_biases_no_positions_a_gate_and_a_head_of_its_own():
    rows = found("gpt", "llama", part="parameters")
    gone = {name for name, (_, right) in rows.items() if not right}
    new = {name for name, (left, _) in rows.items() if not left}
    assert "positions/table" in gone and "final_norm/bias" in gone
    assert all("bias" in name or name == "positions/table" for name in gone)
    assert new == {"head/table", "blocks/mlp/gate/kernel"}


def test_settings_that_are_the_same_are_not_told():
    rows = found("gpt", "llama", part="settings")
    assert rows["rope_base"] == ("", "10000.0") and rows["local_window"] == ("None", "")
    assert "embed_dim" not in rows and "vocab_size" not in rows


def test_the_cache_of_grouped_queries_is_smaller_and_a_recurrence_has_none_that_grows():
    name = "bytes of cache a token"
    gpt, llama = found("gpt", "llama", part="cost")[name]
    # 4 layers, keys and values of 96 (of half as many heads: 48) float32 numbers.
    assert (gpt, llama) == (f"{4 * 2 * 96 * 4:,}", f"{4 * 2 * 48 * 4:,}")
    assert found("seq2seq", "transformer", part="cost")[name] == ("0", f"{2 * 2 * 64 * 4:,}")
    assert found("gpt", "bert", part="cost")[name][1] == ""


def test_the_command_prints_both_side_by_side(capsys):
    cli.main(["diff", "seq2seq", "bahdanau"])
    told = capsys.readouterr().out
    assert "RNNsearch (2014)" in told and "alignment_dim" in told and "align_key/kernel" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt"], "wanted `lineage diff PARENT CHILD`"),
        (["gpt", "lama"], "did you mean llama"),
        (["gpt", "llama", "--preset", "huge"], "gpt has no preset 'huge'; have tiny, "),
    ],
)
def test_what_is_not_there_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(["diff", *arguments])
    assert message in capsys.readouterr().err
