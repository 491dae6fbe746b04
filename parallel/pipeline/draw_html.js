"use strict";
// Rows of bars on a canvas. Bars: [row, name, start, end, waits]; waits: [bar, reason]. See draw_html.py.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const LABELS = 74, THICK = 26, THIN = 9, CURVE = 34, GAP = 9;
const NAME = /^(\d+)([A-Z_]+?)(\d+)?$/;

const bars = data.bars.map(([row, name, start, end, waits], index) => {
  const found = NAME.exec(name) || [];
  const number = (text) => (text === undefined ? null : Number(text));
  return { index, row, name, start, end, waits, stage: number(found[1]), op: found[2] || null, batch: number(found[3]) };
});
const ofRow = data.rows.map(() => []);
bars.forEach((bar) => ofRow[bar.row].push(bar));
ofRow.forEach((list) => list.sort((a, b) => a.start - b.start));
const begin = Math.min(0, ...ofRow.filter((list) => list.length).map((list) => list[0].start));
const finish = bars.reduce((latest, bar) => Math.max(latest, bar.end), begin) || 1;
const batches = [...new Set(bars.map((bar) => bar.batch))].filter((batch) => batch !== null).sort((a, b) => a - b);
const ofBatch = new Map(batches.map((batch) => [batch, bars.filter((bar) => bar.batch === batch)]));
const chunkOf = (bar) => data.chunks[bar.stage] || 0;
const stages = Math.max(1, ...Object.keys(data.chunks).map((stage) => Number(stage) + 1));
const most = Math.max(data.limit || 0, ...data.memory.map((curve) => Math.max(0, ...curve.map((step) => step[1]))));

let view = { from: begin, to: finish }; // the times at both ends
let places = []; // {top, height, row} or {top, height, rank} for a curve
let overview = null; // the whole timeline, drawn once
let hovered = null, pinned = null, cursor = null, ink = {};

// ---- looks

function readTheme() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["page", "text", "muted", "idle", "grid", "accent", "curve", "curve-fill", "limit"])
    ink[name] = style.getPropertyValue("--" + name).trim();
}

function colourOf(bar) {
  const by = $("colour").value;
  if (by === "stage" && bar.stage !== null) return `hsl(${(bar.stage * 360) / stages} 48% 52%)`;
  if (by === "microbatch" && bar.batch !== null) {
    const turn = batches.length > 12 ? (bar.batch * 137.5) % 360 : (bar.batch * 360) / batches.length;
    return `hsl(${turn} 50% ${bar.op === "F" ? 62 : bar.op === "W" ? 44 : 53}%)`;
  }
  const fills = data.fills[bar.op] || [data.plain];
  return fills[Math.min(chunkOf(bar), fills.length - 1)];
}

const isLight = (colour) => Number(/([\d.]+)%\)$/.exec(colour)[1]) >= data.dark_text_from;
const figure = (number) => String(Number(number.toPrecision(6)));
const focus = () => (pinned !== null ? pinned : hovered && hovered.bar ? hovered.bar.batch : null);

// ---- layout and scale

function arrange() {
  places = [];
  let top = 6, rank = null;
  data.rows.forEach(([owner, , , thick], row) => {
    if (rank !== null && owner !== rank) top = endRank(rank, top);
    rank = owner;
    if (!thick && !$("lanes").checked) return;
    const height = thick ? THICK : THIN;
    places.push({ top, height, row });
    top += height + 2;
  });
  if (rank !== null) top = endRank(rank, top);
  return top;
}

function endRank(rank, top) {
  if ($("memory").checked && data.memory[rank]) {
    places.push({ top: top + 1, height: CURVE, rank });
    top += CURVE + 3;
  }
  return top + GAP;
}

const width = () => $("rows").clientWidth;
const scale = () => (width() - LABELS - 2) / (view.to - view.from);
const x = (seconds) => LABELS + (seconds - view.from) * scale();
const secondsAt = (pixel) => view.from + (pixel - LABELS) / scale();

function prepared(canvas, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.style.height = height + "px";
  canvas.width = Math.round(canvas.clientWidth * ratio);
  canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.font = '11px ui-sans-serif, system-ui, "Segoe UI", Helvetica, Arial, sans-serif';
  pen.textBaseline = "middle";
  return pen;
}

// The first bar of a row that ends after a moment; bars of a row do not overlap.
function firstAfter(list, seconds) {
  let low = 0, high = list.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (list[middle].end > seconds) high = middle;
    else low = middle + 1;
  }
  return low;
}

// ---- drawing

function draw() {
  const total = arrange();
  const pen = prepared($("rows"), total), right = width();
  const steps = ticks();
  pen.strokeStyle = ink.grid;
  pen.lineWidth = 1;
  for (const place of places) if (place.row !== undefined) drawIdle(pen, place, right);
  pen.beginPath();
  for (const tick of steps) pen.rect(Math.round(x(tick)), 0, 0.01, total);
  pen.globalAlpha = 0.7;
  pen.stroke();
  pen.globalAlpha = 1;
  pen.save();
  pen.beginPath();
  pen.rect(LABELS, 0, right - LABELS, total);
  pen.clip();
  for (const place of places) place.row === undefined ? drawCurve(pen, place, right) : drawRow(pen, place, right);
  drawPaths(pen);
  if (cursor !== null) {
    pen.fillStyle = ink.muted;
    pen.fillRect(x(cursor), 0, 1, total);
  }
  pen.restore();
  drawAxis(steps);
  drawOverview();
}

function drawIdle(pen, place, right) {
  const [rank, lane, more, thick] = data.rows[place.row];
  pen.fillStyle = ink.idle;
  pen.fillRect(LABELS, place.top, right - LABELS, place.height);
  pen.fillStyle = thick ? ink.text : ink.muted;
  pen.textAlign = "right";
  if (!more) pen.fillText(thick ? "rank " + rank : lane.replaceAll("_", " "), LABELS - 8, place.top + place.height / 2 + 1);
}

function drawRow(pen, place, right) {
  const list = ofRow[place.row], thick = data.rows[place.row][3], chosen = focus();
  pen.textAlign = "center";
  const perSecond = scale();
  let drawn = -1; // up to where; of bars much thinner than a pixel, one a pixel will do
  for (let at = firstAfter(list, view.from); at < list.length && list[at].start < view.to; at++) {
    const bar = list[at], left = LABELS + (bar.start - view.from) * perSecond, whole = (bar.end - bar.start) * perSecond;
    if (left + whole < drawn + 0.4 && bar.batch !== chosen) continue;
    drawn = left + whole;
    const colour = colourOf(bar);
    const wide = Math.max(whole - Math.min(1, whole / 4), 0.6);
    pen.globalAlpha = chosen === null || bar.batch === chosen ? 1 : 0.22;
    pen.fillStyle = colour;
    if (wide > 5) {
      pen.beginPath();
      pen.roundRect(left, place.top, wide, place.height, thick ? 3 : 1.5);
      pen.fill();
    } else pen.fillRect(left, place.top, wide, place.height);
    if (thick && wide > 9) drawText(pen, bar, left, wide, place, isLight(colour), right);
    if (hovered && hovered.bar === bar) {
      pen.globalAlpha = 1;
      pen.strokeStyle = ink.text;
      pen.lineWidth = 2;
      pen.strokeRect(left + 0.5, place.top + 0.5, wide - 1, place.height - 1);
    }
  }
  pen.globalAlpha = 1;
}

function drawText(pen, bar, left, wide, place, light, right) {
  const middle = (Math.max(left, LABELS) + Math.min(left + wide, right)) / 2;
  const texts = bar.batch === null ? [bar.name] : [bar.name, String(bar.batch)];
  pen.fillStyle = light ? "#1d2731" : "#ffffff";
  for (const text of texts)
    if (pen.measureText(text).width + 5 <= wide) {
      pen.fillText(text, middle, place.top + place.height / 2 + 1);
      return;
    }
}

function drawCurve(pen, place, right) {
  const curve = data.memory[place.rank], bottom = place.top + place.height;
  const y = (held) => bottom - (held / (most || 1)) * (place.height - 4);
  pen.beginPath();
  pen.moveTo(x(begin), bottom);
  let height = bottom, top = 0;
  for (const [seconds, held] of curve) {
    pen.lineTo(x(seconds), height);
    height = y(held);
    top = Math.max(top, held);
    pen.lineTo(x(seconds), height);
  }
  pen.lineTo(x(finish), height);
  pen.lineTo(x(finish), bottom);
  pen.fillStyle = ink["curve-fill"];
  pen.fill();
  pen.strokeStyle = ink.curve;
  pen.lineWidth = 1;
  pen.stroke();
  if (data.limit) {
    pen.strokeStyle = ink.limit;
    pen.setLineDash([5, 4]);
    pen.beginPath();
    pen.moveTo(LABELS, y(data.limit));
    pen.lineTo(right, y(data.limit));
    pen.stroke();
    pen.setLineDash([]);
  }
  pen.restore(); // the label stands outside of the clip
  pen.textAlign = "right";
  pen.fillStyle = ink.muted;
  pen.fillText("peak " + figure(top), LABELS - 8, bottom - place.height / 2);
  pen.save();
  pen.beginPath();
  pen.rect(LABELS, 0, right - LABELS, bottom + 1e5);
  pen.clip();
}

// The way of the micro-batch in focus through the pipeline, and what the hovered bar waited for.
function drawPaths(pen) {
  const chosen = focus(), placeOf = new Map(places.filter((place) => place.row !== undefined).map((place) => [place.row, place]));
  const line = (from, to, wide, alpha) => {
    const above = placeOf.get(from.row), below = placeOf.get(to.row);
    if (!above || !below || from.row === to.row) return;
    const y = (place) => place.top + place.height / 2;
    const left = x(from.end), right = x(to.start), bend = Math.max(3, Math.abs(right - left) / 2);
    pen.globalAlpha = alpha;
    pen.lineWidth = wide;
    pen.beginPath();
    pen.moveTo(left, y(above));
    pen.bezierCurveTo(left + bend, y(above), right - bend, y(below), right, y(below));
    pen.stroke();
  };
  pen.strokeStyle = ink.accent;
  if (chosen !== null)
    for (const bar of ofBatch.get(chosen)) for (const [other] of bar.waits) line(bars[other], bar, 1.4, 0.65);
  if (hovered && hovered.bar) for (const [other] of hovered.bar.waits) line(bars[other], hovered.bar, 2.6, 1);
  pen.globalAlpha = 1;
}

function ticks() {
  const wanted = Math.max(2, (width() - LABELS) / 90), span = view.to - view.from;
  const power = 10 ** Math.floor(Math.log10(span / wanted));
  const step = power * [1, 2, 5, 10].find((factor) => span / (power * factor) <= wanted);
  const found = [];
  for (let number = Math.ceil(view.from / step); number * step <= view.to; number++) found.push(number * step);
  return found;
}

function drawAxis(steps) {
  const pen = prepared($("axis"), 22);
  pen.fillStyle = ink.muted;
  pen.textAlign = "center";
  for (const tick of steps) pen.fillText(figure(tick), x(tick), 12);
  pen.textAlign = "right";
  pen.fillText("time", LABELS - 22, 12);
  if (cursor === null) return;
  const text = figure(cursor), half = pen.measureText(text).width / 2 + 5;
  pen.fillStyle = ink.text;
  pen.fillRect(x(cursor) - half, 3, 2 * half, 17);
  pen.fillStyle = ink.page;
  pen.textAlign = "center";
  pen.fillText(text, x(cursor), 12);
}

const overviewX = (seconds) => LABELS + ((seconds - begin) / (finish - begin)) * (width() - LABELS - 2);

function drawOverview() {
  const canvas = $("overview"), thick = ofRow.filter((_, row) => data.rows[row][3]);
  const zoomed = view.from > begin || view.to < finish;
  canvas.style.display = zoomed ? "block" : "none";
  if (!zoomed) return;
  const pen = prepared(canvas, 26), tall = 24 / Math.max(1, thick.length);
  if (overview === null || overview.width !== canvas.width) {
    thick.forEach((list, number) => {
      for (const bar of list) {
        pen.fillStyle = colourOf(bar);
        const left = overviewX(bar.start);
        pen.fillRect(left, 1 + number * tall, Math.max(overviewX(bar.end) - left, 0.3), Math.max(tall - 0.4, 0.4));
      }
    });
    overview = document.createElement("canvas");
    Object.assign(overview, { width: canvas.width, height: canvas.height });
    overview.getContext("2d").drawImage(canvas, 0, 0);
  } else pen.drawImage(overview, 0, 0, canvas.clientWidth, 26);
  pen.fillStyle = ink.page;
  pen.globalAlpha = 0.65;
  pen.fillRect(LABELS, 0, overviewX(view.from) - LABELS, 26);
  pen.fillRect(overviewX(view.to), 0, width(), 26);
  pen.globalAlpha = 1;
  pen.strokeStyle = ink.accent;
  pen.strokeRect(overviewX(view.from), 0.5, Math.max(2, overviewX(view.to) - overviewX(view.from)), 25);
}

let asked = false;
function redraw() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    draw();
  });
}

// ---- what is where, and what it says

function find(pixelX, pixelY) {
  const place = places.find(({ top, height }) => pixelY >= top - 1 && pixelY <= top + height + 1);
  if (!place || pixelX < LABELS) return null;
  const seconds = secondsAt(pixelX);
  if (place.row === undefined) return { place, seconds };
  const list = ofRow[place.row], at = firstAfter(list, seconds);
  const bar = list[at];
  if (bar && bar.start <= seconds) return { place, seconds, bar };
  return { place, seconds, before: list[at - 1], after: bar };
}

// The wait that ended last decides when a bar starts; none, if it was the lane.
function decider(bar) {
  const list = ofRow[bar.row], ahead = list[list.indexOf(bar) - 1];
  const last = bar.waits.reduce((best, wait) => (!best || bars[wait[0]].end > bars[best[0]].end ? wait : best), null);
  const tolerance = 1e-9 * Math.abs(bar.start);
  if (ahead && ahead.end >= bar.start - tolerance) return { ahead };
  return { wait: last };
}

function say(parent, kind, text, style) {
  const element = document.createElement(kind);
  element.textContent = text;
  if (style) element.className = style;
  parent.append(element);
  return element;
}

function describe(tip, bar) {
  const rank = data.rows[bar.row][0];
  say(tip, "strong", bar.name);
  if (bar.op) {
    const batch = bar.batch === null ? "" : ` of micro-batch ${bar.batch}`;
    say(tip, "p", `${data.words[bar.op]}${batch}, stage ${bar.stage} on rank ${rank}`);
  } else say(tip, "p", `rank ${rank}, ${data.rows[bar.row][1]}`);
  say(tip, "p", `${figure(bar.start)} to ${figure(bar.end)}, ${figure(bar.end - bar.start)} long`);
  explain(tip, bar);
}

function explain(tip, bar) {
  const { ahead, wait } = decider(bar);
  if (!bar.waits.length && !ahead) return;
  say(tip, "p", "waits for", "muted");
  const list = say(tip, "ul", "");
  for (const each of bar.waits) {
    const other = bars[each[0]];
    const text = `${other.name} on rank ${data.rows[other.row][0]}, until ${figure(other.end)}: ${data.reasons[each[1]]}`;
    say(list, "li", text, each === wait ? "last" : "");
  }
  if (ahead) say(list, "li", `its turn behind ${ahead.name}, until ${figure(ahead.end)}`, "last");
}

function showTip(event) {
  const tip = $("tip");
  tip.replaceChildren();
  if (hovered && hovered.bar) describe(tip, hovered.bar);
  else if (hovered && hovered.place.row === undefined) {
    const steps = data.memory[hovered.place.rank].filter((step) => step[0] <= hovered.seconds);
    say(tip, "strong", `rank ${hovered.place.rank} holds ${figure(steps.length ? steps[steps.length - 1][1] : 0)}`);
    say(tip, "p", `at ${figure(hovered.seconds)}`, "muted");
  } else if (hovered && data.rows[hovered.place.row][3]) {
    const from = hovered.before ? hovered.before.end : begin, to = hovered.after ? hovered.after.start : finish;
    say(tip, "strong", `rank ${data.rows[hovered.place.row][0]} is idle`);
    say(tip, "p", `${figure(from)} to ${figure(to)}, ${figure(to - from)} long`);
    if (hovered.after) {
      say(tip, "p", `until ${hovered.after.name} starts`);
      explain(tip, hovered.after);
    }
  }
  if (!tip.childElementCount) return void (tip.style.visibility = "hidden");
  const box = tip.getBoundingClientRect();
  const left = event.clientX + 16 + box.width > innerWidth ? event.clientX - box.width - 12 : event.clientX + 16;
  const top = event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 18;
  Object.assign(tip.style, { left: Math.max(4, left) + "px", top: Math.max(4, top) + "px", visibility: "visible" });
}

// ---- moving about

function look(from, to) {
  const span = Math.min(Math.max(to - from, (finish - begin) / 1e4), finish - begin);
  const start = Math.min(Math.max(from, begin), finish - span);
  view = { from: start, to: start + span };
  redraw();
}
const move = (seconds) => look(view.from + seconds, view.to + seconds);
function zoom(factor, at = (view.from + view.to) / 2) {
  look(at - (at - view.from) * factor, at + (view.to - at) * factor);
}

function pin(batch) {
  pinned = batch;
  $("pick").value = batch === null ? "" : String(batch);
  redraw();
}

function listen() {
  const rows = $("rows");
  let drag = null;
  rows.addEventListener("pointermove", (event) => {
    if (drag) {
      drag.moved = drag.moved || Math.abs(event.clientX - drag.x) > 3;
      if (drag.moved) move((drag.from - view.from) - (event.clientX - drag.x) / scale());
    }
    hovered = find(event.offsetX, event.offsetY);
    cursor = event.offsetX >= LABELS ? secondsAt(event.offsetX) : null;
    showTip(event);
    redraw();
  });
  rows.addEventListener("pointerdown", (event) => {
    drag = { x: event.clientX, from: view.from, moved: false };
    rows.setPointerCapture(event.pointerId);
  });
  rows.addEventListener("pointerup", () => {
    if (drag && !drag.moved) {
      const batch = hovered && hovered.bar ? hovered.bar.batch : null;
      pin(batch === pinned ? null : batch);
    }
    drag = null;
  });
  rows.addEventListener("pointerleave", () => {
    hovered = cursor = null;
    $("tip").style.visibility = "hidden";
    redraw();
  });
  rows.addEventListener("wheel", (event) => {
    if (event.ctrlKey || event.metaKey) zoom(Math.exp(event.deltaY * 0.004), secondsAt(event.offsetX));
    else if (event.shiftKey || event.deltaX) move((event.deltaX || event.deltaY) / scale());
    else return;
    event.preventDefault();
  }, { passive: false });
  const center = (event) => {
    if (event.type === "pointerdown" || event.buttons) {
      const at = begin + ((event.offsetX - LABELS) / (width() - LABELS - 2)) * (finish - begin);
      move(at - (view.from + view.to) / 2);
    }
  };
  $("overview").addEventListener("pointerdown", center);
  $("overview").addEventListener("pointermove", center);
  addEventListener("keydown", (event) => {
    if (event.target.tagName === "SELECT" || event.ctrlKey || event.metaKey) return;
    const span = view.to - view.from;
    const keys = { "+": () => zoom(0.7), "=": () => zoom(0.7), "-": () => zoom(1.4), 0: () => look(begin, finish),
      ArrowLeft: () => move(-span / 6), ArrowRight: () => move(span / 6), Escape: () => pin(null) };
    if (keys[event.key]) keys[event.key]();
  });
  $("in").onclick = () => zoom(0.7);
  $("out").onclick = () => zoom(1.4);
  $("fit").onclick = () => look(begin, finish);
  $("pick").onchange = (event) => pin(event.target.value === "" ? null : Number(event.target.value));
  $("theme").onclick = () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  for (const id of ["colour", "lanes", "memory"]) $(id).onchange = () => ((overview = null), legend(), redraw());
  addEventListener("resize", redraw);
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  readTheme();
  redraw();
}

function legend() {
  const box = $("legend");
  box.replaceChildren();
  if ($("colour").value !== "op") return;
  const entry = (fills, text) => {
    const span = say(box, "span", "");
    for (const fill of fills) say(span, "i", "").style.background = fill;
    say(span, "b", text);
  };
  for (const [op, fills] of Object.entries(data.fills)) entry(fills, data.words[op]);
  if (bars.some((bar) => bar.op === null)) entry([data.plain], "other");
  const chunks = Math.max(0, ...Object.values(data.chunks)) + 1;
  if (chunks > 1) say(box, "span", `shades: the ${chunks} stages of a rank`);
}

function start() {
  for (const [name, value] of data.facts) {
    const fact = say($("facts"), "div", "");
    say(fact, "dt", name);
    say(fact, "dd", value);
  }
  for (const batch of batches) say($("pick"), "option", String(batch)).value = String(batch);
  $("memory-label").hidden = !data.memory.length;
  $("lanes-label").hidden = data.rows.every((row) => row[3]);
  $("memory").checked = data.memory.length > 0 && data.memory.length <= 16;
  listen();
  legend();
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}
start();
