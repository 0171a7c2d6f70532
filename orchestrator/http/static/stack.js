// The stack: GPUs with what lies on them, jobs, models, workers, failures, logs.

import { ask, element, find, size, telling } from "./api.js";

const STAGES = ["text", "denoise", "vae"];

export async function draw() {
  const [gpus, stack, workers, models, failed, done] = await Promise.all([
    ask("gpus"), ask("stack"), ask("workers"), ask("models"), ask("jobs?state=failed&limit=20"), ask("jobs?state=done&limit=200"),
  ]);
  find("gpus").replaceChildren(...(gpus.length ? gpus.map(bar) : [element("p", { class: "hint" }, "No GPU is leased: the stages work on the CPU, or in memory of their own.")]));
  const hour = done.filter((job) => job.finished > Date.now() / 1000 - 3600).length;
  const counts = { ...stack.counts, "done in the last hour": hour < done.length || hour < 200 ? hour : `${hour} and more` };
  find("counts").replaceChildren(...Object.entries(counts).map(([name, count]) => element("div", {}, element("dt", {}, name), element("dd", {}, String(count)))));
  table("models", ["Model", "Pipeline", "Type", "Workers", "Jobs", "Change"], models.map((model) => [
    model.name, model.pipeline, model.dtype, model.resting ? "rest" : "run", model.jobs, switching(model)]));
  table("workers", ["Worker", "Stage", "State", "Device", "Job", "Done", "Weights"], workers.workers.map((worker) => [
    worker.name, worker.stage, worker.state, worker.device, worker.job ?? "", worker.done,
    worker.residency.map((part) => `${part.component}: ${part.state}, ${size(part.device_bytes)}`).join("; ")]));
  find("failures").replaceChildren(...(failed.length ? failed.map((job) => element("li", {}, `${job.id}: ${job.reasons.at(-1) ?? "no reason was given"}`))
    : [element("li", { class: "hint" }, "None.")]));
  await logs();
}

function switching(model) {
  const act = async (event) => {
    event.target.disabled = true;
    event.target.blur();
    await ask(`models/${model.name}/${model.resting ? "load" : "unload"}`, {}).catch((fault) => { find("state").textContent = fault.message; });
    await draw();
  };
  return element("button", { type: "button", onclick: act, "aria-label": `${model.resting ? "Load" : "Unload"} ${model.name}` }, model.resting ? "Load" : "Unload");
}

function table(id, head, rows) {
  if (find(id).contains(document.activeElement)) return;  // somebody is about to press a button there
  find(id).replaceChildren(
    element("thead", {}, element("tr", {}, ...head.map((name) => element("th", { scope: "col" }, name)))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map((value) => element("td", {}, value instanceof Node ? value : String(value)))))));
}

function bar({ gpu, loads }) {
  const part = (kind, bytes, words) => element("span", { class: kind, style: `width: ${(100 * bytes) / gpu.budget}%`, title: `${words}, ${size(bytes)}` });
  const rows = loads.flatMap((load) => [part(load.stage, load.lease, `lease of ${load.worker}`), part("context", load.context, `context of ${load.worker}`)]);
  const words = loads.map((load) => `${load.worker}: ${size(load.lease)}${load.streamed ? `, ${size(load.streamed)} streamed` : ""}`);
  const name = `GPU ${gpu.index} of ${gpu.host}${gpu.name ? `: ${gpu.name}` : ""}, ${size(gpu.budget)}${gpu.used === null ? "" : `, ${size(gpu.used)} in use by the driver's count`}`;
  return element("div", {}, element("div", {}, name), element("div", { class: "bar", role: "img", "aria-label": `${name}. ${words.join("; ")}` }, ...rows),
    element("div", { class: "key" }, ...words.map((word) => element("span", {}, word))));
}

async function logs() {
  const select = find("log-name");
  const names = await ask("logs").catch(() => []);
  if ([...select.options].map((option) => option.value).join() !== names.join()) {
    const before = select.value;
    select.replaceChildren(...names.map((name) => element("option", { value: name, selected: name === before }, name)));
  }
  select.parentElement.querySelectorAll("#log, #log-name, label[for=log-name]").forEach((one) => { one.hidden = !names.length; });
  if (!select.value) return;
  const { text } = await ask(`logs/${encodeURIComponent(select.value)}`);
  const pre = find("log");
  if (pre.textContent === text) return;
  const atEnd = pre.scrollTop + pre.clientHeight >= pre.scrollHeight - 8;
  pre.textContent = text;
  if (atEnd) pre.scrollTop = pre.scrollHeight;
}

export function listen() {
  find("log-name").addEventListener("change", telling(logs));
}
