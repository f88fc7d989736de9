"""Groups of kept frames as one static HTML page.

Pictures stand in the page itself, so that it can be mailed and outlives the folder's retention.
Everything in it is other people's text: it is escaped, and the page forbids itself scripts and
addresses.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import islice

from agent.finds.review import Group, Kept

#: Pictures shown of a group, and in all, so that a phone can open the page (about 8 MB).
PER_GROUP = 24
IN_ALL = 400

_MAX_PICTURE_BYTES = 1 << 20
_MAX_TEXT = 60
_GUESSES = 3

_STYLE = """
:root{color-scheme:light dark;--quiet:#666;--line:#ddd;--strong:#a33}
@media(prefers-color-scheme:dark){:root{--quiet:#999;--line:#333;--strong:#e88}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:80rem;padding:1rem;font:15px/1.4 system-ui,sans-serif}
h1{font-size:1.4rem;margin:.2rem 0}
h2{font-size:1.05rem;margin:0}
p{margin:.2rem 0}
.quiet,figcaption{color:var(--quiet)}
section{border-top:1px solid var(--line);padding:.9rem 0}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.9rem .7rem;
margin:.6rem 0}
figure{margin:0;min-width:0}
img{display:block;width:100%;aspect-ratio:1;object-fit:cover;background:var(--line);
border-radius:4px}
figcaption{font-size:.78rem;overflow-wrap:anywhere;padding-top:.25rem}
figcaption b{color:CanvasText;font-weight:600}
.margin{color:var(--strong)}
summary{cursor:pointer;color:var(--quiet);font-size:.85rem}
pre{font-size:.78rem;max-height:16rem;overflow:auto;white-space:pre-wrap;overflow-wrap:anywhere}
"""

_HEAD = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none';img-src data:;style-src 'unsafe-inline'">
<title>Unknown frames</title><style>{_STYLE}</style></head><body>
"""


@dataclass(frozen=True, slots=True)
class Sheet:
    """What a page shows. `origin` says where frames are from; `skipped` files could not be read."""

    groups: Sequence[Group]
    origin: str
    skipped: int


def render(sheet: Sheet, progress: Callable[[int, int], None]) -> Iterator[str]:
    """The page, piece by piece: groups of several frames, then all frames that stand alone."""
    frames = [kept for group in sheet.groups for kept in group.frames]
    several = [group for group in sheet.groups if len(group.frames) > 1]
    alone = [group.frames[0] for group in sheet.groups if len(group.frames) == 1]
    yield _HEAD + _introduction(sheet, frames, len(several), len(alone))
    left = IN_ALL
    done = 0
    for number, group in enumerate(several, start=1):
        shown = list(islice(group.frames, min(PER_GROUP, left)))
        yield _section(f"{number}. {len(group.frames)} frames", group.frames, shown)
        left -= len(shown)
        done += len(group.frames)
        progress(done, len(frames))
    if alone:
        yield _section(f"{_count(len(alone), 'frame')} like no other", alone, alone[:left])
        progress(len(frames), len(frames))
    yield "</body></html>\n"


def _introduction(sheet: Sheet, frames: Sequence[Kept], several: int, alone: int) -> str:
    cameras = {kept.event.data.camera for kept in frames}
    skipped = f" {_count(sheet.skipped, 'file')} could not be read." if sheet.skipped else ""
    return (
        f"<h1>Unknown frames</h1><p>{_count(len(frames), 'frame')} of "
        f"{_count(len(cameras), 'camera')}, {_span(frames)} UTC, in "
        f"{_text(sheet.origin, len(sheet.origin))}: {_count(several, 'group')} that look alike, "
        f"{alone} alone.{skipped}</p>"
        '<p class="quiet">The most novel and the most frequent come first. Bold is what your '
        "labels made of a frame; the margin is how far its novelty lies above the threshold. "
        "Under each group are the ids of its frames, to copy.</p>\n"
    )


def _section(title: str, frames: Sequence[Kept], shown: Sequence[Kept]) -> str:
    cameras = sorted({kept.event.data.camera for kept in frames})
    named = ", ".join(_text(camera) for camera in cameras[:3])
    more = f" and {_count(len(cameras) - 3, 'more camera')}" if len(cameras) > 3 else ""
    hidden = len(frames) - len(shown)
    rest = f'<p class="quiet">{hidden} more are not shown.</p>' if hidden else ""
    ids = "\n".join(_text(kept.event.id, len(kept.event.id)) for kept in frames)
    return (
        f'<section><h2>{title}</h2><p class="quiet">{named}{more} · {_span(frames)}</p>'
        f'<div class="grid">{"".join(map(_figure, shown))}</div>{rest}'
        f"<details><summary>Frame ids</summary><pre>{ids}</pre></details></section>\n"
    )


def _figure(kept: Kept) -> str:
    data = kept.event.data
    guesses = ", ".join(
        f"{_text(guess.label)} {'?' if guess.probability is None else f'{guess.probability:.0%}'}"
        for guess in data.top[:_GUESSES]
    )
    moment = kept.event.time
    return (
        f'<figure><img loading="lazy" alt="" src="data:image/jpeg;base64,{_picture(kept)}">'
        f'<figcaption><b>{guesses}</b><br><span class="margin">margin {data.margin:.2f}</span>'
        f" · domain {data.domain}<br>{_text(data.camera)}<br>{moment:%Y-%m-%d %H:%M:%S}<br>"
        f"{_text(kept.event.id)}</figcaption></figure>"
    )


def _picture(kept: Kept) -> str:
    try:
        with kept.picture.open("rb") as file:
            return base64.b64encode(file.read(_MAX_PICTURE_BYTES)).decode()
    except OSError:  # the agent's retention may have been faster
        return ""


def _span(frames: Sequence[Kept]) -> str:
    moments = [kept.event.time for kept in frames]
    first, last = (f"{moment:%Y-%m-%d %H:%M}" for moment in (min(moments), max(moments)))
    return first if first == last else f"{first} to {last}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _text(text: str, most: int = _MAX_TEXT) -> str:
    """Foreign text on one line, of a bounded length, and unable to be anything but text."""
    short = text if len(text) <= most else f"{text[: most - 1]}…"
    return escape(
        "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in short)
    )
