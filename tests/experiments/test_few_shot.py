"""Few-shot evaluation: what a model knows, or reads in its context, is counted as right."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from experiments import language
from experiments.evaluation import EvaluateOptions, evaluate
from experiments.few_shot import Model, few_shot, interval
from lineage_jax import cli
from lineage_jax.data.tokenizers import ByteTokenizer
from lineage_jax.models import gpt, llama
from lineage_jax.pretrained import Pretrained
from lineage_jax.pretrained.weights import ARCHITECTURES

SPACE, NEWLINE, END = ord(" "), ord("\n"), ByteTokenizer().end_of_text


class Scripted:
    """Has read what `answer` says: after "x " it writes a letter, and then ends the line.

    Args:
      answer: from the ids read [B, S] and where a space stands in them [B, T], the next ids.
    """

    def __init__(self, answer):
        self.answer = answer

    def apply(self, variables, tokens, positions=None, *, cache=None):
        rows = jnp.arange(tokens.shape[0])[:, None]
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        read = jnp.zeros(tokens.shape, jnp.int32) if cache is None else cache
        read = read.at[rows, positions].set(tokens)
        said = self.answer(read, positions)
        upper = (tokens >= ord("A")) & (tokens <= ord("Z"))
        following = jnp.where(tokens == SPACE, said, jnp.where(upper, NEWLINE, SPACE))
        return 5.0 * jax.nn.one_hot(following, 257), read


def scripted(answer, **changes):
    settings = dict(
        module=Scripted(answer),
        empty_cache=lambda rows, length: jnp.zeros((rows, length), jnp.int32),
        params={},
        max_len=40,
        tokenizer=ByteTokenizer(),
        first=[END],
        batch_size=3,
    )
    return Model(**{**settings, **changes})


def capital(read, positions):
    """Of the letter before the space."""
    return jnp.take_along_axis(read, positions - 1, axis=1) - 32


def answer_before(read, positions):
    """That of the line before, four bytes a line; nothing in the first line."""
    return jnp.take_along_axis(read, jnp.maximum(positions - 3, 0), axis=1)


def written(folder, rows):
    path = folder / "task.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def capitals(folder, letters="abcdefg"):
    return written(folder, [{"prompt": x, "answer": x.upper()} for x in letters])


@pytest.mark.parametrize("num_beams", [1, 4])
def test_a_model_that_knows_the_answer_writes_it(tmp_path, num_beams):
    found = few_shot(scripted(capital), capitals(tmp_path), (0, 3), num_beams=num_beams)
    assert found["accuracy_0"] == found["accuracy_3"] == 1.0
    assert found["cut_0"] == found["cut_3"] == 0 and found["examples"] == 7


def test_a_model_that_knows_the_answer_chooses_it(tmp_path):
    rows = [{"prompt": x, "choices": ["Q", x.upper()], "answer": 1} for x in "abcde"]
    path = written(tmp_path, rows)
    for normalise in ("tokens", "characters", "answer"):
        found = few_shot(scripted(capital), path, (0, 1), normalise=normalise)
        assert found["accuracy_0"] == found["accuracy_1"] == 1.0 and found["chance"] == 0.5
    wrong = written(tmp_path, [{**row, "answer": 0} for row in rows])
    assert few_shot(scripted(capital), wrong, (0,))["accuracy_0"] == 0.0


def test_a_model_that_copies_is_right_only_if_it_is_shown_an_example(tmp_path):
    path = written(tmp_path, [{"prompt": x, "answer": "Y"} for x in "abcde"])
    found = few_shot(scripted(answer_before), path, (0, 1, 4))
    assert (found["accuracy_0"], found["accuracy_1"], found["accuracy_4"]) == (0.0, 1.0, 1.0)


def test_examples_that_do_not_fit_are_left_out_and_counted(tmp_path):
    # An end, "x Y" and a newline for each example, "x", and room for " Y" and a newline.
    path, fits_two = capitals(tmp_path), 1 + 2 * 4 + 1 + 3
    for max_len, cut in ((fits_two, 0), (fits_two - 1, 7)):
        found = few_shot(scripted(capital, max_len=max_len), path, (2,))
        assert (found["cut_2"], found["accuracy_2"]) == (cut, 1.0)
    with pytest.raises(ValueError, match=r"task.jsonl:1: 5 tokens .* max_len=4"):
        few_shot(scripted(capital, max_len=4), path, (2,))


class Unigram:
    """Says the same of every next byte: " " 0.5, "a" 0.3, "b" 0.2."""

    def apply(self, variables, tokens):
        ids, shares = jnp.asarray([SPACE, 97, 98]), jnp.asarray([0.5, 0.3, 0.2])
        logits = jnp.full(257, -20.0).at[ids].set(jnp.log(shares))
        return jnp.broadcast_to(logits, (*tokens.shape, 257)), None


def test_a_continuation_begins_with_the_token_that_joins_it_to_its_context():
    class Joining(ByteTokenizer):
        def encode(self, text):  # "q " is one token, as " a" is for most
            return super().encode(text.replace("q ", "b"))

    model = scripted(None, module=Unigram(), tokenizer=Joining())
    log_probs, counts = model.log_probs([("q", " a"), ("xq", " a"), ("x", " a")])
    np.testing.assert_allclose(log_probs, np.log([0.06, 0.06, 0.15]), rtol=1e-5)
    assert counts.tolist() == [2, 2, 2]


def test_the_likeliest_choice_depends_on_what_it_is_compared_by(tmp_path):
    model = scripted(None, module=Unigram())
    # By tokens, space included: "a" 0.5 * 0.3, "aaa" 0.5 * 0.3^3: the mean is higher for "a".
    # By characters the space counts for less in "aaa". Less what is alike anyway, all tie at 0.
    rows = [{"prompt": "q", "choices": ["bb", "a", "aaa"], "answer": i} for i in (1, 2)]
    path = written(tmp_path, rows)
    wanted = {"tokens": 1, "characters": 2}
    half = {name: few_shot(model, path, (0,), normalise=name)["accuracy_0"] for name in wanted}
    assert half == {"tokens": 0.5, "characters": 0.5}
    for name, best in wanted.items():
        mine = written(tmp_path, [{**row, "answer": best} for row in rows])
        assert few_shot(model, mine, (0,), normalise=name)["accuracy_0"] == 1.0
    log_probs, counts = model.log_probs([("q", " a"), ("q", " aaa")])
    np.testing.assert_allclose(log_probs, np.log([0.15, 0.5 * 0.3**3]), rtol=1e-5)
    assert counts.tolist() == [2, 4]


def tiny(kind):
    if kind is gpt:
        config = gpt.GPTConfig(
            num_layers=2, embed_dim=16, num_heads=2, vocab_size=257, max_len=24, init_std=0.3
        )
        return config, gpt.GPT(config)
    config = llama.LlamaConfig(
        num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=24, vocab_size=257,
        max_len=24, init_std=0.3,
    )  # fmt: skip
    return config, llama.Llama(config)


def random_params(module):
    """Norms and biases too."""
    params = nn.meta.unbox(jax.jit(lambda: language.init(module, jax.random.key(0)))())
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.2 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


@pytest.fixture(scope="module", params=[gpt, llama], ids=["gpt2", "llama"])
def folder(request, tmp_path_factory):
    """A Hugging Face folder of random weights, with a tokenizer of bytes."""
    config, module = tiny(request.param)
    name = "GPT2LMHeadModel" if request.param is gpt else "LlamaForCausalLM"
    path = tmp_path_factory.mktemp(name)
    made = Pretrained(
        config=config,
        module=module,
        params=random_params(module),
        architecture=ARCHITECTURES[name],
        theirs={"bos_token_id": 7, "eos_token_id": END},
    )
    made.save(path)
    ByteTokenizer().save(path)
    return str(path)


def opened(folder):
    from experiments.saved import open_model

    return Model.of(folder, open_model(folder), 3)


def test_a_choice_is_as_likely_as_its_tokens_one_after_another(folder):
    model, pairs = opened(folder), [("ab", " c"), ("a", " def"), ("abcdef", " gh"), ("q", " r")]
    assert model.first == [7]
    found, counts = model.log_probs(pairs)

    @jax.jit
    def next_log_probs(ids):  # of one length: what stands after a token does not change it
        return jax.nn.log_softmax(model.module.apply({"params": model.params}, ids[None])[0][0])

    for (before, after), log_prob, count in zip(pairs, found, counts, strict=True):
        ids, total = [7, *before.encode()], 0.0
        for token in after.encode():
            padded = np.zeros(12, np.int32)
            padded[: len(ids)] = ids
            total += float(next_log_probs(padded)[len(ids) - 1, token])
            ids.append(token)
        assert log_prob == pytest.approx(total, rel=1e-4)
        assert count == len(after)


def test_an_answer_after_a_short_context_is_not_changed_by_longer_ones_beside_it(folder):
    model = opened(folder)
    options = dict(num_beams=2, alpha=0.6)
    contexts = ["ab", "a longer one", "c"]
    together = model.answers(contexts, 5, **options)
    assert together == [model.answers([one], 5, **options)[0] for one in contexts]


def test_one_beam_writes_what_is_likeliest_token_after_token(folder):
    model, context = opened(folder), "ab"

    @jax.jit
    def likeliest(ids):
        return model.module.apply({"params": model.params}, ids[None])[0][0].argmax(-1)

    ids = [7, *context.encode()]
    for _ in range(5):
        padded = np.zeros(12, np.int32)
        padded[: len(ids)] = ids
        ids.append(int(likeliest(padded)[len(ids) - 1]))
    wanted = ByteTokenizer().decode(ids[3:]).split("\n")[0].strip()
    assert model.answers([context], 5, num_beams=1, alpha=0.0) == [wanted]


def test_a_folder_is_evaluated_from_the_command_line(folder, tmp_path, capsys):
    rows = [{"prompt": x, "choices": ["no", "yes"], "answer": i % 2} for i, x in enumerate("abcd")]
    path = written(tmp_path, rows)
    cli.main(["evaluate", folder, "--few-shot", path, "--shots", "0,1,2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found == evaluate(folder, EvaluateOptions(few_shot=path, shots="0,1,2"))
    for shots in (0, 1, 2):
        low, share, high = (found[f"accuracy_{shots}{end}"] for end in ("_low", "", "_high"))
        assert 0 <= low <= share <= high <= 1 and found[f"cut_{shots}"] == 0


@pytest.mark.slow
def test_a_run_is_evaluated_on_a_task(tmp_path):
    run = str(tmp_path / "run")
    small = ["--model.num-layers=1", "--model.embed-dim=16", "--train.num-steps=1"]
    cli.main(["train", "gpt", "--run-dir", run, *small])
    found = evaluate(run, EvaluateOptions(few_shot=capitals(tmp_path), shots="1", num_beams=2))
    assert found["examples"] == 7 and 0 <= found["accuracy_1"] <= 1


def test_the_interval_of_a_share_is_wilson_s():
    # 8 of 10, from the formula in exact arithmetic.
    assert interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert interval(0, 5)[0] == 0.0 and interval(5, 5)[1] == 1.0 and interval(5, 5)[0] > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(shots="0,x"), "wanted --shots as in 0,1,5, came '0,x'"),
        (dict(few_shot="a", path="b"), "wanted --path or --few-shot, came both"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EvaluateOptions(**options)


def test_more_examples_than_the_task_has_are_refused(tmp_path):
    with pytest.raises(ValueError, match="wanted 7 other examples in the context, the task has 6"):
        few_shot(scripted(capital), capitals(tmp_path), (7,))
