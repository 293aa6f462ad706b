"""What a trained model says: which kind each is, its tokens, and how a text goes on."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import linen as nn

from experiments import translation
from experiments.saved import Saved, open_model
from lineage_jax.data.labelled import LabelledData, load_labelled
from lineage_jax.data.pairs import PairsData, load_pairs
from lineage_jax.data.text import load_text
from lineage_jax.data.tokenizers import Tokenizer, load_tokenizer
from lineage_jax.models import (
    albert,
    bahdanau,
    bert,
    distilbert,
    gpt,
    llama,
    luong,
    moba,
    native_sparse,
    roberta,
    seq2seq,
    t5,
    transformer,
    ulmfit,
)
from lineage_jax.pretrained import Pretrained
from lineage_jax.sampling.decode import Decoder, Sampling, generate, stream
from lineage_jax.sampling.layout import for_decoding
from lineage_jax.typing import Params

LANGUAGE_MODELS: dict[type, tuple[Callable[[Any], nn.Module], Callable[..., Any]]] = {
    gpt.GPTConfig: (gpt.GPT, gpt.empty_cache),
    llama.LlamaConfig: (llama.Llama, llama.empty_cache),
    moba.MobaConfig: (moba.Moba, moba.empty_cache),
    native_sparse.NativeSparseConfig: (native_sparse.NativeSparse, native_sparse.empty_cache),
    ulmfit.ULMFiTConfig: (ulmfit.ULMFiT, ulmfit.empty_cache),
}
"""Config -> the module, and an empty cache of rows and positions."""

TRANSLATORS: dict[type, Callable[[Any], nn.Module]] = {
    seq2seq.Seq2SeqConfig: seq2seq.Seq2Seq,
    bahdanau.BahdanauConfig: bahdanau.Bahdanau,
    luong.LuongConfig: luong.Luong,
    transformer.TransformerConfig: transformer.Transformer,
    t5.T5Config: t5.T5,
}
"""Config -> the module."""


ENCODERS: dict[type, str] = {
    bert.BertConfig: "Bert",
    roberta.RobertaConfig: "Roberta",
    albert.AlbertConfig: "Albert",
    distilbert.DistilBertConfig: "DistilBert",
}
"""Config -> what the names of Hugging Face's classes begin with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How a text goes on."""

    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """What it begins with; several are continued side by side."""
    num_tokens: int = 200
    """Tokens to add at most."""
    temperature: float = 1.0
    """0 takes the likeliest token; 1 draws from the model's distribution."""
    top_k: int | None = None
    """Draw among the k likeliest tokens only."""
    top_p: float | None = None
    """Draw among the fewest likeliest tokens whose probabilities reach p only."""
    repetition_penalty: float = 1.0
    """Above 1, makes what was there before less likely."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self):
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, got {self.num_tokens}")

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
        )


def generate_text(folder: str, options: GenerateOptions) -> Iterator[str]:
    """Pieces of text to be printed as they come: of one prompt token by token, of several each.

    Args:
      folder: a run of a language model, or a Hugging Face folder with a tokenizer.
      options: see there.

    Raises:
      OSError, ValueError: if the folder is neither, or the text would be too long for the model.
    """
    options.sampling  # noqa: B018, refuses what makes no sense before anything is read
    opened = open_model(folder)
    config, params = config_and_params(opened)
    if type(config) not in LANGUAGE_MODELS:
        raise no_language_model(folder, opened)
    build, empty_cache = LANGUAGE_MODELS[type(config)]
    module, tokenizer = build(config), text_tokenizer(folder, opened)
    first, texts = first_token(opened, tokenizer), options.prompt or ("",)
    rows = [np.append(first, tokenizer.encode(text)) for text in texts]
    longest = max(map(len, rows))
    if longest + options.num_tokens > config.max_len:
        raise ValueError(
            f"a prompt of {longest} tokens and {options.num_tokens} more are longer than the "
            f"model's max_len={config.max_len}; take a lower --num-tokens"
        )
    prompt = np.zeros((len(rows), longest), np.int32)
    for row, ids in zip(prompt, rows, strict=True):
        row[: len(ids)] = ids
    lengths = jnp.asarray([len(ids) for ids in rows])
    decoder = bound(module, laid_out(params))
    cache = empty_cache(config, len(rows), longest + options.num_tokens)
    told: dict[str, Any] = dict(
        num_tokens=options.num_tokens,
        rng=jax.random.key(options.seed),
        sampling=options.sampling,
        stop=(tokenizer.end_of_text,),
    )
    given = cache, jnp.asarray(prompt), lengths
    if len(rows) == 1:
        yield texts[0]
        yield from pieces(tokenizer, (int(t[0]) for t in stream(decoder, *given, **told)))
        return
    run = jax.jit(functools.partial(generate, decoder, **told))
    for text, ids in zip(texts, np.asarray(run(*given)), strict=True):
        yield f"{text}{tokenizer.decode(translation.until(ids, tokenizer.end_of_text))}\n\n"


def no_language_model(folder: str, opened: Saved | Pretrained) -> ValueError:
    """What is wrong with a model that should say how a text goes on."""
    config, params = config_and_params(opened)
    labelled = isinstance(opened, Saved) and isinstance(opened.experiment.data, LabelledData)
    came = None
    if labelled or "classifier" in params:
        came = "a classifier, which tells labels apart"
    return ValueError(f"{folder}: wanted a language model, got {came or type(config).__name__}")


def bound(module: nn.Module, params: Params) -> Decoder:
    """A language model with its parameters."""

    def decoder(tokens, positions, cache, mask=None):
        return module.apply({"params": params}, tokens, positions, cache=cache, mask=mask)

    return decoder


def laid_out(params: Params) -> Params:
    """For decoding here: a CPU wants them otherwise than they are trained."""
    return jax.jit(for_decoding)(params) if jax.default_backend() == "cpu" else params


def pieces(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Text as its tokens come; a character is not told before all of its bytes are there."""
    ids: list[int] = []
    told = ""
    for token in tokens:
        if token == tokenizer.end_of_text:
            break
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(told) :]
            told = text
    yield tokenizer.decode(ids)[len(told) :]


def config_and_params(opened: Saved | Pretrained) -> tuple[Any, Params]:
    """Of the model."""
    config = opened.experiment.model if isinstance(opened, Saved) else opened.config
    return config, opened.params


SOURCE_TOKENIZER = "source_tokenizer"
"""In a Hugging Face folder, where a translator's tokenizer of what it reads is, if it has two."""


def text_tokenizer(folder: str, opened: Saved | Pretrained | None = None) -> Tokenizer:
    """That which a model of one language was trained with; the folder is opened if it is not."""
    opened = open_model(folder) if opened is None else opened
    return load_tokenizer(folder) if isinstance(opened, Pretrained) else tokenizers_of(opened)[0]


def first_token(opened: Saved | Pretrained, tokenizer: Tokenizer) -> list[int]:
    """What stands before a text: of ours the end of another, of theirs what their config says."""
    if isinstance(opened, Saved):
        return [tokenizer.end_of_text]
    begin = opened.theirs.get("bos_token_id")
    return [tokenizer.end_of_text if begin is None else begin]


def tokenizers_of(run: Saved) -> tuple[Tokenizer, ...]:
    """Of the text that a run learnt, or of source and target.

    Raises:
      ValueError: if it learnt tokens that came without one.
    """
    data = run.experiment.data
    if isinstance(data, PairsData):
        pairs = load_pairs(data)
        return pairs.source_tokenizer, pairs.target_tokenizer
    if isinstance(data, LabelledData):
        start = run.experiment.start_from
        return (load_labelled(data).tokenizer if start is None else text_tokenizer(start),)
    tokenizer = load_text(data).tokenizer
    if tokenizer is None:
        raise ValueError("the run learnt tokens that came without a tokenizer.json")
    return (tokenizer,)
