"""Folders of BERT, RoBERTa, ALBERT and DistilBERT, old and new, under each head, in and out."""

import dataclasses
import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.flax import save_file as save_arrays
from safetensors.numpy import load_file, save_file

from lineage_jax.pretrained import load
from lineage_jax.pretrained.folders import INDEX, WHOLE, read_tensors
from tests.golden import make
from tests.models.parity import assert_close

FOLDER = pathlib.Path(make.__file__).parent
NAMES = tuple(make.ENCODERS)


def inputs(name):
    arrays = load_file(FOLDER / name / "inputs.safetensors")
    return {key: arrays[key] for key in make.INPUTS if key in arrays}


@pytest.fixture
def copy(tmp_path):
    """A golden folder with other settings (None takes one out) and other tensors."""

    def make_copy(name, tensors=None, **settings):
        folder = pathlib.Path(shutil.copytree(FOLDER / name, tmp_path / name, dirs_exist_ok=True))
        path = folder / "config.json"
        config = json.loads((FOLDER / name / "config.json").read_text()) | settings
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        if tensors is not None:
            save_file({k: np.ascontiguousarray(x) for k, x in tensors.items()}, folder / WHOLE)
        return folder

    return make_copy


def tensors_of(name):
    return load_file(FOLDER / name / WHOLE)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_called_by_their_names_gives_their_outputs(name):
    found = load(FOLDER / name)(**inputs(name))
    expected = load_file(FOLDER / name / "expected.safetensors")
    expected["last_hidden_state"] = expected["hidden.3"]
    names = {key for key in expected if key.endswith("logits")} | {"last_hidden_state"}
    assert set(found) == names
    for key in names:
        assert found[key].dtype == np.float32
        assert_close(found[key], expected[key], 1e-4, key)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_loaded_and_saved_has_the_same_tensors_bit_for_bit(name, tmp_path):
    loaded = load(FOLDER / name)
    loaded.save(tmp_path / "again")
    before, after = read_tensors(FOLDER / name), read_tensors(tmp_path / "again")
    assert set(before) == set(after)
    for key, tensor in before.items():
        np.testing.assert_array_equal(after[key], tensor)
    assert load(tmp_path / "again").config == loaded.config


@pytest.mark.parametrize(("name", "pooled"), [("bert", True), ("bert_answers", False)])
def test_without_a_head_a_folder_may_have_a_pooler_or_none(copy, tmp_path, name, pooled):
    bare = {
        k.removeprefix("bert."): x for k, x in tensors_of(name).items() if k.startswith("bert.")
    }
    loaded = load(copy(name, bare, architectures=["BertModel"]))
    found = loaded(**inputs(name))
    expected = load_file(FOLDER / name / "expected.safetensors")
    assert_close(found.pop("last_hidden_state"), expected["hidden.3"], 1e-4, "hidden")
    assert list(found) == (["pooler_output"] if pooled else [])
    if pooled:
        first, kernel = expected["hidden.3"][:, 0], bare["pooler.dense.weight"]
        tanh = np.tanh(first @ kernel.T + bare["pooler.dense.bias"])
        assert_close(found["pooler_output"], tanh, 1e-5, "pooler")
    loaded.save(tmp_path / "again")
    assert set(read_tensors(tmp_path / "again")) == set(bare)


def test_the_folder_of_a_pretrained_bert_is_a_masked_language_model_too(copy):
    # bert-base-uncased as released says BertForMaskedLM, and holds a pooler and the other head.
    loaded = load(copy("bert", architectures=["BertForMaskedLM"]))
    expected = load_file(FOLDER / "bert" / "expected.safetensors")["prediction_logits"]
    assert_close(loaded(**inputs("bert"))["logits"], expected, 1e-4, "logits")


def test_names_and_buffers_of_old_folders_are_understood(copy):
    tensors = tensors_of("bert")
    renamed = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): x
        for k, x in tensors.items()
    }
    assert set(renamed) != set(tensors)
    renamed["bert.embeddings.position_ids"] = np.arange(16)[None]
    renamed["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    renamed["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]
    old, new = load(copy("bert", renamed)), load(FOLDER / "bert")
    jax.tree.map(np.testing.assert_array_equal, old.params, new.params)


def test_a_tied_bias_may_be_stored_under_its_other_name_alone(copy):
    tensors = tensors_of("roberta")
    tensors["lm_head.decoder.bias"] = tensors.pop("lm_head.bias")
    loaded = load(copy("roberta", tensors))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, load(FOLDER / "roberta").params)


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_what_is_tied_and_stored_twice_must_be_the_same(copy, which):
    tensors = tensors_of("bert")
    once = {"weight": "bert.embeddings.word_embeddings.weight", "bias": "cls.predictions.bias"}
    tensors[f"cls.predictions.decoder.{which}"] = tensors[once[which]] + 1
    with pytest.raises(ValueError, match=rf"decoder.{which} and {once[which]} are tied"):
        load(copy("bert", tensors))


UNTIED = {
    "bert": ("cls.predictions.decoder", "cls.predictions.bias"),
    "roberta": ("lm_head.decoder", "lm_head.bias"),
    "albert": ("predictions.decoder", "predictions.bias"),
    "distilbert": ("vocab_projector", "vocab_projector.bias"),
}


@pytest.mark.parametrize("name", UNTIED)
def test_a_head_that_is_not_tied_scores_with_its_own_table_and_bias(copy, tmp_path, name):
    tensors, (head, bias) = tensors_of(name), UNTIED[name]
    table = tensors[f"{name}.embeddings.word_embeddings.weight"]
    used = np.linspace(-1, 1, 67, dtype=np.float32)
    unused = tensors[bias]
    tensors |= {f"{head}.weight": -2 * table, f"{head}.bias": used}
    loaded = load(copy(name, tensors, tie_word_embeddings=False))
    key = "prediction_logits" if name in ("bert", "albert") else "logits"
    tied = load_file(FOLDER / name / "expected.safetensors")[key]
    assert_close(loaded(**inputs(name))[key], -2 * (tied - unused) + used, 1e-4, key)
    loaded.save(tmp_path / "again")
    again = read_tensors(tmp_path / "again")
    assert set(again) == set(tensors)
    np.testing.assert_array_equal(again[f"{head}.bias"], used)
    # Older folders hold one bias, under the other name.
    if bias != f"{head}.bias":
        old = {k: x for k, x in tensors.items() if k != f"{head}.bias"} | {bias: used}
        again = load(copy(name, old, tie_word_embeddings=False))
        jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


def test_bfloat16_stays_bfloat16_and_is_computed_with_in_float32(copy, tmp_path):
    folder = copy("albert")
    tensors = {k: x.astype(ml_dtypes.bfloat16) for k, x in tensors_of("albert").items()}
    save_arrays({k: jax.numpy.asarray(x) for k, x in tensors.items()}, folder / WHOLE)
    loaded = load(folder)
    assert loaded.config.param_dtype == "bfloat16" and loaded.config.dtype == "float32"
    found = loaded(**inputs("albert"))
    loaded.save(tmp_path / "again")
    assert {x.dtype.name for x in read_tensors(tmp_path / "again").values()} == {"bfloat16"}
    coarse = dataclasses.replace(loaded.config, dtype="bfloat16")
    rounded = dataclasses.replace(loaded, module=loaded.architecture.module(coarse))
    rounded = rounded(**inputs("albert"))
    whole = load(copy("albert", {k: x.astype(np.float32) for k, x in tensors.items()}))
    for key, x in whole(**inputs("albert")).items():
        assert_close(found[key], x, 1e-5, key)  # another program, which sums in another order
        assert np.abs(rounded[key] - x).max() > 1e-3 * np.abs(x).max()


def test_labels_are_counted_by_their_names_where_they_have_some(copy, tmp_path):
    names = {str(i): name for i, name in enumerate(("ant", "bee", "cat", "dog"))}
    loaded = load(copy("roberta_classifier", num_labels=None, id2label=names))
    assert loaded.config.num_labels == 4
    loaded.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["id2label"] == names


def test_roberta_counts_its_positions_and_takes_others(copy):
    arrays = inputs("roberta")
    loaded = load(FOLDER / "roberta")
    kept = arrays["attention_mask"].astype(bool)
    positions = np.where(kept, kept.cumsum(1) + 3, 3)
    given = loaded(**arrays, position_ids=positions)["logits"]
    np.testing.assert_array_equal(given, loaded(**arrays)["logits"])
    most = {**arrays, "position_ids": np.full_like(positions, 17)}
    assert np.isfinite(loaded(**most)["logits"]).all()
    with pytest.raises(ValueError, match=r"wanted position_ids in \[0, 18\), got 18 to 18"):
        loaded(**{**arrays, "position_ids": np.full_like(positions, 18)})
    with pytest.raises(ValueError, match="at most max_len=14 tokens a sequence, got 15"):
        loaded(input_ids=np.ones((1, 15), int))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("bert", dict(is_decoder=True), "wanted is_decoder False, got True"),
        ("bert", dict(add_cross_attention=True), "wanted add_cross_attention False, got True"),
        (
            "bert",
            dict(position_embedding_type="relative_key"),
            "position_embedding_type 'absolute'",
        ),
        ("bert", dict(hidden_act="silu"), "wanted hidden_act 'gelu' or .*, got 'silu'"),
        ("bert", dict(hidden_size=None), "config.json has no setting 'hidden_size'"),
        ("bert", dict(num_attention_heads=4), "num_heads=4 must divide embed_dim=15"),
        ("bert", dict(num_hidden_layers=2), "no parameter is called bert.encoder.layer.2"),
        (
            "bert",
            dict(architectures=["BertLMHeadModel"]),
            "wanted an architecture of BertForMasked",
        ),
        ("bert_answers", dict(num_labels=3), "wanted num_labels 2, start and end, got 3"),
        ("roberta", dict(pad_token_id=17), r"wanted pad_token_id in \[0, 17\), .*, got 17"),
        ("albert", dict(num_hidden_groups=3), "wanted num_hidden_groups 1, got 3"),
        ("albert", dict(inner_group_num=2), "wanted inner_group_num 1, got 2"),
        ("distilbert", dict(activation="tanh"), "wanted activation 'gelu' or .*, got 'tanh'"),
    ],
)
def test_a_config_that_is_not_one_of_ours_is_refused_in_one_line(copy, name, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(copy(name, **settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("bert", dict(token_type_ids=[[0, 3]]), r"wanted token_type_ids in \[0, 3\), got 0 to 3"),
        ("bert", dict(position_ids=[[0, 16]]), r"wanted position_ids in \[0, 16\), got 0 to 16"),
        ("distilbert", dict(token_type_ids=[[0, 0]]), "no input is called 'token_type_ids'"),
    ],
)
def test_inputs_that_make_no_sense_are_refused(name, wrong, message):
    with pytest.raises(ValueError, match=message):
        load(FOLDER / name)(input_ids=[[1, 2]], **wrong)


CLASSES = [
    *["BertModel", "BertForMaskedLM", "BertForPreTraining", "BertForNextSentencePrediction"],
    *["RobertaModel", "RobertaForMaskedLM"],
    *["AlbertModel", "AlbertForMaskedLM", "AlbertForPreTraining"],
    *["DistilBertModel", "DistilBertForMaskedLM"],
    *[
        f"{family}For{task}"
        for family in ("Bert", "Roberta", "Albert", "DistilBert")
        for task in ("SequenceClassification", "TokenClassification", "QuestionAnswering")
    ],
    *["BertModel without pooler", "RobertaModel without pooler", "AlbertModel without pooler"],
]


@pytest.mark.oracle
@pytest.mark.parametrize("name", CLASSES)
def test_any_class_in_any_shape_is_read_and_written_as_transformers_has_it(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    index = CLASSES.index(name)
    rng = np.random.default_rng(index)
    torch.manual_seed(index)
    name, *without = name.split(" without ")
    family = name.split("For")[0].removesuffix("Model")
    heads, (padding, num_types, num_layers) = int(rng.integers(1, 5)), rng.integers(1, 4, 3)
    sizes = [int(n) for n in (heads * rng.integers(2, 6), rng.integers(3, 40))]
    vocab_size, max_len = int(rng.integers(11, 90)), int(15 + padding + rng.integers(0, 4))
    activation, tied = str(rng.choice(["gelu", "gelu_new", "relu"])), bool(index % 2)
    labels = {} if name.endswith(("PreTraining", "Answering")) else {"num_labels": index % 4 + 1}
    shared = dict(vocab_size=vocab_size, tie_word_embeddings=tied, pad_token_id=int(padding))
    shared |= dict(max_position_embeddings=max_len, **labels)
    if family == "DistilBert":
        config = transformers.DistilBertConfig(
            dim=sizes[0], hidden_dim=sizes[1], n_heads=heads, n_layers=int(num_layers),
            activation=activation, **shared,
        )  # fmt: skip
    else:
        config = getattr(transformers, f"{family}Config")(
            hidden_size=sizes[0], intermediate_size=sizes[1], num_attention_heads=heads,
            num_hidden_layers=int(num_layers), hidden_act=activation, layer_norm_eps=1e-6,
            type_vocab_size=int(num_types), **shared,
            **({"embedding_size": 9} if family == "Albert" else {}),
        )  # fmt: skip
    extra = {"add_pooling_layer": False} if without else {}
    model = getattr(transformers, name)(config, **extra).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            scale = key.endswith("weight") and "norm" in key.lower()
            value.copy_(float(scale) + 0.3 * torch.randn_like(value))
    model.save_pretrained(tmp_path / "theirs", max_shard_size="1KB")
    assert (tmp_path / "theirs" / INDEX).is_file()

    kept = np.ones((4, 13), np.int64)
    kept[1, -4:] = kept[2, :3] = kept[3, 5:8] = 0
    arrays = {"input_ids": rng.integers(0, vocab_size, kept.shape), "attention_mask": kept}
    if family != "DistilBert":
        arrays["token_type_ids"] = rng.integers(0, num_types, kept.shape)
    if index % 3:
        arrays["position_ids"] = rng.integers(0, max_len, kept.shape)
    given = {key: torch.tensor(x) for key, x in arrays.items()}
    loaded = load(tmp_path / "theirs")
    found = loaded(**arrays)
    with torch.no_grad():
        expected = model(**given)
    for key, x in expected.items():
        assert_close(found[key], x.numpy(), 1e-4, key)

    loaded.save(tmp_path / "ours")
    again, report = type(model).from_pretrained(
        tmp_path / "ours", output_loading_info=True, **extra
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        for key, x in again.eval()(**given).items():
            np.testing.assert_array_equal(x.numpy(), expected[key].numpy())
