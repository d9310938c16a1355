"use strict";
(() => {
  const gallery = document.getElementById("gallery");
  const cards = [...document.querySelectorAll("#cards > li")];
  const choices = [...document.querySelectorAll("#controls select")];
  const count = document.getElementById("count");
  const none = document.getElementById("none");
  const mix = document.getElementById("mix");

  const choose = () => {
    let shown = 0;
    for (const card of cards) {
      card.hidden = !choices.every((choice) => !choice.value || card.dataset[choice.dataset.key] === choice.value);
      shown += !card.hidden;
    }
    count.textContent = `${shown} of ${cards.length} images`;
    none.hidden = shown > 0;
  };
  const blend = () => {
    gallery.style.setProperty("--mix", mix.value / 100);
    const value = Number(mix.value);
    const what = value === 0 ? "image" : value === 100 ? "heat map" : "image with heat map";
    mix.setAttribute("aria-valuetext", value % 50 ? `${what}, ${value} %` : what);
  };

  // The photograph stands in the file once, and below the heat by this.
  for (const card of cards) {
    const below = card.querySelector(".photo").cloneNode();
    below.alt = "";
    card.querySelector(".mixed").prepend(below);
  }
  document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
  choices.forEach((choice) => choice.addEventListener("change", choose));
  mix.addEventListener("input", blend);
  document.getElementById("reset").addEventListener("click", () => {
    choices.forEach((choice) => (choice.value = ""));
    choose();
    choices[0].focus();
  });
  // What lies folded is printed too.
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));
  choose(); // a browser may keep what was chosen before a reload
  blend();
})();
