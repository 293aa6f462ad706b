"""The lineage as data: each milestone that has landed, and whose child it is.

A milestone file may import another only if it is named here as a parent, so the import graph is
the citation graph. `tests/test_layering.py` holds both to it.
"""

import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Milestone:
    """One paper and the file that is it.

    Attributes:
      name: as the command line knows it; `experiments/<name>.py` trains it.
      title: what it is called in a table.
      year: of its first publication.
      paper: authors and title.
      url: where to read it.
      parents: names of the milestones that it builds on.
      module: the file, as a module path.
      new: what it brought, in a few words.
      proved: what the tests show of it, in a few words each.
      claims: what the paper is known for, each a file of `experiments/claims`.
      notebook: in colab/, or None.
    """

    name: str
    title: str
    year: int
    paper: str
    url: str
    parents: tuple[str, ...] = ()
    module: str
    new: str
    proved: tuple[str, ...]
    claims: tuple[str, ...] = ()
    notebook: str | None = None


LINEAGE: tuple[Milestone, ...] = (
    Milestone(
        name="seq2seq",
        title="LSTM encoder-decoder",
        year=2014,
        paper="Sutskever et al. 2014",
        url="https://arxiv.org/abs/1409.3215",
        module="lineage_jax.models.seq2seq",
        new="a sentence in a vector, another sentence out of it",
        proved=(
            "outputs and gradients equal `torch.nn.LSTM`s, padded rows too",
            "the paper's size has the paper's 384 M parameters",
            "sharded over 8 devices on two meshes = one device",
            "decoding token by token = the whole",
        ),
        claims=("source_reversal",),
        notebook="colab/01_bottleneck_and_attention.py",
    ),
    Milestone(
        name="bahdanau",
        title="RNNsearch",
        year=2014,
        paper="Bahdanau et al. 2014",
        url="https://arxiv.org/abs/1409.0473",
        parents=("seq2seq",),
        module="lineage_jax.models.bahdanau",
        new="attention: the decoder looks back at every word of the source",
        proved=(
            "outputs and gradients equal a loop written from appendix A",
            "weights sum to one over the source, and never touch padding",
            "sharded over 8 devices on two meshes = one device",
            "decoding token by token = the whole",
        ),
        claims=("long_sentences",),
        notebook="colab/01_bottleneck_and_attention.py",
    ),
    Milestone(
        name="luong",
        title="Luong attention",
        year=2015,
        paper="Luong et al. 2015",
        url="https://arxiv.org/abs/1508.04025",
        parents=("seq2seq", "bahdanau"),
        module="lineage_jax.models.luong",
        new="scores as inner products, windows on the source, input feeding",
        proved=(
            "all seven variants equal a loop written from section 3, gradients too",
            "local windows are zero outside, and predicted ones a Gaussian within",
            "sharded over 8 devices on two meshes = one device",
            "decoding token by token = the whole",
        ),
        claims=("attention_scores",),
        notebook="colab/01_bottleneck_and_attention.py",
    ),
    Milestone(
        name="transformer",
        title="Transformer",
        year=2017,
        paper="Vaswani et al. 2017",
        url="https://arxiv.org/abs/1706.03762",
        parents=("bahdanau", "luong"),
        module="lineage_jax.models.transformer",
        new="attention in place of recurrence, in heads; residuals, norms, sinusoids",
        proved=(
            "outputs and gradients equal `transformers` Marian, tables shared or apart",
            "sinusoids are the paper's; a shift of positions is a linear map",
            "sharded over 8 devices on five meshes = one device",
            "cached decoding = the full forward pass, for prompts of unequal length too",
        ),
        claims=("path_length", "heads"),
        notebook="colab/01_bottleneck_and_attention.py",
    ),
    Milestone(
        name="ulmfit",
        title="AWD-LSTM, ULMFiT",
        year=2018,
        paper="Merity et al. 2017; Howard and Ruder 2018",
        url="https://arxiv.org/abs/1801.06146",
        parents=("seq2seq",),
        module="lineage_jax.models.ulmfit",
        new="an LSTM that drops weights; a language model first, then tuned into a classifier",
        proved=(
            "outputs and gradients equal `torch.nn.LSTM`s, their dropped weights given",
            "one mask a step for weights, one a row for activations; dropped words are nowhere",
            "averaging begins where algorithm 1 begins it, and a resumed run goes on bit for bit",
            "sharded over 8 devices on two meshes = one device",
        ),
        claims=("weight_drop", "label_efficiency"),
        notebook="colab/02_pretrain_and_transfer.py",
    ),
    Milestone(
        name="gpt",
        title="GPT-1, GPT-2, GPT-3",
        year=2018,
        paper="Radford et al. 2018, 2019; Brown et al. 2020",
        url="https://arxiv.org/abs/2005.14165",
        parents=("transformer",),
        module="lineage_jax.models.gpt",
        new="one decoder, trained on the next token alone",
        proved=(
            "outputs and gradients equal `transformers` OpenAI GPT and GPT-2",
            "sharded over 8 devices on five meshes = one device",
            "cached decoding = the full forward pass",
        ),
        claims=("transfer", "zero_shot", "in_context"),
        notebook="colab/scaling_laws.py",
    ),
    Milestone(
        name="bert",
        title="BERT",
        year=2018,
        paper="Devlin et al. 2018",
        url="https://arxiv.org/abs/1810.04805",
        parents=("gpt",),
        module="lineage_jax.models.bert",
        new="words left out, predicted from both sides; one encoder, a head for each task",
        proved=(
            "outputs and gradients equal `transformers` BERT, under each head",
            "every position sees every other, and nothing sees padding",
            "sharded over 8 devices on three meshes = one device",
        ),
        claims=("both_sides",),
        notebook="colab/02_pretrain_and_transfer.py",
    ),
    Milestone(
        name="roberta",
        title="RoBERTa",
        year=2019,
        paper="Liu et al. 2019",
        url="https://arxiv.org/abs/1907.11692",
        parents=("bert",),
        module="lineage_jax.models.roberta",
        new="no sentence pairs, masks drawn anew, more of everything",
        proved=(
            "outputs and gradients equal `transformers` RoBERTa",
            "masks repeat in no epoch, and are a function of seed and step",
            "sharded over 8 devices on three meshes = one device",
        ),
        claims=("pairs_and_masks",),
    ),
    Milestone(
        name="albert",
        title="ALBERT",
        year=2019,
        paper="Lan et al. 2019",
        url="https://arxiv.org/abs/1909.11942",
        parents=("bert",),
        module="lineage_jax.models.albert",
        new="one block for all layers, narrow tables, sentences in order or not",
        proved=(
            "outputs and gradients equal `transformers` ALBERT, the shared block's too",
            "parameters as the paper's table 1 prints them",
            "sharded over 8 devices on two meshes = one device",
        ),
        claims=("sentence_order",),
    ),
    Milestone(
        name="t5",
        title="T5",
        year=2019,
        paper="Raffel et al. 2019",
        url="https://arxiv.org/abs/1910.10683",
        parents=("transformer",),
        module="lineage_jax.models.t5",
        new="every task as text to text; relative positions; spans of text left out",
        proved=(
            "outputs and gradients equal `transformers` T5, versions 1.0 and 1.1",
            "the bias of positions depends on distance alone",
            "sharded over 8 devices on three meshes = one device",
            "cached decoding = the full forward pass, for prompts of unequal length too",
        ),
        claims=("denoising",),
        notebook="colab/02_pretrain_and_transfer.py",
    ),
    Milestone(
        name="distilbert",
        title="DistilBERT",
        year=2019,
        paper="Sanh et al. 2019",
        url="https://arxiv.org/abs/1910.01108",
        parents=("bert",),
        module="lineage_jax.models.distilbert",
        new="half of a teacher's layers, taught by its probabilities and states",
        proved=(
            "outputs and gradients equal `transformers` DistilBERT",
            "a student begins as every second layer of its teacher",
            "sharded over 8 devices on three meshes = one device",
        ),
        claims=("distillation",),
    ),
    Milestone(
        name="llama",
        title="LLaMA, Llama 2 and 3, Mistral",
        year=2023,
        paper="Touvron et al. 2023, twice; Jiang et al. 2023; Grattafiori et al. 2024",
        url="https://arxiv.org/abs/2302.13971",
        parents=("gpt",),
        module="lineage_jax.models.llama",
        new="RMSNorm, SwiGLU, rotary positions, grouped queries; smaller, trained for longer",
        proved=(
            "outputs and gradients equal `transformers` LLaMA and Mistral, rotations scaled too",
            "scores depend on distance alone; rotations equal complex numbers in float64",
            "sharded over 8 devices on three meshes = one device",
            "cached decoding = the full forward pass, in a cache smaller by H / G",
        ),
        claims=("smaller_for_longer",),
        notebook="colab/03_llama_from_gpt.py",
    ),
    Milestone(
        name="native_sparse",
        title="Native Sparse Attention",
        year=2025,
        paper="Yuan et al. 2025",
        url="https://arxiv.org/abs/2502.11089",
        parents=("llama",),
        module="lineage_jax.models.native_sparse",
        new="attention that reads blocks, squeezed or chosen, and what is near; trained so",
        proved=(
            "outputs and gradients equal a loop in float64; two branches fla's in torch",
            "with all blocks chosen, that branch equals full attention; so does a wide window",
            "sharded over 8 devices on two meshes = one device",
            "cached decoding = the full forward pass, for prompts of unequal length too",
        ),
        claims=("sparse_for_full", "needle"),
        notebook="colab/07_sparse_attention.py",
    ),
    Milestone(
        name="moba",
        title="MoBA",
        year=2025,
        paper="Lu et al. 2025",
        url="https://arxiv.org/abs/2502.13189",
        parents=("llama",),
        module="lineage_jax.models.moba",
        new="each head reads the blocks whose mean keys suit it; no parameters, so full and back",
        proved=(
            "outputs and gradients equal a loop over positions in float64",
            "as many blocks as there are = LLaMA, and so are its full layers",
            "sharded over 8 devices on two meshes = one device",
            "cached decoding = the full forward pass, for prompts of unequal length too",
        ),
        claims=("blocks_and_back",),
    ),
)


def find(name: str) -> Milestone:
    """The milestone of that name.

    Raises:
      ValueError: naming the closest names there are.
    """
    import difflib

    names = [milestone.name for milestone in LINEAGE]
    if name not in names:
        close = difflib.get_close_matches(name, names) or names
        raise ValueError(f"no milestone is called {name!r}; did you mean {', '.join(close)}?")
    return LINEAGE[names.index(name)]


def ancestors(milestone: Milestone, depth: int = 0) -> Iterator[tuple[int, Milestone]]:
    """The milestone, its parents, theirs and so on, each with its distance."""
    yield depth, milestone
    for parent in milestone.parents:
        yield from ancestors(find(parent), depth + 1)


def markdown_table() -> str:
    """The milestones as the table that stands in the README."""
    lines = ["| milestone | year | what is new | what is proved |", "|---|---|---|---|"]
    for one in LINEAGE:
        name = f"[{one.title}]({one.module.replace('.', '/')}.py)"
        proved = "<br>".join(one.proved)
        lines.append(f"| {name} | {one.year} | {one.new} | {proved} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table())
