// The picture to begin from, and a mask painted on it.

import { Fault, base64, find, telling } from "./api.js";

let picture = null;  // an ImageBitmap
let file = null;  // as it was given
let painted = false;
let takesMask = false;
const mask = document.createElement("canvas");

export function masks(takes) {
  takesMask = takes;
  for (const id of ["brush", "mask-all", "mask-clear", "paint-hint"]) find(id).hidden = !takes;
  if (!takes) clear();
}

export async function use(blob) {
  picture = await createImageBitmap(blob).catch(() => { throw new Fault("This can't be read as a picture."); });
  file = blob;
  for (const canvas of [find("canvas"), mask]) Object.assign(canvas, { width: picture.width, height: picture.height });
  clear();
  find("painting").hidden = false;
}

export function remove() {
  picture = file = null;
  painted = false;
  find("painting").hidden = true;
  find("image-file").value = "";
}

export function clear() {
  painted = false;
  const context = mask.getContext("2d");
  context.fillStyle = "black";
  context.fillRect(0, 0, mask.width, mask.height);
  draw();
}

export function all() {
  const context = mask.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, mask.width, mask.height);
  painted = true;
  draw();
}

function draw() {
  if (!picture) return;
  const canvas = find("canvas");
  const context = canvas.getContext("2d");
  context.globalCompositeOperation = "source-over";
  context.drawImage(picture, 0, 0);
  if (!painted) return;
  const tint = document.createElement("canvas");
  Object.assign(tint, { width: mask.width, height: mask.height });
  const over = tint.getContext("2d");
  over.drawImage(mask, 0, 0);
  over.globalCompositeOperation = "multiply";
  over.fillStyle = "rgb(230 60 40)";
  over.fillRect(0, 0, tint.width, tint.height);
  context.globalCompositeOperation = "lighter";
  context.drawImage(tint, 0, 0);
}

function stroke(from, to) {
  const context = mask.getContext("2d");
  context.strokeStyle = "white";
  context.lineCap = "round";
  context.lineWidth = Number(find("brush").value) * scale();
  context.beginPath();
  context.moveTo(...from);
  context.lineTo(...to);
  context.stroke();
  painted = true;
  draw();
}

const scale = () => find("canvas").width / find("canvas").getBoundingClientRect().width;

function place(event) {
  const box = find("canvas").getBoundingClientRect();
  return [(event.clientX - box.left) * scale(), (event.clientY - box.top) * scale()];
}

export function listen() {
  const canvas = find("canvas");
  let last = null;
  canvas.addEventListener("pointerdown", (event) => {
    if (!takesMask) return;
    canvas.setPointerCapture(event.pointerId);
    last = place(event);
    stroke(last, last);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (last === null) return;
    const next = place(event);
    stroke(last, next);
    last = next;
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { last = null; });
  find("image-file").addEventListener("change", telling(async (event) => { if (event.target.files[0]) await use(event.target.files[0]); }));
  find("mask-all").addEventListener("click", all);
  find("mask-clear").addEventListener("click", clear);
  find("image-clear").addEventListener("click", remove);
}

// The job's fields for the picture and the mask.
export async function given() {
  if (!file) return {};
  const found = { images: [await base64(file)] };
  if (painted) found.mask = await base64(await new Promise((done) => mask.toBlob(done, "image/png")));
  return found;
}
