"use strict";
// Draws each plot when it comes near the screen, in the colours of the reader's theme.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const config = { displaylogo: false, responsive: true, displayModeBar: false };
  const theme = () => {
    const css = getComputedStyle(document.documentElement);
    const ink = css.getPropertyValue("--soft").trim();
    const line = css.getPropertyValue("--line").trim();
    return {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      "font.color": ink,
      "font.family": "system-ui, sans-serif",
      "font.size": 12,
      "xaxis.linecolor": line,
      "xaxis.showline": true,
      "yaxis.gridcolor": line,
    };
  };
  const draw = async (box) => {
    if (box.dataset.drawn) return;
    box.dataset.drawn = "yes";
    const figure = JSON.parse(box.querySelector("script").textContent);
    const target = box.querySelector(".canvas");
    await Plotly.newPlot(target, figure.data, figure.layout, config);
    await Plotly.relayout(target, theme());
  };
  const boxes = [...document.querySelectorAll(".plot")];
  const watcher = new IntersectionObserver(
    (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => draw(entry.target)),
    { rootMargin: "400px" }
  );
  boxes.forEach((box) => watcher.observe(box));
  addEventListener("beforeprint", () => boxes.forEach(draw));
  dark.addEventListener("change", () =>
    boxes.filter((box) => box.dataset.drawn).forEach((box) => Plotly.relayout(box.querySelector(".canvas"), theme()))
  );
})();
