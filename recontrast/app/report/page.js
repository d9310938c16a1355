"use strict";
(() => {
  const gallery = document.getElementById("gallery");
  const cards = [...document.querySelectorAll("#cards > li")];
  const selects = [...document.querySelectorAll("#controls select")];
  const count = document.getElementById("count");
  const noMatch = document.getElementById("none");
  const mix = document.getElementById("mix");

  const filter = () => {
    let shown = 0;
    for (const card of cards) {
      card.hidden = !selects.every((select) => !select.value || card.dataset[select.dataset.key] === select.value);
      shown += !card.hidden;
    }
    count.textContent = `${shown} of ${cards.length} images`;
    noMatch.hidden = shown > 0;
  };
  const blend = () => {
    gallery.style.setProperty("--mix", mix.value / 100);
    const value = Number(mix.value);
    const label = value === 0 ? "image" : value === 100 ? "heat map" : "image with heat map";
    mix.setAttribute("aria-valuetext", value % 50 ? `${label}, ${value} %` : label);
  };

  // The file stores each photograph once; copy it below the heat map.
  for (const card of cards) {
    const photo = card.querySelector(".photo");
    if (!photo) continue; // the picture could not be read
    const below = photo.cloneNode();
    below.alt = "";
    card.querySelector(".mixed").prepend(below);
  }
  document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
  selects.forEach((select) => select.addEventListener("change", filter));
  mix.addEventListener("input", blend);
  document.getElementById("reset").addEventListener("click", () => {
    selects.forEach((select) => (select.value = ""));
    filter();
    selects[0].focus();
  });
  // Open collapsed sections for printing.
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((details) => (details.open = true)));
  filter(); // browsers can restore selections after a reload
  blend();
})();
