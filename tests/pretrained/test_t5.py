"""T5's folders are loaded, run, written again and refused as they should be."""

import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.flax import save_file as save_bfloat16
from safetensors.numpy import load_file, save_file

from lineage_jax.pretrained import load
from lineage_jax.pretrained.folders import WHOLE, read_tensors, write_folder
from tests.golden import encoder_decoders as make
from tests.models.parity import assert_close

NAMES = ("t5", "t5_v1_1")
HEAD = "lm_head.weight"
INPUTS = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
OUTPUTS = {"logits", "last_hidden_state", "encoder_last_hidden_state"}
both = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(params=NAMES)
def folder(request, tmp_path):
    """Of either version, to be changed."""
    return pathlib.Path(shutil.copytree(make.FOLDER / request.param, tmp_path / request.param))


def inputs(folder: str = "t5", names=INPUTS) -> dict[str, np.ndarray]:
    """Rows whole, and padded on the right, on the left, and in the middle."""
    arrays = load_file(make.FOLDER / folder / "inputs.safetensors")
    return {name: arrays[name] for name in names}


def changed(folder: pathlib.Path, **settings) -> pathlib.Path:
    """The folder, its config.json with these settings; None takes one out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def rewritten(folder: pathlib.Path, **tensors) -> pathlib.Path:
    """The folder, with these tensors too, dots as double underscores; None takes one out."""
    named = {name.replace("__", "."): x for name, x in tensors.items()}
    whole = load_file(folder / WHOLE) | named
    save_file({name: x for name, x in whole.items() if x is not None}, folder / WHOLE)
    return folder


def without_head(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The folder as their class of that name has it."""
    kept = "encoder" if name == "T5EncoderModel" else ""
    tensors = {
        key: x
        for key, x in load_file(folder / WHOLE).items()
        if key != HEAD and (key == "shared.weight" or key.startswith(kept))
    }
    save_file(tensors, folder / WHOLE)
    return changed(folder, architectures=[name])


@both
def test_a_folder_called_by_their_names_gives_their_outputs(name):
    found = load(make.FOLDER / name)(**inputs(name))
    expected = load_file(make.FOLDER / name / "expected.safetensors")["logits"]
    kept = inputs(name)["decoder_attention_mask"].astype(bool)
    assert set(found) == OUTPUTS
    assert all(array.dtype == np.float32 for array in found.values())
    assert_close(found["logits"][kept], expected[kept], 1e-4, "logits")


def test_what_is_loaded_and_saved_has_the_same_tensors(folder, tmp_path):
    loaded = load(folder)
    loaded.save(tmp_path / "again")
    before, after = read_tensors(folder), read_tensors(tmp_path / "again")
    assert set(before) == set(after)
    for key, tensor in before.items():
        if key.endswith("Attention.q.weight"):  # scaled, and scaled back
            assert_close(after[key], np.asarray(tensor), 1e-6, key)
        else:
            np.testing.assert_array_equal(after[key], tensor)
    assert load(tmp_path / "again").config == loaded.config


def test_several_files_are_one_folder(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    write_folder(tmp_path / "shards", config, read_tensors(folder), shard_bytes=10_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    found, expected = (load(path)(**inputs()) for path in (tmp_path / "shards", folder))
    np.testing.assert_array_equal(found["logits"], expected["logits"])


def test_bfloat16_stays_bfloat16_and_is_computed_with_in_float32(folder, tmp_path):
    tensors = {k: x.astype(ml_dtypes.bfloat16) for k, x in read_tensors(folder).items()}
    save_bfloat16(tensors, folder / WHOLE)
    loaded = load(folder)
    assert loaded.config.param_dtype == "bfloat16" and loaded.config.dtype == "float32"
    assert loaded(**inputs())["logits"].dtype == np.float32
    loaded.save(tmp_path / "again")
    after = read_tensors(tmp_path / "again")
    assert all(x.dtype == ml_dtypes.bfloat16 for x in after.values())
    # Heads are 4 wide: to scale queries by 2 and back is exact.
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(after[key], tensor)


def test_tables_of_tokens_may_be_stored_again_and_old_buffers_are_ignored(folder):
    expected, table = load(folder)(**inputs()), load_file(folder / WHOLE)["shared.weight"]
    again = dict(encoder__embed_tokens__weight=table, decoder__embed_tokens__weight=table)
    old = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    rewritten(folder, **again, **{old: np.ones((7, 5), np.float32)})
    np.testing.assert_array_equal(load(folder)(**inputs())["logits"], expected["logits"])
    rewritten(folder, shared__weight=None)  # as some old folders have it
    np.testing.assert_array_equal(load(folder)(**inputs())["logits"], expected["logits"])
    rewritten(folder, decoder__embed_tokens__weight=table + 1)
    with pytest.raises(ValueError, match=r"decoder.embed_tokens.weight and shared.* differ"):
        load(folder)


def test_folders_of_transformers_5_say_of_the_scores_whether_they_are_scaled(folder):
    expected, scaled = load(folder)(**inputs())["logits"], folder.name == "t5"
    written = changed(folder, tie_word_embeddings=True, scale_decoder_outputs=scaled)
    np.testing.assert_array_equal(load(written)(**inputs())["logits"], expected)


def test_without_a_head_there_are_hidden_states_alone(folder, tmp_path):
    expected = load(folder)(**inputs())
    loaded = load(without_head(folder, "T5Model"))
    found = loaded(**inputs())
    assert set(found) == OUTPUTS - {"logits"}
    for name, array in found.items():
        assert_close(array, expected[name], 1e-6, name)
    loaded.save(tmp_path / "again")
    assert set(read_tensors(tmp_path / "again")) == set(read_tensors(folder))


def test_of_an_encoder_alone_there_is_what_it_returns(folder, tmp_path):
    expected = load(folder)(**inputs())["encoder_last_hidden_state"]
    loaded = load(without_head(folder, "T5EncoderModel"))
    assert set(loaded.params) == {"embed", "encoder"}
    found = loaded(**inputs(names=INPUTS[:2]))
    assert list(found) == ["last_hidden_state"]
    assert_close(found["last_hidden_state"], expected, 1e-6, "hidden")
    loaded.save(tmp_path / "again")
    assert set(read_tensors(tmp_path / "again")) == set(read_tensors(folder))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(feed_forward_proj="gelu"), "wanted feed_forward_proj 'relu' or 'gated-gelu' or .*"),
        (dict(is_decoder=True), "wanted is_decoder False, got True"),
        (dict(d_kv=None), "config.json has no setting 'd_kv'"),
        (
            dict(num_heads=4),
            r"wanted \S+.weight to make .*, \(15, 4, 4\) for a layer, got \(20, 15\)",
        ),
        (dict(num_layers=3), r"wanted tensors encoder.block.2.* and \d+ more, which are not"),
        (dict(num_decoder_layers=2), r"no parameter is called decoder.block.2"),
        (dict(num_decoder_layers=None), r"no parameter is called decoder.block.2"),
        (dict(relative_attention_max_distance=3), "max_distance must be more than num_buckets"),
        (dict(architectures=["T5ForTokenClassification"]), "wanted an architecture of T5ForCond"),
    ],
)
def test_a_config_that_is_not_one_of_ours_is_refused_in_one_line(folder, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(changed(folder, **settings))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_head_that_the_config_denies_or_the_folder_lacks_is_refused(tmp_path):
    for name, ties, message in (
        ("t5_v1_1", True, "lm_head.weight and shared.weight are tied, and differ"),
        ("t5", False, "wanted tensors lm_head.weight, which are not there"),
    ):
        folder = pathlib.Path(shutil.copytree(make.FOLDER / name, tmp_path / name))
        with pytest.raises(ValueError, match=message):
            load(changed(folder, tie_word_embeddings=ties))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(input_ids=[[1]]), "wanted decoder_input_ids, got input_ids"),
        (dict(input_ids=[[61]], decoder_input_ids=[[1]]), r"input_ids in \[0, 61\), got 61 to 61"),
        (dict(input_ids=[[1]], decoder_input_ids=[[-1]]), r"decoder_input_ids in \[0, 61\), got"),
        (dict(input_ids=[[1]], decoder_input_ids=[[1], [1]]), "inputs of as many rows each"),
    ],
)
def test_inputs_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        load(make.FOLDER / "t5")(**wrong)


def theirs(folder: pathlib.Path, name: str, arrays):
    """What their class of that name computes from a folder, which must have all of its tensors."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, report = getattr(transformers, name).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        found = model.eval()(**{k: torch.tensor(x).long() for k, x in arrays.items()})
    return model, {k: x.numpy() for k, x in found.items() if k in OUTPUTS}


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["T5ForConditionalGeneration", "T5Model", "T5EncoderModel"])
def test_transformers_loads_what_we_save_and_computes_the_same(folder, kind, tmp_path):
    if kind != "T5ForConditionalGeneration":
        without_head(folder, kind)
    loaded = load(folder)
    loaded.save(tmp_path / "ours")
    arrays = inputs(names=INPUTS[:2] if kind == "T5EncoderModel" else INPUTS)
    model, expected = theirs(tmp_path / "ours", kind, arrays)
    found = loaded(**arrays)
    # With a head, they keep what it read to themselves.
    assert set(expected) == set(found) - ({"last_hidden_state"} if "logits" in found else set())
    source_kept, kept = (arrays[k].astype(bool) for k in (INPUTS[1], [*arrays][-1]))
    for name, array in expected.items():
        rows = source_kept if "encoder" in name else kept
        assert_close(found[name][rows], array[rows], 1e-4, name)
    # And back: what they save of it, we load.
    model.save_pretrained(tmp_path / "theirs")
    again = load(tmp_path / "theirs")(**arrays)
    for name, array in found.items():
        assert_close(again[name], array, 1e-6, name)


@pytest.mark.oracle
def test_mt5_is_version_1_1_under_another_name(tmp_path):
    folder = pathlib.Path(shutil.copytree(make.FOLDER / "t5_v1_1", tmp_path / "mt5"))
    changed(folder, model_type="mt5", feed_forward_proj=None)
    loaded = load(folder)
    loaded.save(tmp_path / "ours")
    _, expected = theirs(tmp_path / "ours", "MT5ForConditionalGeneration", inputs())
    kept = inputs()["decoder_attention_mask"].astype(bool)
    logits = loaded(**inputs())["logits"]
    assert_close(logits[kept], expected["logits"][kept], 1e-4, "logits")
