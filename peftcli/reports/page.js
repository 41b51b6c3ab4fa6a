"use strict";
// Filters the examples; without script the list is simply whole, and the controls stay hidden.
(() => {
  const form = document.querySelector("#filter");
  if (form) {
    const rows = [...document.querySelectorAll("#examples > li")];
    const texts = rows.map((row) => row.textContent.toLowerCase());
    const told = form.querySelector("output");
    const apply = () => {
      const kind = form.elements.kind.value;
      const words = form.elements.words.value.trim().toLowerCase();
      let shown = 0;
      rows.forEach((row, index) => {
        const fits = (kind === "all" || row.dataset.kind.split(" ").includes(kind)) && texts[index].includes(words);
        row.hidden = !fits;
        shown += fits;
      });
      told.textContent = `${shown} of ${rows.length} shown`;
    };
    form.hidden = false;
    form.addEventListener("input", apply);
    form.addEventListener("submit", (event) => event.preventDefault());
    apply();
  }
  window.addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((part) => { part.open = true; });
  });
})();
