// The form that makes pictures: sliders, drag and drop, fields that grow.
"use strict";

(() => {
  const { every, onContent } = window.mgs;

  // A slider beside each number that has both ends; the number is what is sent.
  function addSliders(root) {
    for (const box of every("[data-slider]", root)) {
      const number = box.querySelector("input[type=number]");
      if (!number || box.querySelector("input[type=range]")) continue;
      const slider = document.createElement("input");
      slider.type = "range";
      slider.min = number.min;
      slider.max = number.max;
      slider.step = number.step;
      slider.value = number.value;
      slider.tabIndex = -1; // the number beside it takes the arrow keys, too
      slider.setAttribute("aria-hidden", "true");
      slider.addEventListener("input", () => {
        number.value = slider.value;
        number.dispatchEvent(new Event("input", { bubbles: true }));
      });
      number.addEventListener("input", () => {
        slider.value = number.value;
      });
      box.prepend(slider);
    }
  }

  // Texts grow with what is in them, where the browser does not see to it by itself.
  const growsByItself = CSS.supports("field-sizing", "content");

  function grow(field) {
    field.style.height = "auto";
    field.style.height = `${field.scrollHeight + 2}px`;
  }

  function addGrowth(root) {
    if (growsByItself) return;
    for (const field of every("textarea[data-grow]", root)) {
      field.addEventListener("input", () => grow(field));
      grow(field);
    }
  }

  // Pictures: dropped ones are as if they were chosen.
  function addDrops(root) {
    for (const box of every("[data-drop]", root)) {
      const file = box.querySelector("input[type=file]");
      const over = (is) => box.classList.toggle("is-over", is);
      box.addEventListener("dragover", (event) => {
        event.preventDefault();
        over(true);
      });
      box.addEventListener("dragleave", () => over(false));
      box.addEventListener("drop", (event) => {
        event.preventDefault();
        over(false);
        const dropped = [...event.dataTransfer.files];
        if (!dropped.length) return;
        const taken = new DataTransfer();
        for (const one of file.multiple ? dropped : dropped.slice(0, 1)) taken.items.add(one);
        file.files = taken.files;
        file.dispatchEvent(new Event("change", { bubbles: true }));
      });
    }
  }

  document.addEventListener("htmx:afterRequest", (event) => {
    const file = event.detail.elt;
    if (file.matches?.("input[type=file]")) {
      file.value = ""; // it was sent ahead; the form must not bring it again
      file.dispatchEvent(new Event("picked", { bubbles: true }));
    }
  });

  document.addEventListener("click", (event) => {
    const off = event.target.closest?.("[data-unpick]");
    if (!off) return;
    const form = off.closest("form");
    off.closest(".picked").remove();
    form?.dispatchEvent(new Event("picked"));
  });

  // Whether the options are open is kept when the form comes again.
  document.addEventListener(
    "toggle",
    (event) => {
      const name = event.target.dataset?.remember;
      const field = name && event.target.closest("form")?.elements[name];
      if (field) field.value = event.target.open ? "true" : "false";
    },
    true,
  );

  document.addEventListener("htmx:afterSettle", (event) => {
    if (event.detail.elt.id !== "create") return;
    event.detail.elt.querySelector("[aria-invalid=true]")?.focus();
  });

  onContent(addSliders);
  onContent(addGrowth);
  onContent(addDrops);
})();
