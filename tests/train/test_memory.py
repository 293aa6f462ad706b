"""A program that does not fit is refused before it runs, with what it wants and what to change."""

import types

import jax
import jax.numpy as jnp
import pytest

from lineage_jax.train import memory


@pytest.fixture(scope="module")
def lowered():
    """Adds a mebibyte to another, in its place."""
    megabyte = jax.ShapeDtypeStruct((2**18,), jnp.float32)
    return jax.jit(lambda x, y: x + y, donate_argnums=0).lower(megabyte, megabyte)


def test_what_is_wanted_counts_memory_that_is_shared_once(lowered):
    assert memory.wanted(lowered.compile()) == 2 * 2**20


def test_a_program_within_the_limit_or_without_one_is_compiled(lowered):
    for limit in (None, 2 * 2**20):
        one, two = jnp.ones(2**18), jnp.ones(2**18)
        assert memory.compile_within(lowered, limit)(one, two)[0] == 2


def test_a_program_that_needs_more_is_refused_with_both_numbers_and_what_to_change(lowered):
    with pytest.raises(ValueError) as error:
        memory.compile_within(lowered, 2**20)
    told = str(error.value)
    assert told.startswith(
        "a training step needs 0.0021 GB of memory on each device, which has 0.00105 GB; "
    )
    for change in ("--data.batch-size", "--train.accumulate", "--model.remat", "--mesh.fsdp"):
        assert change in told
    assert "\n" not in told


def test_a_compiler_that_counts_for_itself_is_quoted():
    def compile():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20G of 16G hbm.\nAllocations:")

    with pytest.raises(ValueError, match=r"Used 20G of 16G hbm\.; take a smaller --data.batch"):
        memory.compile_within(types.SimpleNamespace(compile=compile), None)


def test_a_cpu_does_not_say_how_much_it_has():
    assert memory.available(jax.devices()[0]) is None
