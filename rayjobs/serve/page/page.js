"use strict";
// Text of models, files and servers only ever becomes the text of an element; nothing here parses it as HTML.

const at = id => document.getElementById(id);
const MOST_BYTES = 7_000_000;  // of an image as it is sent; base64 adds a third

let token = sessionStorage.getItem("token") || "";
let turns = [];      // the conversation: {role, content} as the API takes it
let attached = "";   // the data URL of the next message's image
let running = null;  // the AbortController of the answer that is being written
let asked = 0;       // number of the latest classification, whose answer alone is shown
let shown = null;    // the file that was classified last
const readers = new Set();  // models that read images

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function tell(where, text, failed = false) {
  at(where).textContent = text;
  at(where).classList.toggle("failed", failed);
}

async function call(path, options = {}) {
  const headers = {...options.headers};
  if (token) headers.Authorization = `Bearer ${token}`;
  const answer = await fetch(path, {...options, headers});
  if (answer.ok) return answer;
  if (answer.status === 401) { at("token-form").hidden = false; at("token").focus(); }
  let message = `${answer.status} ${answer.statusText}`;
  try { message = (await answer.json()).error.message; } catch { /* not an answer of this server */ }
  throw Object.assign(new Error(message), {status: answer.status});
}

const post = (path, body, signal) => call(path, {
  method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body), signal,
});

// ---- models ----

function fill(select, names) {
  const before = select.value;
  select.replaceChildren(...names.map(name => element("option", {value: name, textContent: name})));
  if (names.includes(before)) select.value = before;
}

async function loadModels() {
  try {
    const models = (await (await call("v1/models")).json()).data;
    models.filter(model => model.reads_images).forEach(model => readers.add(model.id));
    fill(at("model"), models.map(model => model.id));
    showAttach();
    at("token-form").hidden = true;
  } catch (error) { tell("chat-status", error.message, true); }
  let names = [];
  try {
    names = (await (await call("v1/images/classifications")).json()).data.map(one => one.id);
    if (!names.length) tell("images-status", "There is no classifier in the server's caches.folder.");
  } catch (error) {
    const none = error.status === 404;
    tell("images-status", none ? "This server has no classifiers: start it with caches.folder." : error.message, !none);
  }
  fill(at("classifier"), names);
  at("image-file").disabled = !names.length;
}

function showAttach() {
  const reads = readers.has(at("model").value);
  at("attach").hidden = !reads;
  if (!reads) detach();
}

// ---- tabs ----

function openTab(name) {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const open = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", open);
    tab.tabIndex = open ? 0 : -1;
    at(tab.getAttribute("aria-controls")).hidden = !open;
  }
  history.replaceState(null, "", `#${name}`);
}

function moveTab(event) {
  const tabs = [...document.querySelectorAll("[role=tab]")], place = tabs.indexOf(event.target);
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (!step || place < 0) return;
  const next = tabs[(place + step + tabs.length) % tabs.length];
  openTab(next.getAttribute("aria-controls"));
  next.focus();
  event.preventDefault();
}

// ---- images ----

async function dataUrl(file) {
  if (!file.type.startsWith("image/")) throw new Error(`${file.name} is no image.`);
  if (file.size > MOST_BYTES) throw new Error(`${file.name} is larger than ${MOST_BYTES / 1e6} MB: scale it down.`);
  return new Promise((done, fail) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => fail(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}

async function attach(file) {
  if (!file || at("attach").hidden) return;
  try {
    attached = await dataUrl(file);
    at("attached-image").src = attached;
    at("attached").hidden = false;
  } catch (error) { tell("chat-status", error.message, true); }
}

function detach() {
  attached = "";
  at("chat-file").value = "";
  at("attached").hidden = true;
}

// ---- chat ----

function addTurn(role, text, image = "") {
  const said = element("span", {className: "said", textContent: text});
  const item = element("li", {className: role}, element("span", {className: "who", textContent: role}));
  if (image) item.append(element("img", {src: image, alt: "attached image"}));
  item.append(said);
  at("log").append(item);
  item.scrollIntoView({block: "nearest"});
  return {item, said};
}

async function* events(answer) {
  const decoder = new TextDecoder(), reader = answer.body.getReader();
  let held = "";
  for (;;) {
    const {value, done} = await reader.read();
    held += done ? decoder.decode() : decoder.decode(value, {stream: true});
    const lines = held.split(/\r?\n/);
    held = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
    if (done) throw new Error("The answer was cut off.");
  }
}

function rate(began, first, tokens) {
  const now = performance.now();
  if (first === null) return "";
  const seconds = (now - first) / 1000;
  const speed = tokens > 1 && seconds > 0 ? `${((tokens - 1) / seconds).toFixed(1)} tokens/s, ` : "";
  return `${speed}first token after ${((first - began) / 1000).toFixed(2)} s, ${tokens} tokens`;
}

async function ask(text) {
  const content = attached
    ? [{type: "text", text}, {type: "image_url", image_url: {url: attached}}]
    : text;
  addTurn("user", text, attached);
  detach();
  const mine = turns;  // a new conversation may begin before the answer ends
  mine.push({role: "user", content});
  const {item, said} = addTurn("assistant", "");
  const began = performance.now();
  let first = null, tokens = 0;
  running = new AbortController();
  at("send").disabled = true;
  at("stop").disabled = false;
  tell("chat-status", "waiting for the first token");
  try {
    const answer = await post("v1/chat/completions", {
      model: at("model").value, messages: mine, stream: true, stream_options: {include_usage: true},
      temperature: Number(at("temperature").value), max_tokens: Number(at("tokens").value),
    }, running.signal);
    for await (const event of events(answer)) {
      const piece = event.choices.length ? event.choices[0].delta.content : "";
      if (event.choices.length && (piece || event.choices[0].finish_reason)) {
        first ??= performance.now();
        tokens += 1;
      }
      if (event.usage) tokens = event.usage.completion_tokens;
      if (piece) {
        said.append(piece);
        at("log").scrollTop = at("log").scrollHeight;
      }
      if (mine === turns) tell("chat-status", rate(began, first, tokens));
    }
    mine.push({role: "assistant", content: said.textContent});
  } catch (error) {
    const stopped = error.name === "AbortError";
    if (stopped && said.textContent) mine.push({role: "assistant", content: said.textContent});
    else mine.pop();  // a question without an answer is not asked again with the next
    if (!stopped) item.classList.add("failed");
    if (!said.textContent) said.textContent = stopped ? "(stopped)" : error.message;
    if (mine === turns) tell("chat-status", stopped ? `stopped; ${rate(began, first, tokens)}` : error.message, !stopped);
  }
  running = null;
  at("send").disabled = false;
  at("stop").disabled = true;
}

function send(event) {
  event?.preventDefault();
  const text = at("message").value;
  if (running || !(text.trim() || attached)) return;
  if (!at("model").value) { tell("chat-status", "There is no model to ask.", true); return; }
  at("message").value = "";
  ask(text);
  at("message").focus();
}

function newChat() {
  running?.abort();
  turns = [];
  at("log").replaceChildren();
  tell("chat-status", "");
  at("message").focus();
}

// ---- classification ----

async function classify(file) {
  if (!file || at("image-file").disabled) return;
  const number = ++asked;
  shown = file;
  tell("images-status", "classifying");
  try {
    const image = await dataUrl(file), began = performance.now();
    at("preview").src = image;
    at("preview").hidden = false;
    const answer = await (await post("v1/images/classifications", {
      model: at("classifier").value, image, top: Number(at("top").value), evidence: Number(at("evidence").value),
    })).json();
    if (number !== asked) return;
    showResult(answer);
    tell("images-status", `${file.name}: ${((performance.now() - began) / 1000).toFixed(2)} s`);
  } catch (error) {
    if (number !== asked) return;
    at("result").hidden = true;
    tell("images-status", error.message, true);
  }
}

const signed = value => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
const head = text => element("th", {scope: "row", textContent: text});
const numberCell = text => element("td", {className: "number", textContent: text});

function showResult(answer) {
  const [best] = answer.data, why = answer.evidence;
  const doubt = answer.calibrated ? "" : "; probabilities are not calibrated";
  at("verdict").textContent =
    `${best.label}: ${(100 * best.probability).toFixed(1)}%, ${(100 * answer.margin).toFixed(1)} points before the next${doubt}`;
  at("classes").replaceChildren(...answer.data.map(({label, probability}) => element("tr", {},
    head(label), numberCell(`${(100 * probability).toFixed(1)}%`),
    element("td", {}, element("progress", {max: 1, value: probability, ariaLabel: `probability of ${label}`})))));
  at("why").hidden = !why;
  if (why) {
    at("why-text").textContent =
      `${why.label} is ${signed(why.difference)} before ${why.rival}: ${signed(why.text)} by the sentences, ` +
      `${signed(why.other_images)} by training images that are not listed, and the rest by these:`;
    at("votes").replaceChildren(...why.images.map(({name, label, weight}) => element("tr", {},
      head(name), element("td", {textContent: label}), numberCell(signed(weight)))));
  }
  at("result").hidden = false;
}

// ---- events ----

for (const tab of document.querySelectorAll("[role=tab]")) {
  tab.addEventListener("click", () => openTab(tab.getAttribute("aria-controls")));
  tab.addEventListener("keydown", moveTab);
}
at("token-form").addEventListener("submit", event => {
  event.preventDefault();
  token = at("token").value;
  sessionStorage.setItem("token", token);
  tell("chat-status", "");
  tell("images-status", "");
  loadModels();
});
at("ask").addEventListener("submit", send);
at("message").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
document.addEventListener("keydown", event => { if (event.key === "Escape") running?.abort(); });
at("stop").addEventListener("click", () => running?.abort());
at("new-chat").addEventListener("click", newChat);
at("model").addEventListener("change", showAttach);
at("chat-file").addEventListener("change", event => attach(event.target.files[0]));
at("detach").addEventListener("click", detach);
at("image-file").addEventListener("change", event => classify(event.target.files[0]));
for (const id of ["classifier", "top", "evidence"]) at(id).addEventListener("change", () => classify(shown));

for (const [where, take] of [[at("drop"), classify], [at("ask"), attach]]) {
  where.addEventListener("dragover", event => { event.preventDefault(); where.classList.add("over"); });
  where.addEventListener("dragleave", () => where.classList.remove("over"));
  where.addEventListener("drop", event => {
    event.preventDefault();
    where.classList.remove("over");
    take(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", event => {
  const file = event.clipboardData?.files[0];
  if (file) (at("images").hidden ? attach : classify)(file);
});

openTab(location.hash === "#images" ? "images" : "chat");
loadModels();
