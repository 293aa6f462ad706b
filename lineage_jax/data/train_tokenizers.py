"""Tokenizers learnt from text: byte-level BPE, WordPiece, Unigram, and plain words."""

import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from lineage_jax.data.cache import cached
from lineage_jax.data.sources import Corpus
from lineage_jax.data.tokenizers import END_OF_TEXT, HuggingFaceTokenizer

Model = Literal["bpe", "wordpiece", "unigram"]

# Where no other size is asked for.
BPE_VOCAB_SIZE = 8192  # of the benchmark's model: 2^13 keeps the softmax of a small model small
WORD_VOCAB_SIZE = 30_000  # the most frequent words of each language (Bahdanau et al. 2014, 4.1)

BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # in the order of BERT's vocab.txt
T5_TOKENS = ("<pad>", "</s>", "<unk>")  # in the order of T5's spiece.model


def train_tokenizer(
    model: Model, texts: Iterable[str], vocab_size: int, *, show_progress: bool = False
) -> HuggingFaceTokenizer:
    """Learns a tokenizer of that model.

    Only BPE is the same each time: the trainers of WordPiece and Unigram settle ties by chance.
    So train those once, keep the file, and give every process that file.

    Raises:
      ValueError: `vocab_size` has no room for what the model cannot do without.
    """
    trainers = {"bpe": train_bpe, "wordpiece": train_wordpiece, "unigram": train_unigram}
    return trainers[model](texts, vocab_size, show_progress=show_progress)


def train_cached(
    model: Literal["bpe", "words"],
    corpora: Sequence[Corpus],
    vocab_size: int,
    cache_dir: str | os.PathLike,
) -> HuggingFaceTokenizer:
    """A tokenizer trained on some corpora, or what that gave before, from `cache_dir`.

    The models are those that every process which trains one for itself learns alike.
    """
    train = {"bpe": train_bpe, "words": train_words}[model]
    texts = (document.text for corpus in corpora for document in corpus.documents)
    digests = "-".join(corpus.digest[:32] for corpus in corpora)
    path = os.path.join(os.path.expanduser(cache_dir), f"{model}-{digests}-{vocab_size}")
    return HuggingFaceTokenizer(
        cached(path, lambda: train(texts, vocab_size).content.encode()).decode()
    )


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, show_progress: bool = False
) -> HuggingFaceTokenizer:
    """Learns a byte-level byte-pair encoding: GPT-2's (Radford et al. 2019, section 2.2).

    All 256 bytes are in the vocabulary, so that no text is unknown and every text comes back
    exactly; id 0 is the end of text. The same texts give the same tokenizer. A short text may
    not have enough pairs to fill the vocabulary: then `vocab_size` of what comes back is smaller.

    Raises:
      ValueError: `vocab_size` is below 257, the bytes and the end of text.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ValueError(
            f"wanted a BPE vocabulary of at least 257 (256 bytes and the end of text), came "
            f"{vocab_size}; ask for more, or take the tokenizer `bytes`"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        # Without it, a byte that the texts do not have would vanish when it is met later.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return HuggingFaceTokenizer(tokenizer.to_str())


def train_wordpiece(
    texts: Iterable[str], vocab_size: int, *, show_progress: bool = False
) -> HuggingFaceTokenizer:
    """Learns WordPiece as BERT has it (Devlin et al. 2018, section 3; Wu et al. 2016, 4.1).

    Words are split at white space and punctuation, as for the cased BERT, and a word's pieces but
    the first begin with "##". White space does not come back, and a word with a character that the
    texts do not have is [UNK]. Schuster & Nakajima 2012 add the piece that raises the likelihood
    most; this trainer, of Hugging Face, adds the most frequent pair, as BPE does.

    Raises:
      ValueError: `vocab_size` has no room for a piece beside BERT's special tokens.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    _check_room("WordPiece", vocab_size, BERT_TOKENS)
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(BERT_TOKENS), show_progress=show_progress
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # for those who load it elsewhere
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return HuggingFaceTokenizer(tokenizer.to_str())


def train_unigram(
    texts: Iterable[str], vocab_size: int, *, show_progress: bool = False
) -> HuggingFaceTokenizer:
    """Learns a unigram language model of pieces (Kudo 2018, section 3.2), with T5's special tokens.

    Its letters are the 256 bytes, as in `train_bpe`, where T5's are characters: so that no text is
    unknown and every text comes back exactly. On ten megabytes it takes a minute.

    Raises:
      ValueError: `vocab_size` is below 259, the bytes and T5's special tokens.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    if vocab_size < 256 + len(T5_TOKENS):
        raise ValueError(
            f"wanted a Unigram vocabulary of at least {256 + len(T5_TOKENS)} (256 bytes and "
            f"{' '.join(T5_TOKENS)}), came {vocab_size}"
        )
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    # A word, the space before it and the mark behind it; or marks; or white space. The trainer
    # takes for a piece only what it has seen different letters follow: "and" would not be one if
    # words were cut before their commas. And no special token that a text spells out is uncut.
    pattern = tokenizers.Regex(r" ?\w+[^\w\s]?| ?[^\w\s]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=list(T5_TOKENS),
        unk_token="<unk>",
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>",
        pair="$A </s> $B </s>",
        special_tokens=[("</s>", tokenizer.token_to_id("</s>"))],
    )
    return HuggingFaceTokenizer(tokenizer.to_str())


def train_words(texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
    """Takes the most frequent words, and all others as <unk> (Sutskever et al. 2014, section 3.1).

    Words are split at spaces, hyphens and punctuation: "vingt-deux mille" is three. A word carries
    the space or the hyphen before it, and the text a space in front, so that a text of known words
    comes back exactly. The same texts give the same tokenizer.

    Raises:
      ValueError: `vocab_size` has no room for a word beside the special tokens.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    special = ("</s>", "<unk>")
    _check_room("words", vocab_size, special)
    tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Prepend(" ")
    pattern = tokenizers.Regex(r"[ -]?\w+| ?[^\w\s]|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, special_tokens=list(special), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return HuggingFaceTokenizer(tokenizer.to_str())


def add_sentinels(tokenizer: HuggingFaceTokenizer, num_sentinels: int) -> HuggingFaceTokenizer:
    """Adds T5's sentinels, which stand for the spans that are cut out of a text (Raffel et al.
    2020, section 3.1.4): <extra_id_0> is the last id, <extra_id_1> the one before, and so on down,
    as in T5's vocabulary.
    """
    import tokenizers

    more: Any = tokenizers.Tokenizer.from_str(tokenizer.content)
    more.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(num_sentinels))])
    return HuggingFaceTokenizer(more.to_str())


def _check_room(model: str, vocab_size: int, special: Sequence[str]) -> None:
    if vocab_size <= len(special):
        raise ValueError(
            f"wanted a {model} vocabulary of more than {len(special)} "
            f"(the special tokens {' '.join(special)}), came {vocab_size}"
        )
