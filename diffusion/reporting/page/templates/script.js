"use strict";

// Columns sort by a click on their heading: numbers by value, text as a person would; what is missing comes last.
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    if (heading.textContent === "") return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      body.append(...[...body.rows].sort((a, b) => compare(a.cells[column], b.cells[column], sign)));
    });
  });
}

function compare(a, b, sign) {
  const [p, q] = [a, b].map((cell) => cell.querySelector("data")?.value ?? cell.textContent.trim());
  const [isMissing, otherIsMissing] = [p, q].map((text) => text === "" || text === "–");
  if (isMissing || otherIsMissing) return isMissing - otherIsMissing;
  const [x, y] = [Number(p), Number(q)];
  const order = Number.isNaN(x) || Number.isNaN(y) ? p.localeCompare(q, undefined, { numeric: true }) : x - y;
  return sign * order;
}
