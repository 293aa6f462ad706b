"""Folders of theirs are loaded, run, written again and refused as they should be."""

import functools
import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.flax import save_file as save_bfloat16
from safetensors.numpy import load_file, save_file

from lineage_jax.pretrained import load
from lineage_jax.pretrained.folders import INDEX, WHOLE, read_tensors, write_folder
from tests.golden import make
from tests.models.parity import assert_close

FOLDER = pathlib.Path(make.__file__).parent
NAMES = ("gpt1", "gpt2", "gpt_neo", "llama", "llama_tied", "llama_scaled", "mistral")
INPUTS = ("input_ids", "attention_mask", "position_ids")


@pytest.fixture
def folder(tmp_path):
    """LLaMA's, to be broken."""
    return pathlib.Path(shutil.copytree(FOLDER / "llama", tmp_path / "llama"))


def inputs(name: str) -> dict[str, np.ndarray]:
    arrays = load_file(FOLDER / name / "inputs.safetensors")
    return {key: arrays[key] for key in INPUTS}


@functools.cache
def outputs(name: str) -> dict[str, np.ndarray]:
    """Of the folder as it is."""
    return load(FOLDER / name)(**inputs(name))


def changed(folder: pathlib.Path, **settings) -> pathlib.Path:
    """The folder, its config.json with these settings; None takes one out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_called_by_their_names_gives_their_outputs(name):
    found = outputs(name)
    expected = load_file(FOLDER / name / "expected.safetensors")["logits"]
    kept = inputs(name)["attention_mask"].astype(bool)
    assert set(found) == {"logits", "last_hidden_state"}
    assert all(array.dtype == np.float32 for array in found.values())
    assert_close(found["logits"][kept], expected[kept], 1e-4, "logits")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_loaded_and_saved_has_the_same_tensors_bit_for_bit(name, tmp_path):
    loaded = load(FOLDER / name)
    loaded.save(tmp_path / "again")
    before, after = read_tensors(FOLDER / name), read_tensors(tmp_path / "again")
    assert set(before) == set(after)
    for key, tensor in before.items():
        if name == "gpt_neo" and "q_proj" in key:  # scaled, and scaled back
            assert_close(after[key], np.asarray(tensor), 1e-6, key)
        else:
            np.testing.assert_array_equal(after[key], tensor)
    again = load(tmp_path / "again")
    assert again.config == loaded.config


def test_several_files_are_one_folder(tmp_path):
    tensors = read_tensors(FOLDER / "llama")
    config = json.loads((FOLDER / "llama" / "config.json").read_text())
    write_folder(tmp_path / "shards", config, tensors, shard_bytes=10_000)
    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(
        sum(tensor.nbytes for tensor in load_file(tmp_path / "shards" / file).values()) <= 10_000
        for file in files
    )
    expected, found = (
        load(path)(**inputs("llama")) for path in (FOLDER / "llama", tmp_path / "shards")
    )
    np.testing.assert_array_equal(found["logits"], expected["logits"])


def test_bfloat16_stays_bfloat16_and_is_computed_with_in_float32(folder, tmp_path):
    tensors = {k: x.astype(ml_dtypes.bfloat16) for k, x in read_tensors(folder).items()}
    save_bfloat16(tensors, folder / WHOLE)
    loaded = load(folder)
    assert loaded.config.param_dtype == "bfloat16" and loaded.config.dtype == "float32"
    found = loaded(**inputs("llama"))["logits"]
    save_file({k: np.asarray(x, np.float32) for k, x in tensors.items()}, folder / WHOLE)
    np.testing.assert_array_equal(found, load(folder)(**inputs("llama"))["logits"])
    loaded.save(tmp_path / "again")
    assert all(x.dtype == ml_dtypes.bfloat16 for x in read_tensors(tmp_path / "again").values())
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"


def test_without_a_head_there_are_hidden_states_alone(folder, tmp_path):
    tensors = read_tensors(folder)
    bare = {k.removeprefix("model."): x for k, x in tensors.items() if k != "lm_head.weight"}
    save_bfloat16(bare, folder / WHOLE)
    loaded = load(changed(folder, architectures=["LlamaModel"]))
    found, expected = loaded(**inputs("llama")), outputs("llama")["last_hidden_state"]
    assert list(found) == ["last_hidden_state"]
    assert_close(found["last_hidden_state"], expected, 1e-6, "hidden")
    loaded.save(tmp_path / "again")
    assert set(read_tensors(tmp_path / "again")) == set(bare)


def test_names_without_the_prefix_and_old_buffers_are_understood(tmp_path):
    folder = pathlib.Path(shutil.copytree(FOLDER / "gpt2", tmp_path / "gpt2"))
    tensors = load_file(folder / WHOLE)
    expected = load(folder).params
    renamed = {k.removeprefix("transformer."): x for k, x in tensors.items()}
    renamed["h.0.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), np.float32))
    save_file(renamed, folder / WHOLE)
    jax.tree.map(np.testing.assert_array_equal, load(folder).params, expected)


def test_a_tied_head_may_be_stored_again_if_it_is_the_table(tmp_path):
    folder = pathlib.Path(shutil.copytree(FOLDER / "gpt2", tmp_path / "gpt2"))
    tensors = load_file(folder / WHOLE)
    table = tensors["transformer.wte.weight"]
    save_file({**tensors, "lm_head.weight": table.copy()}, folder / WHOLE)
    load(folder)
    save_file({**tensors, "lm_head.weight": table + 1}, folder / WHOLE)
    with pytest.raises(ValueError, match=r"lm_head.weight and .*wte.weight are tied, and differ"):
        load(folder)


def test_rotations_are_read_as_older_folders_spell_them(folder):
    new = load(
        changed(folder, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 30.0})
    )
    old = load(
        changed(
            folder,
            rope_parameters=None,
            rope_theta=30.0,
            rope_scaling={"type": "linear", "factor": 2},
        )
    )
    assert new.config == old.config and new.config.rope_scaling.factor == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(model_type="opt"), r"llama: wanted a model type of .*, gpt2, .*, got 'opt'"),
        (dict(architectures=["LlamaForQuestions"]), "wanted an architecture of LlamaForCausalLM, "),
        (dict(hidden_act="relu"), "wanted hidden_act 'silu' or 'swish', got 'relu'"),
        (dict(attention_bias=True), "wanted attention_bias False, got True"),
        (dict(hidden_size=None), "config.json has no setting 'hidden_size'"),
        (dict(rope_parameters={"rope_type": "yarn"}), "wanted rope_type 'default', 'linear' or"),
        (dict(vocab_size=68), r"wanted model.embed_tokens.weight to make embed/table, \(68, 20\)"),
        (dict(num_hidden_layers=4), r"wanted tensors model.layers.3.* and \d+ more, which are not"),
        (dict(num_hidden_layers=2), r"no parameter is called model.layers.2"),
        (dict(num_key_value_heads=3), "num_kv_heads=3 must divide num_heads=4"),
    ],
)
def test_a_config_that_is_not_one_of_ours_is_refused_in_one_line(folder, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(changed(folder, **settings))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_folder_that_is_none_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: wanted a folder with a config.json"):
        load(tmp_path / "nowhere")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not JSON"):
        load(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="wanted a `model_type`"):
        load(folder)


def test_tensors_that_are_missing_or_damaged_are_named(folder):
    whole = folder / WHOLE
    content = whole.read_bytes()
    whole.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=r"model.safetensors: damaged or cut short"):
        load(folder)
    whole.rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"found neither \(of pytorch_model.bin"):
        load(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"model-1.safetensors: named by .*, and not there"):
        load(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": WHOLE}}))
    whole.write_bytes(content)
    with pytest.raises(ValueError, match=r"promises a, and it is not there"):
        load(folder)


def test_a_model_is_not_written_over_another(folder):
    with pytest.raises(FileExistsError, match=r"config.json is there already"):
        load(folder).save(folder)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(), "wanted input_ids, got nothing"),
        (dict(input_ids=[[1, 67]]), r"wanted input_ids in \[0, 67\), got 1 to 67"),
        (dict(input_ids=[[1, -1]]), r"wanted input_ids in \[0, 67\), got -1 to 1"),
        (dict(input_id=[[1]]), "no input is called 'input_id'; did you mean input_ids"),
        (dict(input_ids=[[0] * 17]), "at most max_len=16 tokens a sequence, got 17"),
        (dict(input_ids=[[0, 1]], attention_mask=[[1]]), r"attention_mask of shape \(1, 2\)"),
        (dict(input_ids=[0, 1]), r"wanted input_ids of two axes, got shape \(2,\)"),
    ],
)
def test_inputs_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        load(FOLDER / "llama")(**wrong)


@pytest.mark.oracle
@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_what_we_save_and_computes_the_same(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    loaded = load(FOLDER / name)
    loaded.save(tmp_path / "ours")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    arrays = inputs(name)
    with torch.no_grad():
        theirs = model.eval()(**{k: torch.tensor(x).long() for k, x in arrays.items()})
    kept = arrays["attention_mask"].astype(bool)
    found = loaded(**arrays)["logits"]
    assert_close(found[kept], theirs.logits.numpy()[kept], 1e-4, "logits")
