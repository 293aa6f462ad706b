"""Decoding chooses what it says it chooses, and continues each prompt from its own end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lineage_jax.sampling.decode import choose, generate

LOGITS = jnp.log(jnp.asarray([[0.1, 0.4, 0.2, 0.3], [0.05, 0.05, 0.8, 0.1]]))


def frequencies(temperature, top_k, draws=4000):
    """How often each id is drawn."""
    keys = jax.random.split(jax.random.key(0), draws)
    ids = jax.vmap(lambda key: choose(LOGITS, key, temperature, top_k))(keys)  # draws, B
    return np.stack([np.bincount(column, minlength=4) / draws for column in np.asarray(ids).T])


def test_temperature_zero_takes_the_likeliest():
    for seed in range(3):
        assert choose(LOGITS, jax.random.key(seed), 0.0, None).tolist() == [1, 2]
        assert choose(LOGITS, jax.random.key(seed), 0.0, 3).tolist() == [1, 2]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution_at_each_temperature(temperature):
    expected = jax.nn.softmax(LOGITS / temperature)
    found = frequencies(temperature, None)
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.03)  # 4 sigma


def test_top_k_draws_among_the_k_likeliest_in_their_proportion():
    expected = np.asarray([[0, 4 / 7, 0, 3 / 7], [0, 0, 8 / 9, 1 / 9]])
    found = frequencies(1.0, 2)
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.03)  # 4 sigma
    assert (found[expected == 0] == 0).all()


def test_top_1_is_the_likeliest():
    assert choose(LOGITS, jax.random.key(0), 1.0, 1).tolist() == [1, 2]


def counting(vocab_size):
    """A decoder whose next token is the sum of all so far, which its cache alone can tell it."""

    def decoder(tokens, positions, cache):
        rows = jnp.arange(tokens.shape[0])[:, None]
        cache = cache.at[rows, positions].set(tokens)
        read = jnp.arange(cache.shape[1])[None, None] <= positions[..., None]  # B T S
        sums = (cache[:, None, :] * read).sum(-1)
        return jax.nn.one_hot(sums % vocab_size, vocab_size), cache

    return decoder


@pytest.mark.parametrize("padding", [0, 7])
def test_each_prompt_continues_from_its_own_end_and_never_reads_its_padding(padding):
    prompts = [[3, 1, 4], [2], [1, 1, 1, 1]]
    prompt = np.full((3, 4), padding)
    for row, ids in enumerate(prompts):
        prompt[row, : len(ids)] = ids
    new = jax.jit(
        lambda prompt, lengths, rng: generate(
            counting(11), jnp.zeros((3, 9), int), prompt, lengths, 5, rng, temperature=0.0
        )
    )(jnp.asarray(prompt), jnp.asarray([3, 1, 4]), jax.random.key(0))
    for row, ids in enumerate(prompts):
        ids = list(ids)
        for token in new[row].tolist():
            assert token == sum(ids) % 11
            ids.append(token)


def test_each_step_draws_anew_and_the_same_key_draws_the_same():
    def uniform(tokens, positions, cache):
        return jnp.zeros((*tokens.shape, 50)), cache

    def draw(seed):
        prompt, lengths = jnp.zeros((2, 1), int), jnp.ones(2, int)
        return generate(uniform, None, prompt, lengths, 20, jax.random.key(seed)).tolist()

    assert draw(0) == draw(0) != draw(1)
    rows = draw(0)
    assert rows[0] != rows[1] and len(set(rows[0])) > 10
