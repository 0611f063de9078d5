"""A self-contained HTML file: template, style, scripts and data.

Data cannot become code. Text is embedded as JSON with "<" escaped, and the script shows it as text;
the page's content security policy allows only the scripts and the style embedded here, by their
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
    """The source of an inline script or style in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def document(title: str, body: str, *, scripts: tuple[str, ...] = (), data: str = "") -> str:
    """A complete document in the viewer's style.

    Args:
        title: plain text.
        body: HTML, escaped by the caller.
        scripts: names of the assets that run after the body and the data.
        data: HTML, escaped by the caller.
    """
    style = _asset("page.css")
    code = [_asset(name) for name in scripts]
    allowed = " ".join(map(_source, code)) or "'none'"
    policy = (
        f"default-src 'none'; style-src {_source(style)}; img-src data: blob:; "
        f"script-src {allowed}; base-uri 'none'; form-action 'none'"
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
    """The page of a scan; for facts and blocks see `payload.contents`."""
    # A script element ends at the first "</script", so its text must not contain "<".
    text = json.dumps({"title": title, **facts}, allow_nan=False).replace("<", "\\u003c")
    data = [f'<script type="application/json" id="facts">{text}</script>']
    data += [
        f'<script type="application/octet-stream" id="{name}">{block}</script>'
        for name, block in blocks.items()
    ]
    return document(
        title, _asset("viewer.html"), scripts=("niivue.umd.js", "viewer.js"), data="\n".join(data)
    )
