"use strict";
(() => {
  const MOST = 50; // images in the history
  const SIDE = 1280; // pixels of the largest side of the heat map
  const STORE = "recontrast-history";
  const find = (id) => document.getElementById(id);
  const pictures = new Map(); // entry of the history -> heat map and image, until the page is closed
  let detectors = [];
  let entries = [];
  let shown = null;

  // ---- the service ----------------------------------------------------------

  const headers = () => {
    const token = sessionStorage.getItem("recontrast-token");
    return token ? { Authorization: `Bearer ${token}` } : {};
  };
  const pause = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

  async function ask(path, options = {}) {
    for (let trial = 0; ; trial++) {
      const answer = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
      if (answer.status === 429 && trial < 5) {
        await pause(Number(answer.headers.get("Retry-After")) || 1);
        continue;
      }
      const content = await answer.json();
      if (answer.status === 401) showAccess(true);
      if (!answer.ok) throw new Error(content.error || `the service answered ${answer.status}`);
      return content;
    }
  }

  function showAccess(isNeeded) {
    find("access").hidden = !isNeeded;
    if (isNeeded) find("token").focus();
  }

  async function loadModel() {
    try {
      const model = await ask("/model");
      detectors = model.detectors;
      showAccess(false);
      const select = find("detector");
      const former = select.value;
      select.replaceChildren(...detectors.map((one) => new Option(one.name, one.name)));
      if (detectors.some((one) => one.name === former)) select.value = former;
      find("choice").hidden = detectors.length < 2;
      describe();
    } catch (error) {
      find("about").textContent = "The service does not say what runs.";
      say(error.message, true);
    }
  }

  const takesForms = (one) => Boolean(one && one.views && one.views.from !== "pages");
  const chosen = () => detectors.find((one) => one.name === find("detector").value);

  function describe() {
    const one = chosen();
    if (!one) return;
    const size = one.tile ? `tiles of ${one.tile} px` : `${one.size[1]} × ${one.size[0]} px`;
    const rate = one.calibration ? `decides at a promised false-alarm rate of ${format(100 * one.calibration.rate)} %` : "gives scores alone: it is not calibrated";
    const views = one.views ? `, parts with ${one.views.names.length} ${one.views.from === "pages" ? "pages" : `views (${one.views.names.slice(0, 8).join(", ")}${one.views.names.length > 8 ? ", …" : ""})`}` : "";
    find("about").textContent = `${one.name}: ${one.architecture} with ${one.backbone}, ${size}${views}; ${rate}.`;
    document.querySelector("h1").textContent = one.views ? "Inspect a part" : "Inspect an image";
    find("invitation").textContent = takesForms(one) ? "Drop all views of a part here, or of several parts" : "Drop an image here, or paste one";
    find("choose").textContent = takesForms(one) ? "Choose the images" : "Choose an image";
    find("photograph").hidden = takesForms(one); // which is one image
    const sentences = one.calibration ? one.calibration.promise : [];
    find("promise").replaceChildren(...sentences.map((text) => element("li", text)));
    find("promise-section").hidden = !sentences.length;
  }

  // ---- one image ------------------------------------------------------------

  // The views of a part are sent together: files whose names differ in the name of the view alone. An empty name leaves
  // it to the service to find the view.
  function groupFiles(files) {
    const one = chosen();
    if (!takesForms(one)) return files.map((file) => [{ file, view: "" }]);
    const parts = new Map();
    const names = one.views.names.map((name) => name.normalize("NFC"));
    try {
      const isAscii = names.every((name) => [...name].every((character) => character.codePointAt(0) < 128));
      // \w stands for letters of all languages in the service, and for those of ASCII in browsers.
      const pattern = isAscii ? new RegExp(one.views.from, "dg") : new RegExp(one.views.from.replaceAll("\\w", "[\\p{L}\\p{N}_]"), "dgu");
      for (const file of files) {
        const path = `/${file.webkitRelativePath || file.name}`.normalize("NFC"); // macOS decomposes names
        const spans = [...path.matchAll(pattern)].map((match) => match.indices[1]).filter((span) => span && span[1] > span[0]);
        const [start, stop] = spans.length ? spans[spans.length - 1] : [0, 0];
        const key = `${path.slice(0, start)}*${path.slice(stop)}`;
        const view = path.slice(start, stop);
        parts.set(key, [...(parts.get(key) || []), { file, view }]);
      }
    } catch { // an expression that the browser does not know: the service finds the views
      return [files.map((file) => ({ file, view: "" }))];
    }
    const order = ({ view }) => names.indexOf(view);
    return [...parts.values()].map((part) => part.sort((a, b) => order(a) - order(b)));
  }

  function toBody(part) {
    if (!takesForms(chosen())) return { body: part[0].file, headers: { "Content-Type": "application/octet-stream" } };
    const form = new FormData();
    for (const { file, view } of part) form.append(view, file, file.webkitRelativePath || file.name);
    return { body: form };
  }

  async function inspect(part) {
    const one = chosen();
    const file = part[0].file;
    if (!one) return say("The service has not said yet what runs.", true);
    say(`${file.name || "image"}: being inspected …`);
    find("drop").setAttribute("aria-busy", "true");
    try {
      const query = new URLSearchParams({ image: "overlay", inline: "true", side: SIDE, detector: one.name });
      const answer = await ask(`/predict?${query}`, { method: "POST", ...toBody(part) });
      const { image, ...result } = answer;
      const entry = { ...result, name: file.name || "image", time: Date.now(), thumbnail: await shrink(image) };
      pictures.set(entry, { overlay: image, original: URL.createObjectURL(file) });
      entries.unshift(entry);
      for (const old of entries.splice(MOST)) forget(old);
      save();
      show(entry);
      say(`${entry.name}: ${entry.decision || "score " + format(entry.score)}`);
    } catch (error) {
      say(`${file.name || "image"}: ${error.message}`, true);
    } finally {
      find("drop").removeAttribute("aria-busy");
    }
  }

  async function inspectAll(files) {
    for (const part of groupFiles([...files])) await inspect(part);
  }

  function shrink(source) {
    return new Promise((done) => {
      const image = new Image();
      image.onload = () => {
        const scale = Math.min(1, 112 / Math.min(image.naturalWidth, image.naturalHeight));
        const canvas = document.createElement("canvas");
        canvas.width = Math.max(1, Math.round(image.naturalWidth * scale));
        canvas.height = Math.max(1, Math.round(image.naturalHeight * scale));
        canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
        done(canvas.toDataURL("image/jpeg", 0.8));
      };
      image.onerror = () => done("");
      image.src = source;
    });
  }

  function show(entry) {
    shown = entry;
    const kept = pictures.get(entry);
    find("result").hidden = false;
    const decision = find("decision");
    decision.textContent = entry.decision === null ? "No decision" : entry.decision[0].toUpperCase() + entry.decision.slice(1);
    decision.className = entry.decision || "";
    find("score").textContent = entry.score === null ? "none" : format(entry.score);
    find("p-value").textContent = entry.p_value === null ? "none" : format(entry.p_value);
    find("threshold").textContent = entry.threshold === null ? "none" : format(entry.threshold);
    find("regions").textContent = entry.region_count === undefined ? "none" : entry.region_count;
    drawGauge(entry);
    find("meaning").textContent = explain(entry);
    const regions = (entry.regions || []).slice(0, 5);
    find("region-list").replaceChildren(...regions.map((region) => element("li",
      `${region.width} × ${region.height} px at ${region.left}, ${region.top}; peak ${format(region.peak)}`)));
    find("picture").src = kept ? kept.overlay : entry.thumbnail;
    find("picture").alt = `Heat map of ${entry.name}${entry.region_count ? `, ${entry.region_count} regions outlined` : ""}`;
    find("original").alt = entry.name;
    if (kept) find("original").src = kept.original; else find("original").removeAttribute("src");
    find("views").disabled = !kept;
    if (!kept) document.querySelector("[name=view][value=overlay]").checked = true;
    find("file-name").textContent = `${entry.name}, ${entry.width} × ${entry.height} px${kept ? "" : " (a small picture is kept)"}`;
    changeView();
    drawHistory();
  }

  function drawGauge(entry) {
    const gauge = find("gauge");
    gauge.hidden = entry.threshold === null || entry.score === null;
    gauge.className = entry.decision || "";
    if (gauge.hidden) return;
    find("level").style.width = `${Math.min(Math.max(50 * entry.score / entry.threshold, 0), 100)}%`;
    gauge.setAttribute("aria-label", `score ${format(entry.score)}, threshold ${format(entry.threshold)}`);
  }

  function explain(entry) {
    if (entry.decision === "undecided") return "The anomaly map is not finite: the image has no score. Look at it yourself.";
    if (entry.p_value === null) return "This detector is not calibrated: a higher score is more anomalous. The hottest colour is the highest value of this image.";
    return `Of good images, ${format(100 * entry.p_value)} % score at least as high. An image is called a defect if this is at most ${format(100 * entry.false_alarm_rate)} %.`;
  }

  function changeView() {
    const isOriginal = document.querySelector("[name=view]:checked").value === "original";
    find("original").hidden = !isOriginal;
    find("picture").hidden = isOriginal;
  }

  // ---- history --------------------------------------------------------------

  function drawHistory() {
    find("history-section").hidden = !entries.length;
    find("history").replaceChildren(...entries.map((entry) => {
      const button = element("button");
      button.type = "button";
      const image = element(entry.thumbnail ? "img" : "div");
      if (entry.thumbnail) { image.src = entry.thumbnail; image.alt = ""; } else image.className = "blank";
      const word = element("b", entry.decision || "scored");
      word.className = entry.decision || "";
      button.append(image, word, element("span", entry.score === null ? "no score" : format(entry.score)), element("span", entry.name));
      button.title = `${entry.name}, ${new Date(entry.time).toLocaleString()}`;
      if (entry === shown) button.setAttribute("aria-current", "true");
      button.addEventListener("click", () => { show(entry); focusHistory(entries.indexOf(entry)); });
      const item = element("li");
      item.append(button);
      return item;
    }));
  }

  function focusHistory(index) {
    const buttons = find("history").querySelectorAll("button");
    if (buttons[index]) buttons[index].focus();
  }

  function forget(entry) {
    const kept = pictures.get(entry);
    if (kept) URL.revokeObjectURL(kept.original);
    pictures.delete(entry);
  }

  function save() {
    try {
      localStorage.setItem(STORE, JSON.stringify(entries.map(({ regions, ...rest }) => ({ ...rest, regions: (regions || []).slice(0, 5) }))));
    } catch { // storage is full or forbidden: the history ends with the page
      say("The browser keeps no history.", true);
    }
  }

  function restore() {
    try {
      const stored = JSON.parse(localStorage.getItem(STORE) || "[]");
      if (Array.isArray(stored)) entries = stored.filter((one) => one && typeof one.name === "string" && "score" in one && /^(data:image\/jpeg|$)/.test(one.thumbnail)).slice(0, MOST);
    } catch { entries = []; }
    drawHistory();
  }

  // ---- small things ---------------------------------------------------------

  function element(name, text = "") {
    const made = document.createElement(name);
    made.textContent = text;
    return made;
  }
  const format = (number) => Number(Number(number).toPrecision(4)).toString();

  function say(text, isError = false) {
    find("message").textContent = text;
    find("message").className = isError ? "error" : "";
  }

  for (const id of ["file", "camera"]) {
    find(id).addEventListener("change", async (event) => {
      const files = [...event.target.files];
      event.target.value = ""; // the same file can be chosen again
      await inspectAll(files);
    });
  }
  const drop = find("drop");
  for (const kind of ["dragenter", "dragover"]) addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
  for (const kind of ["dragleave", "drop"]) addEventListener(kind, (event) => { event.preventDefault(); drop.classList.remove("over"); });
  addEventListener("drop", (event) => inspectAll(event.dataTransfer.files));
  addEventListener("paste", (event) => inspectAll(event.clipboardData.files));
  find("detector").addEventListener("change", describe);
  find("views").addEventListener("change", changeView);
  find("clear").addEventListener("click", () => {
    entries.forEach(forget);
    entries = [];
    save();
    drawHistory();
    find("file").focus();
  });
  find("history").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const buttons = [...find("history").querySelectorAll("button")];
    const next = buttons.indexOf(document.activeElement) + step;
    if (!step || !buttons[next]) return;
    event.preventDefault();
    buttons[next].click();
  });
  find("access").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem("recontrast-token", find("token").value);
    find("token").value = "";
    say("");
    loadModel();
  });
  restore();
  loadModel();
})();
