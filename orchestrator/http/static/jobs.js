// The queue, the newest pictures, the gallery, and one result with its recipe.

import { ask, element, find, result } from "./api.js";
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

export function drawQueue(jobs) {
  const rows = jobs.map((job) => element("li", { "data-job": job.id },
    preview(job),
    element("span", { class: "said" }, job.recipe.prompt || "(no prompt)"),
    element("progress", { max: job.recipe.steps, value: job.state === "vae" ? job.recipe.steps : job.step,
      "aria-label": `Progress of ${job.recipe.prompt.slice(0, 60) || job.id}` }),
    element("span", { class: "hint" }, place(job)),
    element("button", { type: "button", "aria-label": `Cancel ${job.recipe.prompt.slice(0, 60)}`, onclick: () => ask(`jobs/${encodeURIComponent(job.id)}/cancel`, {}) }, "Cancel")));
  for (const id of previews.keys()) if (!jobs.some((job) => job.id === id)) previews.delete(id);
  const list = find("queue");
  const focused = document.activeElement?.closest("[data-job]")?.dataset.job;
  list.replaceChildren(...(rows.length ? rows : [element("li", { class: "hint" }, "Nothing waits.")]));
  if (focused) list.querySelector(`[data-job="${CSS.escape(focused)}"] button`)?.focus();
}

export function drawPictures(list, jobs) {
  const there = new Map([...list.children].map((item) => [item.dataset.key, item]));
  const items = jobs.flatMap((job) => Array.from({ length: job.recipe.num_images }, (_, index) => {
    const key = `${job.id}/${index}`;
    return there.get(key) ?? tile(job, index, key);
  }));
  if (items.length !== list.children.length || items.some((item, number) => item !== list.children[number])) list.replaceChildren(...items);
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
  const leave = () => { find("detail").close(); location.hash = "#make"; find("prompt").focus(); };
  find("again").addEventListener("click", () => { form.take(open.job.recipe); leave(); });
  find("vary").addEventListener("click", () => { form.take(open.job.recipe, false); leave(); });
  find("use").addEventListener("click", async () => {
    const answer = await fetch(result(open.job, open.index));
    await canvas.use(await answer.blob());
    leave();
  });
  find("more").addEventListener("click", () => { shown += PAGE; drawGallery(); });
}
