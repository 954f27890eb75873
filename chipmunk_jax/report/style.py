"""The look of a page: light and dark by the reader's setting, wide and narrow."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f5f2; --card: #ffffff; --ink: #1d2126; --soft: #62686f; --line: #e2e0da; --grid: #ebe9e4;
  --dense: #4a5058; --ours: #0f766e; --fewer: #c2410c; --skipping: #6d4bb3; --warn: #9a3412; --warn-page: #fdf1e7;
  --good-page: #e8f4f1;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1c2024; --ink: #e6e4df; --soft: #9aa1a8; --line: #2d3237; --grid: #282d32;
    --dense: #b4bac1; --ours: #2dd4bf; --fewer: #fb923c; --skipping: #b79cf2; --warn: #fdba74; --warn-page: #33251a;
    --good-page: #17302c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%;
}
main { max-width: 1160px; margin: 0 auto; padding: clamp(20px, 4vw, 56px) clamp(16px, 4vw, 40px) 64px; }
h1 {
  font-size: clamp(26px, 3.4vw, 36px); line-height: 1.15; margin: 0 0 6px; letter-spacing: -0.015em;
  font-weight: 650;
}
h2 { font-size: 19px; margin: 0 0 10px; letter-spacing: -0.005em; font-weight: 620; }
h3 { font-size: 15px; margin: 0 0 10px; font-weight: 600; overflow-wrap: anywhere; }
h3 small { font-weight: 400; color: var(--soft); font-size: 14px; white-space: nowrap; }
p { margin: 0; max-width: 96ch; }
.sub, .hint { color: var(--soft); }
.hint { font-size: 14px; line-height: 1.5; margin-bottom: 16px; }
h2 + .hint { margin-top: -6px; }
section { margin-top: 44px; }
.card {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: clamp(14px, 2.2vw, 24px);
  min-width: 0;
}
.card + .card { margin-top: 16px; }
.verdict { margin-top: 22px; padding: 14px 18px; border-radius: 10px; background: var(--good-page); }
.verdict.behind { background: var(--warn-page); color: var(--warn); }
.verdict p { max-width: none; }
.tiles { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 12px; margin-top: 12px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px; min-width: 0; }
.tile b { display: block; font-size: 26px; line-height: 1.2; font-weight: 620; letter-spacing: -0.01em; }
.tile span { color: var(--soft); font-size: 14px; line-height: 1.35; display: block; }

.pictures { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); gap: 14px; }
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; height: auto; border-radius: 4px; background: var(--grid); }
img.crisp { image-rendering: pixelated; }
figcaption { font-size: 13px; line-height: 1.4; margin-top: 6px; color: var(--soft); }
figcaption b { display: block; color: var(--ink); font-weight: 560; }
.frames {
  display: grid; grid-template-columns: 8.5rem minmax(0, 1fr); gap: 4px 12px; align-items: center; margin-top: 16px;
  font-size: 13px;
}
.frames > span { color: var(--soft); line-height: 1.3; }
.frames > div { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: 4px; }
.frames img { width: 100%; height: auto; display: block; border-radius: 2px; }

table { border-collapse: collapse; width: 100%; font-size: 14px; }
.chart + table { margin-top: 22px; }
th, td {
  text-align: right; padding: 7px 0 7px 14px; border-bottom: 1px solid var(--line); white-space: nowrap;
  font-weight: 400;
}
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; min-width: 7.5em; }
thead th { color: var(--soft); font-size: 13px; vertical-align: bottom; white-space: normal; line-height: 1.3; }
tr:last-child td, tr:last-child th { border-bottom: 0; }
tbody th::before {
  content: ""; display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 8px;
  background: var(--mark, transparent);
}
tbody th { font-weight: 560; }
tr.dense { --mark: var(--dense); }
tr.ours { --mark: var(--ours); }
tr.fewer { --mark: var(--fewer); }
tr.skipping { --mark: var(--skipping); }

.plot {
  display: grid; grid-template-columns: 2.2rem minmax(0, 1fr); grid-template-rows: var(--tall) 1.8rem;
  margin: 14px 10px 0 0;
}
.plot svg, .panel svg { width: 100%; height: 100%; overflow: visible; display: block; }
.plot > .x { grid-column: 2; }
.y, .x { position: relative; font-size: 12px; color: var(--soft); line-height: 1; }
.y span { position: absolute; right: 8px; transform: translateY(-50%); white-space: nowrap; }
.y em { position: absolute; left: 0; top: 0; font-style: normal; font-size: 13px; }
.x span { position: absolute; top: 8px; transform: translateX(-50%); white-space: nowrap; }
.axis { max-width: none; font-size: 13px; color: var(--soft); text-align: right; margin: 2px 10px 0 0; }
svg .grid { stroke: var(--grid); stroke-width: 1; vector-effect: non-scaling-stroke; }
svg .floor { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 4; }
svg text {
  font-size: 13px; fill: var(--ink); paint-order: stroke; stroke: var(--card); stroke-width: 4px;
  stroke-linejoin: round;
}
svg text.note { fill: var(--soft); font-size: 12px; }
svg text.label { font-weight: 560; }
circle { stroke: var(--card); stroke-width: 1.5; fill: var(--dense); }
circle.ours { fill: var(--ours); } circle.fewer { fill: var(--fewer); } circle.skipping { fill: var(--skipping); }
circle.one { stroke: none; opacity: 0.4; }
svg text.ours { fill: var(--ours); } svg text.fewer { fill: var(--fewer); } svg text.skipping { fill: var(--skipping); }

.panel {
  display: grid; grid-template-columns: 8.5rem minmax(0, 1fr); gap: 3px 12px; font-size: 13px; align-items: center;
}
.panel > .name { color: var(--soft); line-height: 1.25; }
.panel > .part { grid-column: 1 / -1; font-weight: 560; margin-top: 14px; }
.panel > .y, .panel > .lines { height: 150px; }
.panel > .x { grid-column: 2; height: 1.8rem; }
.lines polyline { fill: none; stroke: var(--ours); vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.lines .one { stroke-width: 1; opacity: 0.35; }
.lines .mean { stroke-width: 2.25; }
.cells { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: 1px; height: 26px; }
.heat { height: 18px; }
.cells i, .legend i { display: block; border-radius: 2px; background: var(--ours); }
i.dense { background: var(--dense); }
i.select {
  background: color-mix(in srgb, var(--ours) 78%, var(--ink));
  background-image: linear-gradient(135deg, transparent 50%, rgb(255 255 255 / 0.38) 50%);
}
i.select-neurons { background: color-mix(in srgb, var(--ours) 45%, var(--card)); }
i.delta { background: color-mix(in srgb, var(--ours) 24%, var(--card)); }
.cells i.one-side, .legend i.one-side { align-self: end; height: 50%; }
i.skipped { background: none; border: 1px solid var(--line); }
.heat i { background: var(--grid); overflow: hidden; }
.heat b { display: block; height: 100%; background: var(--ours); }
.legend {
  display: flex; flex-wrap: wrap; gap: 4px 18px; list-style: none; margin: 14px 0 0; padding: 0; font-size: 13px;
  color: var(--soft);
}
.legend li { display: flex; align-items: center; gap: 7px; }
.legend i { width: 14px; height: 14px; flex: none; }

dl {
  display: grid; grid-template-columns: repeat(2, max-content minmax(0, 1fr)); gap: 5px 18px; margin: 0;
  font-size: 14px;
}
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
pre {
  margin: 14px 0 0; padding: 14px 0 0; border-top: 1px solid var(--line);
  font: 12.5px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere;
}
footer { margin-top: 40px; color: var(--soft); font-size: 14px; }
a { color: inherit; }

@media (max-width: 860px) {
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  dl { grid-template-columns: max-content minmax(0, 1fr); }
}
@media (max-width: 620px) {
  .pictures { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 12px 10px; }
  .panel, .frames { grid-template-columns: 5.4rem minmax(0, 1fr); gap: 3px 8px; font-size: 12px; }
  .tile { padding: 12px 14px; }
  .tile b { font-size: 22px; }
  tr {
    display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr));
    border-bottom: 1px solid var(--line); padding: 7px 0;
  }
  tr:last-child { border-bottom: 0; }
  thead tr { align-items: end; }
  th, td { border: 0; padding: 1px 0; }
  th:first-child { grid-column: 1 / -1; }
  thead th:first-child { display: none; }
  section { margin-top: 34px; }
}
"""
