"""Makes torch_awd_lstm and torch_ulmfit beside this file (the extra `oracle`).

    python tests/golden/make_awd_lstm.py

As `make_recurrent.py` does. Every mask of dropout is among the inputs, scaled by 1 / (1 - rate).
In torch_awd_lstm rows hold one or two documents, each of which torch reads by itself; the loss is
that of next tokens with both penalties on activations, written as in the released AWD-LSTM but for
the number of pairs of tokens. In torch_ulmfit rows are padded, and norms are of the batch.
"""

import itertools

import numpy as np

from tests.golden.make_recurrent import FOLDER, Arrays, collected, packed, padded, randomized

WIDTHS = (5, 7, 7, 5)
"""Of a word's vector, and of each layer."""
VOCAB, ROWS, LENGTH = 23, 3, 8


def mask(torch, *shape):
    """Of dropout at a rate of 0.4."""
    return torch.bernoulli(torch.full(shape, 0.6)) / 0.6


def parts(torch, seed):
    """The table and the LSTMs, with random weights."""
    layers = {
        f"layer_{i}": torch.nn.LSTM(*widths, batch_first=True)
        for i, widths in enumerate(itertools.pairwise(WIDTHS))
    }
    embed = torch.nn.Embedding(VOCAB, WIDTHS[0])
    return torch.nn.ModuleDict({"embed": embed, **layers})


def masks(torch):
    """Of words, of activations for each row, and of each layer's weights from state to state."""
    drawn = {"words": mask(torch, VOCAB)}
    names = ("input", "hidden_0", "hidden_1", "output")
    drawn |= {name: mask(torch, ROWS, 1, n) for name, n in zip(names, WIDTHS, strict=True)}
    return drawn | {f"weights_{i}": mask(torch, 4 * n, n) for i, n in enumerate(WIDTHS[1:])}


def run_layer(torch, lstm, weights, x):
    """An LSTM whose weights from state to state are multiplied by the mask `weights`."""
    given = dict(lstm.named_parameters())
    given["weight_hh_l0"] = given["weight_hh_l0"] * weights
    return torch.func.functional_call(lstm, given, (x,))[0]


def read(torch, module, tokens, drawn, over_rows):
    """Outputs of the last layer before and after dropout; `over_rows` runs one layer."""
    table = module["embed"].weight * drawn["words"][:, None]
    x = torch.nn.functional.embedding(tokens, table) * drawn["input"]
    for i in range(3):
        x = x * drawn[f"hidden_{i - 1}"] if i else x
        x = over_rows(module[f"layer_{i}"], drawn[f"weights_{i}"], x)
    return x, x * drawn["output"]


def language_model(seed: int = 0) -> tuple[Arrays, Arrays, Arrays]:
    """Weights, inputs and what torch computes: logits, and the loss with penalties."""
    import torch

    module = parts(torch, seed)
    module["head"] = torch.nn.Linear(WIDTHS[0], VOCAB)
    del module["head"].weight  # the table is
    randomized(torch, module, seed)
    tokens, targets = torch.randint(VOCAB, (2, ROWS, LENGTH))
    segments = 1 + (torch.arange(LENGTH)[None] >= torch.tensor([3, 5, LENGTH])[:, None]).int()
    drawn = masks(torch)

    def documents_apart(lstm, weights, x):
        ends = [[slice(0, 3), slice(3, 8)], [slice(0, 5), slice(5, 8)], [slice(0, 8)]]
        rows = [
            torch.cat([run_layer(torch, lstm, weights, x[row : row + 1, s]) for s in cuts], dim=1)
            for row, cuts in enumerate(ends)
        ]
        return torch.cat(rows)

    raw, dropped = read(torch, module, tokens, drawn, documents_apart)
    logits = dropped @ module["embed"].weight.T + module["head"].bias
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    same = (segments[:, 1:] == segments[:, :-1])[..., None]
    change = (same * (raw[:, 1:] - raw[:, :-1])).pow(2).sum() / raw.numel()
    loss = loss + 2 * dropped.pow(2).mean() + 1 * change
    weights, expected = collected(module, {}, {"logits": logits, "loss": loss}, loss)
    ids = dict(tokens=tokens, targets=targets, segment_ids=segments)
    inputs = {name: x.numpy().astype(np.int32) for name, x in ids.items()}
    return weights, inputs | {n: x.numpy() for n, x in drawn.items()}, expected


def classifier(seed: int = 0) -> tuple[Arrays, Arrays, Arrays]:
    """Weights, inputs and what torch computes: logits, running means and variances."""
    import torch

    lengths, labels = [6, 8, 3], 4
    module = parts(torch, seed)
    for number, (width_in, width_out) in enumerate(((3 * WIDTHS[-1], 6), (6, labels))):
        module[f"norm_{number}"] = torch.nn.BatchNorm1d(width_in)
        module[f"linear_{number}"] = torch.nn.Linear(width_in, width_out)
    randomized(torch, module, seed)
    tokens, drawn = torch.randint(VOCAB, (ROWS, LENGTH)), masks(torch)
    drawn |= {"block_0": mask(torch, ROWS, 3 * WIDTHS[-1]), "block_1": mask(torch, ROWS, 6)}

    def without_padding(lstm, weights, x):
        return padded(torch, run_layer(torch, lstm, weights, packed(torch, x, lengths)), LENGTH)

    _, hidden = read(torch, module, tokens, drawn, without_padding)
    pooled = torch.stack(
        [
            torch.cat([row[n - 1], row[:n].max(0).values, row[:n].mean(0)])
            for row, n in zip(hidden, lengths, strict=True)
        ]
    )
    x = module["linear_0"](module["norm_0"](pooled) * drawn["block_0"])
    logits = module["linear_1"](module["norm_1"](torch.relu(x)) * drawn["block_1"])
    cotangent = torch.randn_like(logits)
    results = {"logits": logits, "pooled": pooled}
    weights, expected = collected(module, {}, results, (cotangent * logits).sum())
    for number in range(2):
        norm = module[f"norm_{number}"]
        expected |= {
            f"norm_{number}.mean": norm.running_mean.numpy(),
            f"norm_{number}.var": norm.running_var.numpy(),
        }
    given = drawn | {"cotangent": cotangent}
    ids = dict(tokens=tokens.numpy(), lengths=np.asarray(lengths))
    inputs = {name: x.astype(np.int32) for name, x in ids.items()}
    return weights, inputs | {n: x.numpy() for n, x in given.items()}, expected


FOLDERS = {"torch_awd_lstm": language_model, "torch_ulmfit": classifier}


def main() -> None:
    from safetensors.numpy import save_file

    for name, make in FOLDERS.items():
        folder = FOLDER / name
        folder.mkdir(exist_ok=True)
        for file, arrays in zip(("model", "inputs", "expected"), make(), strict=True):
            arrays = {n: np.asarray(x, order="C") for n, x in arrays.items()}
            save_file(arrays, folder / f"{file}.safetensors")


if __name__ == "__main__":
    main()
