"""For mkdocs: the site has the tree of the repository, so that links hold on disk and in the site.

Pages are those of `nav` in mkdocs.yml, wherever they lie. Pictures and sources that a page links to
come along as they are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Only what `nav` names, what that links to, and what the theme brings."""
    root = Path(str(config.config_file_path)).parent
    tree = Files([file for file in files if file.src_dir != config.docs_dir])
    pages = [root / name for name in _pages(config.nav)]
    linked = {(p.parent / link).resolve() for p in pages for link in _LINK.findall(p.read_text())}
    for path in sorted({*pages, *(path for path in linked if path.is_file())}):
        name = path.relative_to(root).as_posix()
        tree.append(File.generated(config, name, abs_src_path=str(path)))
    return tree


def _pages(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in _pages(part)]
