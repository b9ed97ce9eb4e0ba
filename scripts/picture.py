"""Draws docs/picture.svg: one batch, several tasks and methods, one frozen backbone."""

from __future__ import annotations

from pathlib import Path

ROWS = [
    ("sentiment", "AoT P-Tuning", "#4e79a7", "positive"),
    ("topic", "LoRA", "#f28e2b", "science"),
    ("intent", "Houlsby adapter", "#59a14f", "track_parcel"),
    ("urgency", "P-tuning v2", "#b07aa1", "a number"),
    ("topic", "LoRA", "#f28e2b", "travel"),
    ("(none)", "bare backbone", "#8c8c8c", "embedding"),
]
WIDTH, TOP, STEP = 900, 64, 40


def text(
    x: float, y: float, words: str, size: int = 13, anchor: str = "start", fill: str = "#222", bold: bool = False
) -> str:
    """One line of text."""
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"{weight}>{words}</text>'


def draw() -> str:
    """The whole picture as SVG."""
    height = TOP + STEP * len(ROWS) + 74
    bottom = TOP + STEP * len(ROWS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="Helvetica, Arial, sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        text(130, 36, "one batch", 15, "middle", bold=True),
        text(470, 36, "one frozen backbone", 15, "middle", bold=True),
        text(780, 36, "each row's own head", 15, "middle", bold=True),
    ]
    for x in (330, 430, 530):
        parts.append(
            f'<rect x="{x}" y="{TOP - 8}" width="80" height="{bottom - TOP + 8}" rx="10" '
            f'fill="#f3f3f1" stroke="#c9c9c4"/>'
        )
    for x, name in ((370, "layer 1"), (470, "layer …"), (570, "layer L")):
        parts.append(text(x, bottom + 20, name, 12, "middle", "#666"))
    for i, (task, method, colour, answer) in enumerate(ROWS):
        y = TOP + STEP * i
        middle = y + 15
        parts.append(
            f'<rect x="20" y="{y}" width="220" height="30" rx="6" '
            f'fill="{colour}" fill-opacity="0.16" stroke="{colour}"/>'
        )
        parts.append(text(32, y + 20, task, 13, bold=True))
        parts.append(text(228, y + 20, method, 12, "end", "#444"))
        parts.append(f'<path d="M240 {middle} H690" stroke="{colour}" stroke-width="2.5" fill="none"/>')
        if method != "bare backbone":
            for x in (370, 470, 570):
                parts.append(f'<circle cx="{x}" cy="{middle}" r="7" fill="{colour}" stroke="#fff" stroke-width="1.5"/>')
        parts.append(f'<rect x="690" y="{y}" width="190" height="30" rx="6" fill="#fff" stroke="{colour}"/>')
        parts.append(text(702, y + 20, answer, 13))
    parts.append(
        text(
            450,
            height - 18,
            "dots are deltas: a few tensors per task, applied row by row; the backbone's weights never change",
            13,
            "middle",
            "#444",
        )
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).parents[1].joinpath("docs", "picture.svg").write_text(draw(), "utf-8")
