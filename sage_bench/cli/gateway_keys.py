"""``sage gateway key add|list|revoke``: API keys of a gateway. A key is shown once; the file holds its hash."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from sage_core.errors import ConfigError
from sage_live.gateway.keyfile import add_key, default_path, read_keys, revoke_key
from sage_live.gateway.rate import Limits

key_app = typer.Typer(no_args_is_help=True, help="API keys: add, list, revoke.")

_File = Annotated[
    Path | None, typer.Option("--file", help="Key file; default: keys.json in your configuration folder.")
]


@key_app.command()
def add(
    tenant: Annotated[str, typer.Argument(help="Whom requests with this key are counted for.")],
    requests_per_minute: Annotated[int | None, typer.Option(help="Of the tenant, over all its keys.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Of the tenant, over all its keys.")] = None,
    priority_min: Annotated[
        int, typer.Option(help="The most urgent priority it may ask for; 0 is the most urgent.")
    ] = 0,
    manage: Annotated[bool, typer.Option("--manage", help="May add and remove engines and change the policy.")] = False,
    file: _File = None,
) -> None:
    """Make a key and print it: this once."""
    if not (1 <= len(tenant) <= 128 and tenant.isascii() and tenant.isprintable()):
        raise ConfigError(f"tenant: expected 1 to 128 printable ASCII characters, got {tenant!r}")
    path = file or default_path(os.environ)
    stated = requests_per_minute is not None or tokens_per_minute is not None
    limits = Limits(requests_per_minute, tokens_per_minute) if stated else None
    entry, secret = add_key(path, tenant, limits, priority_min, manage)
    typer.echo(f"Key {entry.id} of tenant {tenant}, in {path}. It is not shown again:", err=True)
    typer.echo(secret)


@key_app.command("list")
def list_(file: _File = None) -> None:
    """The keys of the file, without their hashes."""
    path = file or default_path(os.environ)
    titles = ("id", "tenant", "created", "req/min", "tokens/min", "priority", "manages")
    table = Table(*(Column(title, no_wrap=title != "tenant") for title in titles), box=SIMPLE_HEAD)
    for key in read_keys(path):
        requests, tokens = (str(limit or "-") for limit in (key.requests_per_minute, key.tokens_per_minute))
        manages = "yes" if key.manage else "-"
        table.add_row(key.id, escape(key.tenant), key.created[:10], requests, tokens, f"{key.priority_min}+", manages)
    Console().print(table)


@key_app.command()
def revoke(identifier: Annotated[str, typer.Argument(metavar="ID", help="From `list`.")], file: _File = None) -> None:
    """Remove a key; running gateways refuse it about a second later."""
    key = revoke_key(file or default_path(os.environ), identifier)
    typer.echo(f"Key {key.id} of tenant {key.tenant} is revoked.")
