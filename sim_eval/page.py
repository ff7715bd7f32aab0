"""What HTML pages of ours share: one file that needs no network, light and dark, with tables and videos inside."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from scd_robot.errors import OutputError

__all__ = ["counted", "html_page", "html_table", "html_video"]

_CSS = """
:root { color-scheme: light dark; --ink: #1c2430; --muted: #5d6878; --line: #d9dee6; --page: #f5f7fa; --card: #ffffff;
  --success: #1f8a70; --failure: #d1603d; --invalid: #8a92a0; --accent: #3b6fb6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ecf2; --muted: #9aa5b5; --line: #323b48; --page: #12161c;
  --card: #1b2129; --success: #3fb594; --failure: #e5805f; --invalid: #7b8595; --accent: #6d9fe3; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { margin: 0; font-size: 1.05rem; font-weight: 600; overflow-wrap: anywhere; }
h2 { margin: 40px 0 12px; font-size: 1.2rem; }
h3 { margin: 0 0 8px; font-size: .95rem; }
p { margin: 4px 0; }
.muted { color: var(--muted); }
.rate { font-size: 3.2rem; font-weight: 700; line-height: 1.15; letter-spacing: -.02em; margin-top: 12px; }
.note { border-left: 4px solid var(--failure); padding: 8px 14px; background: var(--card); border-radius: 4px;
  margin-top: 16px; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 24px; }
.plots, .videos { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); }
.videos { grid-template-columns: repeat(auto-fill, minmax(min(100%, 280px), 1fr)); }
.videos.pairs { grid-template-columns: repeat(2, minmax(0, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px; min-width: 0; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: .85rem; }
svg { display: block; width: 100%; height: auto; }
video { display: block; width: 100%; border-radius: 6px; background: #000; }
figure { margin: 0; }
figcaption { margin-top: 8px; font-size: .9rem; overflow-wrap: anywhere; }
.badge { display: inline-block; padding: 0 8px; border: 1px solid; border-radius: 99px; font-size: .8rem;
  font-weight: 600; }
.success { color: var(--success); } .failure { color: var(--failure); } .invalid { color: var(--invalid); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--muted); font-weight: 500; }
td.wrap { overflow-wrap: anywhere; min-width: 12ch; }
summary { cursor: pointer; margin-bottom: 8px; }
code { font-size: .85em; }
"""


def html_page(title: str, sections: Iterable[str]) -> str:
    """A whole document of sections that are HTML already."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def html_table(rows: Iterable[Sequence[str]], names: Sequence[str] = ()) -> str:
    """A table of cells that are HTML already; without `names` the first column is the heading."""
    head = f"<thead><tr>{''.join(f'<th>{name}</th>' for name in names)}</tr></thead>" if names else ""
    first = "td" if names else "th"
    body = "".join(
        f"<tr><{first}>{row[0]}</{first}>" + "".join(f"<td class='wrap'>{cell}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f"<table>{head}<tbody>{body}</tbody></table>"


def html_video(path: Path, caption: str) -> str:
    """A card with an MP4 inside the page; the caption is HTML already.

    Raises:
        OutputError: the file cannot be read.
    """
    try:
        data = base64.b64encode(path.read_bytes()).decode("ascii")
    except OSError as error:
        raise OutputError(f"cannot read the video {path}: {error.strerror or error}") from error
    return (
        "<figure class='card'><video controls muted loop playsinline preload='auto' "
        f"src='data:video/mp4;base64,{data}'></video><figcaption>{caption}</figcaption></figure>"
    )


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural where there is not one."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
