"""The frame of a page that is one file: no script, nothing loaded from elsewhere."""

from __future__ import annotations

from html import escape

#: the browser itself refuses scripts, and to fetch anything, should text of a finding ever slip through
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
    """Frames a body.

    Args:
        title: HTML, escaped already.
        body: HTML.
        style: CSS.
        pictures: whether the body holds pictures as ``data:`` addresses.
    """
    policy = POLICY + "; img-src data:" * pictures
    return _PAGE.format(policy=escape(policy), title=title, style=style, body=body)
