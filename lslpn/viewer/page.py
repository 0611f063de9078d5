"""One HTML file with everything in it: template, style, scripts and data.

What is data stays data. Text goes into the page as JSON whose "<" is escaped, and is shown by the
script as text; the page's own policy lets only the scripts and styles written here run, by their
hashes, and forbids every request.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def _asset(name: str) -> str:
    return (files("lslpn.viewer") / "assets" / name).read_text("utf-8")


def _source(text: str) -> str:
    """How a Content-Security-Policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def document(title: str, body: str, *, scripts: tuple[str, ...] = (), data: str = "") -> str:
    """A whole document in the viewer's style.

    `title` is plain text, `body` and `data` are HTML, escaped by the caller; after them run the
    `scripts`, names of assets.
    """
    style = _asset("page.css")
    code = [_asset(name) for name in scripts]
    policy = (
        f"default-src 'none'; style-src {_source(style)}; img-src data: blob:; "
        f"script-src {' '.join(map(_source, code)) or chr(39) + 'none' + chr(39)}; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{style}</style>",
        body,
        data,
        *(f"<script>{text}</script>" for text in code),
        "</html>\n",
    ]
    return "\n".join(parts)


def viewer(title: str, facts: Mapping[str, Any], blocks: Mapping[str, str]) -> str:
    """The page of a scan; see `payload.contents`."""
    # No "<" in it: the text of a script element ends at the first "</script".
    text = json.dumps({"title": title, **facts}, allow_nan=False).replace("<", "\\u003c")
    data = [f'<script type="application/json" id="facts">{text}</script>']
    data += [
        f'<script type="application/octet-stream" id="{name}">{block}</script>'
        for name, block in blocks.items()
    ]
    return document(
        title, _asset("viewer.html"), scripts=("niivue.umd.js", "viewer.js"), data="\n".join(data)
    )
