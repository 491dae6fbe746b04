"use strict";
// Rows of bars on a canvas. Bars: [row, name, start, end, waits]; waits: [bar, reason]. See draw_html.py; what the
// pointer does stands in draw_html_pointer.js.
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
