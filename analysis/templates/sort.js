// Tables sort by the column whose heading is pressed, within the groups of their rows. Without this all stays readable.
for (const table of document.querySelectorAll("table")) {
  if (table.closest(".chain")) continue // a few runs
  const heads = table.tHead ? [...table.tHead.rows[table.tHead.rows.length - 1].cells] : []
  const key = (row, place) => {
    const cell = row.cells[place]
    const text = (cell.dataset.value ?? cell.textContent).trim().replace(/\u2212/g, "-").replace(/(\d),(?=\d{3})/g, "$1")
    const number = parseFloat(text)
    return Number.isNaN(number) ? text : number
  }
  const compare = (a, b) => {
    if (typeof a === typeof b) return typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true })
    return typeof a === "number" ? -1 : 1
  }
  heads.forEach((head, place) => {
    if (!head.textContent.trim() || [...table.tBodies].every(body => body.rows.length < 2)) return
    const button = document.createElement("button")
    button.type = "button"
    button.className = "sort"
    button.append(...head.childNodes)
    head.append(button)
    button.addEventListener("click", () => {
      // numbers begin with the highest, names with the first
      const names = place === 0
      const before = head.getAttribute("aria-sort")
      const down = before ? before === "ascending" : !names
      heads.forEach(other => other.removeAttribute("aria-sort"))
      head.setAttribute("aria-sort", down ? "descending" : "ascending")
      for (const body of table.tBodies) {
        const rows = [...body.rows].filter(row => !row.classList.contains("group"))
        const empty = row => { const cell = row.cells[place]; return cell.dataset.value === "" || cell.textContent.trim() === "\u2014" }
        rows.sort((a, b) => empty(a) - empty(b) || (down ? -1 : 1) * compare(key(a, place), key(b, place)))
        body.append(...rows)
      }
    })
  })
}
