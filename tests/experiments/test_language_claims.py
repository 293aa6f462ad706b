"""The arms of the claims on language models: same data for all, and what is measured is meant."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from experiments import language
from experiments.claims import in_context, smaller_for_longer, zero_shot
from experiments.study import regression, text
from lineage_jax.data.packing import Batches
from lineage_jax.data.tokens import join
from lineage_jax.models import gpt, llama


def num_params(module):
    shapes = jax.eval_shape(lambda: language.init(module, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def first_params(module, init=language.init):
    return nn.meta.unbox(jax.jit(lambda: init(module, jax.random.key(0)))())


def test_the_least_step_is_that_of_the_means():
    arms = np.array([[0.0, 2.0], [3.0, 3.0], [3.0, 4.0]])
    assert zero_shot.least_step(*arms) == pytest.approx(0.5)
    assert zero_shot.least_step(*arms[::-1]) == pytest.approx(-2.0)


def test_a_question_has_one_right_answer_and_its_case_is_told_nowhere():
    batches, heldout = zero_shot.mixed_text(3, True)
    told, held = (
        bytes(b.stream.ids[b.stream.ids < 256].astype(np.uint8)) for b in (batches, heldout)
    )
    asked = zero_shot.questions(3, 24)
    for one in asked:
        assert one.answer == 0 and len(set(one.choices)) == zero_shot.NUM_CHOICES
        assert f"\n{one.prompt} ".encode() not in told
    assert any(f"\n{one.prompt} {one.right}".encode() in held for one in asked)
    assert [one.where for one in asked[:3]] == ["translation", "sum", "reversal"]


def test_the_held_out_loss_is_the_mean_over_targets_whatever_the_batches():
    module = gpt.GPT(gpt.GPTConfig(num_layers=1, embed_dim=8, num_heads=1, vocab_size=9, max_len=6))
    params = first_params(module)
    ids = np.random.default_rng(0).integers(9, size=41)
    stream = join([ids[:17], ids[17:]], 9, None)
    found = [
        text.heldout_loss(module, params, Batches(stream, batch_size=n, seq_len=6, shuffle=False))
        for n in (2, 5)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert 1.5 < found[0] < 3.5  # about log 9


def test_a_straight_line_has_its_slope():
    arm = {f"accuracy_{k}": np.array([0.1 + 0.05 * k, 0.5]) for k in range(9)}
    # The second is zero: float64 leaves rounding of sums of order 1.
    np.testing.assert_allclose(in_context.slope(arm), [0.05, 0.0], atol=1e-12)


def test_a_mapping_is_scored_after_x_and_before_its_value():
    """A model that repeats the last token: it says x, and that is never f(x)."""

    class Echo:
        def apply(self, variables, tokens):
            return 9.0 * jax.nn.one_hot(tokens, in_context.NUM_KEYS + in_context.NUM_VALUES), None

    rows = in_context.mappings(1, 2, 5)
    logits = in_context.mapping_logits(Echo(), {}, rows)
    assert logits.shape[:2] == rows[:, 1::2].shape
    np.testing.assert_array_equal(logits.argmax(-1), rows[:, ::2])


def test_least_squares_is_exact_without_noise_and_near_its_expectation_with_it():
    x, y = regression.lines(1, 2, 4000)
    k, d = 2 * regression.DIM, regression.DIM
    expected = regression.NOISE**2 * (1 + d / (k - d - 1))  # of Gaussian points
    assert regression.least_squares(x, y) == pytest.approx(expected, rel=0.2)
    clean = np.einsum("bnd,bd->bn", x, np.ones((4000, d), np.float32))
    assert regression.least_squares(x, clean) < 1e-6


def test_a_y_is_said_without_being_seen():
    config = dataclasses.replace(in_context.config(16), num_layers=2)
    module = regression.Regressor(config)
    params = first_params(module, regression.regressor_init)
    x, y = regression.lines(1, 2, 3)
    said = regression.regressor_program(module)(params, x, y)
    for point in (0, 4):
        changed = y.copy()
        changed[:, point] += 1.0
        again = regression.regressor_program(module)(params, x, changed)
        np.testing.assert_array_equal(again[:, : point + 1], said[:, : point + 1])
        assert (again[:, point + 1 :] != said[:, point + 1 :]).all()


def test_gelu_has_as_many_parameters_as_swiglu_and_half_the_layers_half_of_them():
    whole = smaller_for_longer.WHOLE
    assert num_params(smaller_for_longer.GeluLlama(whole)) == num_params(llama.Llama(whole))
    half = dataclasses.replace(whole, num_layers=whole.num_layers // 2)
    counts = [llama.num_params(c)["non_embedding"] - whole.embed_dim for c in (half, whole)]
    assert 2 * counts[0] == counts[1]
    tokens = smaller_for_longer.NUM_UPDATES * smaller_for_longer.BATCH_SIZE * 128
    assert tokens / llama.num_params(whole)["non_embedding"] == pytest.approx(20, rel=0.01)


def test_gelu_s_model_sees_no_future_and_knows_distances_alone():
    config = dataclasses.replace(smaller_for_longer.WHOLE, num_layers=1)
    module = smaller_for_longer.GeluLlama(config)
    params = first_params(module)
    tokens = np.random.default_rng(0).integers(257, size=(2, 9))
    logits = smaller_for_longer.at_places(module)
    changed = np.where(np.arange(9) < 6, tokens, 5)
    here = logits(params, tokens, 0)
    np.testing.assert_array_equal(here[:, :6], logits(params, changed, 0)[:, :6])
    assert smaller_for_longer.shift_error(module, params, tokens) < 1e-5
    places = 2 * jnp.broadcast_to(jnp.arange(9), tokens.shape)
    stretched = jax.jit(module.apply)({"params": params}, jnp.asarray(tokens), places)[0]
    assert jnp.abs(stretched - here).max() > 1e-4


def test_the_cache_is_smaller_by_the_heads_that_share():
    sizes = [
        smaller_for_longer.cache_bytes(
            dataclasses.replace(smaller_for_longer.WHOLE, num_kv_heads=num)
        )
        for num in (4, 2, 1)
    ]
    assert sizes[0] == 2 * sizes[1] == 4 * sizes[2]
