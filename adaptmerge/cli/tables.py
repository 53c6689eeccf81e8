"""adaptmerge formats and adaptmerge methods: what there is."""

from __future__ import annotations

import click

from adaptmerge.cli.options import json_option
from adaptmerge.cli.terminal import print_json, table


@click.command()
@json_option
def formats(as_json: bool) -> None:
    """List the formats that can be read and written."""
    from adaptmerge.formats.registry import formats as known

    rows = [
        {"name": f.name, "read": True, "write": f.write is not None, "title": f.title, "url": f.url}
        for f in known().values()
    ]
    if as_json:
        print_json(rows)
        return
    shown = [(r["name"], "read, write" if r["write"] else "read", r["title"]) for r in rows]
    table(("format", "can", "what"), shown)


@click.command()
@json_option
def methods(as_json: bool) -> None:
    """List the merge methods and what is true of them."""
    from adaptmerge.methods.registry import methods as known

    rows = [
        {
            "name": m.name,
            "summary": m.summary,
            "kinds": sorted(m.rules),
            "linear": m.linear,
            "gauge_invariant": m.gauge_invariant,
            "url": m.url,
        }
        for m in known().values()
    ]
    if as_json:
        print_json(rows)
        return
    table(("method", "what"), [(r["name"], r["summary"]) for r in rows])
