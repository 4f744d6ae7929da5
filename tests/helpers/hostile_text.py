"""Texts that an attacker may put into a category, a title, a file name or an answer, each with the reason."""

ESCAPE, BELL = "\x1b", "\x07"
SURROGATE = "\udcff"

#: name -> text
HOSTILE_TEXTS = {
    "rich_closing_tag": "[/bold]",
    "rich_style": "[bold red on white]x[/]",
    "rich_link": "[link=https://evil.example]x[/link]",
    "rich_emoji": ":skull:",
    "colour": f"{ESCAPE}[31mred{ESCAPE}[0m",
    "clear_screen": f"{ESCAPE}[2J{ESCAPE}[H",
    "window_title": f"{ESCAPE}]0;owned{BELL}",
    "terminal_link": f"{ESCAPE}]8;;https://evil.example{ESCAPE}\\x{ESCAPE}]8;;{ESCAPE}\\",
    "c1_control": "\x9b31mx",
    "carriage_return": "malware\rharmless",
    "backspaces": "bad\b\b\bgood",
    "null": "a\x00b",
    "right_to_left": "invoice\u202egnp.exe",
    "line_separator": "a\u2028b",
    "lone_surrogate": f"a{SURROGATE}b",
    "formula": "$x^2$",
    "broken_formula": r"$\frac{$",
    "two_dollars": "$HOME and $PATH_{",
    "html": "<script>alert(1)</script>",
    "attribute": '"><img src=x onerror=alert(1)>',
    "entity": "&lt;b&gt;",
    "markdown_link": "[x](https://evil.example)",
    "markdown_image": "![x](https://evil.example/x.png)",
    "autolink": "https://evil.example/path",
    "www": "www.evil.example",
    "mail": "root@evil.example",
    "table_cell": "a | b | c",
    "heading": "a\n# heading\n---\n",
    "code": "`x` and ```x```",
    "format": "{0} {task.description} %s %(name)s",
    "long": "x" * 5000,
}
