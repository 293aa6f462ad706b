"""Blanks of a text filled in: what models that learn from text with holes were trained to do."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.converting import of_run
from experiments.saved import Saved, open_model
from experiments.speaking import ENCODERS, config_and_params, text_tokenizer
from experiments.translating import TranslateOptions, Translator
from lineage_jax.data.masking import special_tokens_after
from lineage_jax.data.tokenizers import HuggingFaceTokenizer, Tokenizer
from lineage_jax.models.t5 import T5Config
from lineage_jax.pretrained import Pretrained

BLANK = "___"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FillOptions:
    """What is filled in."""

    text: str
    """With ___ where something is missing: a token for an encoder, any number of them for T5."""
    count: int = 5
    """Tokens to name for each blank, the likeliest first; of an encoder."""

    def __post_init__(self):
        if BLANK not in self.text:
            raise ValueError(f"wanted a text with a blank, {BLANK}, got {self.text!r}")
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")


def fill(folder: str, options: FillOptions) -> list[str]:
    """Lines: the text with its blanks filled and, of an encoder, the likeliest of each blank.

    Args:
      folder: a run of BERT or one of its children, or of T5; or a Hugging Face folder of one.
      options: see there.

    Raises:
      OSError, ValueError: if it is none of them, or the text is too long for the model.
    """
    opened = open_model(folder)
    config, _ = config_and_params(opened)
    parts = options.text.split(BLANK)
    if isinstance(config, T5Config):
        return [spans_filled(Translator.of(folder, opened), parts)]
    if type(config) not in ENCODERS:
        raise ValueError(
            f"{folder}: wanted an encoder or T5, which learn to fill blanks, got "
            f"{type(config).__name__}"
        )
    made = of_run(opened) if isinstance(opened, Saved) else opened
    return tokens_filled(made, text_tokenizer(folder, opened), parts, options.count, folder)


def tokens_filled(
    model: Pretrained, tokenizer: Tokenizer, parts: Sequence[str], count: int, folder: str
) -> list[str]:
    """The text between the parts, by an encoder: one token for each blank."""
    opens, closes, mask = marks(tokenizer, folder)
    ids = [opens]
    for number, part in enumerate(parts):
        ids += [mask] * bool(number) + tokenizer.encode(part).tolist()
    row = np.array([[*ids, closes]])
    outputs = model(input_ids=row)
    name = next((n for n in ("logits", "prediction_logits") if n in outputs), None)
    if name is None or outputs[name].shape[-1] != model.config.vocab_size:
        raise ValueError(f"{folder}: wanted a model that scores tokens, not labels")
    blanks = np.flatnonzero(row[0] == mask)
    logits = outputs[name][0, blanks, : tokenizer.vocab_size].astype(np.float64)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    row[0, blanks] = shares.argmax(-1)
    lines = [tokenizer.decode(row[0, 1:-1])]
    for share in shares:
        best = np.argsort(-share)[:count]
        lines.append("  ".join(f"{tokenizer.decode([i])!r} {share[i]:.3f}" for i in best))
    return lines


def marks(tokenizer: Tokenizer, folder: str) -> tuple[int, int, int]:
    """Ids that open and close a text, and that of a blank: BERT's, RoBERTa's, or of our runs.

    Raises:
      ValueError: if the tokenizer has none.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        for names in (("[CLS]", "[SEP]", "[MASK]"), ("<s>", "</s>", "<mask>")):
            ids = [tokenizer.id_of(name) for name in names]
            if all(i is not None for i in ids):
                found: Any = tuple(ids)
                return found
        if tokenizer.id_of("[MASK]") is not None:
            raise ValueError(f"{folder}: its tokenizer has no [CLS] and [SEP]")
    special = special_tokens_after(tokenizer.vocab_size)
    return special.cls, special.sep, special.mask


def spans_filled(translator: Translator, parts: Sequence[str]) -> str:
    """The text between the parts, by T5: what it writes between two sentinels is a span."""
    sentinels = [sentinel(translator, number) for number in range(len(parts))]
    ids: list[int] = []
    for number, part in enumerate(parts):
        ids += [sentinels[number - 1]] * bool(number)
        ids += translator.source_tokenizer.encode(part).tolist()
    row = np.array([*ids, translator.source_tokenizer.end_of_text])
    (written,) = translator.written([row], TranslateOptions(batch_size=1))
    spans: dict[int, list[int]] = {}
    here: list[int] = []
    for i in written.tolist():
        if i in sentinels:
            here = spans.setdefault(i, [])
        else:
            here.append(i)
    filled = [translator.tokenizer.decode(spans.get(one, [])) for one in sentinels[:-1]]
    between = [*(f"[{span}]" for span in filled), ""]
    return "".join(part + span for part, span in zip(parts, between, strict=True))


def sentinel(translator: Translator, number: int) -> int:
    """The id of <extra_id_number>: the tokenizer's, or, as released, from the top downwards."""
    tokenizer, config = translator.tokenizer, translator.module.config
    found = None
    if isinstance(tokenizer, HuggingFaceTokenizer):
        found = tokenizer.id_of(f"<extra_id_{number}>")
    return config.vocab_size - 1 - number if found is None else found
