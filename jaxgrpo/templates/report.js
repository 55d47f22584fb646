"use strict";
// The browser of completions. Texts come from a model: they are only ever set as textContent.
const groups = JSON.parse(document.getElementById("data").textContent);
const form = document.getElementById("filter");
const list = document.getElementById("groups");
const more = document.getElementById("more");
const PAGE = 24; // groups
let limit = PAGE;

function element(tag, classes, text, ...children) {
  const made = document.createElement(tag);
  made.className = classes;
  made.textContent = text;
  made.append(...children);
  return made;
}

function offer(name, values) {
  for (const value of new Set(values)) form.elements[name].append(new Option(value, value));
}

/** The completions of a group that the filter lets through. */
function matching(group) {
  const wanted = (name, value) => {
    const chosen = form.elements[name]?.value;
    return !chosen || chosen === String(value);
  };
  const kind = form.elements.kind.value;
  if (!wanted("run", group.run) || !wanted("step", group.step)) return [];
  if (kind && !group.kinds.includes(kind)) return [];
  const part = form.elements.text.value.toLowerCase();
  return group.texts.filter(
    (each) => wanted("reason", each.reason) && each.text.toLowerCase().includes(part)
  );
}

function show() {
  const found = groups.map((group) => [group, matching(group)]).filter(([, texts]) => texts.length);
  const runs = new Set(groups.map((group) => group.run));
  const cards = found.slice(0, limit).map(([group, texts]) => {
    const head = element("p", "head", "",
      element("b", "", (runs.size > 1 ? `${group.run}, ` : "") + `step ${group.step}`),
      ...group.kinds.map((kind) => element("span", `kind ${kind}`, kind)),
      element("span", "", group.problem),
      element("span", "note", `mean reward ${group.mean}, standard deviation ${group.spread}`),
    );
    const rows = texts.map((each) => element("div", "completion", "",
      element("p", "", "",
        element("b", "reward", each.reward === null ? "no score" : each.reward.toFixed(2)),
        element("span", each.reason === "valid" ? "reason valid" : "reason", each.reason),
        element("span", "note", each.count > 1 ? `${each.count} times` : ""),
      ),
      element("pre", "", each.text),
    ));
    const left = group.left ? [element("p", "note", `${group.left} of ${group.n} left out`)] : [];
    return element("article", "group", "", head, ...rows, ...left);
  });
  list.replaceChildren(...cards);
  form.elements.count.value = `${found.length} of ${groups.length} groups`;
  more.hidden = found.length <= limit;
}

offer("step", groups.map((group) => group.step).sort((a, b) => a - b));
offer("reason", groups.flatMap((group) => group.texts.map((each) => each.reason)).sort());
form.addEventListener("input", () => {
  limit = PAGE;
  show();
});
form.addEventListener("submit", (event) => event.preventDefault());
more.addEventListener("click", () => {
  limit += PAGE;
  show();
});
form.hidden = false;
show();
