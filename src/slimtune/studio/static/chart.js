// Charts by uPlot: <figure data-chart='{"series": [{"label", "x", "y"}], "x": label, "y": label}'>.
// A live one gets points from the event "points" of its page: [{"series": 0, "x": 12, "y": 0.5}, ...].
"use strict";

const charts = new Map();
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// uPlot wants one x for all: the union of them, with null where a series has no point.
function aligned(series) {
  const xs = [...new Set(series.flatMap((each) => each.x))].sort((a, b) => a - b);
  const columns = series.map((each) => {
    const at = new Map(each.x.map((x, index) => [x, each.y[index]]));
    return xs.map((x) => at.get(x) ?? null);
  });
  return [xs, ...columns];
}

function draw(figure, spec) {
  charts.get(figure)?.plot.destroy();
  const axis = (label) => ({
    label, stroke: css("--muted"), grid: { stroke: css("--line"), width: 1 }, ticks: { show: false },
    font: "12px system-ui", labelFont: "12px system-ui", labelSize: 20,
  });
  const plot = new uPlot({
    width: figure.clientWidth || 600,
    height: 280,
    scales: { x: { time: false } },
    axes: [axis(spec.x), axis(spec.y)],
    cursor: { points: { size: 6 } },
    legend: { show: spec.series.length > 0 },
    series: [{ label: spec.x }, ...spec.series.map((each, index) => ({
      label: each.label,
      stroke: css(`--series-${(index % 6) + 1}`),
      width: 2,
      dash: index >= 6 ? [6, 4] : undefined,
      spanGaps: true,
      // A single point has no line; and those of an evaluation are few.
      points: { show: () => each.x.length < 2 || each.points === true },
    }))],
  }, aligned(spec.series), figure);
  charts.set(figure, { plot, spec });
}

function drawAll() {
  for (const figure of charts.keys()) if (!figure.isConnected) charts.delete(figure);
  for (const figure of document.querySelectorAll("[data-chart]")) {
    if (charts.get(figure)?.source === figure.dataset.chart) continue;
    draw(figure, JSON.parse(figure.dataset.chart));
    charts.get(figure).source = figure.dataset.chart;
  }
}

document.addEventListener("points", (event) => {
  const figure = document.querySelector("[data-chart][data-live]");
  const chart = charts.get(figure);
  if (!chart) return;
  for (const point of JSON.parse(event.detail.data)) {
    const series = chart.spec.series[point.series];
    series.x.push(point.x);
    series.y.push(point.y);
  }
  chart.plot.setData(aligned(chart.spec.series));
});

drawAll();
document.addEventListener("htmx:after:swap", drawAll);
new ResizeObserver(() => {
  for (const [figure, { plot }] of charts) {
    if (figure.isConnected && figure.clientWidth) plot.setSize({ width: figure.clientWidth, height: plot.height });
  }
}).observe(document.body);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const [figure, { spec }] of charts) draw(figure, spec);
});
