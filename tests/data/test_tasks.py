"""Tasks are read from lines, and examples of them drawn from the rest and put side by side."""

import pytest

from lineage_jax.data.tasks import Example, context, draw_shots, read_task


def written(folder, text):
    path = folder / "task.jsonl"
    path.write_text(text)
    return str(path)


def test_answers_are_read_with_spaces_left_to_the_context(tmp_path):
    path = written(
        tmp_path,
        '{"prompt": "2 plus 3 is ", "answer": " 5"}\n\n{"prompt": "è", "answer": "e\'"}\n',
    )
    task = read_task(path)
    assert not task.chosen
    assert task.examples == (
        Example("2 plus 3 is", ("5",), 0, f"{path}:1"),
        Example("è", ("e'",), 0, f"{path}:3"),
    )
    assert task.examples[0].right == "5"


def test_choices_are_read(tmp_path):
    line = '{"prompt": "q", "choices": ["a", "b"], "answer": 1}\n'
    task = read_task(written(tmp_path, line + line))
    assert task.chosen and task.examples[0].choices == ("a", "b")
    assert task.examples[0].right == "b"


GOOD = '{"prompt": "q", "answer": "a"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD, "wanted two examples or more, came 1"),
        (GOOD + "{\n", r"task.jsonl:2: wanted .* came: Expecting"),
        (GOOD + "[1]\n", r"task.jsonl:2: wanted .* came \[1\]"),
        (GOOD + '{"prompt": "q", "answer": " "}\n', "task.jsonl:2: wanted"),
        (GOOD + '{"prompt": "q", "answer": 1}\n', "task.jsonl:2: wanted"),
        (GOOD + '{"prompt": "q", "choices": ["a", "b"], "answer": 2}\n', "task.jsonl:2: wanted"),
        (GOOD + '{"prompt": "q", "choices": ["a", "b"], "answer": true}\n', "jsonl:2: wanted"),
        (
            GOOD + '{"prompt": "q", "choices": ["a", "b"], "answer": 1}\n',
            "task.jsonl:2: wanted choices on every line of a task or on none",
        ),
    ],
)
def test_lines_that_are_no_examples_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_task(written(tmp_path, text))


def test_a_file_that_is_not_there_or_is_no_text_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.jsonl: no such file"):
        read_task(tmp_path / "nowhere.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"bytes.jsonl: wanted UTF-8 text"):
        read_task(tmp_path / "bytes.jsonl")


def test_examples_are_drawn_from_the_rest_and_more_of_them_begin_with_the_fewer():
    seen = set()
    for which in range(6):
        five = draw_shots(6, 5, which, seed=3)
        assert sorted([*five, which]) == list(range(6))
        assert draw_shots(6, 2, which, seed=3) == five[:2]
        seen.add(tuple(other - (other > which) for other in five))
    assert len(seen) > 1  # a draw of its own for each
    assert draw_shots(60, 5, 0, seed=3) != draw_shots(60, 5, 0, seed=4)
    with pytest.raises(ValueError, match="wanted 6 other examples in the context, the task has 5"):
        draw_shots(6, 6, 0, seed=3)


def test_a_context_has_a_line_for_each_example():
    one, two = (Example(p, ("x", a), 1, "") for p, a in (("p", "a"), ("q", "b")))
    assert context([one, two], "r") == "p a\nq b\nr"
    assert context([], "r") == "r"
