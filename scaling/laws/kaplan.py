"""Power laws without a floor (Kaplan et al. 2020, section 1.2)."""

from typing import Any

import numpy as np

from scaling.laws.law import Columns, Law, Parameter, centre, grid, power


def kaplan_power(size: Any, X_c: Any, alpha: Any) -> Any:
    """L(X) = (X_c / X)^alpha: loss as one resource grows and the others do not bind."""
    return power(X_c / size, alpha)


def _kaplan_power(symbol: str, column: str, equation: str) -> Law:
    """The law of one resource."""

    def starts(x: Columns, loss: np.ndarray) -> dict[str, np.ndarray]:
        # At the centre of the data the law must give about the median loss; alpha sets X_c from it.
        starts = grid(alpha=np.geomspace(0.01, 2.0, 24), level=(0.8, 1.0, 1.25))
        level = starts.pop("level") * np.median(loss)
        return starts | {"X_c": centre(x[column]) * level ** (1 / starts["alpha"])}

    return Law(
        name=f"kaplan_{symbol.lower()}",
        function=lambda x, **parameters: kaplan_power(x[column], **parameters),
        columns=(column,),
        parameters=(Parameter(name="X_c", log=True), Parameter(name="alpha", high=5.0)),
        starts=starts,
        equation=f"L({symbol}) = ({symbol}_c / {symbol})^alpha",
        source=f"Kaplan et al. 2020, equation {equation}, arXiv 2001.08361",
    )


KAPLAN_N = _kaplan_power("N", "params", "1.1")
KAPLAN_D = _kaplan_power("D", "tokens", "1.2")
KAPLAN_C = _kaplan_power("C", "flops", "1.3")


def kaplan_nd(x: Columns, N_c: Any, D_c: Any, alpha_N: Any, alpha_D: Any) -> Any:
    """L(N, D) = [(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D."""
    return power(power(N_c / x["params"], alpha_N / alpha_D) + D_c / x["tokens"], alpha_D)


def _kaplan_nd_starts(x: Columns, loss: np.ndarray) -> dict[str, np.ndarray]:
    # `share` is the part of the bracket, at the centre of the data, that is due to N.
    exponents = np.geomspace(0.02, 1.0, 9)
    starts = grid(
        alpha_N=exponents, alpha_D=exponents, share=(0.1, 0.3, 0.5, 0.7, 0.9), level=(0.8, 1, 1.25)
    )
    share, level = starts.pop("share"), starts.pop("level") * np.median(loss)
    alpha_N, alpha_D = starts["alpha_N"], starts["alpha_D"]
    bracket = level ** (1 / alpha_D)
    return starts | {
        "N_c": centre(x["params"]) * (share * bracket) ** (alpha_D / alpha_N),
        "D_c": centre(x["tokens"]) * (1 - share) * bracket,
    }


KAPLAN_ND = Law(
    name="kaplan_nd",
    function=kaplan_nd,
    columns=("params", "tokens"),
    parameters=(
        Parameter(name="N_c", log=True),
        Parameter(name="D_c", log=True),
        Parameter(name="alpha_N", low=1e-4, high=5.0),
        Parameter(name="alpha_D", low=1e-4, high=5.0),
    ),
    starts=_kaplan_nd_starts,
    equation="L(N, D) = [(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D",
    source="Kaplan et al. 2020, equation 1.5, arXiv 2001.08361",
)
