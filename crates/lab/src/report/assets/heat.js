// Heat maps: rows of a table, made from data. Long runs of rows with the same verdicts are one row until it is opened.

const LETTERS = { "on-time": "·", rearmed: "E", untold: "U", late: "L", unstable: "W", storm: "S", "clock-stepped": "C", lost: "N", ended: "X" };
// Rows shown at each end of a run, and the shortest run that is folded: what is wrong is folded later.
const SHOWN = 2;
const FOLDED = 8;
const FOLDED_WRONG = 40;
// No fold opens more rows at once, and no more are made before somebody asks.
const AT_ONCE = 1000;

function size([verdict, early, late, clock]) {
  if (verdict === "late") return span(late);
  if (verdict === "rearmed" || verdict === "storm") return String(early);
  if (verdict === "clock-stepped") return (clock > 0 ? "+" : "") + span(clock);
  return "";
}

function cell(outcome, ratio) {
  const [verdict, early, late, clock, ended] = outcome;
  const td = make("td", `cell v-${verdict}`, LETTERS[verdict]);
  const text = size(outcome);
  if (text) td.append(make("small", "", text));
  td.title = `×${ratio}: ${verdict}; ${late === null ? "no tick" : `${span(late)} late`}, ${early} early wakes, clock error ${minus(String(clock))} ns${ended ? `; ${ended}` : ""}`;
  return td;
}

class HeatMap {
  constructor(figure) {
    this.data = JSON.parse(figure.querySelector("script").textContent);
    this.table = figure.querySelector("table");
    this.cpus = this.data.rows.some(([, , cpu]) => cpu !== 0);
    this.function = null;
    this.parts = this.fold();
    figure.dataset.drawn = this.parts.reduce((sum, [from, to]) => sum + to - from, 0);
    this.more();
  }

  // What is shown as rows and what is folded: [from, to, folded].
  fold() {
    const { rows, outcomes } = this.data;
    const key = ([, , , , did]) => did.map((outcome) => outcomes[outcome][0]).join();
    const parts = [];
    const add = (from, to, folded) => {
      for (let at = from; at < to; at += AT_ONCE) parts.push([at, Math.min(at + AT_ONCE, to), folded]);
    };
    for (let from = 0; from < rows.length; ) {
      let to = from + 1;
      while (to < rows.length && key(rows[to]) === key(rows[from])) to += 1;
      const good = rows[from][4].every((outcome) => outcomes[outcome][0] === "on-time");
      if (to - from >= (good ? FOLDED : FOLDED_WRONG)) {
        add(from, from + SHOWN, false);
        add(from + SHOWN, to - SHOWN, true);
        add(to - SHOWN, to, false);
      } else {
        add(from, to, false);
      }
      from = to;
    }
    return parts;
  }

  // Makes rows until there are enough for now.
  more() {
    let made = 0;
    while (this.parts.length && made < AT_ONCE) {
      const [from, to, folded] = this.parts.shift();
      if (folded) this.folded(from, to);
      else this.table.append(this.body(from, to));
      made += folded ? 1 : to - from;
    }
    if (!this.parts.length) return;
    const left = this.parts.reduce((sum, [from, to]) => sum + to - from, 0);
    const button = make("button", "", `▸ ${left} more points`);
    const row = make("tr", "fold", this.wide(button));
    const body = make("tbody", "", row);
    button.onclick = () => {
      body.remove();
      this.more();
    };
    this.table.append(body);
  }

  wide(...children) {
    const td = make("td", "", ...children);
    td.colSpan = this.data.ratios.length + 3;
    return td;
  }

  body(from, to) {
    const body = make("tbody", "");
    for (let at = from; at < to; at += 1) body.append(...this.row(this.data.rows[at]));
    return body;
  }

  row([number, code, cpu, halted, did]) {
    const { code: list, outcomes, ratios } = this.data;
    const { address, function: name, offset, text, source } = list[code];
    const made = [];
    if (name !== this.function) {
      this.function = name;
      const heading = make("th", "", name);
      heading.colSpan = ratios.length + 3;
      heading.scope = "rowgroup";
      made.push(make("tr", "fn", heading));
    }
    const where = `${address} ${offset}`.trim();
    const asm = make("td", "asm", make("small", "", `${where}  `), text);
    if (halted) asm.append(make("small", "", "  (halted)"));
    if (this.cpus) asm.append(make("small", "", `  cpu ${cpu}`));
    made.push(make("tr", "", make("td", "n", number), ...did.map((outcome, index) => cell(outcomes[outcome], ratios[index])), asm, make("td", "src", source)));
    return made;
  }

  folded(from, to) {
    const { rows, code, outcomes } = this.data;
    const names = [...new Set(rows.slice(from, to).map(([, at]) => code[at].function))];
    const count = to - from;
    const label = (open) => `${open ? "▾" : "▸"} ${count} alike`;
    const button = make("button", "", label(false));
    button.setAttribute("aria-expanded", "false");
    const cells = rows[from][4].map((outcome) => make("td", `cell v-${outcomes[outcome][0]}`, LETTERS[outcomes[outcome][0]]));
    const what = make("td", "", button, make("small", "", names.slice(0, 3).join(", ") + (names.length > 3 ? `, and ${names.length - 3} more` : "")));
    what.colSpan = 2;
    const fold = make("tbody", "", make("tr", "fold", make("td", "n", `${rows[from][0]}–${rows[to - 1][0]}`), ...cells, what));
    const before = this.function;
    let inside = null;
    button.onclick = () => {
      const open = button.getAttribute("aria-expanded") !== "true";
      button.setAttribute("aria-expanded", String(open));
      button.textContent = label(open);
      if (!inside) {
        const after = this.function;
        this.function = before;
        inside = this.body(from, to);
        this.function = after;
        fold.after(inside);
      }
      inside.hidden = !open;
    };
    this.table.append(fold);
  }
}
