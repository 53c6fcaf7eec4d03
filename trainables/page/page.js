"use strict";
/* Draws the figures of a page in the reader's colours, and shows a trial where one is clicked. */
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  // figures name their colours as on white; these are the same hues for a dark page (Okabe and Ito 2008)
  const NIGHT = {
    "#0072b2": "#56b4e9", "#d55e00": "#f08a4b", "#009e73": "#3cc99b", "#7b8590": "#8c97a3",
    "rgba(0,114,178,": "rgba(86,180,233,", "rgba(213,94,0,": "rgba(240,138,75,",
  };

  function template() {
    const css = getComputedStyle(document.documentElement);
    const [text, soft, line, card] = ["--text", "--soft", "--line", "--card"].map((name) => css.getPropertyValue(name).trim());
    const axis = { gridcolor: line, linecolor: line, zerolinecolor: line, tickcolor: line, automargin: true, title: { standoff: 8, font: { size: 12, color: soft } } };
    return {
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
        font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: text },
        colorway: ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442", "#7b8590", "#a6761d"]
          .map((colour) => (dark.matches && NIGHT[colour]) || colour),
        colorscale: { sequential: "Cividis" },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: text },
        hoverlabel: { bgcolor: card, bordercolor: line, font: { color: text }, align: "left" },
        legend: { font: { color: text }, bgcolor: "rgba(0,0,0,0)" },
        xaxis: axis, yaxis: axis, margin: { l: 12, r: 12, t: 16, b: 12 },
      },
    };
  }

  function draw(box) {
    let text = box.dataset.figure ?? box.querySelector("script").textContent;
    if (dark.matches) for (const [day, night] of Object.entries(NIGHT)) text = text.replaceAll(day, night);
    const figure = JSON.parse(text);
    figure.layout.template = template();
    let place = box.querySelector(".js-plotly-plot, .place");
    if (!place) {
      place = box.appendChild(document.createElement("div"));
      place.className = "place";
      place.style.height = "100%";
    }
    const fresh = !place.on;
    const touch = matchMedia("(pointer: coarse)").matches; // there a finger on a figure scrolls the page
    if (touch) figure.layout.dragmode = false;
    const options = { responsive: true, displaylogo: false, displayModeBar: !touch, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"] };
    return Plotly.react(place, figure.data, figure.layout, options).then(() => {
      if (!fresh) return;
      place.on("plotly_click", (event) => show(event.points[0].customdata));
      box.classList.add("drawn");
    });
  }

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); }
  }, { rootMargin: "600px" });
  document.querySelectorAll("main .plot").forEach((box) => seen.observe(box));
  dark.addEventListener("change", () => document.querySelectorAll(".plot.drawn").forEach(draw));
  addEventListener("beforeprint", () => document.querySelectorAll("main .plot:not(.drawn)").forEach(draw));

  // --- a trial ---
  const trials = JSON.parse(document.getElementById("trials").textContent);
  const dialog = document.getElementById("trial");

  function element(name, parent, text = "", kind = "") {
    const made = parent.appendChild(document.createElement(name));
    made.textContent = text;
    if (kind) made.className = kind;
    return made;
  }

  function list(parent, title, rows) {
    if (!rows.length) return;
    element("h3", parent, title);
    const dl = element("dl", parent);
    for (const [name, value] of rows) { element("dt", dl, name); element("dd", dl, value); }
  }

  function show(id) {
    const trial = typeof id === "string" && Object.hasOwn(trials, id) ? trials[id] : null;
    if (!trial) return;
    dialog.replaceChildren();
    const body = element("div", dialog, "", "body");
    const close = element("button", body, "×", "close");
    close.setAttribute("aria-label", "Close");
    close.addEventListener("click", () => dialog.close());
    element("h2", body, trial.title).id = "trial-title";
    element("p", body, trial.summary, "soft");
    list(body, "Scores", trial.scores);
    let box = null;
    if (trial.curve.length > 1) {
      element("h3", body, "Tune accuracy by epoch");
      box = element("div", body, "", "plot");
      box.style.height = "180px";
      box.dataset.figure = JSON.stringify({
        data: [{ type: "scatter", mode: "lines+markers", y: trial.curve, x: trial.curve.map((_, i) => i + 1), line: { color: "#0072b2" }, hovertemplate: "epoch %{x}: %{y:.2%}<extra></extra>" }],
        layout: { yaxis: { tickformat: ".0%" }, xaxis: { title: { text: "epoch" }, dtick: trial.curve.length > 12 ? undefined : 1 } },
      });
    }
    if (trial.error) { element("h3", body, "What happened"); element("pre", body, trial.error); }
    list(body, "Cost", trial.cost);
    list(body, "Configuration", trial.config);
    dialog.showModal();
    if (box) draw(box);
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button.trial");
    if (button) show(button.dataset.trial);
    else if (event.target === dialog) dialog.close();
  });

  // --- where the reader is ---
  const links = new Map();
  const bar = document.querySelector("nav .inner");
  for (const section of document.querySelectorAll("main section[id]")) {
    const link = element("a", bar, section.dataset.nav || section.querySelector("h2").textContent);
    link.href = `#${section.id}`;
    links.set(section, link);
  }
  const reading = new IntersectionObserver((entries) => {
    for (const entry of entries) links.get(entry.target).classList.toggle("here", entry.isIntersecting);
  }, { rootMargin: "-20% 0px -75%" });
  for (const section of links.keys()) reading.observe(section);
})();
