"use strict";
// Draws each plot when it comes near the screen, in the colours of the reader's theme.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const config = { displaylogo: false, responsive: true, displayModeBar: false };
  const themed = (ink, line) => ({
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    "font.color": ink,
    "font.family": "system-ui, sans-serif",
    "font.size": 12,
    "xaxis.linecolor": line,
    "xaxis.showline": true,
    "yaxis.gridcolor": line,
  });
  const onScreen = () => {
    const css = getComputedStyle(document.documentElement);
    return themed(css.getPropertyValue("--soft").trim(), css.getPropertyValue("--line").trim());
  };
  const onPaper = () => themed("#5d6675", "#e3e1dc");
  const boxes = [...document.querySelectorAll(".plot")];
  const canvas = (box) => box.querySelector(".canvas");
  const draw = (box) => {
    if (box.dataset.drawn) return;
    box.dataset.drawn = "yes";
    const figure = JSON.parse(box.querySelector("script").textContent);
    Plotly.newPlot(canvas(box), figure.data, figure.layout, config);
    Plotly.relayout(canvas(box), onScreen());
  };
  const recolour = (theme) =>
    boxes.filter((box) => box.dataset.drawn).forEach((box) => Plotly.relayout(canvas(box), theme));
  const watcher = new IntersectionObserver(
    (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => draw(entry.target)),
    { rootMargin: "400px" }
  );
  boxes.forEach((box) => watcher.observe(box));
  addEventListener("beforeprint", () => {
    boxes.filter((box) => box.offsetParent).forEach(draw);
    recolour(onPaper());
  });
  addEventListener("afterprint", () => recolour(onScreen()));
  dark.addEventListener("change", () => recolour(onScreen()));
})();
// The sample browser: hides, shows and reorders what the page already holds; it never makes markup out of text.
(() => {
  const at = (id) => document.getElementById(id);
  const page = 12;
  const list = at("cards");
  const cards = [...list.children].map((card) => {
    const answers = [...card.querySelectorAll(".answer")];
    const text = (node) => node.querySelector(".text").textContent.toLowerCase();
    return { card, prompt: text(card), answers: answers.map((node) => ({ node, text: text(node) })) };
  });
  let shown = page;
  const update = () => {
    const words = at("search").value.trim().toLowerCase();
    const who = at("who").value;
    const order = at("order").value;
    const asked = (answer) => !who || answer.node.dataset.name === who;
    const gold = (item) => Math.max(...item.answers.filter(asked).map((answer) => Number(answer.node.dataset.gold)));
    const found = cards.filter(
      (item) => item.prompt.includes(words) || item.answers.some((answer) => asked(answer) && answer.text.includes(words))
    );
    if (order) found.sort((a, b) => (order === "up" ? gold(a) - gold(b) : gold(b) - gold(a)));
    cards.forEach((item) => {
      item.card.hidden = true;
      item.answers.forEach((answer) => (answer.node.hidden = !asked(answer)));
    });
    found.slice(0, shown).forEach((item) => (item.card.hidden = false));
    list.append(...found.map((item) => item.card));
    at("found").textContent = `${found.length} of ${cards.length} prompts`;
    at("more").hidden = found.length <= shown;
  };
  const again = () => {
    shown = page;
    update();
  };
  at("search").addEventListener("input", again);
  at("who").addEventListener("change", again);
  at("order").addEventListener("change", again);
  at("more").addEventListener("click", () => {
    shown += page;
    update();
  });
  at("bar").hidden = false;
  update();
})();
