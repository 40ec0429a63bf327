"use strict";
(() => {
  const { labels, outcomes, problems } = JSON.parse(document.getElementById("difference-data").textContent);
  const field = (name) => document.getElementById(`d-${name}`);
  const PAGE = 10;
  const [RIGHT, TOKENS, DEPTH, PIECES, PLACES, GAP] = [0, 1, 2, 3, 4, 5];
  const signs = (text) => text.replace(/\n/g, "↵\n").replace(/\t/g, "⇥") || "∅";
  const whole = (answer) => (answer ? answer[PIECES].join("") : "");
  const sought = problems.map(([prompt, reference, answers]) => [prompt, reference, ...answers.map(whole)].join("\n").toLowerCase());
  let start = 0;

  const change = (a, b, key) => (a[key] === null || b[key] === null ? 0 : b[key] - a[key]);
  const rights = {
    any: () => true,
    lost: (a, b) => a[RIGHT] && !b[RIGHT],
    won: (a, b) => !a[RIGHT] && b[RIGHT],
    both: (a, b) => a[RIGHT] && b[RIGHT],
    none: (a, b) => !a[RIGHT] && !b[RIGHT],
  };
  const ways = { any: () => true, less: (d) => d < 0, more: (d) => d > 0, same: (d) => d === 0 };
  const orders = {
    asked: () => 0,
    deeper: ([, a, b], [, c, d]) => change(c, d, DEPTH) - change(a, b, DEPTH),
    shallower: ([, a, b], [, c, d]) => change(a, b, DEPTH) - change(c, d, DEPTH),
    longer: ([, a, b], [, c, d]) => change(c, d, TOKENS) - change(a, b, TOKENS),
    shorter: ([, a, b], [, c, d]) => change(a, b, TOKENS) - change(c, d, TOKENS),
  };

  const made = (name, text, css) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    if (css) element.className = css;
    return element;
  };

  const parting = (a, b) => {
    let at = 0;
    while (at < a[PIECES].length && a[PIECES][at] === b[PIECES][at]) at += 1;
    return at;
  };

  const column = (label, answer, parts) => {
    const box = made("div", undefined, "answer");
    const head = made("h4", `${label} `);
    const depth = answer[DEPTH] === null ? "–" : answer[DEPTH].toFixed(2);
    head.append(made("span", `depth ${depth} · ${answer[TOKENS]} tokens`, "note"), " ");
    head.append(answer[RIGHT] ? made("span", "✓ right", "verdict right") : made("span", "✗ wrong", "verdict wrong"));
    const text = made("p", undefined, "tokens");
    answer[PIECES].forEach((piece, i) => {
      if (i === answer[GAP]) text.append(made("span", ` … ${answer[TOKENS] - answer[PIECES].length} tokens … `, "note"));
      const token = made("span", signs(piece), `t k${answer[PLACES][i]}${i === parts ? " parts" : ""}`);
      token.dataset.tip = `depth ${outcomes[answer[PLACES][i]]} of ${outcomes[outcomes.length - 1]}`;
      text.append(token);
    });
    box.append(head, text);
    return box;
  };

  const chosen = () => {
    const [first, second] = [field("first"), field("second")].map((select) => labels.indexOf(select.value));
    const text = field("search").value.toLowerCase();
    const right = rights[field("right").value];
    const length = ways[field("length").value];
    const depth = ways[field("depth").value];
    const found = [];
    problems.forEach(([, , answers], place) => {
      const [a, b] = [answers[first], answers[second]];
      if (a && b && right(a, b) && length(change(a, b, TOKENS)) && depth(change(a, b, DEPTH))
          && sought[place].includes(text)) found.push([place, a, b]);
    });
    return found.sort(orders[field("order").value]);
  };

  const show = () => {
    const found = chosen();
    start = Math.max(0, Math.min(start, PAGE * Math.floor((found.length - 1) / PAGE)));
    const page = found.slice(start, start + PAGE);
    const range = page.length ? `; ${start + 1} to ${start + page.length} below` : "";
    field("count").textContent = `${found.length} of ${problems.length} problems${range}`;
    field("before").disabled = start === 0;
    field("after").disabled = start + PAGE >= found.length;
    field("list").replaceChildren(...page.map(([place, a, b]) => {
      const article = made("article");
      article.append(made("h3", problems[place][0], "prompt"));
      if (problems[place][1]) article.append(made("p", `Reference: ${problems[place][1]}`, "note reference"));
      const columns = made("div", undefined, "answers two");
      const parts = parting(a, b);
      columns.append(column(field("first").value, a, parts), column(field("second").value, b, parts));
      article.append(columns);
      return article;
    }));
  };

  const again = () => { start = 0; show(); };
  for (const name of ["first", "second", "right", "length", "depth", "order"]) field(name).addEventListener("change", again);
  field("search").addEventListener("input", again);
  const turn = (by) => () => {
    start += by * PAGE;
    show();
    field("count").scrollIntoView({ block: "start" });
  };
  field("before").addEventListener("click", turn(-1));
  field("after").addEventListener("click", turn(1));
  show();
})();
