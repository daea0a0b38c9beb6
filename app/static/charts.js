/* The tooltip of the figures that gapo_lite/plots.py draws, and saving them as PNG.

   Figures are replaced or rewritten in place at any time, so nothing here holds on to one: events
   are caught at the document, and the tooltip and its crosshair stand in <body>. While the tooltip
   shows, a redraw under a resting pointer renews it. No dependencies; one global,
   gapoCharts = { savePng(figure), saveAll(container) }, both promises of the file's name. */

(() => {
  "use strict";

  // --- numbers: the same rules as number() and rounded() in gapo_lite/axes.py --------------------

  const grouped = (value, decimals) =>
    value.toLocaleString("en", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });

  // Python rounds a tie to the even digit, JavaScript away from zero.
  function rounded(value) {
    const size = Math.abs(value);
    const digits = size >= 1e4 && size < 1e6 ? String(Math.trunc(size)).length : 4;
    const [mantissa, exponent] = size.toExponential(100).split("e");
    const kept = mantissa.slice(0, digits + 1);
    const isTie = /^50*$/.test(mantissa.slice(digits + 1));
    const down = isTie && Number(kept.at(-1)) % 2 === 0;
    return Math.sign(value) * Number(down ? `${kept}e${exponent}` : size.toPrecision(digits));
  }

  function number(value) {
    if (value === null || !Number.isFinite(value)) return "not a number";
    value = rounded(value);
    const size = Math.abs(value);
    let words;
    if (size < 1e6 && Number.isInteger(value)) words = grouped(value, 0);
    else if (size >= 1e-3 && size < 1e6) {
      words = grouped(value, Math.max(0, 3 - Math.floor(Math.log10(size))));
    } else {
      const [mantissa, exponent] = value.toExponential(3).split("e");
      words = Number(mantissa) + "e" + Number(exponent);
    }
    return words.replace(/^-/, "\u2212");
  }

  const withUnit = (value, unit) => number(value) + (unit && value !== null ? " " + unit : "");

  // --- what lies under the pointer: { at: x of the crosshair, head, rows } ----------------------

  const parsed = new WeakMap(); // figure → { text, data }, as long as the text stays the same

  function dataOf(figure) {
    const text = figure.dataset.points;
    let known = parsed.get(figure);
    if (!known || known.text !== text) parsed.set(figure, (known = { text, data: JSON.parse(text) }));
    return known.data;
  }

  function nearest(xs, target) {
    let best = 0;
    for (let i = 1; i < xs.length; i++) {
      if (Math.abs(xs[i] - target) < Math.abs(xs[best] - target)) best = i;
    }
    return best;
  }

  function between(one, x) { // a target has few points: its value anywhere is on the line they make
    const next = one.x.findIndex((at) => at >= x);
    if (next <= 0) return one.y[next === 0 ? 0 : one.y.length - 1];
    const share = (x - one.x[next - 1]) / (one.x[next] - one.x[next - 1]);
    return one.y[next - 1] + share * (one.y[next] - one.y[next - 1]);
  }

  function lineAt(data, target) {
    const all = data.series.filter((one) => one.x.length);
    const measured = all.filter((one) => one.style !== "dashed");
    const snaps = (measured.length ? measured : all).map((one) => one.x[nearest(one.x, target)]);
    const at = snaps[nearest(snaps, target)];
    const near = 0.015 * (data.xs[1] - data.xs[0]);
    const rows = all.map((one) => {
      const row = { tone: one.tone, style: one.style, name: one.name, more: "" };
      if (one.style === "dashed") return { ...row, value: withUnit(between(one, at), data.unit) };
      const i = nearest(one.x, at);
      if (one.raw) row.more = "unsmoothed " + number(one.raw[i]);
      if (Math.abs(one.x[i] - at) > near) row.more = `at ${number(one.x[i])}`;
      return { ...row, value: withUnit(one.y[i], data.unit) };
    });
    return { at, head: `${data.label} ${number(at)}`, rows };
  }

  function binAt(data, target) {
    const { edges, counts } = data;
    if (target < edges[0] || target > edges[edges.length - 1]) return null;
    const i = Math.min(counts.length - 1, Math.max(0, edges.findIndex((edge) => edge > target) - 1));
    const whole = edges.every((edge) => Math.abs(edge % 1) === 0.5);
    const [low, high] = whole ? [edges[i] + 0.5, edges[i + 1] - 0.5] : [edges[i], edges[i + 1]];
    const span = low === high ? number(low) : `${number(low)} to ${number(high)}`;
    const more = `${((100 * counts[i]) / data.total).toFixed(1)} % of ${number(data.total)}`;
    const row = { tone: data.tone, style: "bar", name: "values", more };
    const head = data.label ? `${data.label}: ${span}` : span;
    return { at: (edges[i] + edges[i + 1]) / 2, head, rows: [{ ...row, value: number(counts[i]) }] };
  }

  function groupAt(data, target) {
    const i = Math.min(data.labels.length - 1, Math.max(0, Math.floor(target)));
    const rows = data.series.map((one) => ({
      tone: one.tone, style: "bar", name: one.name, more: "",
      value: one.y[i] === null ? "–" : withUnit(one.y[i], data.unit),
    }));
    return { at: i + 0.5, head: [data.label, data.labels[i]].filter(Boolean).join(" "), rows };
  }

  const READERS = { line: lineAt, histogram: binAt, bars: groupAt };

  // --- the tooltip ------------------------------------------------------------------------------

  let tip = null;
  let cross = null;
  let pointer = null; // where it was last: { x, y, touch }
  let redrawn = false; // whether a renewal is due

  const redraws = new MutationObserver((records) => {
    if (redrawn || records.every((record) => tip.contains(record.target))) return;
    redrawn = true;
    requestAnimationFrame(() => { redrawn = false; refresh(); });
  });

  function make(name, kind = "div", words = "") {
    const element = document.createElement(kind);
    if (name) element.className = name;
    element.textContent = words;
    return element;
  }

  function rowOf(row) {
    const line = make(`tone-${row.tone}`);
    const value = make("", "b", row.value);
    if (row.more) value.append(" ", make("", "small", row.more));
    line.append(make(row.style, "i"), make("", "span", row.name), value);
    return line;
  }

  function hide() {
    if (!tip || tip.hidden) return;
    tip.hidden = cross.hidden = true;
    redraws.disconnect();
  }

  function show(found, screen, family) {
    if (!tip) {
      tip = make("chart-tip");
      cross = make("chart-cross");
      tip.hidden = true;
      document.body.append(cross, tip);
    }
    tip.replaceChildren(make("", "div", found.head), ...found.rows.map(rowOf));
    if (tip.hidden) {
      const watched = { childList: true, subtree: true, attributes: true };
      redraws.observe(document.body, { ...watched, attributeFilter: ["data-points"] });
    }
    tip.hidden = cross.hidden = false;
    tip.style.fontFamily = family;
    Object.assign(cross.style, {
      transform: `translate(${screen.x}px, ${screen.top}px)`,
      height: `${screen.bottom - screen.top}px`,
    });
    const { width, height } = tip.getBoundingClientRect();
    const right = document.documentElement.clientWidth - 6;
    let x = screen.x + 12;
    if (x + width > right) x = Math.max(6, Math.min(screen.x - 12 - width, right - width));
    const y = pointer.y - height - (pointer.touch ? 28 : 10); // never under the finger
    tip.style.transform = `translate(${Math.round(x)}px, ${Math.round(Math.max(6, y))}px)`;
  }

  function refresh() {
    const under = pointer && document.elementFromPoint(pointer.x, pointer.y);
    const svg = under && under.closest("figure.chart[data-points] > svg");
    if (!svg) return hide();
    const data = dataOf(svg.parentElement);
    const frame = svg.getBoundingClientRect();
    const scale = frame.width / svg.viewBox.baseVal.width;
    const [left, top, right, bottom] = data.box;
    const share = ((pointer.x - frame.left) / scale - left) / (right - left);
    const span = data.xs[1] - data.xs[0];
    const found = READERS[data.kind](data, data.xs[0] + Math.min(1, Math.max(0, share)) * span);
    if (!found) return hide();
    const across = left + ((found.at - data.xs[0]) / span) * (right - left);
    const screen = {
      x: frame.left + scale * across,
      top: frame.top + scale * top,
      bottom: frame.top + scale * bottom,
    };
    show(found, screen, getComputedStyle(svg).fontFamily);
  }

  function moved(event) {
    pointer = { x: event.clientX, y: event.clientY, touch: event.pointerType === "touch" };
    refresh();
  }

  function left(event) {
    if (event.type === "pointerleave" && event.pointerType === "touch") return; // a tap has ended
    pointer = null;
    hide();
  }

  document.addEventListener("pointermove", moved, { passive: true });
  document.addEventListener("pointerdown", moved, { passive: true });
  document.addEventListener("pointercancel", left);
  document.addEventListener("pointerleave", left);
  document.addEventListener("scroll", () => tip && !tip.hidden && refresh(), {
    capture: true, passive: true,
  });

  // --- PNG --------------------------------------------------------------------------------------

  const SCALE = 2;
  const INLINED = [
    "fill", "fill-opacity", "stroke", "stroke-opacity", "stroke-width", "stroke-dasharray",
    "stroke-linecap", "stroke-linejoin", "vector-effect", "paint-order", "font-size", "font-family", "font-weight",
  ];

  function backgroundOf(element) {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (colour && !/^rgba\(.*, 0\)$|^transparent$/.test(colour)) return colour;
    }
    return "#fff";
  }

  // The SVG as a picture of its own: computed colours and fonts are written into it, since no
  // stylesheet reaches an image. Strokes don't scale with the viewBox, so they are widened here.
  async function drawing(svg, width, height) {
    const copy = svg.cloneNode(true);
    const from = svg.querySelectorAll("*");
    copy.querySelectorAll("*").forEach((element, i) => {
      const style = getComputedStyle(from[i]);
      for (const name of INLINED) element.setAttribute(name, style.getPropertyValue(name));
      if (style.vectorEffect !== "non-scaling-stroke") return;
      element.setAttribute("stroke-width", SCALE * parseFloat(style.strokeWidth));
      const dashes = style.strokeDasharray;
      if (dashes !== "none") {
        element.setAttribute("stroke-dasharray", dashes.split(",").map((d) => SCALE * parseFloat(d)));
      }
    });
    copy.setAttribute("width", SCALE * width);
    copy.setAttribute("height", SCALE * height);
    const image = new Image();
    image.src = "data:image/svg+xml," + encodeURIComponent(new XMLSerializer().serializeToString(copy));
    await image.decode();
    return image;
  }

  // Legend entries as [{ colour, shape, parts: [[words, colour]] }].
  function legendOf(figure) {
    return [...figure.querySelectorAll(".chart-key, .chart-note")].map((key) => {
      const swatch = key.querySelector("i");
      const words = swatch ? [...key.querySelectorAll(".chart-name, b")] : [key];
      return {
        shape: swatch ? swatch.className : "",
        colour: swatch && getComputedStyle(swatch).getPropertyValue("--tone"),
        parts: words.map((one) => [one.textContent, getComputedStyle(one).color]),
      };
    });
  }

  function drawSwatch(pen, { shape, colour }, x, y) {
    pen.fillStyle = pen.strokeStyle = colour;
    pen.lineWidth = 2;
    pen.setLineDash(shape === "dashed" ? [4, 2] : []);
    pen.beginPath();
    if (shape === "dots") pen.arc(x + 7, y, 3.5, 0, 7);
    else if (shape === "bar") pen.rect(x + 2, y - 4.5, 9, 9);
    else pen.moveTo(x, y), pen.lineTo(x + 14, y);
    if (shape === "dots" || shape === "bar") pen.fill();
    else pen.stroke();
  }

  function fitted(pen, words, room) {
    if (pen.measureText(words).width <= room) return words;
    let kept = [...words];
    while (kept.length > 1 && pen.measureText(kept.join("") + "…").width > room) kept.pop();
    return kept.join("") + "…";
  }

  // Lays the legend out in rows no wider than `width` and returns its height; draws where asked to.
  function drawLegend(pen, legend, x0, y0, width, draws) {
    let [x, y] = [x0, y0];
    for (const entry of legend) {
      const swatch = entry.shape ? 19 : 0;
      const room = entry.shape ? 0.5 * width : width;
      const parts = entry.parts.map(([words, colour]) => [fitted(pen, words, room), colour]);
      const length = parts.reduce((sum, [words]) => sum + pen.measureText(words).width + 5, swatch);
      if (x > x0 && x + length > x0 + width) [x, y] = [x0, y + 17];
      if (draws && swatch) drawSwatch(pen, entry, x, y - 4);
      x += swatch;
      for (const [words, colour] of parts) {
        pen.fillStyle = colour;
        if (draws) pen.fillText(words, x, y);
        x += pen.measureText(words).width + 5;
      }
      x += 7;
    }
    return legend.length ? y - y0 + 17 : 0;
  }

  async function picture(figure) {
    const svg = figure.querySelector("svg");
    const { width: units, height: tall } = svg.viewBox.baseVal;
    const width = svg.getBoundingClientRect().width || units;
    const height = (width * tall) / units;
    const family = getComputedStyle(figure).fontFamily;
    const title = figure.querySelector(".chart-title");
    const unit = figure.querySelector(".chart-unit");
    const legend = legendOf(figure);
    const pad = 14;
    const canvas = make("", "canvas");
    const pen = canvas.getContext("2d");
    pen.font = `12px ${family}`;
    const top = pad + 20 + drawLegend(pen, legend, pad, 0, width, false);
    canvas.width = SCALE * (width + 2 * pad);
    canvas.height = SCALE * (top + height + pad);
    pen.fillStyle = backgroundOf(figure);
    pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.drawImage(await drawing(svg, width, height), SCALE * pad, SCALE * top);
    pen.scale(SCALE, SCALE);
    pen.font = `${getComputedStyle(title).fontWeight} 13px ${family}`;
    pen.fillStyle = getComputedStyle(title).color;
    const words = fitted(pen, title.textContent, unit ? 0.7 * width : width);
    pen.fillText(words, pad, pad + 11);
    const after = pad + pen.measureText(words).width + 6;
    pen.font = `12px ${family}`;
    if (unit) {
      pen.fillStyle = getComputedStyle(unit).color;
      pen.fillText(unit.textContent, after, pad + 11);
    }
    drawLegend(pen, legend, pad, pad + 31, width, true);
    return canvas;
  }

  async function download(canvas, words) {
    const slug = words.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "");
    const name = `${slug.slice(0, 80) || "chart"}.png`;
    const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
    const link = make("", "a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    return name;
  }

  async function savePng(figure) {
    return download(await picture(figure), figure.querySelector(".chart-title").textContent);
  }

  // All figures of a container on one sheet, in as many columns as the page has.
  async function saveAll(container) {
    const figures = [...container.querySelectorAll("figure.chart")];
    if (!figures.length) throw new Error("there is no figure to save");
    const pictures = await Promise.all(figures.map(picture));
    const columns = new Set(figures.map((figure) => figure.getBoundingClientRect().left)).size;
    const gap = 14 * SCALE;
    const width = Math.max(...pictures.map((one) => one.width));
    const sheet = make("", "canvas");
    const rows = [];
    for (let i = 0; i < pictures.length; i += columns) rows.push(pictures.slice(i, i + columns));
    const heights = rows.map((row) => Math.max(...row.map((one) => one.height)));
    sheet.width = gap + columns * (width + gap);
    sheet.height = heights.reduce((sum, height) => sum + height + gap, gap);
    const pen = sheet.getContext("2d");
    pen.fillStyle = backgroundOf(container);
    pen.fillRect(0, 0, sheet.width, sheet.height);
    let y = gap;
    rows.forEach((row, i) => {
      row.forEach((one, j) => pen.drawImage(one, gap + j * (width + gap), y));
      y += heights[i] + gap;
    });
    return download(sheet, "charts");
  }

  document.addEventListener("click", (event) => {
    const button = event.target instanceof Element && event.target.closest(".chart-png");
    if (!button) return;
    savePng(button.closest("figure")).catch((error) => {
      button.textContent = "not saved";
      button.title = String(error);
    });
  });

  window.gapoCharts = { savePng, saveAll };
})();
