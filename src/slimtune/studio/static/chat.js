// The chat: the same message to all columns, each with its own conversation, and the answers as they are written.
"use strict";

const chat = document.getElementById("chat");
const columns = document.getElementById("columns");
const message = document.getElementById("message");
const texts = chat.dataset;
const MOST_COLUMNS = 4;
const KEPT = `chat ${texts.base}`;
const talks = new WeakMap();
let running = null;
let asked = "";

const talkOf = (column) => {
  if (!talks.has(column)) talks.set(column, []);
  return talks.get(column);
};
const adapterOf = (column) => column.querySelector("[data-adapter]").value;
const settings = () => [...document.querySelectorAll("#sampling input, #system")];
const all = () => [...columns.querySelectorAll("[data-column]")];

function number() {
  all().forEach((column, index) => {
    for (const named of column.querySelectorAll("[data-label]")) {
      named.setAttribute("aria-label", named.dataset.label.replace("#", index + 1));
    }
  });
  document.getElementById("add")?.toggleAttribute("disabled", all().length >= MOST_COLUMNS);
}

function clear(column) {
  talks.set(column, []);
  const nothing = document.createElement("p");
  nothing.className = "nothing";
  nothing.textContent = texts.empty;
  column.querySelector(".turns").replaceChildren(nothing);
}

function addTurn(column, role, text) {
  const turns = column.querySelector(".turns");
  turns.querySelector(".nothing")?.remove();
  const turn = document.createElement("article");
  turn.className = `turn ${role}`;
  const body = document.createElement("p");
  body.textContent = text;
  if (role === "user") {
    const you = document.createElement("span");
    you.className = "unseen";
    you.textContent = texts.you;
    turn.append(you);
  }
  turn.append(body);
  turns.append(turn);
  turns.scrollTop = turns.scrollHeight;
  return turn;
}

function figuresOf(text) {
  const figures = document.createElement("p");
  figures.className = "figures";
  figures.textContent = text;
  return figures;
}

function newColumn(adapter) {
  const column = document.getElementById("column").content.firstElementChild.cloneNode(true);
  column.querySelector("[data-adapter]").value = adapter;
  return column;
}

// The settings as the API has them; an empty one is left to the server.
function sampling() {
  const values = {};
  for (const input of document.querySelectorAll("#sampling input")) {
    if (input.value !== "") values[input.name] = Number(input.value);
  }
  return values;
}

// Events of a stream that is read by fetch, for an EventSource can't post.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const event = { type: "message", data: "" };
      for (const line of block.split("\n")) {
        if (line.startsWith("event: ")) event.type = line.slice(7);
        if (line.startsWith("data: ")) event.data += line.slice(6);
      }
      yield event;
    }
  }
}

async function ask(column, text, signal) {
  const talk = talkOf(column);
  talk.push({ role: "user", content: text });
  addTurn(column, "user", text);
  const turn = addTurn(column, "assistant", "");
  const [body, figures] = [turn.querySelector("p"), figuresOf(texts.writing)];
  turn.append(figures);
  const turns = column.querySelector(".turns");
  turns.setAttribute("aria-busy", "true");
  const system = document.getElementById("system").value.trim();
  const said = talk.map(({ role, content }) => ({ role, content }));
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...said];
  let [answer, reason, usage, first, failed] = ["", "", null, 0, ""];
  const began = performance.now();
  try {
    const response = await fetch("/chat/answer", {
      method: "POST", signal,
      headers: { "content-type": "application/json", "x-csrf-token": texts.token, "hx-request": "true" },
      body: JSON.stringify({
        base: texts.base,
        adapter: adapterOf(column),
        request: { messages, ...sampling() },
      }),
    });
    if (!response.ok) {
      const page = new DOMParser().parseFromString(await response.text(), "text/html");
      throw new Error(page.body.textContent.trim());
    }
    for await (const event of events(response)) {
      if (event.type === "state") {
        figures.textContent = event.data === "loading" ? texts.loading : texts.writing;
        document.body.dispatchEvent(new Event("server-changed"));
        continue;
      }
      if (event.data === "[DONE]") break;
      const part = JSON.parse(event.data);
      if (part.error) throw new Error(part.error.message);
      usage = part.usage ?? usage;
      const choice = part.choices?.[0];
      if (!choice) continue;
      reason = choice.finish_reason ?? reason;
      if (!choice.delta?.content) continue;
      first ||= performance.now();
      const atEnd = turns.scrollTop + turns.clientHeight >= turns.scrollHeight - 8;
      answer += choice.delta.content;
      body.textContent = answer;
      if (atEnd) turns.scrollTop = turns.scrollHeight;
    }
    if (!reason) failed = texts.lost;
  } catch (error) {
    failed = signal.aborted ? "" : error instanceof TypeError ? texts.unreachable : error.message;
  }
  turns.removeAttribute("aria-busy");
  figures.textContent = failed || told(usage, first || began, reason, signal.aborted);
  figures.classList.toggle("bad", failed !== "");
  // What got no answer is not a part of the conversation.
  if (failed) talk.pop();
  else talk.push({ role: "assistant", content: answer, figures: figures.textContent });
  turns.scrollTop = turns.scrollHeight;
  document.body.dispatchEvent(new Event("server-changed"));
  return failed === "";
}

function told(usage, first, reason, wasStopped) {
  if (wasStopped) return texts.wasStopped;
  const [tokens, seconds] = [usage?.completion_tokens ?? 0, (performance.now() - first) / 1000];
  // From the first token on: before it, the prompt is read, and the model may be loaded.
  const rate = tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : 0;
  const said = texts.figures.replace("{tokens}", tokens).replace("{rate}", rate ? rate.toFixed(rate < 10 ? 1 : 0) : "–");
  return reason === "length" ? `${said} · ${texts.wasCut}` : said;
}

async function send() {
  const text = message.value.trim();
  const invalid = document.querySelector("#sampling :invalid");
  if (running || !text || !texts.base) return;
  if (invalid) {
    invalid.closest("details").open = true;
    invalid.reportValidity();
    return;
  }
  message.value = "";
  asked = text;
  running = new AbortController();
  show(true);
  const answered = await Promise.all(all().map((column) => ask(column, text, running.signal)));
  running = null;
  asked = "";
  // To be sent again without typing it again; also what a page that is being left keeps.
  if (!answered.includes(true)) message.value ||= text;
  show(false);
  keep();
  message.focus();
}

// The conversations outlive a page that is loaded again: in the tab alone, until it is closed or they are cleared.
function keep() {
  const open = all().map((column) => {
    const talk = talkOf(column);
    // Without a question in the middle of its answer, which goes back to where it was typed.
    return { adapter: adapterOf(column), talk: talk.slice(0, talk.length - (talk.length % 2)) };
  });
  const values = settings().map((input) => input.value);
  try {
    sessionStorage.setItem(KEPT, JSON.stringify({ open, values, message: message.value || asked }));
  } catch {
    // More than a browser keeps: it is lost with the page.
    sessionStorage.removeItem(KEPT);
  }
}

function restore() {
  const kept = JSON.parse(sessionStorage.getItem(KEPT) ?? "null");
  if (!kept) return;
  const fresh = all();
  for (const { adapter, talk } of kept.open) {
    const column = newColumn(adapter);
    // Its run may have been deleted since.
    if (adapterOf(column) !== adapter) continue;
    columns.append(column);
    talks.set(column, talk);
    for (const { role, content, figures } of talk) {
      const turn = addTurn(column, role, content);
      if (figures) turn.append(figuresOf(figures));
    }
  }
  const wanted = new URLSearchParams(location.search).get("adapter");
  const there = all().slice(fresh.length).map(adapterOf);
  for (const column of fresh) {
    // What another page leads here for stands beside what was asked before.
    if (there.length && (adapterOf(column) !== wanted || there.includes(wanted))) column.remove();
  }
  settings().forEach((input, index) => { input.value = kept.values[index] ?? input.value; });
  message.value = kept.message;
}

function show(isRunning) {
  document.getElementById("stop").hidden = !isRunning;
  document.getElementById("send").hidden = isRunning;
  document.getElementById("clear").disabled = isRunning;
  for (const control of columns.querySelectorAll("select, [data-remove]")) control.disabled = isRunning;
  const add = document.getElementById("add");
  if (add) add.disabled = isRunning || all().length >= MOST_COLUMNS;
  if (isRunning) document.getElementById("stop").focus();
}

document.getElementById("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
message.addEventListener("keydown", (event) => {
  // Enter also ends the composition of a Korean syllable, and sends nothing then.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.getElementById("stop").addEventListener("click", () => running?.abort());
document.getElementById("clear").addEventListener("click", () => {
  all().forEach(clear);
  message.focus();
});
document.getElementById("add")?.addEventListener("click", () => {
  const taken = new Set(all().map(adapterOf));
  const column = newColumn("");
  const select = column.querySelector("select");
  const free = [...select.options].find((option) => !taken.has(option.value));
  if (free) select.value = free.value;
  columns.append(column);
  number();
  select.focus();
});
columns.addEventListener("click", (event) => {
  const column = event.target.closest("[data-remove]")?.closest("[data-column]");
  if (!column || all().length < 2) return;
  column.remove();
  number();
  message.focus();
});
// Whoever answers now knows nothing of what another one said.
columns.addEventListener("change", (event) => clear(event.target.closest("[data-column]")));
document.getElementById("base").addEventListener("change", (event) => {
  const other = document.getElementById("other-form");
  other.hidden = event.target.value !== "";
  if (event.target.value) document.getElementById("base-form").submit();
  else other.querySelector("input").focus();
});
// Where they would stand between the model and the conversation.
if (matchMedia("(max-width: 60rem)").matches) document.getElementById("settings").open = false;
addEventListener("pagehide", keep);
restore();
number();
