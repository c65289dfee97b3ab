"use strict";
// The page over the API: draws an image or several, or the same one with and without speculation, and replays both together.

const $ = (id) => document.getElementById(id);
const COLOURS = ["--s1", "--s2", "--s3", "--s4"];
const REPLAY = 6; // seconds that the slower drawing of a replay takes
const ROUNDS = 3, SHORT = 8; // a race is run this often, as long as a round takes fewer seconds than this
let models = [];
let stopping = null;
let replaying = 0;

function headers() {
  const found = { "content-type": "application/json" };
  const key = $("key").value || sessionStorage.getItem("key") || "";
  if (key) found.authorization = `Bearer ${key}`;
  return found;
}

async function fail(answer) {
  let message = `${answer.status} ${answer.statusText}`;
  try { message = (await answer.json()).error.message; } catch { /* no JSON: the status has to do */ }
  if (answer.status === 401) $("key-label").hidden = false;
  throw new Error(message);
}

// ---- models and their methods

async function loadModels() {
  for (;;) {
    try {
      const answer = await fetch("/v1/models", { headers: headers() });
      if (answer.status === 503) { $("state").textContent = "warming up ..."; }
      else if (!answer.ok) { await fail(answer); }
      else { models = (await answer.json()).data.filter((m) => !m.alias_of); break; }
    } catch (error) {
      $("state").textContent = "not connected";
      $("error").textContent = error.message;
      if (!$("key-label").hidden) return;
    }
    await new Promise((done) => setTimeout(done, 1500));
  }
  $("error").textContent = "";
  $("state").textContent = "ready";
  options($("model"), models.map((m) => [m.id, m.id]));
  showModel();
}

function options(select, pairs, chosen) {
  select.replaceChildren(...pairs.map(([value, text]) => new Option(text, value, false, value === chosen)));
}

const current = () => models.find((m) => m.id === $("model").value);

function showModel() {
  const model = current();
  $("prompt-label").hidden = !model.takes_prompts;
  $("class-label").hidden = model.takes_prompts;
  $("prompt").required = model.takes_prompts;
  options($("class"), model.prompts.map((p) => [p, p]));
  $("prompts").replaceChildren(...model.prompts.map((p) => new Option(p)));
  if (model.takes_prompts) $("prompt").value = model.prompts[0] || "";
  showSampling(model);
  options($("drafter"), [["auto", "auto"], ...Object.keys(model.rules).map((d) => [d, d])]);
  showRules();
}

// What is left empty is the model's own, which stands there in grey.
const LAW = { guidance: "guidance_scale", temperature: "temperature", top_k: "top_k", top_p: "top_p" };

function showSampling(model) {
  const own = model.sampling;
  for (const [id, field] of Object.entries(LAW)) {
    $(id).value = "";
    $(id).placeholder = own[field] === undefined ? "" : String(own[field]);
  }
  $("top_k-label").hidden = $("top_p-label").hidden = own.top_k === undefined;
  $("negative-label").hidden = !model.takes_negative_prompt;
  $("negative_prompt").value = "";
  $("words-label").hidden = !(own.quality_words || own.negative_prompt);
  $("words-label").title = [own.quality_words, own.negative_prompt && `not: ${own.negative_prompt}`].filter(Boolean).join("; ");
  $("quality_words").checked = false;
  $("own").textContent = `Empty: the model's own (${own.source}).`;
}

function sampling() {
  const asked = {};
  for (const [id, field] of Object.entries(LAW)) if ($(id).value !== "") asked[field] = Number($(id).value);
  if ($("negative_prompt").value) asked.negative_prompt = $("negative_prompt").value;
  if ($("quality_words").checked) asked.quality_words = true;
  return asked;
}

function showRules() {
  const model = current(), drafter = $("drafter").value;
  const rules = drafter === "auto" ? [] : model.rules[drafter];
  options($("rule"), [["auto", "auto (exact)"], ...rules.map((r) => [r, r + (model.lossy.includes(r) ? " (lossy)" : "")])]);
  $("rule").disabled = drafter === "auto";
  $("about-drafter").textContent = drafter === "auto" ? "What suits the model." : model.about.drafters[drafter] || "";
  showExactness();
}

function showExactness() {
  const lossy = current().lossy.includes($("rule").value);
  $("about-rule").textContent = current().about.rules[$("rule").value] || "";
  $("exactness").textContent = lossy
    ? "Lossy: pictures may differ in distribution from the model's own."
    : "Exact: pictures have the model's own distribution.";
}

// ---- one drawing

function request(speculation) {
  const model = current();
  const prompt = model.takes_prompts ? $("prompt").value : $("class").value;
  return {
    model: model.id, prompt, seed: Number($("seed").value), ...sampling(), speculation,
  };
}

async function* events(path, body, signal) {
  const answer = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!answer.ok) await fail(answer);
  if ($("key").value) sessionStorage.setItem("key", $("key").value);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "));
      if (!data) continue; // a comment: the server is still there
      const event = JSON.parse(data.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function laneOf(id, title) {
  const root = $(id);
  root.hidden = false;
  root.classList.remove("won");
  root.querySelector("h2").textContent = title;
  root.style.setProperty("--shape", `${current().columns} / ${current().grid}`);
  const lane = {
    title, model: current(), picture: root.querySelector(".picture"), map: root.querySelector(".map"), root,
    bar: root.querySelector("progress"), figures: root.querySelector(".figures"), frames: [], result: null,
  };
  lane.picture.removeAttribute("src");
  lane.picture.alt = "";
  lane.bar.value = 0;
  lane.figures.textContent = "waiting ...";
  paintMap(lane, [], Infinity);
  return lane;
}

const words = (seconds, passes, tokens) =>
  `${seconds.toFixed(2)} s, ${passes} passes, ${(tokens / Math.max(1, passes)).toFixed(2)} tokens per pass`;

async function drawInto(lane, body, signal) {
  const total = lane.model.tokens;
  lane.result = null;
  for await (const event of events("/v1/draw", body, signal)) {
    if (event.type === "progress") {
      lane.frames.push(event);
      if (event.jpeg) lane.picture.src = `data:image/jpeg;base64,${event.jpeg}`;
      lane.bar.value = event.tokens / total;
      lane.figures.textContent = words(event.seconds, event.passes, event.tokens);
    } else if (event.type === "done") {
      lane.result = event;
      finish(lane, body);
    }
  }
  if (!lane.result) throw new Error("the connection was lost");
}

function finish(lane, body) {
  const done = lane.result;
  showPicture(lane, body, done);
  lane.bar.value = 1;
  lane.figures.textContent = words(lane.seconds || done.seconds, done.target_passes, done.tokens);
  paintMap(lane, done.committed, Infinity);
}

function showPicture(lane, body, done) {
  lane.picture.src = `data:image/png;base64,${done.png}`;
  lane.picture.alt = `${body.prompt}, seed ${done.seed}`;
  lane.picture.style.clipPath = "";
}

const line = ({ grid, columns, tokens }) => (tokens === grid * (columns + 1) ? columns + 1 : columns); // with its end

// Tokens in raster order, coloured by how many came out of their pass. Not shown: ends of lines, and a preview before
// the picture's own tokens. A masked model has no such order, and no map.
function paintMap(lane, committed, passes) {
  const canvas = lane.map, { grid: rows, columns, tokens } = lane.model, wide = line(lane.model);
  canvas.hidden = !lane.model.in_order;
  if (canvas.hidden) committed = [];
  const paint = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  canvas.width = columns;
  canvas.height = rows;
  paint.clearRect(0, 0, columns, rows);
  let at = rows * wide - tokens;
  committed.slice(0, passes).forEach((count) => {
    const level = count < 2 ? 0 : count < 4 ? 1 : count < 8 ? 2 : 3;
    paint.fillStyle = style.getPropertyValue(COLOURS[level]);
    for (let i = 0; i < count; i += 1, at += 1) paint.fillRect(at % wide, Math.floor(at / wide), 1, 1);
  });
  $("legend").hidden = !committed.length;
}

function collect(body, done) {
  const link = document.createElement("a"), image = new Image(), text = document.createElement("span");
  const number = done.index ? `, image ${done.index}` : "";
  link.href = image.src = `data:image/png;base64,${done.png}`;
  link.download = `${body.model}-${body.prompt.replace(/[^\w]+/g, "-").slice(0, 40)}-${done.seed}${number && `-${done.index}`}.png`;
  image.alt = "";
  text.textContent = `${body.prompt}, seed ${done.seed}${number}: download`;
  link.append(image, text);
  const item = document.createElement("li");
  item.append(link);
  const hint = $("gallery").querySelector(".hint");
  if (hint) hint.remove();
  $("gallery").prepend(item);
  while ($("gallery").children.length > 48) $("gallery").lastChild.remove();
}

// ---- what the buttons do

async function busy(work) {
  if (stopping) return;
  if (!$("form").reportValidity()) return;
  replaying += 1;
  stopping = new AbortController();
  $("draw").disabled = $("race").disabled = true;
  $("stop").disabled = false;
  $("error").textContent = "";
  $("verdict").replaceChildren();
  try { await work(stopping.signal); }
  catch (error) { $("error").textContent = error.name === "AbortError" ? "Stopped." : error.message; }
  stopping = null;
  $("draw").disabled = $("race").disabled = false;
  $("stop").disabled = true;
}

const spoken = () => ({ drafter: $("drafter").value, rule: $("drafter").value === "auto" ? "auto" : $("rule").value });

const draw = () => busy(async (signal) => {
  $("right").hidden = true;
  const body = request(spoken()), lane = laneOf("left", body.prompt), count = Number($("count").value);
  if (count > 1) return drawSeveral(lane, body, count, signal);
  await drawInto(lane, body, signal);
  collect(body, lane.result);
});

// Images 0 to count - 1 of the seed, in passes that they share. Each goes to the gallery as soon as it is there.
async function drawSeveral(lane, body, count, signal) {
  const began = performance.now();
  let there = 0;
  lane.map.hidden = true;
  lane.figures.textContent = `0 of ${count} pictures`;
  for await (const event of events("/v1/images/generations", { ...body, n: count, stream: true }, signal)) {
    there += 1;
    const done = { ...event.bozzetto, png: event.b64_json }, seconds = (performance.now() - began) / 1000;
    showPicture(lane, body, done);
    lane.bar.value = there / count;
    lane.figures.textContent = `${there} of ${count} pictures, ${seconds.toFixed(2)} s, ${(there / seconds).toFixed(2)} pictures per second`;
    collect(body, done);
  }
  if (there < count) throw new Error("the connection was lost");
}

const middle = (numbers) => numbers.slice().sort((a, b) => a - b)[Math.floor(numbers.length / 2)];

const race = () => busy(async (signal) => {
  // One after the other: together they would take the machine from each other. Pictures on the way cost time, and are
  // only asked for where the finished one cannot stand for them.
  const lanes = [laneOf("left", "sequential"), laneOf("right", "speculative")], pictures = !current().in_order;
  const bodies = [{ drafter: "none" }, spoken()].map((s) => ({ ...request(s), pictures }));
  const seconds = [[], []], began = performance.now();
  for (let round = 0; round < ROUNDS; round += 1) {
    $("verdict").textContent = `Round ${round + 1} of ${ROUNDS} ...`;
    for (const i of [0, 1]) {
      lanes[i].frames = [];
      await drawInto(lanes[i], bodies[i], signal);
      seconds[i].push(lanes[i].result.seconds);
    }
    if ((performance.now() - began) / 1000 / (round + 1) > SHORT) break;
  }
  lanes.forEach((lane, i) => { lane.seconds = middle(seconds[i]); });
  collect(bodies[1], lanes[1].result);
  showVerdict(lanes, bodies, seconds[0].length);
  replay(lanes, bodies);
});

function showVerdict([left, right], bodies, rounds) {
  const gain = left.seconds / right.seconds, fewer = left.result.target_passes / right.result.target_passes;
  const same = left.result.sha256 === right.result.sha256;
  (gain >= 1 ? right : left).root.classList.add("won");
  const verdict = document.createElement("span"), again = document.createElement("button");
  const passes = fewer > 1 ? `, with ${fewer.toFixed(2)} times fewer passes` : "";
  verdict.textContent = (gain >= 1
    ? `Speculation was ${gain.toFixed(2)} times faster${passes}` : `Speculation lost here: ${(1 / gain).toFixed(2)} times slower${passes}`) +
    (rounds > 1 ? ` (medians of ${rounds} rounds). ` : ". ") +
    (same ? "Both pictures are equal, byte for byte." : "The pictures differ: another draw of the noise, or a lossy rule.");
  again.type = "button";
  again.id = "replay";
  again.textContent = "Replay side by side";
  again.addEventListener("click", () => replay([left, right], bodies));
  $("verdict").replaceChildren(verdict, again);
}

// Both drawings from their beginning, at the same clock.
function replay(lanes, bodies) {
  const number = (replaying += 1), began = performance.now(), slow = REPLAY / Math.max(...lanes.map((lane) => lane.seconds));
  function frame(now) {
    if (number !== replaying) return;
    const clock = (now - began) / 1000 / slow;
    let running = false;
    lanes.forEach((lane, i) => {
      if (clock >= lane.seconds) { if (lane.bar.value < 1) finish(lane, bodies[i]); return; }
      running = true;
      showAt(lane, clock);
    });
    if (running) requestAnimationFrame(frame);
  }
  lanes.forEach((lane) => { lane.bar.value = 0; });
  requestAnimationFrame(frame);
}

function showAt(lane, clock) {
  const done = lane.result, passes = Math.floor((clock / lane.seconds) * done.target_passes);
  const tokens = done.committed.slice(0, passes).reduce((a, b) => a + b, 0);
  const seen = lane.frames.filter((f) => f.jpeg && f.seconds <= clock).pop();
  if (lane.model.in_order) {
    // The rows that are there, and of the next one what is: the finished picture, cut.
    const { grid: rows, columns } = lane.model, wide = line(lane.model), at = Math.max(0, tokens + rows * wide - done.tokens);
    const [top, low] = [Math.floor(at / wide), Math.floor(at / wide) + 1].map((row) => `${(100 * row) / rows}%`);
    const x = `${(100 * (at % wide)) / columns}%`;
    lane.picture.style.clipPath = `polygon(0 0, 100% 0, 100% ${top}, ${x} ${top}, ${x} ${low}, 0 ${low})`;
  } else if (seen) lane.picture.src = `data:image/jpeg;base64,${seen.jpeg}`;
  lane.bar.value = Math.min(0.999, tokens / done.tokens);
  lane.figures.textContent = words(clock, passes, tokens);
  paintMap(lane, done.committed, passes);
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); draw(); });
$("race").addEventListener("click", race);
$("stop").addEventListener("click", () => stopping && stopping.abort());
$("dice").addEventListener("click", () => { $("seed").value = Math.floor(Math.random() * 2 ** 31); });
$("model").addEventListener("change", showModel);
$("drafter").addEventListener("change", showRules);
$("rule").addEventListener("change", showExactness);
$("key").addEventListener("change", () => { if (!models.length) loadModels(); });
loadModels();
