"""A hook of MkDocs for links from docs/ to files of the repository, which the site lacks.

A link to a module becomes a link to its page in the reference; other links become plain names.
"""

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)]*)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    return OUTSIDE.sub(inside, markdown)


def inside(link: re.Match[str]) -> str:
    text, path = link.groups()
    if path in ("gru_any/equations.py", "gru_any/codegen/trace.py", "gru_any/inspect/values.py"):
        return f"[{text}](reference.md#{path.removesuffix('.py').replace('/', '.')})"
    return f"[{text}](index.md)" if path == "README.md" else text
