"""AWD-LSTM drops what its paper drops; documents, pieces and devices change nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from lineage_jax import sharding
from lineage_jax.models import ulmfit
from lineage_jax.models.ulmfit import (
    Classifier,
    ClassifierConfig,
    ULMFiT,
    concat_pooled,
    empty_cache,
)
from tests.models.translation import assert_gradients
from tests.nn.closeness import assert_same

STILL = dict(
    embed_dropout_rate=0.0,
    input_dropout_rate=0.0,
    hidden_dropout_rate=0.0,
    dropout_rate=0.0,
    weight_dropout_rate=0.0,
    classifier_dropout_rate=0.0,
)
TINY = ClassifierConfig(
    num_layers=2, embed_dim=6, hidden_dim=8, vocab_size=23, max_len=16, num_labels=3,
    classifier_dim=4,
)  # fmt: skip
ROWS, LENGTH = 4, 7
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 23, (ROWS, LENGTH)), jnp.int32)
MASK = jnp.arange(LENGTH)[None] < jnp.asarray([7, 3, 5, 1])[:, None]


@pytest.fixture(scope="module")
def params():
    """Every parameter random, the biases too."""
    return random_params(ULMFiT(TINY))


def random_params(module):
    shapes = jax.eval_shape(module.init, jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape), jnp.float32),
        nn.unbox(shapes),
    )


def call(params, tokens, *inputs, config=TINY, seed=None, **named):
    rngs = {} if seed is None else {"dropout": jax.random.key(seed)}

    @jax.jit
    def run(params, tokens, inputs, named):
        return ULMFiT(config).apply(
            {"params": params}, tokens, *inputs, train=seed is not None, rngs=rngs, **named
        )

    return run(params, tokens, inputs, named)


def test_the_papers_sizes_have_the_papers_parameters():
    # Whole millions, as tables 1 and 2 of Merity et al. 2017 print them.
    assert ulmfit.num_params(ulmfit.awd_lstm_ptb())["total"] // 10**6 == 24
    assert ulmfit.num_params(ulmfit.awd_lstm_wikitext2())["total"] // 10**6 == 33


def test_the_text_read_in_pieces_is_the_whole(params):
    whole, nothing = call(params, TOKENS)
    assert nothing is None
    for pieces in ([1] * LENGTH, [2, 4, 1]):
        cache, at = empty_cache(TINY, ROWS), 0
        for size in pieces:
            logits, cache = call(params, TOKENS[:, at : at + size], cache=cache)
            assert_same(logits, whole[:, at : at + size])
            at += size


def test_prompts_of_unequal_length_go_on_each_from_its_last_token(params):
    whole, _ = call(params, TOKENS)
    lengths = jnp.asarray([4, 1, 3, 2])
    real = jnp.arange(4)[None] < lengths[:, None]
    _, cache = call(params, TOKENS[:, :4], cache=empty_cache(TINY, ROWS), mask=real)
    following = jnp.take_along_axis(TOKENS, lengths[:, None], axis=1)
    logits, _ = call(params, following, cache=cache)
    assert_same(logits, jnp.take_along_axis(whole, lengths[:, None, None], axis=1))


def test_each_document_of_a_row_is_what_it_is_alone(params):
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 3]] * ROWS)
    together, _ = call(params, TOKENS, segment_ids=segments)
    for cut in (slice(0, 3), slice(3, 6), slice(6, 7)):
        alone, _ = call(params, TOKENS[:, cut])
        assert_same(together[:, cut], alone)


def test_no_token_sees_its_future(params):
    before, _ = call(params, TOKENS)
    for changed in range(LENGTH):
        tokens = TOKENS.at[:, changed].set((TOKENS[:, changed] + 1) % 23)
        after, _ = call(params, tokens)
        np.testing.assert_array_equal(before[:, :changed], after[:, :changed])
        assert (before[:, changed] != after[:, changed]).any(-1).all()


def intermediates(params, tokens, seed, **rates):
    """Outputs of the last layer, before and after dropout."""
    config = dataclasses.replace(TINY, **{**STILL, **rates})

    @jax.jit
    def run(params, key):
        _, found = ULMFiT(config).apply(
            {"params": params},
            tokens,
            train=True,
            rngs={"dropout": key},
            mutable=["intermediates"],
        )
        return found["intermediates"]["encoder"]

    found = run(params, jax.random.key(seed))
    return found["raw"][0], found["hidden"][0]


def test_a_row_loses_the_same_numbers_at_every_token_and_another_row_others(params):
    raw, hidden = intermediates(params, TOKENS, 0, dropout_rate=0.5)
    kept = np.asarray(hidden != 0)
    assert (kept == kept[:, :1]).all() and (kept[:1] != kept).any()
    assert_same(hidden[kept], 2 * raw[kept])
    assert 0 < kept.mean() < 1


@pytest.mark.parametrize("rate", ["input_dropout_rate", "hidden_dropout_rate"])
def test_dropout_before_and_between_layers_is_of_units_and_not_of_tokens(params, rate):
    # All tokens of a row are one: were a mask drawn for each of them, outputs of a recurrence that
    # does not remember would differ along the row.
    tokens = jnp.full((ROWS, LENGTH), 5)
    forgetful = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0 * leaf if path[-1].key == "recurrent" else leaf, params
    )
    for i in range(2):
        layer = forgetful["encoder"][f"layer_{i}"]["lstm"]
        layer["bias"] = layer["bias"].at[1].set(-30.0)  # the forget gate is shut
    raw, _ = intermediates(forgetful, tokens, 0, **{rate: 0.5})
    assert_same(raw, jnp.broadcast_to(raw[:, :1], raw.shape))
    assert (raw[:1] != raw[1:]).any()


def test_a_word_is_dropped_wherever_it_stands_and_the_others_grow(params):
    tokens = jnp.asarray([[3, 4, 3, 9, 4, 9, 3]] * ROWS)
    config = dataclasses.replace(TINY, **{**STILL, "embed_dropout_rate": 0.5})

    @jax.jit
    def embedded(key):
        # What the first layer reads, of a table of ones.
        ones = {"encoder": {**params["encoder"], "embed": {"table": jnp.ones((23, 6))}}}
        seen = []

        def watch(run, args, kwargs, context):
            if isinstance(context.module, ulmfit.Block) and context.module.name == "layer_0":
                seen.append(args[0])
            return run(*args, **kwargs)

        with nn.intercept_methods(watch):
            ULMFiT(config).apply(
                {"params": {**params, **ones}}, tokens, train=True, rngs={"dropout": key}
            )
        return seen[0]

    drawn = np.stack([embedded(jax.random.key(seed)) for seed in range(20)])  # seeds B T D
    assert set(np.unique(drawn)) == {0.0, 2.0}
    for word in (3, 4, 9):
        of_word = drawn[:, np.asarray(tokens) == word].reshape(20, -1)
        assert (of_word == of_word[:, :1]).all()
    assert (drawn[..., 0, 0] != drawn[..., 1, 0]).any()  # but not all words at once


def test_dropped_weights_are_the_recurrent_ones_alike_in_all_rows_and_tokens(params):
    # A matrix that is dropped wholly, or not at all, tells nothing; of one with a single weight
    # in each gate, the outputs take two values: with and without.
    tokens = jnp.full((ROWS, LENGTH), 5)
    outputs = [intermediates(params, tokens, seed, weight_dropout_rate=0.5)[0] for seed in range(8)]
    for one in outputs:
        assert_same(one, jnp.broadcast_to(one[:1], one.shape))  # rows are alike
        # The first state is zero: no weight from state to state has anything to multiply.
        assert_same(one[:, 0], outputs[0][:, 0])
    assert len({float(one[0, -1, 0]) for one in outputs}) == 8

    def with_recurrent(factor):
        def change(path, leaf):
            return leaf * factor if path[-1].key == "recurrent" else leaf

        return jax.tree_util.tree_map_with_path(change, params)

    # Without weights there is nothing to drop.
    still, dropped = (
        intermediates(with_recurrent(0.0), tokens, 0, weight_dropout_rate=rate)[0]
        for rate in (0.0, 0.5)
    )
    np.testing.assert_array_equal(still, dropped)


def test_dropout_acts_in_training_alone(params):
    still = dataclasses.replace(TINY, **STILL)
    np.testing.assert_array_equal(call(params, TOKENS)[0], call(params, TOKENS, config=still)[0])
    np.testing.assert_array_equal(
        call(params, TOKENS)[0], call(params, TOKENS, config=still, seed=0)[0]
    )
    assert (call(params, TOKENS, seed=0)[0] != call(params, TOKENS, seed=1)[0]).any()


def test_the_table_that_looks_words_up_scores_them(params):
    changed = jax.tree.map(lambda leaf: leaf, params)
    table = changed["encoder"]["embed"]["table"]
    unseen = int(np.setdiff1d(np.arange(23), np.unique(TOKENS))[0])
    changed["encoder"]["embed"]["table"] = table.at[unseen].add(1.0)
    before, after = call(params, TOKENS)[0], call(changed, TOKENS)[0]
    differs = np.asarray(before != after)
    assert differs[..., unseen].any()
    assert not np.delete(differs, unseen, axis=-1).any()


def test_a_padded_row_is_classified_as_it_is_alone():
    module = Classifier(TINY)
    variables = nn.unbox(jax.jit(module.init)(jax.random.key(0), TOKENS))
    variables = {**variables, "params": random_params(module)}
    scores = jax.jit(lambda tokens, mask: module.apply(variables, tokens, mask))
    together = scores(TOKENS, MASK)
    others = scores(jnp.where(MASK, TOKENS, (TOKENS + 1) % 23), MASK)
    np.testing.assert_array_equal(together, others)
    for row, length in enumerate((7, 3, 5, 1)):
        alone = scores(TOKENS[row : row + 1, :length], None)
        assert_same(together[row], alone[0])


def test_a_row_of_padding_has_a_finite_pool():
    pooled = concat_pooled(jnp.ones((2, 3, 4)), jnp.asarray([[False] * 3, [True] * 3]))
    assert jnp.isfinite(pooled).all()


def test_batch_norm_counts_in_training_and_uses_what_it_counted_afterwards():
    module = Classifier(dataclasses.replace(TINY, **STILL))
    variables = nn.unbox(jax.jit(module.init)(jax.random.key(0), TOKENS))
    params = random_params(module)

    @jax.jit
    def steps(stats):
        def step(stats, _):
            logits, changed = module.apply(
                {"params": params, "batch_stats": stats},
                TOKENS, MASK, train=True, mutable=["batch_stats"],
            )  # fmt: skip
            return changed["batch_stats"], logits

        return jax.lax.scan(step, stats, length=200)  # 0.9^200 of what it began with is left

    stats, logits = steps(variables["batch_stats"])
    used = module.apply({"params": params, "batch_stats": stats}, TOKENS, MASK)
    np.testing.assert_allclose(used, logits[-1], rtol=0, atol=1e-4 * np.abs(logits[-1]).max())


def test_a_classifier_sharded_over_eight_devices_is_one_device():
    module = Classifier(dataclasses.replace(TINY, classifier_dim=5))  # 50 does not divide, either
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    boxed = jax.eval_shape(module.init, jax.random.key(0), TOKENS)
    params = random_params(module)
    stats = {name: tree for name, tree in boxed.items() if name != "params"}
    stats = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), stats)

    def loss(params, tokens, mask):
        return jnp.sin(module.apply({"params": params, **stats}, tokens, mask)).mean()

    whole = jax.jit(jax.value_and_grad(loss))(params, TOKENS, MASK)
    with sharding.use(mesh):
        rows = jax.device_put((TOKENS, MASK), nn.logical_to_mesh_sharding(P("batch"), mesh))
        split = jax.device_put(params, sharding.shardings(boxed["params"], mesh))
        found = jax.jit(jax.value_and_grad(loss))(split, *rows)
    assert_same(found[0], whole[0])
    assert_gradients(found[1], whole[1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(num_layers=0), "num_layers must be at least 1, got 0"),
        (dict(weight_dropout_rate=1.0), r"weight_dropout_rate must be in \[0, 1\), got 1.0"),
        (dict(init_scale=0.0), "init_scale must be more than 0, got 0.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **wrong)
