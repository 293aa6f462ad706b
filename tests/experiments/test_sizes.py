"""A size that is asked for becomes a shape that a TPU likes."""

import pytest

from experiments.launch.sizes import FAMILIES
from lineage_jax.models import gpt, llama

PAPERS = [
    ("llama", llama.llama_7b()),
    ("llama", llama.llama_13b()),
    ("llama", llama.llama_65b()),
    ("gpt", gpt.gpt3_125m()),
    ("gpt", gpt.gpt3_175b()),
]


def shape(model):
    return model.num_layers, model.embed_dim, model.num_heads


@pytest.mark.parametrize(("name", "model"), PAPERS)
def test_the_papers_own_sizes_come_back(name, model):
    family = FAMILIES[name]
    found = family.experiment(family.num_params(model)["total"])
    assert shape(found.model) == shape(model)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("params", [1e9, 4.4e9, 2.2e10, 3e11])
@pytest.mark.parametrize("count", ["total", "non_embedding"])
def test_the_shape_is_near_and_whole(name, params, count):
    family = FAMILIES[name]
    model = family.experiment(params, count=count).model
    # Half a layer: the shallowest of these have 16.
    assert family.num_params(model)[count] == pytest.approx(params, rel=1 / 32)
    assert model.embed_dim % 128 == 0
    assert model.embed_dim // model.num_heads == (128 if model.embed_dim >= 2048 else 64)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_and_vocabulary_are_those_asked_for(name):
    experiment = FAMILIES[name].experiment(1e8, seq_len=512, vocab_size=8192)
    assert (experiment.data.seq_len, experiment.model.max_len) == (512, 512)
    assert (experiment.data.vocab_size, experiment.model.vocab_size) == (8192, 8192)


@pytest.mark.parametrize(("params", "vocab_size"), [(1e5, None), (1e6, 32_000), (1e17, None)])
def test_a_size_with_no_shape_is_refused(params, vocab_size):
    with pytest.raises(ValueError, match=r"no shape of about .*: the nearest is"):
        FAMILIES["llama"].experiment(params, vocab_size=vocab_size)
