"""Four translators, 2014 to 2017, on real sentences: `python -m experiments.multi30k FOLDER`.

The folder is a copy of Multi30k (Elliott et al. 2016), 29,000 captions of pictures in English and
German: train, val and test_2016_flickr, each as .en.gz and .de.gz. Each translator learns as many
epochs of the same batches, some two hours on one core for the four. BLEU and chrF of the test set,
BLEU by the length of the sentence, and figures of it and of alignments are written to --out. The
runs there are ordinary ones: `lineage translate runs/multi30k/transformer --text "A dog runs."`.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import bahdanau, luong, seq2seq, transformer
from experiments.attention_maps import attention_maps
from experiments.evaluation import import_sacrebleu
from experiments.saved import open_run, recorded
from experiments.translating import TranslateOptions, translate_lines
from lineage_jax.data.pairs import PairsData
from lineage_jax.data.parallel_text import ParallelText, read_parallel_text
from lineage_jax.lineage import find
from lineage_jax.models.transformer import StackConfig
from lineage_jax.train.loop import TrainConfig
from lineage_jax.train.metrics import environment, write_json
from scaling.plots import write_svg
from scaling.plots.style import FAINT

NAMES = ["seq2seq", "bahdanau", "luong", "transformer"]
PAIR, TEST = ("en", "de"), "test_2016_flickr"
VOCAB_SIZE = 4096
"""Of one byte-pair encoding of both languages."""
EPOCH = 29_000 // 64
"""Updates of 64 pairs in one pass."""
NUM_STEPS = 10 * EPOCH
LONGEST = (8, 10, 12, 15)
"""Words of the longest sentence in each group of the test set but the last."""
DRAWS = 1000
"""Of the bootstrap (Koehn 2004)."""
SENTENCE = "Two dogs are running through the snow."
"""On which alignments are drawn."""
COLOURS = dict(zip(NAMES, ("#59636e", "#3a6ea5", "#c2361c", "#1c7c54"), strict=True))


def experiments(folder: str, num_steps: int = NUM_STEPS) -> dict[str, Any]:
    """The settings of each run, by milestone.

    Words are 128 wide everywhere, recurrent layers 192, and the source is read backwards where the
    paper reads it so. Recurrent weights start 2.3 times as large as in the papers, whose networks
    are five times as wide, and forget gates open (`experiments/LOG.md`). What is dropped is as the
    papers have it: nothing before Luong. Learning rates are those of the milestones' `tiny`.

    Args:
      folder: of Multi30k.
      num_steps: updates of each.
    """

    def at(part: str, language: str) -> str:
        return os.path.join(folder, f"{part}.{language}.gz")

    data = PairsData(
        source_path=at("train", "en"),
        target_path=at("train", "de"),
        heldout_source_path=at("val", "en"),
        heldout_target_path=at("val", "de"),
        tokenizer="bpe",
        vocab_size=VOCAB_SIZE,
        source_len=48,
        target_len=48,
        buckets=4,
        batch_size=64,
    )
    backwards = dataclasses.replace(data, reverse_source=True)
    words: Any = dict(embed_dim=128, source_vocab_size=VOCAB_SIZE, vocab_size=VOCAB_SIZE)
    spread = (1000 / 192) ** 0.5
    side = StackConfig(num_layers=3, num_heads=4, mlp_dim=256)
    chosen: dict[str, tuple[Any, PairsData, Mapping[str, Any]]] = {
        "seq2seq": (
            seq2seq.tiny(),
            backwards,
            dict(hidden_dim=192, init_scale=0.08 * spread, forget_bias=1.0),
        ),
        "bahdanau": (
            bahdanau.tiny(),
            data,
            dict(
                hidden_dim=192,
                alignment_dim=128,
                maxout_dim=128,
                init_std=0.01 * spread,
                alignment_std=0.001 * spread,
            ),
        ),
        "luong": (
            luong.tiny(),
            backwards,
            dict(hidden_dim=192, init_scale=0.1 * spread, forget_bias=1.0, dropout_rate=0.2),
        ),
        "transformer": (
            transformer.tiny(),
            data,
            dict(encoder=side, decoder=side, max_len=48, shared_embeddings=True),
        ),
    }
    return {
        name: dataclasses.replace(
            preset,
            model=dataclasses.replace(preset.model, **words, **sizes),
            data=pairs,
            optimizer=dataclasses.replace(preset.optimizer, warmup_steps=400),
            train=TrainConfig(num_steps=num_steps, eval_every=EPOCH, checkpoint_every=EPOCH),
        )
        for name, (preset, pairs, sizes) in chosen.items()
    }


def train(name: str, experiment: Any, folder: pathlib.Path) -> None:
    """Trains one of them, or goes on with it, and writes down how long that took."""
    from lineage_jax import sharding
    from lineage_jax.train import loop
    from lineage_jax.train.compilation import compilation_cache
    from lineage_jax.train.progress import Progress

    loop.check_run_dir(folder, experiment, resume=True)
    began, used = time.perf_counter(), time.process_time()
    with compilation_cache(), Progress() as progress:
        progress.say(f"{name}, {experiment.train.num_steps} updates:")
        loop.train(
            experiment.task(),
            experiment.train,
            sharding.make_mesh(experiment.mesh),
            folder,
            experiment=experiment,
            progress=progress,
        )
    took = {"wall": time.perf_counter() - began, "cpu": time.process_time() - used}
    with (folder / "seconds.jsonl").open("a") as file:  # a line each time it went on
        file.write(json.dumps(took) + "\n")


def measure(name: str, folder: pathlib.Path, test: ParallelText) -> dict[str, Any]:
    """What the test set says of a trained run."""
    import jax

    sources, references = ([document.text for document in side.documents] for side in test)
    written = list(translate_lines(str(folder), sources, TranslateOptions()))
    words = np.array([len(source.split()) for source in sources])
    groups = np.searchsorted(LONGEST, words)  # 0 to len(LONGEST)
    evaluations = [
        told
        for told in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        if "eval_loss" in told
    ]
    seconds = [json.loads(line) for line in (folder / "seconds.jsonl").read_text().splitlines()]
    run = open_run(folder)
    return {
        "milestone": name,
        "params": sum(leaf.size for leaf in jax.tree.leaves(run.params)),
        "updates": run.step,
        "learning_rate": run.experiment.optimizer.learning_rate,
        "heldout_loss": [told["eval_loss"] for told in evaluations],
        "wall_seconds": sum(one["wall"] for one in seconds),
        "cpu_seconds": sum(one["cpu"] for one in seconds),
        "bleu": score("BLEU", written, references),
        "chrf": score("CHRF", written, references),
        "by_length": [
            {
                "words": [int(words[groups == group].min()), int(words[groups == group].max())],
                "sentences": int((groups == group).sum()),
                "bleu": score("BLEU", *chosen(groups == group, written, references)),
            }
            for group in np.unique(groups)
        ],
        "environment": {**environment(), "cores": os.cpu_count()},
    }


def chosen(which: np.ndarray, *sides: Sequence[str]) -> list[list[str]]:
    """The sentences of each side at those places."""
    return [[side[place] for place in np.flatnonzero(which).tolist()] for side in sides]


def score(metric: str, written: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """BLEU or chrF of sacrebleu (Post 2018), 0 to 100, cased.

    Returns:
      score: of all sentences; mean and half_width: of its 95 % interval, by bootstrap over
        sentences (Koehn 2004); signature: how it was counted.
    """
    counts = getattr(import_sacrebleu().metrics, metric)()
    found = counts.corpus_score(written, [references], n_bootstrap=DRAWS)
    signature = str(counts.get_signature())
    told = json.loads(found.format(is_json=True, signature=signature))
    return {
        "score": told["score"],
        "mean": told.get("confidence_mean", 0.0),  # not told if all are 0
        "half_width": told.get("confidence_var", 0.0),
        "signature": signature,
    }


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """What was measured, for the log."""
    lines = [
        "| translator | parameters | held-out loss, nats | BLEU | chrF | minutes | CPU minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found:
        scores = (f"{one[m]['score']:.1f} ± {one[m]['half_width']:.1f}" for m in ("bleu", "chrf"))
        minutes = (f"{one[clock] / 60:.0f}" for clock in ("wall_seconds", "cpu_seconds"))
        loss = f"{one['heldout_loss'][-1]:.3f}, least {min(one['heldout_loss']):.3f}"
        cells = find(one["milestone"]).title, f"{one['params']:,}", loss, *scores, *minutes
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def drawn(found: Sequence[Mapping[str, Any]]) -> Figure:
    """BLEU by the length of the source, a line for each translator, its interval as a band."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for one in found:
        groups, colour = one["by_length"], COLOURS[one["milestone"]]
        places = np.arange(len(groups))
        bleu = np.array([group["bleu"]["score"] for group in groups])
        around = np.array([group["bleu"]["half_width"] for group in groups])
        axes.fill_between(places, bleu - around, bleu + around, color=colour, alpha=0.12, lw=0)
        label = f"{find(one['milestone']).title}, {one['bleu']['score']:.1f} in all"
        axes.plot(places, bleu, color=colour, marker="o", ms=4, label=label)
    labels = ["{} to {}\n({})".format(*group["words"], group["sentences"]) for group in groups]
    axes.set_xticks(places, labels)
    axes.set(xlabel="words of the English sentence (sentences)", ylabel="BLEU", ylim=(0, None))
    axes.grid(True, axis="y", color=FAINT, lw=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    return figure


def alignments(out: pathlib.Path, names: Sequence[str]) -> Figure:
    """Where each translator with attention looks as it writes; of several heads, their mean.

    Rows are the words that are written, columns those that are read, first word first.
    """
    figure = Figure(figsize=(3.4 * len(names), 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False).flat, names, strict=True):
        maps = attention_maps(str(out / name), SENTENCE)[0]  # from side to side
        weights, keys = maps.weights[-1].mean(0), list(maps.keys)
        if recorded(out / name)[1].data.reverse_source:  # all but the end
            order = [*range(len(keys) - 2, -1, -1), len(keys) - 1]
            weights, keys = weights[:, order], [keys[place] for place in order]
        axes.imshow(weights, cmap="Blues", vmin=0, vmax=1)
        axes.set_title(find(name).title, fontsize=10)
        axes.set_xticks(range(len(keys)), keys, rotation=90, fontsize=8)
        axes.set_yticks(range(len(weights)), [*maps.queries[1:], keys[-1]], fontsize=8)
    return figure


def compare(folder: str, out: pathlib.Path, names: Sequence[str], num_steps: int) -> None:
    """Trains those named, measures them, and draws all that were measured.

    Raises:
      ImportError: if sacrebleu is not there.
      OSError, ValueError: if the folder cannot be read, or `out` holds other runs.
    """
    import_sacrebleu()  # before anything is trained
    test = read_parallel_text(*(os.path.join(folder, f"{TEST}.{side}.gz") for side in PAIR))
    settings = experiments(folder, num_steps)
    for name in names:
        result = out / f"{name}.json"
        if not result.exists():
            train(name, settings[name], out / name)
            write_json(result, measure(name, out / name, test))
    done = [out / f"{name}.json" for name in NAMES]
    found = [json.loads(path.read_text()) for path in done if path.exists()]
    print(table(found))
    write_svg(drawn(found), out / "bleu_by_length.svg")
    attentive = [one["milestone"] for one in found if one["milestone"] != "seq2seq"]
    if attentive:
        write_svg(alignments(out, attentive), out / "alignments.svg")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; what went wrong is one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="Multi30k: train, val, test_2016_flickr, .en.gz and .de.gz")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="updates of each")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/multi30k"))
    args = parser.parse_args(arguments)
    try:
        compare(args.folder, args.out, args.only, args.steps)
    except (ImportError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
