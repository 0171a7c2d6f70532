// The form: what the chosen model takes, by its own description.

import { ask, element, find } from "./api.js";
import * as canvas from "./canvas.js";

let models = [];
let chosen = [];  // LoRAs: {name, weight}

const NUMBERS = { int: "1", float: "any" };

export async function load() {
  const before = find("model")?.value;
  models = await ask("models");
  if (models.length) show(models.find((one) => one.name === before)?.name ?? models[0].name);
  return models;
}

export const current = () => models.find((one) => one.name === find("model")?.value) ?? models[0];

function field(name, label, input, whole = false) {
  input.id = input.id || `field-${name}`;
  input.name = name;
  return element("label", { for: input.id, class: whole ? "whole" : "" }, label, input);
}

function number(name, label, value, options = {}) {
  return field(name, label, element("input", { type: "number", placeholder: value ?? "", ...options }));
}

// Show a model's parameters; what was typed stays where the model has it, too.
export function show(name) {
  const typed = values();
  const model = models.find((one) => one.name === name);
  const takes = model.description;
  const select = element("select", { id: "model", onchange: (event) => show(event.target.value) },
    ...models.map((one) => element("option", { value: one.name, selected: one.name === name }, one.name)));
  const rows = [field("model", "Model", select)];
  const further = [];
  if (takes.negative_prompt) further.push(field("negative_prompt", "Negative prompt", element("textarea", { rows: 2 }), true));
  rows.push(number("width", "Width", takes.width, { min: takes.size_multiple, step: takes.size_multiple }));
  rows.push(number("height", "Height", takes.height, { min: takes.size_multiple, step: takes.size_multiple }));
  rows.push(number("steps", "Steps", takes.steps, { min: 1 }));
  if (takes.guidance !== null) rows.push(number("guidance", "Guidance", takes.guidance, { step: "any" }));
  if (takes.cfg_scale !== null) further.push(number("cfg_scale", "CFG scale", takes.cfg_scale, { step: "any" }));
  rows.push(number("seed", "Seed", "any", { min: 0 }));
  if (takes.several) rows.push(number("num_images", model.video ? "Videos" : "Pictures", 1, { min: 1 }));
  if (takes.video) {
    rows.push(number("frames", "Frames", takes.video.frames, { min: 1, max: takes.video.max_frames }));
    rows.push(number("fps", "Frames a second", takes.video.fps, { min: 1, step: "any" }));
  }
  const task = takes.image ?? takes.inpaint;
  if (task?.strength !== null && task?.strength !== undefined) {
    rows.push(number("strength", "Strength", task.strength, { min: 0, max: 1, step: "any" }));
  }
  if (takes.max_sequence_length !== null) {
    further.push(number("max_sequence_length", "Prompt tokens", takes.max_sequence_length, { min: 1, max: takes.max_sequence_limit }));
  }
  for (const setting of takes.settings) further.push(settingOf(setting));
  find("parameters").replaceChildren(...rows);
  find("settings").replaceChildren(...further);
  find("further").hidden = !further.length;
  find("inputs").hidden = !task;
  find("image-label").textContent = takes.inpaint ? "Picture; paint a mask on it to repaint a part" : "Picture";
  canvas.masks(Boolean(takes.inpaint));
  fill(typed);
  showLoras(name);
}

function settingOf({ name, kind }) {
  const label = name.replaceAll("_", " ");
  if (kind === "bool") {
    const choices = ["", "true", "false"].map((value) => element("option", { value }, value || "as the model has it"));
    return field(`set:${name}`, label, element("select", { id: `set-${name}` }, ...choices));
  }
  const options = { id: `set-${name}`, type: NUMBERS[kind] ? "number" : "text", step: NUMBERS[kind] ?? null };
  return field(`set:${name}`, label, element("input", options));
}

async function showLoras(model) {
  const found = await ask(`loras?model=${encodeURIComponent(model)}`).catch(() => []);
  find("loras").hidden = !found.length;
  const choices = found.map((lora) => element("option", { value: lora.name }, lora.triggers ? `${lora.name}: ${lora.triggers}` : lora.name));
  find("lora-name").replaceChildren(element("option", { value: "" }, "…"), ...choices);
  chosen = chosen.filter((one) => found.some((lora) => lora.name === one.name));
  drawLoras();
}

export function addLora(name, weight = 1) {
  if (name && !chosen.some((one) => one.name === name)) chosen.push({ name, weight });
  drawLoras();
}

function drawLoras() {
  find("loras-chosen").replaceChildren(...chosen.map((one) => element("div", { class: "chosen" }, one.name,
    element("input", { type: "number", step: "0.05", value: one.weight, "aria-label": `Weight of ${one.name}`,
      oninput: (event) => { one.weight = Number(event.target.value); } }),
    element("button", { type: "button", "aria-label": `Remove ${one.name}`,
      onclick: () => { chosen = chosen.filter((other) => other !== one); drawLoras(); } }, "×"))));
}

// All that is typed into the parameters, as text.
function values() {
  const found = { prompt: find("prompt").value };
  for (const input of document.querySelectorAll(".parameters [name]")) if (input.value !== "") found[input.name] = input.value;
  return found;
}

function fill(typed) {
  for (const [name, value] of Object.entries(typed)) {
    const input = name === "prompt" ? find("prompt") : document.querySelector(`.parameters [name="${CSS.escape(name)}"]`);
    if (input && name !== "model") input.value = value ?? "";
  }
}

// The job that the form describes.
export async function job() {
  const job = { prompt: find("prompt").value, settings: {}, loras: chosen.map((one) => `${one.name}@${one.weight}`) };
  for (const [name, value] of Object.entries(values())) {
    if (name === "prompt") continue;
    if (name.startsWith("set:")) job.settings[name.slice(4)] = value;
    else if (name === "model") job.model = value || null;
    else if (name === "negative_prompt" || name === "seed") job[name] = value;  // a seed may be larger than a number
    else job[name] = Number(value);
  }
  if (!find("inputs").hidden) Object.assign(job, await canvas.given());
  return job;
}

// Fill the form by a recipe, so that it makes the same again, or with another seed where `seed` is false; what is missing
// for that is returned in words.
export function take(recipe, seed = true) {
  const model = models.find((one) => one.description.model === recipe.model && one.revision === recipe.revision)
    ?? models.find((one) => one.revision === recipe.revision);
  if (model) show(model.name);
  for (const input of document.querySelectorAll(".parameters [name]")) if (input.name !== "model") input.value = "";
  canvas.remove();
  const typed = { ...recipe, seed: seed ? recipe.seed : "" };
  for (const [name, value] of recipe.settings ?? []) typed[`set:${name}`] = Array.isArray(value) ? value.join(",") : String(value);
  for (const name of ["model", "settings", "loras", "images", "frames", "fps"]) if (!Number.isFinite(typed[name])) delete typed[name];
  fill(typed);
  chosen = (recipe.loras ?? []).map(({ name, weight }) => ({ name, weight }));
  drawLoras();
  if (!model) return "This recipe is of a model that is not here.";
  if (recipe.images?.length || recipe.mask) return "This began from a picture: choose it below for the same again.";
  return "";
}
