"""The runs table takes other people's data, says what it dropped, and writes what it read."""

import numpy as np
import pyarrow as pa
import pytest

from scaling.runs import read_curves, read_runs, write_curves, write_runs

TABLE = {
    "params": [1_000_000, 2_000_000, 4_000_000],
    "tokens": [20_000_000, 40_000_000, 80_000_000],
    "loss": [4.0, 3.5, 3.1],
}


def test_six_n_d_of_integer_columns_does_not_overflow():
    runs = read_runs({"params": [70_000_000_000], "tokens": [1_400_000_000_000], "loss": [1.9]})
    assert runs["flops"][0] == pytest.approx(6 * 7e10 * 1.4e12)  # 5.9e23 > 2^63
    assert runs.flops_convention == "6ND"


def test_unusable_rows_are_dropped_and_counted():
    runs = read_runs(
        {
            "params": [1e6, 2e6, 0, 4e6, 5e6, 6e6],
            "tokens": [1e7, 2e7, 3e7, 4e7, float("inf"), 6e7],
            "loss": [4.0, float("nan"), 3.0, 3.0, 3.0, 2.9],
            "diverged": [False, False, False, True, False, False],
        }
    )
    assert runs["params"].tolist() == [1e6, 6e6]
    assert dict(runs.dropped) == {
        "diverged": 1,
        "params is not positive": 1,
        "tokens is not a finite number": 1,
        "loss is not a finite number": 1,
    }


def test_shuffled_and_repeated_rows_give_the_same_table():
    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(3), [1, 1]])
    shuffled = {name: [values[i] for i in order] for name, values in TABLE.items()}
    assert read_runs(shuffled).table.equals(read_runs(TABLE).table)


def test_of_runs_with_the_same_size_and_tokens_the_best_learning_rate_stays():
    runs = read_runs(
        {
            "params": [1e6, 1e6, 1e6],
            "tokens": [1e7, 1e7, 1e7],
            "loss": [4.1, 3.9, 4.0],
            "lr": [1, 2, 3],
        }
    )
    assert (runs["loss"].tolist(), runs["lr"].tolist()) == ([3.9], [2.0])


def test_other_peoples_names_are_mapped_and_their_columns_kept():
    theirs = {"N": [1, 2], "D": [10, 20], "final_loss": [3.0, 2.0], "tokens": ["x", "y"]}
    runs = read_runs(theirs, params="N", tokens="D", loss="final_loss")
    assert runs["tokens"].tolist() == [10, 20]
    assert runs["tokens_original"].tolist() == ["x", "y"]
    assert runs["N"].tolist() == [1, 2]


def test_a_missing_column_is_named_with_those_that_exist():
    with pytest.raises(
        ValueError, match=r"no column 'loss' for loss: the table has params, tokens, los"
    ):
        read_runs({"params": [1], "tokens": [2], "los": [3]})


def test_flops_that_overflowed_are_made_anew_for_all_runs():
    runs = read_runs(TABLE | {"flops": [1.2e14, -8_281_067_541_502_099_456, 1.9e15]})
    assert runs.flops_convention == "6ND"
    np.testing.assert_allclose(runs["flops"], 6 * runs["params"] * runs["tokens"])
    assert "1 values of flops are not positive" in runs.warnings[0]


def test_a_table_of_nothing_but_nan_is_refused_in_one_line():
    with pytest.raises(
        ValueError, match=r"no usable rows are left: 3 rows: loss is not a finite"
    ) as error:
        read_runs(TABLE | {"loss": [float("nan")] * 3})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("expression", "kept"),
    [
        ("params>1e6 and tokens<8e7", [2e6]),
        ("not loss < 3.5", [1e6, 2e6]),
        ("1e6 < params <= 4e6", [2e6, 4e6]),
        ("tokens/params == 20 and note == 'b'", [2e6]),
        ("note != 'a' or loss > 3.9", [1e6, 2e6, 4e6]),
        ("-loss > -3.2", [4e6]),
    ],
)
def test_an_expression_chooses_rows(expression, kept):
    runs = read_runs(TABLE | {"note": ["a", "b", "c"]}, where=expression)
    assert runs["params"].tolist() == kept


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "(lambda: 1)()",
        "params.__class__",
        "[1][0]",
        "1 if 1 else 2",
    ],
)
def test_an_expression_runs_no_code(expression):
    with pytest.raises(ValueError, match="not allowed"):
        read_runs(TABLE, where=expression)


def test_a_typo_in_an_expression_suggests_the_column():
    with pytest.raises(
        ValueError, match=r"no column 'parms' in 'parms>1': did you mean 'params'\?"
    ):
        read_runs(TABLE, where="parms>1")
    with pytest.raises(ValueError, match="cannot read the expression"):
        read_runs(TABLE, where="params >")
    with pytest.raises(ValueError, match="compares a number with text"):
        read_runs(TABLE | {"note": ["a", "b", "c"]}, where="note > 3")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_reads_back_bit_for_bit_and_writes_the_same_bytes(tmp_path, suffix):
    loss = [1 / 3, 0.1 + 0.2, np.nextafter(2.0, 3)]
    runs = read_runs(TABLE | {"loss": loss, "run_id": ["a", 'b,"c"', "d"], "decayed": [True] * 3})
    write_runs(runs, tmp_path / f"one.{suffix}")
    write_runs(runs, tmp_path / f"two.{suffix}")
    again = read_runs(tmp_path / f"one.{suffix}")
    assert again["loss"].tolist() == loss
    assert again["run_id"].tolist() == ["a", 'b,"c"', "d"]
    one, two = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in ("one", "two"))
    assert one == two
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"one.{suffix}", f"two.{suffix}"]


def test_json_lines_with_holes_are_read_and_a_bad_line_is_named(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text(
        '{"params": 1e6, "tokens": "2e7", "loss": 3}\n\n{"params": 2, "tokens": 5, "loss": null}\n'
    )
    runs = read_runs(path)
    assert (len(runs), runs["tokens"][0], runs.dropped[0][1]) == (1, 2e7, 1)
    path.write_text('{"params": 1}\n{"params": \n')
    with pytest.raises(ValueError, match=r"runs\.jsonl, line 2: not JSON"):
        read_runs(path)


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"params,tokens,loss\n", "no rows"),
        ("a.csv", b"\xff\xfe\x00\x01,\x02\n\x03", "not readable as csv"),
        ("a.jsonl", b"\xff\xfe", "not UTF-8"),
        ("a.parquet", b"junk that is no parquet", "not readable as parquet"),
        ("a.txt", b"hello", r"wanted a \.csv, \.parquet or \.jsonl"),
    ],
)
def test_a_bad_file_is_refused_in_one_line_that_names_it(tmp_path, name, content, wanted):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=wanted) as error:
        read_runs(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*gone\.csv"):
        read_runs(tmp_path / "gone.csv")


def test_curves_need_their_five_columns(tmp_path):
    curves = pa.table({"run_id": ["a"], "step": [1], "tokens": [8], "flops": [48.0], "loss": [3.0]})
    write_curves(curves, tmp_path / "curves.parquet")
    assert read_curves(tmp_path / "curves.parquet").equals(curves)
    with pytest.raises(ValueError, match="missing flops"):
        write_curves(curves.drop_columns(["flops"]), tmp_path / "curves.csv")


def test_what_others_call_the_columns_is_understood_and_said():
    runs = read_runs(
        {"N": ["70M", "1.5B"], "train_tokens": ["1.4T", "2e9"], "val/loss": [2.0, 2.5]}
    )
    assert list(runs["params"]) == [1.5e9, 7e7]  # by rising FLOPs
    assert list(runs["tokens"]) == [2e9, 1.4e12]
    assert "no column 'params': it is read from 'N'" in runs.warnings
    with pytest.raises(ValueError, match="no column 'loss' for loss"):
        read_runs({"N": [1e6], "D": [1e7], "val_loss": [2.0], "test_loss": [2.1]})
