// Draws everything, and again when colours or sizes change. A reader of the page finds `data-report` when it is done.

{
  const redraws = [];
  const again = () => redraws.forEach((redraw) => redraw());
  for (const figure of document.querySelectorAll("figure.heat")) new HeatMap(figure);
  for (const group of document.querySelectorAll(".charts")) drawCharts(group, redraws);
  drawKeys(redraws);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  // Paper is white.
  addEventListener("beforeprint", () => {
    document.documentElement.dataset.print = "";
    again();
  });
  addEventListener("afterprint", () => {
    delete document.documentElement.dataset.print;
    again();
  });
  setTimeout(() => { document.documentElement.dataset.report = "drawn"; });
}
