"use strict";
// Draws the charts, sorts tables by a click on a heading, and filters them by a text.
(() => {
  const options = {
    ast: true,  // expressions are interpreted, since the page's policy forbids eval
    renderer: "svg",
    actions: { export: true, source: false, compiled: false, editor: false },
    tooltip: { theme: "custom" },
  };
  // Vega breaks no lines: what does not fit beside the rest of a legend would be cut off.
  const legendFits = (place) => {
    const edge = place.querySelector("svg").getBoundingClientRect().right + 1;
    return [...place.querySelectorAll(".role-legend")].every((one) => one.getBoundingClientRect().right <= edge);
  };
  const draw = async (place) => {
    const spec = JSON.parse(document.getElementById(place.dataset.chart).textContent);
    try {
      let drawn = await vegaEmbed(place, spec, options);
      while (spec.config.legend.columns > 1 && !legendFits(place)) {
        spec.config.legend.columns -= 1;
        drawn.finalize();
        drawn = await vegaEmbed(place, spec, options);
      }
      place.dataset.drawn = "yes";
    } catch (error) {
      place.textContent = "This plot could not be drawn.";
      console.error(error);
    }
  };

  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.sort === undefined ? cell.textContent.trim() : Number(cell.dataset.sort);
  };
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a - b;
    if (typeof a === "number") return 1;  // words among numbers stand for no value
    if (typeof b === "number") return -1;
    return a.localeCompare(b, "en", { numeric: true });
  };
  const sort = (table, heading, column) => {
    const first = heading.classList.contains("number") ? "descending" : "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = heading.getAttribute("aria-sort") === first ? other : first;
    for (const one of table.tHead.rows[0].cells) one.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", order);
    const body = table.tBodies[0];
    const sign = order === "ascending" ? 1 : -1;
    body.append(...[...body.rows].sort((a, b) => sign * compare(value(a, column), value(b, column))));
  };
  for (const table of document.querySelectorAll("table[data-sortable]")) {
    [...table.tHead.rows[0].cells].forEach((heading, column) => {
      const button = document.createElement("button");
      button.textContent = heading.textContent;
      button.title = "Sort by this column";
      heading.replaceChildren(button);
      button.addEventListener("click", () => sort(table, heading, column));
    });
  }

  for (const input of document.querySelectorAll("input[data-filters]")) {
    const rows = [...document.getElementById(input.dataset.filters).tBodies[0].rows];
    const matches = input.closest(".search").querySelector(".matches");
    input.addEventListener("input", () => {
      const wanted = input.value.trim().toLowerCase();
      let shown = 0;
      for (const row of rows) {
        row.hidden = !row.textContent.toLowerCase().includes(wanted);
        if (!row.hidden) shown += 1;
      }
      matches.textContent = wanted ? `${shown} of ${rows.length}` : "";
    });
  }

  // What is folded away would be missing on paper.
  const folds = [...document.querySelectorAll("details.fold")];
  addEventListener("beforeprint", () => { for (const fold of folds) fold.open = true; });

  const places = [...document.querySelectorAll("[data-chart]")];
  Promise.all(places.map(draw)).then(() => { document.documentElement.dataset.ready = "yes"; });
})();
