"""A model that was trained on text learns labels: its weights, its tokenizer, and a new head."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from experiments import bert, gpt, saved
from experiments.classification import begun
from experiments.evaluation import EvaluateOptions, evaluate
from lineage_jax import cli
from lineage_jax.data.tokenizers import ByteTokenizer
from lineage_jax.data.train_tokenizers import train_bpe, train_tokenizer
from lineage_jax.pretrained import load
from tests.models.parity import FOLDER

WORDS = {"cold": ("ice", "snow", "frost"), "hot": ("fire", "sun", "coal")}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Texts that one word tells apart."""
    rng = np.random.default_rng(0)
    lines = ["text,label"]
    for i in range(240):
        label = ("cold", "hot")[i % 2]
        lines.append(f"{i} of {rng.choice(WORDS[label])},{label}")
    path = tmp_path_factory.mktemp("table") / "texts.csv"
    path.write_text("\n".join(lines))
    return str(path)


def fresh(**tables):
    """Parameters of zeros, of these sizes, with the given tables in them."""
    return {"body": {"table": jnp.zeros((5, 2)), "kernel": jnp.zeros((2, 3)), **tables},
            "head": {"kernel": jnp.ones((2, 4))}}  # fmt: skip


def test_what_was_learnt_goes_on_and_the_rest_begins_anew():
    learnt = {"body": {"table": np.full((5, 2), 2.0), "kernel": np.full((2, 3), 3.0)}}
    found = begun(fresh(), learnt)
    assert (found["body"]["table"] == 2).all() and (found["body"]["kernel"] == 3).all()
    assert (found["head"]["kernel"] == 1).all()


def test_a_table_with_more_words_goes_on_with_its_old_rows():
    found = begun(fresh(), {"body": {"table": np.full((3, 2), 2.0)}})
    np.testing.assert_array_equal(found["body"]["table"][:, 0], [2, 2, 2, 0, 0])


@pytest.mark.parametrize(
    ("learnt", "message"),
    [
        ({"boddy": {}}, "no parameters called boddy"),
        ({"body": {"kernel": np.zeros((2, 2))}}, r"body/kernel: wanted shape \(2, 3\)"),
        ({"body": {"kernel": np.zeros((1, 3))}}, r"body/kernel: wanted shape \(2, 3\)"),
        ({"body": {"table": np.zeros((6, 2))}}, r"body/table: wanted shape \(5, 2\)"),
    ],
)
def test_what_is_not_the_models_is_refused(learnt, message):
    with pytest.raises(ValueError, match=message):
        begun(fresh(), learnt)


def test_the_papers_settings_of_fine_tuning():
    one, other = gpt.experiment("gpt1_classify"), bert.experiment("base_classify")
    assert (one.optimizer.learning_rate, one.data.batch_size) == (6.25e-5, 32)
    assert (one.language_weight, one.model.dropout_rate) == (0.5, 0.1)
    assert (other.optimizer.learning_rate, other.data.batch_size) == (2e-5, 32)
    assert one.optimizer.schedule == other.optimizer.schedule == "linear"


def test_marks_of_gpt_are_new_ids_and_those_of_bert_are_the_ones_it_knows():
    tokenizer = ByteTokenizer()
    marks = gpt.experiment("classify").marks(tokenizer)
    assert dataclasses.astuple(marks) == (257, 258, 259, 0)
    marks = bert.experiment("classify").marks(tokenizer)
    assert dataclasses.astuple(marks) == (258, 259, 259, 257)


def test_marks_of_a_folder_s_bert_are_its_tokenizer_s(tmp_path):
    theirs = train_tokenizer("wordpiece", ["some words and some more words"] * 3, 60)
    start = dataclasses.replace(bert.experiment("classify"), start_from=str(tmp_path))
    marks = start.marks(theirs)
    assert (marks.start, marks.between, marks.end) == (
        theirs.id_of("[CLS]"), theirs.id_of("[SEP]"), theirs.end_of_text
    )  # fmt: skip
    assert marks.padding == theirs.id_of("[PAD]") != marks.start
    with pytest.raises(ValueError, match=r"wanted a tokenizer with \[CLS\] and \[SEP\]"):
        start.marks(train_bpe(["none"], 260))


def test_texts_with_too_many_labels_or_tokens_are_refused(table):
    start = gpt.experiment("classify")
    data = dataclasses.replace(start.data, path=table, heldout_fraction=0.4)
    with pytest.raises(ValueError, match=r"has 2 labels, and the model 8; .*num-labels 2"):
        dataclasses.replace(start, data=data).task()
    long = dataclasses.replace(data, seq_len=129)
    with pytest.raises(ValueError, match=r"--data\.seq-len 129 are longer .* max_len=128"):
        dataclasses.replace(start, data=long).task()
    small = dataclasses.replace(start.model, vocab_size=250)
    with pytest.raises(ValueError, match=r"ids up to 259, .* take --model\.vocab-size 260"):
        dataclasses.replace(start, data=data, model=small).task()


def test_a_folder_of_hugging_face_s_settles_the_model_and_its_labels(table):
    start = gpt.experiment("classify")
    data = dataclasses.replace(start.data, path=table)
    settled = dataclasses.replace(start, data=data, start_from=str(FOLDER / "gpt1")).settled()
    model, theirs = settled.model, load(FOLDER / "gpt1").config
    assert (model.vocab_size, model.num_labels, model.dropout_rate) == (67 + 3, 2, 0.1)
    assert (model.num_layers, model.norm_first) == (theirs.num_layers, False)
    assert settled.settled() == settled
    with pytest.raises(ValueError, match=r"bert: wanted a model of GPTConfig, got BertConfig"):
        dataclasses.replace(start, data=data, start_from=str(FOLDER / "bert")).settled()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        dataclasses.replace(start, data=data, start_from="nowhere").settled()


@pytest.fixture(scope="module")
def runs(table, tmp_path_factory):
    """Folders of runs: each model on a little text, and then on labels."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text("\n".join(f"{i} of ice, snow, fire." for i in range(400)))
    model = ["--model.num-layers=2", "--model.embed-dim=32", "--train.steps-per-call=1"]
    for name in ("gpt", "bert"):
        text = ["--data.path", str(folder / "text.txt"), "--data.heldout-fraction=0.1"]
        if name == "bert":
            text += ["--masking.pairs=none"]
        cli.main(["train", name, "--run-dir", str(folder / name), *model, *text,
                  "--data.batch-size=8", "--train.num-steps=3"])  # fmt: skip
        cli.main(["train", name, "--preset", "classify", "--start-from", str(folder / name),
                  "--run-dir", str(folder / f"{name}-labels"), "--data.path", table,
                  "--data.seq-len=24", "--train.num-steps=60", "--train.steps-per-call=5",
                  "--optimizer.learning-rate=5e-3"])  # fmt: skip
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "bert"])
def test_a_run_that_learnt_text_learns_labels_and_is_evaluated_by_its_accuracy(name, runs, capsys):
    found = evaluate(str(runs / f"{name}-labels"), EvaluateOptions())
    assert found["accuracy"] > 0.9 and found["loss"] < 0.4 and "perplexity" not in found
    run = saved.open_run(runs / f"{name}-labels")
    assert (run.experiment.model.num_layers, run.experiment.model.embed_dim) == (2, 32)
    assert run.experiment.model.num_labels == 2
    record = json.loads((runs / f"{name}-labels" / "env.json").read_text())
    assert record["data"]["labels"] == ["cold", "hot"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "bert"])
def test_fine_tuning_begins_with_the_weights_of_the_run(name, runs):
    experiment = saved.open_run(runs / f"{name}-labels").experiment
    task = experiment.task()
    mesh = saved.sharding.make_mesh(saved.sharding.MeshConfig(data=1), jax.devices()[:1])
    begins = task.first_state(task.program.initial_state(mesh, 0)).params
    learnt = saved.open_run(runs / name).params
    learnt = {"gpt": learnt} if name == "gpt" else {"encoder": learnt["encoder"]}
    begins = flatten_dict(begins, sep="/")
    for path, leaf in flatten_dict(learnt, sep="/").items():
        np.testing.assert_array_equal(begins[path][: len(leaf)], leaf, err_msg=path)
    assert begins["classifier/kernel"].shape == (32, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "bert"])
def test_a_classifier_says_in_one_line_that_it_is_none_to_talk_to(name, runs, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", str(runs / f"{name}-labels")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert "wanted a language model, got a classifier" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "theirs"),
    [("gpt", "GPT2ForSequenceClassification"), ("bert", "BertForSequenceClassification")],
)
def test_a_classifier_becomes_a_folder_of_hugging_face_s_with_its_labels(
    name, theirs, runs, capsys
):
    folder = runs / f"{name}-folder"
    cli.main(["convert", str(runs / f"{name}-labels"), str(folder)])
    assert theirs in capsys.readouterr().out
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "cold", "1": "hot"}
    experiment = saved.open_run(runs / f"{name}-labels").experiment
    task, loaded, right = experiment.task(), load(folder), []
    for batch in task.eval_batches(np.arange(32)):
        found = loaded(input_ids=batch["tokens"], attention_mask=batch["mask"].astype(np.int32))
        same = found["logits"].argmax(-1) == batch["label"]
        right += same[batch["mask"].any(-1)].tolist()
    measured = evaluate(str(runs / f"{name}-labels"), EvaluateOptions())["accuracy"]
    assert np.mean(right) == pytest.approx(measured)


@pytest.mark.slow
def test_a_classifier_that_was_stopped_goes_on_and_refuses_another_beginning(runs, table, capsys):
    folder = runs / "gpt-labels"
    again = ["train", "gpt", "--preset", "classify", "--run-dir", str(folder), "--resume",
             "--data.path", table, "--data.seq-len=24", "--train.num-steps=62",
             "--train.steps-per-call=1", "--optimizer.learning-rate=5e-3"]  # fmt: skip
    with pytest.raises(SystemExit):
        cli.main([*again, "--start-from", str(runs / "bert")])
    assert "wanted a model of GPTConfig" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*again, "--model.num-layers=2", "--model.embed-dim=32"])
    assert "start_from was" in capsys.readouterr().err
    cli.main([*again, "--start-from", str(runs / "gpt")])
    assert saved.open_run(folder).step == 62
