// The page: three views over /api. All that it knows comes from there, so that a reload or a restart loses nothing.

import { Fault, ask, base64, find, submit } from "./api.js";
import * as canvas from "./canvas.js";
import * as form from "./form.js";
import * as jobs from "./jobs.js";
import * as stack from "./stack.js";

const VIEWS = ["make", "gallery", "stack"];
const LOOKS = 10;  // at what the stack does, to one at its models
const PAUSE = { make: 700, gallery: 5000, stack: 2000 };
let models = [];
let timer = null;
let looks = 0;

const view = () => (VIEWS.includes(location.hash.slice(1)) ? location.hash.slice(1) : "make");

function turn() {
  for (const name of VIEWS) find(name).hidden = name !== view();
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === view()) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  look();
}

// Look at what the view shows, now and again after a pause; not while nobody looks at the page.
async function look() {
  clearTimeout(timer);
  const now = view();
  try {
    if (!models.length || (looks++ % LOOKS === 0 && (await changed()))) models = await form.load();
    if (now === "make") {
      const [queue, newest] = await Promise.all([ask("queue?limit=50"), ask("jobs?state=done&limit=12")]);
      jobs.drawQueue(queue);
      jobs.drawPictures(find("newest"), newest.filter((job) => job.pictures));
    } else if (now === "gallery") await jobs.drawGallery();
    else await stack.draw();
    say(models.length ? "" : "The stack is looking at its model.");
  } catch (fault) {
    if (!(fault instanceof Fault)) throw fault;
    say(fault.message);
  } finally {
    clearTimeout(timer);
    timer = setTimeout(() => (document.hidden ? null : look()), PAUSE[now]);
  }
}

// Return whether models have come or gone.
async function changed() {
  const names = (found) => found.map((model) => model.name).join();
  return names(await ask("models")) !== names(models);
}

function say(words) {
  if (find("state").textContent !== words) find("state").textContent = words;
}

function complain(words) {
  find("fault").hidden = !words;
  find("fault").textContent = words;
}

async function make(event) {
  event?.preventDefault();
  complain("");
  find("submit").disabled = true;
  try {
    await submit(await form.job());
    await look();
  } catch (fault) {
    if (!(fault instanceof Fault)) throw fault;
    complain(fault.message);
  } finally {
    find("submit").disabled = false;
  }
}

async function readRecipe(file) {
  complain("");
  try {
    const { recipe } = await ask("recipe", { image: await base64(file) });
    location.hash = "#make";
    complain(form.take(recipe));
  } catch (fault) {
    if (!(fault instanceof Fault)) throw fault;
    complain(fault.message);
  }
}

find("form").addEventListener("submit", make);
find("prompt").addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) make(event); });
find("lora-name").addEventListener("change", (event) => { form.addLora(event.target.value); event.target.value = ""; });
find("recipe-file").addEventListener("change", (event) => { if (event.target.files[0]) readRecipe(event.target.files[0]); event.target.value = ""; });
document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("drop"); });
document.addEventListener("dragleave", () => document.body.classList.remove("drop"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("drop");
  if (event.dataTransfer.files[0]) readRecipe(event.dataTransfer.files[0]);
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
addEventListener("hashchange", turn);
canvas.listen();
jobs.listen();
stack.listen();
turn();
