"""GPT-1's heads compute what `transformers` computes, and read rows as section 3.3 says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from flax.traverse_util import flatten_dict

from lineage_jax.models.gpt import (
    GPT,
    Classifier,
    ClassifierConfig,
    MultipleChoice,
    SimilarityClassifier,
)
from lineage_jax.objectives.labels import label_loss
from lineage_jax.objectives.language import next_token_loss
from lineage_jax.pretrained import load
from lineage_jax.pretrained.tensors import Tensor, to_ours
from lineage_jax.pretrained.weights import ARCHITECTURES
from tests.golden import make
from tests.models.parity import FOLDER, Case, assert_close, golden

TINY = ClassifierConfig(
    num_layers=2, embed_dim=30, num_heads=5, vocab_size=67, max_len=16, mlp_dim=37, num_labels=3,
    norm_first=False,
)  # fmt: skip
LENGTH = 11


def live(name: str) -> Case:
    """The same class in other sizes, with other weights and inputs, computed now."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    theirs = dict(make.CLASSIFIERS[name], n_embd=18, n_head=3, n_layer=2, vocab_size=53)
    arrays = make.classifier_inputs(theirs, seed=1)
    model, expected = make.classifier_reference(theirs, arrays, seed=1)
    return Case(theirs, make.weights(model), arrays, expected)


@pytest.fixture(
    scope="module",
    params=[
        *[pytest.param((golden, name), id=name) for name in make.CLASSIFIERS],
        *[
            pytest.param((live, name), id=f"{name}-live", marks=pytest.mark.oracle)
            for name in make.CLASSIFIERS
        ],
    ],
)
def case(request):
    load, name = request.param
    return load(name)


def test_the_loss_the_labels_and_every_gradient_are_those_of_transformers(case):
    model = case.architecture.module(case.config)
    x = {name: jnp.asarray(array) for name, array in case.inputs.items()}

    @jax.jit
    def run(tensors):
        def loss(tensors):
            inputs = x["input_ids"], x["attention_mask"].astype(bool), False, x["position_ids"]
            logits, _ = model.apply({"params": case.params(tensors)}, *inputs)
            return label_loss(logits, x["label"], jnp.ones(4, bool))[0], logits

        return jax.value_and_grad(loss, has_aux=True)(tensors)

    (loss, logits), gradients = run(case.tensors)
    assert_close(loss, case.expected["loss"], 1e-4, "loss")
    assert_close(logits, case.expected["logits"], 1e-4, "logits")
    found = {name for name in case.expected if name.startswith("grad.")}
    assert found == {f"grad.{name}" for name in gradients}
    for name, gradient in gradients.items():
        assert_close(gradient, case.expected[f"grad.{name}"], 1e-4, name)


@pytest.mark.parametrize("name", make.CLASSIFIERS)
def test_a_folder_of_a_classifier_is_called_by_their_names_and_saved_as_it_was(name, tmp_path):
    loaded, case = load(FOLDER / name), golden(name)
    inputs = {key: case.inputs[key] for key in ("input_ids", "attention_mask", "position_ids")}
    found = loaded(**inputs)
    assert list(found) == ["logits"]
    assert_close(found["logits"], case.expected["logits"], 1e-4, "logits")
    loaded.save(tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.config == loaded.config and again.config.num_labels == case.theirs["num_labels"]
    np.testing.assert_array_equal(again(**inputs)["logits"], found["logits"])


def random_params(model, *rows):
    """Every parameter random."""
    tokens = jnp.zeros((1, *rows, 1), jnp.int32)
    boxed = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32),
        meta.unbox(boxed),
    )


def some_rows(*shape, seed=1):
    """Tokens and the mask of padding on the right, each row of a length of its own."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 67, (*shape, LENGTH))
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(
        np.arange(LENGTH) < rng.integers(2, LENGTH + 1, (*shape, 1))
    )


@pytest.fixture(scope="module")
def params():
    return random_params(Classifier(TINY))


@jax.jit
def classify(params, tokens, mask=None):
    return Classifier(TINY).apply({"params": params}, tokens, mask)


def test_labels_are_the_last_state_times_one_matrix_and_tokens_are_as_gpt_scores_them(params):
    tokens, mask = some_rows(4)
    labels, logits = classify(params, tokens, mask)
    (expected, _), sown = jax.jit(
        lambda: GPT(TINY).apply({"params": params["gpt"]}, tokens, mutable=["intermediates"])
    )()
    hidden = np.asarray(sown["intermediates"]["hidden"][0])
    last = hidden[np.arange(4), np.asarray(mask).sum(-1) - 1]
    assert_close(labels, last @ np.asarray(params["classifier"]["kernel"]), 1e-5, "labels")
    assert_close(logits[mask], np.asarray(expected)[np.asarray(mask)], 1e-5, "tokens")


def test_padding_and_what_is_in_it_change_nothing(params):
    tokens, mask = some_rows(4)
    labels, _ = classify(params, tokens, mask)
    other, _ = classify(params, jnp.where(mask, tokens, 5), mask)
    assert_close(other, np.asarray(labels), 1e-6, "labels")
    size = int(mask[2].sum())
    alone, _ = classify(params, tokens[2:3, :size])
    assert_close(alone[0], np.asarray(labels[2]), 1e-5, "labels of a row without padding")


def test_a_pair_without_an_order_is_scored_alike_in_both(params):
    tokens, mask = some_rows(3, 2)
    run = jax.jit(lambda t, m: SimilarityClassifier(TINY).apply({"params": params}, t, m))
    there, logits = run(tokens, mask)
    back, _ = run(tokens[:, ::-1], mask[:, ::-1])
    assert_close(back, np.asarray(there), 1e-5, "labels")
    assert logits.shape == (3, 2, LENGTH, 67)
    one, two = (classify(params, tokens[:, i], mask[:, i])[0] for i in range(2))
    assert_close(there, np.asarray(one + two), 1e-5, "the sum of states, by one matrix")


def test_each_answer_is_scored_by_its_own_row_alone():
    model = MultipleChoice(TINY)
    params = random_params(model, 2)
    tokens, mask = some_rows(3, 4)
    run = jax.jit(lambda t, m: model.apply({"params": params}, t, m)[0])
    found = run(tokens, mask)
    assert found.shape == (3, 4) and params["classifier"]["kernel"].shape == (30, 1)
    order = jnp.asarray([2, 0, 3, 1])
    assert_close(run(tokens[:, order], mask[:, order]), np.asarray(found)[:, order], 1e-5, "moved")
    changed = run(tokens.at[:, 1, 0].set((tokens[:, 1, 0] + 1) % 67), mask)
    assert (changed[:, 1] != found[:, 1]).all()
    assert_close(changed[:, [0, 2, 3]], np.asarray(found)[:, [0, 2, 3]], 1e-6, "others")


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["OpenAIGPT", "GPT2"])
def test_both_heads_at_once_are_those_of_their_double_heads_model(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind = {"OpenAIGPT": "gpt1", "GPT2": "gpt2"}[name]
    given = {k: v for k, v in make.CONFIGS[kind].items() if k != "model_type"}
    config = getattr(transformers, f"{name}Config")(**given, num_labels=1)
    theirs = getattr(transformers, f"{name}DoubleHeadsModel")(config).eval()
    with torch.no_grad():
        for key, value in theirs.named_parameters():
            value.copy_(float("ln_" in key and "weight" in key) + 0.3 * torch.randn_like(value))
        theirs.multiple_choice_head.summary.bias.zero_()  # it adds the same to every answer
    tokens, mask = some_rows(3, 4)
    last = torch.tensor(np.asarray(mask).sum(-1) - 1)
    answer = np.array([2, 0, 3])
    labels = torch.tensor(np.where(mask, tokens, -100)).long()
    outputs = theirs(
        torch.tensor(np.asarray(tokens)).long(), mc_token_ids=last, labels=labels,
        mc_labels=torch.tensor(answer),
    )  # fmt: skip
    (outputs.mc_loss + 0.5 * outputs.loss).backward()
    expected = {k: v.grad.numpy() for k, v in theirs.named_parameters()}

    architecture = ARCHITECTURES[f"{name}LMHeadModel"]
    config = architecture.config(theirs.config.to_dict())
    table = {f"gpt/{path}": row for path, row in architecture.table(config).items()}
    table["classifier/kernel"] = Tensor("multiple_choice_head.summary.weight", transposed=True)
    model = MultipleChoice(config)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    wanted = flatten_dict(meta.unbox(variables["params"]), sep="/")

    @jax.jit
    def run(tensors):
        def loss(tensors):
            scores, logits = model.apply({"params": to_ours(table, wanted, tensors)}, tokens, mask)
            rows = [x.reshape(12, LENGTH, *x.shape[3:]) for x in (logits, tokens, mask)]
            language, _ = next_token_loss(rows[0][:, :-1], rows[1][:, 1:], rows[2][:, 1:])
            choice, _ = label_loss(scores, jnp.asarray(answer), jnp.ones(3, bool))
            return choice + 0.5 * language, (scores, logits)

        return jax.value_and_grad(loss, has_aux=True)(tensors)

    tensors = {key: value.detach().numpy() for key, value in theirs.named_parameters()}
    bias = "multiple_choice_head.summary.bias"
    del tensors[bias]
    (_, (scores, logits)), gradients = run(tensors)
    kept = np.asarray(mask)
    assert_close(scores, outputs.mc_logits.detach().numpy(), 1e-4, "answers")
    assert_close(logits[mask], outputs.logits.detach().numpy()[kept], 1e-4, "tokens")
    assert {*gradients, bias} == set(expected)
    for key, gradient in gradients.items():
        assert_close(gradient, expected[key], 1e-4, key)
