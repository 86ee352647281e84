"use strict";
// Sort the headline table by a column; pinned rows stay on top, and missing values and runs that
// are not ranked at the bottom.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      const sign = descending ? -1 : 1;
      const key = (row) => row.cells[column].dataset.sort;
      const rows = [...body.rows].filter((row) => !("pinned" in row.dataset));
      const useless = (row) => row.classList.contains("unranked");
      rows.sort((a, b) => {
        if (useless(a) !== useless(b)) return useless(a) - useless(b);
        const x = key(a), y = key(b);
        if (x === "" || y === "") return (x === "") - (y === "");
        return sign * (column === 0 ? x.localeCompare(y) : Number(x) - Number(y));
      });
      rows.forEach((row) => body.append(row));
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    });
  });
}
// Paper has no clicks: print what is folded away, but not the configs.
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details:not(.run)")) part.open = true;
});
