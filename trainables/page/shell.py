"""The shell of every page that Ninefold writes: one HTML file with its style, script, figures and images inside.

A page opens offline and fetches nothing: its content security policy forbids both that and any script but its own.
Templates escape whatever is put into them, so class names, file names and error messages stay text.
"""

import base64
import io
import json
import secrets
from html import escape
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

HERE = Path(__file__).parent
SIDE = 96  # pixels of an image in a page at most; smaller ones keep their own size
QUALITY = 80  # of WebP
LOSSLESS = 32  # pixels up to which a lossy image would not be smaller by much


def render(template: Path, **values: Any) -> bytes:
    """The page of a Jinja template that extends "page.html", which lies beside this file, as UTF-8.

    Besides `values`, templates find the filters `plot` (a plotly figure), `uri` (pixels for an <img>), `json` (data for
    a script), `percent`, `points` and `count`.
    """
    loader = jinja2.FileSystemLoader([template.parent, HERE])
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "plot": plot,
        "uri": uri,
        "json": _json,
        "percent": percent,
        "points": lambda fraction: f"{round(100 * fraction, 2) + 0:+.2f}",  # never -0.00
        "count": lambda number: f"{number:,}" if isinstance(number, int) else str(number),
    }
    page = environment.get_template(template.name).render(
        **values,
        nonce=secrets.token_urlsafe(16),
        style=Markup((HERE / "page.css").read_text()),
        script=Markup((HERE / "page.js").read_text()),
        plotly=Markup(get_plotlyjs()),
    )
    return page.encode()


def plot(figure: Figure) -> Markup:
    """A figure as page.js draws it: when it comes into view, and in the reader's colours.

    Its own height is kept, 420 pixels by default; its own width is the least that it is drawn with, for it fills its
    place. Text in a figure is a subset of HTML: names from outside must go through `label` before they become one.
    """
    style = f"height:{figure.layout.height or 420}px;min-width:{figure.layout.width or 0}px"
    figure = Figure(figure).update_layout(template=None, width=None, height=None)  # page.js has its own templates
    box = '<div class="scroll"><div class="plot" style="{}"><script type="application/json">{}</script></div></div>'
    return Markup(box).format(style, _inside_script(figure.to_json()))


def uri(pixels: np.ndarray, side: int = SIDE) -> str:
    """uint8 pixels (H, W, 3) as a data URI of at most `side` pixels a side."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY, method=4, lossless=max(image.size) <= LOSSLESS)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def percent(fraction: float, digits: int = 2) -> str:
    """0.8904 as "89.04 %", which no line break parts."""
    return f"{100 * fraction:.{digits}f}\N{NO-BREAK SPACE}%"


def label(name: object, longest: int = 24) -> str:
    """A name from outside as the label of a figure: shortened, and escaped, for plotly understands some HTML."""
    text = str(name)
    return escape(text if len(text) <= longest else f"{text[: longest - 1]}…")


def _json(value: Any) -> Markup:
    return _inside_script(json.dumps(value, allow_nan=False))


def _inside_script(text: str) -> Markup:
    """JSON that cannot end the <script> element that it stands in."""
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
