// Questions to /api, and small helpers for what is shown.

// `again`: the same may work in a moment.
export class Fault extends Error {
  constructor(words, again = false) {
    super(words);
    this.again = again;
  }
}

// A listener that says what went wrong, where the page says what the stack does.
export function telling(act) {
  return async (...given) => {
    try {
      await act(...given);
    } catch (fault) {
      if (!(fault instanceof Fault)) throw fault;
      find("state").textContent = fault.message;
    }
  };
}

export async function ask(path, body, method) {
  const options = { method: method ?? (body === undefined ? "GET" : "POST"), headers: {} };
  if (body !== undefined) {
    options.headers["content-type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let answer;
  try {
    answer = await fetch(`/api/${path}`, options);
  } catch {
    throw new Fault("Triptych gives no answer; it is asked again.", true);
  }
  if (answer.status === 204) return null;
  const found = parsed(await answer.text());
  if (!answer.ok) {
    const { message, hint } = found?.error ?? { message: `Answer ${answer.status}.`, hint: "" };
    throw new Fault(`${message} ${hint ?? ""}`.trim(), answer.status === 503 || answer.status === 429);
  }
  return found;
}

// Read an answer; seeds that are larger than the browser's numbers stay as they are written.
function parsed(text) {
  try {
    return JSON.parse(text, (key, value, context) => (key === "seed" && context?.source && !Number.isSafeInteger(value) && value !== null ? context.source : value));
  } catch {
    return null;
  }
}

// Submit a job until there is an answer: its id makes that harmless.
export async function submit(job) {
  const id = Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  for (let tries = 0; ; tries++) {
    try {
      return await ask("jobs", { ...job, id });
    } catch (fault) {
      if (!(fault instanceof Fault) || !fault.again || tries >= 20) throw fault;
      await new Promise((done) => setTimeout(done, 1000));
    }
  }
}

export function element(name, attributes = {}, ...inside) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...inside.filter((one) => one !== null && one !== undefined));
  return made;
}

export const find = (id) => document.getElementById(id);

export function size(bytes) {
  return bytes >= 1e9 ? `${(bytes / 1e9).toFixed(1)} GB` : bytes >= 1e6 ? `${(bytes / 1e6).toFixed(0)} MB` : `${(bytes / 1e3).toFixed(0)} kB`;
}

export function result(job, index, suffix) {
  const video = job.recipe.frames !== null;
  return `/api/jobs/${encodeURIComponent(job.id)}/results/${index}.${suffix ?? (video ? "mp4" : "png")}`;
}

export async function base64(blob) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(reader.error);
    reader.readAsDataURL(blob);
  });
}
