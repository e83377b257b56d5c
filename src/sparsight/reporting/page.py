"""A page of plots in one self-contained file: it requests nothing, and nothing of the data becomes markup.

Figures are plotly's JSON. A colour in them is {"$css": variable}, which the page looks up to follow its theme.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsight.reporting.comparison import write_atomic


def write_page(
    path: str | Path,
    template: str,
    figures: Sequence[Mapping[str, Any]],
    filters: Mapping[str, Callable[..., Any]] | None = None,
    **values: Any,
) -> None:
    """Render a template that extends ``page.html.j2``, and write it, atomically.

    Args:
        figures: {id, data, layout} of each plot; its place on the page has that id.
        values: what the template shows, escaped. Texts in figures are escaped by who makes them: plotly reads tags.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped, unused-ignore]

    loader = PackageLoader("sparsight.reporting", "")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= filters or {}
    data = json.dumps(figures, allow_nan=False).replace("<", "\\u003c")
    nonce = hashlib.sha256(data.encode()).hexdigest()[:32]
    page = environment.get_template(template).render(figures=data, plotly=get_plotlyjs(), nonce=nonce, **values)
    write_atomic(path, page)
