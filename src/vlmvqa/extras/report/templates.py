"""Jinja templates of the report and the model card."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined, Template


def template(name: str) -> Template:
    """Return a template of this package; HTML templates escape all values."""
    environment = Environment(
        autoescape=".html." in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        loader=PackageLoader("vlmvqa.extras.report", ""),
    )
    return environment.get_template(name)
