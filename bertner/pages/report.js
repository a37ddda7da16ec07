"use strict";
// Shows the sentences of a report: filters, pages, links, keys. All text goes in as text, never as
// markup. A sentence is what html_report.py wrote: an array, in the order of the names below.
(() => {
  const [NUMBER, LINE, DOCUMENT, WORDS, GOLD, PREDICTED, MATCHES, OTHER] = [0, 1, 2, 3, 4, 5, 6, 7];
  const PER_PAGE = 20;
  const CORRECT = 0; // the first kind

  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const count = (n) => n.toLocaleString("en");

  const make = (tag, properties = {}, ...children) => {
    const element = document.createElement(tag);
    const { data: dataset = {}, ...others } = properties;
    Object.assign(element, others);
    Object.assign(element.dataset, dataset);
    element.append(...children);
    return element;
  };

  // --- Dark and light ---

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const theme = $("theme");
  const isDark = () => (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
  const nameTheme = () => (theme.textContent = isDark() ? "Light colours" : "Dark colours");
  theme.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    nameTheme();
  });
  dark.addEventListener("change", nameTheme);
  nameTheme();
  theme.hidden = false;

  if (!data.splits.length) return;

  // --- What is shown ---

  const nothing = () => ({
    kinds: new Set(), types: new Set(), gold: null, predicted: null, low: 0, high: 1, text: "", models: "",
  });
  const allErrors = () => new Set([...data.kinds.keys()].filter((k) => k !== CORRECT));
  let filter = { ...nothing(), kinds: allErrors() };
  let split = 0;
  let shown = []; // sentences that pass the filter, in the order chosen
  let page = 0;
  let current = null; // number of the sentence that the keys stand at

  const entity = (sentence, side, index) => (index < 0 ? null : sentence[side][index]);
  const typeOf = (found) => (found ? found[2] : -1);
  const scoreOf = (found) => found?.[3] ?? null;
  const surface = (sentence, found) => sentence[WORDS].slice(found[0], found[1]).join(" ");

  // Whether a match passes, and whether it would if kinds, or types, did not matter.
  const judge = (sentence, [g, p, kind]) => {
    const gold = entity(sentence, GOLD, g), predicted = entity(sentence, PREDICTED, p);
    const score = scoreOf(predicted);
    const rest =
      (filter.gold === null || filter.gold === typeOf(gold)) &&
      (filter.predicted === null || filter.predicted === typeOf(predicted)) &&
      ((filter.low <= 0 && filter.high >= 1) || (score !== null && score >= filter.low && score <= filter.high));
    const kinds = !filter.kinds.size || filter.kinds.has(kind);
    const types = !filter.types.size || filter.types.has(typeOf(gold)) || filter.types.has(typeOf(predicted));
    return { passes: rest && kinds && types, forKind: rest && types, forType: rest && kinds };
  };
  const judgesMatches = () =>
    filter.kinds.size || filter.types.size || filter.gold !== null || filter.predicted !== null ||
    filter.low > 0 || filter.high < 1;

  const key = (found) => found.slice(0, 3).join();
  const numErrors = (sentence, side) => {
    const gold = new Set(sentence[GOLD].map(key)), found = new Set(sentence[side].map(key));
    return [...gold].filter((e) => !found.has(e)).length + [...found].filter((e) => !gold.has(e)).length;
  };
  const passesModels = (sentence) => {
    if (!filter.models) return true;
    if (!sentence[OTHER]) return false;
    if (filter.models === "differ")
      return sentence[PREDICTED].map(key).sort().join(";") !== sentence[OTHER].map(key).sort().join(";");
    const less = numErrors(sentence, OTHER) - numErrors(sentence, PREDICTED);
    return filter.models === "helped" ? less > 0 : less < 0;
  };

  // Lower case and single spaces, so that what is typed is found.
  const fold = (text) => text.toLowerCase().replace(/\s+/gu, " ");
  const passesText = (sentence, text) => !text || fold(sentence[WORDS].join(" ")).includes(text);

  const errorsOf = (sentence) => sentence[MATCHES].filter((match) => match[2] !== CORRECT);
  const ORDERS = {
    file: null,
    errors: (sentence) => -errorsOf(sentence).length,
    sure: (sentence) =>
      -Math.max(-1, ...errorsOf(sentence).map(([, p]) => scoreOf(entity(sentence, PREDICTED, p)) ?? -1)),
    unsure: (sentence) => Math.min(2, ...sentence[PREDICTED].map((found) => scoreOf(found) ?? 2)),
  };

  const update = (keepPage = false) => {
    const all = data.splits[split].sentences;
    const text = fold(filter.text.trim());
    const kinds = new Array(data.kinds.length).fill(0), types = new Array(data.types.length).fill(0);
    let numMatches = 0;
    shown = all.filter((sentence) => {
      if (!passesText(sentence, text) || !passesModels(sentence)) return false;
      let passes = !judgesMatches();
      for (const match of sentence[MATCHES]) {
        const verdict = judge(sentence, match);
        if (verdict.forKind) kinds[match[2]]++;
        if (verdict.forType) {
          const pair = [typeOf(entity(sentence, GOLD, match[0])), typeOf(entity(sentence, PREDICTED, match[1]))];
          for (const type of new Set(pair)) if (type >= 0) types[type]++;
        }
        if (verdict.passes) {
          numMatches++;
          passes = true;
        }
      }
      return passes;
    });
    const rank = ORDERS[$("filter-order").value];
    if (rank) {
      const ranks = new Map(shown.map((sentence) => [sentence, rank(sentence)]));
      shown.sort((a, b) => ranks.get(a) - ranks.get(b) || a[NUMBER] - b[NUMBER]);
    }
    if (!keepPage) page = 0;
    showChips("filter-kind", data.kinds, kinds, filter.kinds);
    showChips("filter-type", data.types, types, filter.types);
    showPair();
    render(numMatches);
  };

  // --- Filters ---

  const chip = (label, className, value, chosen) => {
    const box = make("input", { type: "checkbox", value });
    box.addEventListener("change", () => {
      box.checked ? chosen().add(value) : chosen().delete(value);
      update();
    });
    return make(
      "label", {}, box, make("span", { className: `swatch ${className}` }),
      make("bdi", { textContent: label }), make("span", { className: "count" }),
    );
  };
  const showChips = (id, names, counts, chosen) => {
    const labels = $(id).querySelectorAll("label");
    names.forEach((_, k) => {
      labels[k].querySelector("input").checked = chosen.has(k);
      labels[k].querySelector(".count").textContent = count(counts[k]);
    });
  };
  const showPair = () => {
    const name = (type) => (type === null ? "any" : type < 0 ? "none" : data.types[type]);
    $("pair").hidden = filter.gold === null && filter.predicted === null;
    $("pair").textContent = `Gold ${name(filter.gold)}, predicted ${name(filter.predicted)} ✕`;
    $("pair").setAttribute("aria-label", `Remove the filter ${$("pair").textContent.slice(0, -2)}`);
  };
  const setFilter = (changes) => {
    filter = { ...nothing(), ...changes };
    $("filter-text").value = filter.text;
    $("filter-low").value = filter.low;
    $("filter-high").value = filter.high;
    if ($("filter-models")) $("filter-models").value = filter.models;
    update();
  };
  const onlyErrors = () => setFilter({ kinds: allErrors() });
  const everything = () => setFilter({});

  const follow = (link) => {
    // A number in a table of one split leads to that split's sentences.
    const panel = link.closest("[data-split]");
    if (panel) selectSplit(splitIds.indexOf(panel.dataset.split));
    const index = (value) => (value === undefined ? null : Number(value));
    const { kind, gold, predicted } = link.dataset;
    setFilter({
      kinds: new Set(kind === undefined ? [] : [data.kinds.indexOf(kind)]),
      gold: index(gold), predicted: index(predicted),
    });
  };

  // --- Sentences ---

  // What cannot be seen, or turns round what is beside it, is spelt out.
  const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/u;
  const code = (char) => make("span", {
    className: "unseen", textContent: "U+" + char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0"),
  });
  const visible = (word) => {
    const isEmpty = !/[^\p{C}\p{Z}\p{M}]/u.test(word);
    const pieces = [];
    for (const char of word) {
      if (isEmpty || UNSEEN.test(char)) pieces.push(code(char));
      else if (typeof pieces.at(-1) === "string") pieces.push(pieces.pop() + char);
      else pieces.push(char);
    }
    return pieces;
  };

  // The mark over or under a word: its entity's colour; where that begins, its type.
  const bar = (side, k, entities, wrong) => {
    const index = entities.findIndex((found) => found[0] <= k && k < found[1]);
    if (index < 0) return make("i", { className: `bar ${side}`, ariaHidden: "true" });
    const [start, end, type] = entities[index], score = scoreOf(entities[index]);
    const classes = ["bar", side, "filled", `type-${type}`];
    if (k === start) classes.push("first");
    if (k === end - 1) classes.push("last");
    if (wrong.has(index)) classes.push("wrong");
    return make("i", {
      className: classes.join(" "), ariaHidden: "true",
      title: `${side}: ${data.types[type]}` + (score === null ? "" : `, confidence ${score.toFixed(2)}`),
      data: k === start ? { label: data.types[type] } : {},
    });
  };

  // A line of text in which no entity is marked on one side needs no room for marks there.
  const SIDES = ["gold", "predicted", "other"];
  const closeUp = () => {
    const without = SIDES.map((side) => `without-${side}`);
    const cells = [...$("list").querySelectorAll(".word")];
    for (const cell of cells) cell.classList.remove(...without);
    const lines = Map.groupBy(cells, (cell) => cell.offsetTop);
    for (const line of lines.values())
      SIDES.forEach((side, k) => {
        if (line.some((cell) => cell.querySelector(`.${side}.filled`))) return;
        for (const cell of line) cell.classList.add(without[k]);
      });
  };

  const wrongOther = (sentence) => {
    const gold = new Set(sentence[GOLD].map(key));
    return new Set(sentence[OTHER].flatMap((found, k) => (gold.has(key(found)) ? [] : [k])));
  };

  const textOf = (sentence) => {
    const errors = errorsOf(sentence);
    const wrongGold = new Set(errors.map((match) => match[0])), wrong = new Set(errors.map((match) => match[1]));
    const text = make("p", { className: "text", dir: "auto" });
    const hits = hitsIn(sentence);
    const other = sentence[OTHER] && wrongOther(sentence);
    const row = (side, k, index, wrong) =>
      sentence[index]?.length ? [bar(side, k, sentence[index], wrong)] : [];
    sentence[WORDS].forEach((word, k) => {
      text.append(make(
        "span", { className: "word" },
        ...row("gold", k, GOLD, wrongGold),
        make(hits.has(k) ? "mark" : "span", { className: "token" }, ...visible(word)),
        ...row("predicted", k, PREDICTED, wrong),
        ...row("other", k, OTHER, other),
      ), " ");
    });
    return text;
  };

  // Indices of the words that hold a part of what is searched for.
  const hitsIn = (sentence) => {
    const wanted = fold(filter.text.trim()), hits = new Set();
    if (!wanted) return hits;
    const words = sentence[WORDS].map(fold), text = words.join(" ");
    for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + 1)) {
      let begin = 0;
      words.forEach((word, k) => {
        if (begin < at + wanted.length && begin + word.length > at) hits.add(k);
        begin += word.length + 1;
      });
    }
    return hits;
  };

  const describe = (sentence, [g, p, kind]) => {
    const gold = entity(sentence, GOLD, g), predicted = entity(sentence, PREDICTED, p);
    const named = (found) => make(
      "span", {}, make("b", { textContent: data.types[found[2]] }), " ",
      make("q", { dir: "auto" }, ...visible(surface(sentence, found))),
    );
    const item = make(
      "li", { className: kind === CORRECT ? "correct visually-hidden" : "" },
      make("span", { className: `swatch kind-${kind}` }), make("span", { className: "kind", textContent: data.kinds[kind] }), " ",
    );
    if (kind === CORRECT) item.append(named(gold));
    else {
      if (gold) item.append("gold ", named(gold));
      if (gold && predicted) item.append(", ");
      if (predicted) item.append("predicted ", named(predicted));
    }
    const score = scoreOf(predicted);
    if (score !== null) item.append(make("span", { className: "score", textContent: `, confidence ${score.toFixed(2)}` }));
    return item;
  };

  const splitIds = data.splits.map((_, k) => `split-${k + 1}`);
  const anchor = (number) => (split ? `${splitIds[split]}-` : "") + `sentence-${number}`;
  const article = (sentence) => {
    const id = anchor(sentence[NUMBER]), errors = errorsOf(sentence).length;
    const others = sentence[OTHER] ? numErrors(sentence, OTHER) - numErrors(sentence, PREDICTED) : 0;
    const title = make(
      "h3", { id: `${id}-title` },
      make("a", { href: `#${id}`, textContent: `${count(sentence[NUMBER])}`, ariaLabel: `Sentence ${sentence[NUMBER]}` }),
    );
    const facts = [`line ${count(sentence[LINE])}`, `document ${count(sentence[DOCUMENT] + 1)}`];
    if (errors) facts.push(errors === 1 ? "1 error" : `${errors} errors`);
    if (others) facts.push(others > 0 ? "helped" : "hurt");
    const element = make(
      "article", { id, tabIndex: -1, data: { number: sentence[NUMBER] } },
      make("div", { className: "head" }, title, make("span", { className: "where", textContent: facts.join(" · ") })),
      textOf(sentence),
    );
    element.setAttribute("aria-labelledby", `${id}-title`);
    if (sentence[MATCHES].length)
      element.append(make("ul", { className: "matches" }, ...sentence[MATCHES].map((match) => describe(sentence, match))));
    return element;
  };

  const numPages = () => Math.max(1, Math.ceil(shown.length / PER_PAGE));
  const render = (numMatches) => {
    page = Math.min(page, numPages() - 1);
    const visibleOnes = shown.slice(page * PER_PAGE, (page + 1) * PER_PAGE);
    $("list").replaceChildren(...visibleOnes.map(article));
    closeUp();
    if (numMatches !== undefined) {
      const { total, name } = data.splits[split];
      const of = `${count(shown.length)} of ${count(total)} sentences` + (data.splits.length > 1 ? ` (${name})` : "");
      status = judgesMatches() ? `${of}, with ${count(numMatches)} matching entities` : of;
    }
    const where = `page ${count(page + 1)} of ${count(numPages())}`;
    $("status").textContent = shown.length ? `${status}; ${where}.` : "No sentence passes these filters.";
    $("position").textContent = where;
    $("paging").hidden = numPages() === 1;
    $("previous").disabled = page === 0;
    $("next").disabled = page === numPages() - 1;
    mark();
  };
  let status = "";

  // --- Getting about ---

  const mark = () => {
    for (const element of $("list").children)
      element.classList.toggle("current", Number(element.dataset.number) === current);
  };
  const stand = (number) => {
    current = number;
    mark();
    const element = $(anchor(number));
    element.focus({ preventScroll: true });
    element.scrollIntoView({ block: "nearest" });
  };
  const turn = (to) => {
    if (to < 0 || to >= numPages() || to === page) return false;
    page = to;
    render();
    $("status").scrollIntoView({ block: "start" });
    return true;
  };
  const move = (by) => {
    const at = shown.findIndex((sentence) => sentence[NUMBER] === current);
    const onPage = at >= 0 && Math.floor(at / PER_PAGE) === page;
    const to = onPage ? at + by : by > 0 ? page * PER_PAGE : Math.min((page + 1) * PER_PAGE, shown.length) - 1;
    if (to < 0 || to >= shown.length) return;
    turn(Math.floor(to / PER_PAGE));
    stand(shown[to][NUMBER]);
  };

  const selectSplit = (to) => {
    if (to !== split) {
      split = to;
      current = null;
      setFilter({ ...filter, gold: null, predicted: null });
    }
    for (const element of document.querySelectorAll("[data-split]"))
      element.hidden = element.dataset.split !== splitIds[split];
    const radio = document.querySelector(`input[name="split"][value="${splitIds[split]}"]`);
    if (radio) radio.checked = true;
  };

  const open = () => {
    const address = location.hash.slice(1);
    const [, id, number] = /^(?:(split-\d+)-)?sentence-(\d+)$/.exec(address) ?? [];
    if (!number) {
      const panel = $(address)?.closest(".split");
      if (panel?.hidden) {
        selectSplit(splitIds.indexOf(panel.dataset.split));
        $(address).scrollIntoView();
      }
      return;
    }
    const asked = id ? splitIds.indexOf(id) : 0;
    if (asked >= 0) selectSplit(asked);
    const is = (sentence) => sentence[NUMBER] === Number(number);
    if (asked < 0 || !data.splits[asked].sentences.some(is)) {
      $("status").textContent = `Sentence ${number} is not on this page.`;
      $("status").scrollIntoView();
      return;
    }
    if (!shown.some(is)) everything();
    turn(Math.floor(shown.findIndex(is) / PER_PAGE));
    stand(Number(number));
  };

  const KEYS = {
    j: () => move(1),
    k: () => move(-1),
    n: () => turn(page + 1),
    p: () => turn(page - 1),
    e: onlyErrors,
    a: everything,
    "/": () => $("filter-text").focus(),
    "?": () => {
      $("keys").open = !$("keys").open;
      if ($("keys").open) $("keys").querySelector("summary").focus();
    },
  };
  document.addEventListener("keydown", (event) => {
    if (event.target === $("filter-text") && event.key === "Escape") event.target.blur();
    const types = event.target.closest?.("input:not([type=checkbox], [type=radio]), select, textarea");
    if (types || event.ctrlKey || event.metaKey || event.altKey || !$("keys-on").checked) return;
    if (Object.hasOwn(KEYS, event.key)) {
      event.preventDefault();
      KEYS[event.key]();
    }
  });

  // --- Begin ---

  data.kinds.forEach((kind, k) => $("filter-kind").append(chip(kind, `kind-${k}`, k, () => filter.kinds)));
  data.types.forEach((type, k) => $("filter-type").append(chip(type, `type-${k}`, k, () => filter.types)));
  const listen = (id, event, action) => $(id)?.addEventListener(event, action);
  const share = (id, otherwise) => ($(id).value === "" ? otherwise : Number($(id).value));
  listen("filter-text", "input", () => { filter.text = $("filter-text").value; update(); });
  listen("filter-low", "input", () => { filter.low = share("filter-low", 0); update(); });
  listen("filter-high", "input", () => { filter.high = share("filter-high", 1); update(); });
  listen("filter-models", "change", () => { filter.models = $("filter-models").value; update(); });
  listen("filter-order", "change", () => update());
  listen("filters", "submit", (event) => event.preventDefault());
  listen("only-errors", "click", onlyErrors);
  listen("everything", "click", everything);
  listen("pair", "click", () => { filter.gold = filter.predicted = null; update(); $("everything").focus(); });
  listen("previous", "click", () => turn(page - 1));
  listen("next", "click", () => turn(page + 1));
  listen("splits", "change", (event) => selectSplit(splitIds.indexOf(event.target.value)));
  for (const link of document.querySelectorAll("a.filter")) link.addEventListener("click", () => follow(link));
  const hasScores = data.splits.some(({ sentences }) => sentences.some((s) => s[PREDICTED].some((found) => scoreOf(found) !== null)));
  $("filter-confidence").hidden = !hasScores;
  for (const id of ["splits", "filters", "keys"]) if ($(id)) $(id).hidden = false;
  update();
  selectSplit(0);
  addEventListener("hashchange", open);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (width !== (width = innerWidth)) closeUp();
  });
  open();
})();
