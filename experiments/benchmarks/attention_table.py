"""The tables of a record of `attention_static`: on a terminal, and in docs/sparse_attention.md."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

BRANCHES = ("full", "splash", "compressed", "selected", "window")
SPARSE = ("compressed", "selected", "window")
"""Of `BRANCHES`, those that Native Sparse Attention is the sum of."""
MEASURED = (*BRANCHES, "decode")
DIRECTIONS = ("forward", "backward")

PAGE = Path(__file__).parents[2] / "docs" / "sparse_attention.md"
BEGIN, END = "<!-- static tables: begin -->", "<!-- static tables: end -->"

NAMES = {
    "full": "full: `flash_attention`",
    "splash": "full: splash attention of jax",
    "compressed": "compressed, with scores and choice",
    "selected": "selected",
    "window": "window of 512",
    "sparse": "the three together",
}

HEAD = (
    "| chip | tokens | what | | kernels, ms | around, ms | spills | temporaries, GB "
    "| times as fast as full |\n|---|---|---|---|---|---|---|---|---|"
)


def with_sum(of_length: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of one length, and under "sparse" the three branches together."""
    parts = [of_length[branch] for branch in SPARSE]
    summed: dict[str, dict[str, float]] = {}
    for direction in DIRECTIONS:
        keys = set.intersection(*(set(part[direction]) for part in parts))
        keys &= {"milliseconds", "spills", "around"}
        summed[direction] = {
            key: round(sum(part[direction][key] for part in parts), 3) for key in keys
        }
    return {**of_length, "sparse": summed}


def lines(chip: str, length: int, branch: str, of_length: Mapping[str, Any]) -> Iterator[str]:
    """Lines of a table of one branch, or "decode", or "sparse" for the three together."""
    if branch == "decode":
        one = of_length[branch]
        around, temporaries = one.get("refused", f"{one.get('around')}"), one.get("temporaries")
        yield f"| {chip} | {length} | sparse | decode | none | {around} | | {temporaries} | |"
        return
    full = of_length.get("full", {})
    for direction in DIRECTIONS:
        one = of_length[branch][direction]
        around, temporaries = one.get("refused", one.get("around", "")), one.get("temporaries", "")
        times = f"{full[direction]['milliseconds'] / one['milliseconds']:.2f}" if full else ""
        yield (
            f"| {chip} | {length} | {branch} | {direction} | {one['milliseconds']:.2f} | {around} "
            f"| {one['spills']} | {temporaries} | {times} |"
        )


def page(told: Mapping[str, Any]) -> str:
    """The tables of the docs, a column for each chip."""
    chips = list(told)
    lengths = sorted({int(length) for one in told.values() for length in one["lengths"]})
    tables = []
    for length in reversed(lengths):
        of = [with_sum(told[chip]["lengths"][str(length)]) for chip in chips]
        for direction in DIRECTIONS:
            rows = [(NAMES[x], [cell(one[x][direction]) for one in of]) for x in NAMES]
            for name, keys in RATIOS.items():
                rows.append((name, [ratio(one, direction, keys) for one in of]))
            tables.append(table(f"{direction} at {length:,} tokens, ms", chips, rows))
        whole = [x for x in BRANCHES if x != "splash"]
        rows = [(NAMES[x], [both(one[x], "temporaries") for one in of]) for x in whole]
        decoded = [str(one.get("decode", {}).get("temporaries", "")) for one in of]
        tables.append(
            table(
                f"temporaries at {length:,} tokens, GB, forward and backward",
                chips,
                [*rows, ("a token of 16 rows is decoded", decoded)],
            )
        )
        rows = [(NAMES[x], [both(one[x], "spills") for one in of]) for x in BRANCHES]
        tables.append(table(f"spills at {length:,} tokens, forward and backward", chips, rows))
    return "\n\n".join([made_with(told), *filter(None, tables)])


RATIOS = {
    "times as fast as `flash_attention`": ("milliseconds",),
    "the same, with what is around": ("milliseconds", "around"),
}


def cell(one: Mapping[str, Any]) -> str:
    """Milliseconds of kernels, and of what is around if it is known."""
    around = f" + {one['around']:.1f}" if "around" in one else ""
    return f"{one['milliseconds']:.1f}{around}"


def ratio(of_length: Mapping[str, Any], direction: str, keys: Sequence[str]) -> str:
    """How many times as fast as full attention the three branches are together."""
    sides = [of_length[branch][direction] for branch in ("full", "sparse")]
    if not all(key in side for side in sides for key in keys):
        return ""
    full, sparse = (sum(side[key] for key in keys) for side in sides)
    return f"{full / sparse:.2f}"


def both(of_branch: Mapping[str, Any], key: str) -> str:
    """Of a branch forward and backward."""
    return ", ".join(str(of_branch[x][key]) for x in DIRECTIONS if key in of_branch[x])


def table(title: str, chips: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table in Markdown, without rows in which nothing is known; empty if that is all."""
    known = [f"| {name} | {' | '.join(cells)} |" for name, cells in rows if any(cells)]
    head = [f"| {title} | {' | '.join(chips)} |", "|---" * (1 + len(chips)) + "|"]
    return "\n".join([*head, *known]) if known else ""


def made_with(told: Mapping[str, Any]) -> str:
    """Which versions on which day."""
    by_maker = dict[str, list[str]]()
    for chip, one in told.items():
        versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
        by_maker.setdefault(f"{versions}, {one['date']}", []).append(chip)
    return (
        "Compiled by " + "; ".join(f"{how} ({', '.join(x)})" for how, x in by_maker.items()) + "."
    )


def write(told: Mapping[str, Any], path: Path = PAGE) -> None:
    """Puts the tables where the docs have theirs.

    Raises:
      ValueError: if the docs have no place for them.
    """
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path}: wanted the lines {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n\n{page(told)}\n\n{END}{after}")
