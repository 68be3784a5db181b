// The page: what is shown, and what the buttons do. The server's API is in stream.js, conversations are in store.js.

import { markdown } from "./markdown.js";
import { Store } from "./store.js";
import { answer, models, prefer, ServerError } from "./stream.js";
import { otherLanguage, speak, word } from "./words.js";

const NUMBERS = ["temperature", "top_k", "top_p", "max_tokens", "seed"];
const at = (id) => document.getElementById(id);
const store = new Store();
let running = null; // what stops the answer that is being written

// ---- What is shown ------------------------------------------------------------------------------------------------

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function button(name, act, text = word(name)) {
  return element("button", { type: "button", className: "quiet", title: word(name), "aria-label": word(name), onclick: act }, text);
}

function show() {
  showConversations();
  at("system").value = store.current.system;
  const path = store.path();
  const shown = path.length ? path.map(message) : [element("p", { className: "empty" }, word("empty"))];
  at("thread").replaceChildren(...shown);
  at("thread").scrollTop = at("thread").scrollHeight;
  document.title = store.current.title ? `${store.current.title} · gptjax` : "gptjax";
}

function showConversations() {
  at("conversations").replaceChildren(...store.all.map((one) => {
    const open = button("conversations", () => { stop(); store.open(one.id); showSide(false); show(); }, one.title || word("untitled"));
    open.title = one.title;
    open.setAttribute("aria-label", one.title || word("untitled"));
    if (one.id === store.current.id) open.setAttribute("aria-current", "true");
    const remove = button("delete", () => { if (confirm(word("confirm"))) { stop(); store.remove(one.id); show(); } }, "×");
    return element("li", {}, open, remove);
  }));
}

function message(node) {
  const body = element("div", { className: "body" });
  fill(body, node);
  const who = node.role === "user" ? word("you") : node.model || "";
  const box = element("article", { className: node.role }, element("div", { className: "who" }, who), body);
  box.dataset.node = node.id;
  box.append(tools(node, box));
  return box;
}

// The text of a message; a model's as safe Markdown, or token by token with probabilities.
function fill(body, node) {
  if (node.role === "user") body.textContent = node.content;
  else if (node.tokens && node.asTokens) {
    body.replaceChildren(...node.tokens.map(([text, logProbability]) => {
      const probability = Math.exp(logProbability);
      const shown = element("span", { className: "token", title: `${(100 * probability).toFixed(1)} %  ${JSON.stringify(text)}` }, text);
      shown.dataset.level = Math.min(4, Math.floor(-logProbability));
      return shown;
    }));
  } else body.replaceChildren(markdown(node.content));
  if (node.error) body.append(element("p", { className: "error" }, node.error));
}

function tools(node, box) {
  const row = element("div", { className: "tools" });
  const sisters = store.sisters(node);
  const place = sisters.indexOf(node);
  if (sisters.length > 1) {
    const turn = (step) => () => { if (!running) { store.show(sisters[(place + step + sisters.length) % sisters.length]); store.save(); show(); } };
    row.append(button("previous", turn(-1), "‹"), `${place + 1} / ${sisters.length}`, button("next", turn(1), "›"));
  }
  if (node.role === "user") row.append(button("edit", () => edit(node, box)));
  else {
    row.append(button("regenerate", () => regenerate(node)));
    if (node.tokens?.length) row.append(button("tokens", () => { node.asTokens = !node.asTokens; fill(box.querySelector(".body"), node); }));
  }
  row.append(button("copy", () => navigator.clipboard?.writeText(node.content)));
  if (node.speed) row.append(element("span", { className: "facts" }, `${node.count} · ${node.speed.toFixed(1)} ${word("speed")}`));
  if (node.reason === "length" || node.reason === "stopped") row.append(element("span", { className: "facts" }, word(node.reason)));
  return row;
}

function notice(text) {
  at("notice").textContent = text;
  at("notice").hidden = !text;
}

// ---- Asking -------------------------------------------------------------------------------------------------------

function request(model, leaf) {
  const system = store.current.system.trim();
  const messages = store.path(leaf).map(({ role, content }) => ({ role, content }));
  const settings = {};
  for (const name of NUMBERS) if (at(name).value !== "") settings[name] = Number(at(name).value);
  return { model, messages: system ? [{ role: "system", content: system }, ...messages] : messages, ...settings };
}

// Writes the answer of a model below a message; returns its node, or null without an answer.
async function write(model, parent, place, more = {}) {
  const node = { role: "assistant", content: "", model, tokens: [], ...more };
  const body = element("div", { className: "body writing" });
  place.append(element("article", { className: "assistant" }, element("div", { className: "who" }, model), body));
  const thread = at("thread");
  let first = null;
  let drawn = 0;
  try {
    for await (const piece of answer({ ...request(model, parent), ...more.ask }, { key: at("key").value, signal: running.signal })) {
      first ??= performance.now();
      node.content += piece.text;
      node.tokens.push(...piece.tokens);
      node.reason = piece.reason || node.reason;
      node.count = piece.usage?.completion_tokens ?? node.tokens.length;
      if (performance.now() - drawn > 40) {
        const follows = thread.scrollHeight - thread.scrollTop - thread.clientHeight < 80;
        fill(body, node);
        if (follows) thread.scrollTop = thread.scrollHeight;
        drawn = performance.now();
      }
    }
  } catch (error) {
    if (error.name === "AbortError") node.reason = "stopped";
    else if (error instanceof ServerError || error instanceof TypeError) node.error = error.message || word("broken");
    else throw error;
  }
  fill(body, node);
  body.classList.remove("writing");
  const seconds = first === null ? 0 : (performance.now() - first) / 1000;
  if (node.count > 1 && seconds > 0) node.speed = (node.count - 1) / seconds;
  if (!node.content) {
    if (node.error) notice(node.error);
    return null;
  }
  const { role, content, ask, ...rest } = node;
  return store.add(parent, role, content, rest);
}

async function ask(parent) {
  if (running) return;
  notice("");
  running = new AbortController();
  busy(true);
  const chosen = [at("model").value, ...(at("compare").checked ? [at("second").value] : [])];
  // Another version of an answer, or the same model twice, needs another seed.
  const seeds = (place) => {
    const before = Object.values(store.current.nodes).filter((one) => one.parent === parent).length;
    const seed = at("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : Number(at("seed").value);
    return { ask: { seed: (seed + before + place) % 2 ** 31 } };
  };
  const places = chosen.map(() => element("div", { className: "column" }));
  const row = element("div", { className: chosen.length > 1 ? "columns" : "" }, ...places);
  at("thread").append(row);
  at("thread").scrollTop = at("thread").scrollHeight;
  const options = chosen.map((_, place) => seeds(place));
  const made = await Promise.all(chosen.map((model, place) => write(model, parent, places[place], options[place])));
  running = null;
  busy(false);
  const answers = made.filter(Boolean);
  if (answers.length) store.current.leaf = answers[0].id;
  store.save();
  if (chosen.length > 1 && answers.length > 1) judge(parent, answers, places);
  else show();
}

// Two answers side by side; the user chooses the better one, which continues, and the pair is sent to the server.
function judge(parent, answers, places) {
  showConversations();
  answers.forEach((node, place) => {
    const choose = button("better", async () => {
      store.show(node);
      store.save();
      show();
      const other = answers[1 - place];
      const { messages } = request(node.model, parent);
      const side = (one) => [{ role: "assistant", content: one.content }];
      try {
        await prefer({ prompt: messages, chosen: side(node), rejected: side(other), models: [node.model, other.model] }, at("key").value);
        notice(word("recorded"));
      } catch (error) {
        notice(error.message);
      }
    });
    choose.className = "choose";
    places[place].append(choose);
  });
  at("thread").scrollTop = at("thread").scrollHeight;
}

function regenerate(node) {
  if (running) return;
  store.current.leaf = node.parent;
  show();
  ask(node.parent);
}

function edit(node, box) {
  if (running) return;
  const area = element("textarea", { value: node.content, rows: 3 });
  area.setAttribute("aria-label", word("edit"));
  const send = () => { const text = area.value.trim(); if (text) say(text, node.parent); };
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
    if (event.key === "Escape") { event.stopPropagation(); show(); at("input").focus(); }
  });
  box.querySelector(".body").replaceChildren(area);
  box.querySelector(".tools").replaceChildren(button("save", send), button("cancel", show));
  area.focus();
}

function say(text, parent = store.current.leaf) {
  const node = store.add(parent, "user", text);
  store.save();
  show();
  return ask(node.id);
}

function stop() {
  running?.abort();
}

function busy(is) {
  at("send").hidden = is;
  at("stop").hidden = !is;
  at("thread").setAttribute("aria-busy", String(is));
}

// ---- The page itself ----------------------------------------------------------------------------------------------

function showSide(open) {
  document.body.classList.toggle("side", open);
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  localStorage.setItem("theme", name);
}

function dark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function compares() {
  at("second").hidden = !at("compare").checked;
}

function keepSettings() {
  const kept = Object.fromEntries(NUMBERS.map((name) => [name, at(name).value]));
  localStorage.setItem("settings", JSON.stringify({ ...kept, model: at("model").value, second: at("second").value }));
}

async function loadModels() {
  const kept = JSON.parse(localStorage.getItem("settings") || "{}");
  for (const name of NUMBERS) at(name).value = kept[name] ?? "";
  try {
    const names = await models(at("key").value);
    for (const id of ["model", "second"]) at(id).replaceChildren(...names.map((name) => element("option", { value: name }, name)));
    at("model").value = names.includes(kept.model) ? kept.model : names[0];
    at("second").value = names.includes(kept.second) ? kept.second : names[Math.min(1, names.length - 1)];
    notice("");
  } catch (error) {
    notice(error.message);
    at("settings").hidden = false;
  }
}

function grow() {
  at("input").style.height = "auto";
  at("input").style.height = `${Math.min(at("input").scrollHeight, 240)}px`;
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("input").value.trim();
  if (!text || running) return;
  at("input").value = "";
  grow();
  say(text);
});
at("input").addEventListener("input", grow);
at("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("form").requestSubmit();
  }
  if (event.key === "ArrowUp" && !at("input").value) {
    const mine = store.path().filter((node) => node.role === "user").pop();
    const box = mine && at("thread").querySelector(`[data-node="${mine.id}"]`);
    if (box) {
      event.preventDefault();
      edit(mine, box);
    }
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") { stop(); showSide(false); at("input").focus(); }
});
at("stop").addEventListener("click", stop);
at("new").addEventListener("click", () => { stop(); store.create(); showSide(false); show(); at("input").focus(); });
at("open-side").addEventListener("click", () => showSide(true));
at("close-side").addEventListener("click", () => showSide(false));
at("language").addEventListener("click", () => { otherLanguage(); if (!running) show(); });
at("theme").addEventListener("click", () => theme(dark() ? "light" : "dark"));
at("compare").addEventListener("change", compares);
at("key").addEventListener("change", loadModels);
at("system").addEventListener("change", () => { store.current.system = at("system").value; store.save(); });
for (const name of [...NUMBERS, "model", "second"]) at(name).addEventListener("change", keepSettings);
at("open-settings").addEventListener("click", () => {
  at("settings").hidden = !at("settings").hidden;
  at("open-settings").setAttribute("aria-expanded", String(!at("settings").hidden));
});

if (localStorage.getItem("theme")) theme(localStorage.getItem("theme"));
speak();
show();
loadModels().then(() => at("input").focus());
