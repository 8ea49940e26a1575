// Pieces that renew themselves leave the reader in peace: not while something in them is open or
// being typed into, nor while nobody looks.  When the service does not answer, what was known stays.
"use strict";

(() => {
  const live = (element) => element?.matches?.("[data-live]");
  const isInUse = (element) =>
    element.querySelector("details[open]") !== null ||
    (element.contains(document.activeElement) && document.activeElement !== element);

  document.addEventListener("htmx:beforeRequest", (event) => {
    const element = event.detail.elt;
    if (live(element) && (document.hidden || isInUse(element))) event.preventDefault();
  });

  document.addEventListener("htmx:beforeSwap", (event) => {
    const element = event.detail.requestConfig?.elt;
    if (!live(element)) return;
    const failed = event.detail.xhr.status >= 400;
    if (failed) event.detail.shouldSwap = false;
    element.classList.toggle("is-stale", failed);
  });

  document.addEventListener("htmx:sendError", (event) => {
    if (live(event.detail.elt)) event.detail.elt.classList.add("is-stale");
  });

  // A question that was opened wants its first field filled in; Escape takes it back.
  document.addEventListener("toggle", (event) => {
    const question = event.target;
    if (!question.matches?.("details.sure") || !question.open) return;
    for (const other of document.querySelectorAll("details.sure[open]")) {
      if (other !== question) other.open = false;
    }
    question.querySelector("input:not([type=hidden])")?.focus();
  }, true);

  document.addEventListener("keydown", (event) => {
    const question = event.target.closest?.("details.sure[open]");
    if (event.key !== "Escape" || !question) return;
    question.open = false;
    question.querySelector("summary").focus();
  });
})();

// What is to be copied is copied by a press.
(() => {
  mgs.onContent((root) => {
    for (const button of mgs.every("[data-copy-from]", root)) {
      button.hidden = !navigator.clipboard;
    }
  });

  document.addEventListener("click", async (event) => {
    const button = event.target.closest?.("[data-copy-from]");
    if (!button) return;
    const text = document.getElementById(button.dataset.copyFrom).textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.querySelector("span").textContent = "Copied";
    } catch {
      mgs.toast("The browser does not let us copy: select the text.", "bad");
    }
  });
})();
