// The page: ask about an image, compare two models, browse a run's answers. Texts of users, datasets and models become
// text nodes, never HTML.

const find = (id) => document.getElementById(id);
const [questions, filters, drop, browsed] = ["questions", "filters", "drop", "browsed"].map(find);
const info = await request("info").then((response) => response.json(), failed);
let image = null; // the file that is sent with each request
let browsedPage = 0;

function failed(error) {
  find("message").textContent = error.message;
  throw error;
}

// Return an element with children, which are elements and texts.
function element(tag, properties, ...children) {
  const created = Object.assign(document.createElement(tag), properties);
  created.append(...children);
  return created;
}

const line = (text) => element("p", { className: "small" }, text);
const note = (text, kind = "") => element("p", { className: `note ${kind}` }, text);
const percent = (value) => (value < 0.001 ? "< 0.1 %" : `${Math.min(100 * value, 99.9).toFixed(1)} %`);

// Fetch from the server; errors are sentences.
async function request(path, options) {
  let error = "the server cannot be reached";
  try {
    const response = await fetch(path, options);
    if (response.ok) return response;
    ({ error } = await response.json());
  } catch {}
  throw new Error(`${error[0].toUpperCase()}${error.slice(1)}.`);
}

// Show the elements that `load` returns, or its error; an earlier request for the same place is cancelled.
async function show(place, load) {
  place.controller?.abort();
  const { signal } = (place.controller = new AbortController());
  place.ariaBusy = "true";
  const content = await load(signal).catch((error) => [note(error.message, "error")]);
  if (signal.aborted) return;
  place.ariaBusy = "false";
  place.replaceChildren(...content);
}

async function setImage(file) {
  const shown = element("img", { src: URL.createObjectURL(file), alt: "the chosen image" });
  const decoded = await shown.decode().then(() => true, () => false);
  const tooLarge = file.size > 1e6 * info.limits.megabytes;
  let message = "";
  if (tooLarge) message = `The image has over ${info.limits.megabytes} MB; scale it down, or save it as a JPEG.`;
  else if (!decoded) message = `This is not an image in a supported format; send ${info.formats.join(", ")}.`;
  else drop.lastElementChild.replaceWith(shown);
  find("message").textContent = message;
  if (!message) image = file;
}

// Return a card for each question.
async function ask(model, signal) {
  const lines = questions.elements.text.value.split("\n").filter((text) => text.trim());
  const [method] = questions.elements.attribution.selectedOptions;
  if (!image) return [note("Drop an image first, or pick an example.")];
  if (!lines.length) return [note("Write a question about the image, one per line.")];
  const body = new FormData();
  body.append("image", image, "image");
  for (const text of lines) body.append("question", text);
  body.append("model", model);
  body.append("alternatives", Math.min(3, info.limits.alternatives));
  if (method.value) body.append("attribution", method.value);
  const { answers } = await (await request("answer", { method: "POST", body, signal })).json();
  return answers.map((answer) => {
    // Beam search may find an answer that is more probable than the greedy one.
    const ranked = [answer, ...answer.alternatives].sort((first, second) => second.probability - first.probability);
    const bars = ranked.length > 1 ? ranked.map((one) => bar(one, one === answer)) : [];
    const maps = answer.attribution ? [attributionMap(answer, method)] : [];
    return card(answer, answer.truncated ? "(truncated at max_new_tokens)" : "", bars, maps);
  });
}

// Return a question with its answer, `details` below and `figures` next to them.
function card({ question, text, probability }, mark, details, figures) {
  const known = probability === null ? "" : percent(probability);
  const answer = element("p", { className: "answer" }, text || "(no word)", element("small", {}, known, " ", mark));
  return element("article", {}, element("div", {}, line(question), answer, ...details), ...figures);
}

function bar({ text, probability }, best) {
  const part = element("i", {});
  part.style.width = `${100 * probability}%`;
  const [name, value] = [text || "(no word)", percent(probability)].map((one) => element("span", {}, one));
  return element("div", { className: best ? "bar best" : "bar" }, name, element("div", {}, part), value);
}

function attributionMap({ attribution, question }, { text, title }) {
  const shown = element("img", { src: `data:image/png;base64,${attribution}`, alt: `${text} map of: ${question}` });
  const legend = element("p", { className: "legend" }, "low", element("i", {}), "high");
  const meaning = `: ${title}; where it is low, the image is unchanged`;
  return element("figure", {}, shown, element("figcaption", {}, legend, element("b", {}, `${text} map`), meaning));
}

function browse(page) {
  show(browsed, async (signal) => {
    const query = new URLSearchParams([...new FormData(filters), ["page", page]]);
    const { answers, first, total, pages, ...found } = await (await request(`browse?${query}`, { signal })).json();
    browsedPage = found.page;
    find("previous").disabled = found.page === 0;
    find("next").disabled = found.page === pages - 1;
    if (!total) return [note("No answer passes these filters.")];
    const numbers = [first, first + answers.length - 1, total].map((number) => number.toLocaleString("en"));
    const tiles = element("div", { className: "tiles" }, ...answers.map(tile));
    return [line(`${numbers[0]} to ${numbers[1]} of ${numbers[2]} answers`), tiles];
  });
}

function tile(answer) {
  const { right, references, type, image_id: id, thumbnail } = answer;
  const word = right ? "right" : "wrong";
  const mark = right === null ? "" : element("b", { className: word }, word);
  const details = [`References: ${references.join(", ") || "not known"}`, type && `Type: ${type}`, `Image: ${id}`];
  const figures = thumbnail ? [element("img", { src: thumbnail, alt: `image ${id}` })] : [];
  return card(answer, mark, details.filter(Boolean).map(line), figures);
}

// --- the start, and events

const tab = () => ["browse", "compare"].find((name) => location.hash === `#${name}`) ?? "ask";

function showTab() {
  const missing = { browse: !info.question_types, compare: info.models.length < 2 };
  const shown = missing[tab()] ? `no-${tab()}` : tab();
  for (const one of document.querySelectorAll("[data-tabs]")) one.hidden = !one.dataset.tabs.split(" ").includes(shown);
  for (const link of document.querySelectorAll("nav a")) link.ariaCurrent = link.hash === `#${tab()}` ? "page" : null;
  if (shown === "browse") browse(browsedPage);
}

function submit(event) {
  event.preventDefault();
  const models = tab() === "compare" ? info.models : info.models.slice(0, 1);
  models.forEach((model, index) => show(places[index], (signal) => ask(model, signal)));
}

function takeFile(event, { files }) {
  if (!files.length) return;
  event.preventDefault();
  setImage(files[0]);
}

find("models").append(info.models.length > 1 ? "Models: " : "Model: ", element("b", {}, info.models.join(", ")));
find("formats").append(`${info.formats.join(", ")}, up to ${info.limits.megabytes} MB`);
filters.elements.type.append(...(info.question_types ?? []).map((type) => element("option", {}, type)));
const places = info.models.map((model, index) => {
  const place = element("div", {}, note("Answers appear here."));
  const section = element("section", {}, element("h2", {}, model), place);
  section.dataset.tabs = index ? "compare" : "ask compare";
  find("answers").append(section);
  return place;
});
info.examples.forEach((src, number) => {
  const onclick = async () => setImage(await (await request(`examples/${number}`).catch(failed)).blob());
  const properties = { type: "button", ariaLabel: `example ${number + 1}`, onclick };
  find("examples").append(element("button", properties, element("img", { src, alt: "" })));
});
drop.onchange = (event) => takeFile(event, event.target);
document.ondrop = (event) => takeFile(event, event.dataTransfer);
document.onpaste = (event) => takeFile(event, event.clipboardData);
document.ondragover = (event) => event.dataTransfer.types.includes("Files") && event.preventDefault();
questions.onsubmit = submit;
questions.elements.attribution.onchange = submit;
filters.onchange = () => browse(0);
find("previous").onclick = () => browse(browsedPage - 1);
find("next").onclick = () => browse(browsedPage + 1);
window.onhashchange = showTab;
showTab();
