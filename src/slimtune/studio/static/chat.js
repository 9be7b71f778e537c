// The chat: the same message to all columns, each with its own conversation, and the answers as they are written.
"use strict";

const chat = document.getElementById("chat");
const columns = document.getElementById("columns");
const message = document.getElementById("message");
const texts = chat.dataset;
const MOST_COLUMNS = 4;
const talks = new WeakMap();
let running = null;

const talkOf = (column) => {
  if (!talks.has(column)) talks.set(column, []);
  return talks.get(column);
};
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
  const [body, figures] = [turn.querySelector("p"), document.createElement("p")];
  figures.className = "figures";
  figures.textContent = texts.writing;
  turn.append(figures);
  const turns = column.querySelector(".turns");
  turns.setAttribute("aria-busy", "true");
  const system = document.getElementById("system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...talk];
  let [answer, reason, usage, first, failed] = ["", "", null, 0, ""];
  const began = performance.now();
  try {
    const response = await fetch("/chat/answer", {
      method: "POST", signal,
      headers: { "content-type": "application/json", "x-csrf-token": texts.token, "hx-request": "true" },
      body: JSON.stringify({
        base: texts.base,
        adapter: column.querySelector("[data-adapter]").value,
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
  talk.push({ role: "assistant", content: answer });
  if (failed) {
    // What got no answer is not a part of the conversation.
    talk.splice(-2);
    figures.classList.add("bad");
    figures.textContent = failed;
  } else {
    figures.textContent = told(usage, first || began, reason, signal.aborted);
  }
  turns.scrollTop = turns.scrollHeight;
  document.body.dispatchEvent(new Event("server-changed"));
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
  running = new AbortController();
  show(true);
  await Promise.all(all().map((column) => ask(column, text, running.signal)));
  running = null;
  show(false);
  message.focus();
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
  const column = document.getElementById("column").content.firstElementChild.cloneNode(true);
  const taken = new Set([...columns.querySelectorAll("select")].map((select) => select.value));
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
number();
