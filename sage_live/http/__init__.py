"""HTTP/1.1 for the data path: a server and a client of callbacks on asyncio, parsed by httptools."""

from __future__ import annotations
