"""One self-contained HTML page: the forecast first, then the laws, the figures, and the fine print.

No script, no network, no font to fetch: figures are inline SVG whose colours follow the reader's
light or dark theme, and everything fits a phone.
"""

from collections.abc import Mapping
from html import escape
from typing import Any

from scaling.fit import Fit
from scaling.plots import figures, scientific, theme, to_svg
from scaling.study import HEADLINE, Study, quantity

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
        _laws(study),
        _exponents(study),
        _forecasts(study),
        _checklist(checklist or {}),
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
    items = "".join(f"<li>{escape(_sentence(text))}</li>" for text in study.warnings)
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


def _laws(study: Study) -> str:
    blocks = []
    for done in study.fits.values():
        rows = "".join(_parameter_row(done, name) for name in done.law.names)
        blocks.append(
            f"<h3>{escape(done.law.equation)}</h3><p class='quiet'>{escape(done.law.source)}. "
            f"{done.n_runs} runs, {_objective(done)}.</p>"
            "<div class='scroll'><table><thead><tr><th>parameter</th><th>value</th>"
            f"<th>95 % interval</th></tr></thead><tbody>{rows}</tbody></table></div>"
            f"<p class='quiet'>{_certificate(done)}</p>"
        )
    return (
        "<section><h2>The laws, fitted to all runs</h2><p>Natural units: loss in nats per token, "
        "counts in parameters and tokens. Coefficients depend on those units and trade against "
        "their exponents; exponents and predictions do not.</p>" + "".join(blocks) + "</section>"
    )


def _parameter_row(done: Fit, name: str) -> str:
    low_high = done.intervals.get(name)
    span = f"{_number(low_high[0])} to {_number(low_high[1])}" if low_high else "—"
    mark = (
        " <span class='lost'>not determined</span>"
        if name in done.certificate["not_identified"]
        else ""
    )
    value = _number(done.parameters[name])
    return f"<tr><td>{escape(name)}{mark}</td><td>{value}</td><td>{span}</td></tr>"


def _objective(done: Fit) -> str:
    kind = {
        "huber": f"Huber loss (delta {done.delta:g})" if done.delta else "",
        "l1": "absolute",
        "mse": "squares",
    }
    of = "loss" if done.linear else "log loss"
    return f"sum of {kind[done.loss]} on {of} = {done.objective:.4g}"


def _certificate(done: Fit) -> str:
    c = done.certificate
    gap = c["runner_up_gap"]
    next_best = (
        "no other optimum was found"
        if gap is None
        else f"the next optimum is worse by {_percent(gap)}"
    )
    bound = f" At a bound: {', '.join(c['at_bound'])}." if c["at_bound"] else ""
    return (
        f"Certificate: relative gradient {c['relative_gradient']:.0e}; {c['starts_at_optimum']} of "
        f"{c['starts']} starts (of {c['screened']} screened) reached this optimum; {next_best}."
        f"{bound}"
    )


def _exponents(study: Study) -> str:
    if not study.exponents:
        return ""
    rows = "".join(
        f"<tr><td>{escape(r['approach'])}</td><td>{escape(r['convention'])}</td><td>{r['a']:.3f}</td>"
        f"<td>{_span(r['interval'])}</td></tr>"
        for r in study.exponents
    )
    return (
        "<section><h2>How the best size grows with compute</h2><p>N* = G C<sup>a</sup>, by "
        "Chinchilla's three approaches, and again under other ways to count FLOPs: the convention "
        "moves the exponent as much as the physics does, so compare exponents only within one.</p>"
        "<div class='scroll'><table><thead><tr><th>approach</th><th>FLOPs and N</th><th>a</th>"
        f"<th>95 % interval</th></tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _forecasts(study: Study) -> str:
    rows = "".join(
        f"<tr><td>{escape(f.law)}</td><td>{quantity(f.params)}</td><td>{quantity(f.tokens)}</td>"
        f"<td>{f.predicted:.4f}</td><td>{f.low:.4f} to {f.high:.4f}</td><td>{f.measured:.4f}</td>"
        f"<td>{100 * f.error:+.2f} %</td><td>{'yes' if f.inside else 'no'}</td></tr>"
        for forecasts in study.forecasts.values()
        for f in forecasts
    )
    return (
        "<section><h2>Every held-out run</h2><div class='scroll'><table><thead><tr><th>law</th>"
        "<th>params</th><th>tokens</th><th>predicted</th><th>95 % interval</th><th>measured</th>"
        f"<th>error</th><th>inside</th></tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _checklist(checklist: Mapping[str, str]) -> str:
    questions = dict.fromkeys((*checklist, *(() if checklist else QUESTIONS)))
    rows = "".join(
        f"<tr><th>{escape(q)}</th><td>"
        + (escape(checklist[q]) if q in checklist else "<span class='quiet'>not recorded</span>")
        + "</td></tr>"
        for q in questions
    )
    return (
        "<section><h2>What was held fixed</h2><p class='quiet'>After the checklist of Li et al. "
        "2025, (Mis)Fitting, arXiv 2502.18969.</p>"
        f"<table class='list'><tbody>{rows}</tbody></table></section>"
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
    rows = "".join(
        f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in provenance.items()
    )
    table = f"<table class='list'><tbody>{rows}</tbody></table>"
    return f"<section><h2>Where it comes from</h2>{table}</section>"


def _sentence(text: str) -> str:
    first, _, _ = text.partition(" ")
    start = text if first.endswith(":") else text[:1].upper() + text[1:]  # "kaplan_nd: ..." stays
    return start + ("" if text.endswith(".") else ".")


def _number(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa} &times; 10<sup>{int(exponent)}</sup>"


def _percent(value: float) -> str:
    return f"{100 * value:.2g} %" if value < 0.995 else f"{value + 1:.2g} times this"


def _span(interval: Any) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "—"


def _variable(colour: str) -> str:
    """The name of a colour's CSS variable."""
    return "c" + colour.lstrip("#")


def _style(study: Study) -> str:
    light = "".join(f"--{_variable(k)}: {k}; " for k in theme(study))
    dark = "".join(f"--{_variable(k)}: {v}; " for k, v in theme(study).items())
    return (
        f":root {{ {light}}}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}\n" + _CSS
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
.lost { font-size: .85em; }
.grid { display: grid; gap: 1.2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); }
figure { margin: 0; min-width: 0; padding: 1rem; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: system-ui, sans-serif !important; }
figcaption { margin-top: .7rem; font-size: .9rem; color: var(--quiet); }
figcaption b { color: var(--ink); }
.scroll { overflow-x: auto; }
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
  figure { padding: .6rem; } .list th { width: 7.5rem; } }
"""
