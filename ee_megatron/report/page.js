"use strict";
(() => {
  const tip = document.getElementById("tip");
  let owner = null;

  const place = (left, top, bottom) => {
    const box = tip.getBoundingClientRect();
    const x = Math.min(Math.max(4, left), window.innerWidth - box.width - 4);
    const above = top - box.height - 8;
    tip.style.left = `${x}px`;
    tip.style.top = `${above < 4 ? bottom + 8 : above}px`;
  };

  const hide = () => {
    if (owner) owner.removeAttribute("aria-describedby");
    owner = null;
    tip.hidden = true;
  };

  const show = (element) => {
    if (owner !== element) hide();
    owner = element;
    tip.textContent = element.dataset.tip;
    tip.hidden = false;
    element.setAttribute("aria-describedby", "tip");
    // A token that is broken over two lines has several boxes; the first is where reading starts.
    const box = element.getClientRects()[0] || element.getBoundingClientRect();
    place(box.left + box.width / 2 - tip.offsetWidth / 2, box.top, box.bottom);
  };

  const target = (event) => (event.target instanceof Element ? event.target.closest("[data-tip]") : null);
  document.addEventListener("pointerover", (event) => {
    const element = target(event);
    if (element) show(element);
    else if (owner && owner !== document.activeElement) hide();
  });
  document.addEventListener("focusin", (event) => {
    const element = target(event);
    if (element) show(element);
    else hide();
  });
  document.addEventListener("focusout", hide);
  document.addEventListener("scroll", () => { if (owner) show(owner); }, { passive: true });

  // One tab stop per answer; the arrow keys walk its tokens.
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    const here = document.activeElement;
    if (!here || !here.classList.contains("t")) return;
    const all = [...here.parentElement.querySelectorAll(".t")];
    const at = all.indexOf(here);
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const next = all[to];
    if (!next) return;
    here.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  for (const group of document.querySelectorAll(".tokens")) {
    group.addEventListener("click", (event) => { const t = target(event); if (t) t.focus(); });
  }
})();
