"""The claims that were measured, and the table of them."""

import json
import pathlib
from collections.abc import Sequence

from experiments.study.claim import Claim, shown
from lineage_jax.lineage import LINEAGE

RESULTS = pathlib.Path(__file__).parents[1] / "results" / "claims"


def read_claims(folder: pathlib.Path = RESULTS) -> list[Claim]:
    """The claims in a folder, in the order of the lineage."""
    paths = [folder / f"{name}.json" for one in LINEAGE for name in one.claims]
    return [Claim.from_json(json.loads(path.read_text())) for path in paths if path.exists()]


def markdown_table(claims: Sequence[Claim]) -> str:
    """The claims as the table that stands in the README."""
    lines = [
        "| paper | criterion, set before the run | measured [95 % interval] | verdict | seconds |",
        "|---|---|---|---|---|",
    ]
    for one in claims:
        mark = {True: "yes", False: "**no**"}
        measured = "<br>".join(
            f"{finding.name}: {shown(finding)}, {mark[finding.passed]}" for finding in one.findings
        )
        paper = f"{one.where}: {one.statement}"
        verdict = "reproduced" if one.passed else "**not reproduced**"
        if one.form == "quick":
            verdict = "quick form"
        lines.append(f"| {paper} | {one.criterion} | {measured} | {verdict} | {one.seconds:.0f} |")
    return "\n".join(lines)
