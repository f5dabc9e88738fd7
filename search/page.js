// The candidates' plot: pick the axes, point at a dot or go through them with the arrow keys. Text is set as text only.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const plot = document.getElementById("plot");
  const svg = plot.querySelector("svg");
  const detail = document.getElementById("detail");
  const pick = { x: document.getElementById("axis-x"), y: document.getElementById("axis-y") };
  const room = { left: 56, right: 14, top: 22, bottom: 40 };
  let points = [];
  let edge = [];
  let chosen = null;
  let ring = null;

  const short = (value) => {
    for (const [unit, scale] of [["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
      if (Math.abs(value) >= scale) return `${+(value / scale).toPrecision(4)}${unit}`;
    }
    return `${+value.toPrecision(4)}`;
  };

  const draw = (name, attributes, parent = svg, text = "") => {
    const node = document.createElementNS(svg.namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.textContent = text;
    parent.append(node);
    return node;
  };

  const add = (name, text, parent = detail) => {
    const node = document.createElement(name);
    node.textContent = text;
    parent.append(node);
    return node;
  };

  const range = (values) => {
    const low = Math.min(...values), high = Math.max(...values);
    const margin = 0.04 * (high - low) || 0.1 * Math.abs(high) || 1;
    return [low >= 0 && low < 4 * margin ? 0 : low - margin, high + margin];
  };

  const ticks = ([low, high], count) => {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find((s) => s * power >= rough) * power;
    const out = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) out.push(k * step);
    return out;
  };

  const usable = (item) => item[pick.x.value] !== null && item[pick.y.value] !== null
    && item[pick.x.value] !== undefined && item[pick.y.value] !== undefined;

  function redraw() {
    const width = Math.max(plot.clientWidth, 260);
    const height = Math.min(Math.max(0.6 * width, 280), 440);
    const [xName, yName] = [pick.x.value, pick.y.value];
    // A loss that is missing means that nothing was scored: over the budget.
    const candidates = data.candidates.filter((item) => item.within && item.loss !== null && usable(item));
    const models = data.models.filter(usable);
    const everyone = [...candidates, ...models];
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.style.maxWidth = "none";
    ring = null;
    points = [];
    edge = [];
    if (!everyone.length) {
      draw("text", { class: "name", x: 12, y: 24 }, svg, "nothing is known on these axes");
      return;
    }
    const [xs, ys] = [range(everyone.map((p) => p[xName])), range(everyone.map((p) => p[yName]))];
    const across = (x) => room.left + ((x - xs[0]) / (xs[1] - xs[0])) * (width - room.left - room.right);
    const up = (y) => height - room.bottom - ((y - ys[0]) / (ys[1] - ys[0])) * (height - room.top - room.bottom);
    const [right, base] = [width - room.right, height - room.bottom];
    for (const tick of ticks(ys, 5)) {
      draw("path", { class: "grid", d: `M${room.left} ${up(tick)}H${right}` });
      draw("text", { class: "tick end", x: room.left - 6, y: up(tick) + 4 }, svg, short(tick));
    }
    for (const tick of ticks(xs, width > 500 ? 7 : 4)) {
      draw("path", { class: "grid", d: `M${across(tick)} ${base}V${room.top}` });
      draw("text", { class: "tick middle", x: across(tick), y: base + 16 }, svg, short(tick));
    }
    draw("text", { class: "name middle", x: (room.left + right) / 2, y: height - 6 }, svg, data.axes[xName]);
    const turned = `translate(13 ${(room.top + base) / 2}) rotate(-90)`;
    draw("text", { class: "name middle", transform: turned }, svg, data.axes[yName]);

    points = candidates.map((item) => ({ item, x: across(item[xName]), y: up(item[yName]) }));
    points.sort((a, b) => a.item[xName] - b.item[xName] || a.item[yName] - b.item[yName]);
    for (const point of points) {
      if (!edge.length || point.item[yName] < edge[edge.length - 1].item[yName]) edge.push(point);
    }
    if (edge.length) {
      const line = edge.slice(1).map((p) => `H${p.x}V${p.y}`).join("");
      draw("path", { class: "front", d: `M${edge[0].x} ${edge[0].y}${line}` });
    }
    const best = new Set(edge);
    for (const p of points) draw("circle", { class: best.has(p) ? "dot best" : "dot", cx: p.x, cy: p.y, r: 3.5 });
    const names = [];
    for (const item of models) {
      const [x, y] = [across(item[xName]), up(item[yName])];
      draw("path", { class: item.selected ? "selected" : "model", d: `M${x} ${y - 7}l7 7l-7 7l-7 -7z` });
      const half = 3.3 * item.name.length;
      const at = Math.min(x, width - half - 2);
      const covered = (line) => names.some((n) => Math.abs(n.at - at) < n.half + half && Math.abs(n.line - line) < 12);
      let line = y - 10;
      while (covered(line) && line - 12 >= room.top) line -= 12;
      if (covered(line) || line < room.top) for (line = y + 19; covered(line);) line += 12;
      names.push({ at, line, half });
      draw("text", { class: "name middle", x: at, y: line }, svg, item.name);
      points.push({ item, x, y });
    }
    points.sort((a, b) => a.x - b.x || b.y - a.y);
    svg.setAttribute("aria-label", `${candidates.length} candidates and ${models.length} finished models by `
      + `${data.axes[xName]} and ${data.axes[yName]}`);
    const again = chosen && points.find((p) => p.item === chosen.item);
    chosen = null;
    if (again) choose(again);
    else detail.replaceChildren();
  }

  function choose(point) {
    if (chosen === point) return;
    chosen = point;
    ring = ring || draw("circle", { class: "ring", r: 9 });
    ring.setAttribute("cx", point.x);
    ring.setAttribute("cy", point.y);
    const { item } = point;
    const dense = data.models.find((m) => m.name === "dense");
    detail.replaceChildren();
    add("h3", item.name || `Candidate ${item.candidate} of generation ${item.generation}`);
    const told = Object.entries(data.axes)
      .filter(([key]) => key !== "generation" && item[key] !== null && item[key] !== undefined)
      .map(([key, name]) => {
        const whole = ["params", "macs", "activation_bytes"].includes(key) && dense[key];
        return `${name} ${short(item[key])}` + (whole ? ` (${Math.round((100 * item[key]) / whole)} % of dense)` : "");
      });
    add("p", told.join("; "));
    if (item.name) {
      add("p", item.description);
      return;
    }
    const gone = new Set(item.dropped);
    const narrow = data.groups
      .map((group, k) => ({ ...group, kept: item.kept[k] }))
      .filter((group) => group.kept && group.kept < group.size && !group.blocks.some((block) => gone.has(block)));
    if (item.up_to) add("p", `up to ${item.up_to}`);
    if (narrow.length) add("p", `units kept: ${narrow.map((g) => `${g.name} ${g.kept} of ${g.size}`).join(", ")}`);
    if (gone.size) {
      const line = add("p", "blocks dropped: ");
      item.dropped.forEach((block, k) => {
        if (k) line.append(", ");
        add("del", data.blocks[block], line);
      });
    }
    if (!narrow.length && !gone.size && !item.up_to) add("p", "everything kept");
  }

  function nearest(event) {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    let found = null, least = 24;
    for (const point of points) {
      const distance = Math.hypot(point.x - x, point.y - y);
      if (distance < least) [found, least] = [point, distance];
    }
    if (found) choose(found);
  }

  function step(event) {
    const along = event.key === "ArrowUp" || event.key === "ArrowDown" ? edge : points;
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!along.length || (by === undefined && event.key !== "Home" && event.key !== "End")) return;
    event.preventDefault();
    const at = chosen ? along.findIndex((p) => p.item === chosen.item) : -1;
    const last = along.length - 1;
    if (event.key === "Home") choose(along[0]);
    else if (event.key === "End") choose(along[last]);
    else if (at < 0) choose(along[by > 0 ? 0 : last]);
    else choose(along[Math.min(Math.max(at + by, 0), last)]);
  }

  for (const id of ["controls", "hint"]) document.getElementById(id).hidden = false;
  plot.tabIndex = 0;
  plot.setAttribute("role", "application");
  plot.setAttribute("aria-describedby", "hint");
  plot.addEventListener("pointermove", nearest);
  plot.addEventListener("pointerdown", nearest);
  plot.addEventListener("keydown", step);
  for (const select of Object.values(pick)) select.addEventListener("change", redraw);
  let drawn = plot.clientWidth;
  new ResizeObserver(() => {
    if (plot.clientWidth === drawn) return;
    drawn = plot.clientWidth;
    requestAnimationFrame(redraw);
  }).observe(plot);
  redraw();
})();
