"""crm claims: what is claimed, and what the runs say to it."""

from dataclasses import replace
from typing import Annotated, Any

import typer

from crm.cli import options
from crm.cli.options import Json, Runs, Tiny
from crm.machine import home
from crm.records import write_bytes


def add_to(app: typer.Typer) -> None:
    app.command()(claims)


def claims(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[CLAIM]...", help="Some of them. [default: all]")
    ] = None,
    tiny: Tiny = False,
    check: Annotated[bool, typer.Option("--check", help="Exit code 1 unless every claim is supported.")] = False,
    runs: Runs = None,
    json: Json = False,
) -> None:
    """Whether what analysis/claims.py states is supported, refuted or undecided, and what would decide it.

    Writes the numbers as LaTeX macros into reports/tables/claims.tex, or claims@tiny.tex for the tiny forms.
    """
    from analysis.claims import SUPPORTED, answers, chosen_claims, macros, plain

    wanted = chosen_claims(names or [])
    if tiny:
        wanted = [replace(claim, sweep=f"{claim.sweep.partition('@')[0]}@tiny") for claim in wanted]
    sweeps = {claim.sweep: options.find_sweep(claim.sweep)[1] for claim in wanted}
    found = answers(wanted, sweeps, options.runs_folder(runs))
    place = home() / "reports" / "tables" / ("claims@tiny.tex" if tiny else "claims.tex")
    if names:  # a part of them would leave the others' macros undefined
        place = None
    else:
        write_bytes(place, macros(found).encode())
    if json:
        options.echo_json({"claims": [plain(one) for one in found], "macros": place})
    else:
        if tiny:
            typer.echo("Tiny forms, to try everything out: they say nothing about what is claimed.\n")
        typer.echo("\n\n".join(_words(one) for one in found))
        typer.echo(f"\nmacros: {place}" if place else "\nmacros are written for all claims together: crm claims")
    if check and any(one.verdict != SUPPORTED for one in found):
        raise typer.Exit(1)


def _words(one: Any) -> str:
    """One claim as a person reads it."""
    from analysis.stats import Interval
    from analysis.tables import bracket, signed

    claim = one.claim
    lines = [f"{one.verdict}: {claim.text} ({claim.name})"]
    where = f"“{claim.subject}” over “{claim.reference}” in {claim.sweep}, {claim.measure}"
    if not one.seeds:
        lines.append(f"{where}: no paired seed is evaluated")
    else:
        sd = f", sd {one.sd:.1f}" if one.seeds > 1 else ""
        gain = f"{signed(one.gain)}{sd}, {one.seeds} paired seed{'s' * (one.seeds > 1)}"
        interval = f", 95 % {bracket(Interval(one.low, one.high, one.over))} over {one.over}" if one.over else ""
        p = "" if one.p_holm != one.p_holm else f", p {one.p_holm:.2g} after Holm"
        lines.append(f"{where}: {gain}{interval}{p}")
    if one.without_rare is not None:
        lines.append(f"without {', '.join(one.rare)}, which few test images have: {signed(one.without_rare)}")
    if one.published:
        lines.append(f"published: {signed(one.published.gain)} ({one.published.source})")
    if one.more:
        cost = "cost unknown, for no run like these is finished" if one.hours is None else f"{one.hours:.2g} hours"
        lines.append(f"{one.more} more paired seed{'s' * (one.more > 1)}, {cost}: {one.why}")
    elif one.why:
        lines.append(one.why)
    return "\n  ".join(lines)
