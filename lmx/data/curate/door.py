"""The command line of a recipe: `python -m experiments.data.NAME [--folder F] [--workers N] [--dry-run true]`."""

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmx.core.config import ConfigError, command_line, exits_with_one_line
from lmx.data.clean.bias import which_lose
from lmx.data.curate.beam import Beam
from lmx.data.curate.dryrun import Forecast, dry_run
from lmx.data.curate.recipe import Recipe
from lmx.data.curate.run import curate
from lmx.data.curate.workers import Local


@dataclass(frozen=True)
class Options:
    """How a recipe is run."""

    folder: Path = Path("corpora")
    """Where the corpus goes: into a folder of the recipe's name below it."""
    path: str = ""
    """What the recipe's source reads, in place of its own path; for recipes of one source."""
    workers: int = 1
    """Processes of this machine. What they make does not depend on it."""
    beam: str = ""
    """Options of an Apache Beam runner that is to do the work, in one string without dashes: "runner=FlinkRunner flink_master=HOST:PORT"."""
    dry_run: bool = False
    """Judge a sample only, and say what is to be expected: shares kept, time, disk, memory."""
    documents: int = 2000
    """Documents that a dry run judges."""


def main(recipe: Recipe, argv: Sequence[str] | None = None, *, description: str | None = None) -> None:
    """Run a recipe as the command line says, and print what came of it. What is wrong is one line on stderr and exit code 2."""
    options, _ = command_line(Options(), argv, description=description or f"Makes the corpus {recipe.name}.")
    with exits_with_one_line():
        if options.path:
            (source, *others) = recipe.sources
            if others:
                raise ConfigError(f"path={options.path!r}: {recipe.name} has {len(recipe.sources)} sources; change them in its module")
            if not hasattr(source, "path"):
                raise ConfigError(f"path={options.path!r}: source {source.name} of {recipe.name} has no path; change it in its module")
            recipe = dataclasses.replace(recipe, sources=(dataclasses.replace(source, path=options.path),))
        if options.beam and options.workers != 1:
            raise ConfigError(f"workers={options.workers} is of this machine, and a Beam runner has its own; leave one of them out")
        if options.dry_run:
            show_forecast(recipe, dry_run(recipe, documents=options.documents), options.workers)
            return
        folder = options.folder / recipe.name
        beam = tuple(f"--{option.lstrip('-')}" for option in shlex.split(options.beam))
        manifest = curate(recipe, folder, workers=Beam(beam) if beam else Local(options.workers))
    for split, made in manifest["splits"].items():
        print(f"{folder / split}: {made['documents']:,} documents, {made['tokens']:,} tokens, {made['bytes']:,} bytes of text")
    print(f"report: {folder / 'report.html'}")


def show_forecast(recipe: Recipe, forecast: Forecast, workers: int) -> None:
    """Print a forecast: what each rule would drop, what it would take, and documents to read."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.print(f"{forecast.sampled:,} of about {forecast.documents:,.0f} documents judged; intervals hold in 95 of 100 samples")
    table = Table("step", "rule", "of all documents", "CPU time")
    for name, seconds in forecast.seconds.items():
        table.add_row(name, "", "", _time(seconds))
        for (step, reason), share in forecast.rules.items():
            if step == name:
                table.add_row("", reason, str(share), "")
    table.add_row("kept", "", str(forecast.kept), _time(sum(forecast.seconds.values())))
    console.print(table)
    console.print(
        f"{100 * forecast.kept_bytes:.1f}% of the text; {_time(sum(forecast.seconds.values()) / workers)} with workers={workers}; "
        f"disk {forecast.disk / 1e9:.2f} GB; memory {forecast.memory / 1e9:.2f} GB a worker"
    )
    _show_terms(forecast, [source.name for source in recipe.sources], console)
    words = {"dropped": "dropped by", "passed": "kept by"}
    for event, examples in sorted(forecast.tally.shown.items()):
        if event.what in words:
            where = ", ".join(filter(None, (event.source, event.language)))
            console.print(Text(f"\n{' '.join(filter(None, (words[event.what], event.step, event.reason)))} ({where})", "bold"))
            for _, example in sorted(examples, key=lambda item: -item[0]):
                value = example.get("value")
                line = " ".join(example["text"].split())[:100]
                console.print(Text(f"  {example['id']}{'' if value is None else f' {value}'}: {line}"), soft_wrap=True)


def _show_terms(forecast: Forecast, sources: Sequence[str], console: Any) -> None:
    """The identity and dialect terms whose documents lose most, over all, and in each source those that lose significantly."""
    from rich.text import Text

    losses = forecast.terms
    if not losses.terms:
        return
    shown = dataclasses.replace(losses, terms=losses.terms[:10])
    console.print(Text("\nidentity and dialect terms, those that lose most:", "bold"))
    console.print(Text(str(shown)), soft_wrap=True)
    for source in sources if len(sources) > 1 else ():
        for term in which_lose(forecast.tally.terms("read", source), forecast.tally.terms("kept", source)).losing:
            console.print(Text(f"  {source}: {term.term} loses, {term.rate:.1%} kept ({term.low:.1%} to {term.high:.1%})"), soft_wrap=True)


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
