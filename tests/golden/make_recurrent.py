"""Makes torch_lstm, torch_gru and torch_seq2seq beside this file (the extra `oracle`).

    python tests/golden/make_recurrent.py

Each folder holds the weights under torch's names (model.safetensors), the inputs, and what
`torch.nn` computed from them (expected.safetensors): outputs, final states, and the gradient with
respect to every weight and input of `sum(cotangent.X * X)` over these, or of the loss. Every weight
is random, sizes are odd, and rows of unequal length are packed sequences.
"""

import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent

Arrays = dict[str, np.ndarray]


def packed(torch, x, lengths):
    """Rows of those lengths, whose padding torch never sees."""
    pack = torch.nn.utils.rnn.pack_padded_sequence
    return pack(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)


def padded(torch, x, length):
    return torch.nn.utils.rnn.pad_packed_sequence(x, batch_first=True, total_length=length)[0]


def randomized(torch, module, seed):
    """The module with weights that are neither zero nor alike."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            value.copy_(0.4 * torch.randn_like(value))
    return module


def collected(module, inputs, outputs, loss):
    """Weights; and results with the gradients of the loss."""
    loss.backward()
    expected = dict(outputs)
    expected |= {f"grad.{name}": value.grad for name, value in module.named_parameters()}
    expected |= {f"grad.{name}": x.grad for name, x in inputs.items() if x.requires_grad}
    weights = dict(module.named_parameters())
    return [
        {name: x.detach().numpy().copy() for name, x in arrays.items()}
        for arrays in (weights, expected)
    ]


def recurrence(kind: str, seed: int = 0) -> tuple[Arrays, Arrays, Arrays]:
    """Two layers in both directions: weights, inputs and what torch computes.

    In "GRU" the matrix of the candidate is diagonal and has no bias of its own, as then the reset
    gate may stand on either side of the product.
    """
    import torch

    lengths, length, width, units = [6, 1, 4], 6, 5, 7
    module = getattr(torch.nn, kind)(width, units, 2, batch_first=True, bidirectional=True)
    randomized(torch, module, seed)
    if kind == "GRU":
        with torch.no_grad():
            for name, value in module.named_parameters():
                if name.startswith("weight_hh"):
                    value[2 * units :] = torch.diag(torch.diagonal(value[2 * units :]))
                if name.startswith("bias_hh"):
                    value[2 * units :] = 0
    given = {"x": torch.randn(3, length, width, requires_grad=True)}
    names = ("hidden", "cell") if kind == "LSTM" else ("hidden",)
    given |= {name: torch.randn(4, 3, units, requires_grad=True) for name in names}
    states = tuple(given[name] for name in names)
    outputs, after = module(
        packed(torch, given["x"], lengths), states if kind == "LSTM" else states[0]
    )
    after = after if kind == "LSTM" else (after,)
    results = {"outputs": padded(torch, outputs, length)}
    results |= dict(zip(names, after, strict=True))
    cotangents = {f"cotangent.{name}": torch.randn_like(x) for name, x in results.items()}
    loss = sum((cotangents[f"cotangent.{name}"] * x).sum() for name, x in results.items())
    weights, expected = collected(module, given, results, loss)
    inputs = {name: x.detach().numpy().copy() for name, x in (given | cotangents).items()}
    return weights, inputs | {"lengths": np.asarray(lengths, np.int32)}, expected


def seq2seq(seed: int = 0) -> tuple[Arrays, Arrays, Arrays]:
    """Three layers a side, made of `torch.nn.LSTM`: weights, inputs and what torch computes."""
    import torch

    sizes = dict(source=23, target=19, embed=5, hidden=7, layers=3)
    lengths, target_lengths = [6, 2, 5], [3, 7, 1]
    lstm = dict(num_layers=sizes["layers"], batch_first=True)
    module = torch.nn.ModuleDict(
        {
            "source": torch.nn.Embedding(sizes["source"], sizes["embed"]),
            "encoder": torch.nn.LSTM(sizes["embed"], sizes["hidden"], **lstm),
            "target": torch.nn.Embedding(sizes["target"], sizes["embed"]),
            "decoder": torch.nn.LSTM(sizes["embed"], sizes["hidden"], **lstm),
            "head": torch.nn.Linear(sizes["hidden"], sizes["target"], bias=False),
        }
    )
    randomized(torch, module, seed)
    source, tokens, targets = (
        torch.randint(sizes[side], (3, length))
        for side, length in (("source", 6), ("target", 7), ("target", 7))
    )
    _, states = module["encoder"](packed(torch, module["source"](source), lengths))
    read = packed(torch, module["target"](tokens), target_lengths)
    outputs = padded(torch, module["decoder"](read, states)[0], 7)
    logits = module["head"](outputs)
    kept = torch.arange(7)[None] < torch.tensor(target_lengths)[:, None]
    loss = torch.nn.functional.cross_entropy(logits[kept], targets[kept])
    weights, expected = collected(module, {}, {"logits": logits, "loss": loss}, loss)
    inputs = dict(source=source, tokens=tokens, targets=targets)
    inputs |= dict(lengths=torch.tensor(lengths), target_lengths=torch.tensor(target_lengths))
    return weights, {n: x.numpy().astype(np.int32) for n, x in inputs.items()}, expected


def compute(name: str, seed: int = 0) -> tuple[Arrays, Arrays, Arrays]:
    """Weights, inputs and expected arrays of the folder of that name."""
    if name == "torch_seq2seq":
        return seq2seq(seed)
    return recurrence({"torch_lstm": "LSTM", "torch_gru": "GRU"}[name], seed)


NAMES = ("torch_lstm", "torch_gru", "torch_seq2seq")


def main() -> None:
    from safetensors.numpy import save_file

    for name in NAMES:
        folder = FOLDER / name
        folder.mkdir(exist_ok=True)
        for file, arrays in zip(("model", "inputs", "expected"), compute(name), strict=True):
            save_file(arrays, folder / f"{file}.safetensors")


if __name__ == "__main__":
    main()
