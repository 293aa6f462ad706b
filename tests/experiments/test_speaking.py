"""Runs and folders speak: text goes on, sentences are translated, weights leave and come back."""

import dataclasses
import importlib
import io
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from experiments import bert, gpt, saved, speaking, t5, transformer
from experiments.attention_maps import attention_maps
from experiments.converting import convert, of_run
from experiments.evaluation import EvaluateOptions, evaluate
from experiments.filling import FillOptions, fill, sentinel
from experiments.speaking import GenerateOptions
from experiments.translating import Translator
from lineage_jax import cli
from lineage_jax.data.tokenizers import ByteTokenizer
from lineage_jax.models.transformer import StackConfig
from lineage_jax.pretrained import load

pytestmark = pytest.mark.slow


def trained(experiment, name, folder, **model):
    """The folder of a run of two steps."""
    settings = [
        f"--{part}.{key.replace('_', '-')}={value}"
        for part, values in (("model", model), ("train", dict(num_steps=2, steps_per_call=1)))
        for key, value in values.items()
    ]
    cli.main(["train", name, "--run-dir", str(folder), *settings])
    return str(folder)


@pytest.fixture(scope="module")
def gpt_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "gpt"
    return trained(gpt, "gpt", folder, num_layers=2, embed_dim=32)


@pytest.fixture(scope="module")
def transformer_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "transformer"
    sizes = {
        f"{side}.{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("num-layers", 1), ("mlp-dim", 32))
    }
    return trained(transformer, "transformer", folder, embed_dim=32, norm_epsilon=1e-5, **sizes)


@pytest.fixture(scope="module")
def bert_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "bert"
    return trained(bert, "bert", folder, num_layers=1, embed_dim=32)


@pytest.fixture(scope="module")
def t5_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "t5"
    sizes = dict(num_encoder_layers=1, num_decoder_layers=1, embed_dim=32, mlp_dim=32)
    return trained(t5, "t5", folder, **sizes)


def told(folder, **options) -> str:
    return "".join(speaking.generate_text(folder, GenerateOptions(**options)))


def test_a_run_is_opened_with_its_settings_and_its_last_parameters(gpt_run, transformer_run):
    run = saved.open_run(gpt_run)
    assert (run.milestone, run.step, run.experiment.model.embed_dim) == ("gpt", 2, 32)
    assert run.params["embed"]["table"].shape == (257, 32)
    run = saved.open_run(transformer_run)
    assert run.experiment.model.decoder == StackConfig(num_layers=1, num_heads=4, mlp_dim=32)


def test_text_goes_on_the_same_from_the_same_seed_alone_or_beside_others(gpt_run):
    likeliest = dict(num_tokens=12, temperature=0.0)
    alone = told(gpt_run, prompt=("if x",), **likeliest)
    assert alone.startswith("if x") and alone == told(gpt_run, prompt=("if x",), **likeliest)
    both = told(gpt_run, prompt=("if x", "def a_longer_one"), **likeliest)
    assert both.startswith(alone + "\n\ndef a_longer_one")
    drawn = [told(gpt_run, num_tokens=12, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_run_becomes_a_folder_of_hugging_face_s_that_says_the_same(gpt_run, tmp_path, capsys):
    folder = str(tmp_path / "hf")
    cli.main(["convert", gpt_run, folder])
    assert "GPT2LMHeadModel" in capsys.readouterr().out
    options = dict(prompt=("if x",), num_tokens=12, temperature=0.0)
    assert told(folder, **options) == told(gpt_run, **options)
    again = str(tmp_path / "again")
    cli.main(["convert", folder, again])
    ids = np.asarray([[1, 2, 3]])
    np.testing.assert_array_equal(
        load(folder)(input_ids=ids)["logits"], load(again)(input_ids=ids)["logits"]
    )
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["eos_token_id"] == ByteTokenizer().end_of_text


@pytest.mark.parametrize("name", ["bert", "roberta", "albert", "distilbert", "t5"])
def test_other_runs_become_folders_that_compute_the_same(name, tmp_path):
    experiment = importlib.import_module(f"experiments.{name}").experiment()
    boxed, _ = jax.jit(experiment.program().init)(jax.random.key(0))
    run = saved.Saved(name, experiment, 0, nn.meta.unbox(boxed))
    made = of_run(run)
    made.save(tmp_path / "hf")
    ids = {"input_ids": [[5, 6, 7]]} | ({"decoder_input_ids": [[8]]} if name == "t5" else {})
    expected, found = made(**ids), load(tmp_path / "hf")(**ids)
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=0, atol=1e-5)


def test_a_classifier_that_they_have_no_class_for_is_one_line():
    experiment = importlib.import_module("experiments.ulmfit").experiment("classify")
    run = saved.Saved("ulmfit", experiment, 0, {})
    with pytest.raises(ValueError, match="no class of theirs is a ClassifierConfig"):
        of_run(run)
    assert "a classifier, which tells labels apart" in str(speaking.no_language_model("it", run))


def test_sentences_are_translated_from_the_line_and_from_standard_input(
    transformer_run, monkeypatch, capsys
):
    cli.main(["translate", transformer_run, "--text", "one hundred", "--text", "two"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    monkeypatch.setattr("sys.stdin", io.StringIO("one hundred\ntwo\n"))
    cli.main(["translate", transformer_run])
    assert capsys.readouterr().out.splitlines() == lines


def test_an_encoder_names_the_likeliest_tokens_of_each_blank(bert_run, tmp_path, capsys):
    cli.main(["fill", bert_run, "--text", "if ___:\n    ___", "--count", "3"])
    text = "".join(capsys.readouterr().out)
    *filled, first, second = text.splitlines()
    assert "\n".join(filled).startswith("if ") and ":\n    " in "\n".join(filled)
    for line in (first, second):
        shares = [float(one) for one in re.findall(r"' (0\.\d+)", line)]
        assert len(shares) == 3 and shares == sorted(shares, reverse=True)
    convert(bert_run, tmp_path / "hf")  # bytes: no tokenizer of theirs has the marks
    assert fill(str(tmp_path / "hf"), FillOptions(text="if ___:\n    ___", count=3)) == [
        "\n".join(filled),
        first,
        second,
    ]


def test_t5_fills_blanks_with_what_it_writes_after_each_sentinel(monkeypatch, t5_run):
    translator = Translator.of(t5_run, saved.open_run(t5_run))
    first, second, third = (sentinel(translator, i) for i in range(3))
    assert (first, second) == (287, 286)
    read = []

    def written(self, rows, options):
        read.extend(rows)
        yield np.array([first, *b"cat", second, *b"mat", third])

    monkeypatch.setattr(Translator, "written", written)
    assert fill(t5_run, FillOptions(text="the ___ sat on the ___.")) == [
        "the [cat] sat on the [mat]."
    ]
    (row,) = read
    end = ByteTokenizer().end_of_text
    assert row.tolist() == [*b"the ", first, *b" sat on the ", second, *b".", end]


def test_t5_makes_text_of_text_and_shows_where_it_looks(t5_run, capsys):
    cli.main(["translate", t5_run, "--text", "one two", "--num-beams", "1"])
    assert capsys.readouterr().out.count("\n") >= 1
    maps = attention_maps(t5_run, "one", target="two")
    assert {one.name for one in maps} >= {"decoder cross attention", "encoder attention"}
    found = evaluate(t5_run, EvaluateOptions())
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_a_translator_becomes_marian(transformer_run, tmp_path):
    convert(transformer_run, tmp_path / "hf")
    run, ids = saved.open_run(transformer_run), np.asarray([[1, 2, 3]])
    loaded = load(tmp_path / "hf")
    found = loaded(input_ids=ids, decoder_input_ids=ids)["logits"]
    expected = speaking.TRANSLATORS[type(run.experiment.model)](run.experiment.model).apply(
        {"params": run.params}, jnp.asarray(ids), jnp.asarray(ids)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    convert(tmp_path / "hf", tmp_path / "again")
    ours = Translator.of(transformer_run, run)
    for folder in ("hf", "again"):
        theirs = Translator.of(str(tmp_path / folder), load(tmp_path / folder))
        for text in ("nine hundred and sixty-two", "four"):
            assert theirs.source(text).tolist() == ours.source(text).tolist()
        assert theirs.tokenizer.decode(range(20, 40)) == ours.tokenizer.decode(range(20, 40))


def test_a_translator_that_reads_backwards_has_no_class_of_theirs(tmp_path, monkeypatch):
    small = transformer.experiment("tiny")
    data = dataclasses.replace(small.data, reverse_source=True)
    run = saved.Saved("run", dataclasses.replace(small, data=data), 0, {})
    monkeypatch.setattr("experiments.converting.open_model", lambda folder: run)
    with pytest.raises(ValueError, match="run reads its source last to first, and no class"):
        convert("run", tmp_path / "hf")


@pytest.mark.parametrize(("name", "kinds"), [("gpt", 1), ("transformer", 3)])
def test_every_head_of_a_run_is_shown(gpt_run, transformer_run, name, kinds, tmp_path, capsys):
    folder = {"gpt": gpt_run, "transformer": transformer_run}[name]
    maps = attention_maps(folder, "one two", target=None if name == "gpt" else "un deux")
    assert len(maps) == kinds
    for one in maps:
        assert one.weights.shape[2:] == (len(one.queries), len(one.keys))
        np.testing.assert_allclose(one.weights.sum(-1), 1, rtol=1e-5)
    cli.main(["attention", folder, "--text", "one two", "--out", str(tmp_path / "page.html")])
    assert "heads" in capsys.readouterr().out and (tmp_path / "page.html").stat().st_size > 5000


def test_a_run_is_evaluated_as_it_was_in_training(gpt_run, capsys):
    cli.main(["evaluate", gpt_run, "--json"])
    found = json.loads(capsys.readouterr().out)
    written = (pathlib.Path(gpt_run) / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in written if "eval_loss" in line][-1]
    for name in ("loss", "accuracy", "bits_per_byte"):
        assert found[name] == pytest.approx(last[f"eval_{name}"], rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_text_and_translations_that_are_given_are_evaluated(
    gpt_run, transformer_run, tmp_path, capsys
):
    for name, lines in (("text.txt", "if x:"), ("en", "one\nfour"), ("fr", "un\nquatre")):
        (tmp_path / name).write_text(30 * (lines + "\n"))
    found = evaluate(gpt_run, EvaluateOptions(path=str(tmp_path / "text.txt")))
    # Bytes are its tokens; two steps from the start it guesses among 257.
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2))
    assert 0.5 * math.log(257) < found["loss"] < 1.5 * math.log(257)
    sides = EvaluateOptions(
        source_path=str(tmp_path / "en"), target_path=str(tmp_path / "fr"), num_beams=1
    )
    found = evaluate(transformer_run, sides)
    assert set(found) == {"bleu", "chrf"} and 0 <= found["bleu"] <= 100
    with pytest.raises(ValueError, match="wanted a translator, got GPTConfig"):
        evaluate(gpt_run, sides)


def test_text_is_told_in_whole_characters():
    tokenizer = ByteTokenizer()
    ids = [*tokenizer.encode("aé€𝄞z").tolist(), tokenizer.end_of_text, 65]
    pieces = list(speaking.pieces(tokenizer, iter(ids)))
    assert "".join(pieces) == "aé€𝄞z"
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "nowhere"], "nowhere: wanted a folder with a config.json in it"),
        (["generate"], "wanted `lineage generate FOLDER`"),
        (["generate", "{gpt}", "--num-tokens", "500"], "are longer than the model's max_len=128"),
        (["generate", "{gpt}", "--top-p", "2"], r"top_p must be in (0, 1], got 2.0"),
        (["translate", "{gpt}", "--text", "a"], "wanted a translator, got GPTConfig"),
        (["generate", "{transformer}"], "wanted a language model, got TransformerConfig"),
        (["fill", "{gpt}", "--text", "a ___"], "wanted an encoder or T5"),
        (["fill", "{gpt}", "--text", "a"], "wanted a text with a blank, ___, got 'a'"),
        (["convert", "{gpt}"], "wanted `lineage convert RUN_OR_FOLDER FOLDER`"),
        (["convert", "{gpt}", "{gpt}"], "config.json is there already"),
        (["translate", "{transformer}", "--text", 60 * "one "], "tokens, more than the 32 read"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    gpt_run, transformer_run, arguments, message, capsys
):
    filled = [one.format(gpt=gpt_run, transformer=transformer_run) for one in arguments]
    with pytest.raises(SystemExit) as caught:
        cli.main(filled)
    told = capsys.readouterr().err.strip()
    assert caught.value.code in (1, 2) and "\n" not in told and message in told


def test_settings_that_a_version_does_not_have_are_named(gpt_run):
    preset = gpt.experiment()
    values = dataclasses.asdict(preset)
    assert saved.filled(preset, json.loads(json.dumps(values))) == preset
    with pytest.raises(TypeError, match="colour"):
        saved.filled(preset, {"model": {"colour": 1}})
