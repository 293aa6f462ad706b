"""DistilBERT is half of BERT, and starts as every second layer of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from lineage_jax.models import bert, distilbert
from lineage_jax.models.bert import Bert, BertConfig, Block, MaskedLM, PreTraining
from lineage_jax.models.distilbert import DistilBert, student_config, student_params
from lineage_jax.nn import Mask

TEACHER = BertConfig(num_layers=5, embed_dim=12, num_heads=3, vocab_size=37, max_len=8)


def random_params(model, seed=0):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32),
        meta.unbox(shapes["params"]),
    )


def test_a_student_is_its_teachers_layers_0_2_4_and_fits_its_config():
    teacher = random_params(Bert(TEACHER))
    student = student_params(teacher)
    config = student_config(TEACHER)
    assert config.num_layers == 3 and config.num_types == 0
    assert config.vocab_size == 37 and config.norm_epsilon == TEACHER.norm_epsilon
    wanted = random_params(DistilBert(config))
    assert jax.tree.map(jnp.shape, student) == jax.tree.map(jnp.shape, wanted)
    for i in range(3):
        jax.tree.map(
            lambda ours, theirs, i=i: np.testing.assert_array_equal(ours[i], theirs[2 * i]),
            student["blocks"],
            teacher["blocks"],
        )


def test_a_student_computes_what_its_teachers_layers_compute():
    teacher = random_params(Bert(TEACHER))
    model = DistilBert(student_config(TEACHER))
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 37, (2, 8)), jnp.int32)
    (found, sown) = jax.jit(
        lambda: model.apply({"params": student_params(teacher)}, tokens, capture_intermediates=True)
    )()
    x = sown["intermediates"]["embeddings"]["__call__"][0]
    index = jnp.arange(8)[None]

    @jax.jit
    def by_hand(x):
        for i in (0, 2, 4):
            block = jax.tree.map(lambda leaf, i=i: leaf[i], teacher["blocks"])
            x, _ = Block(TEACHER).apply(
                {"params": block}, x, Mask(index, index, causal=False), None
            )
        return x

    np.testing.assert_allclose(found, by_hand(x), rtol=0, atol=1e-5)


def test_a_head_for_tokens_is_taken_as_it_is_and_the_pooler_is_not():
    teacher = random_params(PreTraining(Bert(TEACHER)))
    student = student_params(teacher)
    wanted = random_params(MaskedLM(DistilBert(student_config(TEACHER))))
    student.pop("pairs")
    assert jax.tree.map(jnp.shape, student) == jax.tree.map(jnp.shape, wanted)
    jax.tree.map(np.testing.assert_array_equal, student["masked_lm"], teacher["masked_lm"])


def test_there_are_as_many_parameters_as_were_released():
    # distilbert-base-uncased without its head; table 3 prints 66 M, 40 % fewer than BERT's 110 M.
    count = bert.num_params(DistilBert(distilbert.distilbert_base()))
    assert count == 66_362_880
    whole = bert.num_params(bert.Pooled(Bert(bert.bert_base())))
    assert count / whole == pytest.approx(0.6, abs=0.01)


def test_a_teacher_of_one_layer_has_a_student_of_one():
    assert student_config(dataclasses.replace(TEACHER, num_layers=1)).num_layers == 1
