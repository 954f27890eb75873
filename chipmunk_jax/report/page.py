"""page(): the report of a verification as one HTML file that needs no other, no script and no network."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from chipmunk_jax.report import charts
from chipmunk_jax.report.configurations import rivals as rivals_at
from chipmunk_jax.report.pictures import Picture
from chipmunk_jax.report.style import CSS
from chipmunk_jax.report.ways import SAME

CLASSES = {"dense": "dense", "fewer steps": "fewer", "skipped steps": "skipping"}  # method -> class of its colour
# Settings that stand elsewhere on the page, and lists of numbers.
ELSEWHERE = (
    "prompts", "seeds", "sparsity", "density", "executed", "dense_seconds", "sparse_seconds", "psnr", "median_psnr", "rivals",
    "psnr_of_frames", "ways", "drift", "steps_of", "steps_by_sample", "noise_floor", "machine",
)  # fmt: skip


def page(report: Mapping[str, Any], pictures: Sequence[Mapping[str, Picture]]) -> str:
    """A whole document of HTML, which needs no other file and no network.

    Args:
        report: numbers and details of a Verification, and its "noise_floor".
        pictures: of each sample how it came out, by name, dense first.
    """
    ways, model = report["ways"], escape(report["model"])
    sections = [
        ("", _head(report)),
        ("Samples", _samples(report, pictures)),
        ("Quality against cost", f'<div class="card">{_frontier(report)}{_ways(ways)}</div>'),
        ("Step by step", _panel(report)),
        ("Time and memory", f'<div class="card">{_times(ways)}</div>'),
        ("Settings", _settings(report)),
    ]
    body = "\n".join(f"<section><h2>{title}</h2>\n{text}</section>" if title else text for title, text in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{model}: dense, sparse, and the rivals</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n{body}\n"
        f"<footer>Written by chipmunk-jax {escape(report['version'])}; all numbers are in "
        '<a href="report.json">report.json</a>.</footer>\n</main>\n</body>\n</html>\n'
    )


def _head(report: Mapping[str, Any]) -> str:
    """Title, what was sampled, the verdict, and the four numbers that count."""
    count, size = len(report["prompts"]), f"{report['height']} x {report['width']}"
    noun, each = ("video", f" of {report['frames']} frames") if "frames" in report else ("image", "")
    several = "s" * (count > 1)
    sampled = f"{count} {noun}{several}{each}"
    seeds = f"{report['seeds'][0]} to {report['seeds'][-1]}" if count > 1 else str(report["seeds"][0])
    sub = f"{sampled}, {size}, {report['steps']} steps, seed{several} {seeds}, {report['dtype']}, {report['device']}"
    sparse = report["ways"]["sparse"]
    ratio = report["dense_seconds"] / report["sparse_seconds"]
    tiles = [
        ("PSNR to the dense sample, median", _level(sparse["median_psnr"])),
        ("SSIM, median", f"{_median(sparse['ssim']):.3f}" if sparse["ssim"] else "-"),
        ("of the dense work, by count", f"{100 * sparse['executed']:.1f} %"),
        (f"as fast as dense, measured on {report['device']}", f"{ratio:.2f} x"),
    ]
    drawn = "".join(f'<div class="tile"><b>{value}</b><span>{escape(name)}</span></div>' for name, value in tiles)
    return (
        f'<header><h1>{escape(report["model"])}: sparse against dense</h1><p class="sub">{escape(sub)}</p></header>'
        f'{_verdict(report)}<div class="tiles">{drawn}</div>'
    )


def _verdict(report: Mapping[str, Any]) -> str:
    """Whether a rival at the same cost comes nearer."""
    rivals, level = report["rivals"], report["median_psnr"]
    told = f"At {100 * report['executed']:.0f} % of the dense work, sparse samples are at {_level(level)}"
    if not rivals:
        none = not rivals_at(report["executed"], report["steps"])
        why = "At this cost the rivals are the dense sample itself" if none else "No rivals were sampled"
        return f'<div class="verdict"><p>{told}. {why}.</p></div>'
    best = max(rivals, key=lambda one: one["median_psnr"])
    each = "; ".join(f"{escape(one['name'])}: {_level(one['median_psnr'])}" for one in rivals)
    if best["median_psnr"] > level:
        ahead = best["median_psnr"] - level
        said = f"<b>A rival at the same cost comes nearer</b>, {escape(best['name'])}, by {_level(ahead)}"
        return f'<div class="verdict behind"><p>{said}. {told} ({each}).</p></div>'
    return f'<div class="verdict"><p><b>No rival at the same cost comes nearer.</b> {told} ({each}).</p></div>'


def _samples(report: Mapping[str, Any], pictures: Sequence[Mapping[str, Picture]]) -> str:
    """A card a sample: how it came out, each way, and of videos some frames."""
    cards = []
    for i, (prompt, seed, shown) in enumerate(zip(report["prompts"], report["seeds"], pictures, strict=True)):
        figures = "".join(_figure(name, picture, report["ways"].get(name), i) for name, picture in shown.items())
        frames = "".join(_frames(name, picture) for name, picture in shown.items() if picture.frames)
        cards.append(
            f'<div class="card"><h3>{escape(prompt)} <small>seed {seed}</small></h3>'
            f'<div class="pictures" style="--columns:{len(shown)}">{figures}</div>'
            + (f'<div class="frames">{frames}</div>' if frames else "")
            + "</div>"
        )
    hint = "The same prompt and noise each way; beneath, how near each picture is to the dense one. The difference is that of the "
    return f'<p class="hint">{hint}sparse sample, around grey.</p>{"".join(cards)}'


def _figure(name: str, picture: Picture, way: Mapping[str, Any] | None, i: int) -> str:
    said = ""
    if way is not None and name != "dense":
        likeness = "" if way["ssim"] is None else f", SSIM {way['ssim'][i]:.3f}"
        said = f"{_level(way['psnr'][i])}{likeness}"
    crisp = ' class="crisp"' if picture.crisp else ""
    return (
        f'<figure><img{crisp} src="{picture.uri}" alt="{escape(name)}">'
        f"<figcaption><b>{escape(name)}</b>{said}</figcaption></figure>"
    )


def _frames(name: str, picture: Picture) -> str:
    crisp = ' class="crisp"' if picture.crisp else ""
    images = "".join(f'<img{crisp} src="{uri}" alt="">' for uri in picture.frames)
    return f"<span>{escape(name)}</span><div>{images}</div>"


def _frontier(report: Mapping[str, Any]) -> str:
    floor = report["noise_floor"]
    points = [
        charts.Point(name, way["executed"], way["psnr"], _class(name, way))
        for name, way in report["ways"].items()
        if name != "dense"
    ]
    if floor["psnr"] is None:
        rounding = f"The floor of rounding was not measured: {escape(floor['error'])}."
    else:
        here, other = floor["dtypes"]
        rounding = f"Rounding alone, the dense sample in {other} in place of {here}: {_level(floor['psnr'])}."
    return (
        '<p class="hint">PSNR to the dense sample, dB; large marks are medians, small ones samples. A rival runs the whole '
        f"number of steps that comes nearest to the sparse sample's work. {rounding}</p>"
        f'<div class="chart">{charts.frontier(points, SAME, floor["psnr"], floor["dtypes"][1])}'
        '<p class="axis">share of the dense work, by count</p></div>'
    )


def _ways(ways: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a way: cost, time, likeness."""
    dense, rows = ways["dense"]["seconds"], {}
    for name, way in ways.items():
        near = name != "dense"
        rows[name] = [
            f"{100 * way['executed']:.1f} %",
            _seconds(way["seconds"]),
            f"{dense / way['seconds']:.2f} x",
            _level(way["median_psnr"], "") if near else "",
            _level(min(way["psnr"]), "") if near else "",
            f"{_median(way['ssim']):.3f}" if near and way["ssim"] else "",
        ]
    return _table(("work", "time of steps, s", "as fast", "median PSNR, dB", "worst", "median SSIM"), rows, ways)


def _table(titles: Sequence[str], rows: Mapping[str, Sequence[str]], ways: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a way, with its colour in front."""
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    lines = []
    for name, cells in rows.items():
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f'<tr class="{_class(name, ways[name])}"><th scope="row">{escape(name)}</th>{row}</tr>')
    return (
        f'<table style="--columns:{len(titles)}"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def _panel(report: Mapping[str, Any]) -> str:
    """Drift, kinds of steps, and shares of columns, above one axis of steps."""
    steps, density = report["steps_of"], report["density"]
    rows = [charts.drift(report["drift"])]
    rows.append(f'<span class="name">kind</span>{charts.kinds_strip(steps["kinds"])}')
    for part, words in (("attention", "Attention: keys computed"), ("mlp", "MLP: neurons computed")):
        rows.append(f'<span class="part">{words}, {100 * density[part]:.1f} % in the mean</span>')
        rows += [f'<span class="name">{name}</span>{cells}' for name, cells in charts.heat_rows(steps[part])]
    rows.append(charts.step_axis(len(steps["kinds"])))
    hint = (
        "Above, drift: how far the clean sample that a sparse step points at lies from that of the dense step, relative to its "
        "norm, the mean of all samples in bold. Beneath, what each step of the first sample ran, and the share of the columns that "
        "each layer computed in it."
    )
    return (
        f'<div class="card"><p class="hint">{hint}</p><div class="panel">{"".join(rows)}</div>'
        f"{charts.kinds_legend(steps['kinds'])}</div>"
    )


def _times(ways: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a way: seconds and peak of memory of each stage."""
    stages, rows = list(ways["dense"]["stages"]), {}
    known = any(stage["peak_bytes"] for way in ways.values() for stage in way["stages"].values())
    for name, way in ways.items():
        found = [way["stages"][stage] for stage in stages]
        peaks = ["" if one["peak_bytes"] is None else f"{one['peak_bytes'] / 1e9:.1f}" for one in found]
        rows[name] = [_seconds(one["seconds"]) for one in found] + (peaks if known else [])
    titles = [f"{stage}, s" for stage in stages] + ([f"{stage}, peak GB" for stage in stages] if known else [])
    memory = "" if known else " This device does not tell its memory."
    hint = f'<p class="hint">All samples, weights read and programs compiled included.{memory}</p>'
    return hint + _table(titles, rows, ways)


def _settings(report: Mapping[str, Any]) -> str:
    given = {name: value for name, value in report.items() if name not in ELSEWHERE} | report["machine"]
    peak = given.pop("peak_bytes", None)
    given |= {"peak memory": f"{peak / 1e9:.1f} GB"} if peak else {}
    lines = "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(str(value))}</dd>"
        for name, value in given.items()
        if value is not None
    )
    sparsity = "\n".join(_yaml(report["sparsity"]))
    return f'<div class="card"><dl>{lines}</dl><pre>{escape(sparsity)}</pre></div>'


def _yaml(tree: Mapping[str, Any], indent: str = "") -> list[str]:
    """The lines of nested settings, as a file of them has them."""
    lines = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}:", *_yaml(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {json.dumps(value)}")
    return lines


def _class(name: str, way: Mapping[str, Any]) -> str:
    return "ours" if name == "sparse" else CLASSES.get(way["method"], "ours")


def _level(level: float, unit: str = "\N{NO-BREAK SPACE}dB") -> str:
    return f"{level:.1f}{unit}" if level < SAME else "equal"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:.1f}"


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
