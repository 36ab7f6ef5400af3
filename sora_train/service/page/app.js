"use strict";

const find = (id) => document.getElementById(id);
const videos = new Map(); // by job: the URL of what was fetched
let key = sessionStorage.getItem("key") || "";

async function call(path, options = {}) {
  const headers = { Authorization: `Bearer ${key}`, ...options.headers };
  const answer = await fetch(path, { ...options, headers });
  if (!answer.ok) {
    const said = await answer.json().catch(() => ({}));
    const detail = typeof said.detail === "string" ? said.detail : "that can't be done";
    const error = new Error(detail);
    error.status = answer.status;
    throw error;
  }
  return answer;
}

function part(name, text, attributes = {}) {
  const element = document.createElement(name);
  if (text) element.textContent = text;
  for (const [attribute, value] of Object.entries(attributes)) element[attribute] = value;
  return element;
}

async function watch(job, item) {
  try {
    if (!videos.has(job.id)) {
      const blob = await (await call(`/api/jobs/${job.id}/video`)).blob();
      videos.set(job.id, { url: URL.createObjectURL(blob), image: blob.type.startsWith("image/") });
    }
    const { url, image } = videos.get(job.id);
    const place = item.querySelector(".video");
    if (image) place.replaceChildren(part("img", "", { src: url, alt: job.prompt }));
    else place.replaceChildren(part("video", "", { src: url, controls: true, loop: true, muted: true, autoplay: true }));
    place.append(part("a", "Download", { href: url, download: `${job.id}.${image ? "png" : "mp4"}` }));
  } catch (error) {
    item.querySelector(".state").textContent = error.message;
  }
}

async function report(job, item) {
  const text = prompt("Describe the problem with this video.");
  if (!text) return;
  try {
    await call(`/api/jobs/${job.id}/report`, {
      method: "POST", body: JSON.stringify({ text }), headers: { "Content-Type": "application/json" },
    });
    item.querySelector(".state").textContent = "reported, thank you";
  } catch (error) {
    item.querySelector(".state").textContent = error.message;
  }
}

function item(job) {
  const found = part("li");
  found.id = `job-${job.id}`;
  found.append(part("div", job.prompt), part("div", "", { className: "state" }), part("progress", "", { max: 1 }),
    part("div", "", { className: "video" }));
  const cancel = part("button", "Cancel", { type: "button", className: "cancel" });
  cancel.onclick = () => call(`/api/jobs/${job.id}`, { method: "DELETE" }).then(refresh, refresh);
  const problem = part("button", "Report a problem", { type: "button", className: "report" });
  problem.onclick = () => report(job, found);
  found.append(cancel, " ", problem);
  return found;
}

function show(job) {
  let found = find(`job-${job.id}`);
  if (!found) {
    found = item(job);
    const rows = find("jobs");
    const after = [...rows.children].find((row) => Number(row.dataset.made) < job.made);
    found.dataset.made = job.made;
    rows.insertBefore(found, after || null);
  }
  if (found.dataset.state === job.state && job.state !== "running" && job.state !== "queued") return;
  found.dataset.state = job.state;
  const waiting = job.state === "queued" ? `, ${job.ahead} before it` : "";
  found.querySelector(".state").textContent = `${job.state}${waiting}${job.message ? `: ${job.message}` : ""}`;
  const open = job.state === "queued" || job.state === "running";
  found.querySelector("progress").value = job.progress;
  found.querySelector("progress").hidden = !open;
  found.querySelector(".cancel").hidden = !open;
  if (job.state === "done") watch(job, found);
}

async function refresh() {
  const me = await (await call("/api/me")).json();
  find("me").textContent = `${me.name}: ${me.seconds_left_today.toFixed(1)} of ${me.seconds_per_day} seconds left today`;
  find("seconds").max = me.most_seconds;
  find("contact").textContent = me.contact ? `Contact: ${me.contact}` : "";
  for (const job of await (await call("/api/jobs")).json()) show(job);
}

async function enter() {
  try {
    await refresh();
    sessionStorage.setItem("key", key);
    find("door").hidden = true;
    find("inside").hidden = false;
    setTimeout(poll, 1000);
  } catch (error) {
    leave(error.message);
  }
}

function leave(message) {
  sessionStorage.removeItem("key");
  find("door").hidden = false;
  find("inside").hidden = true;
  find("door-message").textContent = message;
}

async function poll() {
  try {
    await refresh();
  } catch (error) {
    if (error.status === 401) return leave(error.message);
  }
  setTimeout(poll, 1500);
}

async function uploaded(file) {
  const answer = await call("/api/uploads", {
    method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" },
  });
  return { [file.type.startsWith("video/") ? "video" : "image"]: (await answer.json()).id };
}

find("door").onsubmit = (event) => {
  event.preventDefault();
  key = find("key").value.trim();
  enter();
};

find("wish").onsubmit = async (event) => {
  event.preventDefault();
  find("wish-message").textContent = "";
  try {
    const wish = { prompt: find("prompt").value, seed: Number(find("seed").value) };
    if (find("seconds").value) wish.seconds = Number(find("seconds").value);
    const [file] = find("given").files;
    if (file) Object.assign(wish, await uploaded(file));
    await call("/api/jobs", {
      method: "POST", body: JSON.stringify(wish), headers: { "Content-Type": "application/json" },
    });
    await refresh();
  } catch (error) {
    find("wish-message").textContent = error.message;
  }
};

if (key) enter();
