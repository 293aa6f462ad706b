"""Figures of a study, as matplotlib Figures and as SVG that is the same to the byte every time."""

from matplotlib.figure import Figure

from scaling.plots.frontier import allocation, contours, envelope, isoflop, predictions
from scaling.plots.laws import exponents, forecast, power_law, residuals, ridge
from scaling.plots.measured import loss_curves
from scaling.plots.style import scientific, theme, to_svg, write_svg
from scaling.study import HEADLINE, Study

__all__ = ["CAPTIONS", "figures", "scientific", "theme", "to_svg", "write_svg"]


def figures(study: Study) -> dict[str, tuple[Figure, str]]:
    """All figures that the study allows, in reading order: {name: (figure, how to read it)}."""
    made = {"forecast": forecast(study), "curves": loss_curves(study)}
    for law in ("kaplan_n", "kaplan_d"):
        if law in study.fits:
            made[law] = power_law(study, law)
    if "isoflop" in study.frontiers:
        made["isoflop"] = isoflop(study)
    if "envelope" in study.frontiers:
        made["envelope"] = envelope(study)
    done = study.fits.get(HEADLINE)
    if done:
        made["contours"] = contours(study)
    if study.frontiers or done:
        made["allocation"] = allocation(study)
    if done:
        made["predictions"] = predictions(study)
    made["residuals"] = residuals(study)
    if done and done.draws:
        made["exponents"] = exponents(study)
        made["ridge"] = ridge(study)
    return {name: (figure, CAPTIONS[name]) for name, figure in made.items()}


CAPTIONS = {
    "forecast": (
        "The forecast. Dots are the runs that were fitted, one colour per model size; lines are "
        "the Chinchilla law fitted to them. The red band is the 95 % interval that it gave for "
        "the held-out size before that size was looked at; red diamonds are what was then "
        "measured. Diamonds inside the band: the law carries to the larger size."
    ),
    "curves": (
        "Loss while training. One colour per model size, smallest darkest; dots are the end "
        "points that the laws are fitted to, after the learning rate has decayed. A larger model "
        "should run below a smaller one; where it does not, it is undertrained or its learning "
        "rate is wrong. Training losses, averaged over twentieths of a factor of ten in tokens."
    ),
    "kaplan_n": (
        "Kaplan's L(N). Loss against parameters, fitted to the runs that no smaller model beats "
        "(filled). A straight line in these axes is a power law. Points that bend above it at the"
        " right are held back by data, not by size."
    ),
    "kaplan_d": (
        "Kaplan's L(D). Loss against training tokens, fitted to the runs that none with fewer "
        "tokens beats (filled). Points that bend above the line at the right are held back by "
        "size, not by data."
    ),
    "isoflop": (
        "Approach 2. Each parabola joins runs of equal compute, labelled in FLOPs; its vertex "
        "(red) is the best size for that compute. Vertices should move right as compute grows. "
        "Dashed: no minimum was bracketed among the sizes, and the budget is not used."
    ),
    "envelope": (
        "Approach 1. Every run against its compute. The line is the lower envelope; the runs on "
        "it (ringed) were the best use of their compute, and their sizes give the exponent."
    ),
    "contours": (
        "Approach 3. Along each thin line Chinchilla's law, fitted to all runs, predicts the loss "
        "written on it; its leftmost point is the least compute for that loss. The thick line "
        "joins these points: the best size, with its 95 % band. Runs far above it were too large "
        "for their compute, far below it too small; red diamonds were held out of the forecast."
    ),
    "allocation": (
        "The best size for a budget. How large a model should be for its compute, by the three "
        "approaches, with 95 % bands. Where the lines agree the answer does not depend on the "
        "method. Left of the dotted line is measured, right of it extrapolated."
    ),
    "predictions": (
        "The loss that compute buys. The line is what Chinchilla's law, fitted to all runs, "
        "predicts for the best size at each budget, with the 95 % band of its mean; no run should "
        "lie below it by more than the scatter of runs. Right of the dotted line it is "
        "extrapolated, to a hundred times the largest run: the band holds only if the law does."
    ),
    "residuals": (
        "What the law misses. Predicted minus measured, in percent of the loss, against compute. "
        "Dots were fitted; red diamonds were held out, with their 95 % intervals. A trend or a "
        "curve would mean that the law has the wrong form; scatter is noise between runs."
    ),
    "exponents": (
        "The bootstrap. Each dot is the pair of Chinchilla exponents refitted to one resampling "
        "of the runs; the cross is the fit, and its arms are the 95 % interval of each exponent. "
        "A small round cloud is well determined; a long one means that the two trade against "
        "each other. Above the diagonal, compute is better spent on parameters than on tokens; "
        "below it, on tokens."
    ),
    "ridge": (
        "Why a coefficient alone says little. The same refits, now A against its exponent; the "
        "arms are 95 % intervals. Where the dots lie along a line, a larger exponent comes with a "
        "larger A and the two nearly cancel: A is known badly, but the term A / N^alpha, of which "
        "predictions are made, is known far better."
    ),
}
