"use strict";
// Makes the maps of the report answer to pointer, finger and keys: a tooltip for one cell and, under the maps of rows,
// a lens that shows the neighbouring rows of the layer one by one, since a cell may stand for several of them.
// The numbers come from the page's own JSON; nothing is fetched. Without this script all else stays readable.

(() => {
  const LENS_ROWS = 64;
  // The lens is drawn in units of the maps' view box, with its bars as wide as a map.
  const LENS = { width: 640, height: 164, left: 40, span: 456, middle: 78, gap: 7, bar: 52, words: 514 };
  const TYPES = { Uint8Array, Uint16Array, Uint32Array, Float32Array };
  const KEYS = "Arrow keys move the cursor, Home and End go to the ends of the line, Escape hides the tooltip.";

  // ---------------------------------------------------------------------------------------------- numbers and words

  function readJson(id) {
    const element = document.getElementById(id);
    return element && JSON.parse(element.textContent);
  }

  function unpack(column) {
    const text = atob(column.data);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i += 1) bytes[i] = text.charCodeAt(i);
    return new TYPES[column.type](bytes.buffer);
  }

  // Unpacks a column when it is first asked for: a large model has millions of numbers.
  function columnsOf(data) {
    const ready = new Map();
    return (name) => {
      if (!(name in data.columns)) return null;
      if (!ready.has(name)) ready.set(name, unpack(data.columns[name]));
      return ready.get(name);
    };
  }

  // Three significant digits, as the page writes numbers: 0.0123, −4.56 × 10⁻⁵.
  function format(value) {
    if (value === 0) return "0";
    const [digits, exponent] = value.toExponential(2).split("e");
    const power = Number(exponent);
    const plain = power >= -3 && power < 5;
    const text = plain ? String(Number(value.toPrecision(3))) : Number(digits) + "\u2009×\u200910";
    const raised = [...String(power)].map((sign) => (sign === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[Number(sign)])).join("");
    return text.replace("-", "−") + (plain ? "" : raised);
  }

  // One decimal, below 1 % two significant digits.
  const percent = (share) => `${share < 0.01 ? Number((100 * share).toPrecision(2)) : (100 * share).toFixed(1)}\u00a0%`;
  const whole = (count) => String(count).replace(/\B(?=(\d{3})+$)/g, count < 10000 ? "" : "\u202f");
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  // ------------------------------------------------------------------------------------------------------- elements

  function add(parent, name, className, text = "") {
    const element = document.createElement(name);
    element.className = className;
    element.textContent = text;
    parent.append(element);
    return element;
  }

  function draw(parent, name, attributes, text = "") {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.textContent = text;
    parent.append(element);
    return element;
  }

  // ------------------------------------------------------------------------------------------------------- tooltips

  // One tooltip a figure. `fill` shows lines for a place on the screen; `say` reads them to those who do not see it.
  function makeTooltip(figure) {
    const tip = add(figure, "div", "tip");
    const live = add(figure, "p", "hidden");
    live.setAttribute("role", "status");
    live.setAttribute("aria-live", "polite");
    tip.setAttribute("aria-hidden", "true");
    tip.hidden = true;
    const hide = () => (tip.hidden = true);
    return {
      hide,
      fill({ title, lines }, x, y) {
        tip.replaceChildren();
        add(tip, "b", "", title);
        for (const [name, value] of lines) {
          const line = add(tip, "div", "");
          add(line, "span", "", name);
          add(line, "span", "", value);
        }
        tip.hidden = false;
        // Beside the place, on the side with more room, and never outside of the page.
        const frame = figure.getBoundingClientRect();
        const room = document.documentElement.clientWidth;
        const left = x + 16 + tip.offsetWidth > room - 4 ? x - 16 - tip.offsetWidth : x + 16;
        const top = y - tip.offsetHeight - 12 < 4 ? y + 18 : y - tip.offsetHeight - 12;
        tip.style.left = `${clamp(left, 4, Math.max(room - tip.offsetWidth - 4, 4)) - frame.left}px`;
        tip.style.top = `${top - frame.top}px`;
      },
      say({ title, lines }) {
        live.textContent = [title, ...lines.map(([name, value]) => `${name} ${value}`)].join(", ");
      },
    };
  }

  // ----------------------------------------------------------------------------------------------------------- maps

  // Puts a layer over the cells of each panel of a figure. The cursor is one cell, the same in all panels;
  // `describe(column, line)` gives a cell's words, `onMove(column, line)` hears of every move.
  function makeMap(figure, columns, lines, start, describe, onMove) {
    const tip = makeTooltip(figure);
    const cursor = { column: start[0], line: start[1] };
    const panels = [...figure.querySelectorAll(".panel")].map((panel) => {
      const [left, top, width, height] = panel.dataset.place.split(" ");
      const hit = add(panel, "div", "hit");
      Object.assign(hit.style, { left: `${left}%`, top: `${top}%`, width: `${width}%`, height: `${height}%` });
      hit.tabIndex = 0;
      // An application: screen readers leave the arrow keys to us.
      hit.setAttribute("role", "application");
      hit.setAttribute("aria-label", `${panel.dataset.name}: ${columns} by ${lines} cells. ${KEYS}`);
      const mark = add(hit, "div", "cell");
      mark.hidden = true;
      return { hit, mark };
    });

    function place(hit, mark) {
      mark.scrollIntoView({ block: "nearest", inline: "nearest" });
      const box = hit.getBoundingClientRect();
      return [
        box.left + ((cursor.column + 0.5) / columns) * box.width,
        box.top + ((cursor.line + 0.5) / lines) * box.height,
      ];
    }

    function move(column, line, { at = null, aloud = false, quiet = false } = {}) {
      cursor.column = clamp(column, 0, columns - 1);
      cursor.line = clamp(line, 0, lines - 1);
      for (const { mark } of panels) {
        mark.hidden = false;
        Object.assign(mark.style, {
          left: `${(100 * cursor.column) / columns}%`,
          top: `${(100 * cursor.line) / lines}%`,
          width: `${100 / columns}%`,
          height: `${100 / lines}%`,
        });
      }
      if (!quiet) onMove(cursor.column, cursor.line);
      if (at === null) return;
      const words = describe(cursor.column, cursor.line);
      tip.fill(words, ...at());
      if (aloud) tip.say(words);
    }

    for (const { hit, mark } of panels) {
      const fromKeys = { at: () => place(hit, mark), aloud: true };
      const follow = (event) => {
        const box = hit.getBoundingClientRect();
        const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
        const line = Math.floor(((event.clientY - box.top) / box.height) * lines);
        move(column, line, { at: () => [event.clientX, event.clientY] });
      };
      hit.addEventListener("pointermove", follow);
      hit.addEventListener("pointerdown", follow);
      // A finger leaves whenever it is lifted; what it found stays until the next touch elsewhere.
      hit.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && tip.hide());
      hit.addEventListener("focus", () => hit.matches(":focus-visible") && move(cursor.column, cursor.line, fromKeys));
      hit.addEventListener("blur", tip.hide);
      hit.addEventListener("keydown", (event) => {
        const { column, line } = cursor;
        const targets = {
          ArrowLeft: [column - 1, line],
          ArrowRight: [column + 1, line],
          ArrowUp: [column, line - 1],
          ArrowDown: [column, line + 1],
          PageUp: [column - LENS_ROWS, line],
          PageDown: [column + LENS_ROWS, line],
          Home: [0, line],
          End: [columns - 1, line],
        };
        if (event.key === "Escape") tip.hide();
        if (event.ctrlKey || event.altKey || event.metaKey || !(event.key in targets)) return;
        event.preventDefault();
        move(...targets[event.key], fromKeys);
      });
    }
    document.addEventListener("pointerdown", (event) => figure.contains(event.target) || tip.hide());
    document.addEventListener("keydown", (event) => event.key === "Escape" && tip.hide());
    figure.querySelector(".hint")?.removeAttribute("hidden");
    return { move, cursor, hide: tip.hide };
  }

  // ----------------------------------------------------------------------------------------------------------- lens

  // The rows around the cursor as bars: high votes upwards, low votes downwards, on the maps' logarithmic scale.
  function makeLens(figure, data, votes, select, leave) {
    const count = Math.min(LENS_ROWS, data.rows);
    const step = LENS.span / count;
    const decades = Number(figure.dataset.decades);
    const holder = document.createElement("div");
    holder.className = "lens";
    figure.querySelector("figcaption").before(holder);
    const svg = draw(holder, "svg", {
      class: "loki-figure",
      viewBox: `0 0 ${LENS.width} ${LENS.height}`,
      width: "100%",
      "aria-hidden": "true",
    });
    const edge = [LENS.middle - LENS.gap, LENS.middle + LENS.gap];
    draw(svg, "text", { x: LENS.words, y: 36, class: "high" }, figure.dataset.high);
    draw(svg, "text", { x: LENS.words, y: LENS.middle + 4 }, data.columns.selected ? "• selected" : "");
    draw(svg, "text", { x: LENS.words, y: 128, class: "low" }, figure.dataset.low);
    for (const y of [edge[0] - LENS.bar, ...edge, edge[1] + LENS.bar]) {
      const outer = edge.includes(y) ? "" : " outer";
      draw(svg, "line", { x1: LENS.left, x2: LENS.left + LENS.span, y1: y, y2: y, class: `axis${outer}` });
    }
    draw(svg, "text", { x: LENS.left, y: edge[0] - LENS.bar - 5 }, `100\u202f% of ${data.words.entries}`);
    const title = draw(svg, "text", { x: LENS.left + LENS.span / 2, y: LENS.height - 4, "text-anchor": "middle" });
    const bars = Array.from({ length: count }, (_, i) => {
      const box = { x: LENS.left + (i + 0.1) * step, width: 0.8 * step };
      return {
        here: draw(svg, "rect", { ...box, y: edge[0] - LENS.bar, height: 2 * (LENS.bar + LENS.gap), class: "here" }),
        high: draw(svg, "rect", { ...box, class: "high" }),
        low: draw(svg, "rect", { ...box, class: "low" }),
        mark: draw(svg, "circle", { cx: LENS.left + (i + 0.5) * step, cy: LENS.middle, r: Math.min(step / 3, 2.6) }),
      };
    });
    let first = 0;
    let shownLayer = 0;

    // Whatever has a vote at all is seen; what has none is not.
    const length = (share) => (share ? LENS.bar * clamp(1 + Math.log10(share) / decades, 0.05, 1) : 0);

    function show(row, layer, keepWindow) {
      if (!keepWindow) first = clamp(row - count / 2, 0, data.rows - count) | 0;
      shownLayer = layer;
      title.textContent = `rows ${first} to ${first + count - 1} of layer ${layer}`;
      bars.forEach((bar, i) => {
        const cell = layer * data.rows + first + i;
        const [high, low] = [length(votes.high(cell)), length(votes.low(cell))];
        bar.high.setAttribute("y", edge[0] - high);
        bar.high.setAttribute("height", high);
        bar.low.setAttribute("y", edge[1]);
        bar.low.setAttribute("height", low);
        bar.mark.setAttribute("visibility", votes.selected(cell) ? "visible" : "hidden");
        bar.here.setAttribute("visibility", first + i === row ? "visible" : "hidden");
      });
    }

    const follow = (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * LENS.width - LENS.left;
      if (x < 0 || x >= LENS.span) return leave();
      const row = first + Math.floor(x / step);
      show(row, shownLayer, true);
      // Over the lens, not over its bars.
      return select(row, shownLayer, [event.clientX, box.top]);
    };
    svg.addEventListener("pointermove", follow);
    svg.addEventListener("pointerdown", follow);
    svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && leave());
    return show;
  }

  // -------------------------------------------------------------------------------------------------------- figures

  function rowsFigure(figure, data, column) {
    const kind = figure.dataset.votes;
    const share = (direction) => (cell) => column(`${kind}_${direction}`)[cell] / data.prompts;
    const bits = column("selected");
    const votes = {
      high: share("high"),
      low: share("low"),
      selected: (cell) => bits !== null && Boolean((bits[cell >> 3] >> (7 - (cell & 7))) & 1),
    };

    function describe(row, layer) {
      const cell = layer * data.rows + row;
      const voted = (direction) => {
        const count = column(`${kind}_${direction}`)[cell];
        return `${whole(count)} of ${whole(data.prompts)} ${data.words.entries} (${percent(count / data.prompts)})`;
      };
      const lines = [
        [figure.dataset.high, voted("high")],
        [figure.dataset.low, voted("low")],
        [`mean ${data.words.score}`, format(column("mean")[cell])],
      ];
      if (column("magnitude") !== null) lines.push(["mean magnitude", format(column("magnitude")[cell])]);
      if (column("stability") !== null) lines.push(["chosen in resamples", `${column("stability")[cell]}\u00a0%`]);
      if (bits !== null) lines.push(["selected", votes.selected(cell) ? "yes" : "no"]);
      return { title: `Layer ${layer}, row ${row}`, lines };
    }

    // At first, the row with most high votes.
    const counts = column(`${kind}_high`);
    let most = 0;
    for (let cell = 1; cell < counts.length; cell += 1) if (counts[cell] > counts[most]) most = cell;
    const start = [most % data.rows, Math.floor(most / data.rows)];
    let showLens = () => {};
    const map = makeMap(figure, data.rows, data.layers, start, describe, (row, layer) => showLens(row, layer, false));
    const select = (row, layer, at) => map.move(row, layer, { at: () => at, quiet: true });
    showLens = makeLens(figure, data, votes, select, map.hide);
    map.move(...start);
  }

  function subjectsFigure(figure, data) {
    const relative = unpack(data.relative);
    const describe = (layer, subject) => {
      const ratio = relative[subject * data.layers + layer];
      return {
        title: `${data.names[subject]}, layer ${layer}`,
        lines: [["of the layer’s mean", `${ratio.toFixed(2)}\u00a0×`]],
      };
    };
    makeMap(figure, data.layers, data.names.length, [0, 0], describe, () => {});
  }

  const rows = readJson("rows-data");
  const column = rows && columnsOf(rows);
  for (const figure of document.querySelectorAll("figure[data-kind=rows]")) rowsFigure(figure, rows, column);
  const subjects = readJson("subjects-data");
  for (const figure of document.querySelectorAll("figure[data-kind=subjects]")) subjectsFigure(figure, subjects);
})();
