"use strict";
addEventListener("error", event => { document.documentElement.dataset.error = event.message; });
for (const episode of document.querySelectorAll(".episode")) {
  const { points, segments } = JSON.parse(episode.dataset.episode);
  const find = selector => episode.querySelector(selector);
  const [agent, trail, casing, slider, button] = [".agent", ".trail", ".casing", "input", "button"].map(find);
  const small = episode.querySelectorAll(".strip li");
  let timer = 0;

  function show(step) {
    const last = segments.length - 1;
    const index = segments.findIndex((segment, k) => step < segment.end || k === last);
    const { begin, end, stroke } = segments[index];
    const line = points.slice(begin, step + 1).join(" ");
    slider.value = step;
    find(".whole").style.display = "none";
    agent.setAttribute("cx", points[step][0]);
    agent.setAttribute("cy", points[step][1]);
    for (const part of [casing, trail]) part.setAttribute("points", line);
    trail.style.stroke = stroke;
    small.forEach((item, k) => item.classList.toggle("now", k === Math.min(index, small.length - 1)));
    find(".status").textContent =
      "step " + step + " of " + (points.length - 1) + ", segment " + (index + 1) + " of " + segments.length;
  }
  function stop() {
    clearInterval(timer);
    timer = 0;
    button.textContent = "Play";
  }
  function play() {
    if (+slider.value >= +slider.max) show(0);
    button.textContent = "Pause";
    timer = setInterval(() => {
      if (+slider.value >= +slider.max) stop();
      else show(+slider.value + 1);
    }, 180);
  }
  button.addEventListener("click", () => timer ? stop() : play());
  slider.addEventListener("input", () => { stop(); show(+slider.value); });
}
document.documentElement.dataset.ready = document.querySelectorAll(".episode").length;
