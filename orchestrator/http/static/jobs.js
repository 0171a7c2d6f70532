// The queue, the newest pictures, the gallery, and one result with its recipe.

import { Fault, ask, element, find, result, telling } from "./api.js";
import * as canvas from "./canvas.js";
import * as form from "./form.js";

const PAGE = 48;
let shown = PAGE;
let open = null;  // {job, index}

function place(job) {
  if (job.state === "queued") return "waits";
  const doing = { text: "reads the prompt", denoise: `step ${job.step} of ${job.recipe.steps}`, vae: "decodes" };
  return doing[job.state] ?? job.state;
}

// Pictures that are being made, by job: the element stays while its source changes, so that nothing flickers.
const previews = new Map();

function preview(job) {
  if (job.state !== "denoise") return previews.get(job.id) ?? null;
  const image = previews.get(job.id) ?? element("img", { alt: "", hidden: true });
  previews.set(job.id, image);
  fetch(`/api/jobs/${encodeURIComponent(job.id)}/preview.jpg`).then(async (answer) => {
    if (answer.status !== 200) return;
    const before = image.src;
    image.src = URL.createObjectURL(await answer.blob());
    image.hidden = false;
    if (before) URL.revokeObjectURL(before);
  }).catch(() => {});
  return image;
}

// A row for a job; the same one as long as the job is there, so that no click falls between two of them.
function row(job) {
  const words = job.recipe.prompt.slice(0, 60) || job.id;
  return element("li", { "data-job": job.id },
    element("span", { class: "said" }, job.recipe.prompt || "(no prompt)"),
    element("progress", { max: job.recipe.steps, "aria-label": `Progress of ${words}` }),
    element("span", { class: "hint" }),
    element("button", { type: "button", "aria-label": `Cancel ${words}`,
      onclick: telling(() => ask(`jobs/${encodeURIComponent(job.id)}/cancel`, {})) }, "Cancel"));
}

export function drawQueue(jobs) {
  const there = new Map([...find("queue").children].map((item) => [item.dataset.job, item]));
  const rows = jobs.map((job) => {
    const item = there.get(job.id) ?? row(job);
    item.querySelector("progress").value = job.state === "vae" ? job.recipe.steps : job.step;
    item.querySelector(".hint").textContent = place(job);
    const image = preview(job);
    if (image && image.parentElement !== item) item.prepend(image);
    return item;
  });
  for (const id of previews.keys()) if (!jobs.some((job) => job.id === id)) previews.delete(id);
  replace(find("queue"), rows.length ? rows : [find("queue").querySelector(".nothing") ?? element("li", { class: "hint nothing" }, "Nothing waits.")]);
}

// Put items into a list unless they are there, in this order.
function replace(list, items) {
  if (items.length !== list.children.length || items.some((item, number) => item !== list.children[number])) list.replaceChildren(...items);
}

export function drawPictures(list, jobs) {
  const there = new Map([...list.children].map((item) => [item.dataset.key, item]));
  const items = jobs.flatMap((job) => Array.from({ length: job.recipe.num_images }, (_, index) => {
    const key = `${job.id}/${index}`;
    return there.get(key) ?? tile(job, index, key);
  }));
  replace(list, items);
}

function tile(job, index, key) {
  const words = job.recipe.prompt || "a result without a prompt";
  const picture = job.recipe.frames !== null
    ? element("video", { src: result(job, index), muted: true, loop: true, playsinline: true, "aria-label": words })
    : element("img", { src: result(job, index, "webp"), alt: words, loading: "lazy" });
  return element("li", { "data-key": key }, element("button", { type: "button", onclick: () => look(job, index) }, picture));
}

export async function drawGallery() {
  const jobs = await ask(`jobs?state=done&limit=${shown}`);
  drawPictures(find("pictures"), jobs.filter((job) => job.pictures));
  find("more").hidden = jobs.length < shown;
}

function look(job, index) {
  open = { job, index };
  const recipe = job.recipe;
  const video = recipe.frames !== null;
  find("shown").replaceChildren(video
    ? element("video", { src: result(job, index), controls: true, loop: true })
    : element("img", { src: result(job, index), alt: recipe.prompt || "a result without a prompt" }));
  find("download").href = result(job, index);
  find("use").hidden = video;
  const rows = { Prompt: recipe.prompt, "Negative prompt": recipe.negative_prompt, Size: `${recipe.width} × ${recipe.height}`, Steps: recipe.steps,
    Guidance: recipe.guidance, "CFG scale": recipe.cfg_scale, Seed: recipe.seed, LoRAs: recipe.loras.map((one) => `${one.name}@${one.weight}`).join(", "),
    Tier: recipe.tier, Job: job.id, Seconds: job.finished ? (job.finished - job.created).toFixed(1) : null };
  find("recipe").replaceChildren(...Object.entries(rows).filter(([, value]) => value !== null && value !== undefined && value !== "")
    .flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, String(value))]));
  find("detail").showModal();
}

export function listen() {
  const leave = (missing = "") => {
    find("detail").close();
    location.hash = "#make";
    find("prompt").focus();
    find("fault").hidden = !missing;
    find("fault").textContent = missing;
  };
  find("again").addEventListener("click", () => { leave(form.take(open.job.recipe)); });
  find("vary").addEventListener("click", () => { leave(form.take(open.job.recipe, false)); });
  find("use").addEventListener("click", telling(async () => {
    const answer = await fetch(result(open.job, open.index));
    if (!answer.ok) throw new Fault("This result is not here any more.");
    await canvas.use(await answer.blob());
    leave();
  }));
  find("more").addEventListener("click", telling(async () => { shown += PAGE; await drawGallery(); }));
}
