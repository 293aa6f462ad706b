"""Decoding chooses what it says it chooses, and continues each prompt from its own end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lineage_jax.sampling.decode import Sampling, advance, begin, generate, nucleus, stream

LIKELIEST = Sampling(temperature=0.0)
LOGITS = jnp.log(jnp.asarray([[0.1, 0.4, 0.2, 0.3], [0.05, 0.05, 0.8, 0.1]]))


def frequencies(draws=4000, **settings):
    """How often each id is drawn."""
    keys = jax.random.split(jax.random.key(0), draws)
    ids = jax.vmap(lambda key: Sampling(**settings)(LOGITS, key))(keys)  # draws, B
    return np.stack([np.bincount(column, minlength=4) / draws for column in np.asarray(ids).T])


def test_temperature_zero_takes_the_likeliest():
    for seed in range(3):
        for settings in (dict(), dict(top_k=3), dict(top_p=0.9)):
            likeliest = Sampling(temperature=0.0, **settings)
            assert likeliest(LOGITS, jax.random.key(seed)).tolist() == [1, 2]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution_at_each_temperature(temperature):
    expected = jax.nn.softmax(LOGITS / temperature)
    found = frequencies(temperature=temperature)
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.03)  # 4 sigma


def test_top_k_draws_among_the_k_likeliest_in_their_proportion():
    expected = np.asarray([[0, 4 / 7, 0, 3 / 7], [0, 0, 8 / 9, 1 / 9]])
    found = frequencies(top_k=2)
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.03)  # 4 sigma
    assert (found[expected == 0] == 0).all()


def test_top_1_is_the_likeliest():
    assert Sampling(top_k=1)(LOGITS, jax.random.key(0)).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.39, [[0, 1, 0, 0], [0, 0, 1, 0]]),
        (0.41, [[0, 1, 0, 1], [0, 0, 1, 0]]),
        (0.81, [[0, 1, 1, 1], [0, 0, 1, 1]]),
        (1.0, [[1, 1, 1, 1], [1, 1, 1, 1]]),
    ],
)
def test_the_nucleus_is_the_fewest_likeliest_that_reach_p(top_p, kept):
    assert nucleus(LOGITS, top_p).astype(int).tolist() == kept


def test_top_p_draws_from_the_nucleus_in_proportion():
    expected = np.asarray([[0, 4 / 7, 0, 3 / 7], [0, 0, 1, 0]])
    found = frequencies(top_p=0.6)
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.03)  # 4 sigma
    assert (found[expected == 0] == 0).all()


def test_what_was_there_before_is_penalised_whatever_the_sign_of_its_logit():
    seen = jnp.asarray([[False, True, False, True]])
    sampling = Sampling(temperature=0.0, repetition_penalty=2.0)
    for logits, expected in (([1.0, 1.9, -3.0, 1.5], 0), ([-1.0, -0.6, -3.0, -0.9], 0)):
        assert sampling(jnp.asarray([logits]), jax.random.key(0), seen).tolist() == [expected]
        assert sampling(jnp.asarray([logits]), jax.random.key(0)).tolist() == [1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(temperature=-1.0), "temperature must be 0 or more, got -1.0"),
        (dict(top_k=0), "top_k must be at least 1, got 0"),
        (dict(top_p=0.0), r"top_p must be in \(0, 1\], got 0.0"),
        (dict(repetition_penalty=0.0), "repetition_penalty must be above 0, got 0.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)


def counting(vocab_size):
    """A decoder whose next token is the sum of all so far, which its cache alone can tell it."""

    def decoder(tokens, positions, cache, mask=None):
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
            counting(11), jnp.zeros((3, 9), int), prompt, lengths, 5, rng, LIKELIEST
        )
    )(jnp.asarray(prompt), jnp.asarray([3, 1, 4]), jax.random.key(0))
    for row, ids in enumerate(prompts):
        ids = list(ids)
        for token in new[row].tolist():
            assert token == sum(ids) % 11
            ids.append(token)


def test_a_recurrence_is_told_which_tokens_of_a_prompt_are_padding():
    def summing(tokens, positions, cache, mask=None):
        # Its state is all that it knows: what it has read once stays read.
        states = cache[:, None] + jnp.cumsum(tokens if mask is None else tokens * mask, axis=1)
        return jax.nn.one_hot(states % 11, 11), states[:, -1]

    prompt, lengths = jnp.asarray([[3, 1, 4], [2, 7, 7]]), jnp.asarray([3, 1])
    key, cache = jax.random.key(0), jnp.zeros(2, int)
    new = generate(summing, cache, prompt, lengths, 4, key, LIKELIEST)
    assert new.tolist() == [[8, 5, 10, 9], [2, 4, 8, 5]]


def test_each_step_draws_anew_and_the_same_key_draws_the_same():
    def uniform(tokens, positions, cache, mask=None):
        return jnp.zeros((*tokens.shape, 50)), cache

    def draw(seed):
        prompt, lengths = jnp.zeros((2, 1), int), jnp.ones(2, int)
        return generate(uniform, None, prompt, lengths, 20, jax.random.key(seed)).tolist()

    assert draw(0) == draw(0) != draw(1)
    rows = draw(0)
    assert rows[0] != rows[1] and len(set(rows[0])) > 10


def generated(stop=(), sampling=LIKELIEST, run=generate):
    prompt, lengths = jnp.asarray([[3, 1], [2, 0], [5, 5]]), jnp.asarray([2, 1, 2])
    cache, key = jnp.zeros((3, 10), int), jax.random.key(0)
    return run(counting(11), cache, prompt, lengths, 8, key, sampling, stop)


def test_after_a_stop_token_there_is_nothing_but_the_first_of_them():
    free, stopped = np.asarray(generated()), np.asarray(generated((8, 5)))
    for whole, row in zip(free, stopped, strict=True):
        ends = np.flatnonzero(np.isin(whole, (8, 5)))
        end = ends[0] + 1 if ends.size else len(whole)
        np.testing.assert_array_equal(row[:end], whole[:end])
        assert (row[end:] == 8).all()
    assert (free != stopped).any()


@pytest.mark.parametrize("sampling", [LIKELIEST, Sampling(repetition_penalty=1.3, top_p=0.9)])
def test_a_stream_is_what_is_generated_and_ends_when_all_have_stopped(sampling):
    stop = (8, 5)
    whole = np.asarray(generated(stop, sampling))
    tokens = [np.asarray(token) for token in generated(stop, sampling, stream)]
    found = np.stack(tokens, axis=1)
    np.testing.assert_array_equal(found, whole[:, : found.shape[1]])
    assert (whole[:, found.shape[1] :] == 8).all()


def test_a_penalty_remembers_the_prompt_but_not_its_padding_and_what_was_said():
    def flat(tokens, positions, cache, mask=None):
        return jnp.ones((*tokens.shape, 6)), cache

    sampling = Sampling(temperature=0.0, repetition_penalty=2.0)
    prompt, lengths = jnp.asarray([[0, 1], [2, 0]]), jnp.asarray([2, 1])
    state = begin(flat, None, prompt, lengths, sampling)
    assert state.seen.astype(int).tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]]
    said = []
    for _ in range(3):
        state, token = advance(flat, state, jax.random.key(0), sampling, ())
        said.append(token.tolist())
    assert said == [[2, 0], [3, 1], [4, 3]]  # the likeliest that was not there yet
