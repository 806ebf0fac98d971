"""Jinja templates of the reports and the model card."""

from __future__ import annotations

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template

HERE = "vlmvqa.extras.report"


def template(name: str, package: str = HERE) -> Template:
    """Return a template of a package, which may include those of this package; HTML templates escape all values."""
    environment = Environment(
        autoescape=".html." in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        loader=ChoiceLoader([PackageLoader(one, "") for one in (package, HERE)]),
    )
    return environment.get_template(name)
