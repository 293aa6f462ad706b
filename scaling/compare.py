"""Several laws on the same runs, judged by the same runs that none of them saw."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling.fit import Fit, fit
from scaling.laws import LAWS
from scaling.runs import Runs


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Laws by rising error on the held-out runs.

    Attributes:
      fits: each with its `holdout` scores, best first.
      holdout: the expression, or "mask".
      refused: (law, why) of those that these runs do not allow.
    """

    fits: tuple[Fit, ...]
    holdout: str
    refused: tuple[tuple[str, str], ...]

    def rows(self) -> list[dict[str, Any]]:
        """One row for each law, best first: its errors, its objective, its warnings."""
        return [
            {
                "law": done.law.name,
                "free_parameters": len(done.certificate["free"]),
                "objective": done.objective,
                "identified": done.certificate["identified"],
                **(done.holdout or {}),
            }
            for done in self.fits
        ]

    def to_json(self) -> dict[str, Any]:
        """As plain Python values."""
        return {
            "holdout": self.holdout,
            "comparison": self.rows(),
            "fits": {done.law.name: done.to_json(draws=False) for done in self.fits},
            "refused": [{"law": law, "reason": why} for law, why in self.refused],
        }


def compare(
    runs: Runs,
    laws: Sequence[str] | None = None,
    *,
    holdout: str | np.ndarray,
    bootstrap: int = 0,
    **options: Any,
) -> Comparison:
    """Fits each law to the runs outside the holdout, and ranks them by their error inside it.

    The error that ranks is the mean of |predicted / measured - 1|: it asks of a law what laws are
    for. Objectives on the fitted runs stand beside it, and favour laws of more parameters.

    Args:
      runs: from `read_runs`.
      laws: names in `LAWS`; by default all that predict a loss and find their own parameters.
      holdout: an expression such as 'flops>1e21', or a mask.
      bootstrap: replicates, for the coverage of the intervals.
      **options: of `fit`.

    Raises:
      ValueError: an unknown law, a holdout that names no run, or no law that these runs allow.
    """
    if laws is None:
        laws = [name for name, law in LAWS.items() if law.target == "loss" and not law.given]
    if unknown := [name for name in laws if name not in LAWS]:
        raise ValueError(f"no law {unknown[0]!r}: there are {', '.join(LAWS)}")
    out = runs.mask(holdout) if isinstance(holdout, str) else np.asarray(holdout, bool)
    if not out.any() or out.all():
        raise ValueError(f"the holdout names {out.sum()} of {len(runs)} runs: it must name some")
    fits, refused = [], []
    for name in laws:
        try:
            fits.append(fit(runs, name, holdout=out, bootstrap=bootstrap, **options))
        except ValueError as error:
            refused.append((name, str(error)))
    if not fits:
        raise ValueError("; ".join(why for _, why in refused))
    fits.sort(key=lambda done: (done.holdout or {})["mean_abs_relative_error"])
    return Comparison(
        fits=tuple(fits),
        holdout=holdout if isinstance(holdout, str) else "mask",
        refused=tuple(refused),
    )
