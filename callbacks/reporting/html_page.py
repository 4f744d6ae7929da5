"""Skeleton of a self-contained HTML page: no scripts, no external resources."""

from __future__ import annotations

from html import escape

#: the browser blocks scripts and requests, in case that text of a finding is ever not escaped
POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def page(title: str, body: str, style: str, *, pictures: bool = False) -> str:
    """Returns a page with the given body.

    Args:
        title: HTML, already escaped.
        body: HTML.
        style: CSS.
        pictures: whether the body has images as ``data:`` URLs.
    """
    policy = POLICY + "; img-src data:" * pictures
    return _PAGE.format(policy=escape(policy), title=title, style=style, body=body)
