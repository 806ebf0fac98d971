"""The API as OpenAPI tells it, and the same as a page of its own: FastAPI's would load its parts from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from vlmvqa.extras.report.attribution import METHODS
from vlmvqa.extras.serving.limits import Limits
from vlmvqa.extras.serving.style import plain

REFUSALS = {
    400: "the picture is damaged, or the form cannot be read",
    401: "the server asks for a token",
    408: "the request took too long to come",
    413: "too many bytes or pixels",
    415: "no picture in a known format",
    422: "a question or an option cannot be taken",
    503: "too many requests wait, or there was no answer in time: ask again after the seconds of Retry-After",
}


def body(limits: Limits) -> dict[str, Any]:
    """The form of `POST /answer`."""
    fields = {
        "image": {
            "type": "string",
            "format": "binary",
            "description": f"JPEG, PNG, WEBP, GIF or BMP; up to {limits.megabytes:g} MB and "
            f"{limits.megapixels:g} megapixels",
        },
        "question": {
            "type": "array",
            "items": {"type": "string", "maxLength": limits.characters},
            "minItems": 1,
            "maxItems": limits.questions,
            "description": "once for each question",
        },
        "alternatives": {
            "type": "integer",
            "minimum": 0,
            "maximum": limits.alternatives,
            "default": 0,
            "description": "how many other answers to tell, by a beam search",
        },
        "look": {
            "type": "string",
            "enum": list(METHODS),
            "description": "draw an attention map over the picture, by attention or by gradient; leave it out for none",
        },
    }
    schema = {"type": "object", "required": ["image", "question"], "properties": fields}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def page(schema: Mapping[str, Any]) -> str:
    """A page that tells what the schema tells, and lets one try it."""
    parts = []
    for path, methods in schema["paths"].items():
        for method, about in methods.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(about['summary'])}.</p>")
            form = about.get("requestBody", {}).get("content", {}).get("multipart/form-data")
            if form:
                parts.append("<h3>Fields of the form</h3>" + _properties(schema, form["schema"]))
            for status, response in about["responses"].items():
                if "content" in response and status == "200":
                    answer = response["content"]["application/json"]["schema"]
                    parts.append("<h3>Answer</h3>" + _properties(schema, answer))
            refusals = {s: r["description"] for s, r in about["responses"].items() if s in map(str, REFUSALS)}
            if refusals:
                rows = "".join(f"<tr><td>{status}</td><td>{escape(why)}</td></tr>" for status, why in refusals.items())
                parts.append(f'<h3>Refusals, as {{"error": "a sentence"}}</h3><table>{rows}</table>')
    return plain("vlmvqa: the API", TRY.replace("<!--parts-->", "".join(parts)))


BOUNDS = {"minimum": "from", "maximum": "to", "maxItems": "at most", "maxLength": "at most", "default": "default"}
TRY = """<h1>The API</h1>
<p>The same as <a href="openapi.json">OpenAPI's JSON</a>, for people. <a href="./">The page to try the model</a>.</p>
<form action="answer" method="post" enctype="multipart/form-data">
<label>Picture <input type="file" name="image" accept="image/*" required></label>
<label>Question <input type="text" name="question" value="What is this?" required></label>
<button>Try it</button></form>
<!--parts-->"""


def _properties(schema: Mapping[str, Any], of: Mapping[str, Any]) -> str:
    """A table of an object's fields, and of the objects in it."""
    rows = "".join(_rows(schema, of, ""))
    return f"<table><tr><th>field</th><th>type</th><th>what</th></tr>{rows}</table>"


def _rows(schema: Mapping[str, Any], of: Mapping[str, Any], prefix: str) -> list[str]:
    found = []
    for name, about in _resolved(schema, of).get("properties", {}).items():
        inner = about.get("items", {})
        kind = about.get("type") or " or ".join(one["type"] for one in about.get("anyOf", ()))
        what = about.get("description", "")
        told = [f"{word} {about[key]:g}" for key, word in BOUNDS.items() if key in about]
        told += [" or ".join(about["enum"])] if "enum" in about else []
        cells = (f"<code>{escape(prefix + name)}</code>", escape(kind), escape("; ".join(filter(None, [what, *told]))))
        found.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        found += _rows(schema, inner, f"{prefix}{name}[].") if inner else []
    return found


def _resolved(schema: Mapping[str, Any], of: Mapping[str, Any]) -> Mapping[str, Any]:
    """A part of the schema, or what it refers to."""
    if "$ref" not in of:
        return of
    found: Mapping[str, Any] = schema["components"]["schemas"][of["$ref"].rpartition("/")[2]]
    return found
