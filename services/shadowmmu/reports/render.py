"""A page as one HTML file that needs nothing else: style, scripts and Vega are in it, and it asks no network.

Relies on Jinja with automatic escaping for the markup, and on vl-convert for Vega's scripts. As a second line of
defence behind the escaping, a content security policy lets nothing run but the scripts of this file, by their hashes,
and nothing be fetched; so Vega evaluates its expressions by an interpreter instead of `eval`.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

import jinja2
import vl_convert
from jinja2.utils import htmlsafe_json_dumps
from markdown_it import MarkdownIt
from markupsafe import Markup

from shadowmmu.reports.page import Figure, Page

__all__ = ["render_html"]


def render_html(page: Page) -> str:
    """The page's HTML document. Texts of the page are escaped; its scripts are the same for all pages.

    File names that are no UTF-8 have question marks instead of what has no character.
    """
    has_charts = any(isinstance(part, Figure) for section in page.sections for part in section.parts)
    scripts = [_vega_bundle(), _resource("page.js")] if has_charts else [_resource("page.js")]
    template = _environment().get_template("page.html.j2")
    document = template.render(
        page=page,
        style=Markup(_resource("style.css")),  # noqa: S704 - a file of this package
        scripts=[Markup(script) for script in scripts],  # noqa: S704 - likewise, and Vega
        policy=_policy(scripts),
    )
    return document.encode("utf-8", "replace").decode("utf-8")


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("shadowmmu.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["json"] = htmlsafe_json_dumps
    environment.filters["data_url"] = _data_url
    environment.filters["markdown"] = _markdown
    return environment


def _data_url(svg: str) -> str:
    """An SVG document for an <img>: there its styles are its own, and no script in it would run."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode("ascii")


def _markdown(text: str) -> Markup:
    """Markdown as HTML: with tables, without HTML of the text's own, without pictures and files from elsewhere."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    tokens = parser.parse(text)
    for token in tokens:
        relative = False
        for child in token.children or ():
            if child.type == "link_open":
                relative = "://" not in str(child.attrs["href"])
            if relative and child.type in ("link_open", "link_close"):
                child.tag, child.attrs = "span", {}
    return Markup(parser.renderer.render(tokens, parser.options, {}))  # noqa: S704 - the parser has escaped it


def _resource(name: str) -> str:
    return files("shadowmmu.reports").joinpath("templates", name).read_text(encoding="utf-8")


@cache
def _vega_bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, fit to stand between script tags."""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    # What ends or confuses a script element would have to be escaped, within strings as well as outside of them.
    assert not any(word in bundle.lower() for word in ("</script", "<script", "<!--", "\r"))
    return bundle


def _policy(scripts: list[str]) -> str:
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode('ascii')}'"
        for script in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
