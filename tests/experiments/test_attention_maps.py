"""Maps of attention are the model's weights, beside the right tokens, on one page."""

import json
import re

import numpy as np
import pytest

from experiments import attention_maps
from experiments.attention_maps import Maps, figure, named, page
from lineage_jax.data.tokenizers import ByteTokenizer

SOURCE, TARGET = ("a", "b", "c"), ("x", "</script>")


def some(*shape):
    weights = np.random.default_rng(0).random(shape)
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    ("path", "shape", "name", "queries", "keys"),
    [
        (("blocks", "attention", "weights"), (2, 1, 4, 2, 2), "attention", TARGET, TARGET),
        (
            ("encoder", "blocks", "attention", "weights"),
            (2, 1, 4, 3, 3),
            "encoder attention",
            SOURCE,
            SOURCE,
        ),
        (
            ("decoder", "blocks", "cross_attention", "weights"),
            (2, 1, 4, 2, 3),
            "decoder cross attention",
            TARGET,
            SOURCE,
        ),
        (("alignment",), (1, 2, 3), "alignment", TARGET, SOURCE),
    ],
)
def test_weights_stand_beside_the_tokens_that_look_and_are_looked_at(
    path, shape, name, queries, keys
):
    weights = some(*shape)
    maps = named(path, weights, SOURCE, TARGET)
    assert (maps.name, maps.queries, maps.keys) == (name, queries, keys)
    assert maps.weights.shape[2:] == (len(queries), len(keys))
    np.testing.assert_array_equal(maps.weights.ravel(), weights.ravel())


def test_a_page_holds_all_weights_needs_no_network_and_is_not_broken_by_tokens():
    maps = Maps("attention", TARGET, SOURCE, some(2, 4, 2, 3))
    written = page([maps], "a title </script>")
    assert not re.search(r"""(src|href)=|https?://(?!www\.w3\.org/2000/svg)""", written)
    told = re.search(r"const data = (.*);\n", written)[1]
    assert "</script>" not in told
    read = json.loads(told)
    assert read["title"] == "a title </script>"
    assert tuple(read["maps"][0]["queries"]) == TARGET
    np.testing.assert_allclose(read["maps"][0]["weights"], 1000 * maps.weights, atol=0.5)


def test_a_figure_has_the_heads_of_a_layer():
    maps = Maps("attention", TARGET, SOURCE, some(2, 5, 2, 3))
    axes = figure(maps, layer=1).axes
    shown = [one.images[0].get_array() for one in axes if one.images]
    np.testing.assert_array_equal(shown, maps.weights[1])


def test_tokens_are_told_as_they_are_written():
    tokenizer = ByteTokenizer()
    ids = [*tokenizer.encode("ab"), tokenizer.end_of_text]
    assert attention_maps.words(tokenizer, ids) == ("a", "b", "\N{END OF PROOF}")
