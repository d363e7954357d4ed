"""A benchmark's report: one page with the tables, the plots, and pictures of every method side by side."""

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from .benchmark_data import Material, Person
from .benchmark_stages import ROWS, TUNED, Measured, folder_of
from .plots import line_plot
from .shared import cover_picture, read_picture, truncate_text

if TYPE_CHECKING:
    from .benchmark import Benchmark

SHOWN = (
    "seed_fid",
    "fid",
    "wcfid",
    "seed_is",
    "is",
    "bcis",
    "identity_is",
    "likeness",
    "attributes",
    "prompt_following",
    "clip_i",
    "clip_t",
    "dino",
)
SHEET = 8  # identities on the contact sheet
SIDE, GAP, LABEL, HEAD = 96, 4, 190, 22  # pixels
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1em 0; font-variant-numeric: tabular-nums; }
td, th { border-bottom: 1px solid #ddd; padding: .3em .7em; text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
img { max-width: 100%; border: 1px solid #eee; margin: .5em 0; }
"""


def write_report(path: Path, options: "Benchmark", material: Material, measured: Measured, folder: Path) -> None:
    """The page, with its pictures beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    likeness = ""
    if measured.numbers:
        title = "Likeness over the number of references"
        line_plot(path.parent / "likeness.png", title, measured.numbers, "references", "likeness")
        likeness = (
            f"<h2>{title}</h2><p>Mean cosine by {html.escape(measured.likeness)}, two pictures of each identity, 95 % "
            'intervals.</p><img src="likeness.png" alt="likeness over the number of references">'
        )
    contact_sheet(material.people[:SHEET], folder).save(path.parent / "sheet.png")
    people, seeds = len(material.people), options.seeds
    count = people * seeds * len(material.people[0].prompts)
    parts = [
        "<!doctype html><meta charset=utf-8><title>Personalize: benchmark</title>",
        f"<style>{STYLE}</style><h1>How several photographs become one picture</h1>",
        f"<p>{people} held-out identities, {len(material.people[0].prompts)} prompts, {seeds} seeds: {count} pictures a "
        f"method, {material.sampling.steps} steps of {material.sampling.solver} at guidance {material.sampling.guidance:g}, λ = "
        f"{options.weight:g}. In brackets 95 % intervals, by drawing identities again.</p>",
        "<h2>IP-Adapters, trained alike</h2>",
        _table((path.parent / "adapters" / "table.md").read_text(encoding="utf-8")),
        _plots(path.parent / "adapters"),
    ]
    if measured.tuned is not None:
        parts += [
            f"<h2>All methods, on the {min(options.tuned_identities or 0, people)} identities that each was trained for</h2>",
            _table((path.parent / "tuned" / "table.md").read_text(encoding="utf-8")),
            _plots(path.parent / "tuned"),
        ]
    parts += [likeness, "<h2>Pictures</h2><p>Unchosen: the first prompts, the first seed.</p>"]
    parts.append('<img src="sheet.png" alt="references and pictures of every method">')
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _plots(folder: Path) -> str:
    found = [name for name in SHOWN if (folder / f"{name}.png").exists()]
    return "".join(f'<img src="{folder.name}/{name}.png" alt="{name}">' for name in found)


def _table(markdown: str) -> str:
    """Tables, lists and paragraphs of Markdown as HTML."""
    parts = []
    for block in re.split(r"\n{2,}", markdown.strip()):
        lines = block.splitlines()
        if lines[0].startswith("|"):
            rows = [[html.escape(cell.strip()) for cell in line.strip("|").split("|")] for line in lines]
            head = "".join(f"<th>{cell}</th>" for cell in rows[0])
            body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows[2:])
            parts.append(f"<table><tr>{head}</tr>{body}</table>")
        elif lines[0].startswith("- "):
            parts.append(f"<ul>{''.join(f'<li>{html.escape(line[2:])}</li>' for line in lines)}</ul>")
        else:
            parts.append(f"<p>{html.escape(block)}</p>")
    return "\n".join(parts)


def contact_sheet(people: Sequence[Person], folder: Path) -> Image.Image:
    """References of each person, and below them what each method drew of the first prompts."""
    methods = [title for title in (*(row.title for row in ROWS), *TUNED.values()) if folder_of(folder, title).is_dir()]
    columns = max(len(people[0].prompts), 1)
    blocks = [_block(person, methods, columns, folder) for person in people]
    width, height = max(b.width for b in blocks), sum(b.height + 3 * GAP for b in blocks)
    sheet, y = Image.new("RGB", (width, height), "white"), 0
    for block in blocks:
        sheet.paste(block, (0, y))
        y += block.height + 3 * GAP
    return sheet


def _block(person: Person, methods: Sequence[str], columns: int, folder: Path) -> Image.Image:
    rows: dict[str, list[Path]] = {f"{person.name}: references": list(person.references)[:columns]}
    for title in methods:
        own = folder_of(folder, title) / person.name
        paths = [own / f"p{i:02}-s0.png" for i in range(columns)]
        if all(path.exists() for path in paths):
            rows[title] = paths
    font = ImageFont.load_default(size=12)
    image = Image.new("RGB", (LABEL + columns * (SIDE + GAP), HEAD + len(rows) * (SIDE + GAP)), "white")
    pen = ImageDraw.Draw(image)
    for i, prompt in enumerate(person.prompts[:columns]):
        text = ", ".join(prompt.wishes.values()) or prompt.text.replace("{subject}", "…")
        pen.text((LABEL + i * (SIDE + GAP), 4), truncate_text(text, SIDE, font), fill=(60, 60, 60), font=font)
    for row, (title, paths) in enumerate(rows.items()):
        y = HEAD + row * (SIDE + GAP)
        pen.text((2, y + SIDE / 2 - 7), title, fill=(30, 30, 30), font=font)
        for i, path in enumerate(paths):
            image.paste(_small(path), (LABEL + i * (SIDE + GAP), y))
    return image


def _small(path: Path) -> Image.Image:
    pixels = cover_picture(read_picture(path).pixels, SIDE, SIDE).clamp(0, 1)
    return Image.fromarray((pixels * 255).round().byte().numpy())
