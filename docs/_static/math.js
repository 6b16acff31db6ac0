// Every equation of the page, TeX to MathML, with the KaTeX that stands beside this file.
document.addEventListener("DOMContentLoaded", () => {
  for (const el of document.querySelectorAll(".tex, .tex-display"))
    katex.render(el.textContent, el, {displayMode: el.classList.contains("tex-display"), output: "mathml", throwOnError: false});
});
