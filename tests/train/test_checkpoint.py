"""Checkpoints are whole or not there, and what comes back is what was saved."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lineage_jax.train.checkpoint import CheckpointError, Checkpoints

STATE = {"params": {"kernel": jnp.arange(12.0).reshape(3, 4)}, "step": jnp.array(7)}


def files(folder, step):
    return [path for path in sorted((folder / "steps" / str(step)).rglob("*")) if path.is_file()]


@pytest.fixture
def saved(tmp_path):
    """A folder with steps 1, 2 and 3, each with its own value of `step`."""
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {**STATE, "step": jnp.array(step)})
    return tmp_path


def test_the_latest_state_comes_back_bit_for_bit(saved):
    with Checkpoints(saved) as checkpoints:
        step, state, problems = checkpoints.restore_latest(STATE)
    assert (step, problems) == (3, [])
    assert int(state["step"]) == 3
    np.testing.assert_array_equal(state["params"]["kernel"], STATE["params"]["kernel"])


def test_only_the_last_few_are_kept(saved):
    with Checkpoints(saved, keep=2) as checkpoints:
        checkpoints.save(4, STATE)
        checkpoints.wait()
        assert checkpoints.saved_steps() == [4, 3]


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(STATE) is None


def flipped(content):
    """With one bit of the byte in the middle the other way round."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


HARMS = {"flipped": flipped, "truncated": lambda content: content[:-1], "deleted": None}


@pytest.mark.parametrize("harm", HARMS)
def test_each_file_in_turn_when_damaged_is_refused_by_name_and_the_step_before_is_used(saved, harm):
    tried = 0
    with Checkpoints(saved) as checkpoints:
        for path in files(saved, 3):
            content = path.read_bytes()
            if harm == "deleted":
                path.unlink()
            elif content:
                path.write_bytes(HARMS[harm](content))
            else:
                continue
            step, _, (problem,) = checkpoints.restore_latest(STATE)
            assert step == 2
            assert f"{path} is" in problem
            path.write_bytes(content)
            tried += 1
        assert tried > 5
        assert checkpoints.restore_latest(STATE)[0] == 3


def test_a_flipped_bit_anywhere_in_a_manifest_is_refused_and_the_step_before_is_used(saved):
    path = saved / "manifests" / "3.json"
    content = path.read_bytes()
    with Checkpoints(saved) as checkpoints:
        for bit in random.Random(0).sample(range(8 * len(content)), 32):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            step, _, (problem,) = checkpoints.restore_latest(STATE)
            assert step == 2
            assert str(path) in problem


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"\xff"])
def test_a_manifest_that_is_none_is_refused_by_name(saved, content):
    path = saved / "manifests" / "3.json"
    path.write_bytes(content)
    with (
        Checkpoints(saved) as checkpoints,
        pytest.raises(CheckpointError, match=r"manifest .*3\.json is damaged"),
    ):
        checkpoints.restore(3, STATE)


def test_a_step_without_its_manifest_does_not_count(saved):
    (saved / "manifests" / "3.json").unlink()
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.restore_latest(STATE)[0] == 2
        checkpoints.save(3, STATE)  # and can be saved again
        checkpoints.wait()
        assert checkpoints.saved_steps() == [3, 2, 1]


def test_no_intact_checkpoint_is_one_clear_line(saved):
    for step in (1, 2, 3):
        files(saved, step)[-1].write_bytes(b"junk")
    with (
        Checkpoints(saved) as checkpoints,
        pytest.raises(CheckpointError, match="no intact checkpoint") as raised,
    ):
        checkpoints.restore_latest(STATE)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "wanted, told",
    [
        ({"kernel": jnp.zeros((3, 5))}, r"params/kernel is wanted as float32\[3, 5\]"),
        ({"kernel": jnp.zeros((3, 4), jnp.bfloat16)}, "params/kernel is wanted as bfloat16"),
        ({"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}, "params/bias .* saved as nothing"),
        ({}, "params/kernel is wanted as nothing"),
    ],
)
def test_another_shape_type_or_name_is_refused_by_name(saved, wanted, told):
    with Checkpoints(saved) as checkpoints, pytest.raises(ValueError, match=told):
        checkpoints.restore(3, {**STATE, "params": wanted})


def test_a_checkpoint_restores_onto_another_mesh(saved):
    mesh = jax.make_mesh((2,), ("fsdp",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    like = {**STATE, "params": jax.device_put(STATE["params"], spread)}
    with Checkpoints(saved) as checkpoints:
        state = checkpoints.restore(3, like)
    assert state["params"]["kernel"].sharding == spread
    np.testing.assert_array_equal(state["params"]["kernel"], STATE["params"]["kernel"])
