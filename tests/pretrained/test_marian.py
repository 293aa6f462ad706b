"""Marian's folders are loaded, run and written again, their tables shared or apart."""

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lineage_jax.pretrained import load
from lineage_jax.pretrained.folders import WHOLE, read_tensors
from tests.golden import make
from tests.models.parity import assert_close

FOLDER = pathlib.Path(make.__file__).parent
NAMES = ("marian", "marian_apart")
INPUTS = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")


def inputs(name: str) -> dict[str, np.ndarray]:
    arrays = load_file(FOLDER / name / "inputs.safetensors")
    return {key: arrays[key] for key in INPUTS}


@functools.cache
def outputs(name: str) -> dict[str, np.ndarray]:
    """Of the folder as it is."""
    return load(FOLDER / name)(**inputs(name))


@pytest.fixture
def folder(tmp_path):
    """One to be changed."""
    return pathlib.Path(shutil.copytree(FOLDER / "marian", tmp_path / "marian"))


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_called_by_their_names_gives_their_outputs(name):
    expected = load_file(FOLDER / name / "expected.safetensors")
    found, kept = outputs(name), inputs(name)["decoder_attention_mask"].astype(bool)
    assert_close(found["logits"][kept], expected["logits"][kept], 1e-4, "logits")
    last = expected[max(key for key in expected if key.startswith("decoder.hidden."))]
    assert_close(found["last_hidden_state"][kept], last[kept], 1e-4, "last hidden state")
    last = expected[max(key for key in expected if key.startswith("encoder.hidden."))]
    kept = inputs(name)["attention_mask"].astype(bool)
    assert_close(found["encoder_last_hidden_state"][kept], last[kept], 1e-4, "encoded")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_loaded_and_saved_has_the_same_tensors_bit_for_bit(name, tmp_path):
    loaded = load(FOLDER / name)
    loaded.save(tmp_path / "again")
    before, after = read_tensors(FOLDER / name), read_tensors(tmp_path / "again")
    assert set(before) == set(after)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert load(tmp_path / "again").config == loaded.config


def test_what_older_folders_hold_besides_is_understood(folder):
    expected = load(folder).params
    tensors = load_file(folder / WHOLE)
    table = tensors.pop("model.shared.weight")
    again = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
    tensors |= {name: table.copy() for name in (*again, "lm_head.weight")}
    tensors |= {f"model.{side}.embed_positions.weight": table for side in ("encoder", "decoder")}
    save_file(tensors, folder / WHOLE)
    jax.tree.map(np.testing.assert_array_equal, load(folder).params, expected)
    tensors["lm_head.weight"] = table + 1
    save_file(tensors, folder / WHOLE)
    with pytest.raises(ValueError, match=r"lm_head.weight and model.shared.weight are tied"):
        load(folder)


def test_without_a_head_there_are_hidden_states_alone(folder, tmp_path):
    tensors = load_file(folder / WHOLE)
    del tensors["final_logits_bias"]
    save_file({k.removeprefix("model."): x for k, x in tensors.items()}, folder / WHOLE)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["MarianModel"]}))
    loaded = load(folder)
    found = loaded(**inputs("marian"))
    assert set(found) == {"last_hidden_state", "encoder_last_hidden_state"}
    for name, array in found.items():
        assert_close(array, outputs("marian")[name], 1e-6, name)
    loaded.save(tmp_path / "again")
    assert "shared.weight" in read_tensors(tmp_path / "again")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(input_ids=[[1]]), "wanted decoder_input_ids, got input_ids"),
        (dict(input_ids=[[1]], decoder_input_ids=[[67]]), r"wanted decoder_input_ids in \[0, 67\)"),
        (
            dict(input_ids=[[1]], decoder_input_ids=[[1, 2], [3, 4]]),
            r"wanted inputs of as many rows each, got input_ids \(1, 1\), decoder",
        ),
        (
            dict(input_ids=[[1]], decoder_input_ids=[[1, 2]], decoder_attention_mask=[[1]]),
            r"wanted decoder_attention_mask of shape \(1, 2\), got \(1, 1\)",
        ),
    ],
)
def test_inputs_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        load(FOLDER / "marian")(**wrong)


@pytest.mark.oracle
@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_what_we_save_and_computes_the_same(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    load(FOLDER / name).save(tmp_path / "ours")
    model, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        theirs = model.eval()(**{k: torch.tensor(x).long() for k, x in inputs(name).items()})
    kept = inputs(name)["decoder_attention_mask"].astype(bool)
    found = outputs(name)["logits"]
    assert_close(found[kept], theirs.logits.numpy()[kept], 1e-4, "logits")
