"""ULMFiT's three stages follow one another, and each layer learns at the rate of its depth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from experiments import ulmfit
from experiments.saved import open_run
from experiments.ulmfit import PenaltyConfig, loss_fn
from experiments.ulmfit_tuning import depth_in_classifier, depth_in_language_model
from lineage_jax import cli
from lineage_jax.models.ulmfit import Classifier, ClassifierConfig, ULMFiT
from lineage_jax.sharding import MeshConfig, make_mesh

SMALL = (  # noqa: SIM905
    "--train.num-steps 2 --train.eval-every 2 --train.checkpoint-every 2 --mesh.data 2 "
    "--mesh.fsdp 4 --data.batch-size 8 --data.seq-len 16"
).split()
SIZES = "--model.embed-dim 8 --model.hidden-dim 16 --model.num-layers 3".split()  # noqa: SIM905


def depths(module, depth):
    """Of each parameter, by the names on the way to it."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(shapes)["params"])
    names = [[part.key for part in path] for path, _ in leaves]
    return {"/".join(one): depth(one) for one in names}


def test_a_classifier_has_its_head_above_its_layers_and_its_table_below():
    config = ClassifierConfig(**vars(ulmfit.tiny().model))
    found = depths(Classifier(config), depth_in_classifier(config))
    for name, depth in found.items():
        parts = name.split("/")
        wanted = {"layer_1": 1, "layer_0": 2, "embed": 3}
        assert depth == (wanted[parts[1]] if parts[0] == "encoder" else 0), name


def test_a_language_model_has_its_table_with_its_last_layer():
    config = ulmfit.tiny().model
    found = depths(ULMFiT(config), depth_in_language_model(config))
    assert found["encoder/embed/table"] == found["bias"] == 0
    assert {n: d for n, d in found.items() if "layer_1" in n and d} == {}
    assert {d for n, d in found.items() if "layer_0" in n} == {1}


def test_penalties_are_in_the_loss_of_training_and_in_no_metric():
    config = dataclasses.replace(
        ulmfit.tiny().model, embed_dim=8, hidden_dim=8, vocab_size=23, num_layers=1
    )
    module, ones = ULMFiT(config), jnp.ones((2, 5), jnp.int32)
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), ones))["params"]
    batch = {"tokens": 3 * ones, "targets": ones, "positions": ones, "segment_ids": ones}
    batch["mask"] = ones.astype(bool)

    def loss(penalties, train):
        objective = loss_fn(module, penalties, train=train)
        return jax.jit(lambda params: objective(params, {}, batch, jax.random.key(0)))(params)

    none = PenaltyConfig(activation=0.0, slowness=0.0)
    without, (_, metrics) = loss(none, True)
    for some in (PenaltyConfig(activation=9.0, slowness=0.0), PenaltyConfig(activation=0.0)):
        value, (_, same) = loss(some, True)
        assert value > without
        jax.tree.map(np.testing.assert_array_equal, same, metrics)
        assert loss(some, False)[0] == loss(none, False)[0]


def test_stage_two_has_to_begin_somewhere():
    with pytest.raises(ValueError, match="wanted --start-from, the run of a language model"):
        ulmfit.experiment("tune").task()


@pytest.mark.slow
def test_each_stage_goes_on_with_what_the_one_before_has_learnt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    text = "".join(f"{i} times {j} is {i * j}.\n" for i in range(20) for j in range(20))
    (tmp_path / "text.txt").write_text(text)
    on_text = ["--data.path", "text.txt", "--data.heldout-fraction", "0.2"]
    cli.main(["train", "ulmfit", *SMALL, *SIZES, *on_text])
    first = open_run("runs/ulmfit-tiny")
    begin = ["--start-from", "runs/ulmfit-tiny"]
    cli.main(["train", "ulmfit", "--preset", "tune", *SMALL, *begin, *on_text])
    tuned = open_run("runs/ulmfit-tune")
    begin = ["--start-from", "runs/ulmfit-tune"]
    cli.main(["train", "ulmfit", "--preset", "classify", *SMALL, *begin])
    classified = open_run("runs/ulmfit-classify")
    assert classified.experiment.model.embed_dim == tuned.experiment.model.embed_dim == 8
    for before, after in ((first, tuned), (tuned, classified)):
        task = after.experiment.task()
        mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
        state = task.first_state(task.program.initial_state(mesh, 0))
        learnt, begun = before.params["encoder"], state.params["encoder"]
        jax.tree.map(np.testing.assert_array_equal, begun, learnt)
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), after.params["encoder"], learnt)
        assert moved["layer_2"]["lstm"]["recurrent"] is (after is tuned)  # or still frozen
    with pytest.raises(ValueError, match="wanted a run of ulmfit, got a ClassifierConfig"):
        dataclasses.replace(tuned.experiment, start_from="runs/ulmfit-classify").settled()
    others = dataclasses.replace(tuned.experiment.data, tokenizer="bpe", vocab_size=280)
    with pytest.raises(ValueError, match="tokens of this text are not those of runs/ulmfit-tiny"):
        model = dataclasses.replace(tuned.experiment.model, vocab_size=280)
        dataclasses.replace(tuned.experiment, data=others, model=model).task()
