// Charts: uPlot draws axes and points; here is what the points look like, and what is shaded behind them.

// Each look has a shape of its own: colour alone tells nothing to those who do not see it.
const SHAPES = {
  guest: { size: 4, hollow: true, trace: (p, x, y, r) => circle(p, x, y, r) },
  host: { size: 1.8, trace: (p, x, y, r) => circle(p, x, y, r) },
  good: { size: 1.8, trace: (p, x, y, r) => circle(p, x, y, r) },
  early: { size: 3.6, trace: (p, x, y, r) => polygon(p, [[x - r, y - r * 0.8], [x + r, y - r * 0.8], [x, y + r]]) },
  storm: { size: 4.4, hollow: true, trace: (p, x, y, r) => polygon(p, [[x - r, y - r * 0.8], [x + r, y - r * 0.8], [x, y + r]]) },
  late: { size: 3.6, trace: (p, x, y, r) => polygon(p, [[x - r, y + r * 0.8], [x + r, y + r * 0.8], [x, y - r]]) },
  clock: { size: 3, trace: (p, x, y, r) => polygon(p, [[x - r, y - r], [x + r, y - r], [x + r, y + r], [x - r, y + r]]) },
  fatal: { size: 4, trace: (p, x, y, r) => polygon(p, [[x, y - r], [x + r * 0.7, y], [x, y + r], [x - r * 0.7, y]]) },
};

function circle(path, x, y, r) {
  path.moveTo(x + r, y);
  path.arc(x, y, r, 0, 2 * Math.PI);
}

function polygon(path, corners) {
  corners.forEach(([x, y], index) => (index ? path.lineTo(x, y) : path.moveTo(x, y)));
  path.closePath();
}

// The y axis is linear up to a microsecond and logarithmic beyond it.
const LINEAR_NS = 1e3;

// One point a row: the series have x values of their own, and several points may share one.
function rows(series) {
  const all = series.flatMap(({ points }, index) => points.map(([x, y]) => [x, y, index]));
  all.sort((a, b) => a[0] - b[0]);
  const columns = series.map((_, index) => all.map(([, y, of]) => (of === index ? y : null)));
  return [all.map(([x]) => x), ...columns];
}

// Lowest and highest lateness of charts that are to be compared, with some room.
function extent(charts) {
  let [low, high] = [0, 2e4];
  for (const { series } of charts) {
    for (const { points } of series) {
      for (const [, y] of points) {
        if (y < low) low = y;
        if (y > high) high = y;
      }
    }
  }
  return [Math.min(low * 3, -LINEAR_NS), high * 3];
}

// Zero and powers of ten, no more than fit.
function decades(low, high, room) {
  const powers = [];
  for (let power = LINEAR_NS; power < 1e19; power *= 10) powers.push(power);
  // Without the innermost where not all fit: they are nearest to zero and to each other.
  const fits = (step) => {
    const shown = powers.filter((_, index) => step === 1 || index % step === 1);
    const up = shown.filter((power) => power <= high);
    const down = shown.filter((power) => -power >= low).map((power) => -power);
    return [...down.reverse(), 0, ...up];
  };
  for (let step = 1; ; step += 1) {
    const splits = fits(step);
    if (splits.length <= Math.max(3, room) || step > 8) return splits;
  }
}

function points(look) {
  const { size, trace } = SHAPES[look];
  return (u, index, from, to) => {
    const [path, clip] = [new Path2D(), new Path2D()];
    const { left, top, width, height } = u.bbox;
    clip.rect(left - 8, top - 8, width + 16, height + 16);
    let drawn = 0;
    for (let i = from; i <= to; i += 1) {
      const y = u.data[index][i];
      if (y === null) continue;
      trace(path, u.valToPos(u.data[0][i], "x", true), u.valToPos(y, "y", true), size * devicePixelRatio);
      drawn += 1;
    }
    u.drawn[index] = drawn;
    return { stroke: path, fill: path, clip, flags: 3 };
  };
}

// What is late and what is early, in a tint and a word.
function shade(u, late) {
  const { ctx, bbox } = u;
  const at = (y) => Math.min(Math.max(u.valToPos(y, "y", true), bbox.top), bbox.top + bbox.height);
  const zones = [["early", at(0), bbox.top + bbox.height], ...(late === null ? [] : [["late", bbox.top, at(late)]])];
  ctx.save();
  ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
  ctx.textBaseline = "bottom";
  for (const [name, top, bottom] of zones) {
    ctx.globalAlpha = 0.45;
    ctx.fillStyle = colour(`${name}-wash`);
    ctx.fillRect(bbox.left, top, bbox.width, bottom - top);
    if (bottom - top < 16 * devicePixelRatio) continue;
    ctx.globalAlpha = 1;
    ctx.fillStyle = colour(name);
    // Where points seldom are: on the threshold, and before anything has gone wrong.
    ctx.textAlign = name === "late" ? "right" : "left";
    const x = name === "late" ? bbox.left + bbox.width - 5 * devicePixelRatio : bbox.left + 5 * devicePixelRatio;
    ctx.fillText(name, x, bottom - 2 * devicePixelRatio);
  }
  ctx.restore();
}

// Charts at least this wide have room for the marks' names, above them.
const WIDE = 640;

function lines(u, marks) {
  const { ctx, bbox } = u;
  ctx.save();
  ctx.strokeStyle = ctx.fillStyle = colour("soft");
  ctx.lineWidth = devicePixelRatio;
  ctx.setLineDash([4 * devicePixelRatio, 3 * devicePixelRatio]);
  ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
  ctx.textAlign = "center";
  ctx.textBaseline = "bottom";
  let free = 0;
  for (const { x, name } of marks) {
    const at = Math.round(u.valToPos(x, "x", true));
    if (at < bbox.left || at > bbox.left + bbox.width) continue;
    ctx.beginPath();
    ctx.moveTo(at, bbox.top);
    ctx.lineTo(at, bbox.top + bbox.height);
    ctx.stroke();
    const half = ctx.measureText(name).width / 2;
    if (u.width < WIDE || at - half < free) continue;
    ctx.fillText(name, at, bbox.top - 2 * devicePixelRatio);
    free = at + half + 8 * devicePixelRatio;
  }
  ctx.restore();
}

function options(chart, plot, reading, [low, high]) {
  const time = chart.x === "vm-time";
  const axis = { stroke: () => colour("soft"), font: "11px system-ui, sans-serif", grid: { stroke: () => colour("line"), width: 1 }, ticks: { show: false } };
  const series = chart.series.map(({ name, look }) => ({
    label: name,
    paths: () => null,
    points: {
      show: true,
      size: 2 * SHAPES[look].size,
      width: SHAPES[look].hollow ? 1.4 : 0,
      stroke: () => colour(look),
      fill: () => (SHAPES[look].hollow ? "transparent" : colour(look)),
      paths: points(look),
    },
  }));
  const milliseconds = (u, splits, _axis, _space, step) => {
    const digits = Math.max(0, Math.min(6, Math.ceil(6 - Math.log10(step))));
    return splits.map((ns) => (ns / 1e6).toFixed(digits));
  };
  return {
    width: plot.clientWidth,
    height: plot.clientHeight,
    padding: [plot.clientWidth < WIDE ? 8 : 18, 8, 0, 0],
    legend: { show: false },
    cursor: { points: { show: false }, drag: { x: true, y: false } },
    scales: {
      x: { time: false, range: (_u, min, max) => { const pad = (max - min) * 0.02 || 1; return [min - pad, max + pad]; } },
      y: { distr: 4, asinh: LINEAR_NS, range: () => [low, high] },
    },
    axes: [
      { ...axis, size: 26, gap: 3, label: time ? "VM time, ms" : "point", labelSize: 16, labelFont: axis.font, labelGap: 0, space: 70, ...(time ? { values: milliseconds } : { incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 1e5, 1e6] }) },
      { ...axis, size: 62, splits: (u) => decades(low, high, u.height / 26), filter: (_u, splits) => splits, values: (_u, splits) => splits.map((ns) => (ns ? span(ns) : "0")) },
    ],
    series: [{}, ...series],
    hooks: {
      drawClear: [(u) => shade(u, chart.late_ns)],
      draw: [(u) => lines(u, chart.marks)],
      setCursor: [(u) => {
        const at = u.cursor.idx;
        const of = at == null ? -1 : u.data.findIndex((column, index) => index && column[at] !== null);
        reading.textContent = of < 1 ? "" : `${time ? `${(u.data[0][at] / 1e6).toFixed(6)} ms` : `point ${u.data[0][at]}`}: ${u.series[of].label}, ${span(u.data[of][at])}`;
      }],
    },
  };
}

// Whether there is a pixel of a colour.
function inked({ data }, [red, green, blue]) {
  for (let i = 0; i < data.length; i += 4) {
    if (Math.abs(data[i] - red) + Math.abs(data[i + 1] - green) + Math.abs(data[i + 2] - blue) < 12 && data[i + 3] > 200) return true;
  }
  return false;
}

function rgb(name) {
  const context = make("canvas").getContext("2d");
  context.fillStyle = colour(name);
  context.fillRect(0, 0, 1, 1);
  return context.getImageData(0, 0, 1, 1).data;
}

// Draws the charts of one group, with one y axis.
function drawCharts(group, redraws) {
  const figures = [...group.querySelectorAll("figure.chart")];
  const charts = figures.map((figure) => JSON.parse(figure.querySelector("script").textContent));
  const range = extent(charts);
  figures.forEach((figure, index) => {
    const chart = charts[index];
    const [plot, reading] = [figure.querySelector(".plot"), figure.querySelector(".reading")];
    if (!chart.series.length) {
      plot.textContent = "no points";
      figure.dataset.drawn = 0;
      return;
    }
    // It draws in a microtask, after this.
    const u = new uPlot(options(chart, plot, reading, range), rows(chart.series), plot);
    u.drawn = [];
    redraws.push(() => u.redraw());
    new ResizeObserver(() => {
      if (plot.clientWidth && plot.clientWidth !== u.width) u.setSize({ width: plot.clientWidth, height: plot.clientHeight });
    }).observe(plot);
    setTimeout(() => {
      figure.dataset.drawn = u.drawn.reduce((sum, drawn) => sum + (drawn || 0), 0);
      if (location.hash !== "#check") return;
      const image = u.ctx.getImageData(0, 0, u.ctx.canvas.width, u.ctx.canvas.height);
      figure.dataset.series = chart.series.length;
      figure.dataset.inked = chart.series.filter(({ look }) => inked(image, rgb(look))).length;
    });
  });
}

// The signs of a legend.
function drawKeys(redraws) {
  const keys = [...document.querySelectorAll("canvas.key")];
  const draw = () => keys.forEach((key) => {
    key.width = key.height = 14 * devicePixelRatio;
    const context = key.getContext("2d");
    const { size, hollow, trace } = SHAPES[key.dataset.look];
    const path = new Path2D();
    trace(path, key.width / 2, key.height / 2, size * devicePixelRatio);
    context.strokeStyle = context.fillStyle = colour(key.dataset.look);
    context.lineWidth = 1.4 * devicePixelRatio;
    if (hollow) context.stroke(path); else context.fill(path);
  });
  draw();
  redraws.push(draw);
}
