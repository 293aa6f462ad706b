"""One self-contained HTML page: the forecast first, then the laws, the figures, and the fine print.

No script, no network, no font to fetch: figures are inline SVG whose colours follow the reader's
light or dark theme, and everything fits a phone.
"""

from collections.abc import Mapping
from html import escape
from typing import Any

from scaling.plots import figures, scientific, theme, to_svg
from scaling.plots.style import PAPER
from scaling.study import HEADLINE, Study, quantity
from scaling.tables import draws, exponents, forecasts, laws, objective, optimal, sentence

# What was held fixed and recorded: the questions of Li et al. 2025, "(Mis)Fitting: a survey of
# scaling laws" (arXiv 2502.18969), that a sweep can answer.
QUESTIONS = (
    "data",
    "tokenizer",
    "held-out loss",
    "architecture",
    "shape of the sizes",
    "parameter count",
    "FLOP count",
    "optimiser",
    "learning rate",
    "schedule",
    "warm-up",
    "batch size",
    "initialisation",
    "precision",
    "seeds",
    "end points",
)


def write_report(
    path: Any,
    study: Study,
    *,
    title: str,
    checklist: Mapping[str, str] | None = None,
    provenance: Mapping[str, str] | None = None,
) -> None:
    """Writes the report of a study as one HTML file.

    Args:
      path: where to; anything etils.epath takes.
      study: from `scaling.study.study`.
      title: of the page.
      checklist: what was held fixed, {question: answer}; questions of `QUESTIONS` without an answer
        are shown as not recorded.
      provenance: where the runs come from, such as command, versions and digests.
    """
    from etils import epath

    path = epath.Path(path)
    partial = path.parent / f".{path.name}.partial"
    partial.write_text(render(study, title=title, checklist=checklist, provenance=provenance))
    partial.replace(path)


def render(
    study: Study,
    *,
    title: str,
    checklist: Mapping[str, str] | None = None,
    provenance: Mapping[str, str] | None = None,
) -> str:
    """The report as a string of HTML."""
    parts = [
        f"<header><h1>{escape(title)}</h1>{_subtitle(study)}</header>",
        _headline(study),
        _warnings(study),
        _figures(study),
        optimal(study),
        laws(study),
        exponents(study),
        forecasts(study),
        _checklist(checklist or {}),
        _fitting(study),
        _dropped(study),
        _provenance(provenance or {}),
    ]
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{escape(title)}</title>\n<style>\n{_style(study)}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _subtitle(study: Study) -> str:
    runs = study.runs
    n, d, c = (runs[name] for name in ("params", "tokens", "flops"))
    sizes = len(set(n.tolist()))
    return (
        f"<p class='quiet'>{len(runs)} runs of {sizes} model sizes, {quantity(n.min())} to "
        f"{quantity(n.max())} parameters, {quantity(d.min())} to {quantity(d.max())} tokens, "
        f"{scientific(c.min())} to {scientific(c.max())} FLOPs "
        f"({escape(runs.flops_convention)}).</p>"
    )


def _headline(study: Study) -> str:
    top, done = study.headline, study.forecast_fits[HEADLINE]
    word = "Inside" if top.inside else "Outside"
    return f"""<section class='headline'>
<h2>The largest run, predicted before it was looked at</h2>
<div class='figures-in-words'>
<div><span class='label'>predicted</span><span class='number'>{top.predicted:.3f}</span>
<span class='label'>95 % interval {top.low:.3f} to {top.high:.3f}</span></div>
<div><span class='label'>measured</span><span class='number'>{top.measured:.3f}</span>
<span class='label'>nats per token</span></div>
<div><span class='label'>error</span><span class='number'>{100 * top.error:+.2f} %</span>
<span class='label verdict {word.lower()}'>{word} the interval</span></div>
</div>
<p>Chinchilla's law was fitted to the {done.n_runs} other runs. Held out: {escape(study.held_why)}.
The interval joins the bootstrap of the law's parameters with the scatter of runs about it. Of the
held-out runs {sum(f.inside for f in study.forecasts[HEADLINE])} of
{len(study.forecasts[HEADLINE])} fell inside theirs.</p>
</section>"""


def _warnings(study: Study) -> str:
    if not study.warnings:
        return ""
    items = "".join(f"<li>{escape(sentence(text))}</li>" for text in study.warnings)
    return f"<section class='warnings'><h2>Read with care</h2><ul>{items}</ul></section>"


def _figures(study: Study) -> str:
    colours = {light: f"var(--{_variable(light)})" for light in theme(study)}
    out = []
    for i, (figure, caption) in enumerate(figures(study).values()):
        svg = to_svg(figure, prefix=f"f{i}-", colours=colours)
        svg = svg.replace("<svg ", f"<svg role='img' aria-label='{escape(caption, True)}' ", 1)
        head, _, rest = caption.partition(". ")
        out.append(
            f"<figure>{svg}<figcaption><b>{escape(head)}.</b> {escape(rest)}</figcaption></figure>"
        )
    return f"<section class='grid'>{''.join(out)}</section>"


def _checklist(checklist: Mapping[str, str]) -> str:
    unknown = "<span class='quiet'>not recorded</span>"
    rows = {
        q: escape(checklist[q]) if q in checklist else unknown for q in (*QUESTIONS, *checklist)
    }
    return (
        "<section><h2>What was held fixed</h2><p class='quiet'>After the checklist of Li et al. "
        f"2025, (Mis)Fitting, arXiv 2502.18969.</p>{_list(rows)}</section>"
    )


def _fitting(study: Study) -> str:
    """The questions of the same checklist that the analysis answers by itself."""
    runs, done = study.runs, study.forecast_fits[HEADLINE]
    k, p = done.cost
    certificate = done.certificate
    answers = {
        "laws": "; ".join(fitted.law.equation for fitted in study.fits.values()),
        "runs": f"{len(runs)} of {len(set(runs['params'].tolist()))} sizes, each a point of its "
        "own; what was dropped is listed below",
        "compute": f"{runs.flops_convention}; a run costs {k:.3g} N^{p:.3g} D",
        "objective": objective(done),
        "starting points": f"{certificate['screened']} screened, {certificate['starts']} followed "
        "to their end",
        "solver": "damped Newton on exact derivatives, in float64",
        "intervals": f"percentiles of {draws(study)} refits to resampled runs",
        "validation": f"held out before any fit: {study.held_why}",
    }
    rows = {question: escape(answer) for question, answer in answers.items()}
    return (
        "<section><h2>How the laws were fitted</h2><p class='quiet'>The same checklist, of the "
        f"analysis.</p>{_list(rows)}</section>"
    )


def _dropped(study: Study) -> str:
    reasons = list(study.runs.dropped)
    for front in study.frontiers.values():
        reasons += [row for row in front.dropped if row not in reasons]
    if not reasons:
        return "<section><h2>What was dropped</h2><p>Nothing.</p></section>"
    items = "".join(f"<li>{n} &times; {escape(reason)}</li>" for reason, n in reasons)
    return f"<section><h2>What was dropped</h2><ul>{items}</ul></section>"


def _provenance(provenance: Mapping[str, str]) -> str:
    if not provenance:
        return ""
    rows = {escape(k): escape(v) for k, v in provenance.items()}
    return f"<section><h2>Where it comes from</h2>{_list(rows)}</section>"


def _list(rows: Mapping[str, str]) -> str:
    body = "".join(f"<tr><th>{name}</th><td>{cell}</td></tr>" for name, cell in rows.items())
    return f"<table class='list'><tbody>{body}</tbody></table>"


def _variable(colour: str) -> str:
    """The name of a colour's CSS variable."""
    return "c" + colour.lstrip("#")


def _style(study: Study) -> str:
    light = "".join(f"--{_variable(k)}: {k}; " for k in theme(study))
    dark = "".join(f"--{_variable(k)}: {v}; " for k, v in theme(study).items())
    paper = f"figure {{ --{_variable(PAPER)}: var(--card); }}\n"  # what figures stand on
    return (
        f":root {{ {light}}}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}\n"
        f"{paper}{_CSS}"
    )


_CSS = """
:root { color-scheme: light dark; --bg: #fefefe; --card: #f5f6f8; --ink: #1c2128; --quiet: #59636e;
  --line: #d5dae0; --accent: #c2361c; --good: #1a7f4b; }
@media (prefers-color-scheme: dark) { :root { --bg: #0f1217; --card: #161a20; --ink: #e8ebef;
  --quiet: #9aa4b0; --line: #363d47; --accent: #ff8062; --good: #56d08e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2rem 1.2rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 0 0 .6rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .1rem; }
section { margin: 2.4rem 0; }
section > p { max-width: 46rem; }
p { margin: .5rem 0; }
.quiet { color: var(--quiet); }
.headline, .warnings, figure { background: var(--card); border-radius: 10px; padding: 1.2rem; }
.headline { border-left: 4px solid var(--accent); }
.warnings { border-left: 4px solid var(--quiet); }
.figures-in-words { display: flex; flex-wrap: wrap; gap: 1rem 3rem; margin: 1rem 0; }
.figures-in-words > div { display: flex; flex-direction: column; }
.number { font-size: 2.2rem; font-weight: 650; line-height: 1.15;
  font-variant-numeric: tabular-nums; }
.label { color: var(--quiet); font-size: .9rem; }
.verdict { font-weight: 600; }
.inside { color: var(--good); }
.outside, .lost { color: var(--accent); }
.grid { display: grid; gap: 1.2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); }
figure { margin: 0; min-width: 0; padding: 1rem; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: system-ui, sans-serif !important; }
figcaption { margin-top: .7rem; font-size: .9rem; color: var(--quiet); }
figcaption b { color: var(--ink); }
.scroll { overflow-x: auto; margin: .8rem 0; }
summary { cursor: pointer; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem 1.1rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
thead th { color: var(--quiet); font-weight: 500; white-space: nowrap; }
.scroll td { white-space: nowrap; }
.list { width: 100%; max-width: 60rem; }
.list th { font-weight: 600; width: 12rem; }
.list td { overflow-wrap: anywhere; }
ul { margin: .4rem 0; padding-left: 1.2rem; }
@media (max-width: 500px) { main { padding: 1.2rem .9rem 3rem; } .number { font-size: 1.8rem; }
  figure { padding: .6rem; } .list th { width: 7.5rem; }
  .scroll :is(th, td) { padding-right: .6rem; font-size: .85rem; white-space: normal; } }
"""
