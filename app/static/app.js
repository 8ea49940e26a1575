// The little that htmx cannot do under our policy: no inline handlers, nothing evaluated.
// Everything works without it, but for comfort.
"use strict";

document.documentElement.classList.add("js");

(() => {
  const every = (selector, root) => [
    ...(root.matches?.(selector) ? [root] : []),
    ...root.querySelectorAll(selector),
  ];

  // ------------------------------------------------------------------------------- notes

  const LONG_ENOUGH = 6000;

  function toast(text, kind = "note") {
    const box = document.createElement("div");
    box.className = `toast toast-${kind}`;
    box.setAttribute("role", kind === "bad" ? "alert" : "status");
    const words = document.createElement("div");
    words.className = "toast-text";
    words.textContent = text;
    const close = document.createElement("button");
    close.type = "button";
    close.className = "toast-close";
    close.dataset.close = "";
    close.setAttribute("aria-label", "Close this note");
    close.textContent = "×";
    box.append(words, close);
    document.getElementById("toasts").append(box);
    keepForAWhile(box);
  }

  function keepForAWhile(box) {
    if (!box.classList.contains("toast-bad")) {
      setTimeout(() => box.remove(), LONG_ENOUGH);
    }
  }

  document.addEventListener("click", (event) => {
    const close = event.target.closest?.("[data-close]");
    if (close) close.closest(".toast")?.remove();
  });

  // -------------------------------------------------------------------------------- time

  const day = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });

  function ago(milliseconds) {
    const seconds = milliseconds / 1000;
    if (seconds < 45) return "just now";
    for (const [size, word] of [[86400, "d"], [3600, "h"], [60, "min"]]) {
      if (seconds >= size * 0.95) return `${Math.round(seconds / size)} ${word} ago`;
    }
    return "1 min ago";
  }

  function tellTimes(root) {
    for (const one of every("time[data-ago]", root)) {
      const at = new Date(one.dateTime);
      one.textContent = ago(Date.now() - at);
      one.title = day.format(at);
    }
    for (const one of every("time[data-local]", root)) {
      one.textContent = day.format(new Date(one.dateTime));
    }
  }

  setInterval(() => tellTimes(document), 20000);

  // ---------------------------------------------------------------------------- keyboard

  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      const form = event.target.closest?.("form[data-quick]");
      if (form) {
        event.preventDefault();
        form.requestSubmit();
      }
    }
  });

  // ------------------------------------------------------------------------------- forms

  // A form that leads on is sent once, however often its button is pressed meanwhile.  One that
  // brings a file stays where it is, and may be sent again.
  const MEANWHILE = 3000;

  document.addEventListener("submit", (event) => {
    const form = event.target;
    if (event.defaultPrevented || form.method !== "post") return;
    if (Date.now() - Number(form.dataset.sent ?? 0) < MEANWHILE) event.preventDefault();
    else form.dataset.sent = Date.now();
  });
  window.addEventListener("pageshow", () => {
    for (const form of document.querySelectorAll("form[data-sent]")) delete form.dataset.sent;
  });

  // -------------------------------------------------------------------------------- htmx

  // What is no page of ours (a refusal before any route, a proxy's) is not put into one.
  document.addEventListener("htmx:beforeSwap", (event) => {
    const kind = event.detail.xhr.getResponseHeader("Content-Type") || "";
    if (event.detail.xhr.status >= 400 && !kind.startsWith("text/html")) {
      event.detail.shouldSwap = false;
      let text = "That did not work. Try again.";
      try {
        text = JSON.parse(event.detail.xhr.responseText).detail || text;
      } catch {
        // No words of ours.
      }
      toast(text, "bad");
    }
  });
  document.addEventListener("htmx:sendError", () => {
    toast("The service does not answer. Is the network there?", "bad");
  });

  // ------------------------------------------------------------- what comes into the page

  const hooks = [tellTimes, (root) => every("[data-toast]", root).forEach(keepForAWhile)];

  function greet(root) {
    for (const hook of hooks) hook(root);
  }

  // For scripts of single pages: `mgs.onContent(fn)` runs for the page and for every piece
  // that htmx puts in.
  window.mgs = {
    toast,
    every,
    onContent(hook) {
      hooks.push(hook);
      hook(document);
    },
  };

  document.addEventListener("htmx:load", (event) => {
    if (event.detail.elt !== document.body) greet(event.detail.elt);
  });
  greet(document);
})();
