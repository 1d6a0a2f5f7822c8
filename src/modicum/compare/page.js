"use strict";
const body = document.querySelector("#results tbody");
const rows = [...body.rows];
const drawn = [...document.querySelectorAll(".plot [data-cell], .plot [data-base]")];
const baseOf = Object.fromEntries(rows.map((row) => [row.dataset.cell, row.dataset.base]));

/* sorting: a click on a title, once more turns it around; what has no number stays last */
for (const button of document.querySelectorAll("#results thead button")) {
  button.addEventListener("click", () => {
    const title = button.closest("th");
    const up = title.getAttribute("aria-sort") !== "ascending";
    for (const other of title.parentNode.cells) other.setAttribute("aria-sort", "none");
    title.setAttribute("aria-sort", up ? "ascending" : "descending");
    const numbers = title.classList.contains("number");
    const key = (row) => row.cells[title.cellIndex].dataset.value;
    rows.sort((one, other) => {
      const [a, b] = [key(one), key(other)];
      if (numbers && (a === "" || b === "")) return (a === "") - (b === "");
      return (up ? 1 : -1) * (numbers ? a - b : a.localeCompare(b, undefined, { numeric: true }));
    });
    body.append(...rows);
  });
}

/* one compression at a time, or all */
for (const choice of document.querySelectorAll("input[name=base]")) {
  choice.addEventListener("change", () => {
    const other = (base) => choice.value !== "" && base !== choice.value;
    for (const row of rows) row.hidden = other(row.dataset.base);
    for (const part of drawn) part.classList.toggle("off", other(part.dataset.base ?? baseOf[part.dataset.cell]));
    for (const figure of document.querySelectorAll("figure")) {
      figure.hidden = !figure.querySelector("[data-cell]:not(.off)");
    }
  });
}

/* the cell under the pointer stands out in every plot */
const light = (cell) => {
  for (const part of drawn) part.classList.toggle("lit", cell !== undefined && part.dataset.cell === cell);
  for (const plot of document.querySelectorAll(".plot")) {
    plot.classList.toggle("focus", plot.querySelector(".lit") !== null);
  }
};
for (const part of [...rows, ...drawn.filter((one) => one.dataset.cell !== undefined)]) {
  part.addEventListener("pointerenter", () => light(part.dataset.cell));
  part.addEventListener("pointerleave", () => light());
}
