"""The look of report.html, light and dark."""

STYLE = """\
:root {
  color-scheme: light dark;
  --ink: #1c2024;
  --soft: #60646c;
  --rule: #dfe1e5;
  --page: #fcfcfd;
  --card: #ffffff;
  --both: #b9c9ea;
  --c0: #3b6fd4;
  --c1: #d9730d;
  --c2: #1f9d6b;
  --c3: #b5388f;
  --c4: #8a6d00;
  --c5: #0e8ca8;
  --c6: #d13438;
  --c7: #6e56cf;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #edeef0;
    --soft: #a0a5ad;
    --rule: #34373c;
    --page: #141518;
    --card: #1b1d21;
    --both: #3d4f78;
    --c0: #7ba6ff;
    --c1: #ff9f45;
    --c2: #4cc38a;
    --c3: #e879c6;
    --c4: #e5c04b;
    --c5: #4cc9e6;
    --c6: #ff6d70;
    --c7: #a996ff;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0;
  background: var(--page);
  color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: 18px; margin: 40px 0 12px; }
h3 { font-size: 14px; margin: 24px 0 8px; }
.note { color: var(--soft); font-size: 13px; max-width: 90ch; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
td:last-child { white-space: normal; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 16px; }
figure { margin: 0; padding: 12px; background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 6px; }
svg { display: block; width: 100%; height: auto; }
.axis { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--rule); }
.line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.line.c0 { stroke: var(--c0); }
.line.c1 { stroke: var(--c1); }
.line.c2 { stroke: var(--c2); }
.line.c3 { stroke: var(--c3); }
.line.c4 { stroke: var(--c4); }
.line.c5 { stroke: var(--c5); }
.line.c6 { stroke: var(--c6); }
.line.c7 { stroke: var(--c7); }
.legend {
  display: flex;
  flex-wrap: wrap;
  gap: 4px 18px;
  list-style: none;
  padding: 0;
  margin: 0 0 12px;
  font-size: 13px;
}
.key {
  display: inline-block;
  width: 12px;
  height: 12px;
  border-radius: 3px;
  margin-right: 6px;
  vertical-align: -1px;
}
.key.c0 { background: var(--c0); }
.key.c1 { background: var(--c1); }
.key.c2 { background: var(--c2); }
.key.c3 { background: var(--c3); }
.key.c4 { background: var(--c4); }
.key.c5 { background: var(--c5); }
.key.c6 { background: var(--c6); }
.key.c7 { background: var(--c7); }
.masks { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 16px; }
path.k { fill: var(--c0); }
path.s { fill: var(--both); }
path.p { fill: var(--rule); }
path.g { fill: var(--c2); }
path.l { fill: var(--c6); }
.key.k { background: var(--c0); }
.key.s { background: var(--both); }
.key.p { background: var(--rule); }
.key.g { background: var(--c2); }
.key.l { background: var(--c6); }
.views { display: grid; grid-template-columns: repeat(auto-fit, minmax(96px, 1fr)); gap: 8px; }
.views figure { padding: 0; border: 0; }
.views figcaption { font-weight: 400; font-size: 12px; color: var(--soft); min-height: 36px; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 16px; }
.sentence { margin: 0 0 6px; overflow-wrap: anywhere; }
.sentence .label { display: block; color: var(--soft); font-size: 12px; }
mark { background: none; color: inherit; border-bottom: 2px solid var(--c6); }
.facts { display: flex; flex-wrap: wrap; gap: 32px; }
.facts td { white-space: normal; overflow-wrap: anywhere; max-width: 60ch; }
.photo rect { fill: none; stroke: currentColor; }
.photo text { fill: #fff; stroke: #000; paint-order: stroke; }
.photo .c0 { color: var(--c0); }
.photo .c1 { color: var(--c1); }
.photo .c2 { color: var(--c2); }
.photo .c3 { color: var(--c3); }
.photo .c4 { color: var(--c4); }
.photo .c5 { color: var(--c5); }
.photo .c6 { color: var(--c6); }
.photo .c7 { color: var(--c7); }
"""
