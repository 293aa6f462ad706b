"""What a trained model says: text continued, sentences translated, weights for others to load."""

import dataclasses
import functools
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import linen as nn

from experiments import translation
from experiments.saved import Saved, open_model
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
    roberta,
    seq2seq,
    t5,
    transformer,
)
from lineage_jax.pretrained import Pretrained
from lineage_jax.pretrained.weights import ARCHITECTURES
from lineage_jax.sampling.beam import batch_axes, beam_search
from lineage_jax.sampling.decode import Decoder, Sampling, generate, stream
from lineage_jax.sampling.layout import for_decoding
from lineage_jax.typing import Params

LANGUAGE_MODELS: dict[type, tuple[Callable[[Any], nn.Module], Callable[..., Any]]] = {
    gpt.GPTConfig: (gpt.GPT, gpt.empty_cache),
    llama.LlamaConfig: (llama.Llama, llama.empty_cache),
}
"""Config -> the module, and an empty cache of rows and positions."""

TRANSLATORS: dict[type, Callable[[Any], nn.Module]] = {
    seq2seq.Seq2SeqConfig: seq2seq.Seq2Seq,
    bahdanau.BahdanauConfig: bahdanau.Bahdanau,
    luong.LuongConfig: luong.Luong,
    transformer.TransformerConfig: transformer.Transformer,
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
        raise ValueError(f"{folder}: wanted a language model, got {type(config).__name__}")
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


def bound(module: nn.Module, params: Params) -> Decoder:
    """A language model with its parameters."""

    def decoder(tokens, positions, cache):
        return module.apply({"params": params}, tokens, positions, cache=cache)

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


def text_tokenizer(folder: str, opened: Saved | Pretrained) -> Tokenizer:
    """That which a model of one language was trained with."""
    return load_tokenizer(folder) if isinstance(opened, Pretrained) else tokenizers_of(opened)[0]


def first_token(opened: Saved | Pretrained, tokenizer: Tokenizer) -> list[int]:
    """What stands before a text: of ours the end of another, of theirs what their config says."""
    if isinstance(opened, Saved):
        return [tokenizer.end_of_text]
    begin = opened.theirs.get("bos_token_id")
    return [tokenizer.end_of_text if begin is None else begin]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TranslateOptions:
    """How sentences are translated."""

    text: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A sentence, or several; lines of standard input if not given."""
    num_beams: int = 4
    """Translations kept at each token (Vaswani et al. 2017, section 6.1); 1 keeps the likeliest."""
    alpha: float = 0.6
    """Of the penalty on short translations (Vaswani et al. 2017, section 6.1)."""
    batch_size: int = 32
    """Sentences at a time."""

    def __post_init__(self):
        for name in ("num_beams", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def translate_lines(
    folder: str, sentences: Sequence[str], options: TranslateOptions
) -> Iterator[str]:
    """The likeliest translation of each sentence that beam search finds.

    Args:
      folder: a run of a translator, or a Hugging Face folder of one with a tokenizer.
      sentences: to be translated.
      options: see there.

    Raises:
      OSError, ValueError: if the folder is neither, or a sentence is too long for the model.
    """
    opened = open_model(folder)
    config, params = config_and_params(opened)
    if type(config) not in TRANSLATORS:
        raise ValueError(f"{folder}: wanted a translator, got {type(config).__name__}")
    module = TRANSLATORS[type(config)](config)
    if isinstance(opened, Saved):
        data = opened.experiment.data
        source_tokenizer, tokenizer = tokenizers_of(opened)
        source_len, length = data.source_len, data.target_len
        start, reverse = tokenizer.end_of_text, data.reverse_source
    else:
        source_tokenizer = tokenizer = load_tokenizer(folder)
        source_len = length = config.max_len
        start, reverse = opened.theirs["decoder_start_token_id"], False
    end = tokenizer.end_of_text

    @jax.jit
    def search(params, source, mask):
        variables = {"params": params}

        def begin(rows):
            ids, real = jnp.zeros((rows, source_len), jnp.int32), jnp.ones((rows, source_len), bool)
            return module.apply(variables, ids, real, length, method="start")

        def decoder(tokens, positions, cache):
            return module.apply(variables, tokens, positions, cache, method="decode")

        cache = module.apply(variables, source, mask, length, method="start")
        starts = jnp.full(source.shape[0], start, jnp.int32)
        found, _ = beam_search(
            decoder, cache, batch_axes(begin), starts, length - 1, end,
            num_beams=options.num_beams, alpha=options.alpha,
        )  # fmt: skip
        return found[:, 0]

    laid = laid_out(params)
    for first in range(0, len(sentences), options.batch_size):
        some = sentences[first : first + options.batch_size]
        rows = [
            np.append(source_tokenizer.encode(one), source_tokenizer.end_of_text) for one in some
        ]
        source, mask = padded(rows, options.batch_size, source_len, reverse)
        found = np.asarray(search(laid, jnp.asarray(source), jnp.asarray(mask)))
        for ids in found[: len(some)]:
            yield tokenizer.decode(translation.until(ids, end))


def padded(
    rows: Sequence[np.ndarray], count: int, length: int, reverse: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Sentences, each closed with its end, as a batch of `count` rows and its mask.

    Raises:
      ValueError: if one is longer than `length`.
    """
    source, mask = np.zeros((count, length), np.int32), np.zeros((count, length), bool)
    mask[len(rows) :, 0] = True  # a row of padding alone would average over nothing
    for i, ids in enumerate(rows):
        if len(ids) > length:
            raise ValueError(f"sentence {i + 1} has {len(ids)} tokens, more than the {length} read")
        ids = np.append(ids[-2::-1], ids[-1:]) if reverse else ids
        source[i, : len(ids)], mask[i, : len(ids)] = ids, True
    return source, mask


def convert(source: str | os.PathLike[str], destination: str | os.PathLike[str]) -> str:
    """Writes a run of ours, or a Hugging Face folder, as a Hugging Face folder.

    Returns:
      A line that says what was written.

    Raises:
      OSError, ValueError: if the source is neither, theirs has no class for it, or the destination
        holds a model already.
    """
    opened = open_model(source)
    made = of_run(opened) if isinstance(opened, Saved) else opened
    made.save(destination)
    if isinstance(opened, Saved):
        tokenizers_of(opened)[-1].save(destination)
    else:
        for pattern in TOKENIZER_FILES:
            for path in pathlib.Path(source).glob(pattern):
                shutil.copy(path, destination)
    size = sum(leaf.size for leaf in jax.tree.leaves(made.params))
    return f"{destination}: {made.architecture.name}, {size:,} parameters"


TOKENIZER_FILES = (
    "tokenizer*",
    "*.model",
    "*.spm",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
"""What a Hugging Face folder holds for its tokenizer, and for `generate`."""


def tokenizers_of(run: Saved) -> tuple[Tokenizer, ...]:
    """Of the text that a run learnt, or of source and target.

    Raises:
      ValueError: if it learnt tokens that came without one.
    """
    data = run.experiment.data
    if isinstance(data, PairsData):
        pairs = load_pairs(data)
        return pairs.source_tokenizer, pairs.target_tokenizer
    tokenizer = load_text(data).tokenizer
    if tokenizer is None:
        raise ValueError("the run learnt tokens that came without a tokenizer.json")
    return (tokenizer,)


def of_run(run: Saved) -> Pretrained:
    """A run as a model that has a class in Hugging Face's library.

    Raises:
      ValueError: if it has none.
    """
    config, params, name = run.experiment.model, run.params, None
    if isinstance(config, gpt.GPTConfig):
        name = "GPT2LMHeadModel" if config.norm_first else "OpenAIGPTLMHeadModel"
        name = name if config.local_window is None else "GPTNeoForCausalLM"
    elif isinstance(config, llama.LlamaConfig):
        name = "LlamaForCausalLM" if config.window is None else "MistralForCausalLM"
    elif isinstance(config, t5.T5Config):
        name = "T5ForConditionalGeneration"
    elif isinstance(config, transformer.TransformerConfig):
        name = "MarianMTModel"
        if not config.score_bias:
            config = dataclasses.replace(config, score_bias=True)
            params = {**params, "score_bias": jnp.zeros(config.vocab_size)}
    elif type(config) in ENCODERS:
        name = ENCODERS[type(config)] + ("ForPreTraining" if "pairs" in params else "ForMaskedLM")
    if name is None:
        raise ValueError(f"no class of theirs is a {type(config).__name__}")
    architecture, end = ARCHITECTURES[name], tokenizers_of(run)[-1].end_of_text
    special = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    return Pretrained(
        config=config,
        module=architecture.module(config),
        params=params,
        architecture=architecture,
        theirs=dict.fromkeys(special, end),
    )
