// What the pointer is on, what that means, and moving about. Behind draw_html.js in the same script.

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
